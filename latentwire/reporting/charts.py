"""Charts, as matplotlib figures: for PNG files, and as inline SVG for the page."""

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from latentwire.evaluation.scores import shown_ci
from latentwire.reporting.labels import GROWTH, colour_of, describe_llm, llms_of, row_name
from latentwire.training.log import flat
from latentwire.utils.files import read_lines

_MARKERS = "osD^vP*X<>p"
_WIDTH = 5.2  # inches of a chart for one LLM: its letters can still be read on a phone
_SMOOTH = 20  # steps that one point of a curve averages, at most

# Histograms of diagnostics.json, and their titles.
_DISTRIBUTIONS = {
    "rms_per_token": "RMS per token",
    "rms_per_dimension": "RMS per dimension",
    "first_norm": "RMS after the first norm",
    "nearest_cosine": "cosine to the nearest token",
}
# Which figures of a training log go into a chart: label, by the words of their names, logarithmic or not.
CURVES: dict[str, tuple[str, Callable[[list[str]], bool], bool]] = {
    "first_token_accuracy": ("first-token accuracy", lambda words: words[:3] == ["first", "token", "acc"], False),
    "loss": ("loss", lambda words: words in (["loss"], ["span"]) or bool({"ce", "kd"} & set(words)), False),
    "held_out": ("held-out score", lambda words: "f1" in words or words == ["answer", "kept"], False),
    "gradient_norms": ("gradient norm", lambda words: words[:2] == ["grad", "norm"], True),
}


def hierarchy(results: Mapping, llms: Sequence[str | None]) -> Figure:
    """Bars of F1 with 95% intervals, best first, one panel per LLM."""
    shown = {llm: [row for row in results["results"] if row["llm"] in (llm, None)] for llm in llms}
    width = 6 if len(llms) > 1 else _WIDTH
    size = (width * len(llms), 1.6 + 0.36 * max(map(len, shown.values())))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(llms), sharex=True, squeeze=False)
    for panel, llm in zip(panels[0], llms, strict=True):
        rows = sorted(shown[llm], key=lambda row: row["f1"])
        for y, row in enumerate(rows):
            _bar(panel, y, row, results["n"], colour_of(row["condition"], row), 0.7)
        panel.set_yticks(range(len(rows)), [row_name(row) for row in rows])
        _f1_axis(panel, 1)
        ids = [row["llm_id"] for row in rows if row["llm"]]
        panel.set_title(f"{describe_llm(ids[0])} ({llm})" if ids else "no LLM", fontsize=10)
    figure.suptitle(_of_data(results), fontsize=11)
    return figure


def comparison(compared: Mapping) -> Figure:
    """Bars of F1 with 95% intervals of each run (compared: comparison.json), in their order, and each seed's F1 as a
    point; the first run, which all others are paired with, in another colour and, at one M, as a line. One panel per
    LLM."""
    llms = llms_of(compared["rows"])
    several = len({row["m"] for row in compared["rows"] if row["m"]}) > 1
    shown = {llm: [row for row in compared["rows"] if row["llm"] in (llm, None)][::-1] for llm in llms}
    first, others = colour_of(compared["condition"]), colour_of("others")
    size = (6 * len(llms), 1.6 + 0.36 * max(map(len, shown.values())))
    figure = Figure(figsize=size, layout="constrained")
    for panel, llm in zip(figure.subplots(1, len(llms), squeeze=False)[0], llms, strict=True):
        own = [row for row in shown[llm] if row["llm"] == llm or len(llms) == 1]
        base = own[-1]
        for y, row in enumerate(shown[llm]):
            _bar(panel, y, row, compared["n"], first if row["name"] == base["name"] else others, 0.7)
            if len(row["seed_f1"]) > 1:
                panel.plot(row["seed_f1"], [y] * len(row["seed_f1"]), "k|", ms=9)
        if not several:
            panel.axvline(base["f1"], color=first, lw=1, ls=":")
        names = [f"{row['name']}, M={row['m']}" if several and row["m"] else row["name"] for row in shown[llm]]
        panel.set_yticks(range(len(names)), names)
        _f1_axis(panel)
        panel.set_title(llm, fontsize=10)
    figure.suptitle(f"{compared['condition']}: {_of_data(compared)}", fontsize=11)
    return figure


def rates(compared: Mapping) -> Figure:
    """F1 with its 95% interval against the bytes sent, of each run and LLM of comparison.json; codecs of the same
    weights are joined by a line."""
    figure = Figure(figsize=(1.3 * _WIDTH, _WIDTH), layout="constrained")
    panel = figure.subplots()
    for number, llm in enumerate(llms_of(compared["rows"])):
        sent = [row for row in compared["rows"] if row["llm"] == llm and row["wire_bytes"] is not None]
        rows = sorted(sent, key=lambda row: row["wire_bytes"])
        colour = f"C{number}"
        for row in rows:
            ci = shown_ci(row["f1"], row["f1_ci95"], row.get("paragraphs", compared["n"]))
            low, high = ci or (row["f1"], row["f1"])
            spread = [[row["f1"] - low], [high - row["f1"]]]
            panel.errorbar(row["wire_bytes"], row["f1"], spread, fmt="o", ms=4, color=colour, lw=1)
            panel.annotate(
                row["codec"] if row["weights"] else row["name"], (row["wire_bytes"], row["f1"]), (4, 4),
                textcoords="offset points", fontsize=7,
            )  # fmt: skip
        for weights in {tuple(row["weights"]) for row in rows if row["weights"]}:
            line = [(row["wire_bytes"], row["f1"]) for row in rows if tuple(row["weights"]) == weights]
            panel.plot(*zip(*line, strict=True), color=colour, lw=1, label=llm)
    panel.set_xscale("symlog", linthresh=10)  # no_context sends 0 bytes
    panel.set_xlabel("bytes sent")
    panel.set_ylabel("F1")
    panel.spines[["top", "right"]].set_visible(False)
    found = dict(zip(*panel.get_legend_handles_labels()[::-1], strict=True))
    panel.legend(found.values(), found, frameon=False)
    figure.suptitle(_of_data(compared), fontsize=11)
    return figure


def compression(series: Mapping[str, Sequence[Mapping]], title: str) -> Figure:
    """F1 of one LLM's rows against M, positions and bytes; a name's rows are joined by a line. The text is a line
    across where it has no M."""
    figure = Figure(figsize=(_WIDTH, 8.4 + 0.12 * len(series)), layout="constrained")
    panels = figure.subplots(3, 1)
    figure.suptitle(title, fontsize=10)
    axes = {"m": "M", "llm_positions": "positions that the LLM reads", "wire_bytes": "bytes sent"}
    for panel, (key, label) in zip(panels, axes.items(), strict=True):
        for number, (name, rows) in enumerate(series.items()):
            colour = colour_of(rows[0]["condition"], rows[0])
            points = sorted((row[key], row["f1"]) for row in rows if row[key] is not None)
            if points:
                marker = _MARKERS[number % len(_MARKERS)]
                panel.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=5, lw=1.2, label=name)
            elif rows[0]["condition"] == "text":
                panel.axhline(rows[0]["f1"], color=colour, lw=1, ls="--")
        panel.set_xlabel(label)
        panel.set_ylabel("F1")
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_xticks(sorted({row["m"] for rows in series.values() for row in rows if row["m"] is not None}))
    panels[2].set_xscale("symlog", linthresh=10)  # no_context sends 0 bytes
    panels[2].set_xlim(0, 3 * max(row["wire_bytes"] for rows in series.values() for row in rows) + 1)
    handles, names = panels[2].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def sweep(summary: Mapping) -> Figure:
    """A bar per configuration (summary: sweep_summary.json), best first; a dashed line where the token budget of the
    same M ends."""
    ranked = summary["ranked"][::-1]
    figure = Figure(figsize=(8, 1.4 + 0.3 * len(ranked)), layout="constrained")
    panel = figure.subplots()
    for y, entry in enumerate(ranked):
        _bar(panel, y, entry, summary["n"], colour_of("latentwire"), 0.7)
        of_m = [r for r in summary["baselines"] if (r["condition"], r["m"]) == ("token_budget", entry["latent_len"])]
        if of_m:
            budget = sum(row["f1"] for row in of_m) / len(of_m)
            panel.vlines(budget, y - 0.5, y + 0.5, color="black", ls="--", lw=1)
    panel.set_yticks(range(len(ranked)), [entry["name"] for entry in ranked])
    _f1_axis(panel)
    panel.set_xlabel(f"F1, mean of the LLMs, 95% interval by paragraph (n={summary['n']}); dashed: token_budget@M")
    return figure


def growth(lines: Sequence[Mapping]) -> Figure:
    """Seconds (points) and peak memory (grey) as each thing grows, a panel each; the dashed line is proportional to the
    first point. lines: name, value, seconds and peak_memory_mb of each measurement."""
    kinds: dict[str, list[Mapping]] = {}
    for line in lines:
        kinds.setdefault(line["name"].removeprefix(GROWTH).replace("_", " "), []).append(line)
    across = min(4, len(kinds))
    down = -(-len(kinds) // across)
    figure = Figure(figsize=(3.2 * across, 2.8 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel in panels[len(kinds) :]:
        panel.set_axis_off()
    for panel, (kind, measured) in zip(panels, kinds.items(), strict=False):
        values, seconds = ([line[key] for line in measured] for key in ("value", "seconds"))
        panel.plot([0, max(values)], [0, seconds[0] * max(values) / values[0]], color="black", ls="--", lw=0.8)
        panel.plot(values, seconds, color=colour_of("latentwire"), marker="o", ms=4)
        panel.set(xlim=(0, None), ylim=(0, None), xlabel=kind, ylabel="seconds")
        memory = [(line["value"], line["peak_memory_mb"] / 1e3) for line in measured if line["peak_memory_mb"]]
        if memory:
            beside = panel.twinx()
            beside.plot(*zip(*memory, strict=True), color="grey", marker="s", ms=3, lw=0.8)
            beside.set_ylabel("memory, GB", color="grey")
            beside.set_ylim(0, 1.05 * max(gb for _, gb in memory))
    return figure


def documents(runs: Sequence[Mapping]) -> list[dict]:
    """How time and memory grew with the documents of a corpus, for `growth`; runs: each start of the program, as
    results.json has them, one behind the other."""
    lines, rows, seconds = [], 0, 0.0
    for run in runs:
        lines += [
            {"name": f"{GROWTH}documents", "value": rows + part["rows"], "seconds": seconds + part["seconds"],
             "peak_memory_mb": part["memory_mb"]}
            for part in run.get("progress", [])
            if rows + part["rows"]  # nothing grew before the first
        ]  # fmt: skip
        rows, seconds = rows + run["rows"], seconds + run["seconds"]
    return lines


def blocks(lines: Sequence[Mapping], key: str, most: int) -> list[tuple[float, float]]:
    """Mean step and mean value of `key` over runs of equally many lines: all lines become about `most` points."""
    found = [(line["step"], line[key]) for line in lines if key in line]
    width = max(1, -(-len(found) // most))
    cut = [found[i : i + width] for i in range(0, len(found), width)]
    return [(sum(s for s, _ in block) / len(block), sum(v for _, v in block) / len(block)) for block in cut]


def steps_and_held(lines: Sequence[Mapping]) -> tuple[list[dict], list[dict]]:
    """The figures of a training log by one name each: of its steps, and of its validations."""
    steps = [flat(line) for line in lines if "validation" not in line]
    held = [{"step": line["step"]} | flat(line["validation"]) for line in lines if "validation" in line]
    return steps, held


def curve_keys(lines: Sequence[Mapping], name: str) -> list[str]:
    """Names of the figures, of steps and validations, that the chart CURVES[name] shows."""
    takes = CURVES[name][1]
    steps, held = steps_and_held(lines)
    return sorted({key for line in (*steps, *held) for key in line if takes(re.split("[ _]", key))})


def draw_curves(folder: Path) -> list[Path]:
    """first_token_accuracy.png and loss.png from the metrics.jsonl of a run; the paths that were drawn."""
    lines = read_lines(folder / "metrics.jsonl")
    drawn = []
    for name in ("first_token_accuracy", "loss"):
        if curve_keys(lines, name):
            drawn.append(folder / f"{name}.png")
            training_curves(lines, name).savefig(drawn[-1], dpi=130)
    return drawn


def training_curves(lines: Sequence[Mapping], name: str, width: float = 7) -> Figure:
    """The chart CURVES[name] of a training log: training smoothed, validations as points."""
    label, _, log = CURVES[name]
    steps, validations = steps_and_held(lines)
    keys = curve_keys(lines, name)
    figure = Figure(figsize=(width, 3.4 + 0.16 * len(keys)), layout="constrained")
    panel = figure.subplots()
    for number, key in enumerate(keys):
        points = blocks(steps, key, max(10, -(-len(steps) // _SMOOTH)))
        if points:
            panel.plot(*zip(*points, strict=True), color=f"C{number}", label=f"train {key}", lw=1.4)
        held = [(line["step"], line[key]) for line in validations if key in line]
        if held:
            style = {"ls": "--", "marker": "o", "ms": 4}
            panel.plot(*zip(*held, strict=True), color=f"C{number}", label=f"held out {key}", **style)
    panel.set_xlabel("step")
    panel.set_ylabel(label)
    if log:
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def rms_histogram(histograms: Mapping[str, Mapping], vocabulary: float | None, title: str) -> Figure:
    """RMS per token by kind of embeddings (histograms: edges and counts by kind), the vocabulary's as a line."""
    figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
    panel = figure.subplots()
    _distributions(panel, histograms, vocabulary)
    panel.set_xlabel("RMS of a token's embedding")
    panel.set_ylabel("share of tokens")
    panel.set_title(title, fontsize=10)
    panel.legend(fontsize=9, frameon=False)
    return figure


def embeddings(llms: Mapping[str, Mapping]) -> Figure:
    """Distributions of text and learned embeddings and their share of variance by direction, a row per LLM (llms: as in
    diagnostics.json)."""
    figure = Figure(figsize=(17, 3 * len(llms)), layout="constrained")
    panels = figure.subplots(len(llms), len(_DISTRIBUTIONS) + 1, squeeze=False)
    for (name, llm), row in zip(llms.items(), panels, strict=True):
        kinds = llm["embeddings"]
        for key, panel in zip(_DISTRIBUTIONS, row, strict=False):
            mark = llm["vocabulary_rms"] if key == "rms_per_token" else None
            _distributions(panel, {kind: found[key] for kind, found in kinds.items()}, mark)
            panel.set_title(f"{name}: {_DISTRIBUTIONS[key]}", fontsize=9)
        for kind, found in kinds.items():
            directions = range(1, len(found["spectrum"]) + 1)
            row[-1].plot(directions, found["spectrum"], color=colour_of(kind), label=kind)
        row[-1].set(xscale="log", yscale="log")
        row[-1].set_title(f"{name}: share of variance by direction", fontsize=9)
        row[-1].spines[["top", "right"]].set_visible(False)
        row[0].legend(fontsize=8, frameon=False)
    return figure


def interventions(rows: Sequence[Mapping], llms: Sequence[str]) -> Figure:
    """F1 with 95% intervals after each intervention, the kinds of embeddings side by side, one panel per LLM."""
    kinds = list(dict.fromkeys(row["embeddings"] for row in rows))
    places = {name: -y for y, name in enumerate(dict.fromkeys(row["intervention"] for row in rows))}
    height = 0.8 / len(kinds)
    size = (_WIDTH * len(llms), 1.6 + 0.2 * len(places) * len(kinds))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(llms), squeeze=False)[0]
    for panel, llm in zip(panels, llms, strict=True):
        for number, kind in enumerate(kinds):
            colour = colour_of(kind)
            for row in (row for row in rows if (row["llm"], row["embeddings"]) == (llm, kind)):
                y = places[row["intervention"]] + 0.4 - height * (number + 0.5)
                _bar(panel, y, row, row["n"], colour, 0.9 * height)
            panel.barh(0, 0, color=colour, label=kind)
        panel.set_yticks(list(places.values()), list(places))
        _f1_axis(panel)
        panel.set_title(llm, fontsize=10)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(kinds), fontsize=9, frameon=False)
    return figure


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for a page: its letters are text, black takes the page's colour, and all ids begin
    with `name`, so that several can stand in one page."""
    drawn = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", transparent=True)
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]  # no XML prolog, no doctype
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", svg)  # the page gives it a width,
    svg = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", svg)  # and viewBox the height that fits
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    return re.sub(r"(fill|stroke): #000000", r"\1: currentColor", svg)


def _distributions(panel: Axes, histograms: Mapping[str, Mapping], mark: float | None) -> None:
    """Shares by bin, a colour per kind, and a dotted line at `mark`."""
    for kind, found in histograms.items():
        shares = [count / (sum(found["counts"]) or 1) for count in found["counts"]]
        panel.stairs(shares, found["edges"], label=kind, color=colour_of(kind), fill=True, alpha=0.6)
    if mark is not None:
        panel.axvline(mark, color="black", lw=1, ls=":", label="vocabulary")
    panel.spines[["top", "right"]].set_visible(False)


def _bar(panel: Axes, y: float, row: Mapping, n: int, colour: str, height: float) -> None:
    """One bar of F1, a mean of n questions, with its interval and its figure."""
    low, high = shown_ci(row["f1"], row.get("f1_ci95"), row.get("paragraphs", n)) or (row["f1"], row["f1"])
    error = [[max(0, row["f1"] - low)], [max(0, high - row["f1"])]]
    panel.barh(y, row["f1"], xerr=error, color=colour, height=height, error_kw={"capsize": 3, "lw": 1})
    panel.text(max(high, row["f1"]) + 0.01, y, f"{row['f1']:.2f}", va="center", fontsize=8)


def _of_data(record: Mapping) -> str:
    """Which questions a chart is of."""
    return f"{record['dataset']} {record['split']}, n={record['n']}, source {record['source']}"


def _f1_axis(panel: Axes, most: float | None = None) -> None:
    """What every chart of F1 bars has below and around them."""
    panel.set_xlim(0, most)
    panel.set_xlabel("F1, 95% interval by paragraph")
    panel.spines[["top", "right"]].set_visible(False)
