"""Evaluate conditions on questions with frozen LLMs.

    python latentwire/eval.py --ckpt FOLDER --samples 1000
    python latentwire/eval.py --dataset sample --conditions text,token_budget,token_budget@64,latentwire

Writes config.json, manifest.json, predictions.jsonl (as it goes) and results.json. Run again, it keeps what is finished
and computes the rest; --fresh_eval starts over. --reuse takes over what an earlier evaluation has from the same
checkpoint, or from none.
"""

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from latentwire.conditions.base import CONDITIONS, Condition, Sender, Setting, explained_variance, parse_conditions
from latentwire.data.squad import Question, load_questions, split_by_article, subset
from latentwire.evaluation.answering import answer, complete
from latentwire.evaluation.predictions import Predictions, reusable
from latentwire.evaluation.results import compare, critical_lines, row_key, summarise
from latentwire.evaluation.scores import show_interval
from latentwire.llms.frozen import FrozenLLM, load_llm
from latentwire.llms.prompts import WORDINGS, PromptBuilder
from latentwire.models.adapters import Adapter
from latentwire.models.checkpoint import (
    checkpoint_sha256,
    load_checkpoint,
    load_soft_prompts,
    read_config,
    save_checkpoint,
)
from latentwire.models.stage0 import closed_form, fit_texts
from latentwire.utils.runs import SCHEMA, RunFolder, default_device, default_dtype, reason, set_seed, write_json
from latentwire.utils.settings import (
    DEFAULT_D_Z,
    DEFAULT_LATENT_LEN,
    DEFAULT_SAMPLES,
    LONGEST_S,
    EvalConfig,
    parse,
    require,
)

LONG_ANSWERS = 2000  # an evaluation of this many answers or more is timed before it starts
PROBE_QUESTIONS = 16


def main() -> None:
    """Command line: one evaluation."""
    meanings = (f"  {c.name:<22}{c.build.__doc__.splitlines()[0]}" for c in CONDITIONS.values())
    epilog = "\n".join(["conditions (what the LLM finds in the content slot):", *meanings])
    evaluate(parse(EvalConfig, epilog=epilog))


def evaluate(config: EvalConfig) -> dict | None:
    """Run one evaluation and return what it wrote to results.json; None if only its time was asked for."""
    set_seed(config.seed)
    dataset, questions = _questions(config)
    chosen = subset(questions, config.samples or DEFAULT_SAMPLES, config.seed)
    few = f" (all there are; {config.samples} asked for)" if len(chosen) < (config.samples or 0) else ""
    print(f"data: {dataset} {config.split}, {len(chosen)} questions{few}", flush=True)
    config = _resolved(config, dataset, len(chosen))
    conditions = parse_conditions(config.conditions, config.source, config.latent_len)
    _check(config, conditions, chosen)
    train_texts = fit_texts(config.dataset)
    if config.estimate:
        settings, _ = _settings(config, conditions, chosen, train_texts, None)
        _announce(Predictions(Path(config.save_dir) / "predictions.jsonl"), settings, conditions, config)
        return None
    identity = _identity(config, dataset, chosen, train_texts)
    reused = reusable(config.reuse, identity, conditions, config.llm_names) if config.reuse else []
    with RunFolder(config.save_dir, identity, fresh=config.fresh_eval) as run:
        manifest = {"dataset": dataset, "split": config.split, "seed": config.seed, "ids": [q.id for q in chosen]}
        write_json(run.path / "manifest.json", manifest)
        predictions = Predictions(run.path / "predictions.jsonl")
        if taken := [line for line in reused if line["id"] not in predictions.of(line)]:
            predictions.append(taken)
        results = _evaluate(config, conditions, dataset, chosen, train_texts, predictions) | run.origin
        write_json(run.path / "results.json", results)
    print(*critical_lines(results["comparisons"]), sep="\n")
    print(f"wrote {run.path / 'results.json'}")
    return results


def _questions(config: EvalConfig) -> tuple[str, list[Question]]:
    """Name of the data, and the questions of the split; held_out: on the articles of train that no training sees."""
    if config.split != "held_out":
        return load_questions(config.dataset, config.split)
    dataset, everything = load_questions(config.dataset, "train")
    return dataset, split_by_article(everything)[1]


def _resolved(config: EvalConfig, dataset: str, n: int) -> EvalConfig:
    """Fill in what was left to the machine, the checkpoint or the data."""
    device = config.device or default_device()
    made = read_config(Path(config.ckpt)) if config.ckpt else {}
    name = f"{Path(dataset).stem}_{config.source}_n{n}_seed{config.seed}"
    return dataclasses.replace(
        config,
        latent_len=config.latent_len or made.get("latent_len", DEFAULT_LATENT_LEN),
        d_z=config.d_z or made.get("d_z", DEFAULT_D_Z),
        device=device,
        dtype=config.dtype or default_dtype(device),
        save_dir=config.save_dir or str(Path(config.ckpt or "runs/eval/untrained") / f"eval_{name}"),
    )


def _check(config: EvalConfig, conditions: Sequence[tuple[Condition, int]], chosen: list[Question]) -> None:
    """Refuse, before anything slow, what would fail later."""
    for name, wording in config.llm_wordings.items():
        require(wording in WORDINGS, "wordings", f"{name}={wording}", f"choose among {', '.join(WORDINGS)}")
    if any(condition.name == "shuffled_z" for condition, _ in conditions):
        titles = len({q.title for q in chosen})
        require(titles > 1, "conditions", "shuffled_z", "needs questions on two articles or more; raise --samples")
    for condition, _ in conditions:
        remedy = "needs trained soft prompts: run scripts/baselines/tuned_baselines.sh and give its folder by --tuned"
        require("tuned" not in condition.uses or bool(config.tuned), "conditions", condition.name, remedy)
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ValueError(f"device={config.device!r}: {reason(error)}") from error
    usable = device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()
    require(usable, "device", config.device, f"this machine has {torch.cuda.device_count()} CUDA devices; try cpu")


def _identity(config: EvalConfig, dataset: str, chosen: list[Question], train_texts: list[str]) -> dict:
    """What makes two evaluations the same one. Conditions are left out: more of them extend a run."""
    identity = (
        dataclasses.asdict(config)
        | {
            "dataset": dataset,
            "samples": len(chosen),
            "llm_ids": list(config.llm_ids.items()),  # in order: the first one's vocabulary is the wire's
            "wordings": config.llm_wordings,
            "questions_sha256": hashlib.sha256(repr(chosen).encode()).hexdigest()[:16],
            "train_sha256": hashlib.sha256(repr(train_texts).encode()).hexdigest()[:16],
            "checkpoint_sha256": checkpoint_sha256(Path(config.ckpt))[:16] if config.ckpt else None,
            "tuned_sha256": [
                checkpoint_sha256(folder)[:16] for folder in sorted(Path(config.tuned).glob("*/checkpoint_best"))
            ]
            if config.tuned
            else [],
        }
    )
    for name in ("save_dir", "fresh_eval", "conditions", "llms", "reuse", "estimate"):
        del identity[name]
    return identity


def _evaluate(
    config: EvalConfig,
    conditions: Sequence[tuple[Condition, int]],
    dataset: str,
    chosen: list[Question],
    train_texts: list[str],
    predictions: Predictions,
) -> dict:
    conditions = [
        *conditions,
        *predictions.finished(conditions, config.latent_len, config.llm_names, {q.id for q in chosen}),
    ]
    settings, made = _settings(config, conditions, chosen, train_texts, predictions.path.parent)
    if sum(missing for *_, missing in _missing(predictions, settings, conditions)) >= LONG_ANSWERS:
        _announce(predictions, settings, conditions, config)
    rows, scores = [], {}
    for setting in settings:
        for condition, m in conditions:
            if not condition.by_llm and setting is not settings[0]:
                continue
            row = _row(setting, condition, m)
            label = {key: row[key] for key in ("condition", "m", "llm")}
            lines = complete(predictions, label, setting, condition, m, config.batch_size, config.max_new_tokens)
            row |= summarise(lines, chosen, config.seed)
            row["explained_variance"] = explained_variance(condition, setting, m)
            rows.append(row)
            scores[row_key(row)] = [lines[q.id]["f1"] for q in chosen]
            print(_line(row), flush=True)
    return {
        "schema": SCHEMA, "dataset": dataset, "split": config.split, "n": len(chosen), "seed": config.seed,
        "train_seed": made.get("train_seed"), "source": config.source, "codec": config.codec, "dtype": config.dtype,
        "wordings": config.llm_wordings, "checkpoint": config.ckpt or "untrained",
        "interface": made.get("interface"),
        "results": rows, "comparisons": compare(rows, scores, [q.paragraph for q in chosen], config.seed),
    }  # fmt: skip


def _settings(
    config: EvalConfig,
    conditions: Sequence[tuple[Condition, int]],
    chosen: list[Question],
    train_texts: list[str],
    folder: Path | None,
) -> tuple[list[Setting], dict]:
    """What the conditions need, an LLM each, and how the checkpoint was made; folder: where stage 0 is kept."""
    reads_wire = any("wire" in condition.uses for condition, _ in conditions)
    llms = {name: load_llm(name, llm_id, config.device, config.dtype) for name, llm_id in config.llm_ids.items()}
    sender, adapters, made = _latentwire(config, llms, train_texts, folder) if reads_wire else (None, {}, {})
    stage0 = {}
    if any("stage0" in condition.uses for condition, _ in conditions):
        encoder, closed, _ = closed_form(llms, train_texts, config.d_z)
        before = Sender(encoder, config.source, config.codec)
        stage0 = {name: (before, adapter) for name, adapter in closed.items()}
    soft_prompts = {
        condition.name: load_soft_prompts(Path(config.tuned) / condition.name / "checkpoint_best", config.llm_ids)
        for condition, _ in conditions
        if "tuned" in condition.uses and not config.estimate
    }
    settings = [
        Setting(
            llm=llm,
            prompts=PromptBuilder(llm.tokenizer, config.source, config.llm_wordings[name]),
            sender=sender,
            adapter=adapters.get(name),
            codec=config.codec,
            d_z=config.d_z,
            train_texts=train_texts,
            pool=chosen,
            seed=config.seed,
            soft_prompts={condition: by_llm[name] for condition, by_llm in soft_prompts.items()},
            stage0=stage0.get(name),
        )
        for name, llm in llms.items()
    ]
    return settings, made


def _missing(
    predictions: Predictions, settings: list[Setting], conditions: Sequence[tuple[Condition, int]]
) -> list[tuple[Setting, Condition, int, int]]:
    """How many answers of which LLM and condition are not there yet."""
    return [
        (setting, condition, m, missing)
        for setting in settings
        for condition, m in conditions
        if condition.by_llm
        if (missing := len(setting.pool) - len(predictions.of(_row(setting, condition, m))))
    ]


def _announce(
    predictions: Predictions,
    settings: list[Setting],
    conditions: Sequence[tuple[Condition, int]],
    config: EvalConfig,
) -> None:
    """Time one batch of each kind and say how long all will take.

    Raises ValueError where that is over LONGEST_S on a CPU, unless the number of questions was chosen by hand.
    """
    chosen = settings[0].pool
    ordered = sorted(chosen, key=lambda q: len(q.context))
    middle = max(0, len(ordered) // 2 - PROBE_QUESTIONS // 2)
    probe = ordered[middle : middle + PROBE_QUESTIONS]
    todo = _missing(predictions, settings, conditions)
    print("timing a few batches ...", flush=True)
    per_question: dict[tuple[str, int | None], float] = {}  # by LLM and M; None stands for the whole text
    seconds = 0.0
    for setting, condition, m, missing in todo:
        kind = setting.llm.name, m if "m" in condition.uses and condition.name != "pca_rank" else None
        if kind not in per_question:
            started = time.perf_counter()
            same = CONDITIONS[condition.name.removesuffix("_tuned")]  # a rival's soft prompt hardly changes the time
            answer(same, setting, probe, m, config.max_new_tokens)
            per_question[kind] = (time.perf_counter() - started) / len(probe)
        seconds += missing * per_question[kind]
    print(f"estimate: {seconds / 60:.0f} minutes for {sum(missing for *_, missing in todo)} answers", flush=True)
    if seconds > LONGEST_S and not config.estimate and config.device == "cpu" and config.samples is None:
        raise ValueError(
            f"samples: {len(chosen)} questions would take about {seconds / 3600:.1f} hours on this CPU; "
            "choose fewer, or the same number by hand to run it anyway (SAMPLES=..., --samples ...)"
        )


def _row(setting: Setting, condition: Condition, m: int) -> dict:
    """What identifies a row of results.json. PCA has no more directions than the embeddings have dimensions."""
    d_z = setting.d_z if "wire" in condition.uses else min(setting.d_z, setting.llm.width)
    return {
        "condition": condition.name,
        "llm": setting.llm.name if condition.by_llm else None, "llm_id": setting.llm.id if condition.by_llm else None,
        "m": m if "m" in condition.uses else None, "d_z": d_z if "d_z" in condition.uses else None,
    }  # fmt: skip


def _latentwire(
    config: EvalConfig, llms: dict[str, FrozenLLM], train_texts: list[str], folder: Path | None
) -> tuple[Sender, dict[str, Adapter], dict]:
    """Sender and adapters of the checkpoint, or of stage 0, which is saved in `folder`; and how it was made."""
    if config.ckpt:
        encoder, adapters, made = load_checkpoint(Path(config.ckpt), config.llm_ids)
        require(made["d_z"] == config.d_z, "d_z", config.d_z, f"{config.ckpt} has d_z={made['d_z']}; set that")
        trained = made.get("source", config.source)
        if trained != config.source and made["stage"] != "codebook":
            print(f"note: {config.ckpt} was trained with source {trained!r}, and is evaluated with {config.source!r}")
        encoder, adapters = encoder.to(config.device), {name: a.to(config.device) for name, a in adapters.items()}
        return Sender(encoder, config.source, config.codec), adapters, made
    encoder, adapters, report = closed_form(llms, train_texts, config.d_z)
    made = {
        "schema": SCHEMA, "stage": "codebook", "latent_len": config.latent_len, "d_z": config.d_z,
        "llms": config.llm_ids, "train_seed": None, "interface": report,
    }  # fmt: skip
    if folder:
        save_checkpoint(folder / "checkpoint_stage0", encoder, adapters, made)
    return Sender(encoder, config.source, config.codec), adapters, made


def _line(row: dict) -> str:
    interval = show_interval(row["f1_ci95"])
    m = f" M={row['m']}" if row["m"] else ""
    first = "" if row["first_token_acc"] is None else f"first token {row['first_token_acc']:.3f}  "
    return (
        f"{row['llm'] or 'no LLM':>8}  {row['condition'] + m:<26} F1 {row['f1']:.3f} {interval}  EM {row['em']:.3f}  "
        f"{first}positions {row['llm_positions']:.0f}  {row['examples_per_s']:.1f} q/s"
    )
