"""report.html: all that is known about some runs, on one page that needs nothing else.

Each function below makes what one section of report.html.jinja shows, from the parts that `records` found; an empty
result makes the section say which command fills it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from latentwire.data.question import Question
from latentwire.data.scoring import normalize_answer
from latentwire.data.squad import load
from latentwire.evaluation.results import critical_lines, positions
from latentwire.evaluation.scores import show_interval, shown_ci
from latentwire.reporting import charts
from latentwire.reporting.labels import f1_label, figure, llms_of, row_name
from latentwire.reporting.records import Part
from latentwire.reporting.signs import BAD, GOOD, UNDECIDED, judge_log, judge_predictions, judge_results, not_measured
from latentwire.training.log import flat

MOST_QUESTIONS = 500
_POINTS = 20  # lines of a training chart's table
_FLOORS = ("no_context", "shuffled_z")  # they answer at random: no question is interesting for differing from them


@dataclass(frozen=True)
class Table:
    """What a <table> shows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """An inline SVG, the same in a sentence for those who do not see it, and its data."""

    svg: str
    label: str
    table: Table


def render(parts: Sequence[Part]) -> str:
    """The whole page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        labels=[part.label for part in parts],
        signs=signs_section(parts),
        hierarchy=[_evaluation(number, part) for number, part in enumerate(parts) if part.results],
        compression=compression_section(parts),
        training=training_section(parts),
        embeddings=[_diagnostics(number, part) for number, part in enumerate(parts) if part.diagnostics],
        latents=latents_section(parts),
        questions=questions_section(parts),
        configuration=[_configuration(part) for part in parts],
    )


def signs_section(parts: Sequence[Part]) -> list[dict]:
    """All signs, the bad ones first, each with its part's label; then what nothing here measures."""
    found = []
    for part in parts:
        judged = judge_results(part.results) if part.results else []
        judged += judge_predictions(part.predictions) + judge_log(part.log)
        found += [(part.label, sign) for sign in judged]
    found.sort(key=lambda labelled: (BAD, UNDECIDED, GOOD).index(labelled[1].level))
    found += [("", sign) for sign in not_measured([sign for _, sign in found])]
    return [{"label": label, **vars(sign)} for label, sign in found]


def _evaluation(number: int, part: Part) -> dict:
    """F1 of every condition, one chart per LLM, with the critical tests."""
    results, drawn = part.results, []
    every = [row | {"n": results["n"]} for row in results["results"]]
    for place, llm in enumerate(llms_of(every)):
        rows = sorted((row for row in every if row["llm"] in (llm, None)), key=lambda row: -row["f1"])
        label = f"F1 of {llm or 'the encoder alone'}, best first: " + ", ".join(
            f"{row_name(row)} {f1_label(row, row['n'])}" for row in rows
        )
        drawn.append(_chart(charts.hierarchy(results, [llm]), f"hierarchy{number}-{place}", label, _rows_table(rows)))
    return {
        "label": part.label,
        "about": f"{results['dataset']} {results['split']}, n={results['n']}, seed {results['seed']}, source "
        f"{results['source']}, wire {results['codec']}, {results['dtype']}; checkpoint: {results['checkpoint']}",
        "sample": results["dataset"] == "sample",
        "charts": drawn,
        "critical": critical_lines(results),
    }


def _rows_table(rows: Sequence[Mapping]) -> Table:
    head = ("condition", "M", "F1 [95%]", "EM", "first token", "bits/answer byte", "positions", "bytes sent")
    return Table(head, [
        (row["condition"], figure(row["m"], 0), f1_label(row, row["n"]), f"{row['em']:.3f}",
         figure(row["first_token_acc"], 3), figure(row["bits_per_answer_byte"], 2),
         positions(row), figure(row["wire_bytes"], 0))
        for row in rows
    ])  # fmt: skip


def compression_section(parts: Sequence[Part]) -> dict:
    """All evaluations together, so that runs of several M or codecs meet in one chart; in what their data differ."""
    evaluations = [part.results for part in parts if part.results]
    codecs = {results["codec"] for results in evaluations}
    rows = [
        row | {name: results[name] for name in ("codec", "n")} for results in evaluations for row in results["results"]
    ]
    drawn = []
    for place, llm in enumerate(llms_of(rows) if rows else []):
        series: dict[str, list] = {}
        for row in (row for row in rows if row["llm"] == llm):
            series.setdefault(row["condition"] + (f" ({row['codec']})" if len(codecs) > 1 else ""), []).append(row)
        mine = [row for named in series.values() for row in named]
        label = f"F1 of {llm or 'the encoder alone'} against M, positions and bytes: " + ", ".join(
            f"{row_name(row)} F1 {row['f1']:.3f} at {row['llm_positions']:.0f} positions and "
            f"{row['wire_bytes']} bytes" for row in mine
        )  # fmt: skip
        chart = charts.compression(series, llm or "no LLM")
        drawn.append(_chart(chart, f"compression-{place}", label, _rows_table(mine)))
    facts = ("dataset", "split", "n", "seed", "source")
    return {"charts": drawn, "differing": [f for f in facts if len({results[f] for results in evaluations}) > 1]}


def training_section(parts: Sequence[Part]) -> list[dict]:
    """Curves of each stage, those that another one began from first."""
    stages, trained = [], {part.folder: part for part in parts if part.log}
    for number, part in enumerate(parts):
        if part.log:
            names = [name for name in charts.CURVES if charts.curve_keys(part.log, name)]
            drawn = [_curves(f"training{number}-{name}", part.log, name) for name in names]
            found = {"label": part.label, "stage": part.config.get("stage", ""), "charts": drawn}
            stages.append((_turn(part, trained), found))
    return [found for _, found in sorted(stages, key=lambda placed: placed[0])]


def _turn(part: Part, trained: Mapping[Path, Part]) -> tuple[bool, int]:
    """Whether a training is a run of its own, which its stages/ come before, and how many stages lead to it."""
    steps, before = 0, _begun_from(part, trained)
    while before and steps < len(trained):  # records that begin from each other end here, too
        steps, before = steps + 1, _begun_from(before, trained)
    return part.folder.parent.name != "stages", steps


def _begun_from(part: Part, trained: Mapping[Path, Part]) -> Part | None:
    """The stage of the same run whose checkpoint a training began from; runs may have moved since."""
    stage = Path(part.config.get("init") or "").parent.name  # of RUN/stages/scores/checkpoint_best
    near = (part.folder / "stages" / stage, part.folder.with_name(stage)) if stage else ()
    return next((trained[folder] for folder in near if folder in trained), None)


def _curves(id_: str, lines: Sequence[Mapping], name: str) -> Chart:
    keys = charts.curve_keys(lines, name)
    steps, held = charts.steps_and_held(lines)
    rows, spans = [], []
    for kind, found in (("train", steps), ("held out", held)):
        values: dict[float, dict[str, float]] = {}
        for key in keys:
            points = charts.blocks(found, key, _POINTS)
            for step, value in points:
                values.setdefault(step, {})[key] = value
            if points:
                spans.append(f"{kind} {key} from {points[0][1]:.3g} to {points[-1][1]:.3g}")
        rows += [(kind, f"{step:.0f}", *(figure(values[step].get(key), 3) for key in keys)) for step in sorted(values)]
    label = f"{charts.CURVES[name][0]} over {lines[-1]['step']} steps: " + ", ".join(spans)
    return _chart(charts.training_curves(lines, name, width=5.6), id_, label, Table(("questions", "step", *keys), rows))


def _diagnostics(number: int, part: Part) -> dict:
    """What the embeddings look like to each LLM, what changing them does, and what is saved."""
    found, drawn, summary = part.diagnostics, [], []
    for place, (name, llm) in enumerate(found.get("llms", {}).items()):
        kinds = llm.get("embeddings", {})
        histograms = {kind: figures["rms_per_token"] for kind, figures in kinds.items() if "rms_per_token" in figures}
        summary += [_kind_row(name, kind, figures) for kind, figures in kinds.items()]
        if histograms:
            spreads = (f"{kind} {_spread(h)} (median, 5% to 95%)" for kind, h in histograms.items())
            rows = [
                (kind, f"{low:.4g}", f"{high:.4g}", str(count))
                for kind, h in histograms.items()
                for low, high, count in zip(h["edges"], h["edges"][1:], h["counts"], strict=False)
            ]
            chart = charts.rms_histogram(histograms, llm.get("vocabulary_rms"), name)
            label = f"RMS per token of {name}: " + ", ".join(spreads)
            table = Table(("embeddings", "from", "to", "tokens"), rows)
            drawn.append(_chart(chart, f"embeddings{number}-{place}", label, table))
    head = ("LLM", "embeddings", "RMS per token (5% to 95%)", "nearest cosine", "effective rank", "mean cosine")
    return {
        "label": part.label,
        "about": _about(found),
        "sample": found.get("dataset") == "sample",
        "charts": drawn,
        "summary": Table(head, summary),
        "interventions": _interventions(number, found.get("interventions", [])),
        "saved": _saved(found.get("compression", {})),
    }


def _kind_row(llm: str, kind: str, figures: Mapping) -> tuple[str, ...]:
    rms, cosine = figures.get("rms_per_token"), figures.get("nearest_cosine", {})
    return (
        llm, kind, _spread(rms) if rms else "", figure(cosine.get("p50"), 2),
        figure(figures.get("effective_rank"), 1), figure(figures.get("mean_cosine"), 2),
    )  # fmt: skip


def _interventions(number: int, rows: Sequence[Mapping]) -> list[Chart]:
    drawn = []
    for place, llm in enumerate(dict.fromkeys(row["llm"] for row in rows)):
        mine = [row for row in rows if row["llm"] == llm]
        figures = [
            (row["embeddings"], row["intervention"], f"{row['f1']:.3f}",
             show_interval(shown_ci(row["f1"], row.get("f1_ci95"), row.get("paragraphs", row["n"]))),
             figure(row.get("nll_per_token"), 2), _percent(row.get("empty_answers")))
            for row in mine
        ]  # fmt: skip
        label = f"F1 of {llm} after interventions: " + ", ".join(" ".join(row[:3]) for row in figures)
        table = Table(("embeddings", "intervention", "F1", "95%", "NLL per token", "empty answers"), figures)
        drawn.append(_chart(charts.interventions(mine, [llm]), f"interventions{number}-{place}", label, table))
    return drawn


def _saved(found: Mapping) -> Table:
    """Bytes, positions and KV cache, as text and as latents."""
    rows = [(f"bytes, {what}", "", f"{found[key]:,.0f}")
            for key, what in (("text_bytes", "text"), ("zlib_bytes", "text, zlib")) if key in found]  # fmt: skip
    rows += [(f"bytes, wire {codec}", "", f"{size:,.0f}") for codec, size in found.get("wire_bytes", {}).items()]
    for key, what in (("positions", "positions"), ("kv_bytes", "bytes of keys and values")):
        for llm, kinds in found.get(key, {}).items():
            rows += [(f"{what}, {kind}", llm, f"{value:,.0f}") for kind, value in kinds.items()]
    return Table(("what", "LLM", "mean per question"), rows)


def latents_section(parts: Sequence[Part]) -> list[dict]:
    """For each part with examples, every latent's word and its neighbour in each vocabulary."""
    shown = []
    for part in parts:
        examples = [_example(example) for example in (part.diagnostics or {}).get("latents", [])]
        llms = dict.fromkeys(
            near["llm"] for example in examples for word in example["words"] for near in word["nearest"]
        )
        if examples:
            shown.append({"label": part.label, "llms": list(llms), "examples": examples})
    return shown


def _example(example: Mapping) -> dict:
    words = [
        {"word": _visible(word["word"]), "nearest": [_neighbour(*found) for found in word.get("nearest", {}).items()]}
        for word in example.get("words", [])
    ]
    kept = {key: example.get(key, "") for key in ("id", "question")}
    answers = list(dict.fromkeys(example.get("answers", [])))
    return kept | {"answers": answers, "predictions": example.get("predictions", {}), "words": words}


def _neighbour(llm: str, found: tuple[str, float]) -> dict:
    token, cosine = found
    strength = min(1, max(0, cosine))  # of the colour
    return {"llm": llm, "token": _visible(token), "cosine": f"{cosine:.2f}", "strength": f"{strength:.2f}"}


def _visible(token: str) -> str:
    """A token whose white space can be seen."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")


def questions_section(parts: Sequence[Part]) -> dict:
    """A row per question, a column per condition (and evaluation, if there are several), in it an answer per LLM."""
    evaluations = [part for part in parts if part.predictions]
    texts, notes = _texts(evaluations)
    columns: dict[tuple, str] = {}
    answers: dict[str, dict[tuple, dict]] = {}
    for part in evaluations:
        for line in part.predictions:
            column = (part.label, line["condition"], line["m"])
            name = row_name(line)
            columns[column] = f"{part.label}: {name}" if len(evaluations) > 1 else name
            answers.setdefault(line["id"], {}).setdefault(column, {})[line["llm"]] = line
    llms = list(dict.fromkeys(line["llm"] for part in evaluations for line in part.predictions if line["llm"]))
    shown = list(answers)[:MOST_QUESTIONS]
    return {
        "columns": list(columns.values()),
        "llms": llms,
        "rows": [_question(id_, answers[id_], columns, llms, texts.get(id_)) for id_ in shown],
        "left_out": len(answers) - len(shown),
        "notes": notes,
    }


def _texts(evaluations: Sequence[Part]) -> tuple[dict[str, Question], list[str]]:
    """Questions by id, as far as their data can be read here, and why others cannot."""
    texts, notes = {}, []
    for dataset, split in dict.fromkeys((part.results["dataset"], part.results["split"]) for part in evaluations):
        try:
            loaded = load(dataset, split)
        except (ValueError, FileNotFoundError) as error:
            notes.append(f"Questions of {dataset} cannot be read here, so their ids are shown: {error}")
            continue
        if loaded.name != dataset:
            notes.append(f"Questions of {dataset} are not at hand (set SQUAD_DIR), so their ids are shown.")
            continue
        texts |= {question.id: question for question in loaded.questions}
    return texts, notes


def _question(
    id_: str, answers: Mapping[tuple, Mapping], columns: Mapping, llms: Sequence[str], text: Question | None
) -> dict:
    references = next(iter(next(iter(answers.values())).values()))["references"]
    return {
        "id": id_,
        "question": text.question if text else None,
        "context": text.context if text else None,
        "references": list(dict.fromkeys(references)),
        "cells": [[_answer(llm, line) for llm, line in answers.get(column, {}).items()] for column in columns],
        "differ": [llm for llm in llms if _differ(answers, llm)],
    }


def _answer(llm: str | None, line: Mapping) -> dict:
    f1 = line["f1"]
    mark = ("right", "✓") if f1 == 1 else ("wrong", "✗") if f1 == 0 else ("partly", "≈")
    return {"llm": llm or "", "text": line["prediction"], "f1": f"{f1:.2f}", "mark": mark}


def _differ(answers: Mapping[tuple, Mapping], llm: str) -> bool:
    """Whether an LLM's answers differ between conditions; the floors count only where there is nothing else."""
    given = {column: normalize_answer(lines[llm]["prediction"]) for column, lines in answers.items() if llm in lines}
    proper = [answer for (_, condition, _), answer in given.items() if condition not in _FLOORS]
    return len(set(proper if len(proper) > 1 else given.values())) > 1


def _configuration(part: Part) -> dict:
    """What a part was made with. Its figures know best, its config.json knows most."""
    made = part.record | (part.diagnostics or {}) | (part.results or {})
    config, machine = part.config, made.get("machine") or {}
    facts = {key: made.get(key, config.get(key)) for key in ("dataset", "split", "source", "n", "seed", "checkpoint")}
    facts["n"] = facts["n"] or config.get("samples")  # a training has no results
    facts["commit"] = made.get("git")
    facts |= {key: ", ".join(value) if isinstance(value, list) else value for key, value in machine.items()}
    if part.best:
        facts["best checkpoint"] = f"step {part.best.get('step')}, {_figures(flat(part.best.get('validation') or {}))}"
    known = [(key, str(value)) for key, value in facts.items() if value not in (None, "")]  # a seed may be 0
    kinds = {"evaluation": part.results, "training": part.log, "diagnostics": part.diagnostics}
    return {
        "label": part.label,
        "kinds": ", ".join(kind for kind, found in kinds.items() if found),
        "sample": facts["dataset"] == "sample",
        "facts": Table(("fact", "value"), known),
        "settings": Table(("setting", "value"), [(key, _setting(value)) for key, value in config.items()]),
    }


def _setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _about(found: Mapping) -> str:
    facts = {"": f"{found.get('dataset', '')} {found.get('split', '')}"}
    facts |= {f"{key}=": found.get(key) for key in ("n", "seed", "source", "m", "d_z", "dtype", "checkpoint")}
    return ", ".join(f"{key}{value}" for key, value in facts.items() if value not in (None, "", " "))


def _chart(drawn: Figure, name: str, label: str, table: Table) -> Chart:
    return Chart(charts.inline_svg(drawn, name), label + ".", table)


def _figures(values: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.3f}" for key, value in values.items())


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _spread(found: Mapping) -> str:
    """Median and the middle 90% of a histogram."""
    median, low, high = (figure(found.get(key), 4) or "?" for key in ("p50", "p5", "p95"))
    return f"{median} ({low} to {high})"
