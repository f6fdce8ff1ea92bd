"""What LatentWire does, done in the obvious way: for the benchmark to be measured against, and for tests to agree with.

Correct and batched, but without the savings: the constant head, and a preamble, are read again in every row, logits
are computed at every position, and the teacher reads the whole text in every step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from latentwire.conditions.base import Reader
from latentwire.data.question import Question
from latentwire.llms.frozen import FrozenLLM, PrefixLoss
from latentwire.llms.prompts import IGNORE
from latentwire.training.teacher import TeacherLine, score_texts, top_lines
from latentwire.utils.cli import require


class PlainLLM:
    """A frozen LLM as a training step uses it, with losses from whole prompts and all logits. The model is the same.
    recompute: whether its layers are computed again in the backward pass (gradient checkpointing)."""

    def __init__(self, llm: FrozenLLM, recompute: bool = False):
        self.name, self.model, self.device, self.dtype = llm.name, llm.model, llm.device, llm.dtype
        self.recompute = recompute
        self.embed, self.embedding_rms, self._adding = llm.embed, llm.embedding_rms, llm.adding

    def loss_with_prefix(
        self,
        head: tuple[int, ...],
        slots: Sequence[Tensor],
        tails: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        deltas: Sequence[Tensor | None] = (),
        learned: Sequence[Sequence[bool]] = (),
        constant: int = 0,
    ) -> PrefixLoss:
        """As `FrozenLLM.loss_with_prefix`; every row reads all of its positions. Raises ValueError for deltas where
        layers are computed again."""
        remedy = "keys and values that a deep adapter adds to are not computed again; leave it out"
        require(not (self.recompute and deltas), "recompute", True, remedy)
        rows = [
            torch.cat([self.embed(head), slot.to(self.device, self.dtype), self.embed(tail), self.embed(answer)])
            for slot, tail, answer in zip(slots, tails, answers, strict=True)
        ]
        embeds = pad_sequence(rows, batch_first=True, padding_side="left")  # [B, L, d]
        real = [torch.ones(len(row), dtype=torch.long, device=self.device) for row in rows]
        mask = pad_sequence(real, batch_first=True, padding_side="left")
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        begins = [(number, len(head) + embeds.shape[1] - len(row)) for number, row in enumerate(rows)]
        with self._recomputing(), self._adding(deltas, begins, embeds):
            logits = self.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits  # [B, L, V]
        labels = torch.full(mask.shape, IGNORE, device=self.device)
        for label, answer, wanted in zip(labels, answers, learned or [[True] * len(a) for a in answers], strict=True):
            ids = torch.where(torch.tensor(wanted), torch.tensor(answer), IGNORE)
            label[-len(answer) :] = ids.to(self.device)
        shifted, labels = logits[:, :-1], labels[:, 1:]
        nll = cross_entropy(shifted.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
        return PrefixLoss(nll.view_as(labels), labels != IGNORE, labels, shifted)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """transformers recomputes in training mode only, which changes nothing else: these LLMs have no dropout."""
        if not self.recompute:
            yield
            return
        # Not by gradient_checkpointing_enable, which makes all embeddings require a gradient from then on.
        self.model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()
            self.model._set_gradient_checkpointing(False)


def teach_now(reader: Reader, questions: Sequence[Question], k: int) -> dict[str, TeacherLine]:
    """The teacher's lines for one batch, without a cache."""
    lines = top_lines(score_texts(reader.llm, reader.prompts, questions, k))
    return {question.id: line for question, line in zip(questions, lines, strict=True)}


@torch.inference_mode()
def answer_one_by_one(llm: FrozenLLM, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """Greedy answers of `transformers.generate`, a prompt at a time."""
    return [answer_batched(llm, [prompt], max_new_tokens)[0] for prompt in prompts]


@torch.inference_mode()
def answer_batched(llm: FrozenLLM, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """Greedy answers of `transformers.generate` to one left-padded batch; it stops where ours does."""
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones(len(p), dtype=torch.long) for p in prompts], batch_first=True, padding_side="left")
    stops = llm.stop_ids.tolist()
    out = llm.model.generate(
        input_ids=ids.to(llm.device), attention_mask=mask.to(llm.device), max_new_tokens=max_new_tokens,
        do_sample=False, eos_token_id=stops, pad_token_id=stops[0],
    )  # fmt: skip
    return [
        llm.tokenizer.decode(row, skip_special_tokens=True).strip().split("\n")[0].strip()
        for row in out[:, ids.shape[1] :].tolist()
    ]
