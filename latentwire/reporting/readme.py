"""Documents that show records: what stands between two marks is the file that the marks name."""

import re
from pathlib import Path

from latentwire.utils.files import write_text

ROOT = Path(__file__).parents[2]
# What stands between these marks is the file that they name, a path from the document's folder.
_INCLUDED = re.compile(r"(<!-- (\S+): start -->\n)(.*?)(<!-- \2: end -->)", re.DOTALL)


def documents() -> list[Path]:
    """README.md, LOG.md and everything in docs/."""
    return [ROOT / "README.md", ROOT / "LOG.md", *sorted((ROOT / "docs").glob("*.md"))]


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
    tables = {name: (document.parent / name).read_text(encoding="utf-8") for name in parts}
    write_text(document, _INCLUDED.sub(lambda m: m[1] + tables[m[2]] + m[4], text))
    return [*parts]


def included(text: str) -> dict[str, str]:
    """By name, what stands between the marks of each included file."""
    return {name: content for _, name, content, _ in _INCLUDED.findall(text)}
