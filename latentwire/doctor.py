"""What this machine has, what will run on it, and what to set, in seconds. Nothing is changed.

    python latentwire/doctor.py            # or bash scripts/doctor.sh, which needs no .venv
    python latentwire/doctor.py --json
    python latentwire/doctor.py --gpu      # runs each of a GPU's ways once, on tiny random models: minutes

A line per finding: ok, note (something will not run, or slower), or missing (the quickstart would not run), with the
remedy. Status 0 when the quickstart would run, else 1.
"""

import sys

from latentwire.evaluation.doctor import DoctorSettings, doctor
from latentwire.utils.cli import parse, run


def main() -> None:
    """One look."""
    sys.exit(doctor(parse(DoctorSettings)))


if __name__ == "__main__":
    run(main)
