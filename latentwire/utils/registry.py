"""Registries: one file and one decorated line add an encoder, an adapter, a condition, a data set or a stage."""

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


class Registry(dict[str, T]):
    """Things by name, in the order in which they were registered. kind: what a thing is called in errors."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that adds what it decorates under `name`, and tells it its name."""

        def add(thing: T) -> T:
            assert name not in self, f"the {self.kind} {name} is registered twice"
            thing.name = name
            self[name] = thing
            return thing

        return add

    def pick(self, name: str) -> T:
        """What is registered under `name`; ValueError with the known names otherwise."""
        if name not in self:
            raise ValueError(f"{self.kind}={name!r}: unknown; choose one of {', '.join(self)}")
        return self[name]


def import_all(package: ModuleType) -> None:
    """Import every module of a folder, so that what they register is there."""
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{found.name}")
