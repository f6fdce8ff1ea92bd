"""Encoders: text to Z. Every file of this folder is imported, so that what it registers is known by its name."""

import sys

from latentwire.utils.registry import import_all

import_all(sys.modules[__name__])
