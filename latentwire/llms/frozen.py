"""The frozen language model: only this file, `attention` and `loading` touch a Hugging Face causal LM.

Shapes: B batch, H positions that all rows begin with, P slot positions, L positions after the head, A answer tokens, d
model width, V vocabulary.
Everything after the head is left-padded, so that every row ends at the same position; positions are
`cumsum(mask) - 1`, so that padding moves nothing. (Where rows share the head, they are first read without padding, and
padded in the cache.) That holds where every position sees all earlier ones. Where a layer
sees the last few only (a sliding window, chunks), or the model counts distances by itself, padding between head and
row would count as distance: there it stands in front of the head, and masks alone, never the cache, limit attention.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from latentwire.llms import attention
from latentwire.llms.attention import Opening
from latentwire.llms.deltas import adding, key_width
from latentwire.llms.prompts import END_OF_TURN, IGNORE, ends_line
from latentwire.utils.files import weights_sha256

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

_ROWS = 16384  # of the vocabulary at once


@dataclass
class Prefill:
    """A batch of prompts that the LLM has read.

    cache: keys and values of H + L positions, of which the head has H, or of L, where all rows share the head's; mask:
    [B, H + L] (0 on padding); logits: [B, V] at the anchor.
    """

    cache: "DynamicCache"
    mask: Tensor
    logits: Tensor


@dataclass
class PrefixLoss:
    """Teacher-forced scores of the answers after a prefix.

    Right-aligned. nll: [B, A] in nats, 0 where there is no label; mask: [B, A] bool; labels: [B, A]; logits: [B, A, V].
    """

    nll: Tensor
    mask: Tensor
    labels: Tensor
    logits: Tensor


class FrozenLLM:
    """A causal LM whose weights never change, fed by input embeddings.

    Raises ValueError for a model that keeps anything but keys and values of each position. A model whose rotary angles
    depend on the length (longrope, dynamic) raises ValueError for prompts from which they would change.
    """

    def __init__(self, name: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", llm_id: str = ""):
        self.name, self.id, self.tokenizer = name, llm_id or name, tokenizer
        self.who = f"{name} ({self.id})"  # in messages
        self.model = model.eval().requires_grad_(False)
        self.embedding = model.get_input_embeddings()
        # A slice of the last positions is strided, and a strided input makes the matrix product copy the whole output
        # embedding once per row (20 times slower for a large vocabulary on a CPU).
        model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        self.device, self.dtype = self.embedding.weight.device, self.embedding.weight.dtype
        self.width: int = self.embedding.weight.shape[1]
        self.rope_limit = attention.rope_limit(model)
        trained = getattr(model.config, "max_position_embeddings", None)
        self.positions: int | None = self.rope_limit or trained  # that it reads as it was trained to
        self.end_ids = self._end_ids()
        self.stop_ids = self._stop_ids()
        known = inspect.signature(model.forward).parameters
        self._sees_all = attention.sees_all(self.who, model) and "position_ids" in known
        self._cache_name = "cache" if "cache" in known else "past_key_values"  # renamed in transformers 5.24
        attention.without_cudnn()
        self.shares = self._sees_all and attention.share_heads(model)
        self._openings: dict[tuple[tuple[int, ...], int], Opening] = {}
        self._rms: Tensor | None = None

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Input embeddings [P, d] of token ids, as the model itself would look them up (scaling included)."""
        return self.embedding(torch.as_tensor(ids, dtype=torch.long, device=self.device))

    @torch.no_grad()
    def embedding_rms(self) -> Tensor:
        """Root mean square of the vocabulary's embeddings as the model reads them, a scalar: what a prefix is measured
        against."""
        if self._rms is None:
            ids = torch.arange(len(self.embedding.weight)).split(_ROWS)
            sums = torch.stack([self.embed(some).float().square().sum() for some in ids])
            self._rms = (sums.double().sum() / self.embedding.weight.numel()).sqrt().float()
        return self._rms

    def embedding_table(self) -> Tensor:
        """float32 copy on the CPU of every token's input embedding [V, d]; tokenizer ids index it."""
        with torch.no_grad():
            return self.embed(range(self.embedding.weight.shape[0])).float().cpu()

    @torch.inference_mode()
    def first_norm(self, embeds: Tensor) -> Tensor:
        """embeds [P, d] after the first layer's normalisation, float32: what its attention reads.

        Raises ValueError for a model whose layers have no `input_layernorm`.
        """
        layer = self.model.get_decoder().layers[0]
        if not hasattr(layer, "input_layernorm"):
            raise ValueError(f"{self.who}: its first layer normalises nothing by the name input_layernorm")
        return layer.input_layernorm(embeds.to(self.device, self.dtype)).float().cpu()

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that the cache keeps for one position."""
        cache = self._opening((0,)).cache
        return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))

    def require_positions(self, needed: int, what: str, remedy: str) -> None:
        """ValueError where a prompt needs more positions than the LLM can read; what: the prompt, with its verb."""
        if self.positions and needed > self.positions:
            raise ValueError(f"{what} {needed} positions, and {self.who} reads {self.positions}; {remedy}")

    def weights_sha256(self) -> str:
        """One hash of all weights: that they stayed frozen can be checked."""
        return weights_sha256(self.model.state_dict())

    @torch.inference_mode()
    def prefill(
        self,
        head: tuple[int, ...],
        slots: Sequence[Tensor],
        tails: Sequence[Sequence[int]],
        deltas: Sequence[Tensor | None] = (),
        constant: int = 0,
    ) -> Prefill:
        """Read head + slot + tail for each row.

        head: token ids, the same for all rows, read once and kept; slots: B tensors [P_i, d]; one that several rows
        share (see `alike`) is read once where `shares`; tails: B lists of token ids; deltas: what is added to the
        slots' keys and values (see `adding`); constant: how many of the slots' first positions are the same in all
        rows and have no deltas: they are kept with the head.
        """
        rests = [self.embed(tail) for tail in tails]
        opening = self._opening(head, slots[0][:constant])
        slots, deltas = attention.without_first(constant, slots, deltas)
        logits, mask, cache = self._read(opening, slots, rests, deltas, torch.ones(1, dtype=torch.long), kept=True)
        return Prefill(cache, mask, logits[:, -1])

    def generate(self, prefill: Prefill, max_new_tokens: int) -> list[str]:
        """Greedy continuation of each row, up to an end of sequence, an end of turn or a newline. Uses up the cache."""
        return [self.text(row) for row in self.generate_ids(prefill, max_new_tokens)]

    @torch.inference_mode()
    def generate_ids(self, prefill: Prefill, max_new_tokens: int) -> list[list[int]]:
        """The same as token ids, each row up to and with the first that ends it."""
        cache, mask, token = prefill.cache, prefill.mask, prefill.logits.argmax(-1)  # token: [B]
        tokens, done = [token], torch.isin(token, self.stop_ids)
        while len(tokens) < max_new_tokens and not done.all():
            mask = torch.cat([mask, mask.new_ones(len(token), 1)], dim=1)
            token = self._forward(self.embedding(token[:, None]), mask, cache, keep=1)[:, -1].argmax(-1)
            tokens.append(token)
            done |= torch.isin(token, self.stop_ids)
        stops = set(self.stop_ids.tolist())
        rows = torch.stack(tokens, dim=1).tolist()
        ends = [next((place for place, token in enumerate(row) if token in stops), len(row)) for row in rows]
        return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]

    @torch.inference_mode()
    def answer_nll(self, prefill: Prefill, answers: Sequence[Sequence[int]]) -> Tensor:
        """Teacher-forced negative log-likelihood in nats, summed over each row's answer tokens: float32 [B]."""
        ids = pad_sequence([torch.tensor(a) for a in answers], batch_first=True).to(self.device)  # [B, A]
        real = pad_sequence([torch.ones(len(a), dtype=torch.bool) for a in answers], batch_first=True).to(self.device)
        logits = prefill.logits[:, None]
        if ids.shape[1] > 1:
            mask = torch.cat([prefill.mask, real[:, :-1].to(prefill.mask.dtype)], dim=1)
            cache = self._copy(prefill.cache)
            rest = self._forward(self.embedding(ids[:, :-1]), mask, cache, keep=ids.shape[1] - 1)
            logits = torch.cat([logits, rest], dim=1)  # [B, A, V]
        nll = cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        return (nll * real).sum(dim=1)

    def generate_with_prefix(
        self,
        head: tuple[int, ...],
        slots: Sequence[Tensor],
        tails: Sequence[Sequence[int]],
        max_new_tokens: int,
        deltas: Sequence[Tensor | None] = (),
        constant: int = 0,
    ) -> list[str]:
        """Greedy answers [B] to head + slot + tail; see `prefill` for the shapes."""
        return self.generate(self.prefill(head, slots, tails, deltas, constant), max_new_tokens)

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
        """Teacher forcing: score the answer tokens after head + slot + tail, with gradients to slots and deltas.

        Only answer tokens carry a label, of each answer those that are `learned` (all of them, unless given). Logits
        are computed only where some row has a label; A counts these places. constant: as in `prefill`; these positions
        are read once for all rows, with gradients to those of the first slot, where `shares` and that is faster.
        """
        opening = self._opening(head)
        rests = [self.embed([*tail, *answer]) for tail, answer in zip(tails, answers, strict=True)]
        if self.shares and attention.worth_a_pass(constant, slots, rests):
            same, cache = slots[0][:constant].to(self.device, self.dtype), self._new_cache()
            cache.head = opening.head
            opening = self._read_on(opening.embeds, cache, same)
            slots, deltas = attention.without_first(constant, slots, deltas)
        longest = max(map(len, answers))
        labels = torch.full((len(rests), longest), IGNORE, device=self.device)
        for label, answer in zip(labels, answers, strict=True):
            label[longest - len(answer) :] = torch.tensor(answer, device=self.device)
        which = [torch.tensor(row) for row in learned or [[True] * len(answer) for answer in answers]]
        wanted = pad_sequence(which, batch_first=True, padding_side="left")  # [B, longest] bool
        columns = wanted.any(dim=0).nonzero()[:, 0]  # [A]
        labels = labels.masked_fill(~wanted.to(self.device), IGNORE)[:, columns]
        logits, *_ = self._read(opening, slots, rests, deltas, longest + 1 - columns)
        nll = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
        return PrefixLoss(nll.view_as(labels), labels != IGNORE, labels, logits)

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Layers, and width of a position's keys in each (values have the same). Raises ValueError as `key_width`."""
        layers = getattr(self.model.get_decoder(), "layers", ())
        return len(layers), key_width(self.who, layers)

    def _read(
        self,
        opening: Opening,
        slots: Sequence[Tensor],
        rests: Sequence[Tensor],
        deltas: Sequence[Tensor | None],
        from_end: Tensor,
        kept: bool = False,
    ) -> tuple[Tensor, Tensor, "DynamicCache"]:
        """Read rows of slot and rest, L_i positions, after what all begin with: logits [B, A, V] at the places [A] that
        `from_end` counts from each row's end (1: the last), mask [B, H + L] and cache, which is of use only if it is
        kept. A row that is too short has others, of no meaning, there."""
        if self.shares:
            return self._read_packed(opening, slots, rests, deltas, from_end, kept)
        rows = [torch.cat([s.to(self.device, self.dtype), rest]) for s, rest in zip(slots, rests, strict=True)]
        if self._sees_all:
            embeds, mask = attention.left_pad(rows, len(opening.embeds))
            cache = self._copy(opening.cache, len(rows))
        else:
            embeds, mask, cache = self._pad_in_front(opening, rows)
        begins = [(number, embeds.shape[1] - len(row)) for number, row in enumerate(rows)]
        with self.adding(deltas, begins, embeds):
            return self._forward(embeds, mask, cache, embeds.shape[1] - from_end), mask, cache

    def _read_packed(
        self,
        opening: Opening,
        slots: Sequence[Tensor],
        rests: Sequence[Tensor],
        deltas: Sequence[Tensor | None],
        from_end: Tensor,
        kept: bool,
    ) -> tuple[Tensor, Tensor, "DynamicCache"]:
        """The same where all rows share the opening's keys and values: they stand behind each other, without padding,
        and a slot that several rows share stands there once."""
        first = attention.alike(slots, deltas)
        parts, rows, begins = attention.behind_each_other(slots, rests, first)
        embeds = torch.cat([part.to(self.device, self.dtype) for part in parts])[None]
        cache, by_row, read = self._new_cache(), attention.Packed.of(rows, self.device), len(opening.embeds)
        trees, branches = attention.branching(rows, slots, first)
        packed = attention.Packed.of(trees, self.device)
        cache.head = opening.head
        mask = torch.cat([by_row.real.new_ones(len(rows), read), by_row.real], dim=1).long()
        keep = torch.stack([row[(len(row) - from_end).clamp(min=0)] for row in rows])
        positions = torch.empty(embeds.shape[1], dtype=torch.long)
        for row in rows:
            positions[row] = torch.arange(read, read + len(row))
        attention.require_rope(self.who, self.rope_limit, read + max(map(len, rows)))
        once = [deltas[row] for row in begins] if deltas else ()
        with self.adding(once, [(0, place) for place in begins.values()], embeds):
            logits = self.model(
                inputs_embeds=embeds, attention_mask=packed.seen(branches), position_ids=positions[None],
                use_cache=True, logits_to_keep=keep.flatten(), head=cache.head, packed=packed,
                **{self._cache_name: cache},
            ).logits  # fmt: skip
        for layer in cache.layers if kept else ():
            layer.keys, layer.values = by_row.padded(layer.keys), by_row.padded(layer.values)
        return logits.view(*keep.shape, -1), mask, cache

    def adding(
        self, deltas: Sequence[Tensor | None], begins: Sequence[tuple[int, int]], embeds: Tensor
    ) -> AbstractContextManager:
        """See `deltas.adding`."""
        if all(delta is None for delta in deltas):
            return nullcontext()
        return adding(self.model.get_decoder().layers, self.kv_shape[1], deltas, begins, embeds)

    def _pad_in_front(self, opening: Opening, rows: list[Tensor]) -> tuple[Tensor, Tensor, "DynamicCache"]:
        """The same in the order padding, head, row, so that nothing stands between head and row.

        A row that is g positions shorter than the longest moves the head by g: the cache holds padding and the head but
        for its last g positions, which are read again with the row, in the places where its padding would be.
        """
        longest, whole = max(map(len, rows)), len(opening.embeds)
        gaps = [longest - len(row) for row in rows]
        again = [torch.cat([opening.embeds[max(0, whole - gap) :], row]) for gap, row in zip(gaps, rows, strict=True)]
        embeds = pad_sequence(again, batch_first=True, padding_side="left")  # [B, L, d]
        first = torch.tensor(gaps, device=self.device)[:, None]  # [B, 1]
        mask = (torch.arange(whole + longest, device=self.device) >= first).long()  # [B, H + L]
        places = (torch.arange(whole, device=self.device) - first).clamp(min=0)  # [B, H]
        cache = self._new_cache()
        for number, layer in enumerate(opening.cache.layers):
            at = places.to(layer.keys.device)
            cache.update(*(t[0][:, at].transpose(0, 1) for t in (layer.keys, layer.values)), number)
        return embeds, mask, cache

    def _forward(self, embeds: Tensor, mask: Tensor, cache: "DynamicCache", keep: int | Tensor) -> Tensor:
        """Logits [B, keep, V] at the last positions, or at the places [n] of embeds that `keep` holds; the cache grows
        by embeds' length."""
        attention.require_rope(self.who, self.rope_limit, int(mask.sum(dim=1).max()) if self.rope_limit else 0)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        given = {self._cache_name: cache}
        if cache.head:
            given["head"] = cache.head
            mask = mask[:, sum(keys.shape[2] for keys, _ in cache.head[0]) :].bool()[:, None, None]
        return self.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=keep,
            **given,
        ).logits  # fmt: skip

    @torch.inference_mode(False)  # kept for training too, which cannot use what was made in inference mode
    @torch.no_grad()
    def _opening(self, head: tuple[int, ...], vectors: Tensor | None = None) -> Opening:
        """The head, and the vectors [constant, d] that all slots begin with: read once, until they are others."""
        own = self.embed([]) if vectors is None else vectors.to(self.device, self.dtype)
        key, kept = (head, len(own)), self._openings.get((head, len(own)))
        if kept is None or not torch.equal(kept.embeds[len(head) :], own):
            self._openings[key] = self._read_on(self.embed([]), self._new_cache(), torch.cat([self.embed(head), own]))
        return self._openings[key]

    def _read_on(self, read: Tensor, cache: "DynamicCache", more: Tensor) -> Opening:
        """What was read [n, d], whose cache grows, and more of it [k, d]."""
        embeds = torch.cat([read, more])
        mask = torch.ones(1, len(embeds), dtype=torch.long, device=self.device)
        self._forward(more[None], mask, cache, keep=torch.zeros(0, dtype=torch.long))
        return Opening(embeds, cache)

    def _new_cache(self) -> "DynamicCache":
        """An empty cache that forgets nothing: one without the configuration keeps what is beyond a layer's window."""
        from transformers import DynamicCache  # slow to import

        cache = DynamicCache(config=self.model.config) if self._sees_all else DynamicCache()
        cache.head: attention.Head | None = None  # what all rows share, where it is not in the cache itself
        return cache

    def _copy(self, cache: "DynamicCache", batch: int | None = None) -> "DynamicCache":
        """A cache of its own with the same content; `batch` repeats a single row."""
        copy = self._new_cache()
        copy.head = cache.head
        for number, layer in enumerate(cache.layers):
            size = layer.keys.shape[0] if batch is None else batch
            copy.update(layer.keys.expand(size, -1, -1, -1), layer.values.expand(size, -1, -1, -1), number)
        return copy

    def _end_ids(self) -> set[int]:
        """Ids of an end of sequence or of turn."""
        vocabulary = self.tokenizer.get_vocab()
        configured = self.model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        return {*ends, self.tokenizer.eos_token_id, *(vocabulary.get(token) for token in END_OF_TURN)} - {None}

    def _stop_ids(self) -> Tensor:
        """Ids after which an answer is over: the ends, and every token that holds a newline."""
        newlines = {i for token, i in self.tokenizer.get_vocab().items() if ends_line(token)}
        return torch.tensor(sorted(self.end_ids | newlines), device=self.device)

    def text(self, ids: Sequence[int]) -> str:
        """What a row of `generate_ids` says."""
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True).lstrip(" ").split("\n")[0].strip()
