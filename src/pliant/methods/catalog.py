"""The catalog of methods: filled by the `@method` decorator, one entry a file."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from pliant.errors import RecipeError

_CATALOG: dict[str, MethodInfo] = {}


@dataclass(frozen=True)
class MethodInfo:
    """What a user and the planner need to know of one method.

    kind: the folder it lives in (quantize, factorize, repair, ...).
    needs: fields of `Statistics` that must be observed before it can run; of `Candidates` for a
    method that chooses calibration text.
    """

    name: str
    kind: str
    paper: str
    needs: tuple[str, ...]
    function: Callable[..., Any]

    @property
    def summary(self) -> str:
        """First line of the method's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        """Keyword options and their defaults."""
        return {
            p.name: p.default
            for p in inspect.signature(self.function).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }


def method(
    name: str, *, kind: str, paper: str, needs: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Record a method in the catalog; the function itself is returned unchanged."""

    def record(function: Callable[..., Any]) -> Callable[..., Any]:
        _CATALOG[name] = MethodInfo(name, kind, paper, needs, function)
        return function

    return record


def catalog() -> dict[str, MethodInfo]:
    """Every method by name, sorted; importing each file of the sub-packages fills it."""
    _import_all()
    return dict(sorted(_CATALOG.items()))


def find(name: str) -> MethodInfo:
    """The method called `name`; RecipeError lists the known ones when there is none."""
    _import_all()
    if name not in _CATALOG:
        raise RecipeError(f"no method is called {name!r}; known methods: {', '.join(catalog())}")
    return _CATALOG[name]


@cache  # a fit looks methods up thousands of times
def _import_all() -> None:
    package = importlib.import_module("pliant.methods")
    for module in pkgutil.walk_packages(package.__path__, "pliant.methods."):
        importlib.import_module(module.name)
