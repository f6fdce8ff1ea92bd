"""Conditions: what the LLM finds in the content slot. Every file of this folder is imported."""

import sys
from importlib import import_module

from latentwire.utils.registry import import_all

for _name in ("texts", "pca", "latents", "selected", "tuned", "oracles"):  # in the order of the tables; others follow
    import_module(f"{__name__}.{_name}")
import_all(sys.modules[__name__])
