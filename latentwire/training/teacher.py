"""The teacher: what the same frozen LLM says of the answer's tokens when it reads the whole text.

Its most likely tokens are computed once and kept on disk, in blocks whose name is a hash of everything they depend on:
what is stale is never found, and a block that was cut off or altered (its own hash tells) is computed again.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from latentwire.data.question import Question
from latentwire.llms.frozen import FrozenLLM, PrefixLoss
from latentwire.llms.known import cache_dir
from latentwire.llms.prompts import PromptBuilder
from latentwire.utils.cli import reason

TOP = 32  # tokens kept at each label
BLOCK = 256  # questions per file
TENSORS = ("ids", "logprobs", "right", "real")
_BATCH = 16


@dataclass
class TeacherLine:
    """One question's labels. ids, logprobs: [labels, TOP]; right: [labels] bool, where the teacher's first choice is
    the label."""

    ids: Tensor
    logprobs: Tensor
    right: Tensor


def teach(
    llm: FrozenLLM,
    weights_sha256: str,
    prompts: PromptBuilder,
    questions: Sequence[Question],
    k: int,
    *,
    soft: Tensor | None = None,
    cache: Path | None = None,
    share: tuple[int, int] = (0, 1),
) -> dict[str, TeacherLine]:
    """The teacher's lines by question id, for each question's labels (`PromptBuilder.labels`). soft: a learned prompt
    [vectors, d] before each text; cache: default LATENTWIRE_CACHE; share: which process this is of how many: each
    begins with blocks of its own, and finds those of the others."""
    cache = cache or cache_dir()
    folder, locks = cache / "teacher", cache / "teacher_locks"
    for made in (folder, locks):
        made.mkdir(parents=True, exist_ok=True)
    ordered = sorted(questions, key=lambda q: (len(q.context), q.id))
    lines: dict[str, TeacherLine] = {}
    starts, (rank, world) = [*range(0, len(ordered), BLOCK)], share
    own = len(starts) * rank // world
    with tqdm(total=len(ordered), desc=f"{llm.name} teacher", unit="q", mininterval=1, disable=rank > 0) as bar:
        for start in starts[own:] + starts[:own]:
            block = ordered[start : start + BLOCK]
            labels = (k, "and the end")
            depends = (
                weights_sha256,
                str(llm.dtype),
                prompts.head,
                prompts.source,
                prompts.tail(""),
                labels,
                TOP,
                block,
                *(() if soft is None else (soft.tolist(),)),
            )
            path = folder / f"{hashlib.sha256(repr(depends).encode()).hexdigest()[:32]}.safetensors"
            with FileLock(locks / f"{path.stem}.lock"):  # trainings that share a block compute it once
                tensors = _read(path)
                if tensors is None:
                    tensors = _compute(llm, prompts, block, k, soft, bar)
                    _write(path, tensors)
                else:
                    bar.update(len(block))
            for row, question in enumerate(block):
                real = tensors["real"][row]
                lines[question.id] = TeacherLine(*(tensors[key][row][real] for key in ("ids", "logprobs", "right")))
    return lines


def _read(path: Path) -> dict[str, Tensor] | None:
    """A block that is whole, or None."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in TENSORS}
            return tensors if (file.metadata() or {}).get("sha256") == _sha256(tensors) else None
    except SafetensorError:
        return None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """A whole block or none; OSError where there is no room for it."""
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, {"sha256": _sha256(tensors)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        temporary.unlink(missing_ok=True)
        remedy = "make room, or set LATENTWIRE_CACHE to a larger disk; what was finished is kept"
        raise OSError(f"cannot write what the teacher read to {path.parent} ({reason(error)}); {remedy}") from error


def _sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in TENSORS:
        digest.update(tensors[key].numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def score_texts(
    llm: FrozenLLM, prompts: PromptBuilder, batch: Sequence[Question], k: int, soft: Tensor | None = None
) -> PrefixLoss:
    """What the LLM says of the labels when it reads the whole texts, behind a learned prompt if there is one."""
    labels = [prompts.labels(q.answers[0], k) for q in batch]
    texts = [llm.embed(prompts.plain(prompts.content_text(q.context, q.question))) for q in batch]
    return llm.loss_with_prefix(
        prompts.head,
        texts if soft is None else [torch.cat([soft.to(text), text]) for text in texts],
        [prompts.tail(q.question) for q in batch],
        [one.ids for one in labels],
        learned=[one.learned for one in labels],
    )


@torch.no_grad()
def top_lines(scored: PrefixLoss) -> list[TeacherLine]:
    """The TOP tokens of each question's labels, by probability."""
    top = scored.logits.float().log_softmax(dim=2).topk(TOP, dim=2)
    right = top.indices[..., 0] == scored.labels
    return [
        TeacherLine(top.indices[row, real], top.values[row, real], right[row, real])
        for row, real in enumerate(scored.mask)
    ]


def _compute(
    llm: FrozenLLM, prompts: PromptBuilder, block: Sequence[Question], k: int, soft: Tensor | None, bar: tqdm
) -> dict[str, Tensor]:
    """ids int32, logprobs float16 [n, most labels, TOP], right and real bool [n, most labels], left-aligned."""
    lines = []
    for start in range(0, len(block), _BATCH):
        batch = block[start : start + _BATCH]
        for line in top_lines(score_texts(llm, prompts, batch, k, soft)):
            real = torch.ones(len(line.ids), dtype=torch.bool)
            lines.append((line.ids.int().cpu(), line.logprobs.half().cpu(), line.right.cpu(), real))
        bar.update(len(batch))
    padded = [pad_sequence(each, batch_first=True) for each in zip(*lines, strict=True)]
    return dict(zip(("ids", "logprobs", "right", "real"), padded, strict=True))
