"""What is added to keys and values of every layer: exact, for any batch, trained, kept and read by the product."""

import pytest
import torch
from evaluation.evaluations import config, predictions

from latentwire import LatentWire
from latentwire.conditions.base import Reader, Sender, begin_adapters, readers
from latentwire.data.squad import load
from latentwire.evaluation.asking import Demo
from latentwire.evaluation.evaluate import evaluate
from latentwire.evaluation.settings import DemoSettings
from latentwire.llms.known import LLMSettings
from latentwire.llms.prompts import PromptBuilder
from latentwire.models.adapters import SOFT_VECTORS, DeepAdapter, PreambleAdapter
from latentwire.models.checkpoint import load_checkpoint
from latentwire.models.weights import read_config
from latentwire.utils.machine import on_this_machine

pytestmark = pytest.mark.usefixtures("surroundings")
D_Z, M = 24, 16


@pytest.fixture
def adapter(llms):
    """One whose maps do something."""
    torch.manual_seed(0)
    found = DeepAdapter.from_closed_form(torch.randn(48, D_Z), torch.randn(48))
    begin_adapters(
        {"llama": found}, [Reader(llms["llama"], PromptBuilder(llms["llama"].tokenizer, "context", "plain"))]
    )
    torch.nn.init.normal_(found.up, std=0.3)
    return found


def test_zero_at_the_start_it_is_the_preamble_adapter(llms):
    weight, bias, z = torch.randn(48, D_Z), torch.randn(48), torch.randn(5, D_Z)
    llm = llms["llama"]
    made = [kind.from_closed_form(weight, bias) for kind in (DeepAdapter, PreambleAdapter)]
    for one in made:
        one.begin(llm, range(3, 40))
    assert torch.equal(made[0](z), made[1](z)) and not made[0].deltas(z).any()
    layers, k = llm.kv_shape
    assert made[0].deltas(z).shape == (layers, 2, SOFT_VECTORS + 5, k)


@torch.no_grad()
def test_keys_and_values_change_at_the_latents_alone_by_what_the_map_says(llms, adapter):
    llm, z, head, tail = llms["llama"], torch.randn(4, D_Z), (3, 4, 5), [7, 8]
    slot, delta = adapter(z), adapter.deltas(z)
    plain, deep = (llm.prefill(head, [slot], [tail], given).cache for given in ((), [delta]))
    first = [cache.layers[0].values[0].transpose(0, 1).flatten(1) for cache in (plain, deep)]  # [positions, k]
    change = first[1] - first[0]
    start = SOFT_VECTORS  # the head's keys and values are not among them
    assert len(change) == start + 4 + len(tail)
    assert not change[:start].any() and not change[start + 4 :].any()
    torch.testing.assert_close(change[start : start + 4], delta[0, 1, SOFT_VECTORS:])


@torch.no_grad()
def test_a_batch_of_other_lengths_gives_what_each_gives_alone(llms, adapter):
    llm, head = llms["llama"], (3, 4, 5)
    zs, tails = [torch.randn(n, D_Z) for n in (6, 2, 4)], [[7], [8, 9, 10, 11], [12, 13]]
    slots, deltas = [adapter(z) for z in zs], [adapter.deltas(z) for z in zs]
    deltas[2] = None
    together = llm.prefill(head, slots, tails, deltas).logits
    for n in range(3):
        alone = llm.prefill(head, slots[n : n + 1], tails[n : n + 1], deltas[n : n + 1]).logits[0]
        torch.testing.assert_close(together[n], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], llm.prefill(head, slots[:1], tails[:1]).logits[0], atol=1e-3)
    assert torch.equal(
        llm.prefill(head, slots[:1], tails[:1]).logits, llm.prefill(head, slots[:1], tails[:1], [None]).logits
    )


def test_gradients_reach_the_maps_and_no_weight_of_the_llm(llms, adapter):
    llm, z = llms["llama"], torch.randn(4, D_Z)
    before = llm.weights_sha256()
    scored = llm.loss_with_prefix((3, 4), [adapter(z)], [[7]], [[8, 9]], [adapter.deltas(z)])
    scored.nll.sum().backward()
    assert adapter.up.grad.abs().sum() > 0 and adapter.down.weight.grad.abs().sum() > 0
    assert llm.weights_sha256() == before and all(p.grad is None for p in llm.model.parameters())


def _greedy(reader, wire, prompt, longest):
    """Free continuation by the project's own loop, which knows no stop."""
    z = torch.from_numpy(reader.wire(wire).z)
    with torch.no_grad():
        slots, deltas = [reader.adapter(z)], [reader.adapter.deltas(z)]
        found = reader.llm.prefill(reader.prompts.head, slots, [reader.prompts.plain(prompt)], deltas)
    ids = reader.llm.generate_ids(found, longest)
    return [reader.llm.tokenizer.decode(row, skip_special_tokens=True) for row in ids]


def test_it_trains_is_kept_and_answers_alike_in_evaluation_and_product(short, run_of, tmp_path, variables):
    how = {"adapter_type": "deep", "encoder_type": "codebook", "source": "context", "lr": 0.05}
    first = run_of(short(tmp_path / "codebook", stage="codebook", **how)) / "checkpoint_best"
    last = run_of(short(tmp_path / "adapters", stage="adapters", init=str(first), **how)) / "checkpoint_last"
    made = read_config(last)
    encoder, adapters, _ = load_checkpoint(last, made["llms"])
    assert made["adapters"] == dict.fromkeys(made["llms"], "deep")
    assert all(one.up.abs().sum() > 0 for one in adapters.values())
    question = load("sample", "dev").questions[0]
    lw, sender = LatentWire(last), Sender(encoder, "context", "fp16")
    for reader in readers(on_this_machine(LLMSettings(llms=",".join(made["llms"]), device="cpu")), "context", adapters):
        slot = sender.slot(sender.send([question], M)[0], reader.adapter)
        tail = reader.prompts.tail(question.question)
        expected = reader.llm.generate_with_prefix(reader.prompts.head, [slot.embeds], [tail], 6, [slot.deltas])
        mine = lw.reader(reader.llm.name)
        assert [mine.answer(lw.encode(question.context), question.question, 6)] == expected
        wire = lw.encode(question.context)
        free = mine.generate(wire, question.question, max_new_tokens=4, do_sample=False)
        assert [free] == _greedy(mine, wire, question.question, 4)
        demo = Demo(DemoSettings(ckpt=str(last), llms=reader.llm.name, max_new_tokens=6))
        as_wire = demo.answers(question.context, question.question).split("\n")[1]
        assert f"{M} positions" in as_wire and as_wire.endswith(expected[0] or "(nothing)")
        with pytest.raises(ValueError, match=r"use_cache, prefill_chunk_size=.*False"):
            mine.generate(wire, use_cache=False)
        with pytest.raises(ValueError, match="adapter='deep'"):
            mine.prompt_embeds(lw.encode(question.context), question.question)

    asked = {"ckpt": str(last), "source": "context", "conditions": "latentwire", "samples": 4, "max_new_tokens": 6}
    evaluate(config(tmp_path / "eval", latent_len=None, d_z=None, **asked))
    by_id = {q.id: q for q in load("sample", "dev").questions}
    for line in predictions(tmp_path / "eval"):
        q = by_id[line["id"]]
        assert line["prediction"] == lw.reader(line["llm"]).answer(lw.encode(q.context), q.question, 6)
        assert (line["llm_positions"], line["constant_positions"]) == (M, SOFT_VECTORS)


def test_a_model_whose_layers_have_no_such_maps_is_refused_by_name(llms, monkeypatch):
    layer = llms["qwen"].model.get_decoder().layers[0]
    monkeypatch.delattr(layer.self_attn, "k_proj")
    with pytest.raises(ValueError, match=r"qwen .*k_proj and v_proj"):
        DeepAdapter(D_Z, 64).begin(llms["qwen"], range(20))
