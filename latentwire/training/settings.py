"""Settings of training, and of what starts its processes."""

from dataclasses import dataclass

from latentwire.data.content import encoder_reads_question
from latentwire.data.settings import DataSettings, require_train_split
from latentwire.llms.known import LLMSettings
from latentwire.training.stages import ALL, STAGES
from latentwire.utils.cli import Settings, gpu_count, listed, option, part, require
from latentwire.utils.glance import glance

CODES = ("closed_form", "random")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def _encoders() -> dict[str, type[Settings]]:
    """Each encoder's own settings."""
    return {name: kind.Settings for name, kind in glance("latentwire.models.encoders.base").ENCODERS.items()}


def require_first_gpu(device: str) -> None:
    """ValueError for another one: accelerate gives each process a GPU of its own, whichever is named."""
    remedy = "training takes the first GPU that it sees: let it see that one alone, by CUDA_VISIBLE_DEVICES"
    require(device.partition(":")[2] in ("", "0"), "device", device, remedy)


@dataclass(kw_only=True)
class TrainSettings(LLMSettings, DataSettings):
    """One stage of training, or all of them in order. codebook: closed form; scores: the encoder learns which tokens
    matter, from answer spans; adapters: the LLMs' adapters and the codebook; joint: everything; join: a new LLM learns
    to read a finished wire; NAME_tuned: a rival's soft prompts."""

    stage: str = option("joint", f"all (that is {', '.join(ALL)}), or one of {', '.join(STAGES)}", env="")
    init: str = option(
        "", "checkpoint to start from: of the stage before; of a rival: whose selection it reads; of stage codebook: "
        "whose selection is kept", there=bool,
    )  # fmt: skip
    samples: int | None = option(
        None,
        "train questions, with source context all on a text before those on the next; more than exist means all; "
        "default: all; 0: stage join in closed form alone",
        least=0,
    )
    val_samples: int = option(100, "questions of train, from articles that are not trained on, for validation", least=1)
    epochs: int = option(2, "passes over the samples; of all stages: through the LLMs", gpu=3, least=1)
    scores_epochs: int = option(3, "stage all: passes of stage scores", least=1)
    scores_samples: int | None = option(None, "stage all: questions of stage scores; default: as samples", least=1)
    batch_size: int = option(16, "questions per step and process", gpu=32, least=1)
    micro_batch: int | None = option(
        None, "questions of a step that a process reads at once; default: all, or as many as fit the memory", least=1
    )
    latent_len: int = option(32, "M, latents per question", least=1)
    latent_lens: str = option(
        "", "numbers, for example 16,32,64: each step draws its M among them, so that one checkpoint serves all; "
        "validation is at latent_len",
    )  # fmt: skip
    first_latent_len: int | None = option(
        None, "M of a stage's first step, for example 96: over half of its steps it falls to latent_len, or "
        "latent_lens", least=1,
    )  # fmt: skip
    continuation_share: float = option(
        0.0, "share of questions in whose place a step asks how the text goes on; needs source context", least=0
    )
    d_z: int = option(256, "width of a latent; chosen at stage codebook", least=1)
    codes: str = option(
        "closed_form", "how stage codebook begins: in closed form, or random (an ablation)", choices=CODES
    )
    encoder_type: str = option(
        "hf",
        "hf: pretrained, chooses tokens; ids, ids_marked: the same, but codes alone, or with a mark; anchors, "
        "lead, windows: a latent per window; queries, byte: free queries",
    )
    encoder: Settings | None = part(_encoders, chosen_by="encoder_type")  # noqa: RUF009 - a field, as option() is
    adapter_type: str = option(
        "",
        "kind of the adapters, chosen at stage codebook (default: residual_mlp) or join (default: as the "
        "others; with samples 0 residual_mlp)",
    )
    k: int = option(4, "first tokens of an answer to learn; its end is learned, too", least=1)
    first_token_ce_weight: float = option(
        0.5, "extra weight of the cross-entropy of the first token that says anything", least=0
    )
    kd_weight: float = option(
        0.0, "weight of the KL divergence to the text-prompted LLM; 0: no teacher", gpu=0.5, least=0
    )
    teacher: str = option(
        "",
        "checkpoint of stage text_tuned, same source: its soft prompts stand before what the teacher reads",
        there=bool,
    )
    span_weight: float = option(1.0, "weight of the supervision by answer spans; 0: none", least=0)
    lr: float = option(5e-4, "learning rate of adapters, heads and queries", above=0)
    encoder_lr: float = option(1e-4, "learning rate of a pretrained backbone", above=0)
    codebook_lr: float = option(1e-3, "learning rate of the codebook", above=0)
    soft_prompt_lr: float = option(
        0.3, "learning rate of the rivals' soft prompts, in units of the LLM's embeddings", above=0
    )
    warmup: float = option(0.05, "share of the steps in which the learning rates rise", least=0)
    clip: float = option(1.0, "longest gradient", above=0)
    save_minutes: float = option(5.0, "minutes between two saves of checkpoint_last", least=0)
    tracker: str = option("", f"send the log to {', '.join(TRACKERS)}, too", choices=("", *TRACKERS))
    ignore_memory: bool = option(False, "start although the memory estimate says that it will not fit")
    save_dir: str = option("runs/experiments/latentwire", "output folder", env="OUTPUT_DIR")
    resume: bool = option(True, "continue the run in save_dir, if there is one; without, refuse it")
    estimate: bool = option(False, "say how long it would take, and stop", env="")
    json: bool = option(False, "with --estimate: one JSON object on standard output", env="")

    @property
    def most_latents(self) -> int:
        """The largest M of any step."""
        return max(self.latent_len, self.first_latent_len or 0, *self.lens)

    @property
    def lens(self) -> list[int]:
        """What each step's M is drawn among; none: latent_len."""
        return [int(one) for one in listed(self.latent_lens)]

    def check(self) -> None:
        super().check()
        require(self.dtype != "float16", "dtype", self.dtype, "training takes float32 or bfloat16")
        require(self.stage in (*STAGES, "all"), "stage", self.stage, f"choose all or one of {', '.join(STAGES)}")
        closed = self.stage != "all" and STAGES[self.stage].joins
        require(self.samples != 0 or closed, "samples", 0, f"stage {self.stage} needs questions: at least 1")
        fine = all(one.isdigit() and int(one) > 0 for one in listed(self.latent_lens))
        require(fine, "latent_lens", self.latent_lens, "numbers of at least 1 with commas between them")
        first, most = self.first_latent_len, self.most_latents
        require(not first or first == most, "first_latent_len", first, f"M falls from it: at least {most}")
        unknown = not encoder_reads_question(self.source)
        if self.adapter_type:
            glance("latentwire.models.adapters").ADAPTERS.pick(self.adapter_type)
        require_train_split(self.dataset)
        share, remedy = self.continuation_share, f"it needs source context, this is {self.source}"
        require(unknown or share == 0, "continuation_share", share, remedy)
        for name in ("continuation_share", "warmup"):
            require(getattr(self, name) <= 1, name, getattr(self, name), "it is a share: at most 1")
        require(bool(self.kd_weight) or not self.teacher, "teacher", self.teacher, "it needs a kd_weight above 0")
        if self.stage == "all":
            return
        stage = STAGES[self.stage]
        remedy = f"stage {self.stage} starts from a checkpoint: name one"
        require(bool(self.init) or not stage.needs_checkpoint, "init", self.init, remedy)
        require(bool(stage.losses) or not self.estimate, "estimate", True, f"stage {self.stage} has no steps to time")


@dataclass(kw_only=True)
class LaunchSettings(Settings):
    """How torchrun starts a training."""

    nproc: int = option(1, "processes of a training on this machine", gpu=gpu_count, least=1)
    rendezvous: str = option(
        "--standalone", "torchrun's flags for several machines with one disk: the same command on each"
    )
