"""The plan on paper: cases that were computed by hand, shapes that are those of the models, and the page as printed."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from latentwire.llms.arithmetic import (
    LLMS,
    MEASURED,
    Prompt,
    Shape,
    answer_flops,
    training_flops,
    two_terms,
)
from latentwire.llms.known import LARGE_SHAPES, is_cached
from latentwire.llms.loading import counted_shape
from latentwire.studies.scale.page import page
from latentwire.studies.scale.records import Records
from latentwire.studies.settings import PlanSettings

ROOT = Path(__file__).parents[2]
SMALL = Shape(layers=2, width=4, inner=8, key_width=2, vocabulary=10)
WEIGHTS = 2 * (2 * 16 + 2 * 8 + 3 * 32)  # of two layers: queries and output, keys and values, three matrices of the MLP


def test_a_small_model_by_hand():
    assert SMALL.body == WEIGHTS == 288
    assert SMALL.parameters == 288 + 2 * 40 and dataclasses.replace(SMALL, tied=True).parameters == 288 + 40
    assert SMALL.kv_bytes == 2 * 2 * 2 * 2  # layers, keys and values, width, bytes
    assert SMALL.forward(3) == 2 * 288 * 3 + 4 * 2 * 4 * 3 * 3
    assert SMALL.forward(3, before=5, logits=1) == 2 * 288 * 3 + 4 * 2 * 4 * 3 * 8 + 2 * 10 * 4


def test_a_question_by_hand():
    prompt = Prompt(head=5, tail=2)
    prefill, decoding = answer_flops(SMALL, prompt, slot=3, tokens=4)
    assert prefill == SMALL.forward(5, 5, 1) and decoding == 4 * SMALL.forward(1, 10, 1)
    found = training_flops({"a": SMALL, "b": SMALL}, prompt, text=9, m=3, k=1, encoder=SMALL)
    assert found["LLMs"] == 2 * 2 * SMALL.forward(6, 5, 2), "forward, and the gradient of the input"
    assert found["encoder"] == 3 * SMALL.forward(11)
    assert found["teacher, once"] == 2 * SMALL.forward(12, 5, 2)


def test_two_terms_go_through_both_points():
    fixed, rate = two_terms((100.0, 2.0), (300.0, 3.0))
    assert (fixed, rate) == (1.5, 200.0)


def test_the_shapes_are_those_of_the_models():
    for model, known in zip(("llama3.1-8b", "qwen2.5-7b"), LARGE_SHAPES.values(), strict=True):
        heads = known["num_key_value_heads"] * known["hidden_size"] // known["num_attention_heads"]
        assert LLMS[model] == Shape(
            known["num_hidden_layers"], known["hidden_size"], known["intermediate_size"], heads, known["vocab_size"]
        )
    assert LLMS["llama3.1-8b"].parameters == pytest.approx(8.03e9, rel=0.001)
    assert LLMS["qwen2.5-7b"].parameters == pytest.approx(7.62e9, rel=0.001)
    for model in MEASURED:
        llm_id = f"offline:{model}-instruct"
        if is_cached(llm_id):  # where its shape is known without a download
            assert LLMS[model].parameters == pytest.approx(counted_shape("x", llm_id).parameters, rel=0.001)


def test_the_page_is_what_the_command_prints():
    shown = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert shown == page(PlanSettings()), "python latentwire/plan.py > docs/scale.md"


def cells(text, first):
    """The cells of the row that begins so."""
    return next(line for line in text.splitlines() if line.startswith(f"| {first} |")).strip("| ").split(" | ")


def test_what_the_page_says_follows_from_its_assumptions():
    base, dearer = page(PlanSettings(documents="1e6")), page(PlanSettings(documents="1e6", gpu_price=5.0, gpus=8))
    hours, dollars = (float(cell) for cell in cells(base, "1,000,000")[1:3])
    assert dollars == pytest.approx(hours * 4 * 2.5, abs=0.06)
    assert float(cells(dearer, "1,000,000")[1]) == pytest.approx(hours / 2, abs=0.006)
    wire = [cells(base, f"{n} tokens of text")[6] for n in ("1,000", "4,000")]
    assert float(wire[1]) == pytest.approx(4 * float(wire[0]), abs=0.03), "bytes of a text grow with it"
    minutes = [float(cells(base, part)[3]) for part in ("LLMs", "encoder", "teacher, once", "all")]
    assert sum(minutes[:3]) == pytest.approx(minutes[3], abs=0.2)


def test_what_cannot_be_planned_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"llms='gpt': choose among llama3\.1-8b"):
        page(PlanSettings(llms="gpt"))
    with pytest.raises(ValueError, match=r"documents='many': list numbers"):
        PlanSettings(documents="many")
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        page(PlanSettings(), Records(tmp_path))


def test_figures_come_from_the_records(tmp_path):
    found = Records()
    record = json.loads((ROOT / "results" / "15_shipped" / "results.json").read_text())
    texts = [row["llm_positions"] for row in record["results"] if row["condition"] == "text"]
    assert found.text_tokens == pytest.approx(sum(texts) / len(texts))
    assert found.kv_bytes == {model: 32 * LLMS[model].kv_bytes for model in MEASURED}
    assert re.search(rf"\| text \| {found.text_tokens:.0f} \|", page(PlanSettings()))
    ratio = found.gpu_prefill["llama3.1-8b", 4000, "text"] / found.gpu_prefill["llama3.1-8b", 4000, "z"]
    assert f"| llama3.1-8b | 4,000 | {ratio:.1f} |" in page(PlanSettings())
