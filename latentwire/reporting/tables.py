"""Tables, charts and a page of what runs left: for people who would rather look than read.

python latentwire/report.py RUN [RUN ...]     one report.html of all runs, into the first; table.md, summary.md (the
                                              LLMs side by side) and hierarchy.png beside each results.json
python latentwire/report.py RUN --html PATH   puts the page elsewhere
python latentwire/report.py RUN --readme      also renews the tables in README.md and LOG.md

A RUN is the folder of an evaluation, a training or diagnostics, or one that holds such folders.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentwire.evaluation.results import critical_lines, row_key
from latentwire.evaluation.scores import show_interval
from latentwire.reporting.charts import describe_llm, hierarchy, llms_of
from latentwire.reporting.page import render
from latentwire.reporting.records import gather
from latentwire.utils.runs import write_text

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", ROOT / "LOG.md")
# What stands between these marks is the file that they name, a path from the document's folder.
_INCLUDED = re.compile(r"(<!-- (\S+): start -->\n)(.*?)(<!-- \2: end -->)", re.DOTALL)
_SIZES = ("llm_positions", "wire_bytes")
_SAMPLE_WARNING = "\n**The sample set shows that everything runs; its numbers support no claim.**"


def main() -> None:
    """Command line: tables, charts and page of the given runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--html", type=Path, metavar="PATH", help="the page; default: report.html in the first RUN")
    parser.add_argument("--readme", action="store_true", help="put the tables that README.md and LOG.md name into them")
    args = parser.parse_args()
    parts = gather(args.runs)
    for part in (part for part in parts if part.results):
        table = table_markdown(part.results)
        write_text(part.folder / "table.md", table)
        write_text(part.folder / "summary.md", summary_markdown(part.results))
        drawn = hierarchy(part.results, llms_of(part.results["results"]))
        drawn.savefig(part.folder / "hierarchy.png", dpi=130)
        print(table, f"wrote {part.folder / 'table.md'} and {part.folder / 'hierarchy.png'}", sep="\n")
    for document in DOCUMENTS if args.readme else ():
        print(f"renewed in {document}: {', '.join(renew(document))}")
    page = args.html or args.runs[0] / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, render(parts))
    print(f"wrote {page}")


def table_markdown(results: Mapping) -> str:
    """All rows of a results.json as Markdown, with what is needed to believe them, and the critical tests."""
    lines = [
        *_origin(results),
        "| LLM | condition | M | F1 [95% interval] | EM | first token | bits/answer byte | positions | bytes sent |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["results"]:
        lines.append(
            f"| {row['llm'] or 'none'} | {row['condition']} | {row['m'] or ''} "
            f"| {row['f1']:.3f} {show_interval(row['f1_ci95'])} | {row['em']:.3f} "
            f"| {_figure(row['first_token_acc'], 3)} | {_figure(row['bits_per_answer_byte'], 2)} "
            f"| {row['llm_positions']:.0f} | {row['wire_bytes']} |"
        )
    lines += ["", _llm_line(results["results"])]
    lines += ["", *_variance_lines(results["results"]), *_interface_lines(results), *_origin_lines(results["results"])]
    lines += _difference_lines(results["comparisons"])
    return "\n".join([*lines, *_critical_block(results)]) + "\n"


def summary_markdown(results: Mapping) -> str:
    """The LLMs side by side, best condition first: F1, and how far LatentWire is above it with the paired interval."""
    rows = {row_key(row): row for row in results["results"]}
    llms = [llm for llm in llms_of(results["results"]) if llm]
    pairs = {
        (c["b"], c["m"], c["llm"]): c for c in results["comparisons"] if (c["a"], c["metric"]) == ("latentwire", "f1")
    }
    sent = {row["m"] for row in results["results"] if row["condition"] == "latentwire"}
    only = sent.pop() if len(sent) == 1 else None  # where several are sent, a condition without an M meets none
    kinds: dict[tuple[str, int | None], list[Mapping]] = {}
    for (condition, m, _), row in rows.items():
        kinds.setdefault((condition, m), []).append(row)
    columns = [f"{llm}: {what}" for llm in llms for what in ("F1 [95% interval]", "latentwire above it")]
    lines = [
        *_origin(results),
        f"| condition | M | {' | '.join(columns)} | positions | bytes sent |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for (condition, m), found in sorted(kinds.items(), key=lambda kind: -sum(r["f1"] for r in kind[1]) / len(kind[1])):
        cells = []
        for llm in llms:
            row = rows.get((condition, m, llm), rows.get((condition, m, None)))
            cells.append(f"{row['f1']:.3f} {show_interval(row['f1_ci95'])}" if row else "")
            pair = pairs.get((condition, m or only, llm))
            cells.append(f"{pair['diff']:+.3f} {show_interval(pair['ci95'])}" if pair else "")
        positions, size = ("–".join(dict.fromkeys(f"{row[key]:.0f}" for row in found)) for key in _SIZES)
        lines.append(f"| `{condition}` | {m or ''} | {' | '.join(cells)} | {positions} | {size} |")
    lines += ["", _llm_line(results["results"]), *_critical_block(results)]
    return "\n".join(lines) + "\n"


def _origin(results: Mapping) -> list[str]:
    """What every table begins with: of which data, how much, by which commit, on which machine."""
    return [
        f"Data: {results['dataset']} {results['split']}, n={results['n']}, seed {results['seed']}; source "
        f"{results['source']}; wire {results['codec']}; {results['dtype']}; checkpoint: {results['checkpoint']}; "
        f"commit {results['git']}; {_machine(results['machine'])}.",
        *([_SAMPLE_WARNING] if results["dataset"] == "sample" else []),
        "",
    ]


def _llm_line(rows: Sequence[Mapping]) -> str:
    names = {row["llm"]: row["llm_id"] for row in rows if row["llm"]}
    return "; ".join(f"{name}: {describe_llm(llm_id)}" for name, llm_id in names.items()) + "."


def _critical_block(results: Mapping) -> list[str]:
    critical = critical_lines(results["comparisons"])
    return ["", "```text", *critical, "```"] if critical else []


def renew(document: Path) -> list[str]:
    """Replace what stands between each pair of marks by the file that they name, and give the names.

    Raises ValueError at a mark without its other half, FileNotFoundError for a file that is not there.
    """
    text = document.read_text(encoding="utf-8")
    parts = included(text)
    odd = set(re.findall(r"<!-- (\S+): (?:start|end) -->", text)) - parts.keys()
    if odd:
        raise ValueError(f"{document} marks only the start or the end of {', '.join(sorted(odd))}; add the other mark")
    missing = [name for name in parts if not (document.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{document} includes {', '.join(missing)}, which is not there; write it first")
    write_text(document, _INCLUDED.sub(lambda m: m[1] + (document.parent / m[2]).read_text() + m[4], text))
    return [*parts]


def included(text: str) -> dict[str, str]:
    """By name, what stands between the marks of each included file."""
    return {name: content for _, name, content, _ in _INCLUDED.findall(text)}


def _difference_lines(comparisons: Sequence[Mapping]) -> list[str]:
    """Every paired difference of F1 that is not one of the critical tests (those have lines of their own)."""
    rows = [
        f"| {c['llm']} | {c['a']} - {c['b']} | {c['m']} | {c['diff']:+.3f} {show_interval(c['ci95'])} |"
        for c in comparisons
        if "critical" not in c
    ]
    head = ["", "| LLM | paired difference | M | F1 [95% interval] |", "|---|---|---|---|"]
    return [*head, *rows] if rows else []


def _variance_lines(rows: Sequence[Mapping]) -> list[str]:
    """What the PCA conditions' directions hold of the train tokens' embedding variance, per LLM."""
    held: dict[str, list[str]] = {}
    for row in rows:
        if row["explained_variance"] is not None:
            held.setdefault(row["llm"], []).append(f"{row['condition']} {row['explained_variance']:.3f}")
    return [f"- Explained variance of PCA, {llm}: {', '.join(shares)}." for llm, shares in held.items()]


def _origin_lines(rows: Sequence[Mapping]) -> list[str]:
    """Which rows an earlier evaluation computed, and where."""
    taken: dict[str, list[str]] = {}
    for row in rows:
        for where in row.get("taken_from", ()):
            taken.setdefault(where, []).append(f"{row['llm'] or 'no LLM'} {row['condition']}")
    return [f"- Taken from {where}: {', '.join(names)}." for where, names in taken.items()]


def _interface_lines(results: Mapping) -> list[str]:
    """What the untrained codes carry, per LLM; the reading ceiling only where the oracle window was evaluated."""
    f1 = {(row["llm"], row["condition"]): row["f1"] for row in results["results"]}
    lines = []
    for llm, found in (results.get("interface") or {}).items():
        line = (
            f"- Untrained interface, {llm}: nearest-token recall {found['nearest_token_recall']:.3f} on tokens as they "
            f"occur, {found['nearest_token_recall_uniform']:.3f} over the vocabulary; explained variance "
            f"{found['explained_variance']:.3f}"
        )
        ceiling, as_text = f1.get((llm, "oracle_wire")), f1.get((llm, "oracle_text"))
        if ceiling is not None and as_text:
            line += f"; reading ceiling F1 {ceiling:.3f}, {ceiling / as_text:.2f} of the same window as text"
        lines.append(line + ".")
    return lines


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _machine(machine: Mapping) -> str:
    gpus = machine["gpus"]
    where = f"{len(gpus)} x {gpus[0]}" if gpus else f"{machine['processor']}, {machine['threads']} threads"
    return f"{where}, torch {machine['torch']}, transformers {machine['transformers']}"
