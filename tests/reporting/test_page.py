"""The page says what the files say, needs nothing else, and works in a browser."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from latentwire import report
from latentwire.data.question import QuestionSet
from latentwire.data.scoring import squad_scores
from latentwire.data.squad import load
from latentwire.evaluation.results import compare, row_key
from latentwire.reporting import page, writing
from latentwire.reporting.charts import curve_keys, draw_curves
from latentwire.reporting.page import MOST_QUESTIONS, render
from latentwire.reporting.records import gather

SECTIONS = (
    "signs", "hierarchy", "compression", "training", "embeddings", "latents", "questions", "configuration",
)  # fmt: skip
MACHINE = {"gpus": [], "processor": "P", "threads": 2, "torch": "1", "transformers": "2"}
LLMS = ("llama", "qwen")
CONDITIONS = (("text", None), ("token_budget", 32), ("token_budget", 64), ("latentwire", 32), ("no_context", None))


def write_run(folder, more=None, **files):
    folder.mkdir(parents=True, exist_ok=True)
    record = {"schema": 1, "config": {"dataset": "sample"} | (more or {}), "git": "abc123", "machine": MACHINE}
    (folder / "config.json").write_text(json.dumps(record))
    for name, content in files.items():
        lines = isinstance(content, list)
        text = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in content) if lines else json.dumps(content)
        (folder / f"{name}.{'jsonl' if lines else 'json'}").write_text(text, encoding="utf-8")
    return folder


def rows():
    return [
        {
            "condition": condition, "llm": llm, "llm_id": f"offline:{llm}", "m": m, "f1": 0.1234 + 0.1 * place,
            "f1_ci95": [0.1, 0.7], "em": 0.1, "first_token_acc": 0.3, "bits_per_answer_byte": 1.25,
            "empty_answers": 0.0, "llm_positions": float(m or 180), "wire_bytes": 0 if condition[0] == "n" else 4321,
            "explained_variance": None,
        }
        for llm in LLMS for place, (condition, m) in enumerate(CONDITIONS)
    ]  # fmt: skip


def results(**more):
    found = rows()
    return {
        "dataset": "sample", "split": "dev", "n": 4, "seed": 7, "source": "prompt", "codec": "fp16",
        "dtype": "float32", "checkpoint": "untrained", "git": "abc123", "machine": MACHINE, "results": found,
        "comparisons": compare(found, {row_key(r): [r["f1"]] * 4 for r in found}, ["a", "b", "c", "d"], 0),
    } | more  # fmt: skip


def answer(id_, condition, m, llm, text, f1):
    return {
        "id": id_, "condition": condition, "m": m, "llm": llm, "prediction": text, "references": ["Ref", "Ref"],
        "f1": f1,
    }  # fmt: skip


IDS = [question.id for question in load("sample", "dev").questions[:4]]


def predictions(ids=IDS):
    """The first question's answers agree but for the floor; llama's differ at the second, qwen's at the third, and at
    the fourth only in what is no difference."""
    said = {("llama", 1): "<script>alert(1)</script>", ("qwen", 2): "Cats & dogs", ("llama", 3): "The same!"}
    return [
        answer(id_, condition, m, llm, "noise" if condition == "no_context" else
               said.get((llm, number), "same") if condition == "latentwire" else "same", number / 3)
        for number, id_ in enumerate(ids) for llm in LLMS for condition, m in CONDITIONS
    ]  # fmt: skip


def training_log(stage="joint"):
    held = {"llms": {"llama": {"first_token_acc": 0.1, "ce": 3.5}}} if stage == "joint" else {"encoder_f1": 0.3}
    lines = [{"step": 0, "validation": held | {"score": 0.1}}]
    for step in range(1, 41):
        lines.append(
            {"step": step, "epoch": 1, "loss": 4.0 / step, "span": 1.0, "grad_norms": {"codebook": 10.0 / step}}
        )
        if stage == "joint":
            figures = {"ce": 3.0 / step, "first_token_acc": 0.2, "prefix_rms": 1.1, "kd": 0.5}
            lines[-1]["llms"] = {"llama": figures}
    return lines


def diagnostics():
    histogram = {"edges": [0.1, 0.2, 0.3], "counts": [3, 5], "mean": 0.2, "p5": 0.11, "p50": 0.21, "p95": 0.29}
    kinds = {kind: {"rms_per_token": histogram, "nearest_cosine": histogram, "effective_rank": 12.3, "mean_cosine": 0.4}
             for kind in ("text", "latentwire")}  # fmt: skip
    word = {"word": " Denver", "nearest": {"llama": [" Denver", 0.98], "qwen": ["<b>", -0.2]}}
    return {
        "schema": 1, "dataset": "sample", "split": "dev", "n": 5, "seed": 0, "m": 32, "machine": MACHINE, "git": "abc",
        "llms": {llm: {"llm_id": llm, "vocabulary_rms": 0.15, "embeddings": kinds} for llm in LLMS},
        "latents": [{"id": "x", "question": "Where & when?", "answers": ["Denver"],
                     "predictions": {"llama": "", "qwen": "Rome"}, "words": [word] * 40}],
        "compression": {"text_bytes": 835.4, "zlib_bytes": 400.0, "wire_bytes": {"fp16": 16402.0, "int4": 4178.0},
                        "positions": {"llama": {"text": 183.2, "latentwire": 32.0}},
                        "kv_bytes": {"llama": {"text": 4_200_000.0, "latentwire": 700_000.0}}},
        "interventions": [
            {"llm": llm, "embeddings": kind, "intervention": name, "f1": 0.2, "f1_ci95": ci, "nll_per_token": 2.0,
             "empty_answers": 0.5, "n": 5}
            for llm in LLMS for kind in kinds for name, ci in (("none", [0.1, 0.3]), ("rms_token x1.0", None))
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training whose folder holds a stage, an evaluation and diagnostics."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    write_run(folder, {"stage": "joint", "lr": 5e-4}, metrics=training_log())
    write_run(folder / "stages" / "scores", {"stage": "scores"}, metrics=training_log("scores"))
    write_run(
        folder / "checkpoint_best" / "eval_sample", {"codec": "fp16"}, results=results(), predictions=predictions()
    )
    write_run(folder / "diagnostics", {"ckpt": "c"}, diagnostics=diagnostics(), predictions=[{"id": "an intervention"}])
    best = {"step": 40, "validation": {"score": 0.375}}
    (folder / "checkpoint_best" / "config.json").write_text(json.dumps(best))
    return folder


@pytest.fixture(scope="module")
def html(run):
    return render(gather([run]))


class Page(HTMLParser):
    """What tests ask of a page: ids, headings, addresses, labels of figures, and the text of each section."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.figures, self.text, self.headings = [], [], [], {}, set()
        self._section, self._inside = None, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self._inside = tag
        if "id" in attrs:
            self.ids.append(attrs["id"])
        self.addresses += [attrs[name] for name in ("src", "href", "xlink:href") if name in attrs]
        if tag == "section":
            self._section = attrs["id"]
        if tag == "h2":
            self.headings.add(self._section)
        if tag == "figure":
            self.figures.append((self._section, attrs["role"], attrs["aria-label"]))

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text[self._section] = self.text.get(self._section, "") + data


def rendered(*runs):
    return Page(render(gather(runs)))


def test_every_section_is_there_with_everything(html):
    seen = Page(html)
    assert [id_ for id_ in seen.ids if id_ in SECTIONS] == list(SECTIONS) and seen.headings == set(SECTIONS)
    assert "This makes" not in "".join(seen.text.values())
    counts = {section: sum(where == section for where, _, _ in seen.figures) for section in SECTIONS}
    assert counts == {
        "signs": 0, "hierarchy": 2, "compression": 2, "training": 6, "embeddings": 4, "latents": 0, "questions": 0,
        "configuration": 0,
    }  # fmt: skip
    assert all(role == "img" and len(label) > 20 for _, role, label in seen.figures)
    assert seen.text["training"].index("scores") < seen.text["training"].index("stage joint"), "stages in their order"
    assert re.search(r"seed\s*0", seen.text["configuration"]) and re.search(r"seed\s*7", seen.text["configuration"])
    for fact in ("trained/stages/scores", "step 40, score 0.375", "abc123", "support no claim", "0.0005"):
        assert fact in seen.text["configuration"], fact


def test_stages_stand_in_the_order_in_which_one_began_from_another(tmp_path, monkeypatch):
    """Also where a record has moved; and without a config.json the stages come before the run that they belong to."""
    monkeypatch.setattr(page, "_curves", lambda *_: None)
    run = tmp_path / "run"
    chain = {"scores": "codebook", "adapters": "scores", "also": "adapters"}
    for name, before in chain.items():
        init = f"elsewhere/run/stages/{before}/checkpoint_best"
        write_run(run / "stages" / name, {"stage": name, "init": init}, metrics=training_log("scores"))
    init = "elsewhere/run/stages/also/checkpoint_best"
    write_run(run, {"stage": "joint", "init": init}, metrics=training_log("scores"))
    assert [found["stage"] for found in page.training_section(gather([run]))] == [*chain, "joint"]
    for folder in (run, *(run / "stages" / name for name in chain)):
        (folder / "config.json").unlink()
    assert page.training_section(gather([run]))[-1]["label"] == "run"


ONE = results(results=rows()[3:4], comparisons=[])  # one LLM and condition are drawn faster


@pytest.mark.parametrize(
    ("files", "empty"),
    [
        ({"results": ONE}, {"training", "embeddings", "latents", "questions"}),
        ({"results": ONE, "predictions": predictions()}, {"training", "embeddings", "latents"}),
        ({"metrics": training_log()}, {"hierarchy", "compression", "embeddings", "latents", "questions"}),
        ({"diagnostics": {}}, {"hierarchy", "compression", "training", "embeddings", "latents", "questions"}),
        ({"diagnostics": diagnostics()}, {"hierarchy", "compression", "training", "questions"}),
    ],
)
def test_what_is_not_at_hand_says_which_command_makes_it(tmp_path, files, empty):
    seen = rendered(write_run(tmp_path / "alone", **files))
    assert seen.headings == set(SECTIONS)
    assert {section for section in SECTIONS if "This makes" in seen.text[section]} == empty
    assert "not measured here" in seen.text["signs"]


def test_the_page_needs_nothing_else_and_its_ids_are_unique(html):
    seen = Page(html)
    assert seen.addresses and all(address.startswith("#") for address in seen.addresses)
    assert {address[1:] for address in seen.addresses} <= set(seen.ids)
    assert len(seen.ids) == len(set(seen.ids))
    assert not re.findall(r"@import|<link|url\((?!#)", html)
    assert set(re.findall(r"url\(#(.*?)\)", html)) <= set(seen.ids)
    assert "<?xml" not in html and html.count("<!DOCTYPE") == 1


def test_the_figures_are_those_of_the_results(html):
    seen = Page(html)
    for row in rows():
        assert f"{row['f1']:.3f} [0.100, 0.700]" in seen.text["hierarchy"]
        assert any(f"{row['f1']:.3f}" in label for _, _, label in seen.figures if row["llm"] in label)
    assert "4321" in seen.text["compression"] and "M=32  1. LatentWire > token budget" in seen.text["hierarchy"]
    assert "183" in seen.text["embeddings"] and "16,402" in seen.text["embeddings"]
    for fact in ("Denver", "0.98", "-0.20", "Where & when?", "(empty)"):
        assert fact in seen.text["latents"]


def test_answers_cannot_become_markup(html):
    assert "<script>alert(1)" not in html and "&lt;script&gt;alert(1)" in html
    assert "Cats &amp; dogs" in html and "Cats & dogs" not in html
    assert "<b>" not in html and html.count("<script>") == 1


def test_answers_are_marked_and_differing_ones_known(html):
    seen = re.findall(r"data-differ='(.*?)'", html)
    assert [json.loads(found) for found in seen] == [[], ["llama"], ["qwen"], []]
    table = html[html.index('id="answers"') :]
    assert table.count('<div class="answer right"') == table.count('title="right, F1 1.00">✓<') == 10
    assert table.count('title="wrong, F1 0.00">✗<') == 10 and table.count('title="partly, F1 0.33">≈ 0.33<') == 10


def test_questions_have_their_text_where_the_data_is_at_hand(html, tmp_path, monkeypatch):
    question = load("sample", "dev").questions[0]
    text = Page(html).text["questions"]
    assert question.question in text and question.context in text
    gone = write_run(tmp_path / "gone", results=results(dataset="no/such/data"), predictions=predictions(["an-id"]))
    found = page.questions_section(gather([gone]))
    assert found["rows"][0]["question"] is None and found["rows"][0]["id"] == "an-id"
    assert "no/such/data" in found["notes"][0] and "their ids are shown" in found["notes"][0]
    other = QuestionSet("sample", [], squad_scores, True)
    monkeypatch.setattr(page, "load", lambda dataset, split: other)
    squad = write_run(tmp_path / "squad", results=results(dataset="squad"), predictions=predictions(["an-id"]))
    assert "set SQUAD_DIR" in page.questions_section(gather([squad]))["notes"][0]


def test_questions_held_out_of_train_are_looked_up_there(tmp_path):
    question = load("sample", "held_out").questions[0]
    lines = [answer(question.id, "latentwire", 32, "llama", "x", 1.0)]
    folder = write_run(tmp_path / "held", results=results(split="held_out"), predictions=lines)
    assert page.questions_section(gather([folder]))["rows"][0]["question"] == question.question


def test_the_table_of_questions_is_capped_and_says_so(tmp_path):
    lines = [answer(f"id{n}", "latentwire", 32, "llama", "x", 1.0) for n in range(MOST_QUESTIONS + 3)]
    text = rendered(write_run(tmp_path / "many", results=ONE, predictions=lines)).text["questions"]
    assert f"The first {MOST_QUESTIONS} questions are shown, 3 more are left out" in text
    assert f"id{MOST_QUESTIONS - 1}Ref" in text and f"id{MOST_QUESTIONS}Ref" not in text


def test_two_evaluations_share_tables_and_charts(tmp_path):
    first = write_run(tmp_path / "a", results=results(), predictions=predictions())
    second = write_run(tmp_path / "b", results=results(codec="int4", n=3), predictions=predictions(IDS[1:]))
    parts = gather([first, second])
    assert [part.label for part in parts] == ["a", "b"]
    found = page.questions_section(parts)
    assert len(found["rows"]) == 4 and "b: latentwire  M=32" in found["columns"]
    assert [] in found["rows"][0]["cells"] and [] not in found["rows"][1]["cells"]
    found = page.compression_section(parts)
    assert found["differing"] == ["n"] and len(found["charts"]) == 2
    for chart in found["charts"]:
        assert "latentwire (int4)" in chart.svg and "latentwire (fp16)" in chart.svg
        assert len(chart.table.rows) == 2 * len(CONDITIONS)


def test_an_evaluation_without_any_llm_is_shown(tmp_path):
    row = rows()[0] | {"condition": "encoder_only", "llm": None, "llm_id": None, "first_token_acc": None,
                       "bits_per_answer_byte": None}  # fmt: skip
    lines = [answer(IDS[0], "encoder_only", None, None, "x", 1.0)]
    made = results(results=[row], comparisons=[])
    seen = rendered(write_run(tmp_path / "alone", results=made, predictions=lines))
    assert "encoder_only" in seen.text["hierarchy"] and "encoder_only" in seen.text["questions"]


def test_bad_signs_come_first_and_what_is_not_measured_last(run, html):
    found = page.signs_section(gather([run]))
    *measured, last = [sign["level"] for sign in found]
    assert measured == sorted(measured, key=("bad", "undecided", "good").index) and measured[0] == "bad"
    assert last == "undecided" and found[-1]["title"] == "Shuffled Z against no context"
    assert re.findall(r'<li class="(good|bad|undecided)">', html) == [*measured, last]
    text = Page(html).text["signs"]
    assert "trained/checkpoint_best/eval_sample, llama M=32" in text and "not measured here" in text
    assert "the most frequent answer, “same”, 3 of 4" in text and "trained/stages/scores" in text


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("results.json", "{", r"results\.json: not JSON"),
        ("results.json", "[]", r"results\.json: expected a JSON object, found list"),
        ("results.json", "{}", r"results\.json: lacks dataset"),
        ("results.json", json.dumps(results(results=[{"llm": "qwen"}])), r"results\.json: lacks condition"),
        ("predictions.jsonl", '{"id": 1}\n', r"predictions\.jsonl:1: lacks condition"),
        ("predictions.jsonl", '{"id": \n', r"predictions\.jsonl:1 is damaged"),
        ("metrics.jsonl", "{}\n", r"metrics\.jsonl: lacks step"),
        ("metrics.jsonl", "{\n", r"metrics\.jsonl:1 is damaged"),
        ("diagnostics.json", "3", r"diagnostics\.json: expected a JSON object"),
        ("config.json", "nothing", r"config\.json: not JSON"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, says):
    folder = write_run(tmp_path / "run", results=results(), predictions=predictions(), metrics=training_log())
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        gather([folder])


def test_a_cut_last_line_and_strange_line_ends_are_no_damage(tmp_path):
    lines = [answer(IDS[0], "latentwire", 32, "llama", "one\u2028answer\x85", 1.0)] * 2
    folder = write_run(tmp_path / "run", results=results(), predictions=lines)
    path = folder / "predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    before = path.read_bytes()
    assert [line["prediction"] for line in gather([folder])[0].predictions] == ["one\u2028answer\x85"]
    assert path.read_bytes() == before, "a report changes nothing that was measured"


def test_a_folder_with_nothing_to_show_is_named(tmp_path):
    write_run(tmp_path / "begun", predictions=predictions())
    for folder in (tmp_path / "begun", tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=rf"{folder.name} holds no results\.json, metrics\.jsonl or"):
            gather([folder])


def test_results_of_other_programs_are_no_part(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    before = [part.label for part in gather([copy])]
    write_run(copy / "stages" / "benchmark", results={"schema": 1, "raw": {}})
    assert [part.label for part in gather([copy])] == before


def test_a_part_is_shown_once(run):
    assert [part.label for part in gather([run, run / "diagnostics"])] == [
        "trained", "trained/diagnostics", "trained/stages/scores", "trained/checkpoint_best/eval_sample",
    ]  # fmt: skip


def test_the_command_writes_page_table_and_chart(run, tmp_path, monkeypatch, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    evaluation = copy / "checkpoint_best" / "eval_sample"
    monkeypatch.setattr(writing, "render", lambda parts: f"a page of {len(parts)} parts")
    monkeypatch.setattr(sys, "argv", ["report.py", str(copy)])
    report.main()
    assert f"wrote {copy / 'report.html'}" in capsys.readouterr().out
    assert (copy / "report.html").read_text() == "a page of 4 parts"
    assert "(qwen) | latentwire | 32 | 0.423" in (evaluation / "table.md").read_text()
    assert (evaluation / "hierarchy.png").read_bytes().startswith(b"\x89PNG")
    new = tmp_path / "new" / "page.html"
    monkeypatch.setattr(sys, "argv", ["report.py", str(copy / "diagnostics"), "--html", str(new)])
    report.main()
    assert new.read_text() == "a page of 1 parts" and not (copy / "diagnostics" / "report.html").exists()


OLD = [  # as logs were written before figures of LLMs were kept apart
    {"step": 0, "validation": {"f1_llama": 0.1, "first_token_acc_llama": 0.2, "ce_llama": 1.5, "score": 0.3}},
    *(
        {"step": n, "loss": 3.0 / n, "ce_llama": 2.0, "first_token_acc_llama": 0.1, "grad_norm_score": 1.0}
        for n in (1, 2)
    ),
]


@pytest.mark.parametrize("lines", [training_log(), OLD], ids=["new", "old"])
def test_curves_are_drawn_from_new_logs_and_old_ones(tmp_path, lines):
    write_run(tmp_path, metrics=lines)
    drawn = draw_curves(tmp_path)
    assert sorted(path.name for path in drawn) == ["first_token_accuracy.png", "loss.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    (of_llm,) = (key for key in curve_keys(lines, "first_token_accuracy"))
    assert of_llm.endswith("llama") and len(curve_keys(lines, "gradient_norms")) == 1
    assert {"loss"} < set(curve_keys(lines, "loss")) and not any("score" in key for key in curve_keys(lines, "loss"))


def test_a_chart_without_values_is_not_drawn(tmp_path):
    write_run(tmp_path, metrics=training_log("scores"))  # this stage asks no LLM
    assert [path.name for path in draw_curves(tmp_path)] == ["loss.png"]


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is on PATH")


def opened(address, profile):
    """The document after its scripts ran; no script may have complained."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --allow-file-access-from-files --dump-dom"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Uncaught" in line]
    assert not complaints
    return done.stdout


def hidden(document):
    """Whether each row of the answers is hidden."""
    return ["hidden" in row for row in re.findall(r"<tr data-differ=[^>]*>", document)]


@browser
def test_a_browser_shows_all_and_the_hash_hides_rows_that_agree(html, tmp_path):
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    address = (tmp_path / "report.html").as_uri()
    document = opened(address, tmp_path / "profile")
    assert set(SECTIONS) <= set(Page(document).ids)
    assert hidden(document) == [False] * 4 and "4 of 4 questions" in document
    assert '<form id="filters" hidden' in html and '<form id="filters">' in document, "filters only where they work"
    document = opened(address + "#differ", tmp_path / "profile")
    assert hidden(document) == [True, False, False, True] and "2 of 4 questions" in document


AROUND = """<iframe src="report.html" style="width: 360px; height: 800px; border: 0"></iframe>
<script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, find = (id) => page.getElementById(id);
  const rows = () => [...page.querySelectorAll("#answers tbody tr")].map((row) => row.hidden);
  const widths = (element) => [element.scrollWidth, element.clientWidth];
  const set = (id, name, value) => {
    find(id)[name] = value;
    find("filters").dispatchEvent(new Event("input"));
  };
  const seen = { page: widths(page.documentElement), box: widths(find("answers").parentElement) };
  set("search", "value", " CATS & ");
  seen.search = rows();
  set("search", "value", "");
  set("only-differing", "checked", true);
  set("only-llm", "value", "qwen");
  seen.both = rows();
  seen.llama = [...page.querySelectorAll("#answers [data-llm=llama]")].every((answer) => answer.hidden);
  document.body.append(Object.assign(document.createElement("pre"), { textContent: JSON.stringify(seen) }));
};
</script>"""


@browser
def test_filters_meet_and_a_phone_scrolls_no_page(html, tmp_path):
    """A page around the page works its filters, and measures it at a phone's width."""
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    (tmp_path / "around.html").write_text(AROUND)
    document = opened((tmp_path / "around.html").as_uri(), tmp_path / "profile")
    seen = json.loads(re.search(r"<pre>(.*)</pre>", document)[1])
    assert seen["page"][0] <= seen["page"][1] <= 360, "the page itself does not scroll sideways"
    assert seen["box"][0] > seen["box"][1], "wide tables scroll in their own box"
    assert seen["search"] == [True, True, False, True]
    assert seen["both"] == [True, True, False, True] and seen["llama"]
