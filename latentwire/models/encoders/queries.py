"""Free learned queries that look at a text's states: the usual choice of the field, here for comparison."""

import torch
from torch import Tensor, nn

_HEADS, _LAYERS = 4, 2


class Resampler(nn.Module):
    """M learned queries cross-attend to the states (Perceiver, Jaegle et al. 2021, arXiv:2103.03206).

    scale: [d_z], the standard deviation of the codes that the adapters were made for: the latents start there.
    Shapes: B batch, S states, w width of a state.
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
