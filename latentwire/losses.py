"""What training minimises. Every function returns sums, so that the caller can divide by the counts of the whole
batch, whichever processes share it.

Shapes: B batch, A answer tokens (right-aligned, see `llm`), V vocabulary, N kept teacher tokens, T wire tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from latentwire.data import Question
from latentwire.encoder import Encoded
from latentwire.llm import PrefixLoss
from latentwire.teacher import TeacherLine

_LEAST_SHARE = 0.25  # of the M places that the target leaves to the context, however long the question is


def answer_sums(scored: PrefixLoss) -> dict[str, Tensor]:
    """Cross-entropy over all labels ("ce") and over each first one ("first_ce"), in nats; how many of the first labels
    are the most likely token ("first_token_acc")."""
    first = scored.mask & (scored.mask.cumsum(dim=1) == 1)  # [B, A]
    best = scored.logits.detach().argmax(dim=2) == scored.labels
    return {
        "ce": scored.nll.sum(),
        "first_ce": scored.nll[first].sum(),
        "first_token_acc": best[first].float().sum(),
    }


def distillation_sum(scored: PrefixLoss, teacher: Sequence[TeacherLine]) -> Tensor:
    """KL divergence in nats from the text-prompted teacher's top N tokens to the student, at labels that the teacher
    itself gets right: a teacher that is wrong teaches wrong."""
    total = scored.nll.sum() * 0
    for row, line in enumerate(teacher):
        logits = scored.logits[row, scored.mask[row]][line.right].float()  # [labels that the teacher gets right, V]
        if len(logits):
            target = line.logprobs[line.right].to(logits.device).float().log_softmax(dim=1)  # [., N]
            student = logits.log_softmax(dim=1).gather(1, line.ids[line.right].to(logits.device).long())
            total = total + (target.exp() * (target - student)).sum()
    return total


def selection_sums(encoded: Encoded, questions: Sequence[Question], m: int) -> dict[str, Tensor]:
    """Supervision by SQuAD's answer spans, one value a question.

    "span": cross-entropy of the answer's first and last wire token, halved. "window": binary cross-entropy, averaged
    over the tokens, of the tokens that a perfect selection would send: labels, question, and the context around the
    answer.
    """
    tokens = encoded.tokens
    edges, windows = [], torch.zeros_like(encoded.scores)
    for row, (question, text, spans) in enumerate(zip(questions, tokens.contents, tokens.spans, strict=True)):
        begin = text.context_at + question.starts[0]
        first, last = overlapping(spans, begin, begin + len(question.answers[0]))
        edges.append((first, last))
        low, high = overlapping(spans, text.context_at, text.context_at + len(question.context))
        others = len(spans) - (high + 1 - low)  # labels and question
        room = max(m - others, int(m * _LEAST_SHARE))
        start = max(low, min((first + last + 1 - room) // 2, high + 1 - room))
        windows[row, start : min(start + room, high + 1)] = 1
        windows[row, :low] = windows[row, high + 1 : len(spans)] = 1
    edges = torch.tensor(edges, device=encoded.span.device)  # [B, 2]
    logits = encoded.span.masked_fill(~tokens.mask[..., None], -torch.inf)
    span = cross_entropy(logits.transpose(1, 2).reshape(-1, logits.shape[1]), edges.flatten(), reduction="sum") / 2
    each = binary_cross_entropy_with_logits(encoded.scores, windows, reduction="none") * tokens.mask
    return {"span": span, "window": (each.sum(dim=1) / tokens.mask.sum(dim=1)).sum()}


def overlapping(spans: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """First and last token (spans [T, 2]) that share a character with [begin, end)."""
    inside = np.flatnonzero((spans[:, 0] < end) & (spans[:, 1] > begin))
    assert len(inside), f"no token covers the characters {begin} to {end}"
    return int(inside[0]), int(inside[-1])
