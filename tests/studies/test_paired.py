"""Paired differences between evaluations: of the same questions or not at all."""

import json
import sys
from pathlib import Path

import pytest

from latentwire.data.squad import load_questions
from latentwire.reporting.charts import comparison
from latentwire.studies.paired import compare, main, table_markdown

QUESTIONS = load_questions("sample", "dev")[1][:6]
MACHINE = {"gpus": [], "processor": "P", "torch": "2"}


def evaluation(folder, scores, **more):
    """A finished evaluation of one LLM with these F1s."""
    folder.mkdir(parents=True)
    row = {"condition": "latentwire", "llm": "llama", "m": 4, "f1": sum(scores) / len(scores), "first_token_acc": 0.5,
           "nll_per_token": 2.0, "wire_bytes": 7}  # fmt: skip
    results = {"dataset": "sample", "split": "dev", "n": 6, "source": "prompt", "dtype": "float32", "seed": 0,
               "codec": "fp16", "git": "abc", "machine": MACHINE, "results": [row]} | more  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "manifest.json").write_text(json.dumps({"ids": [q.id for q in QUESTIONS]}))
    key = {name: row[name] for name in ("condition", "llm", "m")}
    lines = [json.dumps({"id": q.id, "f1": f1} | key) for q, f1 in zip(QUESTIONS, scores, strict=True)]
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        evaluation(tmp_path / "base", [0, 0, 1, 1, 0, 1]),
        evaluation(tmp_path / "seed1", [0, 0, 1, 0, 0, 1]),
        evaluation(tmp_path / "other", [1, 1, 1, 1, 1, 1]),
    ]


def test_runs_are_paired_with_the_first(runs):
    base, _, other = runs
    first, second = compare([[base], [other]], "latentwire")["rows"]
    assert first["diff"] == 0 and first["diff_ci95"] is None and first["f1"] == 0.5
    assert second["diff"] == pytest.approx(0.5)
    low, high = second["diff_ci95"]
    assert 0 <= low <= 0.5 <= high <= 1


def test_seeds_are_averaged_by_question_and_their_spread_is_told(runs):
    base, seed1, other = runs
    compared = compare([[base, seed1], [other]], "latentwire")
    first, second = compared["rows"]
    assert first["f1"] == pytest.approx((0.5 + 1 / 3) / 2) and first["seed_f1"] == [0.5, pytest.approx(1 / 3)]
    assert first["seed_sd"] == pytest.approx((1 / 6) / 2**0.5)
    assert second["diff"] == pytest.approx(1 - first["f1"])
    table = table_markdown(compared)
    assert "| base seed1 | llama | 4 | fp16 | 0.417" in table and "| other | llama |" in table
    assert "0.500, 0.333 (sd 0.118)" in table


@pytest.mark.parametrize(
    ("change", "match"), [({"split": "train"}, "split differ"), ({"dtype": "bfloat16"}, "dtype differ")]
)
def test_other_questions_are_refused(runs, tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        compare([[runs[0]], [evaluation(tmp_path / "odd", [0] * 6, **change)]], "latentwire")
    (runs[2] / "manifest.json").write_text(json.dumps({"ids": ["x"]}))
    with pytest.raises(ValueError, match="ids differ"):
        compare([[runs[0]], [runs[2]]], "latentwire")


def test_what_is_not_there_is_named(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        compare([[runs[0]], [tmp_path / "nowhere"]], "latentwire")
    with pytest.raises(ValueError, match="condition='pca'"):
        compare([[runs[0]]], "pca")


def test_the_program_writes_what_it_prints(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", str(runs[0]), str(runs[2]), "--save_dir", str(tmp_path / "out")])
    main()
    assert (tmp_path / "out" / "comparison.md").read_text() in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]) == 2
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_called_by_what_tells_it_from_the_others(tmp_path):
    runs = [evaluation(tmp_path / name / "eval", [0] * 6) for name in ("base", "M8", "M64")]
    compared = compare([[run] for run in runs], "latentwire")
    assert [row["name"] for row in compared["rows"]] == ["base", "M8", "M64"]
    labels = [label.get_text() for label in comparison(compared).axes[0].get_yticklabels()]
    assert labels == ["M64", "M8", "base"], "the first stands on top"
    assert compare([[runs[0]]], "latentwire")["rows"][0]["name"] == str(runs[0])


COMPARISONS = sorted((Path(__file__).parents[2] / "results").glob("**/comparison.json"))


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.parent.name)
def test_the_committed_comparisons_are_those_of_their_records(path):
    assert path.with_suffix(".md").read_text() == table_markdown(json.loads(path.read_text()))
