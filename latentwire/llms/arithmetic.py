"""Operations, bytes and money, from the shapes of models: no model is loaded.

A weight takes two operations per position forward, and two more for the gradient of its input (Kaplan et al. 2020,
arXiv:2001.08361, section 2.1); the gradient of the weight itself, two more, is computed of trained parts alone. One
position's attention takes 4 d operations per layer for each position that it looks at, and is counted in full, without
what a causal kernel leaves out. Letters: T positions that are read, S positions that stand before them in the cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HOUR = 3600  # seconds
HALF = 2  # bytes of a value in bfloat16


@dataclass(frozen=True)
class Shape:
    """A transformer. inner: width of its MLP; key_width: of a layer's keys, and of its values; products: matrices of
    its MLP; tied: whether the embeddings are the output's, too; heads: of its queries; query_width: of all of them;
    counted: all weights; these three are 0 where they are not known."""

    layers: int
    width: int
    inner: int
    key_width: int
    vocabulary: int
    products: int = 3
    tied: bool = False
    heads: int = 0
    query_width: int = 0
    counted: int = 0

    @property
    def body(self) -> int:
        """Weights that every position is multiplied with."""
        return self.layers * (
            2 * self.width * self.width + 2 * self.width * self.key_width + self.products * self.width * self.inner
        )

    @property
    def parameters(self) -> int:
        """All weights; without norms and biases, where they were not counted."""
        return self.counted or self.body + (1 if self.tied else 2) * self.vocabulary * self.width

    @property
    def kv_bytes(self) -> int:
        """What one position leaves in the cache."""
        return self.layers * 2 * self.key_width * HALF

    def forward(self, read: float, before: float = 0.0, logits: float = 0.0) -> float:
        """Operations to read T positions behind S others; logits: positions whose next token is predicted."""
        attention = 4 * self.layers * self.width * read * (before + read)
        return 2 * self.body * read + attention + 2 * self.vocabulary * self.width * logits


# Of the LLMs that were measured here, and of those that the project is for; llms/known.py has the same shapes.
LLMS = {
    "llama3.1-8b": Shape(32, 4096, 14336, 1024, 128256),
    "qwen2.5-7b": Shape(28, 3584, 18944, 512, 152064),
    "smollm2-135m": Shape(30, 576, 1536, 192, 49152, tied=True),
    "gemma-3-270m": Shape(18, 640, 2048, 256, 262144, tied=True),
    "qwen2.5-coder-0.5b": Shape(24, 896, 4864, 128, 151936),  # its offline form keeps the output's matrix apart
}
ENCODER = Shape(6, 384, 1536, 384, 0, products=2)  # all-MiniLM-L6-v2, the backbone of the shipped checkpoint


def known_shape(llm_id: str) -> Shape | None:
    """The shape of an LLM of LLMS by its id; None for any other."""
    return LLMS.get(llm_id.removeprefix("offline:").removesuffix("-instruct"))


def shape_in(config: "PretrainedConfig") -> Shape:
    """The shape that a model's configuration tells."""
    inner = config.get_text_config(decoder=True)
    heads = getattr(inner, "num_key_value_heads", None) or inner.num_attention_heads
    head = getattr(inner, "head_dim", None) or inner.hidden_size // inner.num_attention_heads
    return Shape(
        inner.num_hidden_layers, inner.hidden_size, getattr(inner, "intermediate_size", 4 * inner.hidden_size),
        heads * head, inner.vocab_size, heads=inner.num_attention_heads, query_width=inner.num_attention_heads * head,
    )  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """Positions around what is read. head: worked examples, read once and shared; tail: question and `Answer:`."""

    head: int = 200
    tail: int = 20


# The prompts of the speed that was measured: latentwire/llms/prompts.py in the wording of each.
MEASURED = {"smollm2-135m": Prompt(182, 18), "qwen2.5-coder-0.5b": Prompt(220, 22)}


def training_flops(
    llms: Mapping[str, Shape], prompt: Prompt, text: int, m: int, k: int, encoder: Shape = ENCODER
) -> dict[str, float]:
    """Operations of one question in one pass, by part; the teacher reads the text once in all passes.

    The LLMs are frozen: forward and the gradient of their inputs. The encoder is trained: forward and both gradients.
    text: tokens of the context; m: latents; k: answer tokens.
    """
    read = m + prompt.tail + k
    return {
        "LLMs": 2 * sum(llm.forward(read, prompt.head, k + 1) for llm in llms.values()),
        "encoder": 3 * encoder.forward(text + prompt.tail),
        "teacher, once": sum(llm.forward(text + prompt.tail + k, prompt.head, k + 1) for llm in llms.values()),
    }


def answer_flops(llm: Shape, prompt: Prompt, slot: float, tokens: int) -> tuple[float, float]:
    """(prefill, decoding) operations of one question whose context takes `slot` positions; tokens: of the answer."""
    read = slot + prompt.tail
    return llm.forward(read, prompt.head, 1), tokens * llm.forward(1, prompt.head + read, 1)


def two_terms(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """(seconds that any pass takes, operations per second) of two measured (operations, seconds)."""
    rate = (second[0] - first[0]) / (second[1] - first[1])
    return first[1] - first[0] / rate, rate
