"""The LLMs that have names here: their models by default, their wordings, and the settings of every program."""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from latentwire.utils.cli import Settings, has_gpu, listed, option, require, value_of
from latentwire.utils.files import read_sealed

DEFAULT_LLMS = {"llama": "offline:smollm2-135m-instruct", "qwen": "offline:qwen2.5-coder-0.5b-instruct"}
LARGE_LLMS = {"llama": "meta-llama/Meta-Llama-3.1-8B-Instruct", "qwen": "Qwen/Qwen2.5-7B-Instruct"}  # on a GPU
MORE_LLMS = {"gemma": "offline:gemma-3-270m"}  # that have a name, on any machine, and are in no default list
# Chosen on 100 train questions as text (LOG.md, entry 2); a model that is not named here gets "chat".
CHOSEN_WORDINGS = {
    "offline:smollm2-135m-instruct": "plain",
    "offline:qwen2.5-coder-0.5b-instruct": "chat",
    "offline:gemma-3-270m": "plain",  # no chat template: "chat" is the same prompt
}
# The shapes of LARGE_LLMS, for times with random weights.
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
DTYPES = ("", "float32", "bfloat16", "float16", "native")
NOT_IN_NAMES = set("/:\\.")  # of LLMs: files are called by them, and a model's id is no name


@dataclass(kw_only=True)
class LLMSettings(Settings):
    """Which LLMs read, and how."""

    llms: str | None = option(
        None,
        "names of the LLMs; the model of x is read from X_ID; default: those of the checkpoint that is named, else "
        "llama,qwen",
        fallback=lambda cls: ",".join(_made_for(_named_now(cls)).get("llms") or DEFAULT_LLMS),
    )
    wordings: str = option("", "LLM=WORDING,...; default: the wording chosen for the model on train questions")
    max_new_tokens: int = option(12, "longest answer, in tokens", least=1)
    device: str = option("", "cpu, cuda, cuda:1, ...; default: cuda where there is one")
    dtype: str = option(
        "", "of the LLMs; default: float32 on a CPU, bfloat16 on a GPU; native: bfloat16 where the device has it",
        choices=DTYPES,
    )  # fmt: skip

    def check(self) -> None:
        if self.llms is None:
            self.llms = ",".join(self._begun.get("llms") or DEFAULT_LLMS)
        require(bool(self.llm_names), "llms", self.llms, "name at least one, for example llama,qwen")
        for name in self.llm_names:
            remedy = "that is a model's id: give it a name, for example x, and set X_ID to the id"
            require(not NOT_IN_NAMES & set(name), "llms", name, remedy)

    @property
    def llm_names(self) -> list[str]:
        return listed(self.llms)

    @property
    def llm_ids(self) -> dict[str, str]:
        """Model id of each LLM by name: X_ID in the environment, else the checkpoint's that is begun with, else the
        default of this machine."""
        made_for = self._begun.get("llms", {})
        return {name: llm_id(name, made_for, self.device) for name in self.llm_names}

    @property
    def llm_wordings(self) -> dict[str, str]:
        """Wording of each LLM's prompt by name: the one that is given, else that of the checkpoint which is begun with,
        if it is the same LLM there, else the one chosen for the model."""
        given = dict(part.partition("=")[::2] for part in listed(self.wordings))
        for name, wording in given.items():
            require(name in self.llm_names, "wordings", name, f"not among --llms {self.llms}; write LLM=WORDING,...")
            require(bool(wording), "wordings", name, "write LLM=WORDING,...")
        llms, kept = (self._begun.get(key, {}) for key in ("llms", "wordings"))
        ids = self.llm_ids
        chosen = {name: CHOSEN_WORDINGS.get(llm, "chat") for name, llm in ids.items()}
        return chosen | {name: kept[name] for name in kept if name in ids and ids[name] == llms.get(name)} | given

    @property
    def _begun(self) -> dict:
        """config.json of the checkpoint that is begun with, if one is named."""
        return _made_for(getattr(self, "ckpt", "") or getattr(self, "init", ""))


def _made_for(checkpoint: str) -> dict:
    """config.json of a checkpoint; nothing where none is named, or it has none."""
    path = Path(checkpoint, "config.json")
    return read_sealed(path) if checkpoint and path.is_file() else {}


def _named_now(cls: type[Settings]) -> str:
    """The checkpoint that a program begins with, by its variables."""
    named = [value_of(field, cls) for field in dataclasses.fields(cls) if field.name in ("ckpt", "init")]
    return next(filter(None, named), "")


def llm_id(name: str, made_for: Mapping[str, str], device: str = "") -> str:
    """Hub id, folder or offline id of the LLM called `name`; ValueError when nothing says which it is.

    made_for: the ids of a checkpoint; device: where it will run, this machine's own if "".
    """
    large = device.startswith("cuda") if device else has_gpu()
    found = os.environ.get(id_variable(name)) or made_for.get(name)
    found = found or (LARGE_LLMS if large else DEFAULT_LLMS).get(name) or MORE_LLMS.get(name)
    require(bool(found), "llms", name, f"set {id_variable(name)} to a hub id or a model folder")
    return found


def id_variable(name: str) -> str:
    """The variable that names the model of an LLM; one that every shell can export."""
    return re.sub(r"\W", "_", name.upper()) + "_ID"


def cache_dir() -> Path:
    """Folder of models, teacher answers and pace: LATENTWIRE_CACHE, else ~/.cache/latentwire."""
    return Path(os.environ.get("LATENTWIRE_CACHE") or "~/.cache/latentwire").expanduser()


def offline_folder(model_id: str) -> Path:
    """Where an offline model is kept once it is converted."""
    return cache_dir() / model_id.removeprefix("offline:")


def is_cached(model_id: str) -> bool:
    """Whether an offline model is there already."""
    return (offline_folder(model_id) / "config.json").is_file()
