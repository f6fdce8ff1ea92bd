"""A rival from outside answers questions that it gets as token ids; its answers become an evaluation like any other."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluation.evaluations import config as evaluation

from latentwire.evaluation.evaluate import evaluate
from latentwire.evaluation.outside import outside
from latentwire.evaluation.settings import OutsideSettings
from latentwire.studies.paired import compare, recompute
from latentwire.studies.settings import parse_run
from latentwire.utils.files import read_lines

pytestmark = pytest.mark.usefixtures("surroundings")
ROOT = Path(__file__).parents[2]
N = 5


def config(folder, **changes):
    defaults = {"dataset": "sample", "samples": N, "presses": "kv_full", "max_new_tokens": 4, "device": "cpu",
                "dtype": "float32", "save_dir": str(folder)}  # fmt: skip
    return OutsideSettings(**(defaults | changes))


@pytest.fixture
def answered(warm, tmp_path):
    """answered(folder): scripts/baselines/kv_cache.py, which without a press needs no kvpress but its version."""
    program = tmp_path / "answers.py"
    program.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT / 'scripts/baselines')!r}]\n"
        "import kv_cache; kv_cache.versions = lambda: 'a version'; kv_cache.run(kv_cache.main)"
    )
    return lambda folder: subprocess.run(
        [warm["PYTHON"], program, folder], cwd=ROOT, env=os.environ | warm, text=True, capture_output=True
    )


@pytest.fixture
def whole(answered, tmp_path):
    """The folder of a rival that keeps the whole cache."""
    outside(config(tmp_path / "kv", step="ask"))
    done = answered(tmp_path / "kv")
    assert done.returncode == 0, done.stderr
    return tmp_path / "kv"


def test_the_whole_cache_answers_as_the_whole_text_and_is_paired_with_it(whole, tmp_path):
    results = outside(config(whole))
    evaluate(evaluation(tmp_path / "text", source="context", conditions="text", samples=N, max_new_tokens=4))
    kept, text = (
        {(x["llm"], x["id"]): x for x in read_lines(f / "predictions.jsonl")} for f in (whole, tmp_path / "text")
    )
    assert kept.keys() == text.keys() and len(kept) == 2 * N
    for key, line in kept.items():
        same = ("prediction", "f1", "first_token_correct", "answer_tokens", "llm_positions", "text_bytes", "references")
        assert {name: line[name] for name in same} == {name: text[key][name] for name in same}
        assert line["answer_nll"] == pytest.approx(text[key]["answer_nll"], rel=1e-4)
        assert line["wire_bytes"] > 100 * line["llm_positions"], "keys and values of every layer"
    assert results["by"] == ["a version"] and recompute(whole)["results"] == results["results"]
    compared = compare([parse_run(f"{tmp_path / 'text'}:text", ""), parse_run(f"{whole}:kv_full", "")])
    assert [row["diff"] for row in compared["rows"]] == [0.0] * 4


def test_a_press_has_its_m_and_the_entries_that_it_kept(whole):
    path = whole / "answers.jsonl"
    other = {"condition": "kv_random", "entries": 7}
    lines = [{key: value for key, value in line.items() if key != "crc32"} | other for line in read_lines(path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = outside(config(whole, presses="kv_random"))["results"]
    assert {(row["condition"], row["m"], row["llm_positions"]) for row in rows} == {("kv_random", 32, 7)}


def test_what_was_answered_is_not_answered_again_and_a_line_cut_off_is(whole, answered):
    path = whole / "answers.jsonl"
    before = path.read_text().splitlines()
    path.write_text("\n".join(before[:3]) + "\n" + before[3][:20])
    assert answered(whole).returncode == 0
    after = path.read_text().splitlines()
    assert after[:3] == before[:3]

    def told(lines):
        found = [
            {name: value for name, value in json.loads(line).items() if name not in ("seconds", "crc32")}
            for line in lines
        ]
        return sorted(found, key=lambda line: (line["llm"], line["id"]))

    assert told(after) == told(before)


def test_what_is_missing_is_named(whole, answered, tmp_path):
    path = whole / "answers.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(ValueError, match=r"lacks 1 answers of qwen kv_full; run .*/kv_cache_baseline\.sh"):
        outside(config(whole))
    with pytest.raises(ValueError, match="presses='kv_all': choose among kv_full"):
        config(whole, presses="kv_all").check()
    done = answered(tmp_path / "nowhere")
    assert done.returncode == 2 and "nowhere holds no asked.json" in done.stderr


def test_each_head_keeps_the_prompts_head_and_exactly_m_of_the_context():
    found = importlib.util.spec_from_file_location("kv_cache", ROOT / "scripts/baselines/kv_cache.py")
    kv_cache = importlib.util.module_from_spec(found)
    found.loader.exec_module(kv_cache)
    scores = torch.tensor([[[9.0, 0, 1, 5, 2, 3], [0, 0, 7, 1, 8, 2]]])  # two of the head, four of the context
    keys = torch.arange(6.0)[None, None, :, None].expand(1, 2, 6, 3)
    press = kv_cache.keeping(SimpleNamespace(score=lambda *_: scores), head=2, entries=2)
    kept, values = press.compress(None, None, keys, -keys, None, {})
    assert kept[0, :, :, 0].tolist() == [[0, 1, 3, 5], [0, 1, 4, 2]] and torch.equal(values, -kept)
    model = SimpleNamespace(model=SimpleNamespace(layers=[SimpleNamespace(self_attn=SimpleNamespace())]))
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=kept)])
    kv_cache.require_kept(model, cache, 4)
    with pytest.raises(AssertionError, match="8 entries are kept, not 10"):
        kv_cache.require_kept(model, cache, 5)
    layer = SimpleNamespace(keys=keys, values=-keys)
    press = SimpleNamespace(_cache=SimpleNamespace(layers=[layer]), score_val=scores[None])
    kv_cache.uniform(press, head=2, entries=2).compress_post(None)
    assert torch.equal(layer.keys, kept) and torch.equal(layer.values, values)
