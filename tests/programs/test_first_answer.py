"""What a program says before it works comes at once: nothing slow is imported for it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(path.stem for path in (ROOT / "latentwire").glob("*.py") if path.stem != "__init__")
SLOW = (
    "torch",
    "transformers",
    "sklearn",
    "scipy",
    "datasets",
    "pyarrow",
    "matplotlib",
    "accelerate",
    "ray",
    "gradio",
    "fastapi",
)
NAME_CHECKPOINTS = (
    "answer", "demo", "diagnostics", "documents", "encode_corpus", "engine", "eval", "fit_codec", "inspect_wire",
    "send", "serve",
)  # fmt: skip
NEEDED = {"encode_corpus": ("--input=README.md", "--output=runs/corpus")}  # before it looks at anything else
TELL = """
import runpy, sys
program, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_path(program, run_name="__main__")
finally:
    print("imported:", *sys.modules, file=sys.stderr)
"""


def said(name, *flags):
    """Status, what was said, and the libraries that were imported for it."""
    command = [sys.executable, "-c", TELL, f"latentwire/{name}.py", *flags]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env={"PYTHONPATH": str(ROOT)}, timeout=60)
    *errors, imported = done.stderr.splitlines()
    return done.returncode, done.stdout + "\n".join(errors), set(imported.split())


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_imports_nothing_slow(name):
    status, text, imported = said(name, "--help")
    assert status == 0 and "usage:" in text
    assert not imported & set(SLOW)


@pytest.mark.parametrize("name", ("eval", "train"))
def test_a_wrong_flag_imports_nothing_slow(name):
    status, text, imported = said(name, "--sampels", "3")
    assert status == 2 and text.startswith("error: unrecognized arguments: --sampels 3")
    assert not imported & set(SLOW)


@pytest.mark.parametrize(
    ("name", "setting", "flags"),
    [
        *((name, "ckpt", ("--ckpt=nosuch", *NEEDED.get(name, ()))) for name in NAME_CHECKPOINTS),
        ("send", "ckpt", ("--ckpt=checkpoints/nosuch",)),
        ("eval", "dataset", ("--dataset=nosuch.json",)),
        ("eval", "reuse", ("--reuse=no/such",)),
        ("train", "init", ("--init=nosuch",)),
        ("sweep", "dataset", ("--dataset=no/such", "--dry_run")),
        ("benchmark", "dataset", ("--dataset=nosuch.json",)),
        ("demo", "context", ("--context=nosuch", "--question=Who?")),
        ("send", "context", ("--context=nosuch",)),
        ("answer", "corpus", ("--corpus=nosuch", "--id=1")),
        ("answer", "wire", ("nosuch",)),
        ("inspect_wire", "wire", ("nosuch",)),
        ("compare", "run", ("results,nosuch:text", "results")),
        ("export", "checkpoint", ("nosuch", "runs/exported")),
        ("export", "results", ("checkpoints", "runs/exported", "--results=nosuch")),
    ],
)
def test_a_wrong_file_imports_nothing_slow(name, setting, flags):
    status, text, imported = said(name, *flags)
    assert status == 2 and re.fullmatch(rf"error: {setting}='.*no/?such.*': there is no such file or folder", text)
    assert not imported & set(SLOW)


@pytest.mark.parametrize(
    ("name", "flags", "begins"),
    [
        ("report", ("nosuch",), "nosuch holds no results.json"),
        ("encode_corpus", ("--input=no/such.csv", "--output=runs/corpus"), "input: 'no/such.csv' is no file, folder,"),
    ],
)
def test_files_of_which_none_fits_import_nothing_slow(name, flags, begins):
    status, text, imported = said(name, *flags)
    assert status == 2 and text.startswith(f"error: {begins}") and not imported & set(SLOW)
