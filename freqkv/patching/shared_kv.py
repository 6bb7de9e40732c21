"""Layers that attend to the entries of an earlier layer (Gemma 3n, Gemma 4), in a call that is cut into parts."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

__all__ = ["SharedEntries"]

# Under which names in `shared_kv_states` the entries of each part are kept.
PARTS = "freqkv parts"


class SharedEntries:
    """Entries that a layer leaves in `shared_kv_states` for later layers, one pair of tensors for each part.

    The mapping of the model is the only thing that both layers see, also where gradient checkpointing runs them again,
    and what it holds may be moved between devices: so the parts are kept in it, as tensors.
    """

    def __init__(self, mapping: MutableMapping[Any, tuple[Tensor, ...]]) -> None:
        self.mapping = mapping
        self.before = dict(mapping)
        self.kept: dict[Any, list[Tensor]] = {}

    def keep(self, total: int, last: bool) -> None:
        """After a part of the layer that makes them."""
        for name, entries in list(self.mapping.items()):
            if not _is_parts(name) and entries is not self.before.get(name):
                kept = self.kept.setdefault(name, [entries[0].new_empty(total, 0)])
                # The next part may fold these in place.
                kept += [entry if last or entry.requires_grad else entry.clone() for entry in entries]
                self.before[name] = entries
                if last:
                    self.mapping[PARTS, name] = tuple(kept)

    def show(self, number: int) -> None:
        """Before a part of a layer that reads them."""
        for name, kept in list(self.mapping.items()):
            if _is_parts(name):
                self.mapping[name[1]] = kept[1 + 2 * number], kept[2 + 2 * number]

    @property
    def tokens(self) -> int:
        """How many tokens made them, all in one call."""
        kept = [entries[0].shape[0] for name, entries in self.mapping.items() if _is_parts(name)]
        # Without compression, what was left is one entry a token.
        return kept[0] if kept else int(next(iter(self.mapping.values()))[0].shape[-2])


def _is_parts(name: Any) -> bool:
    return isinstance(name, tuple) and name[0] == PARTS
