"""What a decoder gives its layers: its own forward is run over a few tokens, with stand-ins in the place of the layers.

Which embeddings an attention layer gets is the decoder's choice: some layers get none and do not rotate, some get those of
a rotary module of their own. It runs on a copy of the tree of modules: no weight is touched, and nothing is left on the model.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from freqkv.models.modules import own_class, shallow_copy
from freqkv.models.upstream import HOOK, is_rotary
from freqkv.rotary import pristine

__all__ = ["NOT_GIVEN", "embeddings_given"]

# In the place of embeddings that a layer's forward was not called with at all.
NOT_GIVEN = object()
EMBEDDINGS = "position_embeddings"


class _SeenAll(Exception):  # noqa: N818 - the wanted outcome, not an error
    """Ends the decoder's forward once all layers were called."""


class _StandIn(nn.Module):
    """Takes the place of a layer: notes what it is called with, and returns the hidden states as they came."""

    def __init__(
        self, layer: nn.Module, place: Any, given: dict[Any, Any], wanted: frozenset[Any], as_tuple: bool
    ) -> None:
        super().__init__()
        hidden = {"layer": layer, "place": place, "given": given, "wanted": wanted, "as_tuple": as_tuple}
        self.__dict__.update(hidden)  # not as a child, and before `__getattr__` is asked for anything
        self.parameter_names = list(inspect.signature(layer.forward).parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)  # decoders ask their layers for their type, and the like

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = {**dict(zip(self.parameter_names, args, strict=False)), **kwargs}
        self.given[self.place] = call.get(EMBEDDINGS, NOT_GIVEN)
        if self.wanted <= self.given.keys():
            raise _SeenAll
        hidden_states = args[0] if args else call["hidden_states"]
        return (hidden_states, None) if self.as_tuple else hidden_states


def _copied(module: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A copy of a tree of modules with others in the place of some: the first one may be in use by other threads."""
    new = shallow_copy(module)
    for name, child in module._modules.items():
        if child is None:
            continue
        inside = list(child.modules())
        if child in replaced:
            new._modules[name] = replaced[child]
        elif is_rotary(child):
            new._modules[name] = pristine(child)
        elif any(inner in replaced for inner in inside) or not any(HOOK in inner.__dict__ for inner in inside):
            new._modules[name] = _copied(child, replaced)  # else its hook brings its weights
    return new


@torch.no_grad()
def embeddings_given(
    decoder: nn.Module, names: list[str], slots: Tensor, hidden_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The position embeddings that the decoder gives the layers around some attention modules.

    Parameters
    ----------
    decoder : nn.Module
    names : list of str
        Of the attention modules in the decoder.
    slots : Tensor
        `(n,)`: the positions of the tokens it is run over.
    hidden_size : int
    dtype : torch.dtype
        Of the hidden states.

    Returns
    -------
    dict of str to Any
        For each name a tensor or a tuple of tensors; None where the layer is given none; NOT_GIVEN where its forward is not
        called with that argument.

    Raises
    ------
    Exception
        Whatever the decoder's forward raises where it does not run like this.
    """
    blocks = {name: _block(decoder, name) for name in names}
    lists = {parent for parent, _ in blocks.values()}
    wanted = frozenset(blocks.values())
    errors: list[Exception] = []
    forward: Any = own_class(decoder).forward  # type: ignore[attr-defined]  # a model may be looked at that is patched
    parameters = inspect.signature(forward).parameters
    inputs = (
        {"inputs_embeds": torch.zeros(1, len(slots), hidden_size, dtype=dtype, device=slots.device)},
        {"input_ids": torch.zeros_like(slots)[None]},
    )
    # Some take hidden states only together with the ids they came from, some ask a layer for a tuple.
    for tokens, as_tuple in itertools.product(inputs, (False, True)):
        given: dict[tuple[nn.Module, str], Any] = {}
        stand_ins: dict[nn.Module, nn.Module] = {
            layer: _StandIn(layer, (parent, child), given, wanted, as_tuple)
            for parent in lists
            for child, layer in parent.named_children()
            if isinstance(parent, nn.ModuleList) or (parent, child) in wanted
        }
        call: dict[str, Any] = {**tokens, "position_ids": slots[None], "use_cache": False}
        call = {name: value for name, value in call.items() if name in parameters}
        devices = [slots.device] if slots.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):  # dropout of a model in training draws numbers
                forward(_copied(decoder, stand_ins), **call)
        except _SeenAll:
            return {name: given[block] for name, block in blocks.items()}
        except Exception as error:
            errors.append(error)
    raise errors[0] if errors else RuntimeError("not all of its layers were called")


def _block(decoder: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The first list of layers on the way from the decoder to a module, and which of them; else the module itself."""
    parent, parts = decoder, name.split(".")
    for part in parts[:-1]:
        if isinstance(parent, nn.ModuleList):
            return parent, part
        parent = parent.get_submodule(part)
    return parent, parts[-1]
