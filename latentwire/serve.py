"""Encode texts and answer from wires over HTTP, with a page to try it; needs the extra: pip install -e '.[serve]'.

python latentwire/serve.py                                   # http://127.0.0.1:8000, its page at /, its routes at /docs
python latentwire/serve.py --role reader --llm qwen --port 8001
"""

from latentwire.service.settings import ServeSettings
from latentwire.utils.cli import parse, run


def main() -> None:
    """Serve until SIGTERM or Ctrl+C."""
    config = parse(ServeSettings)
    try:
        from latentwire.service.app import serve
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed: pip install -e '.[serve]', or bash scripts/serve.sh"
        ) from error

    serve(config)


if __name__ == "__main__":
    run(main)
