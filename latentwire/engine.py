"""Compare vLLM's answers from wires with transformers' own: what a serving engine as receiver needs is embeddings.

python latentwire/engine.py --ckpt FOLDER --llm qwen          # scripts/vllm.sh makes the environment for it
"""

from latentwire.api.settings import EngineSettings
from latentwire.utils.cli import parse, run


def main() -> None:
    """One comparison, as a table."""
    config = parse(EngineSettings)
    from latentwire.api.engine import compare

    found = compare(config)
    for question, theirs, ours in found["answers"]:
        print(f"{'same' if theirs == ours else 'DIFFERS'}  {question}\n    vLLM: {theirs}\n    transformers: {ours}")
    print(f"{found['same']} of {found['n']} answers are the same")


if __name__ == "__main__":
    run(main)
