"""A long document through one wire, and the serving engine that is not there."""

import json

import pytest

from latentwire import LatentWire
from latentwire.api.documents import document_of, measure
from latentwire.api.engine import compare
from latentwire.api.settings import DocumentSettings, EngineSettings

pytestmark = pytest.mark.usefixtures("surroundings")


def test_a_document_is_made_of_whole_passages_and_always_the_same():
    document, questions = document_of(1000, 1)
    assert 1000 <= len(document.split()) < 1300 and document_of(1000, 1) == (document, questions)
    assert all(q.context in document for q in questions)
    assert len({q.context for q in questions}) == len(questions) == document.count("\n") + 1
    assert len(document_of(1000, 2)[1]) == 2 * len(questions)
    longest, asked = document_of(10**6, 1)
    assert len(longest.split()) > 5000 and {q.context for q in asked} < set(longest.split("\n")), "dev is asked alone"


@pytest.mark.parametrize("source", ["prompt", "context", "aware"])
def test_every_llm_is_asked_on_the_whole_and_on_each_passage(checkpoint_of, tmp_path, source):
    config = DocumentSettings(ckpt=str(checkpoint_of(source)), words=150, save_dir=str(tmp_path))
    results = measure(config)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [(row["llm"], row["from"]) for row in results["results"]] == [
        (llm, name) for llm in ("llama", "qwen") for name in ("document", "passage")
    ]
    whole = results["results"][0]
    assert (whole["blocks"] > 1) == (source == "context") and whole["latents"] == 12 * whole["blocks"]
    some = [line["f1"] for line in lines if (line["llm"], line["from"]) == ("llama", "document")]
    assert len(some) == results["n"] and whole["f1"] == pytest.approx(sum(some) / len(some))
    lw, passage = LatentWire(config.ckpt), results["results"][1]
    _, questions = document_of(config.words, config.each)
    asked = [q.question for q in questions] if source != "context" else None
    wires = lw.encode([q.context for q in questions], asked)
    assert passage["text_tokens"] == pytest.approx(sum(lw.wire(wire).text_tokens for wire in wires) / len(wires))
    assert "| qwen | passage |" in (tmp_path / "table.md").read_text()


def test_without_vllm_its_way_is_told():
    with pytest.raises(ValueError, match=r"vllm is not installed here .*docs/vllm\.md"):
        compare(EngineSettings())
