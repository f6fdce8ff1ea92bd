"""metrics.jsonl continues without gaps and doubles, and becomes two charts."""

import json

import pytest

from latentwire.training.log import Metrics, draw_curves, read_metrics


def step(number, **more):
    return {"step": number, "epoch": 1, "loss": 3.0 / number, "ce_llama": 2.0, "first_token_acc_llama": 0.1} | more


def validation(number):
    return {"step": number, "validation": {"first_token_acc_llama": 0.2, "ce_llama": 1.5, "score": 0.3}}


@pytest.fixture
def path(tmp_path):
    """Validations at the steps 0 and 4, and five steps."""
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    for line in (validation(0), *map(step, (1, 2, 3, 4)), validation(4), step(5)):
        metrics.write(line)
    metrics.close()
    return tmp_path / "metrics.jsonl"


def seen(path):
    return [(line["step"], "validation" in line) for line in read_metrics(path)]


def test_what_was_written_is_read(path):
    assert read_metrics(path)[:2] == [validation(0), step(1)]
    assert seen(path) == [(0, True), (1, False), (2, False), (3, False), (4, False), (4, True), (5, False)]


def test_a_line_is_on_disk_at_once(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.write(step(1))
    assert read_metrics(tmp_path / "metrics.jsonl") == [step(1)]
    metrics.close()


def test_steps_after_the_kept_one_are_dropped_to_be_computed_again(path):
    metrics = Metrics(path, 3)
    metrics.write(step(4, loss=9.0))
    metrics.close()
    assert seen(path) == [(0, True), (1, False), (2, False), (3, False), (4, False)]
    assert read_metrics(path)[-1]["loss"] == 9.0
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_saved_nothing_starts_its_record_over(path):
    Metrics(path, -1).close()
    assert read_metrics(path) == []


def test_a_last_line_that_a_kill_cut_off_is_dropped(path):
    whole = path.read_bytes()
    for cut in (1, 10, 30):
        path.write_bytes(whole[:-cut])
        assert seen(path)[-1] == (4, True)
    Metrics(path, 4).close()
    assert path.read_text().endswith("\n") and seen(path)[-1] == (4, True)


def test_a_damaged_line_is_named(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2][:9] + "\n", *lines[3:]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3 is damaged"):
        read_metrics(path)


def test_both_charts_are_drawn_from_what_there_is(path):
    drawn = draw_curves(path.parent)
    assert sorted(p.name for p in drawn) == ["first_token_accuracy.png", "loss.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in drawn)


def test_a_chart_without_values_is_not_drawn(tmp_path):
    lines = [{"step": n, "loss": 1.0, "span": 1.0} for n in range(1, 50)]  # the stage of the scores asks no LLM
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [p.name for p in draw_curves(tmp_path)] == ["loss.png"]
    assert not (tmp_path / "first_token_accuracy.png").exists()
