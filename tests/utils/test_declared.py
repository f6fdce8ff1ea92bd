"""What is declared of settings, as a page for people and as values for scripts."""

from dataclasses import dataclass

import pytest

from latentwire.utils import cli
from latentwire.utils.cli import VARIABLES, Settings, option, part
from latentwire.utils.declared import current, one, page


@dataclass(kw_only=True)
class Sail(Settings):
    cloth: str = option("linen", "of the sail", choices=("linen", "hemp"))


@dataclass(kw_only=True)
class Boat(Settings):
    """A boat
    of two lines."""

    crew: int | None = option(None, "heads", fallback=12)
    boxes: int = option(16, "at once", gpu=32)
    night: bool = option(True, "sail by night")
    hurry: bool = option(False, "sail at once", env="")
    port: str = option("", "where it goes", env="HARBOUR")
    drive: str = option("sail", "what drives it")
    driven: Settings | None = part(lambda: {"sail": Sail}, chosen_by="drive")  # noqa: RUF009


@pytest.fixture(autouse=True)
def cpu_without_variables(monkeypatch):
    for name in ("CREW", "BOXES", "NIGHT", "HARBOUR", "DRIVE", "CLOTH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "has_gpu", lambda: False)


def test_the_page_has_a_row_for_each_variable_of_all_programs_and_each_setting_of_one():
    lines = page({"boat": Boat}).splitlines()
    assert all(f"| `{name}` | {text} |" in lines for name, text in VARIABLES.items())
    assert lines[lines.index("## boat") + 2] == "A boat of two lines."
    for row in (
        "| `--crew` | `CREW` | | heads |",
        "| `--boxes` | `BOXES` | 16 on a CPU, 32 on a GPU | at once |",
        "| `--night` | `NIGHT` | 1 | sail by night |",
        "| `--hurry` | | 0 | sail at once |",
        "| `--port` | `HARBOUR` | | where it goes |",
        "| `--cloth` | `CLOTH` | linen | of the sail (linen, hemp) |",
    ):
        assert row in lines
    assert "driven" not in page({"boat": Boat})


def test_the_page_says_the_same_on_every_machine(monkeypatch):
    before = page({"boat": Boat})
    monkeypatch.setattr(cli, "has_gpu", lambda: True)
    monkeypatch.setenv("CREW", "5")
    assert page({"boat": Boat}) == before


def test_a_programs_variables_are_told_with_what_they_are_now(monkeypatch):
    found = dict(current(Boat))
    assert found == {"CREW": 12, "BOXES": 16, "NIGHT": True, "HARBOUR": "", "DRIVE": "sail", "CLOTH": "linen"}
    monkeypatch.setenv("HARBOUR", "Lowen")
    assert dict(current(Boat)) == found | {"HARBOUR": "Lowen"}


def test_one_setting_is_told_as_a_script_writes_it(monkeypatch):
    assert [one(Boat, name) for name in ("crew", "night", "hurry", "port", "cloth")] == [12, 1, 0, "", "linen"]
    monkeypatch.setenv("NIGHT", "0")
    assert one(Boat, "night") == 0
    with pytest.raises(ValueError, match="setting='sails': unknown; choose one of crew, boxes"):
        one(Boat, "sails")
