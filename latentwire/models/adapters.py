"""Adapters: latents of the shared wire to one LLM's input embeddings. Adding one: a class, registered in one line.

@adapter("mine")
class Mine(Adapter): ...
"""

import torch
from torch import Tensor, nn

from latentwire.utils.registry import Registry

_HIDDEN = 1024


class Adapter(nn.Module):
    """Z [..., d_z] -> prefix [..., width]. A subclass takes (d_z, width): all that a checkpoint keeps."""

    name: str

    def __init__(self, d_z: int, width: int):
        super().__init__()
        self.d_z, self.width = d_z, width

    @classmethod
    def from_closed_form(cls, weight: Tensor, bias: Tensor) -> "Adapter":
        """The adapter that training starts from. weight: [width, d_z], bias: [width], for latents of RMS 1."""
        raise NotImplementedError


ADAPTERS: Registry[type[Adapter]] = Registry("adapter_type")
adapter = ADAPTERS.register


@adapter("residual_mlp")
class ResidualAdapter(Adapter):
    """A linear map that starts from the closed form (see `closed_form`), and a two-layer MLP that starts at zero.

    Both work in units of `scale`, the LLM's own: embeddings differ eightfold in size between LLMs, and one learning
    rate has to fit all.
    """

    def __init__(self, d_z: int, width: int):
        super().__init__(d_z, width)
        self.register_buffer("scale", torch.ones(()))
        self.linear = nn.Linear(d_z, width)
        self.mlp = nn.Sequential(nn.Linear(d_z, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, width))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    @classmethod
    def from_closed_form(cls, weight: Tensor, bias: Tensor) -> "ResidualAdapter":
        """As `Adapter.from_closed_form`: exactly the closed form's linear map."""
        made = cls(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            made.scale.copy_(weight.square().sum(dim=1).mean().sqrt())
            made.linear.weight.copy_(weight / made.scale)
            made.linear.bias.copy_(bias / made.scale)
        return made

    def forward(self, z: Tensor) -> Tensor:
        z = z.to(self.linear.weight.device)  # what comes off the wire is on the CPU
        return self.scale * (self.linear(z) + self.mlp(z))
