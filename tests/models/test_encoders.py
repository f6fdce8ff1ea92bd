"""Which tokens get the M places, before and after training, and what the encoder reads by itself."""

import dataclasses
import unicodedata
import weakref

import pytest
import torch
from torch import nn

from latentwire.data.content import SOURCES
from latentwire.data.question import Question
from latentwire.models.backbones import BackboneSettings, ByteBackbone, States, load_backbone
from latentwire.models.encoders.base import ENCODERS, Encoded, Encoder, answer_edges, overlapping
from latentwire.models.encoders.codebook import ClosedFormEncoder
from latentwire.models.encoders.queries import ByteEncoder, QueryEncoder
from latentwire.models.encoders.selecting import SelectingEncoder
from latentwire.models.wire.compact import Compact


@pytest.fixture(scope="module")
def encoder(llms):
    tokenizer = llms["llama"].tokenizer
    torch.manual_seed(0)
    return ClosedFormEncoder(tokenizer, 8, len(tokenizer))


@pytest.mark.parametrize("m", [1, 5, 32, 64])
@pytest.mark.parametrize("source", SOURCES)
def test_at_most_m_codes_are_sent_and_they_are_the_codebooks(encoder, questions, source, m):
    for q, z in zip(questions[:20], encoder.encode(questions[:20], source, m), strict=True):
        ids = encoder.select([q], source, m)[0]
        assert 1 <= len(ids) <= m and z.shape == (len(ids), 8)
        assert torch.equal(z, encoder.codebook.weight[ids])


def test_a_prompts_wire_holds_the_question_and_a_stretch_of_the_context(encoder, questions):
    q = min(questions, key=lambda q: len(q.question))
    text = encoder.tokenizer.decode(encoder.select([q], "prompt", 64)[0])
    label, stretch = text.removesuffix(f"\nQuestion: {q.question}").split(":", 1)
    assert label == "Context" and len(stretch) > 20 and stretch in q.context


def test_a_long_question_leaves_room_for_the_context(encoder, questions):
    long = dataclasses.replace(questions[0], question="Why " * 200 + "?")
    text = encoder.tokenizer.decode(encoder.select([long], "prompt", 32)[0])
    assert text.index("Context:") < text.index("Question:")
    assert len(text[: text.index("\nQuestion:")]) > len("Context:")


def test_a_contexts_wire_does_not_depend_on_the_question(encoder, questions):
    q = questions[0]
    other = dataclasses.replace(q, question="Something else entirely?")
    assert encoder.select([q], "context", 32) == encoder.select([other], "context", 32)
    assert encoder.select([q], "prompt", 32) != encoder.select([other], "prompt", 32)


@pytest.mark.parametrize("m", [16, 32])
def test_the_untrained_oracle_sends_the_codes_around_the_answer(encoder, questions, m):
    for q in questions:
        z, text = encoder.perfect([q], "context", m)[0]
        answer = encoder.tokenizer(q.answers[0], add_special_tokens=False)["input_ids"]
        assert len(z) <= m and text.strip() in q.context
        if len(answer) + 1 < m:
            assert q.answers[0] in text
        ids = torch.cdist(z, encoder.codebook.weight).argmin(dim=1)
        sent = encoder.tokenizer.decode(ids.tolist()).strip("\ufffd ")  # a window may begin within a sign
        assert sent and sent in text


@pytest.mark.parametrize("kind", ["encoder", "selecting"])
def test_an_oracle_beside_a_question_keeps_question_and_answer(request, questions, kind):
    encoder, m = request.getfixturevalue(kind), 48
    short = [q for q in questions if len(encoder.tokenizer(q.question + q.answers[0])["input_ids"]) < 24]
    assert short
    for q in short:
        z, text = encoder.perfect([q], "prompt", m)[0]
        assert len(z) == m and q.answers[0] in text and text.endswith(f"\nQuestion: {q.question}")
        assert text.startswith("Context:")


def test_the_trained_oracle_differs_from_the_wire_in_its_selection_alone(selecting, questions):
    q = questions[0]
    found = selecting.encode([q], "prompt", 48)[0]
    assert not torch.equal(selecting.perfect([q], "prompt", 48)[0][0], found), "an untrained span head knows nothing"
    whole = selecting.tokenize([q], "prompt").ids.shape[1]
    everything = selecting.encode([q], "prompt", whole)[0]
    assert torch.equal(selecting.perfect([q], "prompt", whole)[0][0], everything), (
        "where all is sent, nothing is selected"
    )


@pytest.fixture
def selecting(llms, encoder_folder):
    """A fresh encoder of type hf, d_z 8; it is small enough to make one for each test."""
    tokenizer = llms["llama"].tokenizer
    torch.manual_seed(0)
    return SelectingEncoder(tokenizer, 8, len(tokenizer), load_backbone(encoder_folder), "select")


def trained(encoder, seed=1):
    """The same with random heads, as if it had learned something."""
    torch.manual_seed(seed)
    for head in (encoder.score, encoder.span, encoder.residual):
        nn.init.normal_(head.weight)
    nn.init.normal_(encoder.outside)
    return encoder


class Peaks(nn.Module):
    """In place of the span head: start and end logits [T, 2], whatever the states say."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, hidden):
        return self.logits.expand(len(hidden), -1, -1)


def answer_tokens(encoder, question, source="prompt"):
    """First and last wire token of the first answer, and the number of wire tokens."""
    tokens = encoder.tokenize([question], source)
    begin = tokens.contents[0].context_at + question.starts[0]
    return *overlapping(tokens.spans[0], begin, begin + len(question.answers[0])), tokens.ids.shape[1]


def peak(encoder, question, source="prompt"):
    """Let the span head point at the first answer."""
    first, last, length = answer_tokens(encoder, question, source)
    logits = torch.zeros(length, 2)
    logits[first, 0] = logits[last, 1] = 12
    encoder.span = Peaks(logits)


@pytest.mark.parametrize("m", [4, 24, 2000])
@pytest.mark.parametrize("source", SOURCES)
def test_a_fresh_encoder_sends_the_codes_of_the_chosen_tokens_in_reading_order(selecting, questions, source, m):
    for q in questions[:40:8]:
        (encoded,) = selecting.encoded([q], source, m)
        best = encoded.scores[0].argsort(descending=True, stable=True)[:m].sort().values
        ids = encoded.tokens.ids[0, best]
        (z,) = selecting.encode([q], source, m)
        torch.testing.assert_close(z, selecting.codebook.weight[ids], atol=1e-5, rtol=0)
        assert selecting.select([q], source, m)[0] == ids.tolist() and len(ids) == min(m, encoded.tokens.ids.shape[1])
    if m == 2000:
        assert selecting.tokenizer.decode(ids) == encoded.tokens.contents[0].text


def test_an_aware_wire_holds_a_stretch_of_the_context_that_the_question_chose(encoder, questions):
    for q in questions[:40:8]:
        ids = encoder.select([q], "aware", 24)[0]
        whole = encoder.tokenizer(f" {q.context}")["input_ids"]
        assert len(ids) == min(24, len(whole)) and any(whole[i : i + 24] == ids for i in range(len(whole)))
    q = max(questions, key=lambda q: len(q.context))
    last = q.context.rsplit(". ", 1)[1]
    asked = dataclasses.replace(q, question=last)
    assert encoder.select([asked], "aware", 12) != encoder.select([q], "context", 12), "where the question points"
    assert encoder.select([asked], "context", 12) == encoder.select([q], "context", 12)


@pytest.mark.parametrize("m", [4, 24, 2000])
def test_an_aware_encoder_reads_the_question_and_sends_the_context_alone(selecting, questions, m):
    trained(selecting)
    for q in questions[:40:8]:
        # A number after the space that a slot begins with: that space alone is no token of the context.
        q = dataclasses.replace(q, context=f"7 {q.context}", starts=tuple(at + 2 for at in q.starts))
        (encoded,) = selecting.encoded([q], "aware", m)
        leading = encoded.places[0, encoded.used[0]].argmax(dim=1)
        assert encoded.tokens.context[0, leading].all()
        assert int(encoded.used.sum()) == min(m, int(encoded.tokens.context.sum()))
        other = dataclasses.replace(q, question="Something else entirely?")
        assert not torch.equal(*(selecting.encode([x], "aware", m)[0] for x in (q, other)))


@pytest.mark.parametrize("kind", ["encoder", "selecting"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_characters_of_what_was_chosen_are_those_of_the_sent_tokens(request, questions, kind, source):
    encoder = request.getfixturevalue(kind)
    plain = [q for q in questions if q.context.isascii() and len(q.question) < 60]  # a sign may be several tokens
    for q in plain[:40:8]:
        spans = encoder.chosen_spans([q], source, 64)[0]
        assert spans == sorted(spans) and all(0 <= a <= b <= len(q.context) for a, b in spans)
        said = "".join(q.context[a:b] for a, b in spans).replace(" ", "")
        sent = encoder.tokenizer.decode(encoder.select([q], source, 64)[0]).replace(" ", "")
        if source == "prompt":
            sent = sent.removeprefix("Context:").split("\nQuestion:")[0]
        assert said == sent and said


@pytest.mark.parametrize("kind", ["encoder", "selecting"])
def test_many_questions_get_what_each_gets_alone(request, questions, kind, monkeypatch):
    monkeypatch.setattr("latentwire.models.encoders.base._AT_ONCE", 3)
    encoder, some = request.getfixturevalue(kind), questions[:60:6]

    def same(of_many, of_one):
        assert of_many == [one for q in some for one in of_one([q])] and len(of_many) == len(some)

    same(encoder.select(some, "prompt", 12), lambda q: encoder.select(q, "prompt", 12))
    same(encoder.chosen_spans(some, "prompt", 12), lambda q: encoder.chosen_spans(q, "prompt", 12))
    same([of(12) for of in encoder.choosing(some, "prompt")], lambda q: encoder.chosen_spans(q, "prompt", 12))
    same([text for _, text in encoder.perfect(some, "prompt", 12)], lambda q: [encoder.perfect(q, "prompt", 12)[0][1]])
    if encoder.reads_answers:
        same(encoder.read_at(some), encoder.read_at)
        same(encoder.read(some), encoder.read)


def test_a_text_is_read_once_for_several_m(selecting, questions, monkeypatch):
    each, read = selecting.backbone.each, []
    monkeypatch.setattr(selecting.backbone, "each", lambda *asked: read.append(asked) or each(*asked))
    chosen = selecting.choosing([questions[0]], "prompt")[0]
    found = [chosen(m) for m in (8, 24)]
    assert len(read) == 1 and found[0] != found[1]
    assert found == [selecting.chosen_spans([questions[0]], "prompt", m)[0] for m in (8, 24)]


def test_the_residual_changes_codes_but_no_choice(selecting, questions):
    nn.init.normal_(selecting.outside)  # white space has no word piece either
    before, chosen = selecting.encode(questions[:1], "context", 9)[0], selecting.select(questions[:1], "context", 9)
    nn.init.normal_(selecting.residual.weight)
    assert (selecting.encode(questions[:1], "context", 9)[0] - before).abs().max(dim=1).values.gt(0.1).all()
    assert selecting.select(questions[:1], "context", 9) == chosen


def test_what_is_chosen_are_pieces_of_the_content_and_their_codes_blend_in_cif(selecting, questions):
    trained(selecting)
    nn.init.zeros_(selecting.residual.weight)
    rest = iter(selecting.tokenize(questions[:1], "prompt").ids[0].tolist())
    chosen = selecting.select([questions[0]], "prompt", 24)[0]
    assert len(chosen) == 24 and all(token in rest for token in chosen), "a subsequence of the content"
    selecting.pooling = "cif"
    (encoded,) = selecting.encoded(questions[:1], "prompt", 24)
    leading = encoded.places[0].argmax(dim=1)
    chosen = selecting.select([questions[0]], "prompt", 24)[0]
    assert chosen == encoded.tokens.ids[0, leading].tolist() and leading.diff().ge(0).all()
    (z,) = selecting.encode(questions[:1], "prompt", 24)
    assert z.shape == (24, 8) and (z - selecting.codebook.weight[chosen]).abs().max() > 1e-3


def test_before_training_the_question_and_what_stands_near_a_likely_answer_are_chosen(selecting, questions):
    for q in questions[:60:6]:
        peak(selecting, q)
        first, last, _ = answer_tokens(selecting, q)
        (encoded,) = selecting.encoded([q], "prompt", 1)
        others = int((~encoded.tokens.context).sum())
        m = max(others + last + 1 - first + 8, 4 * others // 3 + 1)  # the question's share is three quarters
        (encoded,) = selecting.encoded([q], "prompt", m)
        chosen = encoded.places[0].argmax(dim=1).tolist()
        assert set(torch.nonzero(~encoded.tokens.context[0])[:, 0].tolist()) <= set(chosen)
        assert {first, last} <= set(chosen)
        near = [i for i in chosen if encoded.tokens.context[0, i]]
        assert min(near) >= first - 8 and max(near) <= last + 8
        assert torch.isfinite(encoded.scores).all()


@pytest.mark.parametrize("m", [4, 16, 32])
def test_a_long_question_leaves_a_quarter_of_the_places_to_the_answers_surroundings(selecting, questions, m):
    q = dataclasses.replace(questions[0], question="why " * 40 + "?")
    peak(selecting, q)
    (encoded,) = selecting.encoded([q], "prompt", m)
    assert int((~encoded.tokens.context).sum()) > m
    chosen = encoded.places[0].argmax(dim=1)
    of_context = chosen[encoded.tokens.context[0, chosen]].tolist()
    assert len(of_context) == m // 4
    first, last, _ = answer_tokens(selecting, q)
    assert all(first - 8 <= place <= last + 8 for place in of_context)


def test_relevance_falls_off_evenly_on_both_sides_of_a_likely_answer(selecting, questions):
    tokens = selecting.tokenize(questions[:1], "prompt")
    middle = int(tokens.context[0].nonzero()[:, 0].median())
    logits = torch.zeros(tokens.ids.shape[1], 2)
    logits[middle] = 60
    selecting.span = Peaks(logits)
    (encoded,) = selecting.encoded(questions[:1], "prompt", 200)
    away = (torch.arange(len(logits)) - middle).abs()
    expected = torch.where(tokens.context[0], ((1 - away / 9).clamp(min=0) + 1e-6).log(), 1.0)
    torch.testing.assert_close(encoded.scores[0], expected, atol=1e-3, rtol=0)
    assert away[tokens.context[0]].max() > 9


def test_relevance_is_the_same_in_bfloat16(selecting, questions):
    tokens = selecting.tokenize(questions[:40:9], "prompt")
    span = torch.randn(*tokens.ids.shape, 2).masked_fill(~tokens.context[..., None], -torch.inf)
    found = selecting._relevance(span, tokens, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selecting._relevance(span, tokens, 16), found)


def test_each_wire_token_has_the_mean_state_of_the_pieces_that_it_overlaps(selecting, questions):
    nn.init.constant_(selecting.outside, -7.0)
    real, found, states = selecting.backbone, [], []

    class Numbered(nn.Module):
        """States that tell the number of their piece."""

        def forward(self, batch, source):
            states.append(real(batch, source))
            number = torch.arange(states[0].hidden.shape[1]).float()[None, :, None]
            return States(number.expand_as(states[0].hidden).contiguous(), states[0].mask, states[0].spans)

    selecting.backbone = Numbered()
    selecting.score.register_forward_hook(lambda module, inputs, output: found.append(inputs[0]))
    batch = [questions[0], questions[70]]
    with torch.no_grad():
        tokens = selecting(batch, "prompt", 4).tokens
    for row, q in enumerate(batch):
        pieces, text = states[0].spans[row].tolist(), tokens.contents[row].text
        for (begin, end), state in zip(tokens.spans[row].tolist(), found[0][row, :, 0].tolist(), strict=False):
            over = [i for i, (a, b) in enumerate(pieces) if a < end and b > begin]
            assert state == ((over[0] + over[-1]) / 2 if over else -7), text[begin:end]
            label = end <= len("Context:") or len(f"Context: {q.context}") <= begin < len(text) - len(q.question) - 1
            assert (state == -7) == (label or not text[begin:end].strip())
        assert (found[0][row, len(tokens.spans[row]) :] == -7).all()


def test_of_the_wire_tokens_those_that_share_a_character_with_the_context_belong_to_it(selecting, questions):
    for source in SOURCES:
        tokens = selecting.tokenize([questions[0], questions[70]], source)
        for row, q in enumerate((questions[0], questions[70])):
            of_context = tokens.ids[row, tokens.context[row]]
            assert selecting.tokenizer.decode(of_context).strip() == q.context
            assert not (tokens.context[row] & ~tokens.mask[row]).any()


def test_a_trained_contexts_wire_does_not_depend_on_the_question(selecting, questions):
    trained(selecting)
    pair = [questions[0], dataclasses.replace(questions[0], question="Something else entirely?")]
    first, second = selecting.encode(pair, "context", 16)
    assert torch.equal(first, second)
    first, second = selecting.encode(pair, "prompt", 16)
    assert not torch.equal(first, second)


def test_z_depends_on_no_batch_and_no_dropout_and_the_mode_stays(selecting, questions):
    trained(selecting)
    for mode in (True, False):
        selecting.train(mode)
        together = selecting.encode(questions[:40:9], "prompt", 16)
        assert {module.training for module in selecting.modules()} == {mode}
        for q, z in zip(questions[:40:9], together, strict=True):
            assert torch.equal(selecting.encode([q], "prompt", 16)[0], z) and not z.requires_grad


@pytest.mark.parametrize("kind", ["encoder", "selecting"])
def test_each_question_may_have_an_m_of_its_own(request, questions, kind, monkeypatch):
    monkeypatch.setattr("latentwire.models.encoders.base._AT_ONCE", 3)
    encoder, some = request.getfixturevalue(kind), questions[:40:5]
    sizes = [16, 3, 40, 1, 7, 7, 2000, 12]
    for q, m, z in zip(some, sizes, encoder.encode(some, "prompt", sizes), strict=True):
        assert torch.equal(z, encoder.encode([q], "prompt", m)[0])
        assert len(z) == m or m == 2000


def test_encoding_keeps_nothing_of_a_question_but_its_z(selecting, questions, monkeypatch):
    forward, made, kept = SelectingEncoder.forward, [], []

    def noted(self, *given, **more):
        kept.append(sum(one() is not None for one in made))
        found = forward(self, *given, **more)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(SelectingEncoder, "forward", noted)
    assert len(selecting.encode(questions[:40:5], "prompt", 8)) == len(kept) == 8
    assert max(kept) == 1, "the one before, until its place is taken"


def test_a_batch_trains_on_the_z_that_is_sent(selecting, questions):
    trained(selecting).eval()
    some = questions[:40:9]
    with torch.no_grad():
        batch = selecting(some, "prompt", 16)
    for row, z in enumerate(selecting.encode(some, "prompt", 16)):
        torch.testing.assert_close(batch.z[row, batch.used[row]], z, atol=1e-4, rtol=1e-4)


def test_the_encoder_reads_the_likeliest_span_of_the_context(selecting, questions):
    for q in questions[:60:6]:
        peak(selecting, q)
        selecting.span.logits[-3:] = 50.0  # the question cannot be the answer
        read = selecting.read([q])[0]
        assert q.answers[0] in read and read in q.context and len(read) < len(q.answers[0]) + 20


def test_the_encoder_reads_some_forward_span_of_the_context_whatever_it_learned(selecting, questions):
    trained(selecting)
    for q in questions[:60:6]:
        read = selecting.read([q])[0]
        assert read and read in q.context
        assert len(selecting.tokenizer(f" {read}", add_special_tokens=False)["input_ids"]) <= 31


def test_the_encoder_reads_no_span_that_ends_before_it_begins_or_is_too_long(selecting, questions):
    q = max(questions, key=lambda q: len(q.context))
    context = selecting.tokenize([q], "prompt").context[0].nonzero()[:, 0]
    first, last = int(context[0]), int(context[-1])
    for start, end in ((first, last), (last, first)):
        logits = torch.zeros(selecting.tokenize([q], "prompt").ids.shape[1], 2)
        logits[start, 0], logits[end, 1] = 9, 8
        logits[start + (5 if start == first else -5), 1] = 3
        selecting.span = Peaks(logits)
        read = selecting.read([q])[0]
        assert read in q.context and 0 < len(selecting.tokenizer(read, add_special_tokens=False)["input_ids"]) <= 31


def test_what_the_encoder_reads_is_the_best_of_all_short_spans(selecting, questions):
    trained(selecting)
    for q in questions[:60:6]:
        (encoded,) = selecting.encoded([q], "prompt", 1)
        (start, end), spans = encoded.span[0].unbind(dim=1), encoded.tokens.spans[0]
        inside = encoded.tokens.context[0].nonzero()[:, 0].tolist()
        pairs = [(i, j) for i in inside for j in inside if i <= j < i + 30]
        first, last = max(pairs, key=lambda pair: float(start[pair[0]] + end[pair[1]]))
        expected = encoded.tokens.contents[0].text[spans[first, 0] : spans[last, 1]]
        assert selecting.read([q])[0] in expected and len(expected) - len(selecting.read([q])[0]) <= 2, (
            "but for white space"
        )


@pytest.fixture(params=["queries", "byte"])
def resampling(request, llms, encoder_folder):
    torch.manual_seed(0)
    tokenizer = llms["llama"].tokenizer
    if request.param == "byte":
        return ByteEncoder(tokenizer, 8, 6, ByteBackbone())
    return QueryEncoder(tokenizer, 8, 6, load_backbone(encoder_folder))


def test_free_queries_fill_all_their_places_whatever_the_batch(resampling, questions):
    some = [dataclasses.replace(questions[0], context="Two words."), questions[30]]
    with torch.no_grad():
        batch = resampling.eval()(some, "prompt", 6)
    assert batch.used.all() and batch.z.shape == (2, 6, 8)
    for row, z in enumerate(resampling.encode(some, "prompt", 6)):
        torch.testing.assert_close(batch.z[row], z, atol=1e-4, rtol=0)
    assert (batch.z[0] - batch.z[1]).abs().max() > 1e-2 and (batch.z[0, 0] - batch.z[0, 1]).abs().max() > 1e-2


def test_free_queries_start_at_the_scale_of_the_codes(llms, questions):
    scale = torch.tensor([5.0, 0.1, 1.0, 1.0])
    encoder = ByteEncoder(llms["llama"].tokenizer, 4, 32, ByteBackbone(), scale)
    (z,) = encoder.encode(questions[:1], "context", 32)
    assert z[:, 0].std() > 5 * z[:, 2].std() / 3 and z[:, 1].std() < z[:, 2].std() / 3


def test_free_queries_have_their_own_m_and_choose_nothing(resampling, questions):
    with pytest.raises(ValueError, match=r"latent_len=7.*M=6"):
        resampling.encode(questions[:1], "prompt", 7)
    assert not resampling.chooses_tokens and not resampling.reads_answers, "conditions and stages ask for these"
    for call in (resampling.select, resampling.perfect):
        with pytest.raises(NotImplementedError):
            call(questions[:1], "prompt", 6)
    with pytest.raises(NotImplementedError):
        resampling.read(questions[:1])


@pytest.mark.parametrize("kind", ["encoder", "selecting"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_special_token_that_a_user_spells_is_sent_as_text(request, questions, kind, source):
    encoder = request.getfixturevalue(kind)
    context, end = "Ada wrote <|im_end|> in the margin.", encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    q = dataclasses.replace(questions[0], context=context, question="Who <|im_end|>?", answers=("Ada",), starts=(0,))
    ids = encoder.select([q], source, 300)[0]
    assert end not in ids and context in encoder.tokenizer.decode(ids)
    assert "<|im_end|>" in encoder.perfect([q], source, 300)[0][1]


def test_the_untrained_encoder_chooses_tokens_and_reads_nothing(encoder, selecting, questions):
    assert encoder.chooses_tokens and not encoder.reads_answers
    assert selecting.chooses_tokens and selecting.reads_answers
    with pytest.raises(NotImplementedError):
        encoder.read(questions[:1])


def test_a_residual_of_low_rank_is_all_that_a_compact_wire_sends(encoder, encoder_folder, questions):
    settings = SelectingEncoder.Settings(encoder_id=encoder_folder, residual_rank=2)
    hf = ENCODERS["hf"].begin(encoder, settings, 6)
    ids = [token for ids in hf.select(questions[:20], "aware", 6) for token in ids]
    fresh = hf.encode(questions[:20], "aware", 6)
    torch.testing.assert_close(torch.cat(fresh), hf.codebook.weight[ids], atol=1e-5, rtol=0)
    nn.init.normal_(hf.residual.up.weight, std=1e-3)
    nn.init.normal_(hf.residual.up.bias, std=1e-3)
    added = torch.cat(hf.encode(questions[:20], "aware", 6)) - hf.codebook.weight[ids]
    assert torch.linalg.matrix_rank(added - added.mean(dim=0), rtol=1e-3) == 2
    compact = Compact.fit(hf.codebook.weight.detach(), torch.cat(hf.encode(questions[:20], "aware", 6)), even(hf))
    for z in hf.encode(questions[:5], "aware", 6):
        back = torch.from_numpy(compact.unpack(compact.pack(z.numpy(), 2), len(z), 2))
        assert (back - z).norm() < 2 * compact.step * len(z) ** 0.5


def even(encoder):
    """Every token as often."""
    return torch.ones(encoder.codebook.num_embeddings)


def test_a_training_begins_at_the_closed_form(encoder, encoder_folder, questions):
    """The codebook's own encoder goes on as it is; hf takes its codes over; free queries start at the codes' scale."""
    backbone = {"encoder_id": encoder_folder}
    assert ENCODERS["codebook"].begin(encoder, ENCODERS["codebook"].Settings(), 6) is encoder
    hf = ENCODERS["hf"].begin(encoder, SelectingEncoder.Settings(**backbone, pooling="cif"), 6)
    assert torch.equal(hf.codebook.weight, encoder.codebook.weight) and hf.pooling == "cif"
    assert hf.codebook.weight.data_ptr() != encoder.codebook.weight.data_ptr(), "and the closed form stays as it is"
    queries = ENCODERS["queries"].begin(encoder, BackboneSettings(**backbone), 6)
    byte = ENCODERS["byte"].begin(encoder, ByteEncoder.Settings(), 6)
    for made in (queries, byte):
        torch.testing.assert_close(made.resampler.norm.weight, encoder.codebook.weight.std(dim=0))
        assert made.encode(questions[:1], "prompt", 6)[0].shape == (6, 8)
    assert isinstance(byte.backbone, ByteBackbone)
    assert all(made.tokenizer is encoder.tokenizer and made.d_z == 8 for made in (hf, queries, byte))


def test_an_encoder_is_added_by_one_class_that_has_a_forward(encoder, questions, monkeypatch):
    class Mine(Encoder):
        """The same latent for every text."""

        def __init__(self, tokenizer, d_z):
            super().__init__(tokenizer, d_z)
            self.latent = nn.Parameter(torch.ones(d_z))

        def forward(self, questions, source, m):
            z = self.latent.expand(len(questions), m, self.d_z)
            return Encoded(z, torch.ones(z.shape[:2], dtype=torch.bool))

    monkeypatch.setattr(Mine, "name", "mine", raising=False)
    monkeypatch.setitem(ENCODERS, "mine", Mine)
    made = ENCODERS["mine"].begin(encoder, Mine.Settings(), 3)
    assert made.encode(questions[:2], "prompt", 3)[1].tolist() == [[1.0] * 8] * 3
    assert made.shape() == {} and not made.chooses_tokens and not made.reads_answers
    (whole,) = made.components()
    assert whole.name == "encoder" and [id(p) for p in whole.parameters] == [id(made.latent)]
    assert torch.equal(Mine.of_shape(encoder.tokenizer, 8, None, **made.shape()).latent, made.latent)


def test_the_answers_edges_are_its_first_and_last_wire_token(selecting, questions):
    some = questions[:40:9]
    for source in SOURCES:
        tokens = selecting.tokenize(some, source)
        for row, (first, last) in enumerate(answer_edges(tokens, some)):
            assert tokens.context[row, first : last + 1].all()
            covered = selecting.tokenizer.decode(tokens.ids[row, first : last + 1])
            assert some[row].answers[0] in covered
            if last > first:
                inner = selecting.tokenizer.decode(tokens.ids[row, first + 1 : last])
                assert some[row].answers[0] not in inner


@pytest.mark.parametrize("whole", ["café", "한솔"])
def test_the_encoders_own_answer_keeps_all_parts_of_a_composed_sign(selecting, whole, monkeypatch):
    """A tokenizer that composes signs counts only the first part of the last one."""
    parts = unicodedata.normalize("NFD", whole)
    context = f"They met at {parts} in June."
    q = Question("q", "t", "p", context, "Where?", (parts,), (context.index(parts),))
    encoder = selecting
    (encoded,) = encoder.encoded([q], "prompt", 1)
    begin = encoded.tokens.contents[0].context_at + q.starts[0]
    first = next(i for i, (a, b) in enumerate(encoded.tokens.spans[0]) if b > begin)
    encoded.tokens.spans[0][first] = (begin, begin + len(parts) - (1 if whole == "café" else 2))
    encoded.span = torch.full_like(encoded.span, -torch.inf)
    encoded.span[0, first] = 0.0
    monkeypatch.setattr(encoder, "encoded", lambda *_, **__: [encoded])
    assert encoder.read([q])[0] == parts


def test_the_encoders_own_answer_takes_memory_in_proportion_to_the_text(selecting, questions, monkeypatch):
    encoder, n = selecting, 200_000  # all pairs of so many tokens would take 160 GB
    (encoded,) = encoder.encoded([questions[0]], "prompt", 1)
    encoded.span = torch.full((1, n, 2), -1.0)
    encoded.span[0, 5, 0], encoded.span[0, 6, 1] = 1.0, 1.0
    monkeypatch.setattr(encoder, "encoded", lambda *_, **__: [encoded])
    spans = encoded.tokens.spans[0]
    text = encoded.tokens.contents[0]
    assert encoder.read([questions[0]])[0] == text.text[max(spans[5][0], text.context_at) : spans[6][1]].strip()
