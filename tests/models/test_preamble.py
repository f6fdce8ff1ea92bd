"""Learned vectors before the latents: for every question the same, and learned by the same means as a rival's."""

from types import SimpleNamespace

import pytest
import torch

from latentwire.conditions.base import Sender, readers
from latentwire.data.squad import load
from latentwire.llms.known import LLMSettings
from latentwire.models.adapters import SOFT_VECTORS, PreambleAdapter, ResidualAdapter
from latentwire.models.checkpoint import load_checkpoint
from latentwire.models.latentwire import LatentWire
from latentwire.models.weights import read_config
from latentwire.utils.machine import on_this_machine

pytestmark = pytest.mark.usefixtures("surroundings")
M = 16


@pytest.fixture(scope="module")
def run(short, run_of, tmp_path_factory):
    """Codebook and joint stage with a preamble."""
    folder = tmp_path_factory.mktemp("preamble")
    how = {"adapter_type": "preamble", "encoder_type": "codebook", "source": "context"}
    first = run_of(short(folder / "codebook", stage="codebook", **how)) / "checkpoint_best"
    return first, run_of(short(folder / "adapters", stage="adapters", init=str(first), **how)) / "checkpoint_last"


def test_vectors_stand_before_the_latents_whose_own_prefix_is_unchanged():
    torch.manual_seed(0)
    weight, bias, words = torch.randn(48, 24), torch.randn(48), torch.randn(SOFT_VECTORS, 48)
    adapter, z = PreambleAdapter.from_closed_form(weight, bias), torch.randn(2, 5, 24)
    adapter.begin(SimpleNamespace(embed=lambda ids: words[: len(ids)]), range(40))
    found = adapter(z)
    assert found.shape == (2, SOFT_VECTORS + 5, 48)
    assert torch.equal(found[:, SOFT_VECTORS:], ResidualAdapter.from_closed_form(weight, bias)(z))
    assert torch.equal(found[0, :SOFT_VECTORS], words) and torch.equal(adapter(z[0])[:SOFT_VECTORS], words)
    assert [c.rate for c in adapter.components("x")] == ["lr", "soft_prompt_lr"]


def test_it_starts_as_the_instruction_and_is_trained_and_kept(run, variables):
    before, after = run
    ids = read_config(before)["llms"]
    _, first, _ = load_checkpoint(before, ids)
    encoder, last, made = load_checkpoint(after, ids)
    assert made["adapters"] == dict.fromkeys(ids, "preamble")
    for reader in readers(on_this_machine(LLMSettings(llms=",".join(ids), device="cpu")), "context", last):
        name = reader.llm.name
        words = reader.llm.embed(reader.prompts.head[:SOFT_VECTORS])
        assert torch.equal(first[name].preamble * first[name].unit, words)
        assert not torch.equal(first[name].preamble, last[name].preamble)
        question = load("sample", "dev").questions[0]
        sender = Sender(encoder, "context", "fp16")
        slot = sender.slot(sender.send([question], M)[0], last[name])
        assert torch.equal(slot.embeds[:SOFT_VECTORS], last[name].preamble * last[name].unit)
        model = LatentWire(encoder, {name: last[name]}, "context", M)
        (row,) = model([question]).embeds[name]
        torch.testing.assert_close(row, slot.embeds, atol=2e-2, rtol=2e-2)


def test_a_short_text_leaves_its_empty_places_out_and_keeps_the_vectors(run):
    encoder, adapters, _ = load_checkpoint(run[1], read_config(run[1])["llms"])
    question = load("sample", "dev").questions[0]
    tokens = len(encoder.tokenizer(f" {question.context}")["input_ids"])
    model = LatentWire(encoder, adapters, "context", tokens + 7)
    for rows in model([question]).embeds.values():
        assert len(rows[0]) == SOFT_VECTORS + tokens
