"""Paired differences between evaluations: of the same questions or not at all."""

import dataclasses
import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from latentwire.compare import main
from latentwire.data.squad import load
from latentwire.evaluation.results import compare as pairs_of
from latentwire.evaluation.results import row_key, summarise
from latentwire.reporting.charts import comparison, rates
from latentwire.reporting.tables import comparison_markdown
from latentwire.reporting.writing import write_comparison
from latentwire.studies import paired
from latentwire.studies.paired import answer_is_sent, compare, recompute
from latentwire.studies.settings import parse_run
from latentwire.utils.files import read_lines

QUESTIONS = load("sample", "dev").questions[:6]
MACHINE = {"gpus": [], "processor": "P", "threads": 2, "torch": "2", "transformers": "5"}


def evaluation(folder, scores, weights=None, others=None, nll=(), **more):
    """A finished evaluation of one LLM with these F1s. weights: of its checkpoint, else its own; others: F1s of further
    conditions, NAME or NAME@M, `encoder_only` without an LLM; nll: of each answer, of which question i has i + 1
    tokens; without, no LLM was asked."""
    folder.mkdir(parents=True)
    rows, lines = [], []
    for condition, f1s in {"latentwire": scores, **(others or {})}.items():
        condition, _, m = condition.partition("@")
        llm, model = (None, None) if condition == "encoder_only" else ("llama", "offline:a-model")
        key = {"condition": condition, "llm": llm, "m": int(m or 4)}
        rows.append(key | {
            "llm_id": model, "f1": sum(f1s) / len(f1s), "first_token_acc": 0.5, "nll_per_token": 2.0,
            "wire_bytes": 7,
        })  # fmt: skip
        by_llm = [{"answer_nll": each, "answer_tokens": i + 1} for i, each in enumerate(nll)] or [{}] * len(f1s)
        lines += [
            json.dumps({"id": q.id, "f1": f1, "wire_bytes": 7} | key | more)
            for q, f1, more in zip(QUESTIONS, f1s, by_llm, strict=True)
        ]
    results = {"dataset": "sample", "split": "dev", "n": 6, "source": "prompt", "dtype": "float32", "seed": 0,
               "codec": "fp16", "git": "abc", "machine": MACHINE, "results": rows} | more  # fmt: skip
    config = {"checkpoint_sha256": weights or str(folder), "tuned_sha256": ["tuned"]}
    (folder / "config.json").write_text(json.dumps({"config": config}))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "manifest.json").write_text(json.dumps({"ids": [q.id for q in QUESTIONS]}))
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def compared(*runs, margin=None, pair_seeds=False):
    """compare.py's record of runs: folders, lists of them (seeds), or texts as on the command line."""
    texts = [
        run if isinstance(run, str) else ",".join(map(str, run if isinstance(run, list) else [run])) for run in runs
    ]
    return compare([parse_run(text, "latentwire") for text in texts], margin, pair_seeds=pair_seeds)


@pytest.fixture
def runs(tmp_path):
    return [
        evaluation(tmp_path / "base", [0, 0, 1, 1, 0, 1]),
        evaluation(tmp_path / "seed1", [0, 0, 1, 0, 0, 1]),
        evaluation(tmp_path / "other", [1, 1, 1, 1, 1, 1]),
    ]


def test_runs_are_paired_with_the_first(runs):
    base, _, other = runs
    first, second = compared(base, other)["rows"]
    assert first["diff"] == 0 and first["diff_ci95"] is None and first["f1"] == 0.5
    assert second["diff"] == pytest.approx(0.5)
    low, high = second["diff_ci95"]
    assert 0 <= low <= 0.5 <= high <= 1


def test_each_m_is_paired_with_its_own_and_what_the_first_run_has_none_of_with_its_first(tmp_path):
    base = evaluation(tmp_path / "base", [0] * 6, others={"latentwire@8": [1, 0, 0, 0, 0, 0]})
    other = evaluation(tmp_path / "other", [1] * 6, others={"latentwire@8": [1] * 6, "latentwire@16": [1] * 6})
    found = {(row["name"], row["m"]): row["diff"] for row in compared(base, other)["rows"]}
    assert found == {
        ("base", 4): 0, ("base", 8): 0, ("other", 4): 1, ("other", 8): pytest.approx(5 / 6), ("other", 16): 1,
    }  # fmt: skip


def test_seeds_are_averaged_by_question_and_their_spread_is_told(runs):
    base, seed1, other = runs
    found = compared([base, seed1], other)
    first, second = found["rows"]
    assert first["f1"] == pytest.approx((0.5 + 1 / 3) / 2) and first["seed_f1"] == [0.5, pytest.approx(1 / 3)]
    assert first["seed_sd"] == pytest.approx((1 / 6) / 2**0.5)
    assert second["diff"] == pytest.approx(1 - first["f1"])
    table = comparison_markdown(found)
    assert "| base seed1 | a-model (llama) | 4 | fp16 | 0.417" in table and "| other | a-model (llama) |" in table
    assert "0.500, 0.333 (sd 0.118)" in table


def test_who_answers_without_an_llm_is_paired_and_drawn_beside_the_one_llm(tmp_path):
    one = evaluation(tmp_path / "base", [0, 0, 1, 1, 0, 1], others={"encoder_only": [1, 1, 1, 1, 0, 1]})
    found = compared(one, f"{one}:encoder_only")
    first, alone = found["rows"]
    assert alone["diff"] == pytest.approx(2 / 6) and alone["diff_ci95"] and not first["diff_ci95"]
    (panel,) = comparison(found).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == [alone["name"], first["name"]]


def test_a_first_run_without_an_llm_is_the_line_of_no_llm_that_it_is_not_paired_with(tmp_path):
    others = {"encoder_only": [1] * 6, "text": [1, 1, 1, 0, 0, 0]}
    one = evaluation(tmp_path / "base", [0, 0, 1, 1, 0, 1], others=others)
    found = compared(f"{one}:encoder_only", one)
    assert found["rows"][1]["diff"] == pytest.approx(-0.5), "one LLM: it is what the others are paired with"
    rows = [row | {"llm": "qwen"} for row in found["rows"][1:]]
    first, second = comparison(found | {"rows": [*found["rows"], *rows]}).axes
    assert [panel.lines[-1].get_xdata()[0] for panel in (first, second)] == [0.5, 0.5], "its own LLM's first run"


def test_all_machines_of_a_comparison_are_named(tmp_path):
    here = evaluation(tmp_path / "here", [0] * 6)
    there = evaluation(tmp_path / "there", [1] * 6, machine=MACHINE | {"gpus": ["H200"]})
    assert "; 1 x H200, torch 2, transformers 5; P, 2 threads, torch 2, transformers 5.\n" in comparison_markdown(
        compared(here, there)
    )


def test_seeds_go_by_what_their_folders_share(tmp_path):
    seeds = [evaluation(tmp_path / f"seed{seed}" / "lead" / "eval", [0] * 6) for seed in (0, 1)]
    rows = compared(seeds, evaluation(tmp_path / "rivals", [1] * 6))["rows"]
    assert [row["name"] for row in rows] == ["lead/eval (2 seeds)", "rivals"]


def test_an_answer_is_sent_if_all_its_tokens_are(trained, monkeypatch):
    for m, sent in ((1, False), (500, True)):
        assert set(answer_is_sent(trained, "prompt", QUESTIONS, m)) == {sent}
    monkeypatch.setattr(paired, "_AT_ONCE", 4)
    assert answer_is_sent(trained, "prompt", QUESTIONS, 500).tolist() == [True] * 6, "the last batch is smaller"


def test_all_of_one_answer_must_be_sent_whichever_it_is(monkeypatch):
    context = "Ada met the old queen of Spain in May."
    question = dataclasses.replace(
        QUESTIONS[0],
        context=context,
        answers=("queen of Spain ", "May"),
        starts=(context.index("queen"), context.index("May")),
    )
    spans = {
        "half of the first": ([(16, 21)], False),
        "all of the first but its last space": ([(16, 21), (21, 30)], True),
        "another": ([(0, 3), (34, 37)], True),
        "half of each": ([(22, 30), (35, 37)], False),
    }
    for chosen, sent in spans.values():
        encoder = SimpleNamespace(name="x", chooses_tokens=True, chosen_spans=lambda *_, found=chosen: [found])
        monkeypatch.setattr(paired, "load_encoder", lambda _, encoder=encoder: encoder)
        assert answer_is_sent(Path("checkpoint"), "aware", [question], 4).tolist() == [sent], chosen
    encoder.chooses_tokens = False
    with pytest.raises(ValueError, match="chooses no tokens"):
        answer_is_sent(Path("checkpoint"), "aware", [question], 4)


def test_questions_whose_answer_is_not_among_the_tokens_sent_stand_apart(runs, monkeypatch):
    base, _, other = runs
    inside = np.array([True, False, True, False, False, True])
    monkeypatch.setattr(paired, "answer_is_sent", lambda checkpoint, source, questions, m: inside)
    monkeypatch.setattr(paired, "read_config", lambda checkpoint: {"latent_len": 4})
    found = compare([parse_run(str(run), "latentwire") for run in (base, other)], selection=Path("checkpoint"))
    sent, others = found["parts"]
    assert (sent["n"], others["n"]) == (3, 3)
    assert [row["f1"] for row in sent["rows"]] == [pytest.approx(2 / 3), 1]
    first, second = others["rows"]
    assert first["f1"] == pytest.approx(1 / 3) and second["diff"] == pytest.approx(2 / 3)
    assert "Questions of which no whole answer is (n=3):" in comparison_markdown(found)


def test_a_difference_of_nll_is_per_token_and_told_of_each_part(tmp_path, monkeypatch):
    base = evaluation(tmp_path / "base", [0] * 6, nll=[1, 2, 3, 4, 5, 6])
    other = evaluation(tmp_path / "other", [0] * 6, nll=[3, 2, 9, 4, 15, 18])
    monkeypatch.setattr(paired, "answer_is_sent", lambda checkpoint, source, questions, m: np.arange(6) >= 4)
    monkeypatch.setattr(paired, "read_config", lambda checkpoint: {"latent_len": 4})
    found = compare([parse_run(str(run), "latentwire") for run in (base, other)], selection=Path("checkpoint"))
    first, second = found["rows"]
    assert first["nll_per_token"] == 1 and second["nll_per_token"] == pytest.approx(51 / 21)
    assert second["nll_diff"] == pytest.approx(30 / 21)
    low, high = second["nll_diff_ci95"]
    assert 0 <= low < 30 / 21 < high <= 2
    sent, others = (part["rows"][1] for part in found["parts"])
    assert sent["nll_diff_ci95"] == pytest.approx([2, 2]), "each of these tokens costs 2 nats more"
    assert others["nll_diff"] == pytest.approx(8 / 10) and others["nll_per_token"] == pytest.approx(1.8)
    assert "| +2.000 [2.000, 2.000] |" in comparison_markdown(found)


def test_what_is_averaged_or_paired_is_of_one_llm_and_codec_and_of_seeds_in_one_order(tmp_path):
    a, b = ([evaluation(tmp_path / f"{name}{s}", [0] * 6, train_seed=s) for s in range(3)] for name in "ab")
    compared(a, b, b[:2], a[1:], pair_seeds=True)
    compared(a, b[::-1])
    with pytest.raises(ValueError, match=r"pair_seeds=.*\(0, 1, 2\), \(2, 1, 0\).* in one order"):
        compared(a, b[::-1], pair_seeds=True)
    small = evaluation(tmp_path / "small", [0] * 6, codec="int8")
    with pytest.raises(ValueError, match=r"small.* has no row .*'codec': 'fp16'"):
        compared([a[0], small], b)
    results = json.loads((small / "results.json").read_text())
    results["results"][0]["llm_id"] = "offline:another"
    (small / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"llm='llama': is of offline:a-model and offline:another; compare"):
        compared(a[0], small)


def test_where_several_m_are_sent_each_tells_its_own_rows_apart(tmp_path, monkeypatch):
    base, other = (
        evaluation(tmp_path / name, [f1] * 6, others={"latentwire@8": [1] * 6})
        for name, f1 in (("base", 0), ("other", 1))
    )
    monkeypatch.setattr(paired, "read_config", lambda checkpoint: {"settings": {"latent_lens": "4,99"}})
    monkeypatch.setattr(paired, "answer_is_sent", lambda checkpoint, source, questions, m: np.arange(6) < m - 4)
    runs = [parse_run(str(run), "latentwire") for run in (base, other)]
    found = compare(runs, selection=Path("checkpoint"))["parts"]
    assert [(part["part"], part["n"], [(row["m"], row["diff"]) for row in part["rows"]]) for part in found] == [
        ("no whole answer is at M=4", 6, [(4, 0), (4, 1)]),
        ("a whole answer is among the tokens sent at M=8", 4, [(8, 0), (8, 0)]),
        ("no whole answer is at M=8", 2, [(8, 0), (8, 0)]),
    ]


@pytest.mark.parametrize(
    ("change", "match"), [({"split": "train"}, "split differ"), ({"dtype": "bfloat16"}, "dtype differ")]
)
def test_other_questions_are_refused(runs, tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        compared(runs[0], evaluation(tmp_path / "odd", [0] * 6, **change))
    (runs[2] / "manifest.json").write_text(json.dumps({"ids": ["x"]}))
    with pytest.raises(ValueError, match="ids differ"):
        compared(runs[0], runs[2])


def test_what_is_not_there_is_named(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        compared(runs[0], tmp_path / "nowhere")
    with pytest.raises(ValueError, match="condition='pca'"):
        compared(runs[1], f"{runs[0]}:pca")
    lines = (runs[0] / "predictions.jsonl").read_text().splitlines()
    cut = evaluation(tmp_path / "cut", [0] * 6)
    (cut / "predictions.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(ValueError, match=r"lacks the predictions of .*'latentwire'.* for 1 questions"):
        compared(runs[0], cut)
    (runs[0] / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"base holds no config\.json; name the folder of an evaluation"):
        compared(*runs[:2])


def test_the_program_writes_what_it_prints(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", str(runs[0]), str(runs[2]), "--save_dir", str(tmp_path / "out")])
    main()
    assert (tmp_path / "out" / "comparison.md").read_text() in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]) == 2
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_programs_flags_reach_the_comparison(tmp_path, monkeypatch):
    a, b = ([evaluation(tmp_path / f"{name}{s}", [s, 1, 1, 0, 0, 1]) for s in range(2)] for name in "ab")
    monkeypatch.setattr(paired, "answer_is_sent", lambda checkpoint, source, questions, m: np.arange(6) >= 4)
    monkeypatch.setattr(paired, "read_config", lambda checkpoint: {"latent_len": 4})
    flags = ["--pair_seeds", "--margin", "0.9", "--selection", "checkpoint", "--save_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["compare.py", *(",".join(map(str, run)) for run in (a, b)), *flags])
    main()
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (found["pair_seeds"], found["margin"], len(found["parts"])) == (True, 0.9, 2)


def test_a_run_is_called_by_what_tells_it_from_the_others(tmp_path):
    runs = [evaluation(tmp_path / name / "eval", [0] * 6) for name in ("base", "M8", "M64")]
    found = compared(*runs)
    assert [row["name"] for row in found["rows"]] == ["base", "M8", "M64"]
    labels = [label.get_text() for label in comparison(found).axes[0].get_yticklabels()]
    assert labels == ["M64", "M8", "base"], "the first stands on top"
    assert compared(runs[0])["rows"][0]["name"] == str(runs[0])


def test_the_chart_tells_several_m_apart(tmp_path):
    found = compared(*(evaluation(tmp_path / name, [0, 1, 1, 0, 0, 1]) for name in ("one", "two")))

    def dotted(panel):
        return [line for line in panel.lines if line.get_linestyle() == ":"]

    assert len(dotted(comparison(found).axes[0])) == 1, "the first as a line"
    found["rows"] += [row | {"m": 64} for row in found["rows"]]
    (panel,) = comparison(found).axes
    assert [label.get_text().split(", ")[1] for label in panel.get_yticklabels()] == ["M=64"] * 2 + ["M=4"] * 2
    assert not dotted(panel), "each row is paired with the first run's of its M"


@pytest.fixture
def seeds(tmp_path, monkeypatch):
    """Two systems of three seeds each, on questions that are paragraphs of their own; the first also read as text."""
    own = [dataclasses.replace(q, paragraph=q.id) for q in QUESTIONS]
    monkeypatch.setattr(paired, "load", lambda *_: dataclasses.replace(load("sample", "dev"), questions=own))
    text = {"text": [0, 0, 1, 0, 0, 0], "text_tuned": [1, 1, 0, 1, 1, 1]}
    a = [evaluation(tmp_path / f"a{n}", [f1] * 6, others=text) for n, f1 in enumerate((0.1, 0.2, 0.3))]
    return a, [evaluation(tmp_path / f"b{n}", [f1] * 6) for n, f1 in enumerate((0.5, 0.6, 0.7))]


def test_three_seeds_of_each_side_decide(seeds):
    a, b = seeds
    row = compared(a, b)["rows"][1]
    assert row["diff"] == pytest.approx(0.4) and row["diff_over"] == "seeds and questions"
    # All questions are alike. Student's test of 4 degrees of freedom: 2.776 and 2.132 standard errors.
    assert row["diff_ci95"] == pytest.approx([0.173, 0.627], abs=0.01)
    low, high = row["diff_ci90"]  # of six questions, one lost and one won more would change much
    assert low < 0.226 and high > 0.574
    assert row["verdict"] == "higher"
    assert len(row["weights"]) == 3 and row["equivalence"] is None
    assert compared(b, a)["rows"][1]["verdict"] == "lower"


def test_seeds_that_belong_together_are_drawn_together(seeds, tmp_path):
    """Each seed of b is 0.4 above a's of the same place, so all pairs say the same; in another order they do not."""
    a, b = seeds
    row = compared(a, b, pair_seeds=True)["rows"][1]
    assert row["diff_over"] == "seed pairs and questions" and row["diff_ci95"] == pytest.approx([0.4, 0.4])
    row = compared(a, b[::-1], pair_seeds=True)["rows"][1]
    assert row["diff"] == pytest.approx(0.4) and row["diff_ci95"] == pytest.approx([-0.1, 0.9], abs=0.05)
    more = [*b, evaluation(tmp_path / "b3", [0.6] * 6)]
    for other in (more, f"{a[0]}:text"):
        first, second = (compared(a, other, pair_seeds=pair)["rows"][1] for pair in (True, False))
        assert first == second and first["diff_over"] == "seeds and questions", "not as many seeds: no pairs"


@pytest.mark.parametrize(("number", "verdict"), [(1, "one seed, not decided"), (2, "2 seeds, not decided")])
def test_fewer_than_three_seeds_of_a_side_decide_nothing(seeds, number, verdict):
    a, b = seeds
    for runs in ((a, b[:number]), (a[:number], b)):
        found = compared(*runs, margin=0.9)
        row = found["rows"][1]
        assert row["verdict"] == verdict and row["equivalence"] == verdict.replace("decided", "shown")
        assert row["diff_over"] == "questions" and row["diff_ci95"] == pytest.approx([row["diff"]] * 2)
        table = comparison_markdown(found)
        assert f"| questions | [{row['diff']:.3f}, {row['diff']:.3f}] | {verdict} |" in table
        assert "Of fewer than 3 seeds" in table
    assert "Of fewer than 3 seeds" not in comparison_markdown(compared(a, b))


def test_what_is_not_trained_has_no_seeds(seeds):
    a, _ = seeds
    row = compared(a, f"{a[0]}:text")["rows"][1]
    assert row["condition"] == "text" and row["weights"] == [] and row["name"] == "a0: text"
    assert row["diff_over"] == "seeds and questions" and row["verdict"] == "not decided"
    found = compared(f"{a[0]}:text", a[0])
    assert found["condition"] == "text, latentwire" and found["rows"][1]["verdict"] == "one seed, not decided"
    assert "| untrained |" in comparison_markdown(found)
    assert compared(f"{a[0]}:text", f"{a[1]}:text")["rows"][1]["verdict"] == "not decided", (
        "equal, and no seed is asked"
    )
    assert compared(f"{a[0]}:text", f"{a[0]}:text_tuned")["rows"][1]["verdict"] == "one seed, not decided"


def test_the_same_weights_read_in_two_ways_are_one_system(seeds, tmp_path):
    a, _ = seeds
    again = [evaluation(tmp_path / f"int8{n}", [f1 - 0.01] * 6, str(a[n])) for n, f1 in enumerate((0.1, 0.2, 0.3))]
    for runs, over in (
        ((a, again), "seeds and questions"),
        ((a, again[::-1]), "seeds and questions"),
        ((a[0], again[0]), "questions"),
    ):
        row = compared(*runs, margin=0.011)["rows"][1]
        assert row["diff_over"] == f"{over}, same weights" and row["verdict"] == "lower"
        assert row["diff_ci95"] == pytest.approx([-0.01, -0.01])
        assert row["equivalence"] == "not shown", "six questions that all say the same are too few for it"


def test_equivalence_is_asked_with_a_margin(seeds):
    a, b = seeds
    found = compared(a, b, margin=0.7)
    first, row = found["rows"]
    assert found["margin"] == 0.7 and first["equivalence"] is None and row["equivalence"] == "equivalent within 0.7"
    assert f"| equivalent within 0.7 [{row['diff_ci90'][0]:.3f}, " in comparison_markdown(found)
    assert compared(a, b, margin=0.5)["rows"][1]["equivalence"] == "not shown"
    assert "equivalen" not in comparison_markdown(compared(a, b))
    with pytest.raises(ValueError, match=r"margin='0'.*above 0"):
        compared(a, b, margin=0)


def test_articles_are_the_wider_groups(seeds, tmp_path):
    """Of the two articles one has five of the six questions."""
    _, (base, *_) = seeds
    one = evaluation(tmp_path / "one", [1.5] * 5 + [0.5], str(base))
    row = compared(base, one)["rows"][1]
    assert row["diff_ci95_by_article"] == pytest.approx([0, 1]) and row["diff_ci95"][0] > 0
    assert "| by article [95% interval] |" in comparison_markdown(compared(base, one))


def test_one_training_is_not_two_seeds(seeds, tmp_path):
    a, b = seeds
    twin = evaluation(tmp_path / "twin", [0] * 6, str(a[0]))
    with pytest.raises(ValueError, match=r"a0,.*twin.*the same weights twice"):
        compared([a[0], twin], b)


def test_zeros_alone_are_shown_by_the_rule_of_three(tmp_path):
    runs = [evaluation(tmp_path / name, [0] * 6) for name in ("one", "two")]
    found = compared(*runs)
    first = found["rows"][0]
    assert first["f1_ci95"] == [0, 0], "the record keeps what the bootstrap says"
    shown = min(1, 3 / first["paragraphs"])
    assert first["paragraphs"] == len({q.paragraph for q in QUESTIONS}) < 6
    assert comparison_markdown(found).count(f"| 0.000 [0.000, {shown:.3f}] |") == 2
    (panel,) = comparison(found).axes
    assert max(bar.get_segments()[0][1][0] for bar in panel.collections) == pytest.approx(shown)
    chart = rates(found)
    bars = [bar for bar in chart.axes[0].collections if len(bar.get_segments()) == 1]
    assert [bar.get_segments()[0][1][1] for bar in bars] == pytest.approx([shown, shown])
    assert "n=6" in chart.get_suptitle()


def test_the_bytes_of_the_same_weights_are_joined_and_drawn_where_there_are_several(tmp_path):
    scores = {"fp16": [1] * 6, "compact8": [0, 1, 1, 1, 1, 1], "coarse8": [0, 0, 1, 1, 1, 1]}
    runs = [evaluation(tmp_path / codec, f1, "weights", codec=codec) for codec, f1 in scores.items()]
    found = compared(*runs, f"{evaluation(tmp_path / 'text', [0] * 6, others={'text': [0, 0, 0, 1, 1, 1]})}:text")
    write_comparison(found, tmp_path / "one size")
    assert not (tmp_path / "one size" / "bytes.png").exists()
    for row, size in zip(found["rows"], (16402, 110, 58, 870), strict=True):
        row["wire_bytes"] = size
    (panel,) = rates(found).axes
    joined = [line.get_xydata().tolist() for line in panel.lines if line.get_label() == "llama"]
    assert joined == [[[58, pytest.approx(4 / 6)], [110, pytest.approx(5 / 6)], [16402, 1]]], "the text stands alone"
    assert {text.get_text() for text in panel.texts} == {"fp16", "compact8", "coarse8", "text: text"}
    assert [text.get_text() for text in panel.get_legend().texts] == ["llama"]
    write_comparison(found, tmp_path / "sizes")
    assert (tmp_path / "sizes" / "bytes.png").read_bytes().startswith(b"\x89PNG")


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
    monkeypatch.setattr(sys, "argv", ["compare.py", str(whole), "--margin", "0.01"])
    with pytest.raises(ValueError, match=r"margin='0.01'.* name two or more"):
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
    record = json.loads((whole / "results.json").read_text())
    one_m, others = record["results"][0], record["comparisons"]
    record["results"].append(one_m | {"m": 8})
    record["comparisons"] = others + [pair | {"m": 8} for pair in others]
    (whole / "results.json").write_text(json.dumps(record))
    packed.write_bytes(gzip.compress("".join(lines).encode()))
    recompute.__globals__["_lines"].cache_clear()
    again = recompute(whole)
    assert again["comparisons"] == others and again["not_kept"] == ["no predictions were kept: llama latentwire"]
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
