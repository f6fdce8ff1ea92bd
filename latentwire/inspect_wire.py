"""Say what a wire holds: header, sizes, checksum, words, and after how many questions it has paid for itself.

python latentwire/inspect_wire.py z.lwir
"""

from latentwire.api.settings import InspectSettings
from latentwire.utils.cli import parse, run


def main() -> None:
    """One wire."""
    config = parse(InspectSettings)
    from latentwire.api.commands import inspect  # slow to import: a wrong flag is told before

    inspect(config)


if __name__ == "__main__":
    run(main)
