"""How much a service on this machine bears: requests per second, times, errors, memory at several numbers of clients.

python latentwire/load_test.py --url http://127.0.0.1:8000       # scripts/load_test.sh starts services of its own
"""

from latentwire.service.settings import LoadSettings
from latentwire.utils.cli import parse, run


def main() -> None:
    """One load test, as a table; results.json and a chart beside it."""
    config = parse(LoadSettings)
    from latentwire.service.load import run_load, table  # slow to import: a wrong flag is told before

    print(table(run_load(config)), end="")


if __name__ == "__main__":
    run(main)
