"""What rows, LLMs and conditions are called, and their colours: the same in every table and chart."""

import colorsys
import hashlib
from collections.abc import Mapping, Sequence

from latentwire.evaluation.scores import show_interval, shown_ci

GROWTH = "growth_"  # how measurements begin that tell how time and memory grow with something
# Titles of the models that have no telling id.
_TITLES = {
    "offline:smollm2-135m-instruct": "SmolLM2-135M",
    "offline:qwen2.5-coder-0.5b-instruct": "Qwen2.5-Coder-0.5B",
}

# Of colours that rows do not bring along: saturation, and luminance (contrast of 3 or more to white and to black).
_SATURATIONS, _LUMINANCES = (0.25, 0.55, 0.95), (0.12, 0.28)
_WEIGHTS = (0.2126, 0.7152, 0.0722)  # of red, green and blue in luminance


def model_name(llm_id: str) -> str:
    """A model's own name: SmolLM2-135M for the offline one, the last part of any other id or path."""
    return _TITLES.get(llm_id, llm_id.removeprefix("offline:").rstrip("/").rsplit("/", 1)[-1])


def describe_llm(llm_id: str) -> str:
    """A model's name, with its precision where the id does not tell."""
    return f"{model_name(llm_id)}, dequantised Q4" if llm_id.startswith("offline:") else model_name(llm_id)


def llm_label(row: Mapping) -> str:
    """The LLM of a row of results.json as tables show it: its model and the name that it has here."""
    return f"{model_name(row['llm_id'])} ({row['llm']})" if row["llm"] else "none"


def row_name(row: Mapping) -> str:
    """Condition and, where it has one, M."""
    return row["condition"] + (f"  M={row['m']}" if row["m"] else "")


def llms_of(rows: Sequence[Mapping]) -> list[str | None]:
    """LLMs of rows of results.json; [None] if no row has one."""
    return list(dict.fromkeys(row["llm"] for row in rows if row["llm"])) or [None]


def colour_of(name: str, row: Mapping | None = None) -> str:
    """The colour that a row brings along, else one that belongs to the name, whatever else is shown; readable on white
    and on black."""
    if row and row.get("colour"):
        return row["colour"]
    hue, saturation, luminance = hashlib.sha512(name.encode()).digest()[33:36]  # here our conditions differ most
    wanted = _LUMINANCES[luminance % len(_LUMINANCES)]
    pure = colorsys.hls_to_rgb(hue / 256, 0.5, _SATURATIONS[saturation % len(_SATURATIONS)])
    light = [part**2.2 for part in pure]
    found = sum(weight * part for weight, part in zip(_WEIGHTS, light, strict=True))
    white = max(0, wanted - found) / (1 - found)  # how much of it is mixed in
    mixed = [min(1, wanted / found) * part + white * (1 - part) for part in light]
    return "#" + "".join(f"{round(255 * part ** (1 / 2.2)):02x}" for part in mixed)


def f1_label(row: Mapping, n: int) -> str:
    """F1 of a row, the mean of n questions, with its interval (of zeros: the rule of three; older records do not tell
    their paragraphs)."""
    return f"{row['f1']:.3f} {show_interval(shown_ci(row['f1'], row['f1_ci95'], row.get('paragraphs', n)))}"


def figure(value: float | None, digits: int) -> str:
    """A figure of a table; empty for None."""
    return "" if value is None else f"{value:.{digits}f}"
