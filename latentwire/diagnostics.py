"""What a checkpoint's embeddings look like to each LLM, beside those of text, and what changing them does.

    python latentwire/diagnostics.py --ckpt FOLDER --samples 100

Writes config.json, predictions.jsonl (as it goes), diagnostics.json, findings.md, and charts. Run again, it keeps what
is finished. Shapes: P positions, d LLM width, M latents.
"""

from latentwire.studies.embeddings import main
from latentwire.utils.runs import cli

if __name__ == "__main__":
    cli(main)
