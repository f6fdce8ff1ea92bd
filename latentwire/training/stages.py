"""The table of stages. Adding one: one line here, or anywhere that is imported before training starts.

stage(Stage("mine", trains=("residual",), losses=("answers",)))
"""

from collections.abc import Sequence
from dataclasses import dataclass

from latentwire.utils.registry import Registry

LOSSES = ("answers", "spans")  # through the frozen LLMs; of where answers stand, in what the encoder says


@dataclass
class Stage:
    """One stage of training.

    trains: kinds of components, None for all, () for none; losses: which of LOSSES it minimises; needs_llms: whether
    LLMs are loaded; needs_checkpoint: whether it starts from an earlier stage's (--init); needs: what the encoder must
    have; rival: the condition whose text a soft prompt is trained before, "" for a stage of LatentWire itself; joins:
    whether its LLMs are new readers of a finished wire.
    """

    name: str
    trains: tuple[str, ...] | None
    losses: tuple[str, ...]
    needs_llms: bool = True
    needs_checkpoint: bool = True
    needs: tuple[str, ...] = ()
    rival: str = ""
    joins: bool = False


STAGES: Registry[Stage] = Registry("stage")


def stage(found: Stage) -> Stage:
    """Register a stage."""
    assert set(found.losses) <= set(LOSSES), found.losses
    return STAGES.register(found.name)(found)


# The codebook and the adapters' linear maps in closed form; nothing is trained.
stage(Stage("codebook", trains=(), losses=(), needs_checkpoint=False))
# The encoder learns which tokens matter, from answer spans alone.
_CHOOSE = ("backbone", "span", "salience")
stage(Stage("scores", _CHOOSE, losses=("spans",), needs_llms=False, needs=("learns_spans",)))
# The adapters and the codebook, with a selection that is fixed: free queries cannot be read before they are trained.
_READ = ("codebook", "residual", "marker", "adapter", "preamble", "deep")
stage(Stage("adapters", _READ, losses=("answers",), needs=("chooses_tokens",)))
stage(Stage("joint", None, losses=("answers", "spans")))
# New LLMs learn to read a finished wire; encoder, codebook and the other adapters stay as they are.
stage(Stage("join", ("adapter", "preamble", "deep"), losses=("answers",), joins=True))
# The rivals' soft prompts.
stage(Stage("text_tuned", None, losses=("answers",), needs_checkpoint=False, rival="text"))
stage(Stage("token_budget_tuned", None, losses=("answers",), needs_checkpoint=False, rival="token_budget"))
stage(Stage("selected_text_tuned", None, losses=("answers",), rival="selected_text"))
stage(Stage("selected_words_tuned", None, losses=("answers",), rival="selected_words"))
ALL = ("codebook", "scores", "adapters", "joint")  # what `--stage all` runs, as far as the encoder has it


def needed(names: Sequence[str], encoder: type, spans: bool) -> list[Stage]:
    """The stages of these names that an encoder (its class) has on such data."""
    found = [STAGES.pick(name) for name in names]
    return [s for s in found if all(getattr(encoder, what) for what in s.needs) and (spans or s.losses != ("spans",))]
