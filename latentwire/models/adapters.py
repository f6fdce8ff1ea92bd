"""The adapter: latents of the shared wire to one LLM's input embeddings."""

import torch
from torch import Tensor, nn

_HIDDEN = 1024


class Adapter(nn.Module):
    """Z [..., d_z] -> prefix [..., d]: a linear map that starts from the closed form (see `interface`), and a two-layer
    MLP that starts at zero. Both work in units of `scale`, the LLM's own: embeddings differ eightfold in size between
    LLMs, and one learning rate has to fit all."""

    def __init__(self, d_z: int, width: int):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.linear = nn.Linear(d_z, width)
        self.mlp = nn.Sequential(nn.Linear(d_z, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, width))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    @classmethod
    def from_closed_form(cls, weight: Tensor, bias: Tensor) -> "Adapter":
        """weight: [d, d_z], bias: [d], for latents whose root mean square is 1."""
        adapter = cls(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            adapter.scale.copy_(weight.square().sum(dim=1).mean().sqrt())
            adapter.linear.weight.copy_(weight / adapter.scale)
            adapter.linear.bias.copy_(bias / adapter.scale)
        return adapter

    def forward(self, z: Tensor) -> Tensor:
        z = z.to(self.linear.weight.device)  # what comes off the wire is on the CPU
        return self.scale * (self.linear(z) + self.mlp(z))
