"""Stage 0: encoder and adapters in closed form, without any training."""

from collections.abc import Mapping, Sequence

from latentwire.data.squad import load_questions, subset
from latentwire.llms.frozen import FrozenLLM
from latentwire.models.adapters import Adapter
from latentwire.models.closed_form import build_interface, interface_report, random_interface, token_counts, wire_table
from latentwire.models.encoders.base import CodebookEncoder

FIT_QUESTIONS = 5000  # train questions whose text weights the codebook and fits the PCA


def fit_texts(dataset: str) -> list[str]:
    """Contexts and questions of train, for what is fitted in closed form."""
    some = subset(load_questions(dataset, "train")[1], FIT_QUESTIONS, seed=0)
    return sorted({q.context for q in some}) + [q.question for q in some]


def closed_form(
    llms: Mapping[str, FrozenLLM], texts: Sequence[str], d_z: int, random_seed: int | None = None
) -> tuple[CodebookEncoder, dict[str, Adapter], dict]:
    """Encoder, adapters, and `interface_report`'s figures. The wire's vocabulary is that of the first LLM.

    random_seed: draw an interface that knows nothing instead, to learn what the closed form is worth.
    """
    tokenizer = next(iter(llms.values())).tokenizer
    tables = {name: wire_table(llm, tokenizer) for name, llm in llms.items()}
    counts = token_counts(tokenizer, texts)
    interface = build_interface(tables, counts, d_z)
    if random_seed is not None:
        interface = random_interface(interface, random_seed)
    encoder = CodebookEncoder.from_codebook(tokenizer, interface.codebook)
    adapters = {name: Adapter.from_closed_form(*parts) for name, parts in interface.adapters.items()}
    return encoder, adapters, interface_report(interface, tables, counts)
