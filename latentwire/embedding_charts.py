"""Charts of the diagnostics."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

_COLOURS = {"text": "#2e4057", "latentwire": "#d1495b"}
_HISTOGRAMS = {
    "rms_per_token": "RMS per token",
    "rms_per_dimension": "RMS per dimension",
    "first_norm": "RMS after the first norm",
    "nearest_cosine": "cosine to the nearest token",
}


def draw_embeddings(results: Mapping, path: Path) -> None:
    """For each LLM the distributions of text and learned embeddings, and the share of variance by direction."""
    llms = results["llms"]
    figure, panels = plt.subplots(
        len(llms), len(_HISTOGRAMS) + 1, figsize=(17, 3 * len(llms)), squeeze=False, layout="constrained"
    )
    for (name, llm), row in zip(llms.items(), panels, strict=True):
        for (key, title), panel in zip(_HISTOGRAMS.items(), row, strict=False):
            for kind, found in llm["embeddings"].items():
                counts = np.array(found[key]["counts"]) / sum(found[key]["counts"])
                panel.stairs(counts, found[key]["edges"], label=kind, color=_COLOURS[kind], fill=True, alpha=0.5)
            panel.set_title(f"{name}: {title}", fontsize=9)
        row[0].axvline(llm["vocabulary_rms"], color="black", lw=1, ls=":", label="vocabulary")
        for kind, found in llm["embeddings"].items():
            row[-1].plot(range(1, len(found["spectrum"]) + 1), found["spectrum"], color=_COLOURS[kind], label=kind)
        row[-1].set(xscale="log", yscale="log")
        row[-1].set_title(f"{name}: share of variance by direction", fontsize=9)
        row[0].legend(fontsize=8)
    _save(figure, path)


def draw_interventions(results: Mapping, path: Path) -> None:
    """F1 with 95% intervals after each intervention, for text and learned embeddings, one panel an LLM."""
    llms = list(results["llms"])
    figure, panels = plt.subplots(1, len(llms), figsize=(6 * len(llms), 6), squeeze=False, layout="constrained")
    for name, panel in zip(llms, panels[0], strict=True):
        rows = [row for row in results["interventions"] if row["llm"] == name]
        places = {label: -y for y, label in enumerate(dict.fromkeys(row["intervention"] for row in rows))}
        for shift, (kind, colour) in zip((0.2, -0.2), _COLOURS.items(), strict=True):
            for row in (row for row in rows if row["embeddings"] == kind):
                low, high = row["f1_ci95"] or (row["f1"], row["f1"])
                error = [[max(0, row["f1"] - low)], [max(0, high - row["f1"])]]
                y = places[row["intervention"]] + shift
                panel.barh(y, row["f1"], xerr=error, height=0.36, color=colour, error_kw={"capsize": 2, "lw": 1})
            panel.barh(0, 0, color=colour, label=kind)
        panel.set_yticks(list(places.values()), list(places))
        panel.set_xlim(left=0)
        panel.set_xlabel("F1, 95% interval by paragraph")
        panel.set_title(name, fontsize=10)
        panel.legend(fontsize=8)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
