"""Every Markdown table: of evaluations, comparisons, interventions and speed."""

import statistics
from collections.abc import Mapping, Sequence

from latentwire.evaluation.results import critical_lines, further_lines, positions, row_key
from latentwire.evaluation.scores import MIN_SEEDS, few_seeds, show_interval
from latentwire.reporting.labels import GROWTH, describe_llm, f1_label, figure, llm_label, model_name
from latentwire.utils.machine import machine_line

_SAMPLE_WARNING = "\n**The sample set shows that everything runs; its numbers support no claim.**"
_FEW = (
    f"\nOf fewer than {MIN_SEEDS} seeds, a difference and its intervals are over questions only: other trainings may "
    "differ by more, so nothing is decided."
)
# Rows of the one table in the README: what LatentWire is compared with, its controls, and the encoder alone.
_HEADLINE = (
    "encoder_only", "latentwire", "text", "selected_text", "token_select", "token_budget_context", "untrained",
    "token_budget", "pca", "no_context",
)  # fmt: skip


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def table_markdown(results: Mapping) -> str:
    """All rows of a results.json, with what is needed to believe them, and the critical tests."""
    head = (
        "LLM",
        "condition",
        "M",
        "F1 [95% interval]",
        "EM",
        "first token",
        "informative",
        "bits/answer byte",
        "positions",
        "bytes sent",
    )
    rows = [
        (llm_label(row), row["condition"], row["m"] or "", f1_label(row, results["n"]), f"{row['em']:.3f}",
         figure(row["first_token_acc"], 3), figure(row.get("first_informative_acc"), 3),
         figure(row["bits_per_answer_byte"], 2), positions(row), row["wire_bytes"])
        for row in results["results"]
    ]  # fmt: skip
    lines = [*_origin(results), *_filled(head, rows), "", _llm_line(results["results"]), ""]
    lines += [*_variance_lines(results["results"]), *_codes_lines(results), *_taken_lines(results["results"])]
    lines += _bytes_lines(results.get("bytes_table"))
    return "\n".join([*lines, *_difference_lines(results["comparisons"]), *_critical_block(results)]) + "\n"


def summary_markdown(results: Mapping) -> str:
    """The LLMs side by side, best condition first: F1, and how far LatentWire is above it with the paired interval."""
    return _side_by_side(results, None, ("F1 [95% interval]", "latentwire above it"))


def headline_markdown(results: Mapping) -> str:
    """The summary's rows that matter most, with the cost of the answers in bits."""
    return _side_by_side(results, _HEADLINE, ("F1 [95% interval]", "latentwire above it", "bits/answer byte"))


def _side_by_side(results: Mapping, shown: Sequence[str] | None, columns: Sequence[str]) -> str:
    rows = {row_key(row): row for row in results["results"]}
    names = {row["llm"]: model_name(row["llm_id"]) for row in results["results"] if row["llm"]}
    pairs = {
        (c["b"], c["m"], c["llm"]): c for c in results["comparisons"] if (c["a"], c["metric"]) == ("latentwire", "f1")
    }
    sent = {row["m"] for row in results["results"] if row["condition"] == "latentwire"}
    only = sent.pop() if len(sent) == 1 else None  # where several are sent, a condition without an M meets none
    kinds: dict[tuple[str, int | None], list[Mapping]] = {}
    for (condition, m, _), row in rows.items():
        if shown is None or condition in shown:
            kinds.setdefault((condition, m), []).append(row)
    table = []
    for (condition, m), found in sorted(kinds.items(), key=lambda kind: -sum(r["f1"] for r in kind[1]) / len(kind[1])):
        cells = []
        for llm in names:
            row, pair = (
                rows.get((condition, m, llm), rows.get((condition, m, None))),
                pairs.get((condition, m or only, llm)),
            )
            cells.append(f1_label(row, results["n"]) if row else "")
            cells.append(f"{pair['diff']:+.3f} {show_interval(pair['ci95'])}" if pair else "")
            cells.append(figure(row["bits_per_answer_byte"], 2) if row else "")
        cells = [cell for number, cell in enumerate(cells) if number % 3 < len(columns)]
        spent, size = ("–".join(dict.fromkeys(map(show, found))) for show in (positions, _bytes_sent))
        table.append((f"`{condition}`", m or "", *cells, spent, size))
    head = (
        "condition",
        "M",
        *(f"{name}: {what}" for name in names.values() for what in columns),
        "positions",
        "bytes sent",
    )
    lines = [*_origin(results), *markdown(head, table), "", _llm_line(results["results"]), *_critical_block(results)]
    return "\n".join(lines) + "\n"


def _bytes_sent(row: Mapping) -> str:
    return f"{row['wire_bytes']:.0f}"


def _bytes_lines(rows: Sequence[Mapping] | None) -> list[str]:
    """What the wire's texts take by other means; nothing for records without it."""
    if not rows:
        return []
    head = (f"the same text, mean of {rows[0]['n']} questions", "bytes")
    return ["", *markdown(head, [(row["way"], f"{row['bytes']:.0f}") for row in rows]), ""]


def comparison_markdown(compared: Mapping) -> str:
    """The rows of a comparison.json, with what is needed to believe them."""
    commits = " ".join(sorted({git for row in compared["rows"] for git in row["git"]}))
    about = (
        f"Data: {compared['dataset']} {compared['split']}, n={compared['n']}, seed {compared['seed']}; source "
        f"{compared['source']}; {compared['dtype']}; condition {compared['condition']}; commit {commits}; "
        f"{'; '.join(compared.get('machines') or [machine_line(compared['machine'])])}."  # older records name the first
    )
    lines = [about, "", *_compared(compared["rows"], compared["n"])]
    for part in compared.get("parts", ()):
        lines += ["", f"Questions of which {part['part']} (n={part['n']}):", "", *_compared(part["rows"], part["n"])]
    few = [_FEW] if any("seed" in _paired(row)[3] for row in compared["rows"]) else []
    return "\n".join([*lines, *few]) + "\n"


def _compared(compared: Sequence[Mapping], n: int) -> list[str]:
    """The table of a comparison's rows, of n questions, without the columns that are empty."""
    head = (
        "run", "LLM", "M", "codec", "F1 [95% interval]", "seeds", "first token", "informative", "NLL/token", "bytes",
        "F1 minus first run [95% interval]", "drawn over", "by article [95% interval]", "verdict",
        "equivalence [90% interval]", "NLL/token minus first run [95% interval]",
    )  # fmt: skip
    rows = [
        (row["name"], llm_label(row) if "llm_id" in row else row["llm"], row["m"] or "", row["codec"],
         f1_label(row, n), _seeds(row), figure(row["first_token_acc"], 3), figure(row.get("first_informative_acc"), 3),
         figure(row["nll_per_token"], 3), "" if row["wire_bytes"] is None else row["wire_bytes"], *_paired(row))
        for row in compared
    ]  # fmt: skip
    return _filled(head, rows)


def _filled(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a table without the columns that are empty."""
    there = [place for place, cells in enumerate(zip(*rows, strict=True)) if any(cell != "" for cell in cells)]
    head, *rows = [[cells[place] for place in there] for cells in (head, *rows)]
    return markdown(head, rows)


def _seeds(row: Mapping) -> str:
    """F1 of each training seed and their spread; "untrained" where there are none."""
    if row.get("weights") == []:
        return "untrained"
    if row["seed_sd"] is None:
        return "1"
    return f"{', '.join(f'{f1:.3f}' for f1 in row['seed_f1'])} (sd {row['seed_sd']:.3f})"


def _paired(row: Mapping) -> tuple[str, ...]:
    """Cells of a row's difference to the first run, empty for the first run itself."""
    if not row["diff_ci95"]:
        return ("",) * 6
    article, ci90, nll = row.get("diff_ci95_by_article"), row.get("diff_ci90"), row.get("nll_diff_ci95")
    # Records from before verdicts hold trained rows alone, with intervals over questions.
    over, verdict = row.get("diff_over", "questions"), row.get("verdict", few_seeds(len(row["seed_f1"]), "not decided"))
    return (
        f"{row['diff']:+.3f} {show_interval(row['diff_ci95'])}", over, show_interval(article) if article else "",
        verdict, f"{row['equivalence']} {show_interval(ci90)}" if row.get("equivalence") else "",
        f"{row['nll_diff']:+.3f} {show_interval(nll)}" if nll else "",
    )  # fmt: skip


def interventions_markdown(rows: Sequence[Mapping]) -> list[str]:
    """The rows of a diagnostics.json: what each intervention does to each kind of embeddings."""
    head = (
        "LLM",
        "embeddings",
        "intervention",
        "F1 [95%]",
        "minus none [95%]",
        "first token",
        "NLL per token",
        "empty",
    )
    return markdown(head, [
        (row["llm"], row["embeddings"], row["intervention"], f1_label(row, row["n"]),
         f"{row['f1_minus_none']:+.3f} {show_interval(row['f1_minus_none_ci95'])}", f"{row['first_token_acc']:.3f}",
         f"{row['nll_per_token']:.2f}", f"{row['empty_answers']:.0%}")
        for row in rows
    ])  # fmt: skip


def speed_markdown(results: Mapping) -> str:
    """The ratios of a benchmark with their spread, then what was measured."""
    gpu = "" if results["hardware"]["gpus"] else " No GPU."
    checkpoint = f" Checkpoint: {results['checkpoint']}." if results.get("checkpoint") else ""
    ratios = [
        (name, *(f"{found[key]:.2f}" for key in ("median", "min", "max")), _repeats(results["raw"], name))
        for name, found in results.get("ratios", {}).items()
    ]
    lines = [
        f"{machine_line(results['hardware'])}.{checkpoint}{gpu}",
        "",
        *markdown(("ratio", "median", "smallest", "largest", "repeats"), ratios),
    ]
    if served := [line for line in results["raw"] if line["part"] == "serving"]:
        lines += ["", "Medians; a first token from Z waits for the encoding, once per context:", "", *_served(served)]
    if answered := [line for line in results["raw"] if line["part"] == "together"]:
        lines += [
            "",
            "Questions per second of an evaluation (answers, and the NLL of the reference); from Z with the encoding:",
            "",
        ]
        lines += _at_once(answered)
    if grown := [line for line in results["raw"] if line["name"].startswith(GROWTH)]:
        rows = [
            (line["name"].removeprefix(GROWTH).replace("_", " "), line["value"], f"{line['seconds']:.2f}",
             "not told" if line["peak_memory_mb"] is None else f"{line['peak_memory_mb']:.0f} MB")
            for line in grown
        ]  # fmt: skip
        lines += ["", *markdown(("grows", "to", "seconds", "peak memory"), rows)]
    return "\n".join(lines) + "\n"


def _repeats(lines: Sequence[Mapping], name: str) -> int:
    """Repeats of a ratio, each over all LLMs."""
    mine = [line.get("llm") for line in lines if line["name"] == name and "other" in line]
    return len(mine) // max(1, len(set(mine)))


def _served(lines: Sequence[Mapping]) -> list[str]:
    """Seconds and caches of serving, by length of the text and LLM."""
    kinds: dict[tuple, list[Mapping]] = {}
    for line in lines:
        kinds.setdefault((line["text_positions"], line["llm"]), []).append(line)
    rows = []
    for (length, llm), repeats in kinds.items():
        encode, z, text, *decode = (
            statistics.median(line["seconds"][name] for line in repeats)
            for name in ("encode", "prefill_z", "prefill_text", "decode_z", "decode_text")
        )
        times = (f"{seconds:.3f} s" for seconds in (encode, encode + z, text, *decode))
        sizes = (f"{repeats[0][key] / 1e6:.2f} MB" for key in ("kv_bytes_z", "kv_bytes_text"))
        rows.append((length, llm, *times, *sizes, f"{encode / (text - z):.1f}" if text > z else "never"))
    head = ("positions of text", "LLM", "encoding", "first token from Z", "from text", "each further one", "from text",
            "cache of Z", "of text", "questions that pay")  # fmt: skip
    return markdown(head, rows)


def _at_once(lines: Sequence[Mapping]) -> list[str]:
    """Questions per second of answers that were given together, by length of the text and LLM."""
    kinds: dict[tuple, list[Mapping]] = {}
    for line in lines:
        kinds.setdefault((line["text_positions"], line["llm"], line["questions"]), []).append(line)
    rows = [
        (*kind, *(f"{kind[-1] / statistics.median(x[way] for x in repeats):.2f}" for way in ("ours", "other")))
        for kind, repeats in kinds.items()
    ]
    return markdown(("positions of text", "LLM", "at once", "from Z", "from text"), rows)


def _origin(results: Mapping) -> list[str]:
    """What every table begins with: of which data, how much, by which commit, on which machine."""
    return [
        f"Data: {results['dataset']} {results['split']}, n={results['n']}, seed {results['seed']}; source "
        f"{results['source']}; wire {results['codec']}; {results['dtype']}; checkpoint: {results['checkpoint']}; "
        f"commit {results['git']}; {machine_line(results['machine'])}.",
        *([_SAMPLE_WARNING] if results["dataset"] == "sample" else []),
        "",
    ]


def _llm_line(rows: Sequence[Mapping]) -> str:
    names = {row["llm"]: row["llm_id"] for row in rows if row["llm"]}
    return "; ".join(f"{name}: {describe_llm(llm_id)}" for name, llm_id in names.items()) + "."


def _critical_block(results: Mapping) -> list[str]:
    critical = [*critical_lines(results), *further_lines(results)]
    return ["", "```text", *critical, "```"] if critical else []


def _difference_lines(comparisons: Sequence[Mapping]) -> list[str]:
    """Every paired difference of F1 that is not one of the critical tests (those have lines of their own)."""
    rows = [
        (c["llm"], f"{c['a']} - {c['b']}", c["m"], f"{c['diff']:+.3f} {show_interval(c['ci95'])}")
        for c in comparisons
        if "critical" not in c
    ]
    return ["", *markdown(("LLM", "paired difference", "M", "F1 [95% interval]"), rows)] if rows else []


def _variance_lines(rows: Sequence[Mapping]) -> list[str]:
    """What the PCA conditions' directions hold of the train tokens' embedding variance, per LLM."""
    held: dict[str, list[str]] = {}
    for row in rows:
        if row["explained_variance"] is not None:
            held.setdefault(row["llm"], []).append(f"{row['condition']} {row['explained_variance']:.3f}")
    return [f"- Explained variance of PCA, {llm}: {', '.join(shares)}." for llm, shares in held.items()]


def _taken_lines(rows: Sequence[Mapping]) -> list[str]:
    """Which rows an earlier evaluation computed, and where."""
    taken: dict[str, list[str]] = {}
    for row in rows:
        for where in row.get("taken_from", ()):
            taken.setdefault(where, []).append(f"{row['llm'] or 'no LLM'} {row['condition']}")
    return [f"- Taken from {where}: {', '.join(names)}." for where, names in taken.items()]


def _codes_lines(results: Mapping) -> list[str]:
    """What the untrained codes carry, per LLM; how well they are read only where the oracle window was evaluated."""
    f1 = {(row["llm"], row["condition"]): row["f1"] for row in results["results"]}
    lines = []
    for llm, found in (results.get("interface") or {}).items():
        line = (
            f"- Untrained codes, {llm}: nearest-token recall {found['nearest_token_recall']:.3f} on tokens as they "
            f"occur, {found['nearest_token_recall_uniform']:.3f} over the vocabulary; explained variance "
            f"{found['explained_variance']:.3f}"
        )
        wire, text = f1.get((llm, "oracle_wire")), f1.get((llm, "oracle_text"))
        if wire is not None and text:
            line += f"; the window around one reference is read with F1 {wire:.3f}, {wire / text:.2f} of its text"
        lines.append(line + ".")
    return lines
