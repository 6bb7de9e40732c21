"""A layer of the cache: at most `window` entries, keys rotated at their slots, folded when the schedule says so.

It knows the schedule, the compressor and rotations, and nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from freqkv.buffers import outside_inference_mode, scatter
from freqkv.compressors import Compressor
from freqkv.entries import EntriesLayer
from freqkv.folding import Queries, fold
from freqkv.models.upstream import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer
from freqkv.parts import Part
from freqkv.rollback import recorded
from freqkv.rotation import SlotRotation
from freqkv.schedule import Schedule

__all__ = ["FreqKVHybridLayer", "FreqKVLayer"]


class FreqKVLayer(EntriesLayer):
    """The entries of one full-attention layer, and how tokens enter. See :class:`EntriesLayer` for its parameters."""

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        part: Part | None = None,
        rotation: SlotRotation | None = None,
        align_right: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Fold if the schedule says so, append the tokens of a part, return all entries held.

        Parameters
        ----------
        key_states, value_states : Tensor
            `(rows, kv_heads, width, head_dim)`, rotated at their slots.
        part : Part
            Which tokens these are.
        rotation : SlotRotation
            How this layer rotates.
        align_right : bool
            Whether the last entry of each row is to come last.

        Returns
        -------
        tuple of Tensor
            Keys and values `(rows, kv_heads, entries, head_dim)`, of the rows that take part.

        Raises
        ------
        RuntimeError
            If it is not told which tokens these are: the model is not patched.
        ValueError
            If the tensors do not fit the entries held (batch size, heads, head size, dtype, device).
        """
        if part is None or rotation is None:
            raise RuntimeError(
                "a FreqKVCache works with a patched model only: call freqkv.patch(model) before the forward or generate"
            )
        grad, tensors = torch.is_grad_enabled(), self.buffers.tensors
        if part.uniform and (grad or self.for_one_call):
            return self._append(key_states, value_states, part, rotation)
        if not self.buffers.fits(key_states, value_states, part.batch, part.longest):
            self.buffers.make_room(key_states, value_states, part.batch, self.entries, part.longest)
            self.lazy_initialization(key_states, value_states)
        keys, values = tensors["keys"], tensors["values"]
        if grad:  # the graph needs the entries as they are
            keys, values = keys.clone(), values.clone()
        if part.folds:
            self._fold(keys, values, part, rotation)
        self.intact = False
        if part.uniform:
            keys[:, :, part.slots[0] : part.longest] = key_states
            values[:, :, part.slots[0] : part.longest] = value_states
        else:
            for buffer, states in ((keys, key_states), (values, value_states)):
                scatter(buffer, states, *part.writes(buffer.shape[1], buffer.shape[2], buffer.device))
        if grad:
            self.buffers.replace(keys, values)
        self.counts = part.after
        self.intact = True
        keys, values = keys[:, :, : part.longest], values[:, :, : part.longest]
        if not part.everyone:
            rows = part.rows_on(keys.device)
            keys, values = keys[rows], values[rows]
        if align_right:
            index = part.aligned(keys.device)[:, None, :, None]
            keys, values = keys.take_along_dim(index, dim=2), values.take_along_dim(index, dim=2)
        return keys, values

    def _append(
        self, key_states: Tensor, value_states: Tensor, part: Part, rotation: SlotRotation
    ) -> tuple[Tensor, Tensor]:
        """The same for rows that are all alike, where a graph needs the old entries, or all live for one call only."""
        if self.seen == 0:
            self.lazy_initialization(key_states, value_states)
            keys, values = key_states, value_states
        else:
            self.buffers.check(key_states, value_states, part.batch)
            entries = self.entries
            keys, values = (self.buffers.tensors[name][:, :, :entries] for name in ("keys", "values"))
            if part.folds:
                start, tail = self._folded(part, 0, keys, values, rotation, None)
                self._record(part)
                keys, values = keys[:, :, :start], values[:, :, :start]
                keys, values = (
                    torch.cat([keys, tail[0], key_states], dim=2),
                    torch.cat([values, tail[1], value_states], dim=2),
                )
            else:
                keys, values = torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)
        self.buffers.replace(keys, values)
        self.counts = part.after
        return keys, values

    def _fold(self, keys: Tensor, values: Tensor, part: Part, rotation: SlotRotation) -> None:
        """Fold in place what the schedule says before a part enters."""
        for group, (_, places) in enumerate(part.folds):
            rows = None if len(places) == part.batch else part.group_rows(group, keys.device)
            entries = self.schedule.entries(part.first[places[0]])
            held = [buffer[:, :, :entries] if rows is None else buffer[rows, :, :entries] for buffer in (keys, values)]
            start, tail = self._folded(part, group, held[0], held[1], rotation, rows)
            if group == 0:  # nothing is written yet, and the compressor has not failed
                self._record(part)
            self.intact = False
            for buffer, after in zip((keys, values), tail, strict=True):
                buffer[slice(None) if rows is None else rows, :, start : start + after.shape[2]] = after

    def _folded(
        self, part: Part, group: int, keys: Tensor, values: Tensor, rotation: SlotRotation, rows: Tensor | None
    ) -> tuple[int, tuple[Tensor, Tensor]]:
        folds, places = part.folds[group]
        queries = self.buffers.tensors.get("queries")
        count = min(self.wanted_queries, part.since_fold(places[0]))
        if queries is not None and count:
            queries = queries if rows is None else queries[rows]
            asked = Queries(queries[:, :, -count:], self.scaling)
        else:
            asked = None
        shared, is_first = part.shared(group), part.is_first_fold(places[0])
        return fold(
            folds, keys, values, rotation, self.compressor, self.layer_idx, asked, self.takes_span, shared, is_first
        )

    def fold_now(self, part: Part, rotation: SlotRotation) -> None:
        """Fold before the tokens of a part enter; until they are in, the layer is not intact."""
        self._fold(self.buffers.tensors["keys"], self.buffers.tensors["values"], part, rotation)

    def record_queries(self, query_states: Tensor, scaling: float, part: Part, rotation: SlotRotation) -> None:
        """Keep those queries of a part that the compressor will ask for at the next fold.

        Parameters
        ----------
        query_states : Tensor
            `(rows, heads, width, head_dim)`, rotated at their slots; right-aligned where rows differ.
        scaling : float
            By which the model multiplies queries times keys.
        """
        found, wanted = part.recorded(self.wanted_queries), self.wanted_queries
        if found is None:
            return
        with torch.no_grad(), outside_inference_mode():
            slots = part.slots_of(query_states.shape[2], query_states.device)
            raw = rotation.unrotate_one(query_states.detach(), slots).to(query_states.dtype)
            _, heads, width, size = raw.shape
            held, shape = self.buffers.tensors.get("queries"), (part.batch, heads, wanted, size)
            if held is None or held.shape != shape or held.dtype != raw.dtype or held.device != raw.device:
                held = raw.new_zeros(shape)
            elif held.is_inference():
                held = held.clone()
            if part.uniform:
                count, place = found[0]
                held[:, :, place : place + count] = raw[:, :, width - count :]
            else:
                scatter(held, raw, *part.query_writes(wanted, heads, raw.device))
            self.buffers.tensors["queries"] = held
            self.scaling = scaling

    def step(self, key_states: Tensor, value_states: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token to the slot that a tensor `(1,)` tells, and return the whole buffers: nothing that changes from
        step to step is part of a compiled graph.
        """
        keys, values = self.buffers.tensors["keys"], self.buffers.tensors["values"]
        keys.index_copy_(2, slot, key_states)
        values.index_copy_(2, slot, value_states)
        return keys, values

    def end_step(self, counts: tuple[int, ...]) -> None:
        """Note that the token is in."""
        self.counts = counts
        self.intact = True

    def _record(self, part: Part) -> None:
        if self.record_past:
            self.past = recorded(self.past, self.buffers, self.counts, part)


class FreqKVHybridLayer(FreqKVLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc, valid-type]
    """The entries of a layer that also has a convolution or recurrent state, which is transformers' own."""

    def __init__(
        self,
        schedule: Schedule,
        compressor: Compressor,
        layer_idx: int = 0,
        whole: bool = False,
        for_one_call: bool = False,
        number_of_states: int = 1,
    ) -> None:
        FreqKVLayer.__init__(self, schedule, compressor, layer_idx, whole, for_one_call)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # transformers hands over keys and values by position, states by name.
        if args:
            FreqKVLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether its convolution state can go back; a recurrent state cannot."""
        return LinearAttentionLayer.is_croppable.fget(self)  # type: ignore[no-any-return]

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        FreqKVLayer.reset(self)

    def activate_past_recording(self) -> None:
        LinearAttentionLayer.activate_past_recording(self)
        FreqKVLayer.activate_past_recording(self)

    def crop(self, tokens_to_remove: int) -> None:
        FreqKVLayer.crop(self, tokens_to_remove)
        LinearAttentionLayer.crop(self, tokens_to_remove)

    def _take(self, tensors: Callable[[Tensor], Tensor], rows: Callable[[list[int]], list[int]]) -> None:
        FreqKVLayer._take(self, tensors, rows)
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                states[index] = None if state is None else tensors(state)
