"""Tables, charts and a page of what runs left: for people who would rather look than read.

python latentwire/report.py RUN [RUN ...]     one report.html of all runs, into the first; table.md, summary.md (the
                                              LLMs side by side) and hierarchy.png beside each results.json
python latentwire/report.py RUN --html PATH   puts the page elsewhere
python latentwire/report.py RUN --readme      also renews the tables in README.md and LOG.md

A RUN is the folder of an evaluation, a training or diagnostics, or one that holds such folders.
"""

from latentwire.reporting.tables import main
from latentwire.utils.runs import cli

if __name__ == "__main__":
    cli(main)
