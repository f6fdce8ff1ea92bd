"""A rival from outside: questions as token ids for a program that shares nothing with this one, and its answers scored.

asked.json      by LLM: model, head, stops (ids that end an answer), questions (id; context, tail and answer as ids)
answers.jsonl   one line per answer: llm, condition, id, said (token ids), nll (nats, of the first reference after the
                same cache), entries (of the context, per layer and head), bytes (of these), seconds, by (whose it is)

Between the two scripts/baselines/kv_cache.py works, in an environment of its own.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from latentwire.conditions.base import Reader, reader_of, require_positions
from latentwire.conditions.texts import content_ids
from latentwire.data.question import Question, QuestionSet
from latentwire.evaluation.answering import said_line, scored
from latentwire.evaluation.evaluate import choose, line_of, record, write_manifest
from latentwire.evaluation.results import row_key, summarise
from latentwire.evaluation.settings import OutsideSettings
from latentwire.llms.loading import load_llm
from latentwire.utils.cli import require
from latentwire.utils.files import json_line, read_lines, write_json, write_text
from latentwire.utils.machine import on_this_machine
from latentwire.utils.runs import RunFolder, digest, identity

_NO_PART = ("save_dir", "fresh_eval", "llms", "presses", "skip", "ids", "step")  # of what makes two runs the same
_RESTART = "with --fresh_eval (FRESH_EVAL=1 for the script)"

Answers = Mapping[tuple[str, str], Mapping[str, Mapping]]  # lines by LLM and condition, then by question


def outside(config: OutsideSettings) -> dict | None:
    """Write the questions, or make an evaluation of their answers and return its results.json."""
    chosen = choose(config)
    config = on_this_machine(
        replace(config, save_dir=config.save_dir or f"runs/baselines/kv_cache/M{config.latent_len}")
    )
    same = identity(
        config, _NO_PART, dataset=chosen.name, samples=len(chosen.questions), llm_ids=list(config.llm_ids.items()),
        wordings=config.llm_wordings, questions_sha256=digest(chosen.questions),
    )  # fmt: skip
    asking = config.step == "ask"
    with RunFolder(config.save_dir, same, fresh=config.fresh_eval and asking, restart=_RESTART) as run:
        if asking:
            write_manifest(run.path, config, chosen)
            write_json(run.path / "asked.json", asked(config, chosen))
            print(f"wrote {run.path / 'asked.json'}")
            return None
        results = _score(config, chosen, run.path) | run.origin
        write_json(run.path / "results.json", results)
    print(f"wrote {run.path / 'results.json'}")
    return results


def asked(config: OutsideSettings, chosen: QuestionSet) -> dict:
    """What asked.json holds. by_hand: whether somebody chose the number of questions.

    Raises ValueError naming the first question whose prompt an LLM cannot read.
    """
    llms = {}
    for name in config.llm_names:
        reader = _reader(config, name)
        require_positions(reader, chosen.questions, 0, True, config.max_new_tokens)
        llms[name] = {
            "model": reader.llm.model.name_or_path, "head": list(reader.prompts.head),
            "stops": reader.llm.stop_ids.tolist(),
            "questions": [
                {"id": q.id, "context": content_ids(reader, q), "tail": reader.prompts.tail(q.question),
                 "answer": reader.prompts.answer_ids(q.answers[0])}
                for q in chosen.questions
            ],
        }  # fmt: skip
    return {
        "conditions": config.press_names, "m": config.latent_len, "max_new_tokens": config.max_new_tokens,
        "device": config.device, "dtype": config.dtype, "by_hand": config.by_hand, "llms": llms,
    }  # fmt: skip


def _score(config: OutsideSettings, chosen: QuestionSet, folder: Path) -> dict:
    """Prediction lines of the answers, written; and the results. ValueError where answers are missing."""
    answers = _answers(config, chosen, folder / "answers.jsonl")
    rows, scores, written = [], {}, []
    for name in config.llm_names:
        reader = _reader(config, name)
        for condition in (condition for llm, condition in answers if llm == name):
            given = answers[name, condition]
            label = {"condition": condition, "m": None if condition == "kv_full" else config.latent_len, "llm": name}
            lines = {q.id: _line(reader, q, given[q.id], label, chosen) for q in chosen.questions}
            row = label | {"llm_id": reader.llm.id, "d_z": None, "explained_variance": None}
            rows.append(row | summarise(lines, chosen.questions, config.seed))
            scores[row_key(row)] = [lines[q.id]["f1"] for q in chosen.questions]
            written += lines.values()
            print(line_of(rows[-1]), flush=True)
    write_text(folder / "predictions.jsonl", "".join(map(json_line, written)))
    by = sorted({line["by"] for given in answers.values() for line in given.values()})
    return record(config, chosen, rows, scores) | {
        "codec": f"keys and values as {config.dtype}", "checkpoint": "none", "train_seed": None, "by": by,
    }  # fmt: skip


def _line(reader: Reader, question: Question, given: Mapping, label: Mapping, chosen: QuestionSet) -> dict:
    """One prediction line. What is sent is the kept keys and values."""
    said = said_line(reader, question, given["said"], given["nll"])
    read = {"llm_positions": given["entries"], "constant_positions": 0, "wire_bytes": given["bytes"]}
    line = scored(question, said | read, reader.prompts.source, chosen.score, given["seconds"])
    return {"id": question.id} | label | line


def _answers(config: OutsideSettings, chosen: QuestionSet, path: Path) -> Answers:
    """The answers of each LLM and condition that has all of them. ValueError where one that is asked for has not."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for line in read_lines(path):
        found.setdefault((line["llm"], line["condition"]), {})[line["id"]] = line
    ids = {q.id for q in chosen.questions}
    for name in config.llm_names:
        for condition in config.press_names:
            missing = len(ids - found.get((name, condition), {}).keys())
            remedy = f"lacks {missing} answers of {name} {condition}; run scripts/baselines/kv_cache_baseline.sh"
            require(not missing, "run", str(path), remedy)
    return {key: lines for key, lines in found.items() if ids <= lines.keys()}


def _reader(config: OutsideSettings, name: str) -> Reader:
    return reader_of(load_llm(name, config.llm_ids[name], config.device, config.dtype), config, config.source)
