"""What is declared of settings, for people (docs/settings.md) and for scripts."""

import dataclasses
from collections.abc import Mapping

from latentwire.utils.cli import VARIABLES, Settings, fields_of, require, shown_default, value_of, variable_of

_HEAD = """# Settings

Every setting is declared once, in Python. A program takes its flag first, then its variable, then the default. An empty
variable is not set. Scripts take variables; serve.sh, encode_corpus.sh, run_all.sh, sweep_hyperparams.sh, load_test.sh,
doctor.sh and vllm.sh take the flags of their program, too.
`python latentwire/settings.py --markdown` writes this page.
"""


def page(programs: Mapping[str, type[Settings]]) -> str:
    """docs/settings.md: the variables of all programs, then the settings of each; programs: by name."""
    lines = [_HEAD, "## Of all programs", "", "| variable | what it does |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, text in VARIABLES.items()]
    for name, cls in programs.items():
        about = " ".join((cls.__doc__ or "").split())
        lines += ["", f"## {name}", "", about, "", "| flag | variable | default | what it does |", "|---|---|---|---|"]
        lines += [_row(field) for field in fields_of(cls)]
    return "\n".join(lines) + "\n"


def current(cls: type[Settings]) -> list[tuple[str, object]]:
    """The variables of a program with what they are now, as `one` has it."""
    return [(variable_of(field), _now(field, cls)) for field in fields_of(cls) if variable_of(field)]


def one(cls: type[Settings], name: str) -> object:
    """What one setting is now, "" for nothing; ValueError for an unknown name."""
    fields = {field.name: field for field in dataclasses.fields(cls) if "part" not in field.metadata}
    if name not in fields:  # parts are slow to import, and seldom asked for
        fields = {field.name: field for field in fields_of(cls)}
    require(name in fields, "setting", name, f"unknown; choose one of {', '.join(fields)}")
    return _now(fields[name], cls)


def _now(field: dataclasses.Field, cls: type[Settings]) -> object:
    """As a variable has it: "" for nothing, 1 or 0 for a switch."""
    found = value_of(field, cls)
    return "" if found is None else int(found) if isinstance(found, bool) else found


def _row(field: dataclasses.Field) -> str:
    variable = f"`{variable_of(field)}`" if variable_of(field) else ""
    default = shown_default(field).removeprefix(" (default: ").removesuffix(")")
    text = field.metadata["help"] + _choices(field)
    flag = "FILE" if field.metadata["positional"] else f"--{field.name}"
    return f"| `{flag}` | {variable} | {default} | {text} |".replace("  ", " ")


def _choices(field: dataclasses.Field) -> str:
    named = [choice for choice in field.metadata["choices"] if choice]
    return f" ({', '.join(named)})" if named else ""
