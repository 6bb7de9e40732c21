"""Methods of one instance, replaced by giving the instance a class of its own, and given back.

A method of a class, unlike an object in the `__dict__` of an instance, is bound anew in the replicas of `nn.DataParallel`, and
traced by `torch.export` and `torch.compile(fullgraph=True)`. The new class derives from the old one, as in
`torch.nn.utils.parametrize`, and has its names, by which many libraries go.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, TypeAlias

from torch import nn

from freqkv.models.modules import BASE
from freqkv.models.upstream import HOOK, HOOKED_FORWARD

__all__ = ["Method", "Replacement", "replace_method", "replacements", "restore_methods"]

Method: TypeAlias = Callable[..., Any]
# Where an instance keeps its replacements, by the name of the method.
REPLACEMENTS = "_freqkv_replacements"


class Replacement:
    """Stands in for the method `name` of one instance.

    Each call gets the method that it stands in for, bound to the instance (or replica) that is called, and the arguments.

    Attributes
    ----------
    place : str
        Under which name the instance holds the method if it is not its class's: a hook of accelerate stays outside.
    replaced : callable or None
        What the instance held there.
    parameters : list of str
        Of the method.
    """

    name = "forward"

    def __init__(self, owner: nn.Module) -> None:
        self.place = HOOKED_FORWARD if self.name == "forward" and HOOK in owner.__dict__ else self.name
        self.replaced: Method | None = owner.__dict__.get(self.place)
        self.parameters = list(inspect.signature(getattr(owner, self.name)).parameters)

    def __call__(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs} if args else kwargs


def replacements(root: nn.Module) -> Iterator[tuple[nn.Module, Replacement]]:
    """All replacements in a module and in what is inside it."""
    for module in root.modules():
        for replacement in module.__dict__.get(REPLACEMENTS, {}).values():
            yield module, replacement


def replace_method(module: nn.Module, replacement: Replacement) -> None:
    """Put a replacement in the place of one method of one instance."""
    present = module.__dict__.setdefault(REPLACEMENTS, {})
    present[replacement.name] = replacement
    module.__dict__.pop(replacement.place, None)  # kept as `replaced`
    cls: Any = type(module)
    lacking = {name for name in present if not hasattr(getattr(cls, name), REPLACEMENTS)}
    if lacking:  # else another library has derived its class from ours
        base, names = (cls.__dict__[BASE], set(present)) if BASE in cls.__dict__ else (cls, lacking)
        module.__class__ = _derived(base, frozenset(names))
    if replacement.place != replacement.name:
        module.__dict__[replacement.place] = getattr(type(module), replacement.name).__get__(module)


def restore_methods(module: nn.Module) -> None:
    """Undo :func:`replace_method` for all methods of an instance."""
    present = module.__dict__.pop(REPLACEMENTS)
    cls = type(module)
    if BASE in cls.__dict__:  # else another library has derived its class from ours, whose methods do nothing now
        module.__class__ = cls.__dict__[BASE]
    for name, replacement in present.items():
        kept = [key for key, value in module.__dict__.items() if _is_derived_method(value, name)]
        for key in kept:  # to be called by a wrapper around it, as accelerate's hooks do
            module.__dict__[key] = replacement.replaced or getattr(type(module), name).__get__(module)
        if replacement.replaced is not None and not kept:
            module.__dict__.setdefault(name, replacement.replaced)


@functools.cache
def _derived(base: Any, names: frozenset[str]) -> Any:
    """A class that differs from `base` in the methods `names` only."""

    def reduce(self: Any, protocol: Any) -> Any:  # pickle finds classes by name, and would find the base
        _, _, *rest = base.__reduce_ex__(self, protocol)
        return _new, (base, names), *rest

    members = {name: _method(base, name) for name in names}
    members |= {"__reduce_ex__": reduce, "__module__": base.__module__, "__doc__": base.__doc__, BASE: base}
    derived: Any = type(base)(base.__name__, (base,), members)
    derived.__qualname__ = base.__qualname__
    return derived


def _new(base: Any, names: frozenset[str]) -> Any:
    derived = _derived(base, names)
    return derived.__new__(derived)


def _method(base: Any, name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = getattr(base, name)  # looked up at each call: other libraries replace methods of classes
        present = self.__dict__.get(REPLACEMENTS)
        replacement = None if present is None else present.get(name)
        if replacement is None:  # restored, and somebody kept the method
            return original(self, *args, **kwargs)
        return replacement(replacement.replaced or functools.partial(original, self), *args, **kwargs)

    original = getattr(base, name)

    # Not functools.wraps: those who follow `__wrapped__` to its end, as accelerate does, would leave this method out.
    method.__name__, method.__qualname__, method.__doc__ = name, original.__qualname__, original.__doc__
    method.__module__ = original.__module__
    method.__dict__ |= {"__signature__": inspect.signature(original), REPLACEMENTS: name}
    return method


def _is_derived_method(value: Any, name: str) -> bool:
    return isinstance(value, MethodType) and getattr(value.__func__, REPLACEMENTS, None) == name
