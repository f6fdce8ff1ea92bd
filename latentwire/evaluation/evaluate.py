"""One evaluation: settings -> plan (questions, conditions) -> readers and what they share -> lines -> results.json."""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TextIO

from torch import Tensor
from transformers import set_seed

from latentwire.conditions.base import (
    Condition,
    Reader,
    Sender,
    Shared,
    parse_conditions,
    readers,
    require_heads,
    require_positions,
)
from latentwire.data.question import Question, QuestionSet, named, subset
from latentwire.data.squad import load
from latentwire.evaluation.answering import answer, complete
from latentwire.evaluation.predictions import Predictions, reusable
from latentwire.evaluation.results import compare, critical_lines, further_lines, row_key, summarise
from latentwire.evaluation.scores import show_interval
from latentwire.evaluation.settings import (
    DEFAULT_D_Z,
    DEFAULT_LATENT_LEN,
    DEFAULT_SAMPLES,
    AnsweringSettings,
    EvalSettings,
)
from latentwire.evaluation.sizes import bytes_table
from latentwire.llms.loading import shape_of
from latentwire.llms.pace import ANSWERING, Work, answer_operations, text_tokens
from latentwire.llms.prompts import WORDINGS
from latentwire.models.adapters import SOFT_VECTORS, Adapter
from latentwire.models.checkpoint import load_checkpoint, save_checkpoint
from latentwire.models.closed_form import closed_form, fit_texts
from latentwire.models.encoders.base import ENCODERS
from latentwire.models.weights import checkpoint_sha256, load_soft_prompts, read_config, train_seed, wire_id
from latentwire.models.wire import COMPACT, SCALAR
from latentwire.models.wire.compact import tables_of
from latentwire.utils.cli import SCHEMA, listed, refuse_long, require
from latentwire.utils.files import read_json, write_json
from latentwire.utils.machine import on_this_machine
from latentwire.utils.runs import RunFolder, digest, identity

LONG_ANSWERS = 2000  # an evaluation of this many answers or more is timed before it starts
PROBE_QUESTIONS = 16
_RESTART = "with --fresh_eval (FRESH_EVAL=1 for the scripts)"
_ELSEWHERE = ("batch_size", "ckpt", "tuned")  # settings that may change: hashes tell checkpoints apart
# Settings that do not make two evaluations different ones, or whose questions' digest does.
_NO_PART = ("save_dir", "fresh_eval", "conditions", "llms", "reuse", "skip", "ids", "estimate", "json")


@dataclass
class Plan:
    """An evaluation, resolved once. config: nothing in it is open; chosen: the questions; conditions: each with its M;
    train_texts: what the closed form and PCA are fitted on."""

    config: EvalSettings
    chosen: QuestionSet
    conditions: list[tuple[Condition, int]]
    train_texts: list[str]

    @cached_property
    def identity(self) -> dict:
        """What makes two evaluations the same one. Conditions are left out: more of them extend a run."""
        config = self.config
        tuned = sorted(Path(config.tuned).glob("*/checkpoint_best")) if config.tuned else []
        return identity(
            config, _NO_PART,
            dataset=self.chosen.name,
            samples=len(self.chosen.questions),
            llm_ids=list(config.llm_ids.items()),  # in order: the first one's vocabulary is the wire's
            wordings=config.llm_wordings,
            questions_sha256=digest(self.chosen.questions),
            train_sha256=digest(self.train_texts),
            checkpoint_sha256=checkpoint_sha256(Path(config.ckpt))[:16] if config.ckpt else None,
            tuned_sha256=[checkpoint_sha256(folder)[:16] for folder in tuned],
            **({"tables": tables_of(Path(config.ckpt)).id.hex()} if config.codec in COMPACT else {}),
        )  # fmt: skip

    @property
    def scalar(self) -> str:
        """The codec of what has no tables for a compact one: PCA, and the wire before training, which then lose
        nothing by their codec."""
        return self.config.codec if self.config.codec in SCALAR else SCALAR[0]


def evaluate(config: EvalSettings) -> dict | None:
    """Run one evaluation and return what it wrote to results.json; None if only its time was asked for."""
    set_seed(config.seed)
    plan = resolve(config)
    config = plan.config
    reused = reusable(config.reuse, plan.identity, plan.conditions, config.llm_names) if config.reuse else []
    if config.estimate:
        ready, shared, _ = _ready(plan, None)
        predictions = Predictions(Path(config.save_dir) / "predictions.jsonl", read_only=True)
        predictions.keep(reused)
        _announce(predictions, ready, shared, plan)
        return None
    with RunFolder(config.save_dir, plan.identity, config.fresh_eval, _RESTART, may_differ=_ELSEWHERE) as run:
        write_manifest(run.path, config, plan.chosen)
        predictions = Predictions(run.path / "predictions.jsonl")
        results = _evaluate(plan, predictions, reused) | run.origin
        write_json(run.path / "results.json", results)
    print(*critical_lines(results), *further_lines(results), sep="\n")
    print(f"wrote {run.path / 'results.json'}")
    return results


def resolve(config: EvalSettings) -> Plan:
    """Fill in what was left to the machine, the checkpoint or the data; refuse, before anything slow, what would fail
    later."""
    chosen = choose(config, _words(config))
    made = read_config(Path(config.ckpt)) if config.ckpt else {}
    name = f"{Path(chosen.name).stem}_{config.source}_n{len(chosen.questions)}_seed{config.seed}"
    name += f"_skip{config.skip}" if config.skip else ""
    name += f"_ids{digest(chosen.questions)[:8]}" if config.ids else ""
    config = on_this_machine(
        dataclasses.replace(
            config,
            latent_len=config.latent_len or made.get("latent_len", DEFAULT_LATENT_LEN),
            d_z=config.d_z or made.get("d_z", DEFAULT_D_Z),
            save_dir=config.save_dir or str(Path(config.ckpt or "runs/eval/untrained") / f"eval_{name}"),
        )
    )
    able = _able(made.get("encoder", {}).get("type", "codebook"), chosen)
    conditions = parse_conditions(config.conditions, config.source, config.latent_len, able)
    _check(config, conditions)
    return Plan(config, chosen, conditions, fit_texts(config.dataset))


def choose(config: AnsweringSettings, out: TextIO = sys.stdout) -> QuestionSet:
    """The questions that the settings name, told on `out`."""
    found = load(config.dataset, config.split)
    if config.ids:
        ordered = named(found.questions, manifest_ids(Path(config.ids)), f"{found.name} {config.split}")
    else:
        ordered = subset(found.questions, config.skip + (config.samples or DEFAULT_SAMPLES), config.seed)
    require(config.skip < len(ordered), "skip", config.skip, f"{config.split} has {len(ordered)} questions: skip fewer")
    found = dataclasses.replace(found, questions=ordered[config.skip :])
    n, by_hand = len(found.questions), config.samples or 0
    few = f" (all there are; {by_hand} asked for)" if n < by_hand else ""
    print(f"data: {found.name} {config.split}, {n} questions{few}", flush=True, file=out)
    return found


def manifest_ids(path: Path) -> list[str]:
    """Ids of the questions that a manifest.json, or a file with one id per line, names."""
    if path.suffix != ".json":
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    found = read_json(path)
    ids = found.get("ids") if isinstance(found, dict) else None
    require(isinstance(ids, list), "ids", str(path), "it has no list `ids`; name the manifest.json of an evaluation")
    return ids


def write_manifest(folder: Path, config: AnsweringSettings, chosen: QuestionSet) -> None:
    """manifest.json: which questions the folder's answers are to."""
    ids = [q.id for q in chosen.questions]
    manifest = {"dataset": chosen.name, "split": config.split, "seed": config.seed, "ids": ids}
    write_json(folder / "manifest.json", manifest)


def _able(encoder_type: str, chosen: QuestionSet) -> set[str]:
    """What encoder and data offer to conditions."""
    kind = ENCODERS.get(encoder_type)  # loading the checkpoint tells if it is unknown
    found = {what for what in ("chooses_tokens", "reads_answers") if getattr(kind, what, False)}
    found |= {"spans"} if chosen.spans else set()
    return found | ({"two_articles"} if len({q.title for q in chosen.questions}) > 1 else set())


def _check(config: EvalSettings, conditions: Sequence[tuple[Condition, int]]) -> None:
    fitted = bool(config.ckpt) or config.codec in SCALAR
    require(fitted, "codec", config.codec, f"needs a checkpoint's tables; name one, or choose {', '.join(SCALAR)}")
    for name, wording in config.llm_wordings.items():
        require(wording in WORDINGS, "wordings", f"{name}={wording}", f"choose among {', '.join(WORDINGS)}")
    for condition, _ in conditions:
        remedy = "needs trained soft prompts: run scripts/baselines/tuned_baselines.sh and give its folder by --tuned"
        require("tuned" not in condition.uses or bool(config.tuned), "conditions", condition.name, remedy)
        trained = config.estimate or (Path(config.tuned) / condition.name / "checkpoint_best").is_dir()
        lacking = f"has no {condition.name}/checkpoint_best; run scripts/baselines/tuned_baselines.sh, or name another"
        require("tuned" not in condition.uses or trained, "tuned", config.tuned, lacking)


def _evaluate(plan: Plan, predictions: Predictions, reused: Sequence[Mapping]) -> dict:
    config, chosen = plan.config, plan.chosen
    ids = {q.id for q in chosen.questions}
    plan.conditions += predictions.finished(plan.conditions, config.latent_len, config.llm_names, ids)
    ready, shared, made = _ready(plan, predictions.path.parent)
    require_heads(predictions.path.parent, ready)
    if reused:
        require_heads(Path(config.reuse), ready, keep=False)
        predictions.append([line for line in reused if line["id"] not in predictions.of(line)])
    if sum(missing for *_, missing in _missing(predictions, ready, shared, plan.conditions)) >= LONG_ANSWERS:
        _announce(predictions, ready, shared, plan)
    rows, scores = [], {}
    for reader in ready:
        for condition, m in plan.conditions:
            if not condition.by_llm and reader is not ready[0]:
                continue
            row = _row(reader, condition, m, shared)
            label = {key: row[key] for key in ("condition", "m", "llm")}
            lines = complete(
                predictions, label, condition, m, reader, shared, chosen.score, config.batch_size, config.max_new_tokens
            )
            row |= summarise(lines, chosen.questions, config.seed)
            row["explained_variance"] = condition.explained(reader, m, shared) if condition.explained else None
            rows.append(row)
            scores[row_key(row)] = [lines[q.id]["f1"] for q in chosen.questions]
            print(line_of(row), flush=True)
    return record(config, chosen, rows, scores) | {
        "train_seed": train_seed(made, config.llm_names), "codec": config.codec, "interface": made.get("interface"),
        "checkpoint": config.ckpt or "untrained",
        "bytes_table": _bytes(plan, ready[0], shared, predictions.path.parent),
    }  # fmt: skip


def record(config: AnsweringSettings, chosen: QuestionSet, rows: Sequence[dict], scores: Mapping) -> dict:
    """What every results.json holds. rows: of `summarise`; scores: F1 by question for each row's key."""
    paragraphs = [q.paragraph for q in chosen.questions]
    return {
        "schema": SCHEMA, "dataset": chosen.name, "split": config.split, "n": len(chosen.questions),
        "seed": config.seed, "source": config.source, "dtype": config.dtype, "wordings": config.llm_wordings,
        "results": rows, "comparisons": compare(rows, scores, paragraphs, config.seed),
    }  # fmt: skip


def _bytes(plan: Plan, reader: Reader, shared: Shared, folder: Path) -> list[dict]:
    """What the texts take by other means, where there is a wire; printed. Counted once per evaluation."""
    if shared.sender is None:
        return []
    before = read_json(folder / "results.json") if (folder / "results.json").is_file() else {}
    rows = before.get("bytes_table") or bytes_table(
        shared.questions, plan.config.source, plan.config.latent_len, shared, reader
    )
    for row in rows:
        print(f"{row['bytes']:>8.0f} bytes per question: {row['way']}", flush=True)
    return rows


def _ready(plan: Plan, folder: Path | None) -> tuple[list[Reader], Shared, dict]:
    """The readers, what they share, and how the checkpoint was made; folder: where the closed form is kept."""
    config, used = plan.config, {part for condition, _ in plan.conditions for part in condition.uses}
    ready = readers(config, config.source)
    shared = Shared(plan.chosen.questions, config.seed, codec=plan.scalar, d_z=config.d_z, train_texts=plan.train_texts)
    made: Mapping = {}
    if "wire" in used:
        shared.sender, adapters, made = _wire(plan, ready, folder)
        for reader in ready:
            reader.adapter = adapters[reader.llm.name]
    whole = any(condition.cost == "whole" for condition, _ in plan.conditions)
    places = max((m for condition, m in plan.conditions if condition.cost == "places"), default=0)
    for reader in ready:
        soft = max(SOFT_VECTORS if "tuned" in used else 0, reader.adapter.constant if reader.adapter else 0)
        require_positions(reader, plan.chosen.questions, places, whole, config.max_new_tokens + soft)
    if "untrained" in used:
        encoder, adapters, _ = closed_form({r.llm.name: r.llm for r in ready}, plan.train_texts, config.d_z)
        shared.untrained = Sender(encoder, config.source, plan.scalar), adapters
    if "tuned" in used and not config.estimate:
        rivals = [(condition, m) for condition, m in plan.conditions if "tuned" in condition.uses]
        shared.soft_prompts = {condition.name: _soft_prompts(config, condition, m) for condition, m in rivals}
    return ready, shared, dict(made)


def _soft_prompts(config: EvalSettings, condition: Condition, m: int) -> dict[str, Tensor]:
    """Those of a tuned rival, by LLM; ValueError where they were trained for other texts or prompts."""
    folder = Path(config.tuned) / condition.name / "checkpoint_best"
    made, wanted = read_config(folder), {"source": config.source, "wordings": config.llm_wordings}
    if "wire" in condition.uses:
        wanted["wire"] = wire_id(Path(config.ckpt)).hex() if config.ckpt else None
    several = listed(made.get("settings", {}).get("latent_lens") or str(made.get("latent_len", m)))
    wanted |= {"latent_len": m} if "m" in condition.uses and str(m) not in several else {}
    found = {name: made.get(name, value) for name, value in wanted.items()}  # older ones do not say
    found["wordings"] = {name: found["wordings"].get(name) for name in config.llm_names}
    remedy = "name the checkpoint whose selection it read (--ckpt), or train it anew"
    require(found == wanted, "tuned", str(folder), f"was trained for {found}, and is asked for {wanted}; {remedy}")
    return load_soft_prompts(folder, config.llm_ids)


def _wire(plan: Plan, ready: Sequence[Reader], folder: Path | None) -> tuple[Sender, Mapping[str, Adapter], dict]:
    """Sender and adapters of the checkpoint, or of the closed form, which is saved in `folder`; and how it was made."""
    config = plan.config
    if config.ckpt:
        encoder, adapters, made = load_checkpoint(Path(config.ckpt), config.llm_ids)
        same = plan.identity["checkpoint_sha256"] == checkpoint_sha256(Path(config.ckpt))[:16]
        require(same, "ckpt", config.ckpt, "a training replaced it while this evaluation began; start again")
        require(made["d_z"] == config.d_z, "d_z", config.d_z, f"{config.ckpt} has d_z={made['d_z']}; set that")
        trained = made.get("source", config.source)
        if trained != config.source and made["stage"] != "codebook":
            note = f"note: {config.ckpt} was trained with source {trained!r}, and is evaluated with {config.source!r}"
            print(note, file=_words(config))
        adapters = {name: adapter.to(config.device) for name, adapter in adapters.items()}
        compact = tables_of(Path(config.ckpt)) if config.codec in COMPACT else None
        return Sender(encoder.to(config.device), config.source, config.codec, compact), adapters, made
    encoder, adapters, figures = closed_form({r.llm.name: r.llm for r in ready}, plan.train_texts, config.d_z)
    made = {
        "schema": SCHEMA, "stage": "codebook", "latent_len": config.latent_len, "d_z": config.d_z,
        "llms": config.llm_ids, "train_seed": None, "interface": figures,
    }  # fmt: skip
    if folder:
        save_checkpoint(folder / "checkpoint_untrained", encoder, adapters, made)
    return Sender(encoder, config.source, config.codec), adapters, made


def _missing(
    predictions: Predictions,
    ready: Sequence[Reader],
    shared: Shared,
    conditions: Sequence[tuple[Condition, int]],
) -> list[tuple[Reader, Condition, int, int]]:
    """How many answers of which LLM and condition are not there yet."""
    return [
        (reader, condition, m, missing)
        for reader in ready
        for condition, m in conditions
        if condition.by_llm
        if (missing := len(shared.questions) - len(predictions.of(_row(reader, condition, m, shared))))
    ]


def _announce(predictions: Predictions, ready: Sequence[Reader], shared: Shared, plan: Plan) -> None:
    """Time one batch of each kind and say how long all will take, in words or as JSON.

    Raises ValueError where that is too long for a CPU and the number of questions was not chosen by hand.
    """
    config, out = plan.config, _words(plan.config)
    ordered = sorted(shared.questions, key=lambda q: len(q.context))
    middle = max(0, len(ordered) // 2 - PROBE_QUESTIONS // 2)
    probe = ordered[middle : middle + PROBE_QUESTIONS]
    todo = _missing(predictions, ready, shared, plan.conditions)
    print("timing a few batches ...", flush=True, file=out)
    per_question: dict[tuple, float] = {}  # by LLM, cost and, where places are read, M
    timed: dict[str, list[tuple[float, str, int]]] = {}
    seconds = 0.0
    for reader, condition, m, missing in todo:
        kind = reader.llm.name, condition.cost, m if condition.cost == "places" else None
        if kind not in per_question:
            started = time.perf_counter()
            same = condition.base or condition  # a rival's soft prompt hardly changes the time
            answer(same, m, reader, shared, plan.chosen.score, probe, config.max_new_tokens)
            took = time.perf_counter() - started
            per_question[kind] = took / len(probe)
            timed.setdefault(reader.llm.name, []).append((took, condition.cost, m))
        seconds += missing * per_question[kind]
    for name, batches in timed.items():
        _note(config, name, batches, probe)
    answers = sum(missing for *_, missing in todo)
    print(f"estimate: {seconds / 60:.0f} minutes for {answers} answers", flush=True, file=out)
    if config.json:
        print(json.dumps({"answers": answers, "seconds": seconds}))
    if not config.estimate:
        refuse_long(seconds, config.device, config.by_hand, f"{len(shared.questions)} questions")


def _note(
    config: EvalSettings, name: str, batches: Sequence[tuple[float, str, int]], probe: Sequence[Question]
) -> None:
    """Keep how fast an LLM answered for later estimates; batches: (seconds, cost, M) of each."""
    model, text = shape_of(name, config.llm_ids[name]), text_tokens(probe)
    each = [answer_operations(model, cost, m, text, config.max_new_tokens) for _, cost, m in batches]
    work = Work(ANSWERING, config.device, config.dtype, (config.llm_ids[name],))
    work.note(len(probe) * sum(each), sum(took for took, *_ in batches))


def _words(config: EvalSettings) -> object:
    """Where words go: aside, when standard output is for JSON."""
    return sys.stderr if config.json else sys.stdout


def _row(reader: Reader, condition: Condition, m: int, shared: Shared) -> dict:
    """What identifies a row of results.json. PCA has no more directions than the embeddings have dimensions."""
    d_z = min(shared.d_z, reader.llm.width) if condition.explained else shared.d_z
    return {
        "condition": condition.name, "colour": condition.colour,
        "llm": reader.llm.name if condition.by_llm else None, "llm_id": reader.llm.id if condition.by_llm else None,
        "m": m if "m" in condition.uses else None, "d_z": d_z if "d_z" in condition.uses else None,
    }  # fmt: skip


def line_of(row: Mapping) -> str:
    """A row of results.json, printable."""
    interval = show_interval(row["f1_ci95"])
    m = f" M={row['m']}" if row["m"] else ""
    first, telling = row["first_token_acc"], row["first_informative_acc"]
    first = "" if first is None else f"first token {first:.3f}  "
    first += "" if telling is None else f"informative {telling:.3f}  "
    return (
        f"{row['llm'] or 'no LLM':>8}  {row['condition'] + m:<26} F1 {row['f1']:.3f} {interval}  EM {row['em']:.3f}  "
        f"{first}positions {row['llm_positions']:.0f}  {row['examples_per_s']:.1f} q/s"
    )
