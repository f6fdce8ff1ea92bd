"""Every setting of every program: its flag, its variable, its default, what it does.

python latentwire/settings.py train [epochs]   the variables of a program, or one setting, with what they are now
python latentwire/settings.py --markdown       docs/settings.md
"""

import argparse

from latentwire.api.settings import PROGRAMS as API
from latentwire.evaluation.doctor import DoctorSettings
from latentwire.evaluation.settings import PROGRAMS as EVALUATION
from latentwire.service.settings import PROGRAMS as SERVICE
from latentwire.studies.settings import PROGRAMS as STUDIES
from latentwire.training.settings import LaunchSettings, TrainSettings
from latentwire.utils.cli import require, run
from latentwire.utils.declared import current, one, page

PROGRAMS = {
    **EVALUATION, "train": TrainSettings, "launch": LaunchSettings, **STUDIES, **API, **SERVICE,
    "doctor": DoctorSettings,
}  # fmt: skip


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?", default="eval", help=f"one of {', '.join(PROGRAMS)}")
    parser.add_argument("name", nargs="?", help="one setting, whose value alone is printed")
    parser.add_argument("--markdown", action="store_true", help="the page with all of them")
    args = parser.parse_args()
    require(args.program in PROGRAMS, "program", args.program, f"choose one of {', '.join(PROGRAMS)}")
    if args.markdown or args.name:
        print(page(PROGRAMS).rstrip() if args.markdown else one(PROGRAMS[args.program], args.name))
    for variable, value in () if args.markdown or args.name else current(PROGRAMS[args.program]):
        print(f"{variable:<22} {value}")


if __name__ == "__main__":
    run(main)
