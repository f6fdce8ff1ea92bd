"""The closed form: codes that every LLM can read, without training."""

import copy

import pytest
import torch
from conftest import make_sentencepiece, make_tokenizer

from latentwire.data.squad import load
from latentwire.models.adapters import ResidualAdapter
from latentwire.models.closed_form import (
    FIT_QUESTIONS,
    closed_form,
    fit_texts,
    joint_codebook,
    principal_directions,
    random_codebook,
    report,
    token_counts,
    wire_table,
)
from latentwire.models.encoders.codebook import ClosedFormEncoder


@pytest.fixture(scope="module")
def parts(llms, texts):
    """Wire tables and counts with the first LLM's vocabulary as the wire's."""
    tokenizer = llms["llama"].tokenizer
    return {name: wire_table(llm, tokenizer) for name, llm in llms.items()}, token_counts(tokenizer, texts)


def restored(found, name):
    return ResidualAdapter.from_closed_form(*found.adapters[name])(found.codebook)


def test_shared_tokens_keep_their_embedding_and_others_get_the_mean_of_their_pieces(llms):
    wire, other = llms["qwen"].tokenizer, llms["llama"]
    table = wire_table(other, wire)
    vocabulary = other.tokenizer.get_vocab()
    shared = missing = 0
    for token, i in wire.get_vocab().items():
        if token in vocabulary:
            torch.testing.assert_close(table[i], other.embed([vocabulary[token]])[0])
            shared += 1
        elif "\ufffd" not in wire.decode([i]):
            pieces = other.tokenizer(wire.decode([i]), add_special_tokens=False)["input_ids"]
            torch.testing.assert_close(table[i], other.embed(pieces).mean(dim=0))
            missing += 1
    assert shared > 300 and missing > 50


def test_an_own_vocabulary_passes_through_unchanged(llms):
    llm = llms["llama"]
    torch.testing.assert_close(wire_table(llm, llm.tokenizer), llm.embedding_table()[: len(llm.tokenizer)])


def test_all_directions_together_restore_every_embedding(parts):
    tables, counts = parts
    found = joint_codebook(tables, counts, d_z=48 + 64)
    for name, table in tables.items():
        torch.testing.assert_close(restored(found, name), table, atol=1e-4, rtol=1e-4)


def test_more_directions_explain_more_and_all_of_them_find_every_token(parts):
    tables, counts = parts
    reports = [report(joint_codebook(tables, counts, d), tables, counts) for d in (4, 32, 112)]
    for name in tables:
        variances = [figures[name]["explained_variance"] for figures in reports]
        assert variances == sorted(variances) and variances[0] < 0.9 and variances[-1] > 0.999
        recalls = [figures[name]["nearest_token_recall"] for figures in reports]
        assert recalls[0] < recalls[-1] == 1.0


def test_the_adapters_are_the_weighted_least_squares_maps(parts):
    tables, counts = parts
    found = joint_codebook(tables, counts, d_z=16)
    weights = (counts + 1).sqrt()[:, None]
    codes = torch.cat([found.codebook.double(), torch.ones(len(counts), 1)], dim=1)
    for name, table in tables.items():
        solution = torch.linalg.lstsq(codes * weights, table.double() * weights).solution
        weight, bias = found.adapters[name]
        torch.testing.assert_close(solution[:-1].T.float(), weight, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(solution[-1].float(), bias, atol=1e-3, rtol=1e-3)


def test_frequent_tokens_are_restored_better_than_rare_ones(parts):
    tables, counts = parts
    found = joint_codebook(tables, counts, d_z=24)
    error = (restored(found, "llama") - tables["llama"]).square().mean(dim=1)
    frequent = counts > counts.double().quantile(0.9)
    assert error[frequent].mean() < error[counts == 0].mean()


def test_the_same_input_gives_the_same_codebook(parts):
    tables, counts = parts
    assert torch.equal(joint_codebook(tables, counts, 8).codebook, joint_codebook(tables, counts, 8).codebook)


@pytest.mark.parametrize("d_z", [0, 113])
def test_a_width_that_the_embeddings_cannot_fill_is_refused(parts, d_z):
    with pytest.raises(ValueError, match=rf"d_z={d_z}.*112"):
        joint_codebook(*parts, d_z)


def test_principal_directions_find_a_planted_subspace():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(10, 2, generator=generator)).Q
    rows = torch.randn(500, 2, generator=generator) * torch.tensor([3.0, 1.0]) @ basis.T
    directions, variances = principal_directions(rows - rows.mean(dim=0), torch.full((500, 1), 1 / 500), k=2)
    torch.testing.assert_close(directions @ directions.T, basis @ basis.T, atol=1e-4, rtol=1e-4)
    assert variances[0] > variances[1] > 0.5 and variances[2:].abs().max() < 1e-5


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_read_as_far_as_it_goes(llms, texts):
    llm = llms["llama"]
    short = copy.copy(llm)
    short.embedding_table = lambda: llm.embedding_table()[:-5]
    table = wire_table(short, llm.tokenizer)
    assert table.shape[0] == len(llm.tokenizer) and torch.isfinite(table).all()
    torch.testing.assert_close(table[:-5], llm.embedding_table()[: len(llm.tokenizer) - 5])


def test_codes_have_a_unit_whatever_the_llms(parts):
    tables, counts = parts
    weights = (counts + 1) / (counts + 1).sum()  # as the codebook weights them
    for factor in (1.0, 30.0):
        scaled = {name: factor * table for name, table in tables.items()}
        codes = joint_codebook(scaled, counts, 16).codebook.double()
        assert abs((weights[:, None] * codes.square()).sum() / 16 - 1) < 1e-3


def test_a_random_codebook_has_the_size_of_the_closed_form_and_knows_nothing(parts):
    tables, counts = parts
    closed = joint_codebook(tables, counts, d_z=24)
    drawn = random_codebook(closed, seed=0)
    assert drawn.codebook.shape == closed.codebook.shape
    torch.testing.assert_close(drawn.codebook.square().mean(), closed.codebook.square().mean(), rtol=0.05, atol=0)
    for name, (weight, _) in closed.adapters.items():
        ours, bias = drawn.adapters[name]
        torch.testing.assert_close(ours.square().mean(), weight.square().mean(), rtol=0.1, atol=0)
        assert not bias.any()
    known = report(closed, tables, counts)
    for name, figures in report(drawn, tables, counts).items():
        assert figures["explained_variance"] < 0 < known[name]["explained_variance"]
    again, other = (random_codebook(closed, seed=seed).codebook for seed in (0, 1))
    assert torch.equal(again, drawn.codebook) and not torch.equal(other, drawn.codebook)


def test_the_closed_form_is_an_encoder_and_an_adapter_per_llm_that_fit_each_other(llms, texts, parts, questions):
    encoder, adapters, figures = closed_form(llms, texts, 24)
    found = joint_codebook(*parts, 24)
    assert type(encoder) is ClosedFormEncoder and encoder.tokenizer is llms["llama"].tokenizer and encoder.d_z == 24
    assert torch.equal(encoder.codebook.weight, found.codebook) and figures == report(found, *parts)
    (z,) = encoder.encode(questions[:1], "prompt", 16)
    for name, adapter in adapters.items():
        weight, bias = found.adapters[name]
        assert type(adapter) is ResidualAdapter and (adapter.d_z, adapter.width) == (24, llms[name].width)
        torch.testing.assert_close(adapter(z), z @ weight.T + bias, rtol=1e-4, atol=1e-4)


def test_a_closed_form_with_random_codes_is_drawn_by_its_seed(llms, texts, parts):
    encoder, adapters, _ = closed_form(llms, texts, 24, random_seed=3)
    drawn = random_codebook(joint_codebook(*parts, 24), 3)
    assert torch.equal(encoder.codebook.weight, drawn.codebook)
    weight, _ = drawn.adapters["qwen"]
    torch.testing.assert_close(adapters["qwen"].linear.weight * adapters["qwen"].scale, weight)


def test_an_unknown_kind_of_adapter_is_refused_with_the_known_ones(llms, texts):
    with pytest.raises(ValueError, match=r"adapter_type='magic': unknown; choose one of residual_mlp"):
        closed_form(llms, texts, 8, adapter_type="magic")


def test_what_is_fitted_reads_train_and_each_context_once():
    train = load("sample", "train").questions
    found = fit_texts("sample")
    assert len(train) < FIT_QUESTIONS
    assert sorted(found) == sorted([*{q.context for q in train}, *(q.question for q in train)])
    assert not {q.context for q in load("sample", "dev").questions} & set(found)


def test_a_word_of_a_sentencepiece_wire_keeps_its_space(llms, texts):
    wire, llm = make_sentencepiece(600, texts), llms["llama"]
    table, found = wire_table(llm, wire), 0
    for token, i in wire.get_vocab().items():
        if token.startswith("\u2581") and len(token) > 3:
            pieces = llm.tokenizer(token.replace("\u2581", " "), add_special_tokens=False)["input_ids"]
            torch.testing.assert_close(table[i], llm.embedding_table()[pieces].mean(dim=0))
            found += 1
    assert found > 20


def test_a_vocabulary_may_have_holes(llms, texts):
    wire = make_tokenizer(400, texts)
    wire.add_tokens(["<far away>"])
    holed = copy.deepcopy(wire)
    monkeyed = {token: i + (7 if token == "<far away>" else 0) for token, i in wire.get_vocab().items()}
    holed.get_vocab = lambda: monkeyed
    table = wire_table(llms["llama"], holed)
    assert len(table) == len(wire) + 7 and torch.isfinite(table).all()
    assert len(token_counts(holed, texts[:3])) == len(table)
