"""metrics.jsonl continues without gaps and doubles, and its figures have one name each, in old logs and new ones."""

import pytest

from latentwire.training.log import TrainingLog, flat
from latentwire.utils.files import read_lines


def step(number, **more):
    llms = {"llama": {"ce": 2.0, "first_token_acc": 0.1}}
    return {"step": number, "epoch": 1, "loss": 3.0 / number, "llms": llms, "grad_norms": {"codebook": 0.5}} | more


def validation(number):
    llms = {"llama": {"first_token_acc": 0.2, "ce": 1.5}}
    return {"step": number, "validation": {"llms": llms, "ce": 1.5, "score": 0.3}}


@pytest.fixture
def path(tmp_path):
    """Validations at the steps 0 and 4, and five steps."""
    log = TrainingLog(tmp_path / "metrics.jsonl", 0)
    for line in (validation(0), *map(step, (1, 2, 3, 4)), validation(4), step(5)):
        log.write(line)
    log.close()
    return tmp_path / "metrics.jsonl"


def seen(path):
    return [(line["step"], "validation" in line) for line in read_lines(path)]


def test_what_was_written_is_read(path):
    assert read_lines(path)[:2] == [validation(0), step(1)]
    assert seen(path) == [(0, True), (1, False), (2, False), (3, False), (4, False), (4, True), (5, False)]


def test_a_line_is_on_disk_at_once(tmp_path):
    log = TrainingLog(tmp_path / "metrics.jsonl", 0)
    log.write(step(1))
    assert read_lines(tmp_path / "metrics.jsonl") == [step(1)]
    log.close()


def test_steps_after_the_kept_one_are_dropped_to_be_computed_again(path):
    log = TrainingLog(path, 3)
    log.write(step(4, loss=9.0))
    log.close()
    assert seen(path) == [(0, True), (1, False), (2, False), (3, False), (4, False)]
    assert read_lines(path)[-1]["loss"] == 9.0
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_validation_that_the_kept_step_was_saved_before_is_dropped_to_be_made_again(path):
    TrainingLog(path, 4, judged=False).close()
    assert seen(path) == [(0, True), (1, False), (2, False), (3, False), (4, False)]


def test_a_run_that_saved_nothing_starts_its_record_over(path):
    TrainingLog(path, -1).close()
    assert read_lines(path) == []


def test_a_last_line_that_a_kill_cut_off_is_dropped(path):
    whole = path.read_bytes()
    for cut in (1, 10, 30):
        path.write_bytes(whole[:-cut])
        assert seen(path)[-1] == (4, True)
    TrainingLog(path, 4).close()
    assert path.read_text().endswith("\n") and seen(path)[-1] == (4, True)


def test_a_damaged_line_is_named(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2][:9] + "\n", *lines[3:]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3 is damaged"):
        read_lines(path)


def test_every_figure_of_a_line_has_one_name():
    shown = flat(step(2, span=0.7))
    assert shown == {
        "step": 2, "epoch": 1, "loss": 1.5, "span": 0.7, "grad_norm codebook": 0.5, "ce llama": 2.0,
        "first_token_acc llama": 0.1,
    }  # fmt: skip
    assert flat(validation(4)["validation"]) == {"ce": 1.5, "score": 0.3, "ce llama": 1.5, "first_token_acc llama": 0.2}


def test_an_older_log_keeps_the_names_that_it_has(path):
    old = {"step": 6, "loss": 1.0, "ce_llama": 2.0, "grad_norm_score": 0.1, "first_token_acc_llama": 0.4}
    log = TrainingLog(path, 5)
    log.write(old)
    log.close()
    assert read_lines(path)[-1] == old == flat(old)
