"""What a checkpoint's embeddings look like to each LLM, beside those of text, and what changing them does.

    python latentwire/diagnostics.py --ckpt FOLDER --eval_samples 100

Writes config.json, predictions.jsonl (as it goes), diagnostics.json, findings.md, and charts. Run again, it keeps what
is finished.
"""

from latentwire.studies.settings import DiagnosticsSettings
from latentwire.utils.cli import parse, run


def main() -> None:
    """One checkpoint."""
    config = parse(DiagnosticsSettings)
    from latentwire.studies.embeddings import diagnose  # slow to import: a wrong flag is told before

    diagnose(config)


if __name__ == "__main__":
    run(main)
