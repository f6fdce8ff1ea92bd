"""Answer from wires that send.py made. One LLM is loaded, and no encoder.

python latentwire/answer.py --llm qwen z.lwir
python latentwire/send.py --context FILE --question "Who ...?" | python latentwire/answer.py --llm qwen
python latentwire/answer.py --llm qwen < wires.jsonl > answers.jsonl
"""

from latentwire.api.settings import AnswerSettings
from latentwire.utils.cli import parse, run


def main() -> None:
    """One answer, or one per JSON line."""
    config = parse(AnswerSettings)
    from latentwire.api.commands import answer  # slow to import: a wrong flag is told before

    answer(config)


if __name__ == "__main__":
    run(main)
