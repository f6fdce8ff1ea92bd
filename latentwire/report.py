"""Tables, charts and a page of what runs left: for people who would rather look than read.

python latentwire/report.py RUN [RUN ...]     one report.html of all runs, into the first; table.md, summary.md,
                                              headline.md and hierarchy.png beside each results.json
python latentwire/report.py RUN --html PATH   puts the page elsewhere
python latentwire/report.py RUN --readme      also renews the tables in README.md, LOG.md and docs/

A RUN is the folder of an evaluation, a training or diagnostics, or one that holds such folders.
"""

import argparse
from pathlib import Path

from latentwire.reporting.records import gather
from latentwire.utils.cli import run


def main() -> None:
    """Tables, charts and page of the given runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--html", type=Path, metavar="PATH", help="the page; default: report.html in the first RUN")
    parser.add_argument("--readme", action="store_true", help="put the tables that the documents name into them")
    args = parser.parse_args()
    parts = gather(args.runs)
    from latentwire.reporting.readme import documents, renew
    from latentwire.reporting.writing import write_page, write_tables  # slow to import

    for part in (part for part in parts if part.results):
        print(*write_tables(part), sep="\n")
    for document in documents() if args.readme else ():
        print(f"renewed in {document.name}: {', '.join(renew(document))}")
    print(f"wrote {write_page(parts, args.html or args.runs[0] / 'report.html')}")


if __name__ == "__main__":
    run(main)
