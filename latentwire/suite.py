"""Everything in one command: baselines, rivals, training, one evaluation that pairs all of them, the page.

    python latentwire/suite.py --dry-run [--json]
    python latentwire/suite.py --eval_samples 1000 --no-trained_rivals

The plan and the time it takes come first, the three critical tests last. Settings of the steps (SAMPLES, EPOCHS,
LATENT_LEN, ...) are read from the environment. Each step keeps a log in its folder. A step that fails ends the suite
with its status. Killed and started again it continues.
"""

from latentwire.studies.settings import SuiteSettings
from latentwire.utils.cli import parse, run


def main() -> None:
    """The whole suite."""
    config = parse(SuiteSettings)
    from latentwire.studies.suite import suite  # slow to import: a wrong flag is told before

    suite(config)


if __name__ == "__main__":
    run(main)
