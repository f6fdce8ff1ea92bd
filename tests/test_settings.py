"""What the documents say of settings is declared, and what is declared stands in docs/settings.md."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from latentwire.api import settings as api
from latentwire.evaluation import doctor
from latentwire.evaluation import settings as evaluation
from latentwire.service import settings as service
from latentwire.settings import PROGRAMS
from latentwire.studies import settings as studies
from latentwire.training import settings as training
from latentwire.utils.cli import VARIABLES, Settings, fields_of, variable_of
from latentwire.utils.declared import page

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "settings.md"
# Other programs' variables, and the pattern of LLAMA_ID, QWEN_ID and so on.
NOT_OURS = {
    "FILE",
    "LD_PRELOAD",
    "NAME_ID",
    "VLLM",
    "ATTENTION",
    "TOKENIZERS",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "X_ID",
}
_NAME = r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*"
_CODE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
_INLINE = re.compile(rf"`({_NAME}(?:=[^`\s]*)?(?: {_NAME}=[^`\s]*)*)`")  # `NAME`, `NAME=value` or several of these
_SET = re.compile(rf"(?<![\w-])({_NAME})=")


def classes():
    """The settings of every program."""
    found = [
        value for module in (evaluation, doctor, api, service, training, studies) for value in vars(module).values()
    ]
    return {cls for cls in found if isinstance(cls, type) and issubclass(cls, Settings)}


def declared():
    own = {variable_of(field) for cls in classes() for field in fields_of(cls)} - {""}
    return own | VARIABLES.keys()


def named(text):
    """The variables that a document names: alone in `code`, and set in lines for the shell."""
    for language, code in _CODE.findall(text):
        if language in ("bash", "sh", "console"):
            yield from _SET.findall(code)
    for code in _INLINE.findall(_CODE.sub("", text)):
        yield from (part.partition("=")[0] for part in code.split())


def documents():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_names_in_a_document_are_found():
    text = "Set `SEED` or `NPROC=1 K=2`, not `M x` or `--a=B`.\n"
    text += "```bash\nLR=1 x.sh # (CKPT=...)\n```\n```python\nA=1\n```\n"
    assert [*named(text)] == ["LR", "CKPT", "SEED", "NPROC", "K"]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_every_variable_that_a_document_names_is_declared(path):
    assert set(named(path.read_text(encoding="utf-8"))) - declared() - NOT_OURS == set()


def test_the_page_of_settings_is_as_declared():
    assert PAGE.is_file(), "python latentwire/settings.py --markdown > docs/settings.md"
    assert PAGE.read_text(encoding="utf-8") == page(PROGRAMS), (
        "python latentwire/settings.py --markdown > docs/settings.md"
    )


def test_the_page_has_every_setting_of_every_program():
    shown = page(PROGRAMS)
    assert all(f"| `{name}` |" in shown for name in declared())
    assert set(PROGRAMS.values()) <= classes()


def test_a_variable_means_one_thing():
    """The same variable has the same flag, and no variable of all programs is a setting of one."""
    flags = {}
    for cls in classes():
        for field in fields_of(cls):
            if variable_of(field):
                flags.setdefault(variable_of(field), set()).add(field.name)
    assert {name: found for name, found in flags.items() if len(found) > 1} == {}
    assert not flags.keys() & VARIABLES.keys()


def test_settings_are_read_before_torch_is_imported():
    """A wrong flag is told at once, and a script asks for a setting in no time."""
    modules = "latentwire.evaluation.settings, latentwire.training.settings, latentwire.studies.settings"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert told.stdout == "False\n", told.stderr
