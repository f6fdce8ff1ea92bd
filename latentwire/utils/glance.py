"""A glance at what files register: their settings and their docstrings, without the libraries that they compute with.

--help, a wrong flag and a wrong file are to be answered at once, and torch alone takes seconds to import. So the files
themselves are run, and every library in them is stood in for. What a glance gives can be read, and whatever needs no
library can be called; the modules are forgotten again, so that a later import gets the real ones.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType

_OURS = "latentwire"
_REAL = {_OURS, "numpy", *sys.stdlib_module_names}  # everything else is stood in for
_SLOW = "torch"  # where it is there already, nothing is gained by a glance


def glance(name: str) -> ModuleType:
    """The module of this name, without the libraries that it imports; the real one where torch is imported already."""
    return import_module(name) if _SLOW in sys.modules else _seen(name)


@cache
def _seen(name: str) -> ModuleType:
    with _stand_ins():
        return import_module(name)


class _Anything(type):
    """Of a class with every attribute, which can be called and begins with nothing. Python's own names are left out: it
    asks for those to learn what a class can do."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn

    def __call__(cls, *args: object, **kwargs: object) -> object:
        if cls is not _StandIn:
            return super().__call__(*args, **kwargs)  # of a file's own class, which begins with a library's
        return args[0] if args and isinstance(args[0], FunctionType) else cls  # a decorator keeps what it decorates


class _StandIn(metaclass=_Anything):
    """A library's class, function, decorator or constant, in a file that is only looked at."""

    def __class_getitem__(cls, item: object) -> type:
        return cls


class _Library(ModuleType):
    def __getattr__(self, name: str) -> type:
        return getattr(_StandIn, name)


class _Libraries(MetaPathFinder, Loader):
    """Finds every library and every part of one, without looking."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return None if name.partition(".")[0] in _REAL else ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Library(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Stand in for libraries, and forget every module that was imported meanwhile: it knows the stand-ins."""
    before, finder = set(sys.modules), _Libraries()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in sys.modules.keys() - before:
            if name.partition(".")[0] == _OURS or isinstance(sys.modules[name], _Library):
                _forget(name)


def _forget(name: str) -> None:
    del sys.modules[name]
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        vars(sys.modules[parent]).pop(child, None)
