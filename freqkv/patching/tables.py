"""How the layers of a patched model rotate at slots: tables, made once for each window, and again when they are stale."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from freqkv.models.layers import AttentionLayer, Rotary
from freqkv.rotary import SlotTable
from freqkv.rotation import SlotRotation

__all__ = ["Tables", "WINDOWS_KEPT"]

# Windows whose tables are kept: those of caches that are used in turn. Others are made anew when they are asked for.
WINDOWS_KEPT = 4


class Tables:
    """The slot tables and rotations of a model's layers.

    Parameters
    ----------
    layers : list of AttentionLayer
    """

    def __init__(self, layers: list[AttentionLayer]) -> None:
        self.layers = layers
        self.kinds: dict[Any, int] = {}
        for layer in layers:
            self.kinds.setdefault(layer.kind, len(self.kinds))
        self._windows: list[int] = []
        self._tables: dict[Any, tuple[Any, SlotTable]] = {}
        self._rotations: dict[Any, tuple[Any, SlotRotation]] = {}

    def rotation(self, layer: AttentionLayer, kind: int, window: int, device: torch.device) -> SlotRotation:
        """How a layer rotates at the slots of a window.

        Tables are made anew when its rotary module, or what `model.to(...)` made of it, is another.
        """
        version = None if layer.rotary is None else layer.rotary.version()
        scale = layer.scale()
        if window not in self._windows:
            self._windows.append(window)
            self._forget(self._windows[:-WINDOWS_KEPT])
        place = window, kind, device
        known = self._rotations.get(place)
        if known is None or known[0] != version or known[1].scale is not scale:
            table = None if layer.rotary is None else self._table(layer.rotary, version, window, device)
            known = self._rotations[place] = version, SlotRotation(table, layer.rotation, scale)
        return known[1]

    def _table(self, rotary: Rotary, version: Any, window: int, device: torch.device) -> SlotTable:
        key = window, rotary, device
        known = self._tables.get(key)
        if known is None or known[0] != version:
            known = self._tables[key] = version, rotary.table(window, device)
        return known[1]

    def _forget(self, windows: list[int]) -> None:
        """Let the tables of some windows go."""
        for tables in (self._tables, self._rotations):
            for place in [place for place in tables if place[0] in windows]:
                del tables[place]
        self._windows = [window for window in self._windows if window not in windows]

    @cached_property
    def _layer_per_kind(self) -> list[tuple[int, AttentionLayer]]:
        return list({self.kinds[layer.kind]: layer for layer in self.layers}.items())

    def embeddings(self, window: int, device: torch.device) -> dict[int, tuple[Tensor, ...]]:
        """The embeddings of all slots, for each kind of layer that takes them."""
        tables = {}
        for kind, layer in self._layer_per_kind:
            table = self.rotation(layer, kind, window, device).table
            if table is not None and table.native is not None:
                tables[kind] = (table.native,) if isinstance(table.native, Tensor) else table.native
        return tables

    def rotations(self, window: int, device: torch.device) -> list[SlotRotation]:
        """How the layers of a cache rotate, in their order, where each has one attention module."""
        by_index = {
            layer.layer_idx: self.rotation(layer, self.kinds[layer.kind], window, device) for layer in self.layers
        }
        return [by_index[index] for index in sorted(by_index)]

    def __getstate__(self) -> dict[str, Any]:
        # Made anew in a copy, whose rotary modules are others; kinds are keyed by them as well.
        return {**self.__dict__, "_windows": [], "_tables": {}, "_rotations": {}}
