"""Put functions in place of a library's own, say where, count their calls, and undo it.

`from x import f` copies a reference, so every loaded module of the library that holds the original is changed. Modules
that the library loads later take what they find, which is ours; `undo` looks at all modules that are loaded by then.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Type

import torch

from .._checks import bad

_log = logging.getLogger("vrlt_kernels")
_MARK = "__vrlt_kernels_replaces__"
Functions = Dict[str, Dict[str, Callable[..., Any]]]
"""Ours, by module of the library and name in it."""


@dataclass(frozen=True)
class Replacement:
    """One function that was replaced.

    ``name`` is the original with its module, ``by`` ours, ``places`` the modules (with the name in each) that hold it
    now, ``calls`` how often it ran since; calls from inside a torch.compile region aren't counted.
    """

    name: str
    by: str
    places: Tuple[str, ...]
    calls: int


class _Swap:
    """An original, what stands in for it, and how often that was called."""

    def __init__(self, module: str, name: str, original: Any, ours: Callable[..., Any]) -> None:
        self.name = f"{module}.{name}"
        self.by = f"{ours.__module__}.{ours.__name__}"
        self.original = original
        self.calls = 0

        @functools.wraps(ours)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                self.calls += 1
            return ours(*args, **kwargs)

        is_function_class = isinstance(original, type) and issubclass(original, torch.autograd.Function)
        self.stand_in: Any = counted
        if is_function_class:  # such a class is only ever used through `apply`
            self.stand_in = type(original.__name__, (), {"apply": staticmethod(counted), "__module__": ours.__module__})
        setattr(self.stand_in, _MARK, self.name)


class Handle:
    """What `apply` did. Also a context manager that undoes it at the end of the block."""

    def __init__(self, package: str, swaps: List[_Swap]) -> None:
        self.package = package
        self._swaps = swaps

    def report(self) -> Tuple[Replacement, ...]:
        """What is replaced by what, where, and how often it was called. The places are empty after `undo`."""
        return tuple(
            Replacement(
                swap.name,
                swap.by,
                tuple(sorted(f"{m}.{n}" for m, n in _holders(self.package, swap.stand_in))),
                swap.calls,
            )
            for swap in self._swaps
        )

    def undo(self) -> None:
        """Put the originals back, also in modules that were loaded since. A second call finds nothing to do."""
        for swap in self._swaps:
            for module, name in _holders(self.package, swap.stand_in):
                setattr(sys.modules[module], name, swap.original)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.undo()


def replace(target: object, package: str, versions: Sequence[str], ours: Functions) -> Handle:
    """Replace ``ours[module][name]`` in every loaded module of ``package``; all of them or, on an error, none.

    ``target`` is the imported package or a module of it, or a trainer of it (class or instance).

    Raises:
        KernelInputError: the target is of another package; its version isn't one of ``versions``; a function is
            missing, has other arguments or is already replaced.
    """
    owners = _packages_of(target)
    if package not in owners:
        raise bad("module", f"{target!r}", f"the package {package!r}, a module or a trainer of it")
    version = getattr(sys.modules.get(package), "__version__", None)
    if version not in versions:
        raise bad("module", f"{package} {version}", f"{package} {' or '.join(versions)}, which these functions follow")
    swaps = []
    for module, functions in ours.items():
        found = importlib.import_module(module)
        for name, function in functions.items():
            original = vars(found).get(name)
            if original is None:
                raise bad("module", f"{module} without {name}", "an unchanged installation of the library")
            if hasattr(original, _MARK):
                raise bad("module", f"{module}.{name}, already replaced", "`undo()` of the first handle before")
            _same_arguments(f"{module}.{name}", original, function)
            swaps.append(_Swap(module, name, original, function))
    for swap in swaps:
        for holder, name in _holders(package, swap.original):
            setattr(sys.modules[holder], name, swap.stand_in)
        _log.info("%s: replaced by %s", swap.name, swap.by)
    return Handle(package, swaps)


def _same_arguments(name: str, original: Any, ours: Callable[..., Any]) -> None:
    """A development version keeps its number while its functions change, so their arguments are compared, too."""
    if isinstance(original, type) and issubclass(original, torch.autograd.Function):
        theirs = _arguments(original.forward)[1:]  # without ctx
    elif inspect.isfunction(original):
        theirs = _arguments(original)
    else:  # the `apply` of an autograd function: its class is compared
        return
    if theirs != _arguments(ours):
        raise bad("module", f"{name}({', '.join(theirs)})", f"one with the arguments {', '.join(_arguments(ours))}")


def _arguments(function: Callable[..., Any]) -> List[str]:
    return [
        name if p.default is p.empty else f"{name}={p.default!r}"
        for name, p in inspect.signature(function).parameters.items()
    ]


def _packages_of(target: object) -> List[str]:
    if isinstance(target, ModuleType):
        return [target.__name__.partition(".")[0]]
    return [c.__module__.partition(".")[0] for c in (target if isinstance(target, type) else type(target)).__mro__]


def _holders(package: str, value: object) -> Iterator[Tuple[str, str]]:
    """Module and name of every global of the package that is this very object."""
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.partition(".")[0] != package:
            continue
        yield from ((module_name, name) for name, held in list(vars(module).items()) if held is value)


__all__ = ["Functions", "Handle", "Replacement", "replace"]
