"""Paired differences between evaluations: of the same questions or not at all."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from latentwire.compare import main
from latentwire.data.squad import load
from latentwire.evaluation.results import compare as pairs_of
from latentwire.evaluation.results import row_key, summarise
from latentwire.reporting.charts import comparison
from latentwire.reporting.tables import comparison_markdown
from latentwire.studies.paired import compare, recompute
from latentwire.utils.files import read_lines

QUESTIONS = load("sample", "dev").questions[:6]
MACHINE = {"gpus": [], "processor": "P", "threads": 2, "torch": "2", "transformers": "5"}


def evaluation(folder, scores, **more):
    """A finished evaluation of one LLM with these F1s."""
    folder.mkdir(parents=True)
    row = {
        "condition": "latentwire", "llm": "llama", "llm_id": "offline:a-model", "m": 4,
        "f1": sum(scores) / len(scores), "first_token_acc": 0.5, "nll_per_token": 2.0, "wire_bytes": 7,
    }  # fmt: skip
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
    table = comparison_markdown(compared)
    assert "| base seed1 | a-model (llama) | 4 | fp16 | 0.417" in table and "| other | a-model (llama) |" in table
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
    assert path.with_suffix(".md").read_text() == comparison_markdown(json.loads(path.read_text()))


@pytest.fixture
def whole(tmp_path):
    """A finished evaluation with all that a prediction line has, its predictions packed."""
    folder, rows, lines, scores = tmp_path / "whole", [], [], {}
    folder.mkdir()
    for condition, right in (("latentwire", (1, 1, 0, 1, 0, 1)), ("text", (0, 1, 0, 1, 0, 0))):
        row = {"condition": condition, "llm": "llama", "llm_id": "offline:a-model", "m": 4, "explained_variance": None}
        made = {
            q.id: {
                "id": q.id, "condition": condition, "m": 4, "llm": "llama",
                "prediction": q.answers[0] if f1 else "no such answer", "f1": f1, "em": f1,
                "first_token_correct": bool(f1), "answer_nll": 1.5, "answer_tokens": 2, "answer_bytes": 5,
                "llm_positions": 4, "wire_bytes": 7, "text_bytes": 90, "seconds": 0.1,
            }
            for q, f1 in zip(QUESTIONS, map(float, right), strict=True)
        }  # fmt: skip
        rows.append(row | summarise(made, QUESTIONS, 0))
        scores[row_key(row)] = [line["f1"] for line in made.values()]
        lines += made.values()
    results = {"dataset": "sample", "split": "dev", "n": 6, "source": "prompt", "dtype": "float32", "seed": 0,
               "codec": "fp16", "git": "abc", "machine": MACHINE, "checkpoint": "c", "results": rows,
               "comparisons": pairs_of(rows, scores, [q.paragraph for q in QUESTIONS], 0)}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "manifest.json").write_text(json.dumps({"ids": [q.id for q in QUESTIONS]}))
    packed = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
    (folder / "predictions.jsonl.gz").write_bytes(packed)
    return folder


def test_one_evaluation_is_recomputed_from_its_predictions(whole, monkeypatch, capsys):
    before = json.loads((whole / "results.json").read_text())
    assert recompute(whole)["comparisons"] == before["comparisons"]
    monkeypatch.setattr(sys, "argv", ["compare.py", str(whole)])
    main()
    said = capsys.readouterr().out
    assert "| a-model (llama) | latentwire | 4 | 0.667" in said and said.endswith("equal to results.json\n")
    monkeypatch.setattr(sys, "argv", ["compare.py", str(whole), "--save_dir", "somewhere"])
    with pytest.raises(ValueError, match=r"save_dir='somewhere'.* name two or more"):
        main()


def test_a_record_that_its_predictions_do_not_bear_is_refused(whole):
    record = whole / "results.json"
    text = record.read_text()
    record.write_text(text.replace('"f1": 0.6666666666666666', '"f1": 0.7666666666666666', 1))
    with pytest.raises(ValueError, match="latentwire 4 llama: f1"):
        recompute(whole)
    record.write_text(text.replace('"diff": 0.3333333333333333', '"diff": 0.4333333333333333', 1))
    with pytest.raises(ValueError, match="comparisons"):
        recompute(whole)


def test_a_row_whose_predictions_were_not_kept_is_named_and_the_others_are_recomputed(whole):
    packed = whole / "predictions.jsonl.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().splitlines(keepends=True)
    packed.write_bytes(gzip.compress("".join(line for line in lines if '"latentwire"' in line).encode()))
    again = recompute(whole)
    assert again["not_kept"] == ["no predictions were kept: llama text"] and [
        row["condition"] for row in again["results"]
    ] == ["latentwire"]
    packed.write_bytes(gzip.compress("".join(lines[:-1]).encode()))
    recompute.__globals__["_lines"].cache_clear()
    with pytest.raises(ValueError, match=r"lacks the predictions of .*'text'.* for 1 questions"):
        recompute(whole)


def test_answers_are_scored_anew(whole):
    """A score that was written into a prediction line is not believed."""
    packed = whole / "predictions.jsonl.gz"
    *lines, last = gzip.decompress(packed.read_bytes()).decode().splitlines(keepends=True)
    assert '"f1": 0.0' in last and '"text"' in last
    packed.write_bytes(gzip.compress("".join([*lines, last.replace('"f1": 0.0', '"f1": 1.0')]).encode()))
    assert recompute(whole)["results"][1]["f1"] == pytest.approx(1 / 3)
    answered = json.dumps(json.loads(last) | {"prediction": QUESTIONS[-1].answers[0]})
    packed.write_bytes(gzip.compress("".join([*lines, answered + "\n"]).encode()))
    recompute.__globals__["_lines"].cache_clear()
    with pytest.raises(ValueError, match="text 4 llama: em, text 4 llama: em_ci95, text 4 llama: f1, text"):
        recompute(whole)


def test_without_predictions_or_with_other_data_nothing_is_recomputed(whole):
    (whole / "manifest.json").write_text(json.dumps({"ids": ["elsewhere"]}))
    with pytest.raises(ValueError, match=r"1 of the questions .* set SQUAD_DIR"):
        recompute(whole)
    (whole / "predictions.jsonl.gz").unlink()
    recompute.__globals__["_lines"].cache_clear()
    with pytest.raises(FileNotFoundError, match="no predictions"):
        recompute(whole)


RESULTS = Path(__file__).parents[2] / "results"
KEPT = sorted(
    path.parent for path in RESULTS.glob("**/predictions.jsonl.gz") if (path.parent / "manifest.json").is_file()
)


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: str(folder.relative_to(RESULTS)))
def test_kept_predictions_bear_their_record(folder):
    """Without the data themselves: F1, EM and n by row."""
    rows = json.loads((folder / "results.json").read_text())["results"]
    lines = read_lines(folder / "predictions.jsonl")
    ids = set(json.loads((folder / "manifest.json").read_text())["ids"])
    kept = [row for row in rows if row_key(row) in {row_key(line) for line in lines}]
    assert kept
    for row in kept:
        mine = [line for line in lines if row_key(line) == row_key(row)]
        assert {line["id"] for line in mine} == ids and len(mine) == row["n"]
        for key in ("f1", "em"):
            assert sum(line[key] for line in mine) / len(mine) == pytest.approx(row[key])
