"""Tables and charts from results.json: for people who would rather look than read.

python latentwire/report.py RUN [RUN ...]     writes table.md and hierarchy.png into each and prints the table
python latentwire/report.py RUN --readme      also renews the result table in README.md
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from latentwire.results import critical_lines
from latentwire.run import cli, read_json, write_text

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- results: start -->", "<!-- results: end -->"
_COLOURS = {"latentwire": "#d1495b", "text": "#2e4057", "no_context": "#9aa5b1", "shuffled_z": "#9aa5b1"}
_OTHERS = "#66a182"
_SAMPLE_WARNING = "\n**The sample set shows that everything runs; its numbers support no claim.**"


def main() -> None:
    """Command line: tables and charts of the given runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that hold a results.json")
    parser.add_argument("--readme", action="store_true", help="put the table of the (one) run into README.md")
    args = parser.parse_args()
    if args.readme and len(args.runs) != 1:
        parser.error("--readme takes exactly one run")
    for run in args.runs:
        results = load_results(run)
        table = table_markdown(results)
        write_text(run / "table.md", table)
        draw_hierarchy(results, run / "hierarchy.png")
        print(table, f"wrote {run / 'table.md'} and {run / 'hierarchy.png'}", sep="\n")
    if args.readme:
        renew_readme(README, table)


def load_results(run: Path) -> dict:
    """results.json of a run; FileNotFoundError if it has none."""
    path = run / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the evaluation to its end first")
    return read_json(path)


def table_markdown(results: Mapping) -> str:
    """All rows of a results.json as Markdown, with what is needed to believe them, and the critical tests."""
    lines = [
        f"Data: {results['dataset']} {results['split']}, n={results['n']}, seed {results['seed']}; source "
        f"{results['source']}; wire {results['codec']}; {results['dtype']}; checkpoint: {results['checkpoint']}; "
        f"commit {results['git']}; {_machine(results['machine'])}.",
        *([_SAMPLE_WARNING] if results["dataset"] == "sample" else []),
        "",
        "| LLM | condition | M | F1 [95% interval] | EM | first token | bits/answer byte | positions | bytes sent |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["results"]:
        lines.append(
            f"| {row['llm'] or 'none'} | {row['condition']} | {row['m'] or ''} "
            f"| {row['f1']:.3f} {_interval(row['f1_ci95'])} | {row['em']:.3f} "
            f"| {_figure(row['first_token_acc'], 3)} | {_figure(row['bits_per_answer_byte'], 2)} "
            f"| {row['llm_positions']:.0f} | {row['wire_bytes']} |"
        )
    names = {row["llm"]: row["llm_id"] for row in results["results"] if row["llm"]}
    lines += ["", "; ".join(f"{name}: {describe_llm(llm_id)}" for name, llm_id in names.items()) + "."]
    lines += ["", *_variance_lines(results["results"]), *_interface_lines(results)]
    lines += _difference_lines(results["comparisons"])
    critical = critical_lines(results["comparisons"])
    if critical:
        lines += ["", "```text", *critical, "```"]
    return "\n".join(lines) + "\n"


def describe_llm(llm_id: str) -> str:
    """An LLM's id, with its precision where the id does not tell."""
    return f"{llm_id.removeprefix('offline:')}, dequantised Q4" if llm_id.startswith("offline:") else llm_id


def draw_hierarchy(results: Mapping, path: Path) -> None:
    """Bars of F1 with 95% intervals, best first, one panel an LLM."""
    llms = list(dict.fromkeys(row["llm"] for row in results["results"] if row["llm"])) or [None]
    shown = {llm: [row for row in results["results"] if row["llm"] in (llm, None)] for llm in llms}
    longest = max(map(len, shown.values()))
    figure, panels = plt.subplots(
        1, len(llms), figsize=(6 * len(llms), 1.6 + 0.36 * longest), sharex=True, squeeze=False, layout="constrained"
    )
    for panel, llm in zip(panels[0], llms, strict=True):
        rows = sorted(shown[llm], key=lambda row: row["f1"])
        for y, row in enumerate(rows):
            low, high = row["f1_ci95"] or (row["f1"], row["f1"])
            error = [[max(0, row["f1"] - low)], [max(0, high - row["f1"])]]
            colour = _COLOURS.get(row["condition"], _OTHERS)
            panel.barh(y, row["f1"], xerr=error, color=colour, height=0.7, error_kw={"capsize": 3, "lw": 1})
            panel.text(max(high, row["f1"]) + 0.01, y, f"{row['f1']:.2f}", va="center", fontsize=8)
        panel.set_yticks(range(len(rows)), [_name(row) for row in rows])
        panel.set_xlim(0, 1)
        panel.set_xlabel("F1, 95% interval by paragraph")
        ids = [row["llm_id"] for row in rows if row["llm"]]
        panel.set_title(f"{llm}: {describe_llm(ids[0])}" if ids else "no LLM", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{results['dataset']} {results['split']}, n={results['n']}, source {results['source']}", fontsize=11
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def renew_readme(readme: Path, table: str) -> None:
    """Replace what stands between the README's result marks; ValueError if a mark is missing."""
    text = readme.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise ValueError(f"{readme} lacks the marks {START} and {END}")
    before, after = text.split(START)[0], text.split(END)[1]
    write_text(readme, f"{before}{START}\n{table}{END}{after}")
    print(f"renewed the result table in {readme}")


def _difference_lines(comparisons: Sequence[Mapping]) -> list[str]:
    """Every paired difference of F1 that is not one of the critical tests (those have lines of their own)."""
    rows = [
        f"| {c['llm']} | {c['a']} - {c['b']} | {c['m']} | {c['diff']:+.3f} {_interval(c['ci95'])} |"
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


def _name(row: Mapping) -> str:
    return row["condition"] + (f"  M={row['m']}" if row["m"] else "")


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _interval(ci: list[float] | None) -> str:
    return f"[{ci[0]:.3f}, {ci[1]:.3f}]" if ci else "(no interval)"


def _machine(machine: Mapping) -> str:
    gpus = machine["gpus"]
    where = f"{len(gpus)} x {gpus[0]}" if gpus else f"{machine['processor']}, {machine['threads']} threads"
    return f"{where}, torch {machine['torch']}, transformers {machine['transformers']}"


if __name__ == "__main__":
    cli(main)
