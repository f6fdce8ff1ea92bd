"""The states of a text: every word once, in reading order, whatever the window and the batch."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import BertWordPieceTokenizer
from torch import nn
from transformers import AutoTokenizer, BertTokenizerFast, RobertaConfig, RobertaModel
from transformers.modeling_outputs import BaseModelOutput

from latentwire.data.content import SOURCES, content, reading
from latentwire.models.backbones import ByteBackbone, backbone_of_shape, load_backbone, save_backbone_shape


@pytest.fixture
def backbone(encoder_folder):
    return load_backbone(encoder_folder).eval()


@pytest.fixture(scope="module")
def mixed(questions):
    """A long context of several windows, one that fits, and questions of different lengths."""
    together = " ".join(sorted({q.context for q in questions})[:4])
    long = dataclasses.replace(questions[0], context=together)
    asked = " ".join(q.question for q in questions[:2])
    short = dataclasses.replace(questions[9], context="Seven herons came.", question=asked)
    return [long, short, questions[40]]


def pieces_of(tokenizer, question, source):
    """Ids and spans of the words' pieces in what is read, without any window."""
    text = reading(source, question.context, question.question)
    parts = [(question.context, text.context_at)]
    if source != "context":
        parts.append((question.question, text.question_at))
    ids, spans = [], []
    for part, at in parts:
        encoded = tokenizer(part, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        ids += encoded["input_ids"]
        spans += [(start + at, end + at) for start, end in encoded["offset_mapping"]]
    return ids, spans


class Echo(nn.Module):
    """In place of the encoder: a state tells the piece's id, its position, and its window's length."""

    device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, **_):
        place = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        length = attention_mask.sum(dim=1, keepdim=True).expand_as(input_ids)
        return BaseModelOutput(torch.stack([input_ids, place, length], dim=2).float())


@pytest.mark.parametrize("source", SOURCES)
def test_each_piece_of_question_and_context_has_one_state_in_reading_order(backbone, mixed, source):
    backbone.model = Echo()
    states = backbone(mixed, source)
    assert states.mask.sum(dim=1).tolist() == [len(spans) for spans in states.spans]
    for row, q in enumerate(mixed):
        ids, spans = pieces_of(backbone.tokenizer, q, source)
        assert states.spans[row].tolist() == [list(span) for span in spans]
        assert states.hidden[row, states.mask[row], 0].tolist() == ids
    assert len(states.spans[0]) > 3 * backbone.window


@pytest.mark.parametrize("source", SOURCES)
def test_a_spans_characters_are_those_of_its_piece(backbone, mixed, source):
    q = mixed[2]
    text = reading(source, q.context, q.question).text
    words = [text[a:b].lower() for a, b in backbone([q], source).spans[0]]
    ids, _ = pieces_of(backbone.tokenizer, q, source)
    assert words == [p.removeprefix("##") for p in backbone.tokenizer.convert_ids_to_tokens(ids)]


@pytest.mark.parametrize("source", SOURCES)
def test_a_special_token_that_a_user_spells_is_text_like_any_other(backbone, mixed, source):
    backbone.model = Echo()
    q = dataclasses.replace(mixed[2], context="Herons [SEP] came [CLS] home.", question="Who [SEP] came?")
    states = backbone([q], source)
    ids, spans = pieces_of(backbone.tokenizer, q, source)
    assert states.hidden[0, :, 0].tolist() == ids and states.spans[0].tolist() == [list(span) for span in spans]
    assert not {backbone.tokenizer.sep_token_id, backbone.tokenizer.cls_token_id} & set(ids)


def test_a_piece_in_two_windows_is_read_where_it_sees_most_on_both_sides(backbone, mixed):
    backbone.model = Echo()
    states = backbone(mixed[:1], "context")
    place, length = states.hidden[0, :, 1].numpy(), states.hidden[0, :, 2].numpy()
    margin = np.minimum(place - 1, length - 2 - place)  # the special tokens take a position at each end
    overlap = backbone.window // 4
    assert margin[overlap:-overlap].min() >= overlap // 2 - 1 > 5


def test_states_do_not_depend_on_the_batch(backbone, mixed):
    with torch.no_grad():
        for source in SOURCES:
            together = backbone(mixed, source)
            for row, q in enumerate(mixed):
                alone = backbone([q], source)
                assert np.array_equal(alone.spans[0], together.spans[row])
                torch.testing.assert_close(together.hidden[row, together.mask[row]], alone.hidden[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("source", SOURCES)
def test_in_training_texts_are_packed_and_states_and_gradients_are_those_of_padded_ones(backbone, mixed, source):
    for module in backbone.modules():  # nothing random
        module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
    backbone.train()
    found = []
    for errors in ({}, {False: math.inf}):
        backbone._errors = errors
        states = backbone(mixed, source)
        (states.hidden.square() * states.mask[..., None]).sum().backward()
        found.append((states, {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}))
        backbone.zero_grad()
        assert len(found) > 1 or errors[False] < 1e-6, "packing was tried, and this encoder can be packed"
    (packed, ours), (padded, theirs) = found
    real = padded.mask[..., None]
    assert torch.equal(packed.mask, padded.mask) and backbone.training
    assert all(np.array_equal(a, b) for a, b in zip(packed.spans, padded.spans, strict=True))
    torch.testing.assert_close(packed.hidden * real, padded.hidden * real, rtol=1e-4, atol=1e-4)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-3)


def test_where_the_encoder_reads_the_question_the_context_is_read_with_it(backbone, mixed):
    q = mixed[2]
    other = dataclasses.replace(q, question="Who?")
    with torch.no_grad():
        states = {s: [backbone([x], s).hidden[0, :20] for x in (q, other)] for s in SOURCES}
    assert torch.equal(*states["context"])
    assert (states["prompt"][0] - states["prompt"][1]).abs().max() > 1e-3
    assert all(map(torch.equal, states["aware"], states["prompt"])), "the slot is another, but not what is read"


def test_a_question_may_take_half_the_window_and_no_more(backbone, mixed):
    word = "a "
    assert len(backbone.tokenizer(word * 48, add_special_tokens=False)["input_ids"]) == backbone.window // 2
    widest = dataclasses.replace(mixed[0], question=(word * 48).strip())
    assert len(backbone([widest], "prompt").spans[0]) == len(pieces_of(backbone.tokenizer, widest, "prompt")[1])
    longer = dataclasses.replace(mixed[0], question=(word * 49).strip())
    with pytest.raises(ValueError, match=rf"{longer.id}: 49 word pieces.* 96 at once.*ENCODER_ID"):
        backbone([mixed[2], longer], "prompt")
    assert len(backbone([longer], "context").spans[0])


def test_each_byte_has_a_state_and_stands_for_its_character(questions):
    q = dataclasses.replace(questions[0], context="é€x", question="ü?")
    backbone = ByteBackbone().eval()
    states = backbone([q], "context")  # " é€x"
    assert states.spans[0].tolist() == [[0, 1], *[[1, 2]] * 2, *[[2, 3]] * 3, [3, 4]]
    assert states.hidden.shape == (1, 7, backbone.width)
    text = content("prompt", q.context, q.question).text
    spans = backbone([q], "prompt").spans[0]
    assert [text[a:b] for a, b in spans] == [sign for sign in text for _ in sign.encode()]


def test_bytes_do_not_depend_on_the_batch_but_on_their_order(questions):
    torch.manual_seed(0)
    backbone = ByteBackbone().eval()
    short, turned = (dataclasses.replace(questions[0], context=context) for context in ("naïve ab", "naïve ba"))
    with torch.no_grad():
        together = backbone([questions[30], short], "context")
        alone, other = backbone([short], "context").hidden[0], backbone([turned], "context").hidden[0]
    assert together.mask.sum(dim=1).tolist() == [len(together.spans[0]), len(together.spans[1])]
    torch.testing.assert_close(together.hidden[1, together.mask[1]], alone, atol=1e-5, rtol=0)
    assert (alone[-1] - other[-2]).abs().max() > 1e-2, "the same byte elsewhere has another state"


def test_bytes_too_are_attended_without_dropout_and_trained_with_it():
    for layer in ByteBackbone().layers.layers:
        assert layer.self_attn.dropout == 0 < layer.dropout.p


@pytest.mark.parametrize("encoder_id", ["offline:no-such-encoder", "/no/such/encoder"])
def test_an_encoder_that_is_not_there_is_named_with_the_remedy(monkeypatch, encoder_id):
    monkeypatch.setattr("latentwire.models.backbones.hub_answers", lambda: False)
    with pytest.raises(ValueError, match=rf"{encoder_id}.*ENCODER_ID.*offline:all-minilm"):
        load_backbone(encoder_id)


def test_an_encoder_with_missing_or_cut_weights_is_refused(encoder_folder, tmp_path):
    folder = shutil.copytree(encoder_folder, tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    key = "encoder.layer.1.output.dense.weight"
    save_file({k: v for k, v in weights.items() if k != key}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks the weights \['{key}'\].*ENCODER_ID"):
        load_backbone(str(folder))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cannot load the encoder.*ENCODER_ID"):
        load_backbone(str(folder))


def test_attention_has_no_dropout_but_the_rest_keeps_it_also_after_a_round_trip(backbone, tmp_path):
    save_backbone_shape(backbone, tmp_path)
    for model in (backbone.model, backbone_of_shape(tmp_path).model):
        layer = model.encoder.layer[0]
        assert layer.attention.self.dropout.p == 0 < layer.output.dropout.p


def test_a_shape_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}.*cannot be read"):
        backbone_of_shape(tmp_path)


def test_sentence_vectors_are_left_out(backbone):
    assert not [name for name, _ in backbone.named_parameters() if "pooler" in name]
    assert AutoTokenizer.from_pretrained(backbone.tokenizer.name_or_path).model_max_length == backbone.window == 96


def test_the_roberta_family_reads_no_more_than_its_positions_allow(texts, tmp_path, questions):
    """It counts positions behind padding's, and its tokenizer may state no limit."""
    words = BertWordPieceTokenizer(lowercase=True)
    words.train_from_iterator(texts, vocab_size=600, show_progress=False)
    tokenizer = BertTokenizerFast(tokenizer_object=words._tokenizer)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=98, type_vocab_size=2, pad_token_id=1,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    assert backbone.window == 96
    longest = max(questions, key=lambda q: len(q.context))
    assert len(backbone([longest], "context").spans[0]) > 96
