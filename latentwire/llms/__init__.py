"""Frozen language models: which there are, how they are loaded, prompted and fed with embeddings."""
