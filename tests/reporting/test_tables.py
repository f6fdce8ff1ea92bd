"""Tables and charts say what results.json says."""

import itertools
import json
from pathlib import Path

import pytest

from latentwire.api.documents import table as documents_table
from latentwire.conditions.base import CONDITIONS
from latentwire.evaluation.results import compare, critical_lines, further_lines, row_key
from latentwire.reporting.charts import hierarchy
from latentwire.reporting.labels import colour_of, llms_of, model_name
from latentwire.reporting.readme import documents, included, renew
from latentwire.reporting.tables import (
    headline_markdown,
    markdown,
    speed_markdown,
    summary_markdown,
    table_markdown,
)
from latentwire.service.load import table as load_table

ROOT = Path(__file__).parents[2]
RECORDS = {path.parent: json.loads(path.read_text()) for path in sorted(ROOT.glob("results/**/results.json"))}
EVALUATIONS = [folder for folder, found in RECORDS.items() if "results" in found and "words" not in found]
DOCUMENTS = [folder for folder in RECORDS if "words" in RECORDS[folder]]
OTHERS = [folder for folder in RECORDS if folder not in (*EVALUATIONS, *DOCUMENTS) and (folder / "table.md").is_file()]


def row(condition, f1, m=None, llm="qwen"):
    return {
        "condition": condition, "llm": llm, "llm_id": "offline:some-model", "m": m, "f1": f1, "f1_ci95": [f1 - 0.1, f1],
        "em": f1, "first_token_acc": 0.5, "bits_per_answer_byte": 1.25, "llm_positions": 32.0, "wire_bytes": 100,
        "explained_variance": 0.75 if condition.startswith("pca") else None,
    }  # fmt: skip


ROWS = [
    row("text", 0.6), row("token_budget", 0.2, 32), row("token_budget", 0.5, 64), row("pca", 0.3, 32),
    row("pca_pool", 0.1, 32), row("latentwire", 0.4, 32), row("no_context", 0.0), row("shuffled_z", 0.0, 32),
]  # fmt: skip
PARAGRAPHS = ["a", "b", "c", "d"]
RESULTS = {
    "dataset": "sample", "split": "dev", "n": 4, "seed": 0, "source": "prompt", "codec": "fp16", "dtype": "float32",
    "checkpoint": "untrained", "git": "abc", "results": ROWS,
    "machine": {"gpus": [], "processor": "P", "threads": 2, "torch": "1", "transformers": "2"},
    "comparisons": compare(ROWS, {row_key(r): [r["f1"]] * 4 for r in ROWS}, PARAGRAPHS, 0),
}  # fmt: skip


def test_latentwire_meets_each_rival_once_at_its_own_m():
    pairs = [(c["a"], c["b"], c["m"]) for c in RESULTS["comparisons"] if "critical" not in c]
    assert sorted(pairs) == [
        ("latentwire", "no_context", 32), ("latentwire", "pca", 32), ("latentwire", "pca_pool", 32),
        ("latentwire", "shuffled_z", 32), ("latentwire", "text", 32), ("latentwire", "token_budget", 32),
        ("shuffled_z", "no_context", 32),
    ]  # fmt: skip


def alone(f1):
    """The row of encoder_only, which no LLM has read."""
    nothing = {"first_token_acc": None, "bits_per_answer_byte": None, "llm_positions": 0.0}
    return row("encoder_only", f1, llm=None) | {"llm_id": None} | nothing


def test_latentwire_of_each_llm_meets_the_encoder_alone_and_nobody_elses_rivals():
    rows = [
        row("latentwire", 0.4, 32), row("text", 0.6), alone(0.3),
        row("latentwire", 0.2, 32, llm="llama"), row("text", 0.5, llm="llama"),
    ]  # fmt: skip
    found = compare(rows, {row_key(r): [r["f1"]] * 4 for r in rows}, PARAGRAPHS, 0)
    pairs = {(c["llm"], c["b"]): c["diff"] for c in found if "critical" not in c}
    assert pairs == pytest.approx({
        ("qwen", "text"): -0.2, ("qwen", "encoder_only"): 0.1,
        ("llama", "text"): -0.3, ("llama", "encoder_only"): -0.1,
    })  # fmt: skip
    assert {c["llm"]: c["verdict"] for c in found if c["b"] == "encoder_only"} == {"qwen": "PASS", "llama": "FAIL"}
    assert all(c["a"] == "latentwire" for c in found)


def test_the_encoder_alone_is_in_table_and_charts_without_an_llm():
    results = RESULTS | {"results": [*ROWS, alone(0.3)]}
    table = table_markdown(results)
    assert "| none | encoder_only |  | 0.300 [0.200, 0.300] | 0.300 |  |  | 0 | 100 |" in table
    assert "none: " not in table
    for rows, titles in (([*ROWS, alone(0.3)], ["some-model, dequantised Q4 (qwen)"]), ([alone(0.3)], ["no LLM"])):
        drawn = hierarchy(RESULTS | {"results": rows}, llms_of(rows))
        assert [panel.get_title() for panel in drawn.axes] == titles
        assert "encoder_only" in [label.get_text() for label in drawn.axes[0].get_yticklabels()]


def test_the_critical_tests_take_the_better_pca_and_the_ratio_to_text():
    tests = {c["critical"]: c for c in RESULTS["comparisons"] if "critical" in c}
    assert tests[1]["b"] == "token_budget" and tests[1]["diff"] == pytest.approx(0.2) and tests[1]["verdict"] == "PASS"
    assert tests[2]["b"] == "pca" and tests[2]["diff"] == pytest.approx(0.1)
    assert tests[3]["metric"] == "f1_ratio" and tests[3]["ratio"] == pytest.approx(2 / 3)
    assert tests[3]["verdict"] == "FAIL" and tests[3]["ci95"] == pytest.approx([2 / 3, 2 / 3])
    lines = critical_lines(RESULTS)
    assert len(lines) == 3 and all("positions 32 / 32" in line and "bytes 100 / 100" in line for line in lines)
    with_preamble = [r | {"constant_positions": 16 * (r["condition"] == "latentwire")} for r in ROWS]
    assert all("positions 32 + 16 / 32," in line for line in critical_lines(RESULTS | {"results": with_preamble}))


def test_further_tests_name_the_stronger_rivals_and_leave_the_three_as_they_are():
    rivals = [row("selected_text_tuned", 0.55, 32), row("sentence", 0.3), row("pca_selected", 0.3, 32)]
    rows = [*ROWS, *rivals]
    scores = {row_key(r): [r["f1"]] * 4 for r in rows}
    found = compare(rows, scores, ["p", "p", "q", "q"], 0)
    results = RESULTS | {"results": rows, "comparisons": found}
    assert critical_lines(results) == critical_lines(RESULTS)
    lines = further_lines(results)
    assert [line.split("further test: LatentWire > ")[1].split(":")[0] for line in lines] == [
        "pca_selected", "sentence", "selected_text_tuned",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines] == ["PASS", "PASS", "FAIL"]
    table = table_markdown(results)
    assert all(line in table for line in lines) and "latentwire - sentence" in table
    assert further_lines(RESULTS) == [], "nor do records that were written before"


def test_the_table_holds_every_row_and_what_is_needed_to_believe_it():
    table = table_markdown(RESULTS)
    assert "| some-model (qwen) | token_budget | 64 | 0.500 [0.400, 0.500] |" in table
    lines = [line for line in table.splitlines() if line.startswith(("| qwen", "| some-model"))]
    differences = [line for line in lines if " - " in line]
    assert len(lines) - len(differences) == len(ROWS)
    assert len(differences) == sum("critical" not in c for c in RESULTS["comparisons"]) == 7
    assert "| qwen | latentwire - text | 32 | -0.200 [-0.200, -0.200] |" in differences
    assert "- Explained variance of PCA, qwen: pca 0.750, pca_pool 0.750." in table
    for fact in ("sample dev", "n=4", "seed 0", "untrained", "abc", "P, 2 threads", "dequantised Q4", "no claim"):
        assert fact in table
    assert "no claim" not in table_markdown(RESULTS | {"dataset": "squad"})


def test_the_summary_sets_the_llms_side_by_side_the_best_condition_first():
    rows = [*ROWS, *(r | {"llm": "llama", "f1": r["f1"] / 2} for r in ROWS if r["m"] != 64), alone(0.9)]
    pairs = compare(rows, {row_key(r): [r["f1"]] * 4 for r in rows}, PARAGRAPHS, 0)
    lines = summary_markdown(RESULTS | {"results": rows, "comparisons": pairs}).splitlines()
    assert lines[0].startswith("Data: sample dev, n=4")
    names = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert names[0] == "encoder_only" and names.index("text") < names.index("latentwire") < names.index("pca_pool")
    shown = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in lines if line.startswith("| `")}
    text = shown["`text`", ""]
    assert "| 0.600 [0.500, 0.600] | -0.200 [-0.200, -0.200] | 0.300 [" in text, "a difference, not the ratio"
    assert "-0.100 [-0.100, -0.100] | 32 | 100 |" in text
    assert "| 0.500 [0.400, 0.500] |  |  |  |" in shown["`token_budget`", "64"], "no LatentWire of this M, no llama"
    assert "| 0.900 [0.800, 0.900] | -0.500 [-0.500, -0.500] | 0.900" in shown["`encoder_only`", ""]
    assert sum("LatentWire keeps 0.9" in line for line in lines) == 2


def test_zeros_alone_are_shown_by_the_rule_of_three_and_the_record_is_left():
    zero = row("no_context", 0.0) | {"f1_ci95": [0.0, 0.0]}
    results = RESULTS | {"n": 300, "results": [zero, row("text", 0.5)], "comparisons": []}
    for made in (table_markdown, summary_markdown, headline_markdown):
        assert "| 0.000 [0.000, 0.010] |" in made(results) and "| 0.500 [0.400, 0.500] |" in made(results)
    assert zero["f1_ci95"] == [0.0, 0.0]


def test_the_chart_is_drawn_also_without_intervals(tmp_path):
    rows = [*ROWS, row("text", 0.5, llm="llama") | {"f1_ci95": None}]
    hierarchy(RESULTS | {"results": rows}, llms_of(rows)).savefig(tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_document_shows_the_files_that_its_marks_name(tmp_path):
    document = tmp_path / "README.md"
    block = "<!-- {0}.md: start -->\n{1}<!-- {0}.md: end -->\n"
    for name in "ab":
        (tmp_path / f"{name}.md").write_text(f"new {name} \\1\n")
    document.write_text("before\n" + block.format("a", "old\n") + "between\n" + block.format("b", "") + "after\n")
    assert renew(document) == ["a.md", "b.md"]
    new = [block.format(name, f"new {name} \\1\n") for name in "ab"]
    assert document.read_text() == f"before\n{new[0]}between\n{new[1]}after\n"
    assert included(document.read_text()) == {"a.md": "new a \\1\n", "b.md": "new b \\1\n"}


def test_marks_that_lead_nowhere_are_named(tmp_path):
    document = tmp_path / "README.md"
    document.write_text("<!-- a.md: start -->\n")
    with pytest.raises(ValueError, match=r"marks only the start or the end of a\.md"):
        renew(document)
    document.write_text("<!-- a.md: start -->\n<!-- a.md: end -->\n")
    with pytest.raises(FileNotFoundError, match=r"includes a\.md, which is not there"):
        renew(document)


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_the_documents_show_the_committed_tables(document):
    shown = included(document.read_text(encoding="utf-8"))
    assert shown == {name: (document.parent / name).read_text() for name in shown}
    assert document.name != "README.md" or "results/41_scores/headline.md" in shown


@pytest.mark.parametrize("folder", EVALUATIONS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_the_committed_tables_are_those_of_their_results(folder):
    for name, made in (("table", table_markdown), ("summary", summary_markdown), ("headline", headline_markdown)):
        assert (folder / f"{name}.md").read_text() == made(RECORDS[folder])


@pytest.mark.parametrize("folder", OTHERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_the_committed_tables_of_times_are_those_of_their_records(folder):
    show = load_table if "services" in RECORDS[folder] else speed_markdown
    assert (folder / "table.md").read_text() == show(RECORDS[folder])


@pytest.mark.parametrize("folder", DOCUMENTS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_the_committed_tables_of_long_documents_are_those_of_their_records(folder):
    assert (folder / "table.md").read_text() == documents_table(RECORDS[folder])


def test_the_headline_leaves_out_what_is_no_rival_and_tells_the_bits():
    text = headline_markdown(RESULTS)
    names = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    assert names == {"text", "token_budget", "pca", "latentwire", "no_context"}
    assert "some-model: bits/answer byte" in text and "| 1.25 |" in text
    assert "bits" not in summary_markdown(RESULTS)


def test_a_table_in_markdown():
    assert markdown(("a", "b"), [(1, None)]) == ["| a | b |", "|---|---|", "| 1 | None |"]


@pytest.mark.parametrize(
    ("llm_id", "name"),
    [("offline:smollm2-135m-instruct", "SmolLM2-135M"), ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct"),
     ("/models/mine/", "mine"), ("offline:some-model", "some-model")],
)  # fmt: skip
def test_tables_show_the_models_own_name(llm_id, name):
    assert model_name(llm_id) == name


def luminance(colour):
    """Relative luminance of "#rrggbb" as WCAG 2 defines it: linear light, weighted."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    light = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), light, strict=True))


def test_colours_of_names_can_be_seen_on_white_and_black_and_told_apart():
    for name in (*CONDITIONS, *(f"mine{n}" for n in range(200))):
        found = luminance(colour_of(name))
        assert 1.05 / (found + 0.05) >= 3 and (found + 0.05) / 0.05 >= 3, name
    shown = {name: tuple(int(colour_of(name)[i : i + 2], 16) for i in (1, 3, 5)) for name in CONDITIONS}
    for a, b in itertools.combinations(shown, 2):
        assert sum(abs(x - y) for x, y in zip(shown[a], shown[b], strict=True)) > 25, (a, b)


def test_a_condition_has_its_own_colour_or_one_of_its_name():
    assert colour_of("anything", {"colour": "#123456"}) == "#123456"
    assert colour_of("mine") == colour_of("mine", {"colour": None}) != colour_of("token_budget")
    rows = [row("text", 0.5) | {"colour": "#123456"}, row("mine", 0.4)]
    drawn = hierarchy(RESULTS | {"results": rows}, ["qwen"])
    faces = [bar.get_facecolor() for bar in drawn.axes[0].patches]
    assert len(set(faces)) == 2 and (0x12 / 255, 0x34 / 255, 0x56 / 255, 1.0) in faces


def test_positions_that_are_the_same_for_all_questions_and_other_ways_to_send_a_text_stand_beside():
    rows = [row("latentwire", 0.4, 32) | {"constant_positions": 16}, row("text", 0.6) | {"constant_positions": 0}]
    results = RESULTS | {"results": rows, "comparisons": []}
    text = table_markdown(results | {"bytes_table": [{"way": "text, zlib", "bytes": 471.6, "n": 200}]})
    assert "| 32 + 16 | 100 |" in text and "| 32 | 100 |" in text
    assert "| the same text, mean of 200 questions | bytes |" in text and "| text, zlib | 472 |" in text
    assert "32 + 16" in summary_markdown(results)
