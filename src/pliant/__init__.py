"""Pliant: the best model that fits a memory budget, running, and resized live.

    pliant.fit("smollm2", "128MiB", "out")           squeeze a model into a budget
    model = pliant.load("out", memory="112MiB")      a transformers model; model.generate(...)
    model.resize(memory="160MiB")                    another size, live
    pliant.measure("out", "smollm2", "text.txt")     what it cost
    pliant.plan("smollm2", "128MiB")                 what would fit, from the configuration alone
    pliant.inspect("out")                            rungs, climb, allocation
    pliant.bench("out", ["100MiB", "160MiB"])        its speed here, beside the memory's

Every function is explained in `pliant.api`. Importing pliant imports no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pliant.errors import PliantError

if TYPE_CHECKING:
    from pliant.api import bench as bench
    from pliant.api import fit as fit
    from pliant.api import inspect as inspect
    from pliant.api import load as load
    from pliant.api import measure as measure
    from pliant.api import plan as plan

__version__ = "0.1.0"
__all__ = ["PliantError", "__version__", "bench", "fit", "inspect", "load", "measure", "plan"]


def _function(name: str) -> property:
    """The function `name` of the API; what the import system sets when it loads a sub-package of
    the same name is ignored.
    """
    return property(
        lambda module: getattr(import_module("pliant.api"), name), lambda module, value: None
    )


class _Package(ModuleType):
    bench = _function("bench")  # type: ignore[assignment]
    fit = _function("fit")  # type: ignore[assignment]
    inspect = _function("inspect")  # type: ignore[assignment]
    load = _function("load")  # type: ignore[assignment]
    measure = _function("measure")  # type: ignore[assignment]
    plan = _function("plan")  # type: ignore[assignment]

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


def _install() -> Any:
    sys.modules[__name__].__class__ = _Package


_install()
