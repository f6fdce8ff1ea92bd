"""Good and bad signs: what a run's figures say about whether it works, and what to try where it does not.

Everything here is a function of what stands in results.json, predictions.jsonl and metrics.jsonl.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from latentwire.evaluation.scores import difference_verdict, show_interval

GOOD, BAD, UNDECIDED = "good", "bad", "undecided"

_FIRST_TOKEN = (0.10, 0.20)  # bad below, good above
_ONE_ANSWER = 0.20  # share of all predictions from which on an answer is a collapse
_EMPTY = 0.05
_RMS = 3.0  # prefix RMS / vocabulary RMS: good from 1 / _RMS to _RMS
_FLOOR = 0.03  # shuffled_z is at the floor if it cannot be further above no_context


@dataclass(frozen=True)
class Sign:
    """title: what was looked at; subject: of which LLM and M; level: GOOD, BAD or UNDECIDED; measured: the figures;
    advice: what to try if it is bad, or how to measure what was not; else empty."""

    title: str
    subject: str
    level: str
    measured: str
    advice: str = ""


# By title: what to try when the sign is bad, and how to measure it.
_SIGNS = {
    "LatentWire against the token budget at the same M": (
        "Evaluate selected_text: if it is low too, the selection is at fault (more SCORES_EPOCHS), otherwise the "
        "reading (more SAMPLES or EPOCHS, larger D_Z, KD_WEIGHT above 0).",
        "python latentwire/eval.py --conditions latentwire,token_budget",
    ),
    "First-token accuracy": (
        "Raise FIRST_TOKEN_CE_WEIGHT, train longer, and check that the LLM answers the same prompt when it is text.",
        "python latentwire/eval.py --conditions latentwire",
    ),
    "Variety of answers": (
        "The answers collapsed. Look at mean cosine and effective rank of the learned embeddings (bash "
        "scripts/run_embedding_diagnostics.sh), lower LR, raise KD_WEIGHT.",
        "an evaluation with its predictions.jsonl",
    ),
    "Prefix RMS against the vocabulary's": (
        "The LLM reads vectors of a size it never saw. Lower LR, and look at the interventions on RMS (bash "
        "scripts/run_embedding_diagnostics.sh).",
        "bash scripts/experiments/train_latentwire.sh",
    ),
    "Empty answers": (
        "The end of the answer is learned before its words. Raise FIRST_TOKEN_CE_WEIGHT, and check the wording of "
        "this LLM's prompt.",
        "python latentwire/eval.py --conditions latentwire",
    ),
    "Training loss": (
        "Lower LR; if the gradient norms are near 0, raise it. Check that the stage trains what it should.",
        "bash scripts/experiments/train_latentwire.sh",
    ),
    "Shuffled Z against no context": (
        "Z of another question raises F1, so this much of the gain is not about the question (a few thousandths come "
        "from answers of the right kind). Look for answers that fit many questions.",
        "python latentwire/eval.py --conditions latentwire,shuffled_z,no_context",
    ),
}
_BUDGET, _FIRST, _VARIETY, _PREFIX, _EMPTIES, _LOSS, _SHUFFLED = _SIGNS


def judge_results(results: Mapping) -> list[Sign]:
    """What results.json tells: the token budget, the first token, empty answers, and shuffled Z."""
    found = []
    for pair in results["comparisons"]:
        names, ci = (pair["a"], pair["b"]), pair["ci95"]
        measured = f"F1 {pair['diff']:+.3f} {show_interval(ci)}"
        if names == ("latentwire", "token_budget") and "critical" not in pair:  # the critical test repeats it
            found.append(_sign(_BUDGET, pair, _side(ci), measured))
        if names == ("shuffled_z", "no_context"):
            paragraphs = min(row.get("paragraphs", results["n"]) for row in results["results"])
            found.append(_sign(_SHUFFLED, pair, _floor(ci, paragraphs), measured))
    for row in results["results"]:
        if row["condition"] == "latentwire":
            share, (low, high) = row["first_token_acc"], _FIRST_TOKEN
            level = BAD if share < low else GOOD if share > high else UNDECIDED
            found.append(_sign(_FIRST, row, level, f"{share:.1%} (bad under {low:.0%}, good over {high:.0%})"))
            if "empty_answers" in row:
                empty = row["empty_answers"]
                measured = f"{empty:.1%} (bad over {_EMPTY:.0%})"
                found.append(_sign(_EMPTIES, row, BAD if empty > _EMPTY else GOOD, measured))
    return found


def judge_predictions(lines: Sequence[Mapping]) -> list[Sign]:
    """Whether LatentWire gives one answer to many questions, from the lines of predictions.jsonl."""
    answers: dict[tuple, list[str]] = {}
    for line in lines:
        if line["condition"] == "latentwire":
            answers.setdefault((line["llm"], line["m"]), []).append(line["prediction"].strip())
    found = []
    for (llm, m), given in answers.items():
        counts = Counter(filter(None, given)).most_common(1)  # empty answers have a sign of their own
        answer, count = counts[0] if counts else ("", 0)
        collapsed = count > 1 and count / len(given) > _ONE_ANSWER
        measured = f"the most frequent answer, “{answer}”, {count} of {len(given)} (bad over {_ONE_ANSWER:.0%})"
        found.append(_sign(_VARIETY, {"llm": llm, "m": m}, BAD if collapsed else GOOD, measured))
    return found


def judge_log(lines: Sequence[Mapping]) -> list[Sign]:
    """Whether the loss falls and the prefix has the size of embeddings, from the lines of metrics.jsonl."""
    steps = [line for line in lines if "loss" in line]  # the others are validations
    tenth = max(1, len(steps) // 10)
    last = steps[-tenth:]
    found = []
    if steps:
        before, after = _mean(steps[:tenth], "loss"), _mean(last, "loss")
        level = UNDECIDED if len(steps) < 2 else GOOD if after < before else BAD
        measured = f"{before:.3f} in the first {tenth} of {len(steps)} steps, {after:.3f} in the last {tenth}"
        found.append(_sign(_LOSS, {}, level, measured))
    ratios: dict[str, list[float]] = {}
    for llm, figures in (item for line in last for item in line.get("llms", {}).items()):
        if "prefix_rms" in figures:
            ratios.setdefault(llm, []).append(figures["prefix_rms"])
    for llm, found_ratios in ratios.items():
        ratio = float(np.mean(found_ratios))
        measured = f"{ratio:.2f} times, last {tenth} steps (bad outside 0.33 to {_RMS:.0f})"
        level = GOOD if 1 / _RMS <= ratio <= _RMS else BAD
        found.append(_sign(_PREFIX, {"llm": llm}, level, measured))
    return found


def not_measured(found: Sequence[Sign]) -> list[Sign]:
    """A sign for each title that none of `found` has, with how to measure it."""
    seen = {sign.title for sign in found}
    return [
        Sign(title, "", UNDECIDED, "not measured here", f"To measure it: {command}.")
        for title, (_, command) in _SIGNS.items()
        if title not in seen
    ]


def _sign(title: str, of: Mapping, level: str, measured: str) -> Sign:
    subject = " ".join([of.get("llm") or "", f"M={of['m']}" if of.get("m") else ""]).strip()
    return Sign(title, subject, level, measured, _SIGNS[title][0] if level == BAD else "")


def _side(ci: Sequence[float] | None) -> str:
    return {"PASS": GOOD, "FAIL": BAD}.get(difference_verdict(ci), UNDECIDED)


def _floor(ci: Sequence[float] | None, n: int) -> str:
    """n: paragraphs. Where all of them tie, the rule of three says how far above the floor others may be."""
    if ci and (ci[1] if any(ci) else 3 / n) <= _FLOOR:
        return GOOD
    return BAD if ci and ci[0] > 0 else UNDECIDED


def _mean(lines: Sequence[Mapping], key: str) -> float:
    return float(np.mean([line[key] for line in lines if key in line]))
