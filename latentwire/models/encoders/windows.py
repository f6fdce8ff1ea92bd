"""anchors, lead, windows: a text is cut into M windows of wire tokens, and each window gives one latent.

What they send depends on no question, so they serve the source where it is not known. Any M can be asked for: the
windows follow it. Shapes: B batch, T wire tokens of a text, M latents, w width of the backbone's states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from latentwire.data.content import content, question_in_tail
from latentwire.data.question import Question
from latentwire.models.backbones import BackboneSettings, OnPretrained, PretrainedBackbone, States, load_backbone
from latentwire.models.components import Component, component
from latentwire.models.encoders.base import Encoded, Encoder, Tokens, answer_edges, encoder
from latentwire.models.encoders.codebook import ClosedFormEncoder
from latentwire.models.encoders.tokens import TokenEncoder, zeroed
from latentwire.utils.cli import option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KNOWN = 1e4  # salience of tokens that an oracle wants


@encoder("anchors")
class AnchorEncoder(TokenEncoder):
    """One token of each window leads its latent: z = its code + a dense residual, which starts at zero, of the
    token's own state and the window's mean (anchors as in SAC, arXiv:2510.08907; windows as in arXiv:2510.20797).

    At the start the rarest leads: by its id, since a byte-level BPE numbers its tokens from frequent to rare; a learned
    correction starts at zero. The choice has the gradient of a softmax over the window (straight-through), and answer
    spans teach which token of a window is one of an answer's. Begins from the codebook, or as another did, with a
    residual of zero where that one has none.
    """

    learns_spans = True
    begins_from = ("codebook", "anchors")
    arguments = ("dense",)

    @dataclass(kw_only=True)
    class Settings(BackboneSettings):
        """Of the encoder that cuts a text into windows."""

        dense: bool = option(True, "add the dense residual; 0: send the anchors' codes alone (a rival)")

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        d_z: int,
        vocabulary: int,
        backbone: PretrainedBackbone,
        dense: bool = True,
    ):
        super().__init__(tokenizer, d_z, vocabulary, backbone)
        self.dense = dense
        self.score = zeroed(nn.Linear(backbone.width, 1))
        if dense:
            self.residual = zeroed(nn.Linear(2 * backbone.width, d_z))

    @classmethod
    def _arguments(cls, before: ClosedFormEncoder, settings: Settings) -> dict:
        """A residual that is there is never dropped: such settings are refused."""
        return {"dense": settings.dense or getattr(before, "dense", False)}

    def components(self) -> list[Component]:
        return [
            *super().components(),
            component("salience", self.score, self.outside),
            *([component("residual", self.residual)] if self.dense else []),
        ]

    def forward(
        self, questions: Sequence[Question], source: str, m: int, states: States | None = None, known: bool = False
    ) -> Encoded:
        """states, known: as in `IdsEncoder.forward`."""
        tokens = self.tokenize(questions, source)
        hidden = self._align(states or self.backbone(questions, source), tokens)  # [B, T, w]
        salience = torch.log1p(tokens.ids.float()) + self.score(hidden).float()[..., 0]  # [B, T]
        if known:
            for row, (first, last) in zip(salience, answer_edges(tokens, questions), strict=True):
                row[first : last + 1] += _KNOWN
        member, used = windows(_sent(tokens, source), m)
        places = _anchors(salience, member)
        z = places @ self.codebook(tokens.ids)
        if self.dense:
            z = z + self.residual(_read(hidden, places, member)).float()
        return Encoded(z, used, tokens, salience, None, places, member)


@encoder("lead")
class LeadEncoder(TokenEncoder):
    """The first M tokens lead the latents, which an LLM reads as the text that they are; what follows them is cut into
    the windows, which only the residual tells of: it reads the leading token's state, the window's mean, and the code
    of its rarest token. Nothing is chosen, so no answer span teaches anything."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", d_z: int, vocabulary: int, backbone: PretrainedBackbone):
        super().__init__(tokenizer, d_z, vocabulary, backbone)
        self.residual = zeroed(nn.Linear(2 * backbone.width + d_z, d_z))

    def components(self) -> list[Component]:
        return [*super().components(), component("residual", self.residual, self.outside)]

    def forward(
        self, questions: Sequence[Question], source: str, m: int, states: States | None = None, known: bool = False
    ) -> Encoded:
        """states: as in `IdsEncoder.forward`; known: the M tokens that lead are those around the answer."""
        tokens = self.tokenize(questions, source)
        hidden = self._align(states or self.backbone(questions, source), tokens)  # [B, T, w]
        sent = _sent(tokens, source)
        order = sent.cumsum(dim=1) - 1  # [B, T]
        begin = torch.zeros(len(questions), 1, device=order.device)
        if known:
            edges = torch.tensor(answer_edges(tokens, questions), device=order.device)
            middle = order.gather(1, edges).float().mean(dim=1, keepdim=True)
            begin = (middle - m // 2).minimum(sent.sum(dim=1, keepdim=True) - m).clamp(min=0).ceil()
        first = sent & (order >= begin) & (order < begin + m)
        places = one_hot((order - begin).long().clamp(0, m - 1), m).transpose(1, 2) * first[:, None]  # [B, M, T]
        member, _ = windows(sent & ~first, m)
        rarest = tokens.ids[:, None].masked_fill(~member, -1).amax(dim=2)  # [B, M], by its id, as anchors begin
        told = self.codebook(rarest.clamp(min=0)) * (rarest >= 0)[..., None]
        z = places.float() @ self.codebook(tokens.ids) + self.residual(_read(hidden, places, member, told)).float()
        return Encoded(z, places.any(dim=2), tokens, None, None, places)


@encoder("windows")
class WindowEncoder(OnPretrained, Encoder):
    """The mean of each window's states, one linear map: the field's usual choice (arXiv:2510.20797), for comparison.

    scale: [d_z], the standard deviation of the codes that the adapters were made for: the latents start there.
    """

    Settings = BackboneSettings

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        d_z: int,
        backbone: PretrainedBackbone,
        scale: Tensor | None = None,
    ):
        super().__init__(tokenizer, d_z)
        self.backbone = backbone
        self.out, self.norm = nn.Linear(backbone.width, d_z), nn.LayerNorm(d_z)
        if scale is not None:
            self.norm.weight.data.copy_(scale)

    @classmethod
    def begin(cls, before: Encoder, settings: BackboneSettings, m: int) -> Encoder:
        """Latents begin at the size of the closed form's codes."""
        scale = before.codebook.weight.detach().std(dim=0)
        return cls(before.tokenizer, before.d_z, load_backbone(settings.encoder_id, settings.lora), scale)

    def components(self) -> list[Component]:
        return [self.backbone_component(), component("windows", self.out, self.norm)]

    def forward(self, questions: Sequence[Question], source: str, m: int, states: States | None = None) -> Encoded:
        """states: as in `IdsEncoder.forward`."""
        states = states or self.backbone(questions, source)
        mask = states.mask.clone()
        for row, spans, q in zip(mask, states.spans, questions, strict=True):
            if question_in_tail(source):
                row[: len(spans)] &= torch.as_tensor(_in_context(spans, source, q), device=row.device)
        member, used = windows(mask, m)
        return Encoded(self.norm(self.out(_means(member, states.hidden))).float(), used)


def windows(mask: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Which tokens [B, M, T] (bool) each of M windows holds, and which windows are used [B, M] (bool).

    mask: [B, T] bool. A text of n tokens has min(n, M) windows, whose sizes differ by one token at most.
    """
    count = mask.sum(dim=1, keepdim=True)  # [B, 1]
    number = (mask.cumsum(dim=1) - 1) * count.clamp(max=m) // count.clamp(min=1)
    member = one_hot(number.clamp(min=0), m).bool() & mask[..., None]  # [B, T, M]
    return member.transpose(1, 2), torch.arange(m, device=mask.device) < count


def _anchors(salience: Tensor, member: Tensor) -> Tensor:
    """Assignment [B, M, T]: in each window the token of most salience, with the gradient of a softmax over the window
    (straight-through: Bengio et al. 2013, arXiv:1308.3432). salience: [B, T]; member: [B, M, T]."""
    logits = salience[:, None].masked_fill(~member, torch.finfo(salience.dtype).min)
    soft = logits.softmax(dim=2) * member
    hard = one_hot(logits.argmax(dim=2), salience.shape[1]) * member
    return hard + soft - soft.detach()


def _sent(tokens: Tokens, source: str) -> Tensor:
    """Which tokens are sent [B, T]: those of the context, and of the question where the wire holds it."""
    return tokens.mask & tokens.context if question_in_tail(source) else tokens.mask


def _read(hidden: Tensor, places: Tensor, member: Tensor, *more: Tensor) -> Tensor:
    """What a residual reads of each latent [B, M, ...]: its leading token's state, its window's mean, and more."""
    read = [places.to(hidden.dtype) @ hidden, _means(member, hidden), *(one.to(hidden.dtype) for one in more)]
    return torch.cat(read, dim=2)


def _means(member: Tensor, hidden: Tensor) -> Tensor:
    """Mean state [B, M, w] of each window; zero for one that is not used."""
    return member.to(hidden.dtype) @ hidden / member.sum(dim=2, keepdim=True).clamp(min=1)


def _in_context(spans: np.ndarray, source: str, question: Question) -> np.ndarray:
    """Which spans [S, 2] of the characters that are read belong to the context."""
    begin = content(source, question.context, question.question).context_at
    return (spans[:, 1] > begin) & (spans[:, 0] < begin + len(question.context))
