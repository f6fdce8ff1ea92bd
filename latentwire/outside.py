"""A rival from outside: compressed key-value caches by kvpress, which needs an environment of its own.

    python latentwire/outside.py --step ask --samples 300       # writes the questions as token ids
    python latentwire/outside.py --step score --samples 300     # makes an evaluation of the answers

Between the two scripts/baselines/kv_cache.py answers; scripts/baselines/kv_cache_baseline.sh runs all three.
"""

from latentwire.evaluation.settings import OutsideSettings
from latentwire.utils.cli import parse, run


def main() -> None:
    """One half of the work."""
    config = parse(OutsideSettings)
    from latentwire.evaluation.outside import outside  # slow to import: a wrong flag is told before

    outside(config)


if __name__ == "__main__":
    run(main)
