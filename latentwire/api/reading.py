"""The reading half: one LLM and its adapter. Neither the encoder nor another LLM is loaded.

Shapes: P latents of a wire, d width of the LLM.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from latentwire.api.encoding import require_readable
from latentwire.api.message import Wire
from latentwire.data.content import question_in_tail
from latentwire.llms.known import CHOSEN_WORDINGS, LLMSettings, llm_id
from latentwire.llms.loading import load_llm
from latentwire.llms.prompts import PromptBuilder
from latentwire.models.weights import asked, load_adapters, read_config, wire_id
from latentwire.utils.cli import require, require_text
from latentwire.utils.machine import on_this_machine

Sent = bytes | Wire


class WireReader:
    """One LLM that answers from wires. Made by `LatentWire.reader`."""

    def __init__(self, folder: Path, name: str, device: str = "", dtype: str = ""):
        config = read_config(folder)
        made_for = asked(config, "llms", folder)
        if name not in made_for:
            raise ValueError(
                f"llm={name!r}: {folder} has readers for {', '.join(made_for)}; another LLM joins by train.py --stage "
                f"join --init {folder} --llms {name}"
            )
        self.folder, self.name, self.source = folder, name, asked(config, "source", folder)
        self.wire_id, self.d_z = wire_id(folder).hex(), asked(config, "d_z", folder)
        model_id = llm_id(name, made_for)
        (self.adapter,) = load_adapters(folder, {name: model_id}).values()
        where = on_this_machine(LLMSettings(llms=name, device=device, dtype=dtype))
        self.llm = load_llm(name, model_id, where.device, where.dtype)
        self.adapter.to(self.llm.device)
        wording = config.get("wordings", {}).get(name) or CHOSEN_WORDINGS.get(model_id, "chat")
        self.prompts = PromptBuilder(self.llm.tokenizer, self.source, wording)

    def wire(self, z: Sent) -> Wire:
        """What the bytes hold; ValueError if this reader cannot read them."""
        wire = z if isinstance(z, Wire) else Wire.unpack(z, self.folder, most=self.llm.positions)
        if wire.d_z != self.d_z or not wire.m:
            raise ValueError(f"the wire has {wire.m} latents of width {wire.d_z}; {self.folder} reads {self.d_z}")
        return require_readable(wire, self.folder, self.wire_id, self.source)

    def prefix(self, z: Sent) -> Tensor:
        """Input embeddings [P, d] of the adapter's constant vectors, where it has some, and of the latents, for a loop
        of one's own.

        Raises ValueError for an adapter that adds to keys and values, too.
        """
        require(
            not self.adapter.deep, "adapter", self.adapter.name,
            "adds to keys and values, which embeddings alone cannot carry: use answer() or generate(), or let the LLM "
            f"join {self.folder} under another name, with adapter_type preamble",
        )  # fmt: skip
        return self._slot(self.wire(z))[0]

    def _slot(self, wire: Wire) -> tuple[Tensor, Tensor | None]:
        """Input embeddings [P, d], constant ones first, and what is added to the keys and values of the latents."""
        return self._slot_of(torch.from_numpy(wire.z))

    @torch.no_grad()
    def _slot_of(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.adapter(z).to(self.llm.dtype), self.adapter.deltas(z)

    def read_opening(self) -> None:
        """Read what all prompts with a wire begin with, so that the first answer need not wait for it."""
        slot, _ = self._slot_of(torch.zeros(0, self.d_z))
        self.llm.prefill(self.prompts.head, [slot], [self.prompts.tail("")], constant=self.adapter.constant)

    def answer(
        self, z: Sent | Sequence[Sent], question: str | Sequence[str | None] | None = None, max_new_tokens: int = 12
    ) -> str | list[str]:
        """The greedy answer of one wire, or of each of many in one batch.

        question: what is asked, where the source is "context" or "aware"; None where it is "prompt", whose wires hold
        it.
        Raises ValueError for a wire of another checkpoint, a question too many or too few, or too many positions.
        """
        if isinstance(z, Sent):
            (one,) = self.answer([z], [question], max_new_tokens)
            return one
        asked_for = self._asked(question, len(z))
        wires = [self.wire(one) for one in z]
        tails = [self.prompts.tail(one) for one in asked_for]
        for wire, tail in zip(wires, tails, strict=True):
            self._require_positions(wire.m, tail, max_new_tokens)
        read = [self._slot(wire) for wire in wires]
        slots, deltas = [slot for slot, _ in read], [delta for _, delta in read]
        head, constant = self.prompts.head, self.adapter.constant
        return self.llm.generate_with_prefix(head, slots, tails, max_new_tokens, deltas, constant)

    def generate(self, z: Sent, prompt: str | None = None, **how: object) -> str:
        """Free continuation by transformers' own `generate`; `how`: its settings (max_new_tokens, do_sample, ...).

        prompt: text behind the latents; None: what an answer stands behind, without a question.
        Raises ValueError where a deep adapter is to work without a cache, or with the prompt in chunks.
        """
        odd = not how.get("use_cache", True) or bool(how.get("prefill_chunk_size"))
        remedy = f"the adapter {self.adapter.name} needs a cache, and the prompt read as a whole; leave them out"
        require(not (odd and self.adapter.deep), "use_cache, prefill_chunk_size", how, remedy)
        tail = self.prompts.tail("") if prompt is None else self.prompts.plain(prompt)
        wire = self.wire(z)
        self._require_positions(wire.m, tail, int(how.get("max_new_tokens", 1)))
        prefix, deltas = self._slot(wire)
        embeds = self._whole(prefix, tail)[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        with self.llm.adding([deltas], [(0, len(self.prompts.head))], embeds):
            (ids,) = self.llm.model.generate(inputs_embeds=embeds, attention_mask=mask, **how)
        return self.llm.tokenizer.decode(ids, skip_special_tokens=True)

    def prompt_embeds(self, z: Sent, question: str | None = None) -> Tensor:
        """Input embeddings [L, d] of the whole prompt, head and question included: what a serving engine that takes
        embeddings continues with the answer. Raises ValueError for an adapter that adds to keys and values."""
        (asked_for,) = self._asked([question], 1)
        wire, tail = self.wire(z), self.prompts.tail(asked_for)
        self._require_positions(wire.m, tail, 1)
        return self._whole(self.prefix(wire), tail)

    def _whole(self, prefix: Tensor, tail: Sequence[int]) -> Tensor:
        return torch.cat([self.llm.embed(self.prompts.head), prefix, self.llm.embed(tail)])

    def _asked(self, question: str | Sequence[str | None] | None, count: int) -> list[str]:
        questions = [None] * count if question is None else question
        require(
            not isinstance(questions, str) and len(questions) == count, "question", question,
            f"{count} wires need as many questions",
        )  # fmt: skip
        for one in questions:
            if question_in_tail(self.source):
                require_text("question", one)
            elif one is not None:
                raise ValueError(f"question={one!r}: a wire of source {self.source!r} holds its question; leave it out")
        return [one or "" for one in questions]

    def _require_positions(self, latents: int, tail: Sequence[int], more: int) -> None:
        needed = len(self.prompts.head) + self.adapter.constant + latents + len(tail) + more
        what = f"the wire's {latents} latents make a prompt of"
        self.llm.require_positions(needed, what, "encode with a smaller budget, or fewer parts")
