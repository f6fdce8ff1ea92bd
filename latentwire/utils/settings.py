"""Settings: dataclasses, turned into flags once. Checks here run before anything is loaded."""

import argparse
import dataclasses
import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from latentwire.models.wire import CODECS
from latentwire.utils.runs import read_json

DEFAULT_LLMS = {"llama": "offline:smollm2-135m-instruct", "qwen": "offline:qwen2.5-coder-0.5b-instruct"}
# Chosen on 100 train questions as text (LOG.md); a model that is not named here gets "chat".
CHOSEN_WORDINGS = {"offline:smollm2-135m-instruct": "plain", "offline:qwen2.5-coder-0.5b-instruct": "chat"}
# The shapes of the brief's models, Llama-3.1-8B and Qwen2.5-7B, for times with random weights.
LARGE_SHAPES = {
    "llama": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    },
    "qwen": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
    },
}  # fmt: skip
DEFAULT_SAMPLES, DEFAULT_LATENT_LEN, DEFAULT_D_Z = 1000, 32, 256
SOURCES = ("prompt", "context")
SPLITS = ("dev", "train", "held_out")
POOLINGS = ("select", "cif")
DTYPES = ("float32", "bfloat16", "float16")
ENCODERS = ("hf", "byte", "queries")
TUNED = ("text_tuned", "token_budget_tuned", "selected_text_tuned")
STAGES = ("codebook", "scores", "adapters", "joint", *TUNED)
DEFAULT_ENCODER = "offline:all-minilm-l6-v2"
FULL_SQUAD = 87_599
LONGEST_S = 2 * 3600  # on a CPU, of a size that nobody chose

T = TypeVar("T")


def option(default: object, help: str) -> dataclasses.Field:
    """A setting with its default and its line in --help."""
    return dataclasses.field(default=default, metadata={"help": help})


class _Common:
    """What the settings of training and evaluation have in common."""

    llms: str
    wordings: str
    source: str

    def require_known(self) -> None:
        """ValueError where the source or the LLMs cannot be."""
        require(self.source in SOURCES, "source", self.source, f"choose {' or '.join(SOURCES)}")
        self.require_llms()

    def require_llms(self) -> None:
        """ValueError where no LLM is named."""
        require(bool(self.llm_names), "llms", self.llms, "name at least one, for example llama,qwen")

    @property
    def llm_names(self) -> list[str]:
        return [name.strip() for name in self.llms.split(",") if name.strip()]

    @property
    def llm_ids(self) -> dict[str, str]:
        """Model id of each LLM by name: from NAME_ID in the environment, else the checkpoint's that is begun with, else
        the offline default."""
        begun = Path(getattr(self, "ckpt", "") or getattr(self, "init", ""), "config.json")
        made_for = read_json(begun).get("llms", {}) if begun.is_file() else {}
        return {name: llm_id(name, made_for) for name in self.llm_names}

    @property
    def llm_wordings(self) -> dict[str, str]:
        """Wording of each LLM's prompt by name."""
        given = dict(part.strip().partition("=")[::2] for part in self.wordings.split(",") if part.strip())
        for name in given:
            require(name in self.llm_names, "wordings", name, f"not among --llms {self.llms}; write LLM=WORDING,...")
        return {name: given.get(name) or CHOSEN_WORDINGS.get(llm, "chat") for name, llm in self.llm_ids.items()}


@dataclass
class EvalConfig(_Common):
    """One evaluation: which questions, which conditions, which LLMs."""

    ckpt: str = option("", "checkpoint folder; without it, the untrained wire (stage 0) is built")
    tuned: str = option("", "folder of scripts/baselines/tuned_baselines.sh, for text_tuned and token_budget_tuned")
    dataset: str = option("squad", "squad (SQUAD_DIR, else the hub, else the sample set), sample, or a path")
    split: str = option(
        "dev", "dev; for choosing things (never choose on dev) train, or held_out: articles of train not trained on"
    )
    source: str = option("prompt", "prompt: Z stands for context and question; context: for the context alone")
    conditions: str = option("", "comma-separated; NAME@M gives one another M; default: all that fit the source")
    llms: str = option("llama,qwen", "names of the LLMs; NAME's model is read from NAME_ID, upper case")
    samples: int | None = option(None, "number of questions; more than exist means all; default: 1000")
    seed: int = option(0, "seed of the choice of questions, of shuffled_z and of the bootstrap")
    latent_len: int | None = option(None, "M, latents (or tokens) a question; default: the checkpoint's, else 32")
    d_z: int | None = option(None, "width of a latent; default: the checkpoint's, else 256")
    codec: str = option("fp16", "wire codec: fp16, int8 or int4")
    wordings: str = option("", "LLM=WORDING,...; default: the wording chosen for the model on train questions")
    max_new_tokens: int = option(12, "longest answer, in tokens")
    batch_size: int = option(32, "questions a batch")
    device: str = option("", "cpu, cuda, cuda:1, ...; default: cuda where there is one")
    dtype: str = option("", "float32, bfloat16 or float16; default: float32 on a CPU, bfloat16 on a GPU")
    reuse: str = option(
        "", "an evaluation of the same questions: answers that the same files would give come from there"
    )
    save_dir: str = option("", "output folder; default: beside the checkpoint, named by dataset, source, n and seed")
    estimate: bool = option(False, "say how long it would take, and stop")
    fresh_eval: bool = option(False, "recompute everything, also over a folder of another configuration")

    def __post_init__(self) -> None:
        for name in ("samples", "latent_len", "d_z", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        require(self.split in SPLITS, "split", self.split, f"choose one of {', '.join(SPLITS)}")
        self.require_known()
        require(self.codec in CODECS, "codec", self.codec, f"choose one of {', '.join(CODECS)}")
        require(self.dtype in ("", *DTYPES), "dtype", self.dtype, f"choose one of {', '.join(DTYPES)}")


@dataclass
class TrainConfig(_Common):
    """One stage of training. codebook: closed form; scores: the encoder learns which tokens matter, from answer spans;
    adapters: the LLMs' adapters and the codebook; joint: everything; text_tuned, token_budget_tuned,
    selected_text_tuned: the rivals' soft prompts."""

    stage: str = option("joint", f"one of {', '.join(STAGES)}")
    init: str = option("", "checkpoint of the stage before; for selected_text_tuned the one whose selection it reads")
    dataset: str = option("squad", "squad (SQUAD_DIR, else the hub, else the sample set), sample, or a folder")
    source: str = option("prompt", "prompt: Z stands for context and question; context: for the context alone")
    llms: str = option("llama,qwen", "names of the LLMs; NAME's model is read from NAME_ID, upper case")
    wordings: str = option("", "LLM=WORDING,...; default: the wording chosen for the model on train questions")
    samples: int | None = option(None, "train questions; more than exist means all; default: 87599")
    val_samples: int = option(100, "questions of train, from articles that are not trained on, for validation")
    epochs: int = option(3, "passes over the samples")
    batch_size: int = option(32, "questions a step and process")
    seed: int = option(0, "seed of the choice and order of questions, of dropout and of new weights")
    latent_len: int = option(DEFAULT_LATENT_LEN, "M, latents a question")
    d_z: int = option(DEFAULT_D_Z, "width of a latent; chosen at stage codebook")
    interface: str = option(
        "closed_form", "how stage codebook begins: closed_form, or random (an ablation: everything must be learned)"
    )
    encoder_type: str = option(
        "hf", "hf: pretrained, chooses tokens; queries: pretrained, free queries; byte: from scratch"
    )
    encoder_id: str = option(DEFAULT_ENCODER, "pretrained encoder: offline:..., a folder, or a hub id")
    pooling: str = option("select", "how hf fills the M places: select (whole tokens) or cif (blends)")
    k: int = option(4, "answer tokens to learn, the end of sequence among them")
    first_token_ce_weight: float = option(0.5, "extra weight of the first answer token's cross-entropy")
    kd_weight: float = option(0.5, "weight of the KL divergence to the text-prompted LLM; 0: no teacher")
    span_weight: float = option(1.0, "weight of the supervision by answer spans (hf only); 0: none")
    lr: float = option(5e-4, "learning rate of adapters, heads and queries")
    encoder_lr: float = option(1e-4, "learning rate of a pretrained backbone")
    codebook_lr: float = option(1e-3, "learning rate of the codebook")
    soft_prompt_lr: float = option(0.3, "learning rate of the rivals' soft prompts, in units of the LLM's embeddings")
    warmup: float = option(0.05, "share of the steps in which the learning rates rise")
    clip: float = option(1.0, "longest gradient")
    max_new_tokens: int = option(12, "longest answer at validation, in tokens")
    save_minutes: float = option(5.0, "time between two saves of checkpoint_last")
    device: str = option("", "cpu or cuda; default: cuda where there is one")
    dtype: str = option("", "of the frozen LLMs: float32 or bfloat16; default: float32 on a CPU, bfloat16 on a GPU")
    tensorboard: bool = option(False, "write TensorBoard events too (pip install tensorboard)")
    save_dir: str = option("runs/experiments/latentwire", "output folder")
    resume: bool = option(False, "continue the run in save_dir, if there is one")
    estimate: bool = option(False, "print the estimated time and stop")

    def __post_init__(self) -> None:
        for name in ("samples", "val_samples", "epochs", "batch_size", "latent_len", "d_z", "k", "max_new_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        for name in ("first_token_ce_weight", "kd_weight", "span_weight", "warmup", "save_minutes"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        for name in ("lr", "encoder_lr", "codebook_lr", "soft_prompt_lr", "clip"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be above 0")
        require(self.stage in STAGES, "stage", self.stage, f"choose one of {', '.join(STAGES)}")
        self.require_known()
        require(
            self.encoder_type in ENCODERS, "encoder_type", self.encoder_type, f"choose one of {', '.join(ENCODERS)}"
        )
        require(self.pooling in POOLINGS, "pooling", self.pooling, f"choose {' or '.join(POOLINGS)}")
        known = ("closed_form", "random")
        require(self.interface in known, "interface", self.interface, f"choose {' or '.join(known)}")
        require(self.dtype in ("", "float32", "bfloat16"), "dtype", self.dtype, "choose float32 or bfloat16")
        needs = self.stage not in ("codebook", "text_tuned", "token_budget_tuned")
        require(
            bool(self.init) or not needs, "init", self.init, f"stage {self.stage} starts from a checkpoint: name one"
        )
        require(
            self.stage != "codebook" or not self.estimate, "estimate", True, "stage codebook has no steps to be timed"
        )
        own = self.encoder_type == "hf" or self.stage not in ("scores", "adapters")
        require(own, "stage", self.stage, f"encoder_type {self.encoder_type} has no such stage; go on with joint")


@dataclass
class DiagnosticsConfig(_Common):
    """What a checkpoint's embeddings look like to each LLM, beside those of text, and what changing them does."""

    ckpt: str = option("", "checkpoint folder (needed)")
    dataset: str = option("squad", "squad (SQUAD_DIR, else the hub, else the sample set), sample, or a path")
    source: str = option("prompt", "prompt: Z stands for context and question; context: for the context alone")
    llms: str = option("llama,qwen", "names of the LLMs; NAME's model is read from NAME_ID, upper case")
    wordings: str = option("", "LLM=WORDING,...; default: the wording chosen for the model on train questions")
    samples: int = option(100, "dev questions; more than exist means all")
    seed: int = option(0, "seed of the choice of questions and of the bootstrap")
    batch_size: int = option(16, "questions a batch")
    max_new_tokens: int = option(12, "longest answer, in tokens")
    device: str = option("", "cpu, cuda, cuda:1, ...; default: cuda where there is one")
    dtype: str = option("", "float32, bfloat16 or float16; default: float32 on a CPU, bfloat16 on a GPU")
    save_dir: str = option("runs/embed_diagnostics", "output folder")

    def __post_init__(self) -> None:
        require(bool(self.ckpt), "ckpt", self.ckpt, "name a checkpoint folder")
        for name in ("samples", "batch_size", "max_new_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.dtype in ("", *DTYPES), "dtype", self.dtype, f"choose one of {', '.join(DTYPES)}")
        self.require_known()


_LISTS = {"latent_lens": int, "d_zs": int, "ftce_weights": float, "ks": int}


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


@dataclass
class SweepConfig(_Common):
    """Train and evaluate every combination of four lists. All other settings of the launchers (LR, KD_WEIGHT, ...) are
    read from the environment and are the same for all."""

    latent_lens: str = option("32,48,64", "list of M, latents a question")
    d_zs: str = option("256,512", "list of widths of a latent")
    ftce_weights: str = option("0.5,1.0", "list of extra weights of the first answer token's cross-entropy")
    ks: str = option("4,8", "list of numbers of answer tokens to learn")
    samples: int | None = option(None, "train questions of a configuration; more than exist means all; default: 10000")
    epochs: int = option(1, "passes of a configuration through the LLMs")
    eval_samples: int = option(300, "questions, from articles that are not trained on, that rank the configurations")
    dataset: str = option("squad", "squad (SQUAD_DIR, else the hub, else the sample set), sample, or a folder")
    llms: str = option("llama,qwen", "names of the LLMs; NAME's model is read from NAME_ID, upper case")
    seed: int = option(0, "seed of the choice of questions, of training and of the bootstrap")
    gpus_per_trial: int | None = option(None, "GPUs of a configuration; default: 1 where there are any, else 0")
    concurrent: int | None = option(
        None, "configurations at a time; default: 1 on a CPU, as many as there are GPUs for on GPUs"
    )
    save_dir: str = option("runs/sweeps/hyperparam", "output folder")
    dry_run: bool = option(False, "print the configurations and the estimated time, and stop")

    def __post_init__(self) -> None:
        for name in _LISTS:
            self.numbers(name)
        for name in ("samples", "epochs", "eval_samples", "concurrent"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        require((self.gpus_per_trial or 0) >= 0, "gpus_per_trial", self.gpus_per_trial, "must not be negative")
        self.require_llms()

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


@dataclass
class DemoConfig(_Common):
    """One question of one text, answered by each LLM from the text and from the wire. Without --context it asks."""

    ckpt: str = option("checkpoints/latentwire_m32", "checkpoint folder; default: the one that ships here")
    context: str = option("", "file with the text")
    question: str = option("", "the question")
    llms: str = option("llama,qwen", "names of the LLMs; NAME's model is read from NAME_ID, upper case")
    wordings: str = option("", "LLM=WORDING,...; default: the wording chosen for the model on train questions")
    codec: str = option("fp16", "wire codec: fp16, int8 or int4")
    max_new_tokens: int = option(12, "longest answer, in tokens")
    device: str = option("", "cpu, cuda, cuda:1, ...; default: cuda where there is one")
    dtype: str = option("", "float32, bfloat16 or float16; default: float32 on a CPU, bfloat16 on a GPU")

    def __post_init__(self) -> None:
        require(self.codec in CODECS, "codec", self.codec, f"choose one of {', '.join(CODECS)}")
        require(self.dtype in ("", *DTYPES), "dtype", self.dtype, f"choose one of {', '.join(DTYPES)}")
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "must be at least 1")
        self.require_llms()
        one = not self.context or bool(self.question.strip())
        require(one, "question", self.question, "--context needs one; without both, the demo asks")
        require(
            bool(self.context) or not self.question, "context", self.context, "--question needs a file with the text"
        )


@dataclass
class BenchmarkConfig(_Common):
    """Ratios of speed, ours beside the obvious way, measured in one run."""

    parts: str = option(
        "train,text_eval,serving,mfu,growth,processes", "comma-separated; those in save_dir are not repeated"
    )
    llms: str = option("llama,qwen", "names of the LLMs; NAME's model is read from NAME_ID, upper case")
    wordings: str = option("", "LLM=WORDING,...; default: the wording chosen for the model on train questions")
    random_weights: bool = option(False, "Llama-3.1-8B's and Qwen2.5-7B's shapes with random weights, made on the GPU")
    dataset: str = option("squad", "squad (SQUAD_DIR, else the hub, else the sample set), sample, or a path")
    batch_size: int = option(4, "questions a step, and a batch of an evaluation")
    steps: int = option(4, "steps (or batches) that a repeat takes")
    repeats: int = option(3, "how often everything is measured, after one round that is not counted")
    latent_len: int = option(DEFAULT_LATENT_LEN, "M, latents a question")
    d_z: int = option(DEFAULT_D_Z, "width of a latent")
    k: int = option(4, "answer tokens to learn, the end of sequence among them")
    encoder_id: str = option(DEFAULT_ENCODER, "pretrained encoder: offline:..., a folder, or a hub id")
    max_new_tokens: int = option(12, "longest answer, in tokens")
    device: str = option("", "cpu or cuda; default: cuda where there is one")
    dtype: str = option("", "of the frozen LLMs: float32 or bfloat16; default: float32 on a CPU, bfloat16 on a GPU")
    save_dir: str = option("runs/benchmark", "output folder")

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "repeats", "latent_len", "d_z", "k", "max_new_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        known = BenchmarkConfig.parts.split(",")
        for part in self.part_names:
            require(part in known, "parts", part, f"choose among {', '.join(known)}")
        require(self.dtype in ("", "float32", "bfloat16"), "dtype", self.dtype, "choose float32 or bfloat16")
        self.require_llms()

    @property
    def part_names(self) -> list[str]:
        return [part.strip() for part in self.parts.split(",") if part.strip()]


def llm_id(name: str, made_for: Mapping[str, str]) -> str:
    """Hub id, folder or offline id of the LLM called `name`; ValueError when nothing says which it is."""
    found = os.environ.get(f"{name.upper()}_ID") or made_for.get(name) or DEFAULT_LLMS.get(name)
    require(bool(found), "llms", name, f"set {name.upper()}_ID to a hub id or a model folder")
    return found


def require(holds: bool, name: str, value: object, remedy: str) -> None:
    """Raise a ValueError that names the setting, its value and the remedy unless `holds`."""
    if not holds:
        raise ValueError(f"{name}={value!r}: {remedy}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def parse(cls: type[T], argv: list[str] | None = None, epilog: str = "") -> T:
    """Read a settings dataclass from command-line flags, one --flag per field."""
    parser = _Parser(
        description=cls.__doc__, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for field in dataclasses.fields(cls):
        flag, text = f"--{field.name}", field.metadata["help"]
        if field.type is bool:
            parser.add_argument(*dict.fromkeys((flag, flag.replace("_", "-"))), action="store_true", help=text)
        else:
            kind = int if field.type == int | None else field.type
            shown = "" if field.default in ("", None) else f" (default: {field.default})"
            parser.add_argument(flag, type=kind, default=field.default, help=text + shown)
    return cls(**vars(parser.parse_args(argv)))
