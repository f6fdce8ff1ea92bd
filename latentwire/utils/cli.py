"""Settings and errors of programs: one declaration per setting, read from flags, then the environment, then defaults.

A setting is a field of a `Settings` dataclass, made by `option`: its default (one on a CPU and one on a GPU), its line
for --help, its environment variable and its bounds.
"""

import argparse
import dataclasses
import errno
import os
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn, TypeVar

from latentwire.utils.launcher import end_with_launchers

SCHEMA = 1  # of every JSON record that a program writes
LONGEST_S = 2 * 3600  # on a CPU, of a size that nobody chose
# Variables that belong to no single program.
VARIABLES = {
    "SQUAD_DIR": "folder with SQuAD v1.1's train and dev files, plain or .gz",
    "MODELS_DIR": "folder that holds the offline models' original files already",
    "LATENTWIRE_CACHE": "folder of models, teacher answers and this machine's pace; default: ~/.cache/latentwire",
    "LATENTWIRE_TRACEBACK": "1 shows where an error came from",
    "LATENTWIRE_TOKEN": "bearer token that the service asks for; needed where it listens beyond this machine",
    "DEVICE_MAP": "auto: accelerate spreads the layers of each LLM over all GPUs (one process)",
    "RAY_ADDRESS": "address of a Ray cluster for the sweep and for corpora; default: this machine alone",
    "LLAMA_ID": "model of the LLM called llama: a hub id, a folder, or offline:NAME",
    "QWEN_ID": "model of the LLM called qwen; any other name X in LLMS has its X_ID",
    "PYTHON": "for scripts: another interpreter that has what requirements.txt names",
    "BASE_PYTHON": "for scripts: the Python that makes .venv; default: python3",
    "VLLM": "for vllm.sh: the package to install as vLLM, such as a build for CPUs; default: vllm>=0.10",
    "KVPRESS_PYTHON": "for kv_cache_baseline.sh: an interpreter that has kvpress; default: that of .venv-kvpress",
}

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, of AMD, of Windows' Linux
_CONTINUE = "what was finished is kept, run the same command to continue"
_UNSET = object()
_WORDS = {int: "a whole number", float: "a number", str: "text"}
_SWITCH = {"1": True, "0": False}

T = TypeVar("T")
S = TypeVar("S", bound="Settings")


def option(
    default: object,
    help: str,
    *,
    gpu: object = _UNSET,
    env: str | None = None,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    fallback: object = None,
    positional: bool = False,
    there: Callable[[str], bool] | None = None,
) -> dataclasses.Field:
    """A setting. gpu: its default on a GPU, or a function that gives it, where that differs; env: its variable, the
    field's name in upper case unless given ("" for none); least, above: bounds; fallback: what None comes to unless
    something else knows, or a function of the program's settings that tells it; positional: given without a flag's
    name; there: of which values a file or folder must be there when a program begins."""
    found = {"help": help, "env": env, "choices": choices, "least": least, "above": above, "fallback": fallback}
    found |= {"positional": positional, "there": there}
    if gpu is not _UNSET:
        return dataclasses.field(default=None, metadata=found | {"devices": (default, gpu)})
    return dataclasses.field(default=default, metadata=found)


def part(classes: Callable[[], dict[str, type["Settings"]]], chosen_by: str) -> dataclasses.Field:
    """Settings of the part that the setting `chosen_by` names; `classes` gives those of every part by name."""
    return dataclasses.field(default=None, metadata={"part": classes, "chosen_by": chosen_by})


@dataclass(kw_only=True)
class Settings:
    """Fills in defaults by device and checks choices and bounds; `check` of a subclass adds what concerns several."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None and "devices" in field.metadata:
                setattr(self, field.name, default_of(field, getattr(self, "device", os.environ.get("DEVICE", ""))))
            if getattr(self, field.name) is None and "part" in field.metadata:
                setattr(self, field.name, _part_class(field, vars(self))())
            _check(field, getattr(self, field.name))
        self.check()

    def check(self) -> None:
        """ValueError where settings do not fit each other."""


def default_of(field: dataclasses.Field, device: str = "") -> object:
    """The default of a setting on a device; "": that of this machine."""
    if "devices" not in field.metadata:
        return field.default
    found = field.metadata["devices"][device.startswith("cuda") if device else has_gpu()]
    return max(1, found()) if callable(found) else found  # a count of GPUs


def has_driver() -> bool:
    """Whether a GPU's driver is there, whatever PyTorch makes of it."""
    return any(os.path.exists(driver) for driver in _DRIVERS)


@cache
def has_gpu() -> bool:
    """Whether PyTorch sees a GPU; torch, which is slow to import, is asked only where there is a driver."""
    if not has_driver():
        return False
    import torch

    return torch.cuda.is_available()


def gpu_count() -> int:
    """How many GPUs PyTorch sees."""
    import torch

    return torch.cuda.device_count()


def variable_of(field: dataclasses.Field) -> str:
    """The environment variable of a setting; "" for none."""
    env = field.metadata["env"]
    return field.name.upper() if env is None else env


def fields_of(cls: type[Settings]) -> Iterator[dataclasses.Field]:
    """All settings of a program, those of its parts included, each name once."""
    found = {}
    for field in dataclasses.fields(cls):
        inner = field.metadata["part"]().values() if "part" in field.metadata else ()
        found |= {f.name: f for owner in inner for f in dataclasses.fields(owner)} if inner else {field.name: field}
    yield from found.values()


def parse(
    cls: type[S],
    argv: list[str] | None = None,
    epilog: Callable[[], str] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> S:
    """Read a program's settings: a flag, else its environment variable (an empty one is not set), else the default.

    epilog: what --help ends with; environment: of a program that is another than this one. Ends the program with status
    2 and one line at an unknown flag; ValueError naming the variable at a wrong value; FileNotFoundError where a file
    or folder is missing.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(
        description=cls.__doc__, epilog=epilog() if epilog and {"-h", "--help"} & set(argv) else "",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    fields = {field.name: field for field in fields_of(cls)}
    for field in fields.values():
        _add(parser, field)
    flags = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    values = dict(flags)
    for name, field in fields.items():
        text = environment.get(variable_of(field) or "", "")
        if name not in values and text:
            values[name] = _converted(field, text)
    built = _build(cls, values, flags)
    for field in dataclasses.fields(cls):  # before anything slow is imported
        value, there = getattr(built, field.name), field.metadata.get("there")
        if there and there(value):
            require_there(field.name, value)
    return built


def listed(text: str) -> list[str]:
    """What a text lists, separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def is_path(value: str) -> bool:
    """Whether a value that can be a name is meant as a path."""
    return os.sep in value or bool(Path(value).suffix)


def is_file(value: str) -> bool:
    """Whether a value is meant as a file: - is standard input, and nothing is no file."""
    return value not in ("", "-")


def value_of(field: dataclasses.Field, cls: type[Settings]) -> object:
    """What a setting of a program is now, without flags: its variable, else its default, else what None comes to."""
    text = os.environ.get(variable_of(field) or "", "")
    if text:
        _check(field, value := _converted(field, text))
        return value
    found = default_of(field, os.environ.get("DEVICE", ""))
    fallback = field.metadata["fallback"]
    return found if found is not None else fallback(cls) if callable(fallback) else fallback


def require(holds: bool, name: str, value: object, remedy: str) -> None:
    """Raise a ValueError that names the setting, its value and the remedy unless `holds`."""
    if not holds:
        raise ValueError(f"{name}={value!r}: {remedy}")


def require_text(name: str, text: object) -> None:
    """ValueError unless there is text that can be sent."""
    require(isinstance(text, str) and bool(text.strip()), name, text, "empty; give a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: sign {error.start} is half of a pair (a lone surrogate), no text") from error


def require_there(name: str, value: str) -> None:
    """Raise a FileNotFoundError that names the setting and its value unless there is such a file or folder."""
    if not Path(value).exists():
        raise FileNotFoundError(f"{name}={value!r}: there is no such file or folder")


def refuse_long(seconds: float, device: str, by_hand: bool, what: str) -> None:
    """Raise a ValueError where a job on a CPU takes over LONGEST_S and nobody chose its size."""
    if seconds > LONGEST_S and device == "cpu" and not by_hand:
        raise ValueError(
            f"samples: {what} would take about {seconds / 3600:.1f} hours on this CPU; choose fewer, or the same "
            "number by hand to run it anyway (SAMPLES=..., --samples ...)"
        )


def run(main: Callable[[], None]) -> None:
    """Run a program; a user's mistake ends it with one line and status 2. LATENTWIRE_TRACEBACK=1 shows where. It ends
    with the script or program that started it."""
    end_with_launchers()
    try:
        _printed(main)
    except (ValueError, OSError) as error:
        if os.environ.get("LATENTWIRE_TRACEBACK"):
            raise
        sys.exit(_fail(_said(error)))
    except KeyboardInterrupt:
        sys.exit(_fail(f"interrupted; {_CONTINUE}", status=130))
    except RuntimeError as error:
        torch = sys.modules.get("torch")  # imported by whoever can lose a device, or run out of its memory
        if torch is None or os.environ.get("LATENTWIRE_TRACEBACK"):
            raise
        if isinstance(error, torch.OutOfMemoryError):
            sys.exit(
                _fail(f"out of memory ({reason(error)}); lower BATCH_SIZE (--batch_size); what was finished is kept")
            )
        if isinstance(error, torch.AcceleratorError):
            sys.exit(_fail(f"the device failed ({reason(error)}); {_CONTINUE}; LATENTWIRE_TRACEBACK=1 shows where"))
        raise


def _printed(main: Callable[[], None]) -> None:
    """Run it to the last sign that it prints: at the interpreter's own end nobody could be told of a full disk."""
    try:
        main()
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter would try again
            raise


def reason(error: Exception) -> str:
    """The first line of what a library says, or at least the error's type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _said(error: ValueError | OSError) -> str:
    """What an error says; of a full disk, which the system tells without the file, what to do."""
    if isinstance(error, OSError) and error.errno in _FULL and not error.filename:
        return f"{error.strerror}; make room; {_CONTINUE}"
    return str(error)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    flags = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
    text = field.metadata["help"].replace("%", "%%") + shown_default(field)
    text += f" [{variable_of(field)}]" if variable_of(field) else ""
    if field.metadata["positional"]:
        parser.add_argument(field.name, nargs="?", type=_kind(field), default=None, metavar="FILE", help=text)
    elif _kind(field) is bool:
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, default=None, help=text)
    else:
        parser.add_argument(*flags, type=_kind(field), default=None, help=text)


def shown_default(field: dataclasses.Field) -> str:
    """The default as help texts write it."""
    if "devices" in field.metadata:
        cpu, gpu = field.metadata["devices"]
        gpu = "one per GPU" if callable(gpu) else gpu
        return f" (default: {cpu} on a CPU, {gpu} on a GPU)"
    return "" if field.default in ("", None) else f" (default: {as_variable(field.default)})"


def as_variable(value: object) -> str:
    """A setting as a variable has it: "" for nothing, 1 or 0 for a switch."""
    return "" if value is None else str(int(value) if isinstance(value, bool) else value)


def _kind(field: dataclasses.Field) -> type:
    """int of `int | None`, and so on."""
    if isinstance(field.type, types.UnionType):
        return next(kind for kind in field.type.__args__ if kind is not types.NoneType)
    return field.type


def _converted(field: dataclasses.Field, text: str) -> object:
    kind, name = _kind(field), variable_of(field)
    if kind is bool:
        require(text in _SWITCH, name, text, f"1 or 0 ({field.metadata['help']})")
        return _SWITCH[text]
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: must be {_WORDS[kind]}") from error


def _build(cls: type[S], values: dict[str, object], flags: Collection[str]) -> S:
    """The settings with these values. A flag that the chosen part does not know is an error; a variable may be meant
    for another program or run."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    mine = {name: value for name, value in values.items() if name in fields}
    rest = {name: value for name, value in values.items() if name not in fields}
    for name, field in fields.items():
        if "part" in field.metadata:
            by, given = field.metadata["chosen_by"], {f.name: f.default for f in fields.values()} | mine
            owner = _part_class(field, given)
            known = {f.name for f in dataclasses.fields(owner)}
            for other in sorted(set(flags) & _names_of_parts(field) - known):
                require(False, other, rest[other], f"{by} {given[by]} has no such setting; leave it out")
            mine[name] = owner(**{key: value for key, value in rest.items() if key in known})
    return cls(**mine)


def _names_of_parts(field: dataclasses.Field) -> set[str]:
    """The settings of every part that could be chosen."""
    return {f.name for owner in field.metadata["part"]().values() for f in dataclasses.fields(owner)}


def _part_class(field: dataclasses.Field, values: dict[str, object]) -> type[Settings]:
    classes, chosen = field.metadata["part"](), values[field.metadata["chosen_by"]]
    require(chosen in classes, field.metadata["chosen_by"], chosen, f"choose one of {', '.join(classes)}")
    return classes[chosen]


def _check(field: dataclasses.Field, value: object) -> None:
    choices, least, above = (field.metadata.get(key) for key in ("choices", "least", "above"))
    if choices:
        require(value in choices, field.name, value, f"choose one of {', '.join(filter(None, choices))}")
    if value is not None and least is not None:
        remedy = "must not be negative" if least == 0 else f"must be at least {least}"
        require(value >= least, field.name, value, remedy)
    if value is not None and above is not None:
        require(value > above, field.name, value, f"must be above {above}")


def _fail(message: str, status: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
