"""Ask one question of one text, and see both answers of each LLM: from the text, and from the wire.

python latentwire/demo.py --context FILE --question "Who ...?"
python latentwire/demo.py                    # asks for a file and then for questions
"""

from latentwire.evaluation.asking import main
from latentwire.utils.runs import cli

if __name__ == "__main__":
    cli(main)
