"""What this machine has, what will run on it, and what to set: for people before their first run.

Nothing slow is imported and nothing is changed: without the environment the system's own Python tells the same. Only
where there is a GPU (or with --gpu) are the real programs run once, on tiny random models.
"""

import gzip
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from latentwire.llms.arithmetic import HALF, LLMS
from latentwire.llms.known import DEFAULT_LLMS, LARGE_LLMS, cache_dir, id_variable, is_cached
from latentwire.utils.cli import SCHEMA, Settings, gpu_count, has_gpu, option
from latentwire.utils.files import UNREADABLE, read_sealed, sha256_of
from latentwire.utils.surroundings import (
    aside,
    cards,
    cores,
    hub_is_there,
    index_is_there,
    installed,
    memory_mb,
    native_bfloat16,
    writable,
)

ROOT = Path(__file__).parents[2]
OK, NOTE, MISSING = "ok", "note", "missing"  # missing: the quickstart would not run
SHIPS, OWN = "checkpoints/latentwire_m32", "runs/experiments/latentwire/checkpoint_best"
# In megabytes. Of disk: all offline models (llms/offline.py) while they are made, and .venv; of memory, in float32.
MODELS_MB, ENVIRONMENT_MB, QUICKSTART_MB, TRAINING_MB = 4040, 6000, 6000, 10_000
SQUAD = {"train": 87599, "dev": 10570}  # questions of SQuAD v1.1
_LESS = "DTYPE=bfloat16 and a smaller BATCH_SIZE"
_LARGE = ("llama3.1-8b", "qwen2.5-7b")  # the LLMs that the project is for
_ROOM = 1.3  # a GPU's memory, in weights of the LLMs that it evaluates
_PATIENCE_S = 600
_TINY = ["--dataset=sample", "--llms=tiny", "--latent_len=8", "--d_z=16", "--max_new_tokens=2", "--batch_size=2"]
_TINY_TRAINING = ["--samples=8", "--val_samples=2", "--epochs=1", "--kd_weight=0", "--k=2"]


@dataclass(kw_only=True)
class DoctorSettings(Settings):
    """What this machine has, what will run on it, and what to set. Status 0 when the quickstart would run, else 1."""

    gpu: bool | None = option(
        None, "also run each of a GPU's ways once, on tiny random models; default: where there is one", env=""
    )
    device: str = option("cuda", "where --gpu runs them", env="")
    json: bool = option(False, "one JSON object on standard output", env="")


@dataclass(frozen=True)
class Finding:
    """sign: OK, NOTE or MISSING; what: a word or two; text: what was found, and the remedy."""

    sign: str
    what: str
    text: str


def doctor(config: DoctorSettings) -> int:
    """Print what was found, a line each; 0 when the quickstart would run, else 1."""
    found = []

    def say(finding: Finding) -> None:
        found.append(finding)
        if not config.json:
            print(f"{finding.sign:<8} {finding.what:<12} {finding.text}", flush=True)

    for finding in examine(ROOT):
        say(finding)
    if config.gpu or (config.gpu is None and installed("torch") and has_gpu()):
        for finding in try_device(config.device):
            say(finding)
    runs = all(finding.sign != MISSING for finding in found)
    if config.json:
        print(json.dumps({"schema": SCHEMA, "quickstart": runs, "findings": [asdict(one) for one in found]}, indent=1))
    else:
        print("the quickstart would run: bash scripts/quickstart.sh" if runs else "the quickstart would not run yet")
    return 0 if runs else 1


def examine(root: Path) -> Iterator[Finding]:
    """Everything that is told in seconds, of this machine and of the checkout in `root`."""
    hub = aside(hub_is_there)
    index = aside(index_is_there) if _has_to_fetch(root) else None
    yield _python()
    yield _environment(root)
    yield from _libraries(root)
    yield from _hardware()
    yield from _disk(root)
    checkpoint = _checkpoint_of(root)
    yield _checkpoint(root, checkpoint)
    yield from _models(root, checkpoint)
    yield _squad()
    answers = hub()
    yield from _network(answers, index and index())
    yield from _plans(answers)


def _python() -> Finding:
    """scripts/doctor.sh refuses one that is too old to read this file."""
    return Finding(OK, "Python", f"{platform.python_version()} ({sys.executable})")


def _environment(root: Path) -> Finding:
    if os.environ.get("PYTHON"):
        return Finding(OK, ".venv", f"not used: PYTHON={os.environ['PYTHON']}")
    if _in_date(root):
        return Finding(OK, ".venv", "there, as requirements.txt wants it")
    state = "out of date" if (root / ".venv").is_dir() else "not there yet"
    return Finding(NOTE, ".venv", f"{state}; any script makes it (a few minutes): bash scripts/setup_env.sh")


def _in_date(root: Path) -> bool:
    """As scripts/setup_env.sh decides it."""
    stamp, wanted = root / ".venv" / ".installed-requirements", [root / "requirements.txt", root / "pyproject.toml"]
    alive = (root / ".venv" / "bin" / "python").exists()  # no link to a Python that is gone
    return alive and stamp.is_file() and stamp.read_bytes() == b"".join(path.read_bytes() for path in wanted)


def _has_to_fetch(root: Path) -> bool:
    """Whether a first run needs the package index."""
    models = [name for name in _offline_ids(root) if not is_cached(name)]
    return bool(models) or not (os.environ.get("PYTHON") or _in_date(root))


def _libraries(root: Path) -> Iterator[Finding]:
    """The libraries of this interpreter against what the package needs (pyproject.toml) and what it was tested with."""
    will_be_made = not os.environ.get("PYTHON") and Path(sys.prefix).resolve() != (root / ".venv").resolve()
    if not installed("packaging") or not installed("torch"):
        if will_be_made:
            yield Finding(NOTE, "libraries", "none here; they come with .venv")
        else:
            yield Finding(MISSING, "libraries", "torch is not here; pip install -r requirements.txt")
        return
    from packaging.requirements import Requirement  # comes with the libraries

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [Requirement(text) for text in project["dependencies"]]
    lines = [line.partition("#")[0].strip() for line in (root / "requirements.txt").read_text().splitlines()]
    tested = [Requirement(line) for line in lines if line]
    yield Finding(OK, "libraries", ", ".join(f"{name} {installed(name)}" for name in ("torch", "transformers")))
    amiss = {one.name: f"{one} ({installed(one.name) or 'none'} here)" for one in needed if not _fits(one)}
    others = {one.name: f"{one} ({installed(one.name) or 'none'} here)" for one in tested if not _fits(one)}
    if amiss:
        sign = NOTE if will_be_made else MISSING
        yield Finding(sign, "libraries", f"needs {', '.join(amiss.values())}; pip install -r requirements.txt")
    if rest := [text for name, text in others.items() if name not in amiss]:
        yield Finding(NOTE, "libraries", f"tested with {', '.join(rest)}: last digits, or a study, may need them")


def _fits(requirement: object) -> bool:
    found = installed(requirement.name)
    return bool(found) and requirement.specifier.contains(found, prereleases=True)


def _hardware() -> Iterator[Finding]:
    memory, found = memory_mb(), cards()
    text = f"{cores()} cores, {memory / 1000:.0f} GB of memory"
    if memory < QUICKSTART_MB:
        yield Finding(MISSING, "machine", f"{text}; the quickstart needs about {QUICKSTART_MB / 1000:.0f}: set {_LESS}")
    else:
        yield Finding(OK, "machine", text)
    if native_bfloat16():
        yield Finding(OK, "bfloat16", "native on this processor: DTYPE=bfloat16 is faster, and halves the memory")
    else:
        yield Finding(NOTE, "bfloat16", "not native on this processor: leave DTYPE alone there (float32)")
    if found and "+cpu" in installed("torch"):
        yield Finding(NOTE, "GPU", f"{', '.join(found)}, and torch has no CUDA: install a build of torch that has it")
    elif found:
        yield Finding(OK, "GPU", ", ".join(found))
    else:
        yield Finding(NOTE, "GPU", "none; the small models run on the processor")


def _disk(root: Path) -> Iterator[Finding]:
    to_make = MODELS_MB if any(not is_cached(name) for name in _offline_ids(root)) else 0
    venv = 0 if os.environ.get("PYTHON") or (root / ".venv").is_dir() else ENVIRONMENT_MB
    places = {
        "runs/": (Path(os.environ.get("OUTPUT_DIR") or root / "runs"), 100, "OUTPUT_DIR to another folder"),
        **({"room for .venv": (root, venv, "PYTHON to an interpreter that has everything")} if venv else {}),
        "cache": (cache_dir(), to_make, "LATENTWIRE_CACHE to another folder"),
    }
    beside: dict[int, int] = {}  # megabytes that are needed of each disk
    for what, (folder, needed, remedy) in places.items():
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        disk = there.stat().st_dev
        needed = beside[disk] = beside.get(disk, 0) + needed
        free = shutil.disk_usage(there).free // 10**6
        text = f"{folder}: {free / 1000:.0f} GB free"
        if not writable(there):
            yield Finding(MISSING, what, f"{folder} cannot be written; set {remedy}")
        elif free < needed:
            yield Finding(MISSING, what, f"{text}, {needed / 1000:.1f} are needed; make room, or set {remedy}")
        else:
            yield Finding(OK, what, text)


def _checkpoint_of(root: Path) -> Path | None:
    """The checkpoint that scripts/quickstart.sh evaluates; None for none."""
    own = root / OWN
    name = os.environ.get("CKPT", str(own if (own / "config.json").is_file() else root / SHIPS))
    return root / name if name else None


def _made_for(folder: Path | None) -> dict:
    """config.json of a checkpoint; {} where there is none that can be read."""
    path = folder / "config.json" if folder else None
    try:
        return read_sealed(path) if path and path.is_file() else {}
    except ValueError:
        return {}


def _checkpoint(root: Path, folder: Path | None) -> Finding:
    """Whether each weights file is what config.json promises."""
    if folder is None:
        return Finding(OK, "checkpoint", "none (CKPT is empty): the untrained wire is evaluated")
    remedy = f"git checkout -- {SHIPS}" if folder == root / SHIPS else "name another: CKPT=..."
    made = _made_for(folder)
    if "llms" not in made:
        return Finding(MISSING, "checkpoint", f"{folder} has no config.json that can be read; {remedy}")
    for name, promised in made.get("sha256", {}).items():
        path = folder / name
        if not path.is_file():
            return Finding(MISSING, "checkpoint", f"{path} is not there; {remedy}")
        if sha256_of(path) != promised:
            return Finding(MISSING, "checkpoint", f"{path} is cut or damaged; {remedy}")
    others = {name: os.environ.get(id_variable(name)) or llm for name, llm in made["llms"].items()}
    if wrong := [name for name, llm in made["llms"].items() if others[name] != llm]:
        variables = " and ".join(id_variable(name) for name in wrong)
        return Finding(MISSING, "checkpoint", f"{folder} was made for other LLMs; unset {variables}, or set CKPT=")
    return Finding(OK, "checkpoint", f"{folder}, for {', '.join(made['llms'].values())}")


def _offline_ids(root: Path) -> list[str]:
    """The offline models that the quickstart reads."""
    made = _made_for(_checkpoint_of(root)) or _made_for(root / SHIPS)
    ids = [os.environ.get(id_variable(name)) or llm for name, llm in made.get("llms", DEFAULT_LLMS).items()]
    return [name for name in ids if name.startswith("offline:")]


def _models(root: Path, checkpoint: Path | None) -> Iterator[Finding]:
    for name in _offline_ids(root):
        if is_cached(name):
            yield Finding(OK, "model", f"{name} is in {cache_dir()}")
        else:
            yield Finding(
                NOTE, "model", f"{name} is not there yet; the first run fetches it, or takes it from MODELS_DIR"
            )
    encoder = _made_for(checkpoint).get("encoder_id") or ""
    if encoder.startswith("offline:") and not is_cached(encoder):
        yield Finding(NOTE, "model", f"{encoder} is not there yet; the first training fetches it")
    folder = os.environ.get("MODELS_DIR")
    if folder and not Path(folder).is_dir():
        yield Finding(NOTE, "model", f"MODELS_DIR={folder} is not a folder; unset it, or point it at one")


def _squad() -> Finding:
    """Whether SQUAD_DIR holds both files, and how many questions they have."""
    folder = os.environ.get("SQUAD_DIR")
    if not folder:
        remedy = "set it to a folder with SQuAD v1.1's train and dev files"
        return Finding(NOTE, "SQuAD", f"SQUAD_DIR is not set, so the quickstart reads the sample set alone; {remedy}")
    counts = {}
    for split in SQUAD:
        found = [path for path in Path(folder).glob(f"{split}*.json*") if path.name.endswith((".json", ".json.gz"))]
        if len(found) != 1:
            return Finding(
                MISSING, "SQuAD",
                f"SQUAD_DIR={folder} holds {len(found)} {split}*.json or .json.gz, not one; set it to a folder with "
                "SQuAD v1.1's files, or unset it",
            )  # fmt: skip
        try:
            counts[split] = _questions(found[0])
        except (*UNREADABLE, OSError, EOFError, KeyError, TypeError, zlib.error) as error:
            said = (
                f"{found[0]} is not in SQuAD v1.1's form ({type(error).__name__}); fetch it again, or unset SQUAD_DIR"
            )
            return Finding(MISSING, "SQuAD", said)
    told = ", ".join(f"{split} {count}" for split, count in counts.items())
    if counts != SQUAD:
        return Finding(NOTE, "SQuAD", f"{folder}: {told}, which is not all of SQuAD v1.1 ({SQUAD}); results name it")
    return Finding(OK, "SQuAD", f"{folder}: {told} questions")


def _questions(path: Path) -> int:
    raw = path.read_bytes()
    document = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    return sum(len(paragraph["qas"]) for article in document["data"] for paragraph in article["paragraphs"])


def _network(hub: bool, index: bool | None) -> Iterator[Finding]:
    """index: None where nothing is to be fetched."""
    if hub:
        yield Finding(OK, "hub", "it answers")
    else:
        yield Finding(NOTE, "hub", "no answer (or HF_HUB_OFFLINE, or no libraries yet): models are offline, or folders")
    if index:
        yield Finding(OK, "index", "pip finds packages")
    elif index is not None:
        remedy = "point pip at an index (PIP_INDEX_URL), or set PYTHON and MODELS_DIR to what is there already"
        yield Finding(MISSING, "index", f"pip found no package, and .venv or models are to be fetched; {remedy}")


def _plans(hub: bool) -> Iterator[Finding]:
    """What will run beside the quickstart, and what it needs."""
    estimate = "python latentwire/train.py --stage all --estimate tells time and memory"
    enough = memory_mb() >= TRAINING_MB
    text = "on the GPU" if cards() else "on the processor" if enough else f"wants {TRAINING_MB / 1000:.0f} GB of memory"
    yield Finding(OK if enough or cards() else NOTE, "training", f"of the small models: {text}; {estimate}")
    needed, there = HALF * sum(LLMS[name].parameters for name in _LARGE) / 1e6, cards().values()
    what = f"{' and '.join(LARGE_LLMS.values())}: {needed / 1000:.0f} GB of weights in bfloat16"
    where = "" if hub else "; without a hub they are read from folders: set LLAMA_ID and QWEN_ID"
    if needed * _ROOM <= max(there, default=0):
        yield Finding(OK, "large LLMs", f"{what}: on one GPU{where}")
    elif needed * _ROOM <= sum(there):
        yield Finding(NOTE, "large LLMs", f"{what}: more than one GPU; set DEVICE_MAP=auto NPROC=1{where}")
    else:
        yield Finding(NOTE, "large LLMs", f"{what}: not here; a GPU of {needed * _ROOM / 1000:.0f} GB or more{where}")


def try_device(device: str) -> Iterator[Finding]:
    """Run the real programs on tiny random models in each of a GPU's ways; what fails says why."""
    with tempfile.TemporaryDirectory() as folder:
        _tiny_llm(Path(folder) / "llm")
        for number, (what, (sign, command, device_map)) in enumerate(_ways(device).items()):
            where = ["--device", device, "--save_dir", f"{folder}/{number}"]
            error = _error_of([*command, *_TINY, *where], Path(folder), device_map)
            yield Finding(sign if error else OK, "tried", f"{what}: {error or 'works'}")


def _ways(device: str) -> dict[str, tuple[str, list[str], str]]:
    """By name: what a failure means, the command, and its DEVICE_MAP. Two processes need two GPUs."""
    processes = min(2, gpu_count()) if device.startswith("cuda") else 2
    torchrun = ["-m", "latentwire.utils.launcher", "torch.distributed.run"]
    torchrun += ["--standalone", f"--nproc_per_node={processes}"]
    train = [*torchrun, "latentwire/train.py", "--stage=all", "--encoder_type=byte", *_TINY_TRAINING]
    evaluate = ["latentwire/eval.py", "--conditions=text,latentwire", "--samples=4"]
    return {
        f"{device}": (MISSING, [*evaluate, "--dtype=float32"], ""),
        f"{device}, bfloat16": (MISSING, [*evaluate, "--dtype=bfloat16"], ""),
        "DEVICE_MAP=auto": (NOTE, [*evaluate, "--dtype=bfloat16"], "auto"),
        f"torchrun, {processes} processes": (NOTE, [*train, "--dtype=float32"], ""),
    }


def _tiny_llm(folder: Path) -> None:
    """A random LLM of two layers with the tokenizer of the checkpoint that ships here."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel  # slow to import, and only needed here

    tokenizer = AutoTokenizer.from_pretrained(ROOT / SHIPS / "wire_tokenizer", local_files_only=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _error_of(command: Sequence[str], folder: Path, device_map: str) -> str:
    """What a program that failed said last, "" for one that did not."""
    environment = os.environ | dict.fromkeys(("CKPT", "INIT", "REUSE", "TUNED", "TRACKER", "WORDINGS"), "")
    environment |= {"TINY_ID": str(folder / "llm"), "LATENTWIRE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    environment |= {"DEVICE_MAP": device_map, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        return f"it hung for {_PATIENCE_S} seconds"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["it said nothing"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ") or "Error: " in line]
    return (errors or lines)[-1] if done.returncode else ""
