"""Charts, as matplotlib figures: for PNG files, and as inline SVG for the report.

One colour a condition everywhere; readable on white and on black.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLOURS = {
    "latentwire": "#d1495b", "text": "#4f7cac", "no_context": "#9aa5b1", "shuffled_z": "#9aa5b1",
    "token_budget": "#66a182", "token_budget_context": "#8f6bb0", "token_select": "#d08c2f", "pca": "#3fa7a3",
    "pca_pool": "#7f9a3a", "pca_rank": "#a0705a", "untrained": "#e08a98", "selected_text": "#b0913b",
    "encoder_only": "#6f7fd0", "text_tuned": "#7fa3c7", "token_budget_tuned": "#8fbf9f",
    "selected_text_tuned": "#cdb98a", "oracle_text": "#9c8f80", "oracle_wire": "#c2777f",
}  # fmt: skip
_OTHERS = "#66a182"
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
# Which values of metrics.jsonl go into a chart of training: label, keys, logarithmic or not.
CURVES: dict[str, tuple[str, Callable[[str], bool], bool]] = {
    "first_token_accuracy": ("first-token accuracy", lambda key: "first_token_acc" in key, False),
    "loss": ("loss", lambda key: key in ("loss", "span") or bool({"ce", "kd"} & set(key.split("_"))), False),
    "held_out": ("held-out score", lambda key: "f1" in key.split("_") or key == "answer_kept", False),
    "gradient_norms": ("gradient norm", lambda key: key.startswith("grad_norm_"), True),
}


def describe_llm(llm_id: str) -> str:
    """An LLM's id, with its precision where the id does not tell."""
    return f"{llm_id.removeprefix('offline:')}, dequantised Q4" if llm_id.startswith("offline:") else llm_id


def row_name(row: Mapping) -> str:
    """Condition and, where it has one, M."""
    return row["condition"] + (f"  M={row['m']}" if row["m"] else "")


def llms_of(rows: Sequence[Mapping]) -> list[str | None]:
    """LLMs of rows of results.json; [None] if no row has one."""
    return list(dict.fromkeys(row["llm"] for row in rows if row["llm"])) or [None]


def hierarchy(results: Mapping, llms: Sequence[str | None]) -> Figure:
    """Bars of F1 with 95% intervals, best first, one panel an LLM."""
    shown = {llm: [row for row in results["results"] if row["llm"] in (llm, None)] for llm in llms}
    width = 6 if len(llms) > 1 else _WIDTH
    size = (width * len(llms), 1.6 + 0.36 * max(map(len, shown.values())))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(llms), sharex=True, squeeze=False)
    for panel, llm in zip(panels[0], llms, strict=True):
        rows = sorted(shown[llm], key=lambda row: row["f1"])
        for y, row in enumerate(rows):
            _bar(panel, y, row, _COLOURS.get(row["condition"], _OTHERS), 0.7)
        panel.set_yticks(range(len(rows)), [row_name(row) for row in rows])
        panel.set_xlim(0, 1)
        panel.set_xlabel("F1, 95% interval by paragraph")
        ids = [row["llm_id"] for row in rows if row["llm"]]
        panel.set_title(f"{llm}: {describe_llm(ids[0])}" if ids else "no LLM", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{results['dataset']} {results['split']}, n={results['n']}, source {results['source']}", fontsize=11
    )
    return figure


def comparison(compared: Mapping) -> Figure:
    """Bars of F1 with 95% intervals of each run (compared: comparison.json), in their order, and each seed's F1 as a
    point; the first run, which all others are paired with, as a line. One panel an LLM."""
    llms = llms_of(compared["rows"])
    shown = {llm: [row for row in compared["rows"] if row["llm"] == llm][::-1] for llm in llms}
    size = (6 * len(llms), 1.6 + 0.36 * max(map(len, shown.values())))
    figure = Figure(figsize=size, layout="constrained")
    for panel, llm in zip(figure.subplots(1, len(llms), squeeze=False)[0], llms, strict=True):
        for y, row in enumerate(shown[llm]):
            _bar(panel, y, row, _COLOURS["latentwire"] if row is shown[llm][-1] else _OTHERS, 0.7)
            if len(row["seed_f1"]) > 1:
                panel.plot(row["seed_f1"], [y] * len(row["seed_f1"]), "k|", ms=9)
        panel.axvline(shown[llm][-1]["f1"], color=_COLOURS["latentwire"], lw=1, ls=":")
        panel.set_yticks(range(len(shown[llm])), [row["name"] for row in shown[llm]])
        panel.set_xlim(left=0)
        panel.set_xlabel("F1, 95% interval by paragraph")
        panel.set_title(llm, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{compared['condition']}: {compared['dataset']} {compared['split']}, n={compared['n']}, source "
        f"{compared['source']}", fontsize=11,
    )  # fmt: skip
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
            colour = _COLOURS.get(rows[0]["condition"], f"C{number}")
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


def blocks(lines: Sequence[Mapping], key: str, most: int) -> list[tuple[float, float]]:
    """Mean step and mean value of `key` over runs of equally many lines: all lines become about `most` points."""
    found = [(line["step"], line[key]) for line in lines if key in line]
    width = max(1, -(-len(found) // most))
    cut = [found[i : i + width] for i in range(0, len(found), width)]
    return [(sum(s for s, _ in block) / len(block), sum(v for _, v in block) / len(block)) for block in cut]


def curve_keys(lines: Sequence[Mapping], name: str) -> list[str]:
    """Keys of metrics.jsonl, of steps and validations, that the chart CURVES[name] shows."""
    takes = CURVES[name][1]
    return sorted({key for line in lines for key in line.get("validation", line) if takes(key)})


def training_curves(lines: Sequence[Mapping], name: str, width: float = 7) -> Figure:
    """The chart CURVES[name] of the lines of metrics.jsonl: training smoothed, validations as points."""
    label, _, log = CURVES[name]
    steps = [line for line in lines if "validation" not in line]
    validations = [{"step": line["step"]} | line["validation"] for line in lines if "validation" in line]
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
    """Distributions of text and learned embeddings and their share of variance by direction, a row an LLM (llms: as in
    diagnostics.json)."""
    figure = Figure(figsize=(17, 3 * len(llms)), layout="constrained")
    panels = figure.subplots(len(llms), len(_DISTRIBUTIONS) + 1, squeeze=False)
    for (name, llm), row in zip(llms.items(), panels, strict=True):
        kinds = llm["embeddings"]
        for key, panel in zip(_DISTRIBUTIONS, row, strict=False):
            mark = llm["vocabulary_rms"] if key == "rms_per_token" else None
            _distributions(panel, {kind: found[key] for kind, found in kinds.items()}, mark)
            panel.set_title(f"{name}: {_DISTRIBUTIONS[key]}", fontsize=9)
        for number, (kind, found) in enumerate(kinds.items()):
            directions = range(1, len(found["spectrum"]) + 1)
            row[-1].plot(directions, found["spectrum"], color=_COLOURS.get(kind, f"C{number}"), label=kind)
        row[-1].set(xscale="log", yscale="log")
        row[-1].set_title(f"{name}: share of variance by direction", fontsize=9)
        row[-1].spines[["top", "right"]].set_visible(False)
        row[0].legend(fontsize=8, frameon=False)
    return figure


def interventions(rows: Sequence[Mapping], llms: Sequence[str]) -> Figure:
    """F1 with 95% intervals after each intervention, the kinds of embeddings side by side, one panel an LLM."""
    kinds = list(dict.fromkeys(row["embeddings"] for row in rows))
    places = {name: -y for y, name in enumerate(dict.fromkeys(row["intervention"] for row in rows))}
    height = 0.8 / len(kinds)
    size = (_WIDTH * len(llms), 1.6 + 0.2 * len(places) * len(kinds))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(llms), squeeze=False)[0]
    for panel, llm in zip(panels, llms, strict=True):
        for number, kind in enumerate(kinds):
            colour = _COLOURS.get(kind, f"C{number}")
            for row in (row for row in rows if (row["llm"], row["embeddings"]) == (llm, kind)):
                _bar(panel, places[row["intervention"]] + 0.4 - height * (number + 0.5), row, colour, 0.9 * height)
            panel.barh(0, 0, color=colour, label=kind)
        panel.set_yticks(list(places.values()), list(places))
        panel.set_xlim(left=0)
        panel.set_xlabel("F1, 95% interval by paragraph")
        panel.set_title(llm, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
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
    """Shares by bin, a colour a kind, and a dotted line at `mark`."""
    for number, (kind, found) in enumerate(histograms.items()):
        shares = [count / (sum(found["counts"]) or 1) for count in found["counts"]]
        colour = _COLOURS.get(kind, f"C{number}")
        panel.stairs(shares, found["edges"], label=kind, color=colour, fill=True, alpha=0.6)
    if mark is not None:
        panel.axvline(mark, color="black", lw=1, ls=":", label="vocabulary")
    panel.spines[["top", "right"]].set_visible(False)


def _bar(panel: Axes, y: float, row: Mapping, colour: str, height: float) -> None:
    """One bar of F1 with its interval and its figure."""
    low, high = row.get("f1_ci95") or (row["f1"], row["f1"])
    error = [[max(0, row["f1"] - low)], [max(0, high - row["f1"])]]
    panel.barh(y, row["f1"], xerr=error, color=colour, height=height, error_kw={"capsize": 3, "lw": 1})
    panel.text(max(high, row["f1"]) + 0.01, y, f"{row['f1']:.2f}", va="center", fontsize=8)
