"""Encode many documents to a folder of Parquet files, by Ray Data; needs the extra: pip install -e '.[corpus]'.

python latentwire/encode_corpus.py --input FILES --text-column text --output runs/corpus
python latentwire/encode_corpus.py --input squad --question-column question --id-column id --output runs/squad
python latentwire/answer.py --corpus runs/corpus --id X
"""

from latentwire.api.settings import CorpusSettings
from latentwire.data.rows import sources
from latentwire.utils.cli import parse, run


def main() -> None:
    """One corpus, or what is left of it."""
    config = parse(CorpusSettings)
    sources(config.input, config.split)  # a wrong file is told before the slow import
    from latentwire.api.corpus import encode_corpus

    encode_corpus(config)


if __name__ == "__main__":
    run(main)
