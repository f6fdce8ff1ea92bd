"""The rooms of the house: imports point down only, and names stay out of each other's way."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "latentwire"
FLOORS = [
    {
        "config",
        "wire",
        "metrics",
        "models_cache",
        "run",
        "relevance",
        "pooling",
        "resampler",
        "curves",
        "charts",
        "signs",
        "geometry",
        "findings",
        "keeper",
    },
    {"data", "prompts", "gathering"},
    {"llm", "backbone"},
    {"interface", "adapter", "encoder", "teacher", "memory"},
    {"conditions", "checkpoint", "results", "stage0", "losses"},
    {"predictions", "answering", "model", "training", "ranking", "page", "plain"},
    {"train", "eval", "benchmark", "diagnostics", "compare", "demo", "export", "report", "sweep"},
]
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}
ROOMS = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")


def imports(room):
    """Rooms that a room imports, at any depth of its code."""
    for node in ast.walk(ast.parse((PACKAGE / f"{room}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "latentwire":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("latentwire."):
            yield node.module.split(".")[1]


def test_every_room_has_its_floor():
    assert set(ROOMS) == set(LEVEL)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room):
    up = {other for other in imports(room) if LEVEL[other] > LEVEL[room]}
    assert not up
    if LEVEL[room] == len(FLOORS) - 1:
        assert not {other for other in imports(room) if LEVEL[other] == LEVEL[room]}, "entry points stand alone"


def test_no_room_shares_its_name_with_a_library():
    """`python latentwire/eval.py` puts this folder first on the path."""
    assert not set(ROOMS) & (set(sys.stdlib_module_names) | set(packages_distributions()))


@pytest.mark.parametrize("room", sorted(set(ROOMS) - {"config", "models_cache"}))
def test_llms_have_names_only_in_the_configuration(room):
    strings = [
        n.value for n in ast.walk(ast.parse((PACKAGE / f"{room}.py").read_text())) if isinstance(n, ast.Constant)
    ]
    assert not [s for s in strings if s in ("llama", "qwen")]


@pytest.mark.parametrize("room", sorted(set(ROOMS) - {"llm", "models_cache"}))
def test_only_one_room_touches_a_causal_lm(room):
    assert "AutoModelForCausalLM" not in (PACKAGE / f"{room}.py").read_text()
