"""What is trained: LatentWire (encoder and adapters), or a rival's soft prompts. Both turn questions into slots.

Shapes: P_i positions of a slot, d LLM width, M latents.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentwire.conditions.base import CONDITIONS, Setting
from latentwire.data.squad import Question
from latentwire.models.adapters import Adapter
from latentwire.models.encoders.base import CodebookEncoder, Encoded, Encoder, ResamplingEncoder, SelectingEncoder

SOFT_VECTORS = 16


@dataclass
class Slots:
    """embeds: per LLM, one slot [P_i, d] a question; encoded: what the encoder says of them, if there is one."""

    embeds: dict[str, list[Tensor]]
    encoded: Encoded | None = None


class LatentWire(nn.Module):
    """One encoder pass, and one adapter per LLM on its Z."""

    def __init__(self, encoder: Encoder, adapters: Mapping[str, Adapter], source: str, m: int):
        super().__init__()
        self.encoder, self.source, self.m = encoder, source, m
        self.adapters = nn.ModuleDict(adapters)

    def forward(self, questions: Sequence[Question]) -> Slots:
        """The slots of each LLM, from one Z."""
        encoded = self.encoder(questions, self.source, self.m)
        prefixes = {name: adapter(encoded.z) for name, adapter in self.adapters.items()}  # [B, M, d]
        rows = {n: [p[u] for p, u in zip(prefix, encoded.used, strict=True)] for n, prefix in prefixes.items()}
        return Slots(rows, encoded)

    def components(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the part of the house that they belong to."""
        encoder = self.encoder
        parts: dict[str, list[nn.Module]] = {}
        if isinstance(encoder, CodebookEncoder):
            parts["codebook"] = [encoder.codebook]
        if isinstance(encoder, SelectingEncoder | ResamplingEncoder):
            parts["backbone"] = [encoder.backbone]
        if isinstance(encoder, SelectingEncoder):
            parts |= {"score": [encoder.score], "span": [encoder.span], "residual": [encoder.residual]}
        if isinstance(encoder, ResamplingEncoder):
            parts["resampler"] = [encoder.resampler]
        parts |= {f"adapter_{name}": [adapter] for name, adapter in self.adapters.items()}
        found = {name: [p for module in modules for p in module.parameters()] for name, modules in parts.items()}
        if isinstance(encoder, SelectingEncoder):
            found["span"].append(encoder.outside)
        return found


class SoftPrompts(nn.Module):
    """A rival that may train as well: SOFT_VECTORS learned vectors per LLM before the text of a condition (prompt
    tuning, Lester et al. 2021, arXiv:2104.08691). They start as the embeddings of the instruction's first words, and
    are learned in units of the LLM's own scale, as an adapter is: of a power of two, so that the units cost no bit."""

    def __init__(self, settings: Sequence[Setting], condition: str, m: int):
        super().__init__()
        self.settings = {setting.llm.name: setting for setting in settings}
        self.condition, self.m = CONDITIONS[condition], m
        self.scale = {name: 2.0 ** round(math.log2(s.llm.embedding_rms())) for name, s in self.settings.items()}
        starts = {name: s.llm.embed(s.prompts.head[:SOFT_VECTORS]) for name, s in self.settings.items()}
        self.vectors = nn.ParameterDict({n: nn.Parameter(v.float() / self.scale[n]) for n, v in starts.items()})

    def prompts(self) -> dict[str, Tensor]:
        """The vectors [SOFT_VECTORS, d] of each LLM as it reads them, on the CPU."""
        return {name: (vectors.detach() * self.scale[name]).cpu() for name, vectors in self.vectors.items()}

    @torch.no_grad()
    def restore(self, prompts: Mapping[str, Tensor]) -> None:
        """The reverse of `prompts`, bit by bit."""
        for name, vectors in self.vectors.items():
            vectors.copy_(prompts[name] / self.scale[name])

    def forward(self, questions: Sequence[Question]) -> Slots:
        """Soft prompt and text, for each LLM."""
        rows = {}
        for name, setting in self.settings.items():
            soft = (self.vectors[name] * self.scale[name]).to(setting.llm.dtype)
            texts = self.condition.build(setting, questions, self.m)
            rows[name] = [torch.cat([soft, slot.embeds]) for slot in texts]
        return Slots(rows)

    def components(self) -> dict[str, list[nn.Parameter]]:
        """One component per LLM."""
        return {f"soft_prompt_{name}": [vectors] for name, vectors in self.vectors.items()}
