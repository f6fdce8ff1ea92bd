"""The rules of the house: imports point down only, everything is small, and names stay out of each other's way."""

import ast
import pkgutil
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import latentwire

PACKAGE = Path(latentwire.__file__).parent
# Programs stand above all.
FLOORS = ["utils", "data", "llms", "models", "conditions", "evaluation", "api", "service", "training", "studies"]
BESIDE = "reporting"  # draws what is on disk, and what it may import is named
REPORTING_MAY = {"utils", "data", "reporting", "evaluation.scores", "evaluation.results", "training.log"}
MAY_REPORT = {"api", "service", "studies", ""}  # and programs
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
MODULES = sorted(found.name for found in pkgutil.walk_packages([str(PACKAGE)], "latentwire."))


def tree(path: Path) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text(encoding="utf-8"))


def folder_of(module: str) -> str:
    """ "evaluation" of "evaluation.scores", "" of a program and of the package itself."""
    first = module.partition(".")[0]
    return first if (PACKAGE / first).is_dir() else ""


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, at any depth of its code: "evaluation.scores"."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are written in full"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inside]
        else:
            continue
        yield from (name.removeprefix("latentwire.") for name in names if name.startswith("latentwire."))


def allowed(folder: str, module: str) -> bool:
    """Whether a file in `folder` ("" for a program) may import a module."""
    other = folder_of(module)
    if folder == BESIDE:
        return bool({module, other} & REPORTING_MAY)
    if other == BESIDE:
        return folder in MAY_REPORT
    floors = [*FLOORS, ""]
    return bool(other) and floors.index(other) <= floors.index(folder)


def test_every_folder_has_its_floor():
    assert {path.parts[0] for path in FILES if len(path.parts) > 1} == {*FLOORS, BESIDE}
    assert len(MODULES) == len(FILES) - 1, "all but latentwire/__init__.py"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down_and_nothing_imports_a_program(path):
    folder = path.parts[0] if len(path.parts) > 1 else ""
    assert not [module for module in imports(path) if not allowed(folder, module)]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module):
    import_module(module)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_are_short(path):
    longest = 400 if len(path.parts) > 1 else 40
    assert len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) <= longest
    functions = [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [f"{f.name}: {f.end_lineno - f.lineno + 1}" for f in functions if f.end_lineno - f.lineno >= 70]


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES if path.parent.parts}), ids=str)
def test_folders_are_small(folder):
    assert len([path for path in (PACKAGE / folder).iterdir() if path.is_file()]) <= 12


def test_utils_import_no_torch():
    """Programs read their settings and tell what is wrong before they import it."""
    lines = [node for path in FILES if path.parts[0] == "utils" for node in tree(path).body]
    names = [alias.name for line in lines if isinstance(line, ast.Import) for alias in line.names]
    names += [line.module for line in lines if isinstance(line, ast.ImportFrom)]
    assert not [name for name in names if name.partition(".")[0] == "torch"]


def test_nothing_shares_its_name_with_a_library():
    """`python latentwire/eval.py` puts the package's folder first on the path."""
    ours = {Path(path.parts[0]).stem for path in FILES} - {"__init__"}
    assert not ours & (set(sys.stdlib_module_names) | set(packages_distributions()))


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] != "llms"], ids=str)
def test_llms_have_names_and_causal_models_only_in_their_folder(path):
    strings = {n.value for n in ast.walk(tree(path)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not strings & {"llama", "qwen"}
    assert "AutoModelForCausalLM" not in (PACKAGE / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "llms"], ids=str)
def test_llms_have_names_only_where_they_are_known(path):
    strings = {n.value for n in ast.walk(tree(path)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert path.name in ("known.py", "offline.py") or not strings & {"llama", "qwen"}
