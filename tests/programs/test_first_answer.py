"""What a program says before it works comes at once: nothing slow is imported for it."""

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
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env={"PYTHONPATH": str(ROOT)})
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
    ("name", "flag"),
    [
        ("eval", "--ckpt=nosuch"),
        ("eval", "--dataset=nosuch.json"),
        ("eval", "--reuse=no/such"),
        ("train", "--init=nosuch"),
        ("demo", "--ckpt=nosuch"),
        ("fit_codec", "--ckpt=nosuch"),
        ("diagnostics", "--ckpt=nosuch"),
    ],
)
def test_a_wrong_file_imports_nothing_slow(name, flag):
    status, text, imported = said(name, flag)
    setting, value = flag.removeprefix("--").split("=")
    assert status == 2 and text == f"error: {setting}={value!r}: there is no such file or folder"
    assert not imported & set(SLOW)
