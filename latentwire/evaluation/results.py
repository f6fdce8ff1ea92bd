"""From one line per question to results.json: means, intervals, paired comparisons, the three critical tests.

A prediction line holds: id, condition, m, llm, prediction, references, f1, em, first_token_correct,
first_informative_correct (not in older lines), answer_nll (nats), answer_tokens, answer_bytes, llm_positions,
constant_positions, wire_bytes, text_bytes, seconds; and, where another evaluation computed it, taken_from.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from latentwire.data.question import Question
from latentwire.evaluation.scores import (
    difference_ci,
    difference_verdict,
    mean_ci,
    ratio_ci,
    ratio_verdict,
    show_interval,
)

CRITICAL_TESTS = {
    1: "LatentWire > token budget at the same M",
    2: "LatentWire > the better M-matched PCA",
    3: "LatentWire keeps 0.9 of the text's F1",
}

# Rivals that the critical tests do not name, and that are stronger: further tests.
FURTHER = (
    "pca_selected",
    "sentence",
    "selected_text_tuned",
    "selected_words_tuned",
    "text_tuned",
    "token_budget_tuned",
)

Key = tuple[str, int | None, str]  # condition, M (None where it plays no part), LLM
Line = Mapping[str, object]


def summarise(lines: Mapping[str, Line], questions: Sequence[Question], seed: int) -> dict:
    """One row of results.json for the lines (by question id) of one condition and LLM, in the order of questions."""
    ordered = [lines[q.id] for q in questions]
    paragraphs = [q.paragraph for q in questions]

    def column(name: str) -> list:
        return [line[name] for line in ordered]

    informative = [line.get("first_informative_correct") for line in ordered]
    by_llm = ordered[0]["answer_nll"] is not None  # encoder_only has neither tokens nor likelihoods
    nll, seconds = sum(column("answer_nll")) if by_llm else None, sum(column("seconds"))
    return {
        "n": len(ordered),
        "paragraphs": len(set(paragraphs)),
        "f1": float(np.mean(column("f1"))),
        "f1_ci95": mean_ci(column("f1"), paragraphs, seed),
        "em": float(np.mean(column("em"))),
        "em_ci95": mean_ci(column("em"), paragraphs, seed),
        "first_token_acc": float(np.mean(column("first_token_correct"))) if by_llm else None,
        "first_informative_acc": None if None in informative else float(np.mean(informative)),
        "nll_per_token": nll / sum(column("answer_tokens")) if by_llm else None,
        "bits_per_answer_byte": nll / np.log(2) / sum(column("answer_bytes")) if by_llm else None,
        "empty_answers": float(np.mean([not prediction for prediction in column("prediction")])),
        "llm_positions": float(np.mean(column("llm_positions"))),
        "constant_positions": ordered[0].get("constant_positions"),  # older lines count them among the others
        "wire_bytes": round(np.mean(column("wire_bytes"))),
        "text_bytes": float(np.mean(column("text_bytes"))),
        "seconds": seconds,
        "examples_per_s": len(ordered) / seconds if seconds else None,
        "taken_from": sorted({line["taken_from"] for line in ordered if "taken_from" in line}),
    }


def compare(
    rows: Sequence[Mapping], scores: Mapping[Key, Sequence[float]], paragraphs: Sequence[str], seed: int
) -> list[dict]:
    """Paired comparisons on the same questions.

    rows: rows of results.json; scores: F1 by question for each row's key. LatentWire meets every other condition of
    its LLM, and shuffled_z meets no_context. Where both have an M it is the same one. LatentWire's differences to
    the rivals of FURTHER are marked as further tests.
    """
    differences = {}
    for a in rows:
        for b in rows:
            meets = a["condition"] == "latentwire" or (a["condition"], b["condition"]) == ("shuffled_z", "no_context")
            same_m = b["m"] is None or a["m"] == b["m"]
            same_llm = b["llm"] in (a["llm"], None)
            if meets and same_m and same_llm and a["condition"] != b["condition"]:
                pair = _difference(a, b, scores, paragraphs, seed)
                further = a["condition"] == "latentwire" and b["condition"] in FURTHER
                differences[row_key(a), row_key(b)] = pair | ({"further": True} if further else {})
    return [*differences.values(), *_critical(rows, differences, scores, paragraphs, seed)]


def row_key(row: Mapping) -> Key:
    """Condition, M and LLM of a row."""
    return row["condition"], row["m"], row["llm"]


def _difference(a: Mapping, b: Mapping, scores: Mapping, paragraphs: Sequence[str], seed: int) -> dict:
    ci = difference_ci(scores[row_key(a)], scores[row_key(b)], paragraphs, seed)
    return _pair(a, b) | {"metric": "f1", "diff": a["f1"] - b["f1"], "ci95": ci, "verdict": difference_verdict(ci)}


def _critical(
    rows: Sequence[Mapping], differences: Mapping, scores: Mapping, paragraphs: Sequence[str], seed: int
) -> list[dict]:
    """The three critical tests of each LatentWire row; the first two are among the differences already."""
    found = {row_key(row): row for row in rows}
    tests = []
    for a in rows:
        if a["condition"] != "latentwire":
            continue
        m, llm = a["m"], a["llm"]
        budget = found.get(("token_budget", m, llm))
        linear = [found[key] for key in (("pca", m, llm), ("pca_pool", m, llm)) if key in found]
        whole = found.get(("text", None, llm))
        if budget:
            tests.append(differences[row_key(a), row_key(budget)] | {"critical": 1})
        if linear:
            best = max(linear, key=lambda row: row["f1"])
            tests.append(differences[row_key(a), row_key(best)] | {"critical": 2})
        if whole:
            ci = ratio_ci(scores[row_key(a)], scores[row_key(whole)], paragraphs, seed)
            ratio = a["f1"] / whole["f1"] if whole["f1"] else None
            kept = {"metric": "f1_ratio", "diff": a["f1"] - whole["f1"], "ratio": ratio}
            tests.append(_pair(a, whole) | kept | {"ci95": ci, "verdict": ratio_verdict(ci), "critical": 3})
    return tests


def _pair(a: Mapping, b: Mapping) -> dict:
    """The two sides, with what equal M does not make equal: positions and bytes."""
    return {
        "a": a["condition"], "b": b["condition"], "llm": a["llm"], "m": a["m"],
        "a_positions": a["llm_positions"], "b_positions": b["llm_positions"],
        "a_bytes": a["wire_bytes"], "b_bytes": b["wire_bytes"],
    }  # fmt: skip


def critical_lines(results: Mapping) -> list[str]:
    """The three critical tests of results.json, one printable line each."""
    tests = [c for c in results["comparisons"] if "critical" in c]
    tests.sort(key=lambda c: (c["llm"], c["m"], c["critical"]))
    return [_line(test, f"{test['critical']}. {CRITICAL_TESTS[test['critical']]}", results) for test in tests]


def further_lines(results: Mapping) -> list[str]:
    """LatentWire against the rivals of FURTHER that are there, as the critical tests are printed; at the same M, where
    a rival has one. Older records name no further tests."""
    pairs = [c for c in results["comparisons"] if c.get("further")]
    pairs.sort(key=lambda c: (c["llm"], c["m"], FURTHER.index(c["b"])))
    return [_line(pair, f"further test: LatentWire > {pair['b']}", results) for pair in pairs]


def positions(row: Mapping) -> str:
    """Positions that a row's LLM spends on a question; "+ 16": those that are the same for all of them."""
    constant = row.get("constant_positions") or 0
    return f"{row['llm_positions']:.0f}" + (f" + {constant:.0f}" if constant else "")


def _line(test: Mapping, name: str, results: Mapping) -> str:
    a, b = (_side(test, name, results["results"]) for name in "ab")
    ratio = test["metric"] == "f1_ratio"
    value = test["ratio"] if ratio else test["diff"]
    figure = "undefined" if value is None else f"{value:.3f}" if ratio else f"{value:+.3f}"
    return (
        f"{test['verdict']:<11}  {test['llm']} M={test['m']}  {name}: "
        f"{'ratio' if ratio else 'F1'} {figure} {show_interval(test['ci95'])} against {test['b']}; "
        f"positions {positions(a)} / {positions(b)}, bytes {a['wire_bytes']} / {b['wire_bytes']}"
    )


def _side(test: Mapping, side: str, rows: Sequence[Mapping]) -> Mapping:
    """The row of one side of a comparison, "a" or "b"."""
    alike = (row for row in rows if row["condition"] == test[side])
    return next(row for row in alike if row["llm"] in (test["llm"], None) and row["m"] in (test["m"], None))
