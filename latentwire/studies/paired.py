"""Evaluations of the same questions side by side, each paired with the first; and one evaluation recomputed.

n: questions; S: training seeds of one system.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from latentwire.conditions.base import CONDITIONS
from latentwire.data.question import Question, Scorer
from latentwire.data.squad import load
from latentwire.evaluation import results as made
from latentwire.evaluation.predictions import WEIGHTS
from latentwire.evaluation.results import row_key, summarise
from latentwire.evaluation.scores import (
    MIN_SEEDS,
    difference_draws,
    equivalence_verdict,
    few_seeds,
    interval,
    mean_ci,
    side_verdict,
)
from latentwire.models.checkpoint import load_encoder
from latentwire.models.weights import read_config
from latentwire.studies.settings import Run
from latentwire.utils.cli import SCHEMA, require
from latentwire.utils.files import read_json, read_lines
from latentwire.utils.machine import machine_line

_SAME = ("dataset", "split", "n", "source", "dtype")  # what evaluations must share to be paired
_OF_DIFFERENCE = ("diff_over", "diff_ci95", "diff_ci90", "diff_ci95_by_article", "verdict", "equivalence")
# Of a prediction line.
_READ = ("f1", "first_token_correct", "first_informative_correct", "answer_nll", "answer_tokens", "wire_bytes")
_AT_ONCE = 32  # texts that an encoder reads together
_NO_FIGURE = ("seconds", "examples_per_s", "taken_from")  # of a row: times, which no second look repeats


@dataclass(frozen=True)
class System:
    """One row of a comparison. row: the first seed's record; values: [S, n] of each of _READ that all lines have;
    weights: what tells its S trainings apart, empty where nothing was trained."""

    run: Run
    row: Mapping
    values: Mapping[str, np.ndarray]
    weights: Sequence[str]

    @property
    def nll_per_token(self) -> float | None:
        """Nats; None where no LLM was asked."""
        if "answer_nll" not in self.values:
            return None
        return float(self.values["answer_nll"].mean(axis=0).sum() / self.values["answer_tokens"][0].sum())

    def of(self, which: np.ndarray) -> "System":
        """Of these questions alone. which: bool [n]."""
        return replace(self, values={name: value[:, which] for name, value in self.values.items()})


@dataclass(frozen=True)
class Terms:
    """Of all systems. found: results.json by folder; margin: of equivalence; pair_seeds: seeds are drawn in pairs."""

    found: Mapping[Path, Mapping]
    questions: Sequence[Question]
    margin: float | None
    pair_seeds: bool

    def of(self, which: np.ndarray) -> "Terms":
        """Of these questions alone. which: bool [n]."""
        return replace(self, questions=[self.questions[i] for i in np.flatnonzero(which)])


def recompute(folder: Path) -> dict:
    """results.json of an evaluation, made again from its predictions, each answer scored anew; `not_kept`: a line per
    row of which no predictions were kept.

    Raises FileNotFoundError without any predictions, ValueError naming what differs from results.json.
    """
    before, predicted = _record(folder), _lines(folder)
    questions, score, _ = _questions(folder, before)
    kept = {row_key(line) for line in predicted}
    recorded = [row for row in before["results"] if row_key(row) in kept]
    rows, scores = [], {}
    for row in recorded:
        lines = {line["id"]: line for line in predicted if row_key(line) == row_key(row)}
        lacking = [q.id for q in questions if q.id not in lines]
        require(
            not lacking, "run", str(folder), f"lacks the predictions of {row_key(row)} for {len(lacking)} questions"
        )
        lines = {q.id: lines[q.id] | score(lines[q.id]["prediction"], q.answers) for q in questions}
        rows.append({**row, **summarise(lines, questions, before["seed"])})
        scores[row_key(row)] = [lines[q.id]["f1"] for q in questions]
    pairs = made.compare(rows, scores, [q.paragraph for q in questions], before["seed"])
    differing = [
        f"{' '.join(map(str, row_key(old)))}: {key}"
        for old, new in zip(recorded, rows, strict=True)
        for key in sorted(old.keys() - set(_NO_FIGURE))
        if not _equal(old[key], new[key])
    ]
    known = _among(recorded, before["comparisons"])  # older records say less of a pair
    again = [{key: new.get(key) for key in old} for old, new in zip(known, pairs, strict=False)]
    differing += [] if len(known) == len(pairs) and _equal(known, again) else ["comparisons"]
    require(
        not differing, "run", str(folder), f"results.json says otherwise than its predictions: {', '.join(differing)}"
    )
    left = [row for row in before["results"] if row not in recorded]
    not_kept = [f"no predictions were kept: {row['llm'] or 'no LLM'} {row['condition']}" for row in left]
    return before | {"results": rows, "comparisons": pairs, "not_kept": not_kept}


def _among(rows: Sequence[Mapping], comparisons: Sequence[Mapping]) -> list[Mapping]:
    """The comparisons of which both sides are among the rows."""
    there = {row_key(row) for row in rows}
    return [
        pair for pair in comparisons
        if all(
            {(pair[side], m, llm) for m in (pair["m"], None) for llm in (pair["llm"], None)} & there
            for side in ("a", "b")
        )
    ]  # fmt: skip


def _equal(a: object, b: object) -> bool:
    """Whether two parts of a record are the same, last digits of floating point aside."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(np.isclose(a, b, rtol=1e-9, atol=1e-12)) if isinstance(a, float) and isinstance(b, float) else a == b


def compare(
    runs: Sequence[Run], margin: float | None = None, selection: Path | None = None, pair_seeds: bool = False
) -> dict:
    """Rows by run, LLM and M; each is paired with the first run's row of its LLM. margin: of equivalence; selection: a
    checkpoint, so that `parts` says the same of the questions of which it sends a whole answer, and of the others;
    pair_seeds: the i-th trainings of runs that have as many share what their seed draws, so they are drawn together.

    Raises FileNotFoundError for a folder without an evaluation, ValueError where two are not of the same questions or
    two seeds are the same training.
    """
    require(margin is None or margin > 0, "margin", str(margin), "must be above 0")
    found = {folder: _record(folder) for run in runs for folder in run.folders}
    (first, base), *others = found.items()
    ids = _ids(first)
    for folder, results in others:
        differing = [name for name in _SAME if results[name] != base[name]] or ["ids"] * (_ids(folder) != ids)
        require(
            not differing, "run", str(folder), f"is not of the questions of {first} ({', '.join(differing)} differ)"
        )
    questions, _, spans = _questions(first, base)
    systems = [system for run in runs for system in _systems(run, found, ids)]
    terms = Terms(found, questions, margin, pair_seeds)
    inside = f"answers of {base['dataset']} are no spans of their contexts"
    require(spans or not selection, "selection", str(selection), inside)
    parts = _parts(selection, base["source"], systems, terms) if selection else []
    conditions = ", ".join(dict.fromkeys(run.condition for run in runs))
    about = {"schema": SCHEMA, "condition": conditions, "margin": margin, "pair_seeds": pair_seeds}
    about |= {name: base[name] for name in (*_SAME, "seed")}
    about["machines"] = sorted({machine_line(one["machine"]) for one in found.values()})
    return about | {"rows": _rows(systems, terms), "parts": parts}


def _parts(selection: Path, source: str, systems: Sequence[System], terms: Terms) -> list[dict]:
    """The rows again, of questions of which `selection` sends a whole answer, and of the others. Where it was trained
    with several M, it is asked for each M of the rows, and tells the rows of this M apart."""
    made = read_config(selection)
    several = bool(made.get("settings", {}).get("latent_lens"))
    sizes = sorted({system.row["m"] for system in systems} - {None}) if several else [made["latent_len"]]
    parts = []
    for m in sizes:
        mine = [system for system in systems if not several or system.row["m"] in (m, None)]
        inside = answer_is_sent(selection, source, terms.questions, m)
        at = f" at M={m}" if several else ""
        of = {f"a whole answer is among the tokens sent{at}": inside, f"no whole answer is{at}": ~inside}
        parts += [
            {"part": part, "n": int(which.sum()), "rows": _rows([system.of(which) for system in mine], terms.of(which))}
            for part, which in of.items()
            if which.any()
        ]
    return parts


def answer_is_sent(checkpoint: Path, source: str, questions: Sequence[Question], m: int) -> np.ndarray:
    """Whether the M tokens that a checkpoint sends hold one of the reference answers, all its characters: bool [n].

    Raises ValueError where its encoder chooses no tokens.
    """
    encoder = load_encoder(checkpoint)
    require(encoder.chooses_tokens, "selection", str(checkpoint), f"{encoder.name!r} chooses no tokens; name another")
    found = []
    for at in tqdm(range(0, len(questions), _AT_ONCE), desc="what is sent", unit="batch", mininterval=1):
        some = questions[at : at + _AT_ONCE]
        for question, spans in zip(some, encoder.chosen_spans(some, source, m), strict=True):
            there = {place for span in spans for place in range(*span)}
            answers = zip(question.starts, question.answers, strict=True)
            found.append(any(there.issuperset(range(start, start + len(text.rstrip()))) for start, text in answers))
    return np.array(found)


def _systems(run: Run, found: Mapping[Path, Mapping], ids: Sequence[str]) -> list[System]:
    """Each row of a run's first folder, with what the other folders hold of it."""
    there = [row for row in found[run.folders[0]]["results"] if row["condition"] == run.condition]
    require(bool(there), "condition", run.condition, f"{run.folders[0]} has none such")
    return [_system(run, found, row, ids) for row in there]


def _rows(systems: Sequence[System], terms: Terms) -> list[dict]:
    """A row per system, each paired with the first run's of its LLM and M, or where that has none of this M, with the
    first of its LLM. Who answers without an LLM stands beside the LLM, if there is but one."""
    names, firsts, rows = _names([*terms.found]), {}, []
    llms = {system.row["llm"] for system in systems} - {None}
    several = len({system.run.condition for system in systems}) > 1
    for system in systems:
        llm, m = system.row["llm"], system.row["m"]
        if llm is None and len(llms) == 1:
            (llm,) = llms
        first = firsts.setdefault(llm, system)
        if system.run == systems[0].run:
            firsts[llm, m] = system
        before = firsts.get((llm, m), first)
        ids = {system.row["llm_id"], before.row["llm_id"]} - {None}
        require(len(ids) < 2, "llm", str(llm), f"is of {' and '.join(sorted(ids))}; compare runs of one model")
        name = _together([names[folder] for folder in system.run.folders])
        rows.append(
            {"name": f"{name}: {system.run.condition}" if several else name}
            | _figures(system, terms)
            | _difference(system, before, terms)
        )
    return rows


def _system(run: Run, found: Mapping[Path, Mapping], row: Mapping, ids: Sequence[str]) -> System:
    """What the folders of a run hold of this row."""
    _require_row(run.folders, found, row)
    lines = [_of_row(folder, row, ids) for folder in run.folders]
    values = {
        name: np.array([[line[name] for line in seed] for seed in lines], dtype=float)
        for name in _READ
        if all(line.get(name) is not None for seed in lines for line in seed)  # older lines have fewer
    }
    weights = [own for folder in run.folders if (own := _weights(folder, run.condition))]
    twice = "holds the same weights twice; seeds of one thing are trainings of their own"
    require(len(set(weights)) == len(weights), "run", ",".join(map(str, run.folders)), twice)
    return System(run, row, values, weights)


def _figures(system: System, terms: Terms) -> dict:
    """The figures of one row: means over seeds, with the spread of F1."""
    row, means, mean = system.row, system.values["f1"].mean(axis=1).tolist(), system.values["f1"].mean(axis=0)
    sent, paragraphs = system.values.get("wire_bytes"), [q.paragraph for q in terms.questions]
    return {
        "condition": row["condition"], "runs": [str(folder) for folder in system.run.folders],
        "git": sorted({terms.found[folder]["git"] for folder in system.run.folders}), "weights": system.weights,
        "llm": row["llm"], "llm_id": row["llm_id"], "m": row["m"], "codec": terms.found[system.run.folders[0]]["codec"],
        "f1": float(mean.mean()), "f1_ci95": mean_ci(mean, paragraphs), "paragraphs": len(set(paragraphs)),
        "seed_f1": means,
        "seed_sd": float(np.std(means, ddof=1)) if len(means) > 1 else None,
        "first_token_acc": _mean(system, "first_token_correct"),
        "first_informative_acc": _mean(system, "first_informative_correct"),
        "nll_per_token": system.nll_per_token, "wire_bytes": None if sent is None else round(sent[0].mean()),
    }  # fmt: skip


def _difference(system: System, before: System, terms: Terms) -> dict:
    """F1, and nats per answer token, minus those of `before`, with their intervals and what F1's decide.

    Where a trained side has fewer than MIN_SEEDS trainings, the intervals are over questions only, and nothing is
    decided; unless both sides are the same weights, read in two ways: then the verdict is on these weights.
    """
    found = {"diff": float(system.values["f1"].mean() - before.values["f1"].mean())} | dict.fromkeys(_OF_DIFFERENCE)
    if system is before:
        return found
    same = bool(system.weights) and sorted(system.weights) == sorted(before.weights)
    order = [before.weights.index(own) for own in system.weights] if same else slice(None)
    pairs = terms.pair_seeds and len(system.weights) == len(before.weights)
    orders = [tuple(terms.found[folder].get("train_seed") for folder in side.run.folders) for side in (before, system)]
    orders = {order for order in orders if len(set(order)) > 1}  # a soft prompt's evaluation does not know its seed
    require(len(orders) < 2 or not pairs, "pair_seeds", str(sorted(orders)), "name the same seeds in one order")
    fewest = min((len(side.weights) for side in (system, before) if side.weights), default=MIN_SEEDS)

    def draws(name: str, groups: list[str], counts: Sequence[float] | None = None, **how: bool) -> np.ndarray | None:
        sides = (system, system.values[name]), (before, before.values[name][order])
        a, b = (
            value if side.weights and fewest >= MIN_SEEDS else value.mean(axis=0, keepdims=True)
            for side, value in sides
        )
        return difference_draws(a, b, groups, same or pairs, counts=counts, **how)

    paragraphs, articles = [q.paragraph for q in terms.questions], [q.title for q in terms.questions]
    by_paragraph = draws("f1", paragraphs)
    seeds = fewest >= MIN_SEEDS and max(len(system.weights), len(before.weights)) > 1
    over = f"{'seed pairs' if pairs and not same else 'seeds'} and questions" if seeds else "questions"
    found |= {
        "diff_over": f"{over}, same weights" if same else over,
        "diff_ci95": interval(by_paragraph, 0.95), "diff_ci90": interval(draws("f1", paragraphs, unseen=True), 0.9),
        "diff_ci95_by_article": interval(draws("f1", articles), 0.95),
    }  # fmt: skip
    tokens, theirs = (side.values.get("answer_tokens", [None])[0] for side in (system, before))
    if tokens is not None and np.array_equal(tokens, theirs):  # else they are of two tokenizers
        found |= {
            "nll_diff": system.nll_per_token - before.nll_per_token,
            "nll_diff_ci95": interval(draws("answer_nll", paragraphs, tokens), 0.95),
        }
    decided = same or fewest >= MIN_SEEDS
    found["verdict"] = side_verdict(found["diff_ci95"]) if decided else few_seeds(fewest, "not decided")
    if terms.margin is not None:
        shown = equivalence_verdict(found["diff_ci90"], terms.margin)
        found["equivalence"] = shown if decided else few_seeds(fewest, "not shown")
    return found


def _weights(folder: Path, condition: str) -> str:
    """Which trained weights a condition read in this evaluation; "" for what no training made: text, a budget, PCA, the
    closed form, and rivals from outside, which this program does not know."""
    used = CONDITIONS[condition].uses if condition in CONDITIONS else ()
    keys = [key for part, key in WEIGHTS.items() if part in used]
    config = _record(folder, "config.json")["config"] if keys else {}
    return " ".join(str(config[key]) for key in keys if config.get(key))


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """What tells the folders' paths apart: without the parts that all of them begin and end with."""
    parts = [list(folder.parts) for folder in folders]
    for end in (0, -1):
        while len(folders) > 1 and all(len(p) > 1 for p in parts) and len({p[end] for p in parts}) == 1:
            for p in parts:
                p.pop(end)
    return {folder: str(Path(*p)) for folder, p in zip(folders, parts, strict=True)}


def _together(names: Sequence[str]) -> str:
    """One name for the seeds of a system: what their own ones share."""
    shared = [part for part in Path(names[0]).parts if all(part in Path(name).parts for name in names)]
    return f"{Path(*shared)} ({len(names)} seeds)" if shared and len(names) > 1 else " ".join(names)


def _record(folder: Path, name: str = "results.json") -> dict:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} holds no {name}; name the folder of an evaluation that has ended")
    return read_json(folder / name)


def _require_row(folders: Sequence[Path], found: Mapping[Path, Mapping], row: Mapping) -> None:
    """ValueError where a seed's evaluation has no such row; M may not differ."""
    wanted = {name: row[name] for name in ("condition", "llm", "llm_id", "m")} | {"codec": found[folders[0]]["codec"]}
    for folder in folders:
        rows = [found[folder] | row for row in found[folder]["results"]]
        same = any(all(row[name] == wanted[name] for name in wanted) for row in rows)
        require(same, "run", str(folder), f"has no row {wanted}; seeds of one thing must have the same rows")


def _mean(system: System, name: str) -> float | None:
    """Mean over seeds and questions; None where no LLM was asked, and in records from before it was noted."""
    return float(system.values[name].mean()) if name in system.values else None


def _of_row(folder: Path, row: Mapping, ids: Sequence[str]) -> list[Mapping]:
    """The prediction line of each question."""
    found = {line["id"]: line for line in _lines(folder) if row_key(line) == row_key(row)}
    lacking = [id_ for id_ in ids if id_ not in found]
    require(not lacking, "run", str(folder), f"lacks the predictions of {row_key(row)} for {len(lacking)} questions")
    return [found[id_] for id_ in ids]


@cache
def _lines(folder: Path) -> list[dict]:
    """The prediction lines of an evaluation, packed or not."""
    lines = read_lines(folder / "predictions.jsonl")
    if not lines:
        raise FileNotFoundError(f"{folder} holds no predictions (predictions.jsonl, or .gz): evaluate again")
    return lines


def _ids(folder: Path) -> list[str]:
    return _record(folder, "manifest.json")["ids"]


def _questions(folder: Path, results: Mapping) -> tuple[list[Question], Scorer, bool]:
    """The questions of an evaluation, in its order, what scores answers to them, and whether these are spans.

    Raises ValueError where the data at hand are other ones.
    """
    loaded = load(results["dataset"], results["split"])
    by_id = {q.id: q for q in loaded.questions}
    missing = [id_ for id_ in _ids(folder) if id_ not in by_id]
    remedy = f"{len(missing)} of the questions of {folder} are not in the data at hand ({loaded.name}); set SQUAD_DIR"
    require(not missing, "dataset", results["dataset"], remedy)
    return [by_id[id_] for id_ in _ids(folder)], loaded.score, loaded.spans
