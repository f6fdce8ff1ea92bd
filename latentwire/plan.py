"""What training, a corpus and serving would take, on paper (docs/scale.md).

python latentwire/plan.py > docs/scale.md
python latentwire/plan.py --llms llama3.1-8b,qwen2.5-7b --gpus 8 --documents 1e9 --gpu_price 3
"""

from latentwire.studies.settings import PlanSettings
from latentwire.utils.cli import parse, run


def main() -> None:
    """The page, on standard output."""
    config = parse(PlanSettings)
    from latentwire.studies.scale.page import page  # slow to import: a wrong flag is told before

    print(page(config), end="")


if __name__ == "__main__":
    run(main)
