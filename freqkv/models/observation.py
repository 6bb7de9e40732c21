"""Observes which position embeddings a decoder gives to its layers.

The decoder chooses the embeddings of each attention layer: some layers get none and do not rotate, others get those of a
rotary module of their own. To see this, the forward of the decoder is run over a few tokens, with recorders in the place of
its layers. It runs on a copy of the tree of modules: neither its weights nor the model are changed.
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

# Stands for embeddings if a layer was called without that argument.
NOT_GIVEN = object()
EMBEDDINGS = "position_embeddings"


class _AllSeen(Exception):  # noqa: N818 - the expected end, not an error
    """Ends the forward of the decoder once all layers were called."""


class _StandIn(nn.Module):
    """A recorder in the place of a layer: notes its embeddings, and returns the hidden states unchanged."""

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
            raise _AllSeen
        hidden_states = args[0] if args else call["hidden_states"]
        return (hidden_states, None) if self.as_tuple else hidden_states


def _copied(module: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A copy of a tree of modules with some of them replaced. The original may be in use by other threads."""
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
            new._modules[name] = _copied(child, replaced)  # else it stays: accelerate's hooks inside bring its weights
    return new


@torch.no_grad()
def embeddings_given(
    decoder: nn.Module, names: list[str], slots: Tensor, hidden_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The position embeddings that the decoder gives to the layers around some attention modules.

    Parameters
    ----------
    decoder : nn.Module
    names : list of str
        The names of the attention modules in the decoder.
    slots : Tensor
        `(n,)`: the positions of the tokens that it is run over.
    hidden_size : int
    dtype : torch.dtype
        The dtype of the hidden states.

    Returns
    -------
    dict of str to Any
        For each name a tensor or a tuple of tensors; None if the layer gets None; NOT_GIVEN if it is called without that
        argument.

    Raises
    ------
    Exception
        Whatever the forward of the decoder raises if it cannot be run like this.
    """
    blocks = {name: _block(decoder, name) for name in names}
    lists = {parent for parent, _ in blocks.values()}
    wanted = frozenset(blocks.values())
    errors: list[Exception] = []
    forward: Any = own_class(decoder).forward  # type: ignore[attr-defined]  # the model may be patched
    parameters = inspect.signature(forward).parameters
    inputs = (
        {"inputs_embeds": torch.zeros(1, len(slots), hidden_size, dtype=dtype, device=slots.device)},
        {"input_ids": torch.zeros_like(slots)[None]},
    )
    # Some decoders need token ids in place of hidden states, and some expect a layer to return a tuple.
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
        except _AllSeen:
            return {name: given[block] for name, block in blocks.items()}
        except Exception as error:
            errors.append(error)
    raise errors[0] if errors else RuntimeError("not all of its layers were called")


def _block(decoder: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The place of the layer around a module: the first list on the way from the decoder, and the name of the layer in it.

    Without a list: the parent of the module itself, and its name there.
    """
    parent, parts = decoder, name.split(".")
    for part in parts[:-1]:
        if isinstance(parent, nn.ModuleList):
            return parent, part
        parent = parent.get_submodule(part)
    return parent, parts[-1]
