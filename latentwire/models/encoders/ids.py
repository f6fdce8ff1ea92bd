"""ids, ids_marked: the same selection as hf, without its residual. What latents add is told by what these leave out.

Shapes: B batch, T wire tokens of a text, w width of the backbone's states, V wire vocabulary.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from latentwire.models.backbones import PretrainedBackbone
from latentwire.models.components import Component, component
from latentwire.models.encoders.base import Encoder, Tokens, between, encoder
from latentwire.models.encoders.codebook import ClosedFormEncoder
from latentwire.models.encoders.selecting import PoolingSettings, SelectingEncoder, best_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@encoder("ids")
class IdsEncoder(SelectingEncoder):
    """Codes alone: what token ids can carry. Begins from the codebook, or with the weights of an encoder hf."""

    begins_from = ("codebook", "hf")
    Settings = PoolingSettings

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        d_z: int,
        vocabulary: int,
        backbone: PretrainedBackbone,
        pooling: str,
    ):
        super().__init__(tokenizer, d_z, vocabulary, backbone, pooling)

    def _begin_adding(self) -> None:
        """Nothing is added."""

    @classmethod
    def begin(cls, before: Encoder, settings: Settings, m: int) -> Encoder:
        """With the closed form's codebook and a pretrained backbone; or with all that an encoder hf has but its
        residual."""
        if not isinstance(before, SelectingEncoder):
            return super().begin(before, settings, m)
        made = cls(before.tokenizer, before.d_z, before.codebook.num_embeddings, before.backbone, before.pooling)
        return made.with_weights_of(before)

    @classmethod
    def _own(cls, settings: Settings) -> dict:
        return {"pooling": settings.pooling}

    def shape(self) -> dict:
        return ClosedFormEncoder.shape(self) | {"pooling": self.pooling}

    def components(self) -> list[Component]:
        return [
            *ClosedFormEncoder.components(self),
            self.backbone_component(),
            component("score", self.score),
            component("span", self.span, self.outside),
        ]

    def _each(self, tokens: Tokens, hidden: Tensor, span: Tensor) -> Tensor:
        return self.codebook(tokens.ids)


# A step moves a residual by what hundreds of weights change together; a lone vector needs steps of that size.
MARKER_UNIT = 64.0


@encoder("ids_marked")
class MarkedIdsEncoder(IdsEncoder):
    """Codes, and one learned vector [d_z], zero at the start, on the tokens of the encoder's own best span: ids with a
    highlighter."""

    begins_from = ("codebook", "hf", "ids")

    def _begin_adding(self) -> None:
        self.marker = nn.Parameter(torch.zeros(self.d_z))

    def components(self) -> list[Component]:
        return [*super().components(), component("marker", self.marker)]

    def _each(self, tokens: Tokens, hidden: Tensor, span: Tensor) -> Tensor:
        first, last, logit = best_spans(span)
        inside = between(first, last, span.shape[1]) & logit.isfinite()[:, None]  # [B, T]
        return super()._each(tokens, hidden, span) + inside[..., None] * (MARKER_UNIT * self.marker)
