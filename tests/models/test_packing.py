"""Many texts at once have bits that the others do not change: packed on a CPU, in batches of few shapes on a GPU."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel

from latentwire.data.squad import load
from latentwire.models.backbones import load_backbone
from latentwire.models.packing import FewShapes, packed_states, packing_error


@pytest.fixture
def backbone(encoder_folder):
    return load_backbone(encoder_folder).eval()


@torch.no_grad()
@pytest.mark.parametrize("source", ["prompt", "context"])
def test_states_of_many_texts_are_those_of_each_alone_bit_by_bit(backbone, source):
    questions = load("sample", "dev").questions[:40]  # more than are packed at once
    questions[::2] = [replace(q, context=q.context[:100]) for q in questions[::2]]  # the others take several windows
    together = backbone.each(questions, source)
    assert backbone._errors == {False: 0}, "packing was tried, and this encoder can be packed"
    lengths = set()
    for question, states in zip(questions, together, strict=True):
        (alone,), padded = backbone.each([question], source), backbone([question], source)
        assert torch.equal(states.hidden, alone.hidden)
        assert torch.equal(states.mask, padded.mask) and (states.spans[0] == padded.spans[0]).all()
        assert torch.allclose(states.hidden, padded.hidden, atol=1e-5)
        assert torch.equal(states.hidden, padded.hidden) or not backbone.fits(question, source)
        lengths.add(backbone.fits(question, source))
    assert lengths == {True, False}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["encoder", "llm"])
def test_on_a_gpu_states_do_not_depend_on_the_other_texts_either(encoder_folder, llm_folders, monkeypatch, kind):
    backbone = load_backbone(encoder_folder if kind == "encoder" else llm_folders["LLAMA_ID"]).eval()
    monkeypatch.setattr(type(backbone), "_on_gpu", True)
    questions = load("sample", "dev").questions[:24]
    questions[::2] = [replace(q, context=q.context[:100]) for q in questions[::2]]
    shapes, full, read = set(), [], backbone._read

    def watched(padded):
        shapes.add(padded["input_ids"].shape)
        full.append(padded["attention_mask"].bool().all(dim=1))
        return read(padded)

    monkeypatch.setattr(backbone, "_read", watched)
    together = backbone.each(questions, "context")
    assert {rows for rows, _ in shapes} == {16} and len(shapes) > 1
    assert all(length % 64 == 0 or length == backbone.window for _, length in shapes)
    assert all(rows.all() or not rows.any() for rows in full), "attention without a mask is another kernel"
    assert kind == "llm" or {bool(rows[0]) for rows in full} == {True, False}
    for question, states in zip(questions, together, strict=True):
        (alone,), padded = backbone.each([question], "context"), backbone([question], "context")
        assert torch.equal(states.hidden, alone.hidden)
        assert states.hidden.shape == padded.hidden.shape and (states.spans[0] == padded.spans[0]).all()
        torch.testing.assert_close(states.hidden, padded.hidden, atol=1e-4, rtol=1e-4)
    assert backbone.each([], "context") == []


@torch.no_grad()
def test_where_rows_of_a_batch_differ_each_text_is_read_alone(backbone, monkeypatch):
    monkeypatch.setattr(type(backbone), "_on_gpu", True)
    question, read, rows = load("sample", "dev").questions[0], backbone._read, []
    question = replace(question, context=question.context[:100])

    def uneven(padded):
        states = read(padded)
        rows.append(len(states))
        return states + torch.arange(len(states))[:, None, None]

    monkeypatch.setattr(backbone, "_read", uneven)
    one, two = backbone.each([question] * 2, "context")
    assert torch.equal(one.hidden, two.hidden) and rows[0] == 16 and set(rows[1:]) == {1}


@torch.no_grad()
def test_how_texts_are_read_on_a_gpu_does_not_depend_on_which_came_first(backbone, monkeypatch):
    monkeypatch.setattr(type(backbone), "_on_gpu", True)
    short, long = (replace(load("sample", "dev").questions[0], context="word " * n) for n in (3, 60))
    read = backbone._read

    def uneven(padded):  # rows differ from a place on that the short text does not reach
        states = read(padded)
        states[:, 40:] += torch.arange(len(states))[:, None, None]
        return states

    monkeypatch.setattr(backbone, "_read", uneven)
    first = backbone.each([short, long], "context")[1]
    del backbone._few_shapes
    again = backbone.each([long, short], "context")[0]
    assert torch.equal(first.hidden, again.hidden)


@torch.no_grad()
def test_long_windows_are_read_fewer_at_once(backbone, monkeypatch):
    sizes = []

    def read(padded):
        sizes.append(tuple(padded["input_ids"].shape))
        return padded["input_ids"][..., None].float()

    few = FewShapes(backbone.tokenizer, 20_000, read, "cpu")
    windows = [{"input_ids": [*range(5, 5 + n)]} for n in (3000, 70, 3000, 12_000, 0)]
    assert [one[:, 0].tolist() for one in few(windows)] == [window["input_ids"] for window in windows]
    assert set(sizes) == {(2, 3008), (16, 128), (1, 12_032), (16, 64)} and sizes.count((1, 12_032)) == 1


@torch.no_grad()
def test_each_text_attends_to_itself_only(backbone):
    ids = torch.arange(5, 60)
    one, two = packed_states(backbone.model, [{"input_ids": ids[:20]}, {"input_ids": ids[20:]}], 0)
    changed, _ = packed_states(backbone.model, [{"input_ids": ids[:20]}, {"input_ids": ids[30:]}], 0)
    assert torch.equal(one, changed) and len(two) == 35
    assert backbone.model.config._attn_implementation == "sdpa", "as it was"


@torch.no_grad()
def test_where_packing_would_change_states_texts_are_read_one_by_one(backbone, encoder_folder, monkeypatch):
    model = AutoModel.from_pretrained(encoder_folder).eval()
    assert packing_error(model, 96, 0) == 0
    model._supports_attention_backend = False
    assert packing_error(model, 96, 0) == math.inf
    questions = load("sample", "dev").questions[:3]
    monkeypatch.setattr("latentwire.models.packing.packing_error", lambda *args: 1e-6)
    states = backbone.each(questions, "prompt")
    assert torch.equal(states[2].hidden, backbone([questions[2]], "prompt").hidden)


@pytest.mark.parametrize("error, packs", [(1e-6, True), (1.0, False), (math.inf, False)])
def test_training_packs_where_full_precision_shows_that_it_is_right_up_to_rounding(backbone, monkeypatch, error, packs):
    rounds = lambda *args: 0.04 if torch.is_autocast_enabled("cpu") else error  # noqa: E731
    monkeypatch.setattr("latentwire.models.packing.packing_error", rounds)
    attends = []
    forward = backbone.model.forward
    backbone.model.forward = lambda **given: (attends.append("packed" in given), forward(**given))[1]
    with torch.autocast("cpu", torch.bfloat16):
        backbone.train()(load("sample", "dev").questions[:2], "context")
        assert attends == [packs]
        backbone.eval().each(load("sample", "dev").questions[:2], "context")
        assert attends == [packs, False, False], "each alone: bfloat16 would change its bits"
