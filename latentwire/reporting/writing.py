"""What reporting leaves on disk: tables and a chart beside each evaluation, and the page."""

from collections.abc import Sequence
from pathlib import Path

from latentwire.reporting.charts import hierarchy
from latentwire.reporting.labels import llms_of
from latentwire.reporting.page import render
from latentwire.reporting.records import Part
from latentwire.reporting.tables import headline_markdown, summary_markdown, table_markdown
from latentwire.utils.files import write_text

_TABLES = {"table.md": table_markdown, "summary.md": summary_markdown, "headline.md": headline_markdown}


def write_tables(part: Part) -> list[str]:
    """table.md, summary.md, headline.md and hierarchy.png of an evaluation; the table, and what was written."""
    for name, made in _TABLES.items():
        write_text(part.folder / name, made(part.results))
    hierarchy(part.results, llms_of(part.results["results"])).savefig(part.folder / "hierarchy.png", dpi=130)
    return [table_markdown(part.results), f"wrote {', '.join(_TABLES)} and hierarchy.png in {part.folder}"]


def write_page(parts: Sequence[Part], path: Path) -> Path:
    """One page of all parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(parts))
    return path
