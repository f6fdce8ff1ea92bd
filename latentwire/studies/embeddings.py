"""What a checkpoint's embeddings look like to each LLM, beside those of text, and what changing them does.

Shapes: P positions, d LLM width, M latents.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import set_seed

from latentwire.conditions.base import CONDITIONS, Reader, Sender, Shared, Slot, readers
from latentwire.data.content import content
from latentwire.data.question import Question, QuestionSet, subset
from latentwire.data.squad import load
from latentwire.evaluation.answering import complete
from latentwire.evaluation.predictions import Predictions
from latentwire.evaluation.results import summarise
from latentwire.evaluation.scores import difference_ci
from latentwire.llms.frozen import FrozenLLM
from latentwire.models import wire
from latentwire.models.checkpoint import load_checkpoint
from latentwire.models.latentwire import LatentWire
from latentwire.models.weights import checkpoint_sha256
from latentwire.reporting import charts
from latentwire.studies.findings import findings_markdown
from latentwire.studies.geometry import (
    INTERVENTIONS,
    Intervention,
    Moments,
    Surroundings,
    effective_rank,
    mean_cosine,
    nearest,
    rms,
    spectrum,
)
from latentwire.studies.settings import DiagnosticsSettings
from latentwire.training.losses import answer_sums
from latentwire.utils.cli import SCHEMA
from latentwire.utils.files import write_json, write_text
from latentwire.utils.machine import on_this_machine
from latentwire.utils.runs import RunFolder, digest, identity

KINDS = ("text", "latentwire")  # conditions whose embeddings are compared
_EXAMPLES = 8  # questions whose latents are shown word by word
_BINS = 40
_SHARES = 64  # of the spectrum, the first ones are kept
_K = 4  # answer tokens of the backward pass, as in training
_NO_PART = ("save_dir", "train_samples")  # of what makes two diagnostics the same
_KEPT = ("n", "paragraphs", "f1", "f1_ci95", "first_token_acc", "nll_per_token", "empty_answers")


@dataclass
class Subject:
    """What is looked at: the checkpoint's readers and wire at M = m, on the chosen questions."""

    config: DiagnosticsSettings
    chosen: QuestionSet
    readers: Sequence[Reader]
    shared: Shared
    m: int

    def slots(self, reader: Reader, kind: str) -> list[Tensor]:
        """The slots [P_i, d] of all questions, float32 on the CPU, without what is the same in all of them."""
        found = CONDITIONS[kind].slots(reader, self.shared.questions, self.m, self.shared)
        return [slot.embeds[slot.constant :].float().cpu() for slot in found]


def diagnose(config: DiagnosticsSettings) -> dict:
    """Run all diagnostics and return what was written to diagnostics.json."""
    config = on_this_machine(config)
    set_seed(config.seed)
    dev = load(config.dataset, "dev")
    chosen = dataclasses.replace(dev, questions=subset(dev.questions, config.eval_samples, config.seed))
    print(f"data: {chosen.name} dev, {len(chosen.questions)} questions", flush=True)
    encoder, adapters, made = load_checkpoint(Path(config.ckpt), config.llm_ids)
    source = config.source if made["stage"] == "codebook" else made.get("source", config.source)
    if source != config.source:
        print(f"note: {config.ckpt} was trained with source {source!r}, which is used instead of {config.source!r}")
        config = dataclasses.replace(config, source=source)
    encoder, m = encoder.to(config.device), made["latent_len"]
    with RunFolder(config.save_dir, _identity(config, chosen), may_differ=("batch_size",)) as run:
        shared = Shared(chosen.questions, config.seed, Sender(encoder, config.source, "fp16"), d_z=made["d_z"])
        subject = Subject(config, chosen, readers(config, config.source, adapters), shared, m)
        predictions = Predictions(run.path / "predictions.jsonl")
        print("looking at the embeddings ...", flush=True)
        model = LatentWire(encoder, adapters, config.source, m)
        found = {r.llm.name: _describe(subject, r) | _backward(subject, r, model) for r in subject.readers}
        results = {
            "schema": SCHEMA, "checkpoint": config.ckpt, "dataset": chosen.name, "split": "dev",
            "n": len(chosen.questions), "seed": config.seed, "source": config.source, "m": m, "d_z": made["d_z"],
            "dtype": config.dtype, "llms": found, "compression": _compression(subject),
            "interventions": [row for r in subject.readers for row in _interventions(subject, r, predictions)],
        }  # fmt: skip
        results |= {"latents": _latents(subject, predictions)} | run.origin
        write_json(run.path / "diagnostics.json", results)
        write_text(run.path / "findings.md", findings_markdown(results))
        charts.embeddings(found).savefig(run.path / "embeddings.png", dpi=130)
        charts.interventions(results["interventions"], list(found)).savefig(run.path / "interventions.png", dpi=130)
    print(f"wrote {run.path / 'findings.md'} and diagnostics.json")
    return results


def _identity(config: DiagnosticsSettings, chosen: QuestionSet) -> dict:
    """What makes two diagnostics the same one."""
    return identity(
        config, _NO_PART,
        dataset=chosen.name,
        llm_ids=list(config.llm_ids.items()),
        wordings=config.llm_wordings,
        questions_sha256=digest(chosen.questions),
        checkpoint_sha256=checkpoint_sha256(Path(config.ckpt))[:16],
    )  # fmt: skip


def _describe(subject: Subject, reader: Reader) -> dict:
    """Figures of one LLM: its vocabulary, and the slots of each kind."""
    llm, table = reader.llm, reader.llm.embedding_table()
    slots = {kind: subject.slots(reader, kind) for kind in KINDS}
    embeddings = {kind: _figures(llm, rows, table) for kind, rows in slots.items()}
    vocabulary = float(rms(table))
    sender = subject.shared.sender
    z = torch.cat(sender.encoder.encode(subject.shared.questions, sender.source, subject.m)).cpu()
    torch.manual_seed(subject.config.seed)
    with torch.no_grad():
        fresh = nn.Linear(z.shape[1], llm.width)(z)
    # What one may hold against an embedding's RMS, and how far off each is.
    magnitudes = {
        "the learned prefix": float(rms(torch.cat(slots["latentwire"]))) / vocabulary,
        "a latent before the adapter": float(rms(z)) / vocabulary,
        "a vector after a LayerNorm (RMS 1)": 1 / vocabulary,
        "a latent through a freshly initialised linear layer": float(rms(fresh)) / vocabulary,
        "an embedding's length (instead of its RMS)": llm.width**0.5,
    }
    return {
        "llm_id": llm.id, "vocabulary_rms": vocabulary, "magnitudes": magnitudes, "embeddings": embeddings,
    }  # fmt: skip


def _figures(llm: FrozenLLM, slots: Sequence[Tensor], table: Tensor) -> dict:
    rows = torch.cat(list(slots))
    shares = spectrum(rows)
    return {
        "rms_per_token": _histogram(rms(rows, dim=1)),
        "rms_per_dimension": _histogram(rms(rows, dim=0)),
        "first_norm": _histogram(rms(llm.first_norm(rows), dim=1)),
        "nearest_cosine": _histogram(nearest(rows, table)[1]),
        "effective_rank": effective_rank(shares),
        "spectrum": shares[:_SHARES].tolist(),
        "mean_cosine": float(np.mean([mean_cosine(slot) for slot in slots])),
    }


def _histogram(values: Tensor) -> dict:
    """Counts over equal bins, and what a reader wants to compare."""
    values = values.double().numpy()
    margin = 0.005 * np.abs(values).max()  # tokens are all at cosine 1: bins need a width
    counts, edges = np.histogram(values, bins=_BINS, range=(values.min() - margin, values.max() + margin))
    p5, p50, p95 = np.percentile(values, (5, 50, 95))
    return {
        "edges": edges.tolist(), "counts": counts.tolist(), "mean": float(values.mean()),
        "p5": float(p5), "p50": float(p50), "p95": float(p95),
    }  # fmt: skip


def _backward(subject: Subject, reader: Reader, model: LatentWire) -> dict:
    """Length of the gradient of the answers' cross-entropy by component, from one backward pass of this LLM alone."""
    llm, prompts, questions = reader.llm, reader.prompts, subject.shared.questions[: subject.config.batch_size]
    model.eval().zero_grad()
    slots = model(questions)
    rows, deltas = slots.embeds[llm.name], slots.deltas.get(llm.name, ())
    labels, tails = [prompts.labels(q.answers[0], _K) for q in questions], [prompts.tail(q.question) for q in questions]
    learned = [one.learned for one in labels]
    scored = llm.loss_with_prefix(prompts.head, rows, tails, [one.ids for one in labels], deltas, learned)
    (answer_sums(scored)["ce"] / sum(map(sum, learned))).backward()
    norms = {}
    for found in model.components():
        gradients = [p.grad.norm() for p in found.parameters if p.grad is not None]
        if gradients:
            norms[found.name] = float(torch.stack(gradients).norm())
    model.zero_grad()
    return {"gradient_norms": norms}


def _compression(subject: Subject) -> dict:
    """Means over the questions: bytes of text and wire, and for each LLM positions and bytes of keys and values."""
    source, sender, questions = subject.config.source, subject.shared.sender, subject.shared.questions
    texts = [content(source, q.context, q.question).text.encode() for q in questions]
    z = [one[None].cpu().numpy() for one in sender.encoder.encode(questions, source, subject.m)]
    positions = {
        reader.llm.name: {kind: float(np.mean([len(slot) for slot in subject.slots(reader, kind)])) for kind in KINDS}
        for reader in subject.readers
    }
    return {
        "text_bytes": float(np.mean([len(text) for text in texts])),
        "zlib_bytes": float(np.mean([len(zlib.compress(text, 9)) for text in texts])),
        "wire_bytes": {codec: float(np.mean([len(wire.pack(one, codec)) for one in z])) for codec in wire.SCALAR},
        "positions": positions,
        "kv_bytes": {
            r.llm.name: {kind: r.llm.kv_bytes * n for kind, n in positions[r.llm.name].items()} for r in subject.readers
        },
    }


def _interventions(subject: Subject, reader: Reader, predictions: Predictions) -> list[dict]:
    """One row per intervention: its scores, and the paired difference of F1 to the unchanged embeddings."""
    table, questions, seed = reader.llm.embedding_table(), subject.shared.questions, subject.config.seed
    vocabulary = Moments.of(table)
    paragraphs = [q.paragraph for q in questions]
    rows = []
    for kind in KINDS:
        around = Surroundings(Moments.of(torch.cat(subject.slots(reader, kind))), vocabulary, table)
        unchanged: list[float] = []
        for name, change in INTERVENTIONS.items():
            lines = _answers(subject, reader, kind, (name, change), around, predictions)
            f1 = [lines[q.id]["f1"] for q in questions]
            unchanged = unchanged or f1
            scores = summarise(lines, questions, seed)
            rows.append(
                {"llm": reader.llm.name, "embeddings": kind, "intervention": name}
                | {key: scores[key] for key in _KEPT}
                | {
                    "f1_minus_none": float(np.mean(f1) - np.mean(unchanged)),
                    "f1_minus_none_ci95": difference_ci(f1, unchanged, paragraphs, seed),
                }
            )
    return rows


def _answers(
    subject: Subject,
    reader: Reader,
    kind: str,
    intervention: tuple[str, Intervention],
    around: Surroundings,
    predictions: Predictions,
) -> dict[str, dict]:
    """Prediction lines of one kind of embeddings after one intervention (its name and its function)."""
    condition, m, (name, change) = CONDITIONS[kind], subject.m, intervention

    def changed(reader: Reader, questions: Sequence[Question], m: int, shared: Shared) -> list[Slot]:
        slots = condition.slots(reader, questions, m, shared)
        if name == "none":
            return slots  # bit by bit what the evaluation reads
        return [dataclasses.replace(slot, embeds=_changed(slot, change, around)) for slot in slots]

    label = {"condition": f"{kind}: {name}", "m": m if "m" in condition.uses else None, "llm": reader.llm.name}
    return complete(
        predictions, label, dataclasses.replace(condition, slots=changed), m, reader, subject.shared,
        subject.chosen.score, subject.config.batch_size, subject.config.max_new_tokens,
    )  # fmt: skip


def _changed(slot: Slot, change: Intervention, around: Surroundings) -> Tensor:
    """The slot's embeddings, all but its constant ones changed."""
    constant, own = slot.embeds.float().cpu().tensor_split([slot.constant])
    return torch.cat([constant, change(own, around)])


def _latents(subject: Subject, predictions: Predictions) -> list[dict]:
    """For a few questions, the token that leads each latent, and what each LLM's vocabulary has next to it."""
    encoder, shown = subject.shared.sender.encoder, subject.shared.questions[:_EXAMPLES]
    if not encoder.chooses_tokens:
        return []  # free queries stand for no token
    neighbours = {r.llm.name: _neighbours(r, subject.slots(r, "latentwire")[:_EXAMPLES]) for r in subject.readers}
    answers: Mapping[str, Mapping] = {
        name: predictions.of({"condition": "latentwire: none", "m": subject.m, "llm": name}) for name in neighbours
    }
    chosen = encoder.select(shown, subject.config.source, subject.m)
    return [
        {
            "id": q.id, "question": q.question, "answers": list(q.answers),
            "predictions": {name: lines[q.id]["prediction"] for name, lines in answers.items()},
            "words": [
                {"word": encoder.tokenizer.decode([token]),
                 "nearest": {name: found[i][place] for name, found in neighbours.items()}}
                for place, token in enumerate(chosen[i])
            ],
        }
        for i, q in enumerate(shown)
    ]  # fmt: skip


def _neighbours(reader: Reader, slots: Sequence[Tensor]) -> list[list[tuple[str, float]]]:
    """The vocabulary's token next to each vector of each slot, and its cosine."""
    ids, cosines = nearest(torch.cat(list(slots)), reader.llm.embedding_table())
    words = [reader.llm.tokenizer.decode([i]) for i in ids.tolist()]
    found = iter(zip(words, cosines.tolist(), strict=True))
    return [[next(found) for _ in slot] for slot in slots]
