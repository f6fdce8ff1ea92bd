"""Registries: one decorated line adds a thing, and an unknown name is answered with the known ones."""

import sys
from dataclasses import dataclass

import pytest

from latentwire.utils.registry import Registry, import_all


def test_a_thing_is_found_by_the_name_that_it_was_registered_under_and_knows_it():
    boats = Registry("boat")

    @boats.register("dinghy")
    class Dinghy:
        pass

    @dataclass
    class Ferry:
        name: str = ""

    ferry = boats.register("ferry")(Ferry())
    assert boats == {"dinghy": Dinghy, "ferry": ferry} and list(boats) == ["dinghy", "ferry"]
    assert boats.pick("dinghy") is Dinghy and (Dinghy.name, ferry.name) == ("dinghy", "ferry")


def test_an_unknown_name_is_refused_with_the_known_ones():
    boats = Registry("boat")
    boats.register("dinghy")(test_an_unknown_name_is_refused_with_the_known_ones)
    boats.register("ferry")(test_an_unknown_name_is_refused_with_the_known_ones)
    with pytest.raises(ValueError, match="boat='raft': unknown; choose one of dinghy, ferry"):
        boats.pick("raft")


def test_a_name_is_given_once():
    boats = Registry("boat")
    boats.register("dinghy")(type("Dinghy", (), {}))
    with pytest.raises(AssertionError, match="the boat dinghy is registered twice"):
        boats.register("dinghy")(type("Other", (), {}))
    assert boats.pick("dinghy").__name__ == "Dinghy"


def test_every_file_of_a_folder_is_imported(tmp_path, monkeypatch):
    folder = tmp_path / "harbour_of_tests"
    folder.mkdir()
    (folder / "__init__.py").write_text("known = []\n")
    for name in ("north", "south"):
        (folder / f"{name}.py").write_text(f"from harbour_of_tests import known\n\nknown.append({name!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    import harbour_of_tests

    import_all(harbour_of_tests)
    import_all(harbour_of_tests)
    assert sorted(harbour_of_tests.known) == ["north", "south"], "each once"
    for name in ("harbour_of_tests", "harbour_of_tests.north", "harbour_of_tests.south"):
        del sys.modules[name]
