"""The adapter: latents of the shared wire to one LLM's input embeddings."""

from torch import Tensor, nn


class Adapter(nn.Module):
    """Linear map Z [..., d_z] -> prefix [..., d] that starts from the closed form (see `interface`)."""

    def __init__(self, d_z: int, width: int):
        super().__init__()
        self.linear = nn.Linear(d_z, width)

    @classmethod
    def from_closed_form(cls, weight: Tensor, bias: Tensor) -> "Adapter":
        """weight: [d, d_z], bias: [d]."""
        adapter = cls(weight.shape[1], weight.shape[0])
        adapter.load_state_dict({"linear.weight": weight, "linear.bias": bias})
        return adapter

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z)
