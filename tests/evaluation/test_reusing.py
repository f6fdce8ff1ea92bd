"""What another evaluation of the same questions has answered is taken from there, where the same files answered it."""

import json
import shutil
from pathlib import Path

import pytest
from evaluation.evaluations import config

from latentwire.evaluation import answering
from latentwire.evaluation.evaluate import evaluate
from latentwire.reporting.tables import table_markdown

pytestmark = pytest.mark.usefixtures("tiny_models")


def record_calls(calls, function):
    """The function, which notes its arguments."""
    return lambda *arguments: (calls.append(arguments), function(*arguments))[1]


def test_what_no_checkpoint_changes_is_taken_from_another_evaluation(finished, trained, tmp_path, monkeypatch):
    folder, before = finished
    asked = []
    monkeypatch.setattr("latentwire.evaluation.answering.answer", record_calls(asked, answering.answer))
    results = evaluate(
        config(tmp_path / "r", ckpt=str(trained), conditions="text,token_budget,pca,latentwire", reuse=str(folder))
    )
    assert {condition.name for condition, *_ in asked} == {"latentwire"}
    rows = {(row["condition"], row["llm"]): row for row in results["results"]}
    for row in before["results"]:
        if row["condition"] in ("text", "token_budget", "pca"):
            taken = rows[row["condition"], row["llm"]]
            assert taken | {"taken_from": []} == row
            assert taken["taken_from"][0].startswith(f"{folder}, commit ")
    assert rows["latentwire", "llama"]["taken_from"] == []
    assert any(c["b"] == "text" and c["critical"] == 3 for c in results["comparisons"] if "critical" in c)
    assert f"- Taken from {folder}" in table_markdown(results)
    again = evaluate(config(tmp_path / "again", ckpt=str(trained), conditions="text", reuse=str(tmp_path / "r")))
    for row in again["results"]:
        assert row["taken_from"] == rows["text", row["llm"]]["taken_from"], (
            "where it was computed, not who had it since"
        )


def test_what_the_same_checkpoint_answered_is_taken_from_another_evaluation(trained, tmp_path, monkeypatch):
    conditions = "latentwire,encoder_only"
    before = evaluate(config(tmp_path / "before", ckpt=str(trained), conditions=conditions))
    asked = []
    monkeypatch.setattr("latentwire.evaluation.answering.answer", record_calls(asked, answering.answer))
    again = evaluate(
        config(tmp_path / "r", ckpt=str(trained), conditions=f"{conditions},untrained", reuse=str(tmp_path / "before"))
    )
    assert {condition.name for condition, *_ in asked} == {"untrained"}
    taken = [row | {"taken_from": []} for row in again["results"] if row["condition"] in conditions]
    assert taken == before["results"]


def test_an_untrained_wire_is_not_taken_from_another_evaluation(finished, tmp_path, monkeypatch):
    """It may be of other LLMs: there is no file that would tell."""
    asked = []
    monkeypatch.setattr("latentwire.evaluation.answering.answer", record_calls(asked, answering.answer))
    evaluate(config(tmp_path / "r", conditions="text,latentwire", reuse=str(finished[0])))
    assert {condition.name for condition, *_ in asked} == {"latentwire"}


def test_answers_to_a_prompt_that_began_otherwise_are_not_taken(finished, tmp_path):
    before = Path(shutil.copytree(finished[0], tmp_path / "before"))
    heads = json.loads((before / "heads.json").read_text())
    (before / "heads.json").write_text(json.dumps(heads | {"llama": "of an older chat template"}))
    with pytest.raises(ValueError, match="prompt of llama begins otherwise"):
        evaluate(config(tmp_path / "r", conditions="text,no_context", reuse=str(before)))
    assert not (tmp_path / "r" / "predictions.jsonl").exists(), "nothing was taken"
    assert json.loads((before / "heads.json").read_text())["llama"] == "of an older chat template"
    assert len(evaluate(config(tmp_path / "r", conditions="text,no_context"))["results"]) == 4


def test_the_answers_of_one_of_two_llms_may_be_taken(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("latentwire.evaluation.answering.answer", lambda *a: pytest.fail("computed again"))
    results = evaluate(config(tmp_path / "r", llms="qwen", conditions="text", reuse=str(finished[0])))
    assert [row["llm"] for row in results["results"]] == ["qwen"]


def test_an_estimate_counts_no_answers_that_would_be_taken(finished, tmp_path, capsys):
    how = {"conditions": "text,no_context,token_budget@8", "estimate": True, "json": True}
    for reuse, answers in (("", 3 * 18), (str(finished[0]), 18)):
        evaluate(config(tmp_path / "r", reuse=reuse, **how))
        assert json.loads(capsys.readouterr().out)["answers"] == answers
    assert not (tmp_path / "r").exists()


def test_answers_of_another_model_of_the_same_name_are_not_taken(finished, tmp_path, monkeypatch, llm_folders):
    monkeypatch.setenv("QWEN_ID", llm_folders["LLAMA_ID"])
    with pytest.raises(ValueError, match="llm_ids: "):
        evaluate(config(tmp_path / "r", conditions="text", reuse=str(finished[0])))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"samples": 8}, "questions_sha256: "),
        ({"max_new_tokens": 5}, "max_new_tokens: 4 there, 5 now"),
        ({"d_z": 16}, "d_z: 24 there, 16 now"),
        ({"reuse": "/no/such/run"}, "/no/such/run"),
    ],
)
def test_answers_to_something_else_are_not_taken(finished, tmp_path, change, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        evaluate(config(tmp_path / "r", **({"reuse": str(finished[0]), "conditions": "text"} | change)))
    assert not (tmp_path / "r").exists()
