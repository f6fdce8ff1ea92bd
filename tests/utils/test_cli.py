"""A setting: its flag, else its variable, else its default, and whatever is wrong is named."""

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from latentwire.utils import cli
from latentwire.utils.cli import (
    LONGEST_S,
    Settings,
    default_of,
    fields_of,
    option,
    parse,
    part,
    refuse_long,
    require,
    run,
)
from latentwire.utils.declared import current

ROOT = Path(__file__).parents[2]
HAS_GPU = cli.has_gpu


@dataclass(kw_only=True)
class Sail(Settings):
    area: int = option(20, "square metres", least=1)
    cloth: str = option("linen", "of the sail", choices=("linen", "hemp"))


@dataclass(kw_only=True)
class Motor(Settings):
    power: float = option(1.5, "kilowatts", above=0)


@dataclass(kw_only=True)
class Boat(Settings):
    """A program with a setting of every kind."""

    crew: int | None = option(None, "heads; default: all", least=1, fallback=12)
    speed: float = option(0.5, "50% of the wind's", least=0)
    flag: str = option("red", "its colour", choices=("red", "green"))
    port: str = option("", "where it goes", env="HARBOUR")
    hurry: bool = option(False, "sail at once", env="")
    night: bool = option(True, "sail by night")
    batch_size: int = option(16, "boxes at once", gpu=32, least=1)
    cranes: int = option(1, "cranes", gpu=lambda: 4)
    device: str = option("", "cpu or cuda")
    drive: str = option("sail", "what drives it")
    driven: Settings | None = part(lambda: {"sail": Sail, "motor": Motor, "oars": Settings}, chosen_by="drive")  # noqa: RUF009


VARIABLES = {
    "CREW", "SPEED", "FLAG", "HARBOUR", "PORT", "HURRY", "NIGHT", "BATCH_SIZE", "CRANES", "DEVICE", "DRIVE", "AREA",
    "CLOTH", "POWER",
}  # fmt: skip


@pytest.fixture(autouse=True)
def cpu_without_variables(monkeypatch):
    for name in VARIABLES | {"LATENTWIRE_TRACEBACK"}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "has_gpu", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(cli, "has_gpu", lambda: True)


def test_a_flag_comes_before_the_environment_and_the_environment_before_the_default(monkeypatch):
    assert parse(Boat, []) == Boat() and Boat().crew is None
    monkeypatch.setenv("CREW", "7")
    monkeypatch.setenv("SPEED", "0.25")
    found = parse(Boat, [])
    assert (found.crew, found.speed) == (7, 0.25)
    assert parse(Boat, ["--crew", "3"]) == Boat(crew=3, speed=0.25)


def test_scripts_take_the_defaults_of_the_device_that_is_named(gpu, monkeypatch):
    assert dict(current(Boat))["BATCH_SIZE"] == 32 and dict(current(Boat))["CRANES"] == 4
    monkeypatch.setenv("DEVICE", "cpu")
    assert dict(current(Boat))["BATCH_SIZE"] == parse(Boat, []).batch_size == 16
    assert dict(current(Boat))["CRANES"] == 1
    assert default_of(option(1, "", gpu=lambda: 0), "cuda") == 1, "a count of GPUs that are not there"


def test_without_a_list_of_flags_the_command_lines_are_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["boat.py", "--crew", "3"])
    assert parse(Boat) == Boat(crew=3)


def test_an_empty_variable_is_not_set_and_an_empty_flag_is(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    assert parse(Boat, []) == Boat()
    monkeypatch.setenv("HARBOUR", "Lowen")
    assert parse(Boat, ["--port", ""]).port == ""


def test_a_setting_may_have_another_variable_or_none(monkeypatch):
    monkeypatch.setenv("PORT", "wrong")
    monkeypatch.setenv("HURRY", "1")
    assert parse(Boat, []) == Boat()
    monkeypatch.setenv("HARBOUR", "Lowen")
    assert parse(Boat, []).port == "Lowen"


def test_a_switch_is_on_or_off_by_flag_and_1_or_0_by_variable(monkeypatch):
    assert parse(Boat, ["--hurry", "--no-night"]) == Boat(hurry=True, night=False)
    monkeypatch.setenv("NIGHT", "0")
    assert parse(Boat, []).night is False and parse(Boat, ["--night"]).night is True
    monkeypatch.setenv("NIGHT", "1")
    assert parse(Boat, []).night is True and parse(Boat, ["--no-night"]).night is False


@pytest.mark.parametrize("flag", ["--batch_size", "--batch-size"])
def test_a_flag_may_be_written_with_either_stroke(flag):
    assert parse(Boat, [flag, "5"]).batch_size == parse(Boat, [f"{flag}=5"]).batch_size == 5


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("CREW", "ten", "CREW='ten': must be a whole number"),
        ("CREW", "2.5", "CREW='2.5': must be a whole number"),
        ("SPEED", "fast", "SPEED='fast': must be a number"),
        ("NIGHT", "yes", r"NIGHT='yes': 1 or 0 \(sail by night\)"),
        ("AREA", "wide", "AREA='wide': must be a whole number"),
    ],
)
def test_a_wrong_value_names_its_variable(monkeypatch, name, value, match):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=match):
        parse(Boat, [])


@pytest.mark.parametrize(
    "flags", [["--crew", "ten"], ["--tonnage", "9"], ["--cre", "9"], ["--night=1"], ["--speed"], ["9"]]
)
def test_a_wrong_or_unknown_or_shortened_flag_ends_the_program_with_one_line(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        parse(Boat, flags)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and flags[0].partition("=")[0] in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("crew", 0, "crew=0: must be at least 1"),
        ("speed", -0.5, "speed=-0.5: must not be negative"),
        ("speed", float("nan"), "speed=nan"),
        ("flag", "blue", "flag='blue': choose one of red, green"),
        ("batch_size", 0, "batch_size=0: must be at least 1"),
        ("drive", "steam", "drive='steam': choose one of sail, motor, oars"),
        ("area", 0, "area=0: must be at least 1"),
        ("cloth", "silk", "cloth='silk': choose one of linen, hemp"),
    ],
)
def test_bounds_and_choices_hold_wherever_a_value_comes_from(monkeypatch, name, value, match):
    with pytest.raises(ValueError, match=match):
        parse(Boat, [f"--{name}={value}"])
    monkeypatch.setenv(name.upper(), str(value))
    with pytest.raises(ValueError, match=match):
        parse(Boat, [])
    if name in Boat.__dataclass_fields__:
        with pytest.raises(ValueError, match=match):
            Boat(**{name: value})


def test_a_bound_may_be_exclusive():
    for wrong in (0, -1.0):
        with pytest.raises(ValueError, match=f"power={wrong}: must be above 0"):
            Motor(power=wrong)
    assert Motor(power=1e-9).power == 1e-9 and Boat(speed=0).speed == 0


def test_settings_that_do_not_fit_each_other_are_refused_by_the_program():
    @dataclass(kw_only=True)
    class Careful(Boat):
        def check(self) -> None:
            require(not (self.hurry and self.night), "hurry", self.hurry, "not by night")

    with pytest.raises(ValueError, match="hurry=True: not by night"):
        parse(Careful, ["--hurry"])
    assert parse(Careful, ["--hurry", "--no-night"]).hurry


def test_defaults_differ_by_device(gpu):
    assert (Boat().batch_size, Boat().cranes) == (32, 4)
    assert parse(Boat, []) == Boat()
    assert (Boat(device="cpu").batch_size, Boat(device="cuda:1").batch_size) == (16, 32)
    assert Boat(batch_size=5).batch_size == 5 and Boat(device="cpu", batch_size=5).batch_size == 5


def test_a_machine_without_a_gpu_has_the_defaults_of_a_cpu_unless_one_is_named(monkeypatch):
    assert (Boat().batch_size, Boat().cranes) == (16, 1)
    assert parse(Boat, ["--device", "cuda"]).batch_size == 32
    monkeypatch.setenv("BATCH_SIZE", "3")
    assert parse(Boat, ["--device", "cuda"]).batch_size == 3
    assert dataclasses.replace(Boat(), device="cuda").batch_size == 16, "what is settled stays"


def test_the_settings_of_the_chosen_part_are_flags_and_variables_too(monkeypatch):
    assert parse(Boat, []).driven == Sail()
    assert parse(Boat, ["--area", "30"]).driven == Sail(area=30)
    monkeypatch.setenv("DRIVE", "motor")
    assert parse(Boat, []).driven == Motor()
    monkeypatch.setenv("POWER", "3")
    assert parse(Boat, []).driven == Motor(power=3.0)
    assert parse(Boat, ["--power", "4"]).driven == Motor(power=4.0)
    assert parse(Boat, ["--drive", "oars"]).driven == Settings()
    assert Boat(drive="motor").driven == Motor(), "also where nothing is parsed"


@pytest.mark.parametrize("drive", ["motor", "oars"])
def test_a_flag_that_the_chosen_part_does_not_know_is_an_error_and_a_variable_of_it_is_not(monkeypatch, drive):
    monkeypatch.setenv("AREA", "30")  # it may stand there for another run
    assert parse(Boat, ["--drive", drive]).drive == drive
    with pytest.raises(ValueError, match=f"area=31: drive {drive} has no such setting"):
        parse(Boat, ["--drive", drive, "--area", "31"])
    monkeypatch.setenv("DRIVE", drive)
    with pytest.raises(ValueError, match=f"cloth='hemp': drive {drive} has no such setting"):
        parse(Boat, ["--cloth", "hemp"])


def test_an_unknown_part_is_named_with_the_known_ones_also_where_a_setting_of_another_is_given():
    with pytest.raises(ValueError, match="drive='steam': choose one of sail, motor, oars"):
        parse(Boat, ["--drive", "steam", "--area", "3"])


def test_help_explains_every_setting_with_its_default_and_its_variable(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Boat, ["--help"], epilog=lambda: "Fair winds.")
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "A program with a setting of every kind." in shown
    assert shown.endswith("Fair winds.")
    assert {field.name for field in fields_of(Boat)} >= {"crew", "area", "cloth", "power"}
    for field in fields_of(Boat):
        assert f"--{field.name}" in shown and field.metadata["help"] in shown
    for text in ("heads; default: all [CREW]", "50% of the wind's (default: 0.5) [SPEED]", "where it goes [HARBOUR]"):
        assert text in shown
    assert "(default: 16 on a CPU, 32 on a GPU)" in shown and "[]" not in shown and "(default: )" not in shown
    assert "[HURRY]" not in shown and "--no-night" in shown


def test_the_end_of_help_is_worked_out_for_help_alone():
    assert parse(Boat, [], epilog=lambda: pytest.fail("asked")) == Boat()


def test_each_setting_of_a_program_and_its_parts_is_listed_once():
    names = [field.name for field in fields_of(Boat)]
    assert len(names) == len(set(names)) and "driven" not in names
    assert {cli.variable_of(field) for field in fields_of(Boat)} == VARIABLES - {"PORT", "HURRY"} | {""}


def test_what_a_setting_is_now_is_told_without_flags(monkeypatch, gpu):
    fields = {field.name: field for field in fields_of(Boat)}
    assert [cli.value_of(fields[name], Boat) for name in ("crew", "batch_size", "cranes", "night")] == [12, 32, 4, True]
    monkeypatch.setenv("CREW", "7")
    monkeypatch.setenv("NIGHT", "0")
    assert [cli.value_of(fields[name], Boat) for name in ("crew", "night")] == [7, False]


def test_a_job_that_is_too_long_for_a_cpu_is_refused_unless_its_size_was_chosen():
    with pytest.raises(
        ValueError, match=r"samples: 9 boxes would take about 2\.5 hours on this CPU; choose fewer.*by hand"
    ):
        refuse_long(2.5 * 3600, "cpu", by_hand=False, what="9 boxes")
    refuse_long(LONGEST_S, "cpu", by_hand=False, what="")
    refuse_long(10 * LONGEST_S, "cpu", by_hand=True, what="")
    refuse_long(10 * LONGEST_S, "cuda:0", by_hand=False, what="")


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("crew=0: must be at least 1"), 2, "error: crew=0: must be at least 1"),
        (FileNotFoundError("no boat there"), 2, "error: no boat there"),
        (PermissionError("locked"), 2, "error: locked"),
        (
            OSError(28, "No space left on device"), 2,
            "error: No space left on device; make room; what was finished is kept, run the same command to continue",
        ),
        (OSError(28, "No space left on device", "a/file"), 2, "error: [Errno 28] No space left on device: 'a/file'"),
        (KeyboardInterrupt(), 130, "error: interrupted; what was finished is kept, run the same command to continue"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), 2,
            "error: out of memory (CUDA out of memory.); lower BATCH_SIZE (--batch_size); what was finished is kept",
        ),
        (
            torch.AcceleratorError("CUDA error: GPU is lost\nCUDA kernel errors might be"), 2,
            "error: the device failed (CUDA error: GPU is lost); what was finished is kept, run the same command to "
            "continue; LATENTWIRE_TRACEBACK=1 shows where",
        ),
    ],
)  # fmt: skip
def test_a_users_mistake_ends_a_program_with_one_line_and_its_status(capsys, error, status, said):
    with pytest.raises(SystemExit) as stop:
        run(failing(error))
    assert stop.value.code == status
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError("ours"), RuntimeError("ours"), TypeError("ours")])
def test_our_own_mistakes_are_not_hidden(error):
    with pytest.raises(type(error)):
        run(failing(error))


@pytest.mark.parametrize("error", [ValueError("crew=0"), torch.AcceleratorError("CUDA error: crew")])
def test_a_traceback_is_shown_to_who_asks_for_it(monkeypatch, error):
    monkeypatch.setenv("LATENTWIRE_TRACEBACK", "1")
    with pytest.raises(type(error), match="crew"):
        run(failing(error))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
@pytest.mark.parametrize("ends", ["", "; sys.exit(143)"])
def test_a_full_disk_behind_standard_output_is_told_however_little_is_printed(ends):
    program = f"import sys; from latentwire.utils.cli import run\ndef main(): print('x'){ends}\nrun(main)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2 and done.stderr.startswith("error: No space left on device; make room;")
    assert done.stderr.count("\n") == 1


def test_a_program_that_works_ends_as_it_wants():
    assert run(lambda: None) is None
    with pytest.raises(SystemExit) as stop:
        run(failing(SystemExit(143)))
    assert stop.value.code == 143


def test_the_reason_of_an_error_is_its_first_line_or_its_type():
    assert cli.reason(ValueError("\nfirst\nsecond")) == "first"
    assert cli.reason(EOFError()) == "EOFError"


def test_where_there_is_no_driver_torch_is_not_even_asked(monkeypatch, tmp_path):
    answers = iter([True, False])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: next(answers))
    ask = HAS_GPU.__wrapped__  # without the memory of earlier tests
    monkeypatch.setattr(cli, "_DRIVERS", (str(tmp_path / "none"),))
    assert ask() is False
    monkeypatch.setattr(cli, "_DRIVERS", (str(tmp_path / "none"), str(tmp_path)))
    assert [ask(), ask()] == [True, False]


def test_settings_need_no_torch_until_a_default_depends_on_the_device():
    """A wrong flag is told at once."""
    modules = "latentwire.utils.cli, latentwire.utils.files, latentwire.utils.registry"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert told.stdout == "False\n", told.stderr
