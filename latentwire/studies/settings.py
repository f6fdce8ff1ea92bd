"""Settings of the studies: diagnostics, sweep, benchmark, the whole suite, ablations, arms, dense latents."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from latentwire.data.settings import DataSettings
from latentwire.llms.known import DEFAULT_LLMS, LLMSettings
from latentwire.training.settings import require_first_gpu
from latentwire.utils.cli import Settings, is_path, listed, option, require, require_there

PARTS = ("train", "text_eval", "serving", "together", "encode", "mfu", "growth", "processes")
SWEEP_SAMPLES = 10_000
_LISTS = {"latent_lens": int, "d_zs": int, "ftce_weights": float, "ks": int}


@dataclass(kw_only=True)
class DiagnosticsSettings(LLMSettings, DataSettings):
    """What a checkpoint's embeddings look like to each LLM, beside those of text, and what changing them does."""

    ckpt: str = option("", "checkpoint folder (needed)", there=bool)
    eval_samples: int = option(100, "dev questions; more than exist means all", least=1)
    train_samples: int = option(1000, "for the script: train questions of the checkpoint that it makes", least=1)
    batch_size: int = option(16, "questions per batch", least=1)
    save_dir: str = option("runs/embed_diagnostics", "output folder", env="OUTPUT_DIR")

    def check(self) -> None:
        super().check()
        require(bool(self.ckpt), "ckpt", self.ckpt, "name a checkpoint folder")


@dataclass(frozen=True)
class Configuration:
    """One combination of a sweep's lists."""

    latent_len: int
    d_z: int
    first_token_ce_weight: float
    k: int

    @property
    def name(self) -> str:
        return f"M{self.latent_len}_dz{self.d_z}_ftce{self.first_token_ce_weight}_K{self.k}"

    def is_finished(self, folder: Path) -> bool:
        """Whether the sweep in `folder` has its evaluation."""
        return (folder / self.name / "eval" / "results.json").is_file()


@dataclass(kw_only=True)
class SweepSettings(LLMSettings, DataSettings):
    """Train and evaluate every combination of four lists. All other settings of training (LR, KD_WEIGHT, ...) are read
    from the environment and are the same for all."""

    latent_lens: str = option("32,48,64", "list of M, latents per question")
    d_zs: str = option("256,512", "list of widths of a latent")
    ftce_weights: str = option("0.5,1.0", "list of extra weights of the first answer token's cross-entropy")
    ks: str = option("4,8", "list of numbers of answer tokens to learn")
    samples: int | None = option(
        None,
        "train questions of a configuration; more than exist means all; default: 10000",
        least=1,
        fallback=SWEEP_SAMPLES,
    )
    epochs: int = option(1, "passes of a configuration through the LLMs", least=1)
    eval_samples: int = option(
        300, "questions, from articles that are not trained on, that rank the configurations", least=1
    )
    gpus_per_trial: int = option(0, "GPUs of a configuration", gpu=1, least=0)
    concurrent: int = option(0, "configurations at a time; 0: as many as there are GPUs for, 1 without GPUs", least=0)
    save_dir: str = option("runs/sweeps/hyperparam", "output folder", env="OUTPUT_DIR")
    dry_run: bool = option(False, "print the configurations and the estimated time, and stop", env="")
    time: bool = option(False, "measure a few steps and batches, for minutes, instead of a cost model", env="")
    json: bool = option(False, "with --dry-run: one JSON object on standard output", env="")

    def check(self) -> None:
        super().check()
        for name in _LISTS:
            self.numbers(name)

    @property
    def grid(self) -> list[Configuration]:
        """Every combination, in the order of the lists."""
        return [Configuration(*values) for values in itertools.product(*map(self.numbers, _LISTS))]

    def numbers(self, name: str) -> list[int] | list[float]:
        """The numbers of one list, in its order; ValueError if one is wrong or stands there twice."""
        kind, text = _LISTS[name], getattr(self, name)
        least = 1 if kind is int else 0
        try:
            found = [kind(part) for part in text.replace(",", " ").split()]
        except ValueError:
            found = []
        holds = bool(found) and len(set(found)) == len(found) and all(number >= least for number in found)
        what = "whole numbers" if kind is int else "numbers"
        require(holds, name, text, f"list {what} of at least {least}, each once, separated by commas")
        return found


@dataclass(kw_only=True)
class BenchmarkSettings(LLMSettings):
    """Ratios of speed, ours beside the obvious way, measured in one run."""

    parts: str = option(",".join(PARTS), "comma-separated; those in save_dir are not repeated")
    random_weights: bool = option(
        False, "Llama-3.1-8B's and Qwen2.5-7B's shapes with random weights, made on the device"
    )
    dataset: str = option(
        "squad", "squad (SQUAD_DIR, else the hub, else the sample set), sample, or a path", there=is_path
    )
    # The plain step keeps what every layer computed: 16 questions of it take more than 24 GB of a CPU's memory, and of
    # 8B and 7B models more than a GPU's 80.
    batch_size: int = option(4, "questions per step, and per batch of an evaluation", gpu=8, least=1)
    recompute: bool = option(
        False, "the plain step computes its layers again in the backward pass (gradient checkpointing), so that more "
        "questions fit",
    )  # fmt: skip
    steps: int = option(4, "steps (or batches) that a repeat takes", least=1)
    repeats: int = option(3, "how often everything is measured, after one round that is not counted", least=1)
    latent_len: int = option(32, "M, latents per question", least=1)
    d_z: int = option(256, "width of a latent", least=1)
    k: int = option(4, "answer tokens to learn, the end of the answer among them", least=1)
    encoder_id: str = option("", "pretrained encoder: offline:..., a folder, or a hub id; default: that of training")
    ckpt: str = option(
        "", "checkpoint whose encoder and adapters are measured; default: those that training begins with", there=bool
    )
    save_dir: str = option("runs/benchmark", "output folder", env="OUTPUT_DIR")

    def check(self) -> None:
        super().check()
        for part in self.part_names:
            require(part in PARTS, "parts", part, f"choose among {', '.join(PARTS)}")
        require(self.dtype != "float16", "dtype", self.dtype, "training takes float32 or bfloat16")
        require_first_gpu(self.device)
        require(
            not (self.ckpt and self.random_weights),
            "ckpt",
            self.ckpt,
            "it fits no LLM of random weights: leave one out",
        )

    @property
    def part_names(self) -> list[str]:
        return listed(self.parts)


@dataclass(kw_only=True)
class SuiteSettings(Settings):
    """Everything: baselines, rivals, training, evaluation, page, critical tests. Each step reads its own settings
    (SAMPLES, EPOCHS, LATENT_LEN, ...) from the environment."""

    eval_samples: int = option(1000, "questions of each evaluation; more than exist means all", least=1)
    trained_rivals: bool = option(True, "train the rivals' soft prompts, too")
    save_dir: str = option("runs/all", "output folder", env="OUTPUT_DIR")
    dry_run: bool = option(False, "print the plan and the estimated time, and stop", env="")
    time: bool = option(False, "measure a few steps and batches, for minutes, instead of a cost model", env="")
    json: bool = option(False, "with --dry-run: one JSON object on standard output", env="")


@dataclass(kw_only=True)
class PlanSettings(Settings):
    """What training, a corpus and serving would take, on paper: from shapes of models and from measured figures."""

    llms: str = option("llama3.1-8b,qwen2.5-7b", "shapes of LLMs, separated by commas", env="")
    gpus: int = option(4, "GPUs of the training and of the encoding", least=1, env="")
    gpu_tflops: float = option(
        989.0, "operations of a GPU per second at most, in 10^12: bfloat16 of an H100", above=0, env=""
    )
    gpu_gb: float = option(80.0, "memory of a GPU", above=0, env="")
    share: float = option(0.3, "of these operations, what training and prefill reach", above=0, env="")
    encoder_share: float = option(0.05, "what the small encoder reaches, which its tokenizer feeds", above=0, env="")
    gpu_price: float = option(2.5, "dollars for a GPU's hour", least=0, env="")
    core_price: float = option(0.04, "dollars for a processor core's hour", least=0, env="")
    storage_price: float = option(0.023, "dollars for a GB (10^9 bytes) kept for a month", least=0, env="")
    network_price: float = option(0.05, "dollars for a GB sent", least=0, env="")
    samples: int = option(87_599, "questions of the training", least=1, env="")
    epochs: int = option(3, "passes of the training", least=1, env="")
    batch_size: int = option(32, "questions per step and GPU", least=1, env="")
    latent_len: int = option(32, "M, latents of a text", least=1, env="")
    k: int = option(4, "answer tokens to learn", least=1, env="")
    documents: str = option("1e6,1e9", "numbers of documents to encode and keep", env="")
    questions: float = option(1000.0, "questions of readers per second", above=0, env="")
    tokens: str = option("190,1000,4000", "lengths of the texts that are asked about", env="")
    answer_tokens: int = option(12, "tokens of an answer", least=1, env="")
    in_flight: float = option(1.0, "seconds that a question keeps its cache", above=0, env="")

    def check(self) -> None:
        for name in ("documents", "tokens"):
            self.numbers(name)

    def numbers(self, name: str) -> list[float]:
        """The numbers of one list; ValueError if one is wrong."""
        text = getattr(self, name)
        try:
            found = [float(part) for part in text.split(",")]
        except ValueError:
            found = [0.0]
        require(min(found) >= 1, name, text, "list numbers of at least 1, separated by commas")
        return found


@dataclass(kw_only=True)
class SeveralTrainings(LLMSettings):
    """What scripts that train several things alike share."""

    at_once: int = option(
        1,
        "trainings, each with its evaluation, that run at a time: each with its share of the cores, on one GPU in turn "
        "where there are GPUs; those on one device share its memory",
        least=1,
    )


@dataclass(kw_only=True)
class AblationSettings(SeveralTrainings):
    """What each part is worth: one short training per row (scripts/experiments/ablations.sh)."""

    rows: str = option(
        "queries byte random_codes cif kd no_span perturbed M8 M16 M64", "which rows, separated by spaces"
    )
    llms: str = option(next(iter(DEFAULT_LLMS)), "names of the LLMs; the model of x is read from X_ID")
    samples: int = option(2000, "train questions of a row", least=1)
    epochs: int = option(1, "passes of a row through the LLMs", least=1)
    scores_epochs: int = option(1, "passes of its stage scores", least=1)
    kd_weight: float = option(0.0, "weight of the teacher in every row but kd", least=0)
    eval_samples: int = option(300, "questions, from articles that are not trained on, that judge a row", least=1)
    save_dir: str = option("runs/ablations", "output folder", env="OUTPUT_DIR")


@dataclass(kw_only=True)
class ArmsSettings(SeveralTrainings):
    """What latents add to the tokens that they stand on: arms that are trained alike, each with several seeds
    (scripts/experiments/train_arms.sh)."""

    arms: str = option(
        "latentwire ids_marked ids more_ids selected_text_tuned selected_words_tuned text_tuned untrained",
        "which arms, separated by spaces",
    )
    more: int = option(96, "M of arm more_ids, whose bytes are then those of arm latentwire with compact8", least=1)
    seeds: str = option("0 1 2", "training seeds of each arm, separated by spaces")
    ckpt: str = option("checkpoints/latentwire_m32", "checkpoint whose selection all arms send")
    adapter_type: str = option(
        "preamble", "of all arms that send latents or ids: preamble, the means of the rivals' soft prompts, or deep",
        choices=("preamble", "deep"),
    )  # fmt: skip
    source: str = option(
        "aware", "aware, or context: the question is text behind the wire", choices=("aware", "context")
    )
    llms: str = option(next(iter(DEFAULT_LLMS)), "names of the LLMs; the model of x is read from X_ID")
    samples: int = option(3200, "train questions of an arm", least=1)
    epochs: int = option(1, "passes of an arm", least=1)
    k: int = option(12, "first tokens of an answer to learn; its end is learned, too", least=1)
    eval_samples: int = option(2800, "dev questions that judge an arm", least=1)
    skip: int = option(1000, "dev questions that are left out first: those that were looked at before", least=0)
    ids: str = option(
        "", "manifest.json of an evaluation; its questions judge the arms, in place of SKIP and EVAL_SAMPLES"
    )
    save_dir: str = option("runs/arms", "output folder", env="OUTPUT_DIR")


@dataclass(kw_only=True)
class DenseSettings(SeveralTrainings):
    """Latents of a text that nobody has asked about yet, and what they add to the tokens that lead them
    (scripts/experiments/train_dense.sh). Other settings of a training are read from the environment."""

    arms: str = option(
        "lead first_deep",
        "which arms, separated by spaces: lead: the first M tokens, a residual made from the rest, and deep adapters; "
        "first_deep: those tokens' codes alone, and deep adapters; first: the codes alone; dense: anchors, their "
        "residual, and deep adapters; codes: the same anchors' codes alone; windows: a window's mean, and deep "
        "adapters; budget: text cut to M tokens behind a soft prompt",
    )
    seeds: str = option("0", "training seeds of each arm, separated by spaces; three or more can be compared")
    latent_lens: str = option("16,32,64", "each step draws its M among them, and each arm is judged at all of them")
    first_latent_len: int | None = option(None, "M of an arm's first step, which then falls; default: no fall", least=1)
    continuation_share: float = option(
        0.0, "share of questions in whose place a step asks how the text goes on", least=0
    )
    llms: str = option(next(iter(DEFAULT_LLMS)), "names of the LLMs; the model of x is read from X_ID")
    scores_samples: int = option(
        32_000, "train questions that teach the anchors which tokens answers are made of, without an LLM; 0: none",
        gpu=100_000, least=0,
    )  # fmt: skip
    samples: int = option(16_000, "train questions of an arm", gpu=100_000, least=1)
    epochs: int = option(1, "passes of an arm", gpu=3, least=1)
    k: int = option(12, "first tokens of an answer to learn; its end is learned, too", least=1)
    kd_weight: float = option(0.5, "weight of the KL divergence to a teacher that reads the whole text", least=0)
    teacher_samples: int = option(3200, "train questions of the teacher's soft prompt", gpu=20_000, least=1)
    eval_samples: int = option(1000, "dev questions that judge an arm", least=1)
    skip: int = option(1000, "dev questions that are left out first: those that were looked at before", least=0)
    ids: str = option(
        "", "manifest.json of an evaluation; its questions judge the arms, in place of SKIP and EVAL_SAMPLES"
    )
    save_dir: str = option("runs/experiments/dense", "output folder", env="OUTPUT_DIR")


PROGRAMS = {
    "diagnostics": DiagnosticsSettings, "sweep": SweepSettings, "benchmark": BenchmarkSettings, "suite": SuiteSettings,
    "plan": PlanSettings, "ablations": AblationSettings, "arms": ArmsSettings, "dense": DenseSettings,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """folders: evaluations, one per training seed; condition: whose rows are compared."""

    folders: tuple[Path, ...]
    condition: str


def parse_run(text: str, condition: str) -> Run:
    """ "FOLDER,FOLDER,...:CONDITION" to a run; without a condition it is the given one. FileNotFoundError for a folder
    that is not there."""
    folders, _, own = text.partition(":")
    for folder in folders.split(","):
        require_there("run", folder)
    return Run(tuple(map(Path, folders.split(","))), own or condition)
