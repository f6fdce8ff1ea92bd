"""What reporting leaves on disk: tables and a chart beside each evaluation, a comparison, and the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from latentwire.reporting.charts import comparison, hierarchy, rates
from latentwire.reporting.labels import llms_of
from latentwire.reporting.page import render
from latentwire.reporting.records import Part
from latentwire.reporting.tables import comparison_markdown, headline_markdown, summary_markdown, table_markdown
from latentwire.utils.files import write_json, write_text

_TABLES = {"table.md": table_markdown, "summary.md": summary_markdown, "headline.md": headline_markdown}


def write_tables(part: Part) -> list[str]:
    """table.md, summary.md, headline.md and hierarchy.png of an evaluation; the table, and what was written."""
    for name, made in _TABLES.items():
        write_text(part.folder / name, made(part.results))
    hierarchy(part.results, llms_of(part.results["results"])).savefig(part.folder / "hierarchy.png", dpi=130)
    return [table_markdown(part.results), f"wrote {', '.join(_TABLES)} and hierarchy.png in {part.folder}"]


def write_comparison(compared: Mapping, folder: Path | None) -> None:
    """Print the table; where there is a folder for them, comparison.json, .md and .png, and bytes.png if runs send
    several sizes."""
    print(comparison_markdown(compared), end="")
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", compared)
    write_text(folder / "comparison.md", comparison_markdown(compared))
    comparison(compared).savefig(folder / "comparison.png", dpi=130)
    if len({row["wire_bytes"] for row in compared["rows"]}) > 2:
        rates(compared).savefig(folder / "bytes.png", dpi=130)
    print(f"wrote {folder / 'comparison.md'}, comparison.json and comparison.png")


def write_page(parts: Sequence[Part], path: Path) -> Path:
    """One page of all parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(parts))
    return path
