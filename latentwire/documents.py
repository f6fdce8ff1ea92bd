"""Ask a long document, made of passages of the sample set, through one wire of several blocks.

python latentwire/documents.py --words 5000 --save_dir runs/documents
"""

from latentwire.api.settings import DocumentSettings
from latentwire.utils.cli import parse, run


def main() -> None:
    """One document, all of the checkpoint's LLMs."""
    config = parse(DocumentSettings)
    from latentwire.api.documents import measure, table

    print(table(measure(config)))


if __name__ == "__main__":
    run(main)
