"""What training minimises, against computations by hand."""

import dataclasses

import numpy as np
import pytest
import torch

from latentwire.llms.frozen import PrefixLoss
from latentwire.llms.prompts import IGNORE
from latentwire.models.backbones import load_backbone
from latentwire.models.encoders.base import overlapping
from latentwire.models.encoders.selecting import SelectingEncoder
from latentwire.training.losses import answer_sums, distillation_sum, span_sum
from latentwire.training.teacher import TeacherLine

VOCABULARY = 11
ANSWERS = [[4, 9, 2], [7], [1, 5]]  # three label lengths


@pytest.fixture
def scored():
    """Random logits [3, 3, 11] of right-aligned answers, as `llm.loss_with_prefix` gives them."""
    torch.manual_seed(0)
    logits = torch.randn(3, 3, VOCABULARY, requires_grad=True)
    labels = torch.tensor([[IGNORE] * (3 - len(answer)) + answer for answer in ANSWERS])
    mask = labels != IGNORE
    nll = -logits.log_softmax(dim=2).gather(2, labels.clamp(min=0)[..., None])[..., 0] * mask
    return PrefixLoss(nll, mask, labels, logits)


def by_hand(logits, label):
    return -float(logits[label] - logits.exp().sum().log())


def test_the_sums_are_over_the_answers_tokens_alone(scored):
    sums = answer_sums(scored)
    logits = scored.logits.detach()
    each = [[by_hand(logits[i, 3 - len(a) + j], t) for j, t in enumerate(a)] for i, a in enumerate(ANSWERS)]
    assert sums["ce"].item() == pytest.approx(sum(map(sum, each)), rel=1e-5)
    assert sums["first_ce"].item() == pytest.approx(sum(row[0] for row in each), rel=1e-5)
    sums["ce"].backward()
    assert ((scored.logits.grad != 0).all(dim=2) == scored.mask).all()


def test_the_loss_and_accuracy_of_the_first_token_that_says_anything_are_of_that_place(scored):
    sums, telling = answer_sums(scored), answer_sums(scored, [1, 0, 1])
    logits = scored.logits.detach()
    places = [(0, 1), (1, 2), (2, 2)]  # second label of the first answer, the only one, second of the third
    hand = [by_hand(logits[row, place], ANSWERS[row][place - 3]) for row, place in places]
    assert telling["first_ce"].item() == pytest.approx(sum(hand), rel=1e-5)
    right = sum(int(logits[row, place].argmax()) == ANSWERS[row][place - 3] for row, place in places)
    assert telling["first_informative_acc"].item() == right
    assert telling["ce"] == sums["ce"] and telling["first_token_acc"] == sums["first_token_acc"]
    assert sums["first_informative_acc"] == sums["first_token_acc"], "unless another place is named"


@pytest.mark.parametrize("right", [(), (0,), (1, 2), (0, 1, 2)])
def test_the_first_token_is_right_where_the_first_label_is_the_likeliest(scored, right):
    with torch.no_grad():
        scored.logits.zero_()[:, :, 0] = 1
        for row, answer in enumerate(ANSWERS):
            place = 3 - len(answer) if row in right else 2  # the last place is the first of one answer only
            if row in right or len(answer) > 1:
                scored.logits[row, place, scored.labels[row, place]] = 5
    assert answer_sums(scored)["first_token_acc"].item() == len(right)


def lines_of(scored, top, right=True):
    """A teacher that says what the student says."""
    logprobs = scored.logits.detach().log_softmax(dim=2)
    return [
        TeacherLine(found.indices.int(), found.values.half(), torch.full((int(mask.sum()),), right))
        for row, mask in zip(logprobs, scored.mask, strict=True)
        for found in [row[mask].topk(top, dim=1)]
    ]


def test_a_student_that_equals_its_teacher_has_nothing_to_learn(scored):
    same = distillation_sum(scored, lines_of(scored, VOCABULARY))
    assert abs(same.item()) < 1e-3
    same.backward()
    assert scored.logits.grad.abs().max() < 1e-3


def test_of_a_teachers_top_tokens_the_renormalised_divergence_counts(scored):
    lines = lines_of(scored, 3)
    expected = 0.0
    for row, line in enumerate(lines):
        logits = scored.logits[row, scored.mask[row]].detach()
        for ids, kept, student in zip(line.ids.long(), line.logprobs.float(), logits.log_softmax(dim=1), strict=True):
            target = kept.exp() / kept.exp().sum()
            expected += float((target * (target.log() - student[ids])).sum())
    loss = distillation_sum(scored, lines)
    assert loss.item() == pytest.approx(expected, rel=1e-3) and loss.item() > 0
    loss.backward()
    assert ((scored.logits.grad != 0).any(dim=2) == scored.mask).all()


def test_a_teachers_wrong_labels_teach_nothing(scored):
    lines = lines_of(scored, 3, right=False)
    assert distillation_sum(scored, lines).item() == 0
    lines[0].right[1] = True  # the second label of the first answer
    loss = distillation_sum(scored, lines)
    loss.backward()
    assert loss.item() > 0
    assert (scored.logits.grad != 0).any(dim=2).nonzero().tolist() == [[0, 1]]


@pytest.fixture
def encoder(llms, encoder_folder):
    tokenizer = llms["llama"].tokenizer
    torch.manual_seed(0)
    return SelectingEncoder(tokenizer, 8, len(tokenizer), load_backbone(encoder_folder), "select").eval()


@pytest.mark.parametrize("source", ["prompt", "context"])
def test_the_spans_loss_is_that_of_the_answers_first_and_last_token(encoder, questions, source):
    some = [questions[0], questions[33], questions[71]]
    encoded = encoder(some, source, 8)
    assert len({len(spans) for spans in encoded.tokens.spans}) > 1
    expected = 0.0
    for row, q in enumerate(some):
        text = encoded.tokens.contents[row].text
        begin = text.index(q.context) + q.starts[0]
        end = begin + len(q.answers[0])
        held = [i for i, (a, b) in enumerate(encoded.tokens.spans[row]) if any(begin <= c < end for c in range(a, b))]
        inside = encoded.tokens.context[row]
        logits = encoded.span[row, inside].detach()
        for side, gold in enumerate((held[0], held[-1])):
            expected += by_hand(logits[:, side], int(inside[:gold].sum())) / 2
    loss = span_sum(encoded, some)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert encoder.span.weight.grad.abs().sum() > 0
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)
    assert next(encoder.backbone.parameters()).grad.abs().sum() > 0


def test_the_spans_loss_is_least_where_the_logits_peak_at_the_answer(encoder, questions):
    some = questions[:2]
    encoded = encoder(some, "prompt", 8)
    gold = torch.zeros_like(encoded.span)
    for row, q in enumerate(some):
        begin = encoded.tokens.contents[row].context_at + q.starts[0]
        first, last = overlapping(encoded.tokens.spans[row], begin, begin + len(q.answers[0]))
        gold[row, first, 0] = gold[row, last, 1] = 30
    outside = ~encoded.tokens.context[..., None]
    encoded.span = gold.masked_fill(outside, -torch.inf)
    assert span_sum(encoded, some).item() < 1e-6
    encoded.span = gold.roll(1, dims=1).masked_fill(outside, -torch.inf)
    assert span_sum(encoded, some).item() > 20


def test_in_windows_the_spans_loss_is_of_choosing_the_answers_tokens(encoder, questions):
    """Windows of tokens 0-1, 2-3 and 4-5; the first answer is tokens 1-2, the second 4-5, the third nowhere."""
    some, at = questions[:2], [(1, 2), (4, 5)]
    encoded = encoder(some, "context", 3)
    some = [
        dataclasses.replace(q, starts=(int(spans[first, 0]) - text.context_at,), answers=(text.text[a:b],))
        for q, text, spans, (first, last) in zip(some, encoded.tokens.contents, encoded.tokens.spans, at, strict=True)
        for a, b in [(spans[first, 0], spans[last, 1])]
    ]
    member = torch.zeros(2, 3, encoded.scores.shape[1], dtype=torch.bool)
    for window in range(3):
        member[:, window, 2 * window : 2 * window + 2] = True
    scores = encoded.scores.detach().requires_grad_()
    encoded.scores, encoded.windows = scores, member
    shares = [scores[row, a : a + 2].softmax(0) for row, a in ((0, 0), (0, 2), (1, 4))]
    expected = -(shares[0][1].log() + shares[1][0].log()) / 2 - shares[2].sum().log()
    torch.testing.assert_close(span_sum(encoded, some), expected)
    unknown = dataclasses.replace(some[1], starts=())
    torch.testing.assert_close(span_sum(encoded, [some[0], unknown]), -(shares[0][1].log() + shares[1][0].log()) / 2)
    assert span_sum(encoded, [unknown, unknown]) == 0
    span_sum(encoded, some).backward()
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[0, :4].all() and not scores.grad[0, 4:].any() and not scores.grad[1, :4].any()


@pytest.mark.parametrize(
    ("begin", "end", "expected"), [(0, 1, (0, 0)), (3, 4, (1, 1)), (2, 5, (0, 2)), (4, 5, (2, 2)), (5, 9, (2, 3))]
)
def test_the_tokens_of_a_stretch_are_those_that_share_a_character_with_it(begin, end, expected):
    assert overlapping(np.array([[0, 3], [3, 4], [4, 7], [7, 9]]), begin, end) == expected
