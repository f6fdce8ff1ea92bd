"""How fast, as ratios that one run measures on one machine: ours beside the obvious way, repeat by repeat.

    python latentwire/benchmark.py                              # the offline models, or NAME_ID
    python latentwire/benchmark.py --parts text_eval --repeats 5

Parts: train (a step against the same step done plainly), text_eval (answers from text against transformers.generate),
serving (answers from Z against answers from text, at three lengths), together (the same for several questions at once,
at two lengths), encode (texts together against one by one), mfu (floating point operations of a step against the
device's own matrix products), growth (time and memory with batch, M, context and questions) and processes (the same
under torchrun). Writes results.json after every part, so that a killed run continues with the next, and table.md.
"""

from latentwire.studies.settings import BenchmarkSettings
from latentwire.utils.cli import parse, run


def main() -> None:
    """One benchmark."""
    config = parse(BenchmarkSettings)
    from latentwire.studies.speed import benchmark  # slow to import: a wrong flag is told before

    benchmark(config)


if __name__ == "__main__":
    run(main)
