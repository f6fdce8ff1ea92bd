"""LatentWire: frozen language models answering from one short wire of latents instead of text."""

__version__ = "0.1.0"
