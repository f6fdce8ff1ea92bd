"""Evaluation from end to end with small random models: its files, and that nothing finished is lost."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import sys
from contextlib import nullcontext

import pytest
import torch
from evaluation.evaluations import config, predictions, timeless

from latentwire.conditions.base import CONDITIONS, Sender
from latentwire.data.question import split_by_article, subset
from latentwire.data.squad import SAMPLE_DIR, load
from latentwire.eval import main
from latentwire.evaluation.evaluate import evaluate, manifest_ids
from latentwire.evaluation.results import further_lines
from latentwire.evaluation.settings import EvalSettings
from latentwire.models.checkpoint import load_checkpoint, save_checkpoint, save_soft_prompts
from latentwire.models.encoders.selecting import SelectingEncoder
from latentwire.models.weights import read_config, wire_id
from latentwire.utils import declared
from latentwire.utils.cli import parse
from latentwire.utils.files import write_sealed
from latentwire.utils.runs import RunFolder

pytestmark = pytest.mark.usefixtures("tiny_models")
ROW_KEYS = {
    "condition", "llm", "llm_id", "m", "d_z", "n", "f1", "f1_ci95", "em", "em_ci95", "first_token_acc", "seconds",
    "nll_per_token", "bits_per_answer_byte", "llm_positions", "wire_bytes", "text_bytes", "explained_variance",
    "examples_per_s", "colour", "empty_answers",
}  # fmt: skip
TOP_KEYS = {
    "schema", "dataset", "split", "n", "seed", "train_seed", "source", "codec", "git", "results", "comparisons",
}  # fmt: skip


def predictions_bytes(folder):
    return (folder / "predictions.jsonl").read_bytes()


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(finished[0], tmp_path / "run")


def test_the_results_keep_the_contract(finished):
    folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == results
    assert results.keys() >= TOP_KEYS and results["schema"] == 1
    assert results["dataset"] == "sample" and results["n"] == 9
    assert len(results["results"]) == 2 * 5
    for row in results["results"]:
        assert row.keys() >= ROW_KEYS
        assert row["colour"] == CONDITIONS[row["condition"]].colour
        assert 0 <= row["f1_ci95"][0] <= row["f1"] <= row["f1_ci95"][1] <= 1
    m = {row["condition"]: (row["m"], row["d_z"]) for row in results["results"]}
    assert m["text"] == (None, None) and m["token_budget"] == (16, None) and m["latentwire"] == (16, 24)
    variance = {row["condition"]: row["explained_variance"] for row in results["results"]}
    assert 0 < variance["pca"] < 1 and variance["latentwire"] is None


def test_every_question_has_a_line_in_every_condition_and_the_manifest_names_it(finished):
    folder, _ = finished
    ids = json.loads((folder / "manifest.json").read_text())["ids"]
    lines = predictions(folder)
    assert len(lines) == 2 * 5 * len(ids) == len({(x["id"], x["condition"], x["llm"]) for x in lines})
    assert {x["id"] for x in lines} == set(ids)
    assert {"id", "condition", "llm", "prediction", "references", "f1", "em"} <= lines[0].keys()


def test_the_wires_bytes_are_those_of_its_header_and_payload(finished):
    sizes = {row["wire_bytes"] for row in finished[1]["results"] if row["condition"] == "latentwire"}
    assert sizes == {14 + 2 * 16 * 24 + 4}  # header, fp16 values, checksum; the same for both LLMs


def test_the_closed_forms_report_tells_what_the_codes_carry(finished):
    for report in finished[1]["interface"].values():
        assert 0 < report["explained_variance"] < 1 and 0 < report["nearest_token_recall"] <= 1


def test_the_critical_tests_are_there_for_both_llms_with_positions_and_bytes(finished):
    tests = [c for c in finished[1]["comparisons"] if "critical" in c]
    assert sorted((c["llm"], c["critical"]) for c in tests) == [(n, i) for n in ("llama", "qwen") for i in (1, 2, 3)]
    for c in tests:
        assert c["verdict"] in ("PASS", "FAIL", "not decided")
        assert c["a_positions"] == 16 and c["a_bytes"] > 0 and c["b_positions"] > 0


def test_the_same_seed_gives_the_same_files(finished, tmp_path):
    again = evaluate(config(tmp_path / "again"))
    assert timeless(again) == timeless(finished[1])
    assert timeless(predictions(tmp_path / "again")) == timeless(predictions(finished[0]))


def test_a_soft_prompt_for_another_selection_is_refused(trained, tmp_path, llms):
    ids = read_config(trained)["llms"]
    soft = {llm: torch.randn(16, llms[llm].width) for llm in ids}
    folder, more = tmp_path / "tuned" / "selected_text_tuned" / "checkpoint_best", {"latent_len": None, "d_z": None}
    more |= {"ckpt": str(trained), "tuned": str(tmp_path / "tuned"), "conditions": "selected_text_tuned", "samples": 1}
    for number, wire in enumerate((wire_id(trained).hex(), "of another encoder")):
        save_soft_prompts(folder, soft, {"llms": ids, "wire": wire})
        with nullcontext() if number == 0 else pytest.raises(ValueError, match="'wire': 'of another encoder'"):
            evaluate(config(tmp_path / f"r{number}", **more))
    more |= {"ckpt": "", "latent_len": 16, "d_z": 24}  # the closed form's selection
    with pytest.raises(ValueError, match=r"'wire': 'of another encoder'.* asked for .*'wire': None"):
        evaluate(config(tmp_path / "r2", **more))


def test_the_vectors_of_a_soft_prompt_count_where_a_prompt_may_be_too_long(tmp_path, monkeypatch):
    more = []
    monkeypatch.setattr("latentwire.evaluation.evaluate.require_positions", lambda *given: more.append(given[-1]))
    for conditions in ("text_tuned", "text"):
        evaluate(config(tmp_path / conditions, conditions=conditions, tuned="not/there", samples=1, estimate=True))
    assert more == [4 + 16, 4 + 16, 4, 4]


def test_another_seed_draws_other_questions(tmp_path):
    evaluate(config(tmp_path / "r", seed=1, samples=5, conditions="no_context", max_new_tokens=1))
    drawn = [[q.id for q in subset(load("sample", "dev").questions, 5, seed)] for seed in (0, 1)]
    assert json.loads((tmp_path / "r" / "manifest.json").read_text())["ids"] == drawn[1] != drawn[0]


def test_bytes_by_other_means_are_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr("latentwire.evaluation.sizes.QUESTIONS", 5)
    first = evaluate(config(tmp_path / "run", conditions="latentwire"))
    assert first["bytes_table"]
    monkeypatch.setattr("latentwire.evaluation.evaluate.bytes_table", lambda *a: pytest.fail("counted again"))
    assert evaluate(config(tmp_path / "run", conditions="latentwire"))["bytes_table"] == first["bytes_table"]


def test_a_second_call_computes_nothing(run, monkeypatch):
    monkeypatch.setattr("latentwire.evaluation.answering.answer", lambda *a: pytest.fail("computed again"))
    before = (run / "predictions.jsonl").read_bytes()
    evaluate(config(run))
    assert (run / "predictions.jsonl").read_bytes() == before


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.93])
def test_a_run_killed_while_writing_continues_to_the_same_end(finished, run, cut):
    whole = (run / "predictions.jsonl").read_bytes()
    (run / "predictions.jsonl").write_bytes(whole[: int(len(whole) * cut)])
    (run / "results.json").unlink()
    assert timeless(evaluate(config(run))) == timeless(finished[1])
    key = ("condition", "llm", "id")
    assert sorted(timeless(predictions(run)), key=lambda x: [x[k] for k in key]) == sorted(
        timeless(predictions(finished[0])), key=lambda x: [x[k] for k in key]
    )


def test_a_cut_inside_a_letter_and_odd_line_ends_in_an_answer_are_no_damage(finished, run):
    lines = (run / "predictions.jsonl").read_bytes().split(b"\n")
    first = json.loads(lines[0])
    del first["crc32"]  # a line of an older run
    lines[0] = json.dumps(first | {"prediction": "a\u2028b\u0085c"}, ensure_ascii=False).encode()
    broken = json.dumps({"prediction": "é"}, ensure_ascii=False).encode()
    (run / "predictions.jsonl").write_bytes(b"\n".join(lines[:-1]) + b"\n" + broken[: broken.index(b"\xc3") + 1])
    assert evaluate(config(run))["n"] == 9
    assert predictions_bytes(run) == b"\n".join(lines[:-1]) + b"\n"


def test_more_conditions_extend_a_run(finished, run):
    results = evaluate(config(run, conditions="text,token_budget@32,shuffled_z"))
    rows = [(row["llm"], row["condition"], row["m"]) for row in results["results"]]
    assert rows[:3] == [("llama", "text", None), ("llama", "token_budget", 32), ("llama", "shuffled_z", 16)]
    assert {row["condition"] for row in results["results"]} == {
        "text", "token_budget", "pca", "latentwire", "no_context", "shuffled_z",
    }  # fmt: skip
    assert len(results["results"]) == 2 * 7, "what was finished before keeps its rows"
    assert len(predictions(run)) == len(predictions(finished[0])) + 2 * 2 * 9


def test_a_damaged_line_is_named(run):
    lines = (run / "predictions.jsonl").read_text().splitlines(keepends=True)
    lines[3] = lines[3][:20] + "\n"
    (run / "predictions.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match=r"predictions.jsonl:4.*--fresh_eval"):
        evaluate(config(run))


def test_another_configuration_is_refused_with_the_keys_that_differ_and_loses_nothing(run):
    before = {p.name: p.read_bytes() for p in run.glob("*.json*")}
    with pytest.raises(ValueError, match=r"latent_len: 16 there, 8 now.*--fresh_eval"):
        evaluate(config(run, latent_len=8))
    assert {p.name: p.read_bytes() for p in run.glob("*.json*")} == before


def test_a_start_that_failed_binds_nobody(tmp_path):
    with pytest.raises(ValueError, match="d_z=5000"):
        evaluate(config(tmp_path / "r", d_z=5000))
    assert evaluate(config(tmp_path / "r", conditions="no_context"))["n"] == 9


def test_other_folders_are_never_taken_for_runs(finished, tmp_path):
    ckpt = shutil.copytree(finished[0] / "checkpoint_untrained", tmp_path / "ckpt")
    before = (ckpt / "config.json").read_bytes()
    with pytest.raises(ValueError, match="not a run folder"):
        evaluate(config(ckpt, ckpt=str(ckpt), fresh_eval=True))
    assert (ckpt / "config.json").read_bytes() == before


def test_the_order_of_the_llms_is_part_of_the_wire(run):
    with pytest.raises(ValueError, match="llm_ids"):
        evaluate(config(run, llms="qwen,llama"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"wordings": "qwen=loud"}, "qwen=loud.*plain"),
        ({"samples": 1, "conditions": "text,shuffled_z"}, "shuffled_z.*needs questions on two articles or more"),
        ({"device": "banana"}, "device='banana'"),
        ({"device": "cuda:63"}, "device='cuda:63'"),
        ({"conditions": "text,text_tuned"}, "text_tuned.*tuned_baselines.*--tuned"),
    ],
)
def test_what_would_fail_later_is_refused_before_any_model_is_loaded(tmp_path, monkeypatch, change, match):
    monkeypatch.setattr("latentwire.conditions.base.load_llm", lambda *a: pytest.fail("loaded a model"))
    with pytest.raises(ValueError, match=match):
        evaluate(config(tmp_path / "r", **change))


def test_a_fresh_evaluation_starts_over(run):
    results = evaluate(config(run, latent_len=8, conditions="latentwire", fresh_eval=True))
    assert [row["m"] for row in results["results"]] == [8, 8]
    assert len(predictions(run)) == 2 * 9


def test_a_folder_in_use_is_refused(run):
    settings = json.loads((run / "config.json").read_text())["config"]
    with RunFolder(run, settings), pytest.raises(ValueError, match="in use"):
        evaluate(config(run))


def test_more_samples_than_exist_means_all_and_says_so(tmp_path, capsys):
    results = evaluate(config(tmp_path / "r", samples=9999, conditions="no_context", max_new_tokens=1))
    assert results["n"] == 120
    assert "120 questions (all there are; 9999 asked for)" in capsys.readouterr().out


def test_questions_that_were_looked_at_before_are_left_out(tmp_path):
    ids = {}
    for name, how in {"all": {"samples": 9}, "rest": {"samples": 5, "skip": 4}}.items():
        evaluate(config(tmp_path / name, conditions="no_context", max_new_tokens=1, **how))
        ids[name] = json.loads((tmp_path / name / "manifest.json").read_text())["ids"]
    assert ids["rest"] == ids["all"][4:]
    with pytest.raises(ValueError, match="skip=120: dev has 120 questions"):
        evaluate(config(tmp_path / "r", skip=120))


def test_the_questions_of_an_earlier_evaluation_can_be_named(tmp_path):
    how = {"conditions": "no_context", "max_new_tokens": 1}
    evaluate(config(tmp_path / "first", samples=5, skip=3, **how))
    manifest = tmp_path / "first" / "manifest.json"
    ids = json.loads(manifest.read_text())["ids"]
    (tmp_path / "some.txt").write_text("\n".join(ids[::-1]))
    for name, expected in ((manifest, ids), (tmp_path / "some.txt", ids[::-1])):
        folder = tmp_path / f"by {name.name}"
        evaluate(config(folder, samples=None, ids=str(name), **how))
        assert json.loads((folder / "manifest.json").read_text())["ids"] == expected
    (tmp_path / "wrong.txt").write_text(f"{ids[0]}\nno body\n")
    (tmp_path / "twice.txt").write_text(f"{ids[0]}\n{ids[0]}")
    (tmp_path / "none.json").write_text("[]")
    for name, match in (
        ("wrong.txt", "1 of 2 .*no body"),
        ("twice.txt", "named twice"),
        ("none.json", "no list `ids`"),
    ):
        with pytest.raises(ValueError, match=match):
            evaluate(config(tmp_path / "r", samples=None, ids=str(tmp_path / name), **how))
    with pytest.raises(ValueError, match="leave samples and skip out"):
        config(tmp_path, samples=3, ids=str(manifest))


def test_an_evaluation_goes_on_in_batches_of_another_size(run):
    lines = predictions(run)
    (run / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:5]))
    evaluate(config(run, batch_size=2))
    assert len(predictions(run)) == len(lines)
    noted = json.loads((run / "config.json").read_text())["config"]
    assert noted["batch_size"] == config(run).batch_size, "what it was begun with"


def test_an_ids_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbfq1\r\n\r\nq2\r\n")
    assert manifest_ids(tmp_path / "ids.txt") == ["q1", "q2"]


def test_an_evaluation_goes_on_where_its_checkpoint_lies_by_now(trained, tmp_path, monkeypatch):
    how = {"conditions": "no_context", "samples": 2, "max_new_tokens": 1}
    before = evaluate(config(tmp_path / "r", ckpt=str(trained), **how))
    monkeypatch.setattr("latentwire.evaluation.answering.answer", lambda *a: pytest.fail("computed again"))
    for ckpt in (f"{trained}/", str(shutil.copytree(trained, tmp_path / "moved"))):
        again = evaluate(config(tmp_path / "r", ckpt=ckpt, **how))
        assert again == before | {"checkpoint": ckpt}


def test_the_context_source_asks_the_question_as_text(tmp_path):
    results = evaluate(config(tmp_path / "r", source="context", conditions="latentwire,oracle_text,oracle_wire,text"))
    rows = {row["condition"]: row for row in results["results"] if row["llm"] == "qwen"}
    assert rows["oracle_wire"]["wire_bytes"] == rows["latentwire"]["wire_bytes"]
    assert rows["text"]["wire_bytes"] == pytest.approx(rows["text"]["text_bytes"] + 1, abs=0.5), "context and a space"


def test_the_aware_source_asks_the_question_as_text_and_the_encoder_knows_it(trained, tmp_path):
    names = (
        "latentwire,encoder_only,sentence,shuffled_context_z,selected_words,pca_selected,oracle_text,no_context,text"
    )
    how = {"source": "aware", "ckpt": str(trained), "conditions": names, "samples": 4}
    results = evaluate(config(tmp_path / "r", **how))
    rows = {row["condition"]: row for row in results["results"] if row["llm"] in ("qwen", None)}
    assert rows.keys() == set(names.split(",")) and results["source"] == "aware"
    assert rows["text"]["wire_bytes"] == pytest.approx(rows["text"]["text_bytes"] + 1, abs=0.5), "context and a space"
    assert all(0 <= row["first_informative_acc"] <= 1 for name, row in rows.items() if name != "encoder_only")
    assert rows["encoder_only"]["first_informative_acc"] is None
    said = further_lines(results)
    assert len(said) == 4 and all("further test: LatentWire > " in line for line in said)
    assert [line.split(" > ")[1].split(":")[0] for line in said] == ["pca_selected", "sentence"] * 2


def test_lines_of_before_the_informative_token_was_noted_are_summarised(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    lines = predictions(folder)
    old = [{key: value for key, value in x.items() if key not in ("first_informative_correct", "crc32")} for x in lines]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    results = evaluate(config(folder))
    assert [row["f1"] for row in results["results"]] == [row["f1"] for row in finished[1]["results"]]
    assert {row["first_informative_acc"] for row in results["results"]} == {None}


def test_the_closed_form_is_a_checkpoint_that_evaluates_to_the_same_scores(finished, tmp_path):
    folder, untrained = finished
    loaded = evaluate(config(tmp_path / "r", ckpt=str(folder / "checkpoint_untrained")))
    assert timeless(loaded["results"]) == timeless(untrained["results"])
    assert loaded["checkpoint"].endswith("checkpoint_untrained") and untrained["checkpoint"] == "untrained"


def test_a_checkpoint_of_other_llms_or_another_width_is_refused(finished, tmp_path, monkeypatch):
    ckpt = str(finished[0] / "checkpoint_untrained")
    with pytest.raises(ValueError, match=r"d_z=32.*d_z=24"):
        evaluate(config(tmp_path / "a", ckpt=ckpt, d_z=32))
    assert evaluate(config(tmp_path / "a2", ckpt=ckpt, d_z=None, conditions="no_context"))["results"]
    made = json.loads((finished[0] / "checkpoint_untrained" / "config.json").read_text())["llms"]
    monkeypatch.setenv("QWEN_ID", made["llama"])
    with pytest.raises(ValueError, match=r"was made for qwen=.*QWEN_ID"):
        evaluate(config(tmp_path / "b", ckpt=ckpt))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"latent_len": 0}, "latent_len=0"),
        ({"samples": -5}, "samples=-5"),
        ({"d_z": 0}, "d_z=0"),
        ({"codec": "fp12"}, "codec='fp12'.*int8"),
        ({"source": "book"}, "source='book'"),
        ({"split": "test"}, "split='test'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"llms": " , "}, "llms"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_and_value(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        config(tmp_path, **change)


def test_the_encoder_alone_has_one_row_without_llm_and_latentwire_meets_it_for_each_llm(trained, tmp_path):
    results = evaluate(config(tmp_path / "r", ckpt=str(trained), conditions="latentwire,encoder_only,selected_text"))
    rows = [(row["condition"], row["llm"], row["m"]) for row in results["results"]]
    assert rows == [
        ("latentwire", "llama", 16), ("encoder_only", None, None), ("selected_text", "llama", 16),
        ("latentwire", "qwen", 16), ("selected_text", "qwen", 16),
    ]  # fmt: skip
    alone = results["results"][1]
    assert alone["llm_id"] is alone["d_z"] is alone["first_token_acc"] is alone["bits_per_answer_byte"] is None
    assert alone["llm_positions"] == 0 < alone["wire_bytes"] and 0 <= alone["f1_ci95"][0] <= alone["f1"] <= 1
    met = {(c["llm"], c["b"]) for c in results["comparisons"] if c["a"] == "latentwire"}
    assert met == {(llm, rival) for llm in ("llama", "qwen") for rival in ("encoder_only", "selected_text")}
    lines = [line for line in predictions(tmp_path / "r") if line["condition"] == "encoder_only"]
    assert len(lines) == 9 and all(line["llm"] is None and line["prediction"] for line in lines)


def test_held_out_questions_are_those_that_no_training_sees(trained, tmp_path):
    pool, held = split_by_article(load("sample", "train").questions)
    made = read_config(trained)
    for seed in (3, 5):
        write_sealed(trained / "config.json", made | {"train_seed": seed})
        folder = tmp_path / f"r{seed}"
        evaluate(config(folder, ckpt=str(trained), split="held_out", samples=99, conditions="no_context"))
        ids = json.loads((folder / "manifest.json").read_text())["ids"]
        assert set(ids) == {q.id for q in held} and not set(ids) & {q.id for q in pool}


def test_the_encoders_answers_are_kept_by_a_later_call_for_more(trained, tmp_path, monkeypatch):
    first = evaluate(config(tmp_path / "r", ckpt=str(trained), conditions="encoder_only"))
    monkeypatch.setattr(SelectingEncoder, "read", lambda *a: pytest.fail("read again"))
    later = evaluate(config(tmp_path / "r", ckpt=str(trained), conditions="no_context"))
    assert [row["condition"] for row in later["results"]] == ["no_context", "encoder_only", "no_context"]
    assert timeless(later["results"][1]) == timeless(first["results"][0])


def test_what_training_added_is_measured_against_the_wire_before_it(finished, trained, tmp_path):
    with torch.no_grad():
        ids = json.loads((trained / "config.json").read_text())["llms"]
        encoder, adapters, made = load_checkpoint(trained, ids)
        for adapter in adapters.values():
            adapter.linear.bias += 1
    save_checkpoint(trained, encoder, adapters, made)
    results = evaluate(config(tmp_path / "r", ckpt=str(trained), conditions="latentwire,untrained"))
    before = [row for row in finished[1]["results"] if row["condition"] == "latentwire"]
    assert [row["condition"] for row in results["results"]] == ["latentwire", "untrained"] * 2
    for trained_row, row, expected in zip(*(results["results"][i::2] for i in range(2)), before, strict=True):
        assert timeless(row) == timeless(
            expected | {"condition": "untrained", "colour": CONDITIONS["untrained"].colour}
        )
        assert trained_row["nll_per_token"] != row["nll_per_token"]
    assert {(c["llm"], c["b"]) for c in results["comparisons"]} == {("llama", "untrained"), ("qwen", "untrained")}


def test_a_run_is_not_continued_with_prompts_that_begin_otherwise(tmp_path):
    evaluate(config(tmp_path / "r", conditions="no_context"))
    heads = json.loads((tmp_path / "r" / "heads.json").read_text())
    assert heads.keys() == {"llama", "qwen"} and len({*heads.values()}) == 2
    (tmp_path / "r" / "heads.json").write_text(json.dumps(heads | {"qwen": "of another template"}))
    with pytest.raises(ValueError, match="prompt of qwen begins otherwise"):
        evaluate(config(tmp_path / "r", conditions="no_context"))
    evaluate(config(tmp_path / "r", conditions="no_context", fresh_eval=True))


def test_tuned_rivals_are_read_from_their_folder(finished, tmp_path, llms):
    ids = json.loads((finished[0] / "checkpoint_untrained" / "config.json").read_text())["llms"]
    for name, size in (("text_tuned", 16), ("token_budget_tuned", 16)):
        soft = {llm: torch.randn(size, llms[llm].width) for llm in ids}
        save_soft_prompts(tmp_path / "tuned" / name / "checkpoint_best", soft, {"llms": ids, "stage": name})
    conditions = "text,text_tuned,token_budget,token_budget_tuned"
    results = evaluate(config(tmp_path / "r", tuned=str(tmp_path / "tuned"), conditions=conditions))
    rows = {(r["llm"], r["condition"]): r for r in results["results"]}
    for llm in ids:
        for name in ("text", "token_budget"):
            rival, base = rows[llm, f"{name}_tuned"], rows[llm, name]
            assert (rival["constant_positions"], base["constant_positions"]) == (16, 0)
            assert all(rival[key] == base[key] for key in ("llm_positions", "wire_bytes"))
    budget = tmp_path / "tuned" / "token_budget_tuned" / "checkpoint_best"
    save_soft_prompts(budget, soft, {"llms": ids, "latent_len": 16, "settings": {"latent_lens": "16, 32"}})
    several = {"tuned": str(tmp_path / "tuned"), "samples": 1, "max_new_tokens": 1}
    evaluate(config(tmp_path / "several", conditions="token_budget_tuned@16,token_budget_tuned@32", **several))
    with pytest.raises(ValueError, match="'latent_len': 8"):
        evaluate(config(tmp_path / "none", conditions="token_budget_tuned@8", **several))
    for made, says in (
        ({"latent_len": 99}, r"'latent_len': 99.*'latent_len': 16"),
        ({"source": "context"}, "'source': 'context'"),
        ({"wordings": dict.fromkeys(ids, "zero_shot")}, "'zero_shot'"),
    ):
        save_soft_prompts(budget, soft, {"llms": ids, **made})
        with pytest.raises(ValueError, match=rf"tuned=.*token_budget_tuned.*was trained for .*{says}"):
            evaluate(config(tmp_path / "other", tuned=str(tmp_path / "tuned"), conditions=conditions))
    save_soft_prompts(tmp_path / "tuned" / "text_tuned" / "checkpoint_best", soft, {"llms": ids, "stage": "other"})
    with pytest.raises(ValueError, match="tuned_sha256"):
        evaluate(config(tmp_path / "r", tuned=str(tmp_path / "tuned"), conditions=conditions))


def test_a_checkpoint_that_was_trained_for_another_source_says_so(trained, tmp_path, capsys):
    evaluate(config(tmp_path / "r", ckpt=str(trained), source="context", conditions="latentwire", samples=2))
    assert "trained with source 'prompt', and is evaluated with 'context'" in capsys.readouterr().out
    evaluate(config(tmp_path / "r2", ckpt=str(trained), conditions="latentwire", samples=2))
    assert "trained with source" not in capsys.readouterr().out


def test_a_run_is_not_continued_with_other_weights_or_other_questions(finished, tmp_path):
    ckpt = shutil.copytree(finished[0] / "checkpoint_untrained", tmp_path / "ckpt")
    evaluate(config(tmp_path / "r", ckpt=str(ckpt), conditions="latentwire"))
    made = json.loads((ckpt / "config.json").read_text())
    encoder, adapters, made = load_checkpoint(ckpt, made["llms"])
    with torch.no_grad():
        encoder.codebook.weight += 1
    save_checkpoint(ckpt, encoder, adapters, made)
    with pytest.raises(ValueError, match="checkpoint_sha256"):
        evaluate(config(tmp_path / "r", ckpt=str(ckpt), conditions="latentwire"))
    hashes = itertools.chain(["a" * 64], itertools.repeat("b" * 64))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=r"ckpt=.*a training replaced it"):
        patch.setattr("latentwire.evaluation.evaluate.checkpoint_sha256", lambda _: next(hashes))
        evaluate(config(tmp_path / "meanwhile", ckpt=str(ckpt), conditions="latentwire"))
    data = tmp_path / "data.json"
    data.write_text((SAMPLE_DIR / "dev.json").read_text())
    evaluate(config(tmp_path / "d", dataset=str(data), conditions="no_context"))
    data.write_text((SAMPLE_DIR / "train.json").read_text())
    with pytest.raises(ValueError, match="questions_sha256"):
        evaluate(config(tmp_path / "d", dataset=str(data), conditions="no_context"))


def test_a_long_evaluation_says_how_long_and_stops_on_a_cpu_unless_asked_for_by_hand(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("latentwire.evaluation.evaluate.LONG_ANSWERS", 1)
    evaluate(config(tmp_path / "a", conditions="text,no_context"))
    assert "estimate: 0 minutes for 36 answers" in capsys.readouterr().out
    evaluate(config(tmp_path / "a", conditions="text,no_context"))
    assert "estimate" not in capsys.readouterr().out
    monkeypatch.setattr("latentwire.utils.cli.LONGEST_S", 0)
    with pytest.raises(ValueError, match=r"120 questions would take .* hours.*SAMPLES"):
        evaluate(config(tmp_path / "b", samples=None, conditions="no_context", max_new_tokens=1))
    evaluate(config(tmp_path / "b", samples=3, conditions="no_context"))


def test_one_answer_of_each_condition_is_shown_as_soon_as_it_is_there(tmp_path, capsys):
    evaluate(config(tmp_path / "run", conditions="no_context,token_budget"))
    shown = [line for line in capsys.readouterr().err.splitlines() if "(right: " in line]
    lines = {(line["llm"], line["condition"]): line for line in reversed(predictions(tmp_path / "run"))}
    titles = {f"{llm} {condition}{' M=16' if line['m'] else ''}": line for (llm, condition), line in lines.items()}
    assert len(shown) == len(titles) == 4
    for line in shown:
        title, answer = line.split(": ", 1)
        assert repr(titles[title]["prediction"]) in answer and repr(titles[title]["references"][0]) in answer


def test_a_text_baseline_builds_no_wire(tmp_path):
    results = evaluate(config(tmp_path / "r", conditions="text,pca"))
    assert results["interface"] is None and not (tmp_path / "r" / "checkpoint_untrained").exists()


def test_any_number_of_llms_read_the_same_wire(tmp_path, llm_folders, monkeypatch):
    monkeypatch.setenv("THIRD_ID", llm_folders["QWEN_ID"])
    by_llm, slot = {}, Sender.slot

    def noted(self, packed, adapter):
        by_llm.setdefault(id(adapter), []).append(bytes(packed))
        return slot(self, packed, adapter)

    monkeypatch.setattr(Sender, "slot", noted)
    results = evaluate(config(tmp_path / "r", llms="third,llama,qwen", conditions="latentwire", samples=3))
    assert [row["llm"] for row in results["results"]] == ["third", "llama", "qwen"]
    assert len({row["wire_bytes"] for row in results["results"]}) == 1
    assert len(by_llm) == 3 and len({frozenset(wires) for wires in by_llm.values()}) == 1


def test_an_llm_without_an_id_and_a_wording_of_nobody_are_named(tmp_path):
    with pytest.raises(ValueError, match="MISTRAL_ID"):
        evaluate(config(tmp_path / "r", llms="mistral"))
    with pytest.raises(ValueError, match="wordings='mistral'"):
        evaluate(config(tmp_path / "r", wordings="mistral=chat"))


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="run folder"):
        evaluate(config(tmp_path / "file" / "run"))


def test_help_explains_every_setting_and_every_condition(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(EvalSettings))
    assert all(name in shown for name in CONDITIONS) and "(default: )" not in shown and "None" not in shown


def test_flags_follow_the_settings(capsys):
    assert parse(EvalSettings, ["--samples", "7", "--fresh_eval"]) == EvalSettings(samples=7, fresh_eval=True)
    with pytest.raises(SystemExit) as stop:
        parse(EvalSettings, ["--output_dir", "x"])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: unrecognized arguments: --output_dir")


def test_a_checkpoint_knows_its_llms_where_the_environment_names_none(trained, tmp_path, monkeypatch):
    ids = [os.environ[name] for name in ("LLAMA_ID", "QWEN_ID")]
    monkeypatch.delenv("LLAMA_ID")
    monkeypatch.delenv("QWEN_ID")
    results = evaluate(config(tmp_path / "r", ckpt=str(trained), conditions="latentwire"))
    assert [row["llm_id"] for row in results["results"]] == ids
    monkeypatch.setenv("QWEN_ID", ids[0])
    with pytest.raises(ValueError, match="set QWEN_ID to match"):
        evaluate(config(tmp_path / "other", ckpt=str(trained), conditions="latentwire"))


def test_the_llms_are_those_of_the_checkpoint_unless_others_are_named(trained, tmp_path, monkeypatch):
    made = load_checkpoint(trained, {"qwen": os.environ["QWEN_ID"]})
    one = {"llms": {"qwen": os.environ["QWEN_ID"]}}
    save_checkpoint(tmp_path / "one", made[0], made[1], {**read_config(trained), **one})
    assert parse(EvalSettings, [f"--ckpt={tmp_path / 'one'}"]).llm_names == ["qwen"]
    assert parse(EvalSettings, [f"--ckpt={trained}"]).llm_names == ["llama", "qwen"]
    assert parse(EvalSettings, [f"--ckpt={tmp_path / 'one'}", "--llms=llama"]).llm_names == ["llama"]
    assert parse(EvalSettings, []).llm_names == ["llama", "qwen"]
    with pytest.raises(ValueError, match="has nothing for llama; name others with --llms: qwen"):
        evaluate(config(tmp_path / "r", ckpt=str(tmp_path / "one"), llms="llama", conditions="latentwire"))
    monkeypatch.setenv("CKPT", str(tmp_path / "one"))
    assert declared.one(EvalSettings, "llms") == "qwen", "what scripts print"
    monkeypatch.setenv("LLMS", "llama")
    assert declared.one(EvalSettings, "llms") == "llama"


def test_a_run_continued_at_another_commit_names_both(run, monkeypatch):
    before = json.loads((run / "config.json").read_text())["git"]
    monkeypatch.setattr("latentwire.utils.runs.git_sha", lambda: "abc")
    for _ in range(2):
        assert evaluate(config(run))["git"] == f"{before}, then abc"


def test_an_estimate_runs_nothing_and_writes_nothing(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("latentwire.utils.cli.LONGEST_S", 0)
    conditions = "text,latentwire,text_tuned,token_budget_tuned"
    done = evaluate(config(tmp_path / "r", conditions=conditions, tuned="not/there/yet", samples=None, estimate=True))
    assert done is None and not (tmp_path / "r").exists()
    assert re.search(r"estimate: \d+ minutes for 960 answers", capsys.readouterr().out)


def test_an_estimate_leaves_a_run_alone_that_somebody_is_writing(run):
    with open(run / "predictions.jsonl", "a") as file:
        file.write('{"half a li')
    before = predictions_bytes(run)
    evaluate(config(run, estimate=True))
    assert predictions_bytes(run) == before
    evaluate(config(run))
    assert predictions_bytes(run) == before.removesuffix(b'{"half a li')


def test_an_estimate_for_programs_is_one_json_object_on_standard_output(tmp_path, capsys):
    evaluate(config(tmp_path / "r", conditions="no_context,text", estimate=True, json=True))
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found.keys() == {"answers", "seconds"} and found["answers"] == 2 * 2 * 9 and found["seconds"] > 0
    assert "estimate: 0 minutes for 36 answers" in shown.err and not (tmp_path / "r").exists()


def test_a_group_leaves_out_what_the_encoder_lacks_and_its_name_is_refused(tmp_path, trained, monkeypatch):
    with pytest.raises(ValueError, match="conditions='encoder_only': needs an encoder that reads answers itself"):
        evaluate(config(tmp_path / "r", conditions="text,encoder_only"))
    results = evaluate(config(tmp_path / "r", conditions="learned", samples=6, max_new_tokens=1))
    learned = ["pca_selected", "latentwire", "untrained", "shuffled_z", "shuffled_context_z", "selected_text"]
    learned += ["selected_words"]
    assert [row["condition"] for row in results["results"]] == learned * 2
    results = evaluate(
        config(tmp_path / "t", ckpt=str(trained), conditions="learned", samples=6, max_new_tokens=1, llms="llama")
    )
    assert {row["condition"] for row in results["results"]} == {*learned, "encoder_only", "sentence"}


@pytest.mark.parametrize("conditions", ["no_context,text", "no_context,pca_rank", "no_context,token_budget@2048"])
def test_a_prompt_beyond_an_llms_positions_is_refused_before_anything_is_answered(tmp_path, monkeypatch, conditions):
    monkeypatch.setattr("latentwire.evaluation.answering.answer", lambda *a: pytest.fail("answered"))
    data = json.loads((SAMPLE_DIR / "dev.json").read_text())
    first = data["data"][0]["paragraphs"][0]
    if "2048" not in conditions:
        first["context"] += " word" * 3000
    (tmp_path / "data.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"question \S+: its prompt takes \d+ positions, and llama .* reads 2048") as e:
        evaluate(config(tmp_path / "r", dataset=str(tmp_path / "data.json"), samples=99, conditions=conditions))
    if "2048" not in conditions:
        assert str(e.value).split()[1].removesuffix(":") in {qa["id"] for qa in first["qas"]}
    assert not (tmp_path / "r" / "predictions.jsonl").exists()
