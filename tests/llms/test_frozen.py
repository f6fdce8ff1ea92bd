"""The frozen LLM: latents in, answers and gradients out, weights untouched."""

import copy

import pytest
import torch
from accelerate import dispatch_model
from conftest import make_tokenizer
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from latentwire.llms.frozen import FrozenLLM
from latentwire.llms.prompts import IGNORE, PromptBuilder

NAMES = ["llama", "qwen"]
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip


def prompts_of(llm, questions, source="prompt"):
    """Head, slots of whole texts (lengths differ), tails and answers of some questions."""
    builder = PromptBuilder(llm.tokenizer, source, "zero_shot")
    ids = [builder.ids(builder.content_text(q.context, q.question)) for q in questions]
    return builder.head, ids, [builder.tail(q.question) for q in questions], [
        builder.answer_ids(q.answers[0]) for q in questions
    ]  # fmt: skip


def reference_answers(llm, head, slots, tails, max_new_tokens):
    """What transformers' own generate says to the same prompts, one at a time, from token ids."""
    answers = []
    for slot, tail in zip(slots, tails, strict=True):
        ids = torch.tensor([[*head, *slot, *tail]])
        out = llm.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens,
            eos_token_id=llm.stop_ids.tolist(), pad_token_id=0,
        )  # fmt: skip
        answers.append(llm.text(out[0, ids.shape[1] :].tolist()))
    return answers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", ["prompt", "context"])
def test_real_embeddings_through_the_latent_path_give_the_text_paths_answers(llms, questions, name, source):
    llm = llms[name]
    some = [questions[i] for i in (0, 7, 30, 61, 120)]
    head, slots, tails, _ = prompts_of(llm, some, source)
    assert len({len(s) for s in slots}) > 1
    ours = llm.generate_with_prefix(head, [llm.embed(s) for s in slots], tails, 12)
    assert ours == reference_answers(llm, head, slots, tails, 12)
    assert any(ours)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_no_answer(llms, questions, name):
    llm = llms[name]
    head, slots, tails, _ = prompts_of(llm, questions[:9:2])
    slots[1] = slots[1][:3]  # a very short row beside long ones
    together = llm.generate_with_prefix(head, [llm.embed(s) for s in slots], tails, 8)
    alone = [llm.generate_with_prefix(head, [llm.embed(s)], [t], 8)[0] for s, t in zip(slots, tails, strict=True)]
    assert together == alone


def test_an_empty_slot_is_a_prompt_too(llms, questions):
    llm = llms["qwen"]
    head, slots, tails, _ = prompts_of(llm, questions[:2], "context")
    slots = [[], slots[1]]
    ours = llm.generate_with_prefix(head, [llm.embed(s) for s in slots], tails, 6)
    assert ours == reference_answers(llm, head, slots, tails, 6)


def test_the_head_is_read_once_and_its_cache_is_not_changed_by_use(llms, questions, monkeypatch):
    llm = llms["llama"]
    head, slots, tails, _ = prompts_of(llm, questions[:2])
    head = (*head, 7)  # one that no other test has cached
    lengths = []
    forward = llm._forward
    monkeypatch.setattr(llm, "_forward", lambda e, *a, **k: lengths.append(e.shape[1]) or forward(e, *a, **k))
    embeds = [llm.embed(s) for s in slots]
    first, second = (llm.generate_with_prefix(head, embeds, tails, 5) for _ in range(2))
    assert first == second
    assert lengths.count(len(head)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_teacher_forcing_equals_the_models_own_loss_whatever_the_padding(llms, questions, name):
    llm = llms[name]
    head, slots, tails, answers = prompts_of(llm, [questions[i] for i in (0, 3, 50)])
    assert len({len(a) for a in answers}) > 1 and len({len(s) for s in slots}) > 1
    loss = llm.loss_with_prefix(head, [llm.embed(s) for s in slots], tails, answers)
    assert loss.mask.sum(dim=1).tolist() == [len(a) for a in answers]
    assert (loss.nll[~loss.mask] == 0).all()
    for row, (slot, tail, answer) in enumerate(zip(slots, tails, answers, strict=True)):
        ids = torch.tensor([[*head, *slot, *tail, *answer]])
        labels = torch.full_like(ids, IGNORE)
        labels[0, -len(answer) :] = torch.tensor(answer)
        expected = llm.model(input_ids=ids, labels=labels).loss * len(answer)
        torch.testing.assert_close(loss.nll[row].sum(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_scoring_after_prefill_agrees_with_teacher_forcing_and_leaves_the_prefill_usable(llms, questions, name):
    llm = llms[name]
    head, slots, tails, answers = prompts_of(llm, [questions[i] for i in (0, 3, 50)])
    embeds = [llm.embed(s) for s in slots]
    prefill = llm.prefill(head, embeds, tails)
    forced = llm.loss_with_prefix(head, embeds, tails, answers).nll.sum(dim=1)
    torch.testing.assert_close(llm.answer_nll(prefill, answers), forced, rtol=1e-4, atol=1e-4)
    assert llm.generate(prefill, 6) == llm.generate_with_prefix(head, embeds, tails, 6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_latents_and_the_weights_stay_bit_identical(llms, questions, name):
    llm = llms[name]
    before = {key: value.clone() for key, value in llm.model.state_dict().items()}
    head, _, tails, answers = prompts_of(llm, questions[:4])
    adapter = nn.Linear(8, llm.width)
    optimizer = torch.optim.SGD([*adapter.parameters(), *llm.model.parameters()], lr=1.0)
    loss = llm.loss_with_prefix(head, list(adapter(torch.randn(4, 5, 8))), tails, answers)
    (loss.nll.sum() / loss.mask.sum()).backward()
    assert adapter.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in llm.model.parameters())
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in llm.model.state_dict().items())


def test_only_the_answers_own_slot_gets_its_gradient(llms, questions):
    llm = llms["llama"]
    head, slots, tails, answers = prompts_of(llm, questions[:3])
    embeds = [llm.embed(s).clone().requires_grad_() for s in slots]
    llm.loss_with_prefix(head, embeds, tails, answers).nll[1].sum().backward()
    assert embeds[1].grad.abs().sum() > 0
    assert all(e.grad is None or not e.grad.any() for e in (embeds[0], embeds[2]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("deep", [False, True])
def test_a_slot_that_several_rows_share_is_read_once_and_gets_all_their_gradients(llms, questions, name, deep):
    llm, generator = llms[name], torch.Generator().manual_seed(0)
    head, ids, tails, answers = prompts_of(llm, questions[:5])
    owner, read, found, said = [0, 1, 0, 0, 1], [], [], []
    own = [llm.embed(ids[n]) for n in (0, 1)]
    changes = [torch.randn(llm.kv_shape[0], 2, len(slot), llm.kv_shape[1], generator=generator) for slot in own]
    hook = llm.model.get_decoder().layers[0].register_forward_hook(lambda *given: read.append(given[2].shape[-2]))
    for copied in (False, True):
        slots = [slot.clone().requires_grad_() for slot in own]
        deltas = [change.clone().requires_grad_() for change in changes]
        rows = [slots[n] + 0 if copied else slots[n] for n in owner]
        added = [deltas[n] for n in owner] if deep else []
        scored = llm.loss_with_prefix(head, rows, tails, answers, added)
        scored.nll.sum().backward()
        gradients = [x.grad for x in (*slots, *(deltas if deep else ()))]
        found.append((scored.nll, *gradients, llm.prefill(head, rows, tails, added).logits))
        said.append(llm.generate_with_prefix(head, rows, tails, 6, added))
    hook.remove()
    for shared, alone in zip(*found, strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4)
    assert said[0] == said[1]
    copies = sum(len(own[n]) for n in owner) - sum(map(len, own))
    training = [length for length in read if length > len(head)]  # the first of each three readings, one of training
    assert training[3] - training[0] == copies > 0


def test_logits_are_computed_only_where_they_are_needed_and_from_contiguous_states(llms, questions):
    llm = llms["qwen"]
    head, slots, tails, answers = prompts_of(llm, questions[:3])
    seen = []
    hook = llm.model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0].shape[:2].numel(), inputs[0].is_contiguous()))
    )
    llm.loss_with_prefix(head, [llm.embed(s) for s in slots], tails, answers)
    llm.prefill(head, [llm.embed(s) for s in slots], tails)
    hook.remove()
    most = len(answers) * max(map(len, answers))
    assert (most, True) in seen and (len(answers), True) in seen
    assert max(places for places, _ in seen) == most
    assert all(contiguous for _, contiguous in seen)


@pytest.mark.parametrize("name", NAMES)
def test_of_answers_in_part_learned_the_labels_alone_are_scored_where_they_stand(llms, questions, name):
    llm = llms[name]
    head, slots, tails, _ = prompts_of(llm, [questions[i] for i in (0, 3, 50)])
    answers, embeds = [list(range(10, 40)), [50], [60, 61, 62]], [llm.embed(s) for s in slots]
    learned = [[place in (0, 1, 29) for place in range(30)], [True], [True, False, True]]
    whole, part = (llm.loss_with_prefix(head, embeds, tails, answers, learned=some) for some in ((), learned))
    assert part.mask.sum(dim=1).tolist() == [3, 1, 2]
    assert part.logits.shape[1] == 4, "places where nobody has a label have no logits"
    for row, (kept, answer) in enumerate(zip(learned, answers, strict=True)):
        assert part.labels[row, part.mask[row]].tolist() == [i for i, k in zip(answer, kept, strict=True) if k]
        expected = whole.nll[row, whole.mask[row]][torch.tensor(kept)]
        torch.testing.assert_close(part.nll[row, part.mask[row]], expected, rtol=1e-4, atol=1e-4)


def test_an_answer_ends_at_a_newline_an_end_of_turn_or_an_end_of_sequence(llms):
    llm = llms["llama"]
    word, newline = llm.tokenizer(" Paris", add_special_tokens=False)["input_ids"], llm.tokenizer("\n")["input_ids"]
    end = llm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert llm.text([*word, *newline, *word]) == "Paris"
    assert llm.text([*word, end, *word]) == "Paris"
    assert {*newline, end} <= set(llm.stop_ids.tolist())
    assert not set(word) & set(llm.stop_ids.tolist())


def test_a_head_is_copied_for_rows_of_any_length_and_never_changed(llms):
    """Also where a row is shorter than the longest by more than the head."""
    config = MistralConfig(**SMALL, vocab_size=len(llms["llama"].tokenizer), sliding_window=6)
    llm = FrozenLLM("mistral", MistralForCausalLM(config), llms["llama"].tokenizer)
    head, slots, tails = (5, 6, 7), [[9], [8] * 4, [11] * 30], [[20], [21, 22], [23]]
    first = llm.prefill(head, [llm.embed(s) for s in slots], tails)
    kept = [layer.keys.clone() for layer in llm._opening(head).cache.layers]
    again = llm.prefill(head, [llm.embed(s) for s in slots], tails)
    assert torch.equal(first.logits, again.logits)
    assert first.mask.sum(dim=1).tolist() == [5, 9, 34] and first.mask.shape == (3, 34)
    assert all(torch.equal(old, layer.keys) for old, layer in zip(kept, llm._opening(head).cache.layers, strict=True))
    assert all(layer.keys.shape[2] == 34 for layer in first.cache.layers), "nothing beyond the window is forgotten"
    for row, (slot, tail) in enumerate(zip(slots, tails, strict=True)):
        expected = llm.model(input_ids=torch.tensor([[*head, *slot, *tail]])).logits[0, -1]
        torch.testing.assert_close(first.logits[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_where_a_head_is_copied_to_each_row_as_on_a_gpu_the_same_comes_out(llms, questions, monkeypatch, name):
    llm, generator, found = llms[name], torch.Generator().manual_seed(0), []
    head, ids, tails, answers = prompts_of(llm, questions[:5:2])
    layers, width = llm.kv_shape
    added = [torch.randn(layers, 2, len(each), width, generator=generator) for each in ids]
    for delta in added:
        delta[:, :, :2] = 0
    for shares in (True, False):
        monkeypatch.setattr(llm, "shares", shares)
        slots = [torch.cat([llm.embed([8, 9]), llm.embed(each[2:])]).requires_grad_() for each in ids]
        llm.loss_with_prefix(head, slots, tails, answers, added).nll.sum().backward()
        prefill = llm.prefill(head, [slot.detach() for slot in slots], tails, added, 2)
        assert bool(prefill.cache.head) == shares
        found.append([prefill.logits, llm.answer_nll(prefill, answers), *(slot.grad for slot in slots)])
        found[-1].append(torch.tensor([len(answer) for answer in llm.generate(prefill, 5)]))
    for shared, copied in zip(*found, strict=True):
        torch.testing.assert_close(copied, shared, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [*NAMES, "mistral"])
def test_what_all_slots_begin_with_is_read_once_with_the_head_and_changes_nothing(llms, questions, monkeypatch, name):
    """As a preamble does; with layers that see the last positions only, too; until it is trained further."""
    llm, generator = llms.get(name, llms["llama"]), torch.Generator().manual_seed(0)
    if name == "mistral":
        config = MistralConfig(**SMALL, vocab_size=len(llm.tokenizer), sliding_window=6)
        llm = FrozenLLM("mistral", MistralForCausalLM(config), llm.tokenizer)
    head, ids, tails, answers = prompts_of(llm, questions[:5:2])
    ids[1] = ids[1][:3]
    (layers, width), read, forward = llm.kv_shape, [], llm._forward
    added = [torch.randn(layers, 2, 4 + len(each), width, generator=generator) for each in ids]
    for delta in added:
        delta[:, :, :4] = 0
    monkeypatch.setattr(llm, "_forward", lambda e, *a, **k: read.append(e.shape[1]) or forward(e, *a, **k))
    for vectors in (llm.embed([8, 9, 8, 7]), llm.embed([5, 6, 7, 8])):
        slots = [torch.cat([vectors, llm.embed(each)]) for each in ids]
        within, kept, again = (llm.prefill(head, slots, tails, added, constant) for constant in (0, 4, 4))
        torch.testing.assert_close(kept.logits, within.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(*(llm.answer_nll(one, answers) for one in (kept, within)), rtol=1e-4, atol=1e-4)
        assert torch.equal(kept.logits, again.logits)
        assert llm.generate(kept, 6) == llm.generate(within, 6)
    assert read.count(len(head) + 4) == 2, "once for each"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("deep", [False, True])
def test_what_all_slots_begin_with_is_read_once_in_training_too_and_learns_the_same(llms, questions, name, deep):
    """As a preamble does; two questions of one text share its slot besides. Of two slots, or of long ones, it does not
    pay."""
    llm, generator, found, read = llms[name], torch.Generator().manual_seed(0), [], []
    head, texts, tails, answers = prompts_of(llm, questions[:4])
    layers, width = llm.kv_shape
    ids = [text[: 10 + number] for number, text in enumerate(texts[:3])]
    changes = [torch.randn(layers, 2, len(each), width, generator=generator) for each in ids]
    kept = [keys.clone() for ((keys, _),) in llm._opening(head).head]
    hook = llm.model.get_decoder().layers[0].register_forward_hook(lambda *given: read.append(given[2].shape[-2]))
    for constant in (0, 16):
        vectors = llm.embed(range(8, 24)).clone().requires_grad_()
        own = [llm.embed(each).clone().requires_grad_() for each in ids]
        deltas = [change.clone().requires_grad_() for change in changes]
        slots = [torch.cat([vectors, each]) for each in own]
        added = [nn.functional.pad(delta, (0, 0, 16, 0)) for delta in deltas]
        rows, plus = [*slots, slots[2]], [*added, added[2]] if deep else []
        scored = llm.loss_with_prefix(head, rows, tails, answers, plus, constant=constant)
        scored.nll.sum().backward()
        found.append((scored.nll, vectors.grad, *(x.grad for x in (*own, *(deltas if deep else ())))))
        llm.loss_with_prefix(head, rows[:2], tails[:2], answers[:2], plus[:2], constant=constant)
        long = [torch.cat([vectors, llm.embed(text * 3)]) for text in texts]
        llm.loss_with_prefix(head, long, tails, answers, constant=constant)
    hook.remove()
    for within, once in zip(*found, strict=True):
        torch.testing.assert_close(once, within, rtol=1e-3, atol=1e-4)
    every, *others, preamble, rest, few, long = read[-7:]
    assert (preamble, rest) == (16, every - 3 * 16), "in each of three slots before, by itself now"
    assert others == [few, long]
    assert all(torch.equal(old, keys) for old, ((keys, _),) in zip(kept, llm._opening(head).head, strict=True))


def test_full_attention_keeps_its_padding_after_the_head(llms):
    """Predictions of before depend on it bit for bit."""
    llm = llms["llama"]
    prefill = llm.prefill((5, 6, 7), [llm.embed([9]), llm.embed([8] * 4)], [[20], [21]])
    assert prefill.mask.tolist() == [[1, 1, 1, 0, 0, 0, 1, 1], [1] * 8]


def test_a_prompt_whose_length_changes_the_rotary_angles_is_refused(llms):
    """The head was read with the angles of a short prompt."""
    tokenizer = llms["llama"].tokenizer
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        **SMALL, vocab_size=len(tokenizer), original_max_position_embeddings=32, rope_parameters=rope, pad_token_id=0
    )
    llm = FrozenLLM("phi", Phi3ForCausalLM(config), tokenizer)
    assert llm.positions == 32 and llms["llama"].positions == 2048
    head, slot = tuple(range(20)), list(range(30, 40))
    expected = llm.model(input_ids=torch.tensor([[*head, *slot, 3, 4]]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(llm.prefill(head, [llm.embed(slot)], [[3, 4]]).logits[0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"phi .*reads 32 positions before .*takes 33"):
        llm.prefill(head, [llm.embed(slot)], [[3, 4, 5]])


@pytest.mark.parametrize("name", NAMES)
def test_an_llm_spread_over_devices_answers_and_teaches_the_same(llms, questions, name):
    """accelerate's hooks on every part, as DEVICE_MAP sets them over several GPUs (here they are one CPU)."""
    whole = llms[name]
    model = copy.deepcopy(whole.model)
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    spread = FrozenLLM(name, dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True), whole.tokenizer)
    assert all(hasattr(spread.model.get_submodule(part), "_hf_hook") for part in parts)
    head, ids, tails, answers = prompts_of(whole, questions[:3])
    (layers, width), found = whole.kv_shape, []
    added = [torch.randn(layers, 2, len(row), width, generator=torch.Generator().manual_seed(0)) for row in ids]
    for llm in (whole, spread):
        slots = [llm.embed(row).clone().requires_grad_() for row in ids]
        loss = llm.loss_with_prefix(head, slots, tails, answers, added).nll.sum()
        loss.backward()
        found.append((loss, [slot.grad for slot in slots], llm.generate_with_prefix(head, slots, tails, 6, added)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][2] == found[1][2]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_the_size_of_embeddings_is_that_of_what_the_model_reads(texts):
    """Gemma multiplies its embeddings by the root of their width."""
    tokenizer = make_tokenizer(700, texts)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, sliding_window=4096, max_position_embeddings=2048,
    )  # fmt: skip
    llm = FrozenLLM("gemma", Gemma3ForCausalLM(config), tokenizer)
    read = llm.embed(range(len(tokenizer))).square().mean().sqrt()
    torch.testing.assert_close(llm.embedding_rms(), read)
    assert llm.embedding_rms() > 6 * llm.embedding.weight.square().mean().sqrt()
