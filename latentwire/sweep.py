"""Train and evaluate every combination of a few settings as trials of Ray Tune, and rank them.

    python latentwire/sweep.py --dry-run [--json]
    python latentwire/sweep.py --latent_lens 32,64 --d_zs 256 --samples 2000

A trial runs scripts/experiments/train_latentwire.sh, then latentwire/eval.py on articles of train that are not trained
on: dev chooses nothing. Writes a run folder per configuration, sweep_summary.json, sweep_results.csv and sweep.png. Run
again, it repeats no finished configuration, continues the others and tries failed ones once more. Ends with status 1 if
one failed. RAY_ADDRESS joins a cluster, whose machines need this checkout and the output folder at the same paths.
"""

import sys

from latentwire.studies.settings import SweepSettings
from latentwire.utils.cli import parse, run


def main() -> None:
    """One sweep."""
    config = parse(SweepSettings)
    from latentwire.studies.grid import sweep  # slow to import: a wrong flag is told before

    sys.exit(sweep(config))


if __name__ == "__main__":
    run(main)
