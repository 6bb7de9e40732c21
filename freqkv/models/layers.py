"""What :func:`freqkv.models.analysis.analyse` finds in a model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from freqkv.models.modules import own_class
from freqkv.models.rules import FamilyRule
from freqkv.rotary import KeyRotation, SlotTable, TableVersion, sinusoid_table, slot_table

__all__ = ["Analysis", "AttentionLayer", "Rotary"]


@dataclass(frozen=True)
class Rotary:
    """Where the embeddings of a layer come from: a child of `owner`, and its table if it has one for each layer type."""

    owner: nn.Module
    name: str
    layer_type: str | None = None

    @property
    def source(self) -> Any:
        return getattr(self.owner, self.name)

    def version(self) -> TableVersion:
        """Changes identity when cached tables become stale, as after `model.to(...)`."""
        return TableVersion(self.source)

    def table(self, slots: int, device: torch.device) -> SlotTable:
        source = self.source
        if isinstance(source, Tensor):
            return sinusoid_table(source, slots, device)
        return slot_table(source, slots, device, self.layer_type)


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module whose cache is compressed.

    Attributes
    ----------
    name : str
        Of the module in the model.
    module : nn.Module
    layer_idx : int
        Its layer in the cache; the first one if it serves several.
    cache_argument, positions : str
        Under which names its forward takes the cache, and what tells positions: "position_embeddings", "position_ids"
        if it rotates by itself, or "" if it knows none.
    reads_shared : bool
        Whether it has no keys of its own and attends to those of an earlier layer (Gemma 3n, Gemma 4).
    hybrid : bool
        Whether its layer in the cache also holds a convolution or recurrent state.
    rotary : Rotary or None
    rotation : KeyRotation or None
        None if it does not rotate what it caches.
    keeps_state : bool
        Whether the module carries a state of its own from token to token in the cache (ZAYA).
    serves_several : bool
        Whether it is called for several layers of the cache.
    rule : FamilyRule
    """

    name: str
    module: nn.Module
    layer_idx: int
    cache_argument: str
    positions: str
    reads_shared: bool
    hybrid: bool
    rotary: Rotary | None
    rotation: KeyRotation | None
    keeps_state: bool
    serves_several: bool
    rule: FamilyRule

    @property
    def kind(self) -> Any:
        """The same for layers that stand at slots in the same way."""
        return self.rotary, self.positions, self.rotation, None if self.rule.key_scale is None else self.layer_idx

    def scale(self) -> Tensor | None:
        """By what it multiplies keys after rotation, `(head_dim,)`."""
        if self.rule.key_scale is None:
            return None
        weight: Tensor = self.module.get_submodule(self.rule.key_scale).weight  # type: ignore[assignment]
        return weight

    def forward_function(self) -> Any:
        """The function behind the forward of its class, without replaced methods and decorators."""
        return inspect.unwrap(own_class(self.module).forward)  # type: ignore[attr-defined]

    def __str__(self) -> str:
        if self.reads_shared:
            return f"{self.name}, reads the entries of an earlier layer"
        return f"{self.name}, {'keys not rotated' if self.rotation is None else self.rotation}"


@dataclass(frozen=True)
class Analysis:
    """What :func:`analyse` finds.

    Attributes
    ----------
    decoder : nn.Module
        The innermost model that hands a cache to its layers.
    around : list of nn.Module
        The models around it, innermost first.
    layers : list of AttentionLayer
        The attention modules whose cache is compressed.
    others : dict of int to str
        Kinds of the cache layers left to transformers, by index.
    """

    decoder: nn.Module
    around: list[nn.Module]
    layers: list[AttentionLayer]
    others: dict[int, str]
