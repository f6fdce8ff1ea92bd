"""Adapters: latents of the shared wire to one LLM's input embeddings. Adding one: a class, registered in one line.

@adapter("mine")
class Mine(Adapter): ...
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from latentwire.models.components import Component, component
from latentwire.utils.cli import require
from latentwire.utils.registry import Registry

if TYPE_CHECKING:
    from latentwire.llms.frozen import FrozenLLM

PLAIN = "residual_mlp"  # the kind that needs no training: all of it comes from the closed form
SOFT_VECTORS = 16  # learned vectors before what differs between questions: of a preamble, and of a rival's soft prompt
_HIDDEN = 1024
_RANK = 64  # of the maps to keys and values


class Adapter(nn.Module):
    """Z [..., M, d_z] -> prefix [..., constant + M, width]. A subclass takes (d_z, width), and what its `shape` gives.

    constant: vectors before those of the latents that are the same for every Z; deep: whether it has `deltas`.
    """

    name: str
    constant = 0
    deep = False

    def __init__(self, d_z: int, width: int):
        super().__init__()
        self.d_z, self.width = d_z, width

    @classmethod
    def from_closed_form(cls, weight: Tensor, bias: Tensor) -> "Adapter":
        """The adapter that training starts from. weight: [width, d_z], bias: [width], for latents of RMS 1."""
        raise NotImplementedError

    def begin(self, llm: "FrozenLLM", head: Sequence[int]) -> None:
        """Told once before training: the LLM, and the token ids that its prompt begins with."""

    def shape(self) -> dict:
        """What a checkpoint's config keeps beside the weights, as JSON: further arguments of the class."""
        return {}

    def deltas(self, z: Tensor) -> Tensor | None:
        """What is added to keys and values: [layers, 2, constant + M, k] for Z [M, d_z], 0 at the constant ones; None
        where nothing is."""
        return None

    def components(self, llm: str) -> list[Component]:
        """Every trainable parameter, by the part that stages name."""
        return [component("adapter", self, llm=llm)]


ADAPTERS: Registry[type[Adapter]] = Registry("adapter_type")
adapter = ADAPTERS.register


def grown(before: Adapter, kind: type[Adapter], llm: "FrozenLLM", head: Sequence[int]) -> Adapter:
    """An adapter of another kind with the weights of `before`; what it has besides is as `begin` leaves it. ValueError
    for a kind that lacks some of these weights."""
    if kind is type(before):
        return before
    made = kind(before.d_z, before.width)
    made.begin(llm, head)
    lost = before.state_dict().keys() - made.state_dict().keys()
    remedy = f"it would lose {', '.join(sorted(lost))} of the reader that is there; name {before.name}, or leave it out"
    require(not lost, "adapter_type", kind.name, remedy)
    made.load_state_dict(made.state_dict() | before.state_dict())
    return made


@adapter(PLAIN)
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


@adapter("preamble")
class PreambleAdapter(ResidualAdapter):
    """The residual adapter behind SOFT_VECTORS learned vectors, so that LatentWire learns the task by the same means as
    a rival with a soft prompt (prompt tuning, Lester et al. 2021, arXiv:2104.08691).

    They start as the embeddings of the instruction's first words, and are learned in units of a power of two near their
    size, so that the units cost no bit.
    """

    constant = SOFT_VECTORS

    def __init__(self, d_z: int, width: int):
        super().__init__(d_z, width)
        self.register_buffer("unit", torch.ones(()))
        self.preamble = nn.Parameter(torch.zeros(SOFT_VECTORS, width))

    @torch.no_grad()
    def begin(self, llm: "FrozenLLM", head: Sequence[int]) -> None:
        found = llm.embed(head[:SOFT_VECTORS]).float()
        self.unit.fill_(2.0 ** round(math.log2(found.square().mean().sqrt())))
        self.preamble.copy_(found / self.unit)

    def components(self, llm: str) -> list[Component]:
        return [
            component("adapter", self.linear, self.mlp, llm=llm),
            component("preamble", self.preamble, llm=llm, rate="soft_prompt_lr"),
        ]

    def forward(self, z: Tensor) -> Tensor:
        own = (self.preamble * self.unit).expand(*z.shape[:-2], -1, -1)
        return torch.cat([own, super().forward(z)], dim=-2)


@adapter("deep")
class DeepAdapter(PreambleAdapter):
    """The preamble adapter, which also adds to the keys and values of each layer at the latents' positions: what one
    embedding cannot hold (prefix tuning, Li and Liang 2021, arXiv:2101.00190, made to depend on Z).

    The maps are of rank _RANK and start at zero. The cache keeps as many positions as before.
    """

    deep = True

    def __init__(self, d_z: int, width: int, layers: int = 0, k: int = 0):
        """layers, k: of the LLM, see `FrozenLLM.kv_shape`; 0 until `begin`."""
        super().__init__(d_z, width)
        self.down = nn.Linear(d_z, _RANK, bias=False)
        self.up = nn.Parameter(torch.zeros(layers, 2, _RANK, k))

    def begin(self, llm: "FrozenLLM", head: Sequence[int]) -> None:
        super().begin(llm, head)
        layers, k = llm.kv_shape
        self.up = nn.Parameter(torch.zeros(layers, 2, _RANK, k))

    def shape(self) -> dict:
        return {"layers": self.up.shape[0], "k": self.up.shape[3]}

    def components(self, llm: str) -> list[Component]:
        return [*super().components(llm), component("deep", self.down, self.up, llm=llm)]

    def deltas(self, z: Tensor) -> Tensor:
        z = z.to(self.up.device)
        return pad(self.down(z) @ self.up, (0, 0, self.constant, 0))
