"""LatentWire: frozen language models answering from one short wire of latents instead of text."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["LatentWire", "Wire"]

if TYPE_CHECKING:
    from latentwire.api.encoding import LatentWire
    from latentwire.api.message import Wire


def __getattr__(name: str) -> object:
    """LatentWire and Wire, imported when they are first asked for: programs answer --help before that."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from latentwire.api import encoding

    return getattr(encoding, name)
