"""A single token of a static cache: what its compiled graph reads stands at addresses that stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from freqkv.forward import Request
from freqkv.layer import FreqKVLayer
from freqkv.models.upstream import Cache, dense_mask
from freqkv.parts import Call, Part
from freqkv.rotation import SlotRotation
from freqkv.tracked import TrackedCache

__all__ = ["CompiledStep", "uncompiled"]

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Keep Dynamo out of a function and of all that it calls."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


class CompiledStep(Cache):
    """The cache of a model for the length of one single token, the same object for all of them.

    Attributes
    ----------
    slot : Tensor
        `(1,)`: where the token goes.
    seen : Tensor
        `()`: how many tokens had entered before.
    tables : dict
        The embeddings of all slots, for each kind of layer.
    """

    def __init__(self, cache: TrackedCache) -> None:
        Cache.__init__(self, layers=cache.layers)
        self.window = cache.layers[0].schedule.window
        self.tables: dict[int, tuple[Tensor, ...]] = {}
        self._place_on(torch.device("cpu"))

    def _place_on(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # they are written to in any mode
            self.slot = torch.zeros(1, dtype=torch.long, device=device)
            self.seen = torch.zeros((), dtype=torch.long, device=device)

    @uncompiled
    def begin(
        self,
        cache: TrackedCache,
        tables: dict[int, tuple[Tensor, ...]],
        rotations: Callable[[], list[SlotRotation]],
    ) -> None:
        """Fold if it is time, and note where the token goes.

        Parameters
        ----------
        cache : TrackedCache
        tables : dict
            See above.
        rotations : callable
            How the layers rotate, asked for if they are folded.
        """
        cache.begin()
        part = self._part(cache)
        how = rotations() if part.folds else []
        try:
            for index, layer in enumerate(cache.layers):  # a static cache has no others than compressed ones
                if part.folds:
                    layer.fold_now(part, how[index])
                layer.intact = False
        except BaseException:  # of a compressor, for instance
            cache.abort()
            raise
        self.tables = tables
        device = cache.layers[0].device
        if self.slot.device != device or self.slot.is_inference():  # as copies are that were made in that mode
            self._place_on(device)
        self.slot.fill_(part.slots[0])
        self.seen.fill_(cache.tokens_seen)

    @staticmethod
    def _part(cache: TrackedCache) -> Part:
        (part,) = Call(cache.counts, 1).parts(cache.layers[0].schedule)
        return part

    @uncompiled
    def commit(self, cache: TrackedCache, request: Request) -> None:
        """The token is in."""
        call = Call(cache.counts, 1)
        for layer in cache.layers:
            layer.end_step(call.after)
        cache.commit(call, request.ids)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the token to its slot, and return the whole buffers."""
        layer: FreqKVLayer = self.layers[layer_idx]
        return layer.step(key_states, value_states, self.slot)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen  # type: ignore[return-value]

    def embeddings(self, kind: int, dtype: torch.dtype) -> Tensor | tuple[Tensor, ...]:
        """What a module gets in place of the decoder's embeddings."""
        rows = tuple(t.index_select(-2, self.slot) for t in self.tables[kind])
        rows = tuple(t if t.is_complex() else t.to(dtype) for t in rows)
        return rows if len(rows) > 1 else rows[0]

    def mask(self, attention: str) -> Tensor:
        """`(1, 1, 1, window)`: all slots up to the token's own."""
        dtype: torch.dtype = self.layers[0].dtype
        seen = (torch.arange(self.window, device=self.slot.device) <= self.slot)[None, None, None]
        return dense_mask(seen, attention, dtype)
