"""What training minimises. Every function returns sums, so that the caller can divide by the counts of the whole
batch, whichever processes share it.

Shapes: B batch, A answer tokens (see `llms.frozen.PrefixLoss`), V vocabulary, N kept teacher tokens, T wire tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from latentwire.data.question import Question
from latentwire.llms.frozen import PrefixLoss
from latentwire.models.encoders.base import Encoded, answer_edges, between
from latentwire.training.teacher import TeacherLine


def answer_sums(scored: PrefixLoss, informative: Sequence[int] = ()) -> dict[str, Tensor]:
    """Cross-entropy over all labels ("ce") and over each first informative one ("first_ce"), in nats; how many of the
    first labels ("first_token_acc"), and of the first informative ones ("first_informative_acc"), are the most likely
    token.

    informative: the place of each answer's first informative label, unless it is the first label.
    """
    number = scored.mask.cumsum(dim=1) * scored.mask  # [B, A], of each label, from 1
    places = torch.tensor(informative or [0] * len(number), device=number.device)
    first, telling = number == 1, number == places[:, None] + 1
    best = scored.logits.detach().argmax(dim=2) == scored.labels
    return {
        "ce": scored.nll.sum(),
        "first_ce": scored.nll[telling].sum(),
        "first_token_acc": best[first].float().sum(),
        "first_informative_acc": best[telling].float().sum(),
    }


def distillation_sum(scored: PrefixLoss, teacher: Sequence[TeacherLine | None]) -> Tensor:
    """KL divergence in nats from the text-prompted teacher's top N tokens to the student, at labels that the teacher
    itself gets right: a teacher that is wrong teaches wrong. None: a question that it was not asked."""
    total = scored.nll.sum() * 0
    for row, line in enumerate(teacher):
        if line is None:
            continue
        logits = scored.logits[row, scored.mask[row]][line.right].float()  # [labels that the teacher gets right, V]
        if len(logits):
            target = line.logprobs[line.right].to(logits.device).float().log_softmax(dim=1)  # [., N]
            student = logits.log_softmax(dim=1).gather(1, line.ids[line.right].to(logits.device).long())
            total = total + (target.exp() * (target - student)).sum()
    return total


def span_sum(encoded: Encoded, questions: Sequence[Question]) -> Tensor:
    """Supervision by answer spans, in nats: cross-entropy of the answer's first and last wire token, halved; or, where
    each place chooses in a window of its own, of choosing one of the answer's tokens, the mean over the windows that
    hold some. A question that does not say where its answer stands teaches nothing."""
    there = [row for row, question in enumerate(questions) if question.starts]
    if not there:
        return encoded.z.sum() * 0
    if len(there) < len(questions):
        encoded, questions = encoded.of(there), [questions[row] for row in there]
    edges = torch.tensor(answer_edges(encoded.tokens, questions), device=encoded.z.device)  # [B, 2]
    if encoded.windows is not None:
        return _window_sum(encoded, edges)
    logits = encoded.span.transpose(1, 2).flatten(0, 1)  # [2 B, T], -inf outside the context
    return cross_entropy(logits, edges.flatten(), reduction="sum") / 2


def _window_sum(encoded: Encoded, edges: Tensor) -> Tensor:
    least = torch.finfo(encoded.scores.dtype).min
    answers = between(*edges.T, encoded.scores.shape[1])  # [B, T]
    held = encoded.windows & answers[:, None]  # [B, M, T]
    chosen = encoded.scores[:, None].masked_fill(~encoded.windows, least).log_softmax(dim=2)
    nll = -chosen.masked_fill(~held, least).logsumexp(dim=2)  # [B, M]
    some = held.any(dim=2)
    return (nll.masked_fill(~some, 0).sum(dim=1) / some.sum(dim=1).clamp(min=1)).sum()
