"""Modules of a model: parents, parameter names, copies, and where accelerate runs them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from freqkv.models.upstream import HOOK, HOOKED_FORWARD

__all__ = [
    "BASE",
    "Everywhere",
    "computes_on",
    "execution_device",
    "own_class",
    "parameter_names",
    "parents",
    "shallow_copy",
    "unhooked_forward",
    "weights_present",
]

# Where a class that was made for one instance keeps the one that it was made from.
BASE = "_freqkv_base"


class Everywhere(list[Any]):
    """Layers of a cache that has the same one at whatever index a module names."""

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(0)


def parameter_names(module: nn.Module) -> list[str]:
    """Of its forward."""
    return list(inspect.signature(module.forward).parameters)


def own_class(module: nn.Module) -> type:
    """The class that a module has without replaced methods."""
    own: type = getattr(type(module), BASE, type(module))
    return own


def parents(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules around the one called `name`, innermost first."""
    while name:
        name = name.rpartition(".")[0]
        yield model.get_submodule(name)


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module with the same parameters, buffers and children, to which others can be given without the first one's notice.

    Accelerate's hook is left out: it would run the first one.
    """
    new = type(module).__new__(type(module))
    state = {name: value.copy() if isinstance(value, dict) else value for name, value in module.__dict__.items()}
    if HOOK in state:
        for name in (HOOK, HOOKED_FORWARD, "forward"):
            state.pop(name, None)
    new.__dict__.update(state)
    return new


def unhooked_forward(module: nn.Module) -> Any:
    """The module's own forward, behind what accelerate put before it."""
    return getattr(module, HOOKED_FORWARD) if hasattr(module, HOOK) else module.forward


def _hooks(model: nn.Module, name: str) -> list[tuple[nn.Module, Any]]:
    """Accelerate's hooks on the way to a module, outermost first, the module's own included."""
    path = [model.get_submodule(name), *parents(model, name)]
    return [(module, getattr(module, HOOK)) for module in reversed(path) if hasattr(module, HOOK)]


def execution_device(model: nn.Module, name: str) -> torch.device | None:
    """Where accelerate runs a module whose weights are elsewhere; None if it has no say in it."""
    hooks = [hook for _, hook in _hooks(model, name)]
    hooks += [getattr(inner, HOOK) for inner in model.get_submodule(name).modules() if hasattr(inner, HOOK)]
    device = next((d for d in (getattr(hook, "execution_device", None) for hook in hooks) if d is not None), None)
    return None if device is None else torch.device(device)


def computes_on(module: nn.Module) -> torch.device | None:
    """Where a module computes: where its weights are, or where accelerate brings them."""
    for inner in module.modules():
        device = getattr(getattr(inner, HOOK, None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((parameter.device for parameter in module.parameters() if not parameter.is_meta), None)


@contextmanager
def weights_present(model: nn.Module, name: str) -> Iterator[None]:
    """Run accelerate's hooks around a module, which bring offloaded weights and take them away again; gather weights that
    DeepSpeed keeps in parts.
    """
    with ExitStack() as stack:
        parts = [weight for weight in model.get_submodule(name).parameters() if hasattr(weight, "ds_id")]
        if parts:
            from deepspeed import zero

            stack.enter_context(zero.GatheredParameters(parts))
        for module, hook in _hooks(model, name):
            hook.pre_forward(module)
            stack.callback(hook.post_forward, module, torch.empty(0, device="cpu"))
        yield
