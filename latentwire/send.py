"""Encode texts to wires that another program reads. No LLM is loaded.

python latentwire/send.py --context FILE --question "Who ...?" > z.lwir
python latentwire/send.py < texts.jsonl > wires.jsonl
"""

from latentwire.api.settings import SendSettings
from latentwire.utils.cli import parse, run


def main() -> None:
    """One wire, or one per JSON line."""
    config = parse(SendSettings)
    from latentwire.api.commands import send  # slow to import: a wrong flag is told before

    send(config)


if __name__ == "__main__":
    run(main)
