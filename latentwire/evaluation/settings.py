"""Settings of an evaluation, of the demo, and of what fits codecs and reads answers from outside."""

from dataclasses import dataclass

from latentwire.data.question import SPLITS
from latentwire.data.settings import DataSettings, QuestionSettings, require_train_split
from latentwire.llms.known import LLMSettings
from latentwire.models.wire import CODECS
from latentwire.utils.cli import listed, option, require

DEFAULT_SAMPLES, DEFAULT_LATENT_LEN, DEFAULT_D_Z = 1000, 32, 256
OUTSIDE = ("kv_full", "kv_random", "kv_snapkv", "kv_expected_attention", "kv_kvzip", "kv_kvzip_uniform")  # kvpress's


@dataclass(kw_only=True)
class AnsweringSettings(LLMSettings, DataSettings):
    """Which LLMs answer which questions."""

    split: str = option(
        "dev", "dev; for choosing things (never choose on dev) train, or held_out: articles of train not trained on",
        choices=SPLITS,
    )  # fmt: skip
    samples: int | None = option(
        None, "number of questions; more than exist means all; default: 1000", least=1, fallback=DEFAULT_SAMPLES
    )
    skip: int = option(
        0, "questions of the seeded order that are left out at its beginning: those that were looked at before", least=0
    )
    ids: str = option(
        "", "manifest.json of an evaluation, or a file with one id per line: these questions, in this order", there=bool
    )
    fresh_eval: bool = option(False, "recompute everything, also over a folder of another configuration")

    def check(self) -> None:
        super().check()
        chosen = not self.ids or (self.samples is None and self.skip == 0)
        require(chosen, "ids", self.ids, "it names the questions: leave samples and skip out")

    @property
    def by_hand(self) -> bool:
        """Whether somebody chose how many questions there are."""
        return self.samples is not None or bool(self.ids)


@dataclass(kw_only=True)
class EvalSettings(AnsweringSettings):
    """One evaluation: which questions, which conditions, which LLMs."""

    ckpt: str = option("", "checkpoint folder; without it, the untrained wire (closed form) is built", there=bool)
    tuned: str = option("", "folder of scripts/baselines/tuned_baselines.sh, for the conditions that end in _tuned")
    conditions: str = option(
        "", "comma-separated names or groups; NAME@M gives one another M; default: all that fit the source", env=""
    )
    latent_len: int | None = option(
        None, "M, latents (or tokens) per question; default: the checkpoint's, else 32", least=1,
        fallback=DEFAULT_LATENT_LEN,
    )  # fmt: skip
    d_z: int | None = option(
        None, "width of a latent; default: the checkpoint's, else 256", least=1, fallback=DEFAULT_D_Z
    )
    codec: str = option("fp16", "wire codec", choices=tuple(CODECS))
    batch_size: int = option(32, "questions per batch", least=1)
    reuse: str = option(
        "", "an evaluation of the same questions: answers that the same files would give come from there", there=bool
    )
    save_dir: str = option(
        "", "output folder; default: in the checkpoint's folder, named by dataset, source, n and seed", env="OUTPUT_DIR"
    )
    estimate: bool = option(False, "say how long it would take, and stop", env="")
    json: bool = option(False, "with --estimate: one JSON object on standard output", env="")


@dataclass(kw_only=True)
class OutsideSettings(AnsweringSettings):
    """Answers of a rival from outside: kvpress's compressed key-value caches, question unseen. --step ask writes the
    questions that scripts/baselines/kv_cache.py answers, --step score makes an evaluation of the answers."""

    step: str = option("score", "which half of the work", choices=("ask", "score"), env="")
    source: str = option("context", "the cache is compressed before the question is known", choices=("context",))
    presses: str = option(",".join(OUTSIDE), "comma-separated conditions; kv_full removes nothing")
    latent_len: int = option(32, "M, entries of the context that a layer and head keep", least=1)
    save_dir: str = option("", "output folder; default: runs/baselines/kv_cache/M32, named by M", env="OUTPUT_DIR")

    def check(self) -> None:
        super().check()
        for name in self.press_names:
            require(name in OUTSIDE, "presses", name, f"choose among {', '.join(OUTSIDE)}")

    @property
    def press_names(self) -> list[str]:
        return listed(self.presses)


@dataclass(kw_only=True)
class DemoSettings(LLMSettings):
    """One question of one text, answered by each LLM from the text and from the wire. Without --context it asks."""

    ckpt: str = option(
        "checkpoints/latentwire_m32", "checkpoint folder; the default is the one that ships here", there=bool
    )
    context: str = option("", "file with the text", env="", there=bool)
    question: str = option("", "the question", env="")
    codec: str = option("fp16", "wire codec", choices=tuple(CODECS))

    def check(self) -> None:
        super().check()
        one = not self.context or bool(self.question.strip())
        require(one, "question", self.question, "--context needs one; without both, the demo asks")
        require(
            bool(self.context) or not self.question, "context", self.context, "--question needs a file with the text"
        )


@dataclass(kw_only=True)
class CodecSettings(QuestionSettings):
    """Tables for the compact codecs of a checkpoint, fitted on questions of train, and written beside it."""

    ckpt: str = option(
        "checkpoints/latentwire_m32", "checkpoint folder; the default is the one that ships here", there=bool
    )
    samples: int = option(2000, "questions of train to fit on", least=1)
    device: str = option("", "cpu, cuda, cuda:1, ...; default: cuda where there is one")

    def check(self) -> None:
        require_train_split(self.dataset)


PROGRAMS = {"eval": EvalSettings, "outside": OutsideSettings, "demo": DemoSettings, "fit_codec": CodecSettings}
