"""What a checkpoint's embeddings look like to each LLM, beside those of text, and what changing them does.

    python latentwire/diagnostics.py --ckpt FOLDER --samples 100

Writes config.json, predictions.jsonl (as it goes), diagnostics.json, findings.md, and charts. Run again, it keeps what
is finished. Shapes: P positions, d LLM width, M latents.
"""

import dataclasses
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from latentwire.conditions.base import CONDITIONS, Sender, Setting, Slot
from latentwire.data.squad import Question, load_questions, subset
from latentwire.evaluation.answering import complete
from latentwire.evaluation.predictions import Predictions
from latentwire.evaluation.results import summarise
from latentwire.evaluation.scores import difference_ci
from latentwire.llms.frozen import FrozenLLM, load_llm
from latentwire.llms.prompts import PromptBuilder, content
from latentwire.models import wire
from latentwire.models.checkpoint import checkpoint_sha256, load_checkpoint
from latentwire.models.encoders.base import CodebookEncoder
from latentwire.models.latentwire import LatentWire
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
from latentwire.training.losses import answer_sums
from latentwire.utils.runs import (
    SCHEMA,
    RunFolder,
    default_device,
    default_dtype,
    set_seed,
    write_json,
    write_text,
)
from latentwire.utils.settings import DiagnosticsConfig, parse

KINDS = ("text", "latentwire")  # conditions whose embeddings are compared
_EXAMPLES = 8  # questions whose latents are shown word by word
_BINS = 40
_SHARES = 64  # of the spectrum, the first ones are kept
_K = 4  # answer tokens of the backward pass, as in training


def main() -> None:
    """Command line: one checkpoint."""
    diagnose(parse(DiagnosticsConfig))


def diagnose(config: DiagnosticsConfig) -> dict:
    """Run all diagnostics and return what was written to diagnostics.json."""
    device = config.device or default_device()
    dtype = config.dtype or default_dtype(device)
    config = dataclasses.replace(config, device=device, dtype=dtype)
    set_seed(config.seed)
    dataset, questions = load_questions(config.dataset, "dev")
    chosen = subset(questions, config.samples, config.seed)
    print(f"data: {dataset} dev, {len(chosen)} questions", flush=True)
    encoder, adapters, made = load_checkpoint(Path(config.ckpt), config.llm_ids)
    encoder, adapters = encoder.to(device), {name: adapter.to(device) for name, adapter in adapters.items()}
    m = made["latent_len"]
    with RunFolder(config.save_dir, _identity(config, dataset, chosen), restart="by removing it (rm -r)") as run:
        sender = Sender(encoder, config.source, "fp16")
        llms = {name: load_llm(name, llm_id, device, dtype) for name, llm_id in config.llm_ids.items()}
        settings = [
            Setting(llm, PromptBuilder(llm.tokenizer, config.source, config.llm_wordings[name]), sender, adapters[name],
                    "fp16", made["d_z"], (), chosen, config.seed)
            for name, llm in llms.items()
        ]  # fmt: skip
        predictions = Predictions(run.path / "predictions.jsonl")
        print("looking at the embeddings ...", flush=True)
        model = LatentWire(encoder, adapters, config.source, m)
        found = {s.llm.name: _describe(s, m) | _backward(s, model, chosen[: config.batch_size]) for s in settings}
        results = {
            "schema": SCHEMA, "checkpoint": config.ckpt, "dataset": dataset, "split": "dev", "n": len(chosen),
            "seed": config.seed, "source": config.source, "m": m, "d_z": made["d_z"], "dtype": dtype, "llms": found,
            "compression": _compression(settings, m),
            "interventions": [row for s in settings for row in _interventions(s, m, predictions, config)],
        }  # fmt: skip
        results |= {"latents": _latents(settings, m, predictions)} | run.origin
        write_json(run.path / "diagnostics.json", results)
        write_text(run.path / "findings.md", findings_markdown(results))
        charts.embeddings(found).savefig(run.path / "embeddings.png", dpi=130)
        charts.interventions(results["interventions"], list(found)).savefig(run.path / "interventions.png", dpi=130)
    print(f"wrote {run.path / 'findings.md'} and diagnostics.json")
    return results


def _identity(config: DiagnosticsConfig, dataset: str, chosen: Sequence[Question]) -> dict:
    identity = dataclasses.asdict(config) | {
        "dataset": dataset,
        "llm_ids": list(config.llm_ids.items()),
        "wordings": config.llm_wordings,
        "questions_sha256": hashlib.sha256(repr(chosen).encode()).hexdigest()[:16],
        "checkpoint_sha256": checkpoint_sha256(Path(config.ckpt))[:16],
    }
    del identity["save_dir"]
    return identity


def _slots(setting: Setting, kind: str, m: int) -> list[Tensor]:
    """The slots [P_i, d] of all questions, float32 on the CPU."""
    return [slot.embeds.float().cpu() for slot in CONDITIONS[kind].build(setting, setting.pool, m)]


def _describe(setting: Setting, m: int) -> dict:
    """Figures of one LLM: its vocabulary, and the slots of each kind."""
    llm, table = setting.llm, setting.llm.embedding_table()
    slots = {kind: _slots(setting, kind, m) for kind in KINDS}
    embeddings = {kind: _figures(llm, rows, table) for kind, rows in slots.items()}
    vocabulary = float(rms(table))
    z = torch.cat(setting.sender.encoder.encode(setting.pool, setting.prompts.source, m)).cpu()
    torch.manual_seed(setting.seed)
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


def _backward(setting: Setting, model: LatentWire, questions: Sequence[Question]) -> dict:
    """Length of the gradient of the answers' cross-entropy by component, from one backward pass of this LLM alone."""
    llm, prompts = setting.llm, setting.prompts
    model.eval().zero_grad()
    rows = model(questions).embeds[llm.name]
    labels = [prompts.label_ids(q.answers[0], _K) for q in questions]
    scored = llm.loss_with_prefix(prompts.head, rows, [prompts.tail(q.question) for q in questions], labels)
    (answer_sums(scored)["ce"] / sum(map(len, labels))).backward()
    norms = {}
    for name, params in model.components().items():
        gradients = [p.grad.norm() for p in params if p.grad is not None]
        if gradients:
            norms[name] = float(torch.stack(gradients).norm())
    model.zero_grad()
    return {"gradient_norms": norms}


def _compression(settings: Sequence[Setting], m: int) -> dict:
    """Means over the questions: bytes of text and wire, and for each LLM positions and bytes of keys and values."""
    first = settings[0]
    texts = [content(first.prompts.source, q.context, q.question).text.encode() for q in first.pool]
    z = [one[None].cpu().numpy() for one in first.sender.encoder.encode(first.pool, first.prompts.source, m)]
    positions = {
        s.llm.name: {kind: float(np.mean([len(slot) for slot in _slots(s, kind, m)])) for kind in KINDS}
        for s in settings
    }
    return {
        "text_bytes": float(np.mean([len(text) for text in texts])),
        "zlib_bytes": float(np.mean([len(zlib.compress(text, 9)) for text in texts])),
        "wire_bytes": {codec: float(np.mean([len(wire.pack(one, codec)) for one in z])) for codec in wire.CODECS},
        "positions": positions,
        "kv_bytes": {
            s.llm.name: {kind: s.llm.kv_bytes * n for kind, n in positions[s.llm.name].items()} for s in settings
        },
    }


def _interventions(setting: Setting, m: int, predictions: Predictions, config: DiagnosticsConfig) -> list[dict]:
    """One row an intervention: its scores, and the paired difference of F1 to the unchanged embeddings."""
    table = setting.llm.embedding_table()
    vocabulary = Moments.of(table)
    paragraphs = [q.paragraph for q in setting.pool]
    rows = []
    for kind in KINDS:
        around = Surroundings(Moments.of(torch.cat(_slots(setting, kind, m))), vocabulary, table)
        unchanged: list[float] = []
        for name, change in INTERVENTIONS.items():
            lines = _answers(setting, kind, name, change, around, m, predictions, config)
            f1 = [lines[q.id]["f1"] for q in setting.pool]
            unchanged = unchanged or f1
            scores = summarise(lines, setting.pool, config.seed)
            kept = ("n", "f1", "f1_ci95", "first_token_acc", "nll_per_token", "empty_answers")
            rows.append(
                {"llm": setting.llm.name, "embeddings": kind, "intervention": name}
                | {key: scores[key] for key in kept}
                | {
                    "f1_minus_none": float(np.mean(f1) - np.mean(unchanged)),
                    "f1_minus_none_ci95": difference_ci(f1, unchanged, paragraphs, config.seed),
                }
            )
    return rows


def _answers(
    setting: Setting, kind: str, name: str, change: Intervention, around: Surroundings, m: int,
    predictions: Predictions, config: DiagnosticsConfig,
) -> dict[str, dict]:  # fmt: skip
    """Prediction lines of one kind of embeddings after one intervention."""
    build = CONDITIONS[kind].build

    def changed(setting: Setting, questions: Sequence[Question], m: int) -> list[Slot]:
        slots = build(setting, questions, m)
        if name == "none":
            return slots  # bit by bit what the evaluation reads
        return [Slot(change(slot.embeds.float().cpu(), around), slot.sent) for slot in slots]

    condition = dataclasses.replace(CONDITIONS[kind], build=changed)
    label = {"condition": f"{kind}: {name}", "m": m if "m" in condition.uses else None, "llm": setting.llm.name}
    return complete(predictions, label, setting, condition, m, config.batch_size, config.max_new_tokens)


def _latents(settings: Sequence[Setting], m: int, predictions: Predictions) -> list[dict]:
    """For a few questions, the token that leads each latent, and what each LLM's vocabulary has next to it."""
    encoder, shown = settings[0].sender.encoder, settings[0].pool[:_EXAMPLES]
    if not isinstance(encoder, CodebookEncoder):
        return []  # free queries stand for no token
    few = [dataclasses.replace(s, pool=shown) for s in settings]
    neighbours = {s.llm.name: _neighbours(s, _slots(s, "latentwire", m)) for s in few}
    answers: Mapping[str, Mapping] = {
        s.llm.name: predictions.of({"condition": "latentwire: none", "m": m, "llm": s.llm.name}) for s in settings
    }
    return [
        {
            "id": q.id, "question": q.question, "answers": list(q.answers),
            "predictions": {name: lines[q.id]["prediction"] for name, lines in answers.items()},
            "words": [
                {"word": encoder.tokenizer.decode([token]),
                 "nearest": {name: found[i][place] for name, found in neighbours.items()}}
                for place, token in enumerate(encoder.select(q, settings[0].prompts.source, m))
            ],
        }
        for i, q in enumerate(shown)
    ]  # fmt: skip


def _neighbours(setting: Setting, slots: Sequence[Tensor]) -> list[list[tuple[str, float]]]:
    """The vocabulary's token next to each vector of each slot, and its cosine."""
    ids, cosines = nearest(torch.cat(list(slots)), setting.llm.embedding_table())
    words = [setting.llm.tokenizer.decode([i]) for i in ids.tolist()]
    found = iter(zip(words, cosines.tolist(), strict=True))
    return [[next(found) for _ in slot] for slot in slots]
