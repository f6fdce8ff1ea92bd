"""queries, byte: M free queries look at a text's states. The usual choice of the field, here for comparison.

Shapes: B batch, S states of a text, w width of a state, M latents.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from latentwire.data.question import Question
from latentwire.models.backbones import (
    WEIGHT_DECAY,
    BackboneSettings,
    ByteBackbone,
    OnPretrained,
    PretrainedBackbone,
    States,
    load_backbone,
)
from latentwire.models.components import Component, component
from latentwire.models.encoders.base import Encoded, Encoder, encoder
from latentwire.utils.cli import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEADS, _LAYERS = 4, 2


class Resampler(nn.Module):
    """M learned queries cross-attend to the states (Perceiver, Jaegle et al. 2021, arXiv:2103.03206).

    scale: [d_z], the standard deviation of the codes that the adapters were made for: the latents start there.
    """

    def __init__(self, width: int, m: int, d_z: int, scale: Tensor | None = None):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(m, width) * width**-0.5)
        layer = nn.TransformerDecoderLayer(
            width, _HEADS, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, _LAYERS)
        self.out = nn.Linear(width, d_z)
        self.norm = nn.LayerNorm(d_z)
        if scale is not None:
            self.norm.weight.data.copy_(scale)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden: [B, S, w]; mask: [B, S] bool. Returns Z [B, M, d_z]."""
        queries = self.queries.expand(len(hidden), -1, -1)
        read = self.layers(queries, hidden, memory_key_padding_mask=~mask)
        return self.norm(self.out(read))


@encoder("queries")
class QueryEncoder(OnPretrained, Encoder):
    """M free queries look at the states of a pretrained backbone. M is fixed by the training."""

    Settings = BackboneSettings

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        d_z: int,
        m: int,
        backbone: PretrainedBackbone | ByteBackbone,
        scale: Tensor | None = None,
    ):
        super().__init__(tokenizer, d_z)
        self.backbone = backbone
        self.resampler = Resampler(backbone.width, m, d_z, scale)

    @classmethod
    def begin(cls, before: Encoder, settings: BackboneSettings, m: int) -> Encoder:
        """Latents begin at the size of the closed form's codes."""
        return cls(before.tokenizer, before.d_z, m, cls._backbone(settings), before.codebook.weight.detach().std(dim=0))

    @classmethod
    def _backbone(cls, settings: BackboneSettings) -> PretrainedBackbone | ByteBackbone:
        return load_backbone(settings.encoder_id, settings.lora)

    def shape(self) -> dict:
        return {"m": len(self.resampler.queries)}

    def components(self) -> list[Component]:
        return [self.backbone_component(), component("resampler", self.resampler)]

    def forward(self, questions: Sequence[Question], source: str, m: int, states: States | None = None) -> Encoded:
        """As `Encoder.forward`; states: the backbone's, where they are there already.

        Raises ValueError for an M that was not trained.
        """
        trained = len(self.resampler.queries)
        if m != trained:
            raise ValueError(f"latent_len={m}: these queries were trained for M={trained}; use that")
        states = states or self.backbone(questions, source)
        z = self.resampler(states.hidden, states.mask)
        return Encoded(z, torch.ones(z.shape[:2], dtype=torch.bool, device=z.device))


@encoder("byte")
class ByteEncoder(QueryEncoder):
    """The same queries over a transformer that reads bytes, all of it trained from scratch."""

    Settings = Settings

    @classmethod
    def _backbone(cls, settings: Settings) -> ByteBackbone:
        return ByteBackbone()

    @classmethod
    def of_shape(cls, tokenizer: "PreTrainedTokenizerBase", d_z: int, folder: Path, **shape: object) -> Encoder:
        return cls(tokenizer, d_z, backbone=ByteBackbone(), **shape)

    def save_parts(self, folder: Path) -> None:
        """Nothing: its shape is fixed."""

    def components(self) -> list[Component]:
        backbone = component("backbone", self.backbone, weight_decay=WEIGHT_DECAY)
        return [backbone, component("resampler", self.resampler)]
