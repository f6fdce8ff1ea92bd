"""Components: the parameters of a model by the part that they belong to, so that a stage can say what it trains."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass
class Component:
    """Parameters that are trained together. kind: what stages call it; llm: the LLM that it belongs to, if any; rate:
    the setting that holds its learning rate."""

    kind: str
    parameters: list[nn.Parameter]
    llm: str = ""
    rate: str = "lr"
    weight_decay: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.kind} {self.llm}".strip()


def component(kind: str, *parts: nn.Module | nn.Parameter, **how: str | float) -> Component:
    """The component that holds all parameters of these modules and parameters."""
    found = [[part] if isinstance(part, nn.Parameter) else list(part.parameters()) for part in parts]
    return Component(kind, [parameter for some in found for parameter in some], **how)


def require_complete(model: nn.Module, components: Sequence[Component]) -> None:
    """ValueError where a trainable parameter of the model belongs to no component: it would never be trained."""
    known = {id(parameter) for found in components for parameter in found.parameters}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if lost:
        raise ValueError(
            f"{type(model).__name__}: the parameters {', '.join(lost)} belong to no component, so no stage would train "
            "them; name them in components()"
        )
