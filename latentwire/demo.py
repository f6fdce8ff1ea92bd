"""Ask one question of one text, and see both answers of each LLM: from the text, and from the wire.

python latentwire/demo.py --context FILE --question "Who ...?"
python latentwire/demo.py                    # asks for a file and then for questions
"""

from latentwire.evaluation.settings import DemoSettings
from latentwire.utils.cli import parse, run


def main() -> None:
    """One question, or a conversation."""
    config = parse(DemoSettings)
    from latentwire.evaluation.asking import show  # slow to import: a wrong flag is told before

    show(config)


if __name__ == "__main__":
    run(main)
