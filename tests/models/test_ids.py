"""ids and ids_marked choose what hf chooses, and send no more than ids, and ids with a mark."""

import pytest
import torch
from torch import nn

from latentwire.models.backbones import load_backbone
from latentwire.models.encoders.base import ENCODERS
from latentwire.models.encoders.codebook import ClosedFormEncoder
from latentwire.models.encoders.selecting import MARKER_UNIT, SelectingEncoder, best_spans

SOURCES = ("prompt", "aware")


@pytest.fixture
def hf(llms, encoder_folder):
    """An encoder of type hf that seems to have learned something."""
    tokenizer = llms["llama"].tokenizer
    torch.manual_seed(0)
    encoder = SelectingEncoder(tokenizer, 8, len(tokenizer), load_backbone(encoder_folder), "select")
    for head in (encoder.score, encoder.span, encoder.residual):
        nn.init.normal_(head.weight)
    return encoder


def begun(kind, before, encoder_folder=""):
    kind = ENCODERS[kind]
    return kind.begin(before, kind.Settings(encoder_id=encoder_folder), 16)


@pytest.mark.parametrize("source", SOURCES)
def test_the_arms_choose_the_same_tokens_and_send_their_codes(hf, questions, source):
    for kind in ("ids", "ids_marked"):
        arm = begun(kind, hf)
        assert not hasattr(arm, "residual") and arm.reads_answers and arm.chooses_tokens
        for q in questions[:40:13]:
            ids = arm.select([q], source, 16)[0]
            assert ids == hf.select([q], source, 16)[0] and arm.read([q])[0] == hf.read([q])[0]
            (z,) = arm.encode([q], source, 16)
            torch.testing.assert_close(z, arm.codebook.weight[ids], atol=1e-5, rtol=0)
            assert (z - hf.encode([q], source, 16)[0]).abs().max() > 1e-2, "hf sends more than that"


def test_a_mark_lies_on_the_places_inside_the_best_span_alone(hf, questions):
    arm = begun("ids_marked", hf)
    nn.init.normal_(arm.marker)
    seen = set()
    for q in questions[:60:6]:
        (encoded,) = arm.encoded([q], "prompt", 32)
        leading = encoded.places[0, encoded.used[0]].argmax(dim=1)
        first, last, _ = best_spans(encoded.span)
        inside = (leading >= first) & (leading <= last)
        beside = encoded.z[0] - arm.codebook(encoded.tokens.ids[0, leading])
        torch.testing.assert_close(beside, inside[:, None] * arm.marker * MARKER_UNIT, atol=1e-4, rtol=0)
        text = arm.tokenizer.decode(encoded.tokens.ids[0, int(first) : int(last) + 1].tolist())
        assert arm.read([q])[0] in text
        seen |= set(inside.tolist())
    assert seen == {True, False}


def test_the_best_span_is_short_and_forward_and_there_is_none_without_one():
    span = torch.full((3, 50, 2), -torch.inf)
    span[0, 4, 0], span[0, 9, 1], span[0, 2, 1] = 1.0, 1.0, 9.0  # an end before the start is none
    span[1, 3, 0], span[1, 40, 1] = 1.0, 1.0  # too long
    span[2, 7, 0], span[2, 7, 1] = 0.0, 0.0
    first, last, logit = best_spans(span)
    assert (first[0], last[0], logit[0]) == (4, 9, 2.0) and (first[2], last[2], logit[2]) == (7, 7, 0.0)
    assert not logit[1].isfinite()


def test_an_arm_begins_with_the_codebook_or_with_what_hf_has_learned(hf, encoder_folder):
    closed = ClosedFormEncoder.from_codebook(hf.tokenizer, hf.codebook.weight.detach())
    for kind in ("ids", "ids_marked"):
        fresh, taught = begun(kind, closed, encoder_folder), begun(kind, hf)
        assert torch.equal(fresh.codebook.weight, hf.codebook.weight) and not fresh.score.weight.any()
        kept = {name: weight for name, weight in taught.state_dict().items() if name != "marker"}
        before = hf.state_dict()
        assert kept.keys() == {name for name in before if not name.startswith("residual.")}
        assert all(torch.equal(weight, before[name]) for name, weight in kept.items())
    assert not begun("ids_marked", hf).marker.any()
    assert torch.equal(begun("ids_marked", begun("ids", hf)).score.weight, hf.score.weight)
    assert "hf" not in ENCODERS["hf"].begins_from, "hf goes on as it is"
