"""A layer of the cache: one buffer of `window` entries, keys rotated at their slots, folded in place when it is full.

It knows the schedule, the compressor and rotations, and nothing of models.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from freqkv.compressors import Compressor, compressor_name
from freqkv.config import FreqKVConfig
from freqkv.ragged import RaggedRound
from freqkv.rotary import SlotRotation
from freqkv.schedule import Fold, Segment
from freqkv.transform import compute_dtype, full_precision
from freqkv.upstream import CacheLayerMixin, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

__all__ = ["Entering", "FreqKVHybridLayer", "FreqKVLayer"]


@dataclass(frozen=True)
class Entering:
    """Which tokens are about to enter, how they are rotated, and whether the last entry of each row must come last."""

    tokens: Segment | RaggedRound
    rotation: SlotRotation
    aligned: bool = False


@dataclass
class Past:
    """Entries from before the last fold of each row, and how many tokens had entered then; None where there was none."""

    tokens: list[int | None]
    keys: Tensor
    values: Tensor


@contextmanager
def _outliving() -> Iterator[None]:
    """For tensors that are kept: those made under `torch.inference_mode` could not be written to after it."""
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def _takes(buffer: Tensor, batch: int, window: int, states: Tensor) -> bool:
    """Whether it is a buffer of `batch` rows and `window` slots for states such as these."""
    _, heads, _, size = states.shape
    fits = buffer.shape == (batch, heads, window, size)
    return fits and buffer.dtype == states.dtype and buffer.device == states.device


class FreqKVLayer(CacheLayerMixin):
    """The entries of one full-attention layer.

    Parameters
    ----------
    config : FreqKVConfig
        With its `window` resolved.
    compressor : callable
        `(keys, values, keep) -> (keys, values)`, see `freqkv.compressors`.
    preallocate : bool
        Whether to hold a buffer of `window` entries that is written in place when autograd does not need the old
        entries. A layer that lives for one call only does without.

    Attributes
    ----------
    seen : int
        Tokens that have entered, of the longest row.
    rows : list of int or None
        Tokens that have entered each row, where rows differ.
    keys, values : Tensor or None
        `(batch, kv_heads, window or entries, head_dim)`; of a buffer, the first `entries` slots are in use.
    """

    is_sliding = False
    is_croppable = True  # once past recording is activated, which whoever asks does; else `crop` raises
    keys: Tensor | None
    values: Tensor | None

    def __init__(self, config: FreqKVConfig, compressor: Compressor, preallocate: bool = True) -> None:
        super().__init__()
        self.schedule = config.schedule
        self.compressor = compressor
        self.preallocate = preallocate
        self._seen = 0
        self.rows: list[int] | None = None
        self.intact = True
        self.record_past = False
        self._past: Past | None = None
        self._owns_buffer = False  # else keys and values may be part of a graph, and are never written to

    @property
    def seen(self) -> int:
        """Tokens that have entered, of the longest row."""
        return self._seen if self.rows is None else max(self.rows)

    @property
    def entries(self) -> int:
        """Entries held, by the longest row."""
        return self.schedule.entries(self._seen) if self.rows is None else max(map(self.schedule.entries, self.rows))

    def row_tokens(self, batch: int) -> list[int]:
        """Tokens that have entered, row by row."""
        return [self._seen] * batch if self.rows is None else self.rows

    def level(self) -> None:
        """Note that all rows have as many tokens."""
        self._seen, self.rows = self.seen, None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values) if t is not None)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        entering: Entering | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Fold if the schedule says so, append the tokens, return all entries held.

        Parameters
        ----------
        key_states, value_states : Tensor
            `(batch, kv_heads, tokens, head_dim)`, rotated at their slots.
        entering : Entering
            Which tokens these are, and how this layer rotates.

        Returns
        -------
        tuple of Tensor
            Keys and values `(batch, kv_heads, entries, head_dim)`, of the rows that took part.

        Raises
        ------
        RuntimeError
            If nothing announced these tokens: the model is not patched.
        ValueError
            If the tensors do not fit the entries held (batch size, heads, head size, dtype, device).
        """
        if entering is None:
            raise RuntimeError(
                "a FreqKVCache works with a patched model only: call freqkv.patch(model) before the forward or generate"
            )
        tokens, rotation = entering.tokens, entering.rotation
        if isinstance(tokens, RaggedRound):
            return self._update_ragged(key_states, value_states, tokens, rotation, entering.aligned)
        if torch.is_grad_enabled() or not self.preallocate:
            return self._update_out_of_place(key_states, value_states, tokens, rotation)
        batch = key_states.shape[0]
        if not self._fits(key_states, value_states, batch):
            self._check(key_states, value_states, batch)
            self._ensure_buffer(key_states, value_states, batch)
        if tokens.fold is not None:
            self._record(batch)
            self._fold_in_place(tokens.fold, rotation)
        keys, values, slot, entries = self.keys, self.values, tokens.slot, tokens.entries
        assert keys is not None
        assert values is not None
        self.intact = False
        keys[:, :, slot:entries] = key_states
        values[:, :, slot:entries] = value_states
        self._seen = entries - slot + (self._seen if self.rows is None else self.seen)
        self.rows = None
        self.intact = True
        return keys[:, :, :entries], values[:, :, :entries]

    def _update_out_of_place(
        self, key_states: Tensor, value_states: Tensor, tokens: Segment, rotation: SlotRotation
    ) -> tuple[Tensor, Tensor]:
        """The same where a graph needs the entries as they were, or they live for one call only."""
        batch = key_states.shape[0]
        self._check(key_states, value_states, batch)
        if tokens.fold is not None:
            self._record(batch)
        if self.seen == 0:
            self.lazy_initialization(key_states, value_states)
            keys, values = key_states, value_states
        else:
            keys, values = self._held()
            if tokens.fold is not None:
                start = tokens.fold.start
                folded_keys, folded_values = self._folded(tokens.fold, rotation, keys, values)
                keys = torch.cat([keys[:, :, :start], folded_keys, key_states], dim=-2)
                values = torch.cat([values[:, :, :start], folded_values, value_states], dim=-2)
            else:
                keys = torch.cat([keys, key_states], dim=-2)
                values = torch.cat([values, value_states], dim=-2)
        self.keys, self.values, self._owns_buffer = keys, values, False
        self._seen = self.seen + tokens.stop - tokens.start
        self.rows = None
        self.intact = True
        return keys, values

    def _update_ragged(
        self, key_states: Tensor, value_states: Tensor, tokens: RaggedRound, rotation: SlotRotation, aligned: bool
    ) -> tuple[Tensor, Tensor]:
        device = key_states.device
        self._check(key_states, value_states, tokens.batch)
        self._ensure_buffer(key_states, value_states, tokens.batch)
        assert self.keys is not None
        assert self.values is not None
        if tokens.fold is not None:
            self._record(tokens.batch, tokens.folding(device))
        if torch.is_grad_enabled():  # the graph needs the entries as they are
            self.keys, self.values, self._owns_buffer = self.keys.clone(), self.values.clone(), False
        if tokens.fold is not None:
            fold, rows = tokens.fold, tokens.folding(device)
            folded = self._folded(fold, rotation, self.keys[rows], self.values[rows])
            self.intact = False
            for buffer, entries in zip((self.keys, self.values), folded, strict=True):
                buffer[rows, :, fold.start : fold.start + entries.shape[2]] = entries
        self.intact = False
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            to, taken = tokens.writes(buffer.shape[1], buffer.shape[2], device)
            states = states.reshape(-1, states.shape[-1])
            buffer.view(-1, buffer.shape[-1]).index_copy_(0, to, states if taken is None else states[taken])
        after = list(self.row_tokens(tokens.batch))
        for place, entered in zip(tokens.cut.rows, tokens.cut.counts, strict=True):
            after[place] += entered
        self.rows = after
        self.intact = True
        held = self.keys[:, :, : tokens.entries], self.values[:, :, : tokens.entries]
        if not tokens.everyone:
            rows = tokens.rows(device)
            held = held[0][rows], held[1][rows]
        if aligned:
            index = tokens.aligned(device)[:, None, :, None]
            held = held[0].take_along_dim(index, dim=2), held[1].take_along_dim(index, dim=2)
        return held

    def _held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys[:, :, : self.entries], self.values[:, :, : self.entries]

    def fold_now(self, fold: Fold, rotation: SlotRotation) -> None:
        """Fold before the tokens are known that make it necessary; until they are in, the layer is not intact."""
        assert self.keys is not None
        self._record(self.keys.shape[0])
        self._fold_in_place(fold, rotation)

    def step(self, key_states: Tensor, value_states: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token to the slot that a tensor `(1,)` tells, and return the whole buffers: nothing that changes from
        step to step is part of a compiled graph.
        """
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, slot, key_states)
        self.values.index_copy_(2, slot, value_states)
        return self.keys, self.values

    def end_step(self) -> None:
        """Note that the token is in."""
        self._seen += 1
        self.intact = True

    def _fold_in_place(self, fold: Fold, rotation: SlotRotation) -> None:
        folded = self._folded(fold, rotation, *self._held())
        self.intact = False
        for buffer, entries in zip((self.keys, self.values), folded, strict=True):
            assert buffer is not None
            buffer[:, :, fold.start : fold.start + entries.shape[2]] = entries

    def _folded(self, fold: Fold, rotation: SlotRotation, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What stands behind `fold.start` once full rows are folded, in the dtype of the cache."""
        rotated = None if rotation.how is None else rotation.how.stream
        squeezed = fold.stop - fold.start
        with full_precision(keys.device):
            held: dict[str, Tensor] = {}
            raw: dict[str, Tensor] = {}
            for name, entries in (("keys", keys), ("values", values)):
                held[name] = entries = entries[:, :, fold.start :]
                if name == rotated:
                    raw[name] = rotation.unrotate(entries, fold.start)
                else:
                    raw[name] = entries[:, :, :squeezed].to(compute_dtype(entries.dtype))
            folded = self.compressor(raw["keys"][:, :, :squeezed], raw["values"][:, :, :squeezed], fold.keep)
            if not (isinstance(folded, tuple) and len(folded) == 2 and all(isinstance(t, Tensor) for t in folded)):
                raise TypeError(
                    f"compressor {compressor_name(self.compressor)} must return (keys, values), it returned {type(folded)}"
                )
            outcome = []
            for (name, before), after in zip(held.items(), folded, strict=True):
                wanted = (*before.shape[:2], fold.keep, before.shape[-1])
                if tuple(after.shape) != wanted:
                    by = f"compressor {compressor_name(self.compressor)}"
                    raise ValueError(f"{by} returned {name} of shape {tuple(after.shape)}, expected {wanted}")
                if name == rotated:
                    if before.shape[2] > squeezed:  # what follows the fold has new slots as well
                        after = torch.cat([after, raw[name][:, :, squeezed:]], dim=-2)
                    outcome.append(rotation.rotate(after, fold.start).to(before.dtype))
                else:  # copied in any case: what a compressor returns may be a view of the buffer
                    outcome.append(torch.cat([after.to(before.dtype), before[:, :, squeezed:]], dim=-2))
        return outcome[0], outcome[1]

    def _check(self, key_states: Tensor, value_states: Tensor, batch: int) -> None:
        if self.seen == 0 or self.keys is None or self.values is None:
            return
        for name, held, new in (("keys", self.keys, key_states), ("values", self.values, value_states)):
            for what, has, brings in (
                ("batch size", held.shape[0], batch),
                ("number of KV heads", held.shape[1], new.shape[1]),
                ("head size", held.shape[3], new.shape[3]),
                ("dtype", held.dtype, new.dtype),
                ("device", held.device, new.device),
            ):
                if has != brings:
                    raise ValueError(
                        f"this cache holds {name} with {what} {has}, the model brings {what} {brings}: a cache serves the "
                        "model and batch that filled it. Make a FreqKVCache of its own for each, or call reset()"
                    )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def is_filled(self, batch: int, device: torch.device) -> bool:
        """Whether it holds entries of `batch` rows in buffers on `device` that may be written to."""
        held = self.keys
        if held is None or not self._owns_buffer or held.is_inference():
            return False
        rows, _, slots, _ = held.shape
        return rows == batch and slots == self.schedule.window and held.device == device

    def _fits(self, key_states: Tensor, value_states: Tensor, batch: int) -> bool:
        """Whether these can be written to the buffers as they are, those of `batch` rows."""
        keys, values, window = self.keys, self.values, self.schedule.window
        if not self._owns_buffer or keys is None or values is None or keys.is_inference():
            return False
        return _takes(keys, batch, window, key_states) and _takes(values, batch, window, value_states)

    def _ensure_buffer(self, key_states: Tensor, value_states: Tensor, batch: int) -> None:
        """Make `keys` and `values` buffers of `window` slots that hold the present entries."""
        if self._fits(key_states, value_states, batch):
            return
        held = self._held() if self.seen else (None, None)
        buffers = []
        for entries, new in zip(held, (key_states, value_states), strict=True):
            shape = (batch, new.shape[1], self.schedule.window, new.shape[3])
            with _outliving():
                buffer = torch.zeros(shape, dtype=new.dtype, device=new.device)
            if entries is not None:
                buffer[:, :, : entries.shape[2]] = entries if torch.is_grad_enabled() else entries.detach()
            buffers.append(buffer)
        self.keys, self.values = buffers
        self._owns_buffer = not torch.is_grad_enabled()
        self.lazy_initialization(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens seen, as `generate` counts them; entries held are `entries`."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Physical length of keys after `query_length` more tokens, and the offset that aligns it to the last token."""
        seen = self.seen + query_length
        entries = self.schedule.entries(seen)
        return entries, seen - entries

    def get_max_length(self) -> int:
        """-1: any number of tokens may enter."""
        return -1

    def reset(self) -> None:
        """Forget all tokens; the buffer stays allocated."""
        self._seen = 0
        self.rows = None
        self.intact = True
        self._past = None
        if self.keys is None or not self._owns_buffer or self.keys.is_inference():
            self.keys = self.values = None
            self._owns_buffer = self.is_initialized = False
        else:  # rows that are shorter than others carry what lies behind their entries along, masked, but not if it is NaN
            for buffer in (self.keys, self.values):
                assert buffer is not None
                buffer.zero_()

    def activate_past_recording(self) -> None:
        """From now on keep a copy of the entries from before the last compression, so that :meth:`crop` can go back over it.

        It takes at most another `window` entries, and is let go once :meth:`crop` has gone back to it.
        """
        self.record_past = True

    def _record(self, batch: int, rows: Tensor | None = None) -> None:
        """Before a fold of `rows` (None for all), keep their entries."""
        if not self.record_past:
            return
        assert self.keys is not None
        assert self.values is not None
        tokens = self.row_tokens(batch)
        with _outliving():
            if rows is None:
                keys, values = self._held()
                self._past = Past(list(tokens), keys.detach().clone(), values.detach().clone())
                return
            if self._past is None or self._past.keys.shape != self.keys.shape or self._past.keys.is_inference():
                self._past = Past([None] * batch, self.keys.detach().clone(), self.values.detach().clone())
            self._past.keys[rows], self._past.values[rows] = self.keys[rows].detach(), self.values[rows].detach()
        for row in rows.tolist():
            self._past.tokens[row] = tokens[row]

    def crop(self, tokens_to_remove: int, rows: list[int] | None = None) -> None:
        """Forget the last `-tokens_to_remove` tokens of each row.

        Parameters
        ----------
        tokens_to_remove : int
            0 or less.
        rows : list of int, optional
            How many tokens each row goes back to, where some of those that are removed were padding.

        Raises
        ------
        ValueError
            If `tokens_to_remove` is positive or removes more than was seen.
        RuntimeError
            If a compression lies among them and what was there before it was not recorded.
        """
        tokens_to_remove = operator.index(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if rows is None:
            batch = 1 if self.keys is None else self.keys.shape[0]
            rows = [tokens + tokens_to_remove for tokens in self.row_tokens(batch)]
        self._rewind(rows)

    def _rewind(self, after: list[int]) -> None:
        """Go back to when `after` tokens had entered each row. Tensors are replaced, not written to."""
        batch = len(after)
        before = self.row_tokens(batch)
        removed = max(b - a for b, a in zip(before, after, strict=True))
        if min(after) < 0:
            raise ValueError(f"cannot remove {removed} of {self.seen} tokens")
        compressions = self.schedule.compressions
        over = [row for row in range(batch) if compressions(after[row]) != compressions(before[row])]
        past = self._past
        for row in over:
            recorded = None if past is None else past.tokens[row]
            if recorded is None or compressions(recorded) != compressions(after[row]):
                hint = (
                    "or call cache.activate_past_recording() before: it keeps what was there before the last compression"
                    if not self.record_past
                    else f"or remove fewer than the {self.schedule.step} tokens between two compressions: past recording "
                    "keeps what was there before the last one. Of drafts, num_assistant_tokens and prompt_lookup_num_tokens "
                    "set the number"
                )
                raise RuntimeError(
                    f"cannot remove {removed} tokens: the cache was compressed since, and the entries from before are gone. "
                    f"Keep a copy (copy.deepcopy(cache)) to return to, {hint}"
                )
        if over and past is not None:
            if len(over) == batch:
                self.keys, self.values, self._past = past.keys, past.values, None
            else:
                assert self.keys is not None
                assert self.values is not None
                with _outliving():
                    self._ensure_buffer(self.keys, self.values, batch)
                    self.keys, self.values = self.keys.clone(), self.values.clone()
                    held = past.keys.shape[2]
                    self.keys[over, :, :held], self.values[over, :, :held] = past.keys[over], past.values[over]
                left = [None if row in over else tokens for row, tokens in enumerate(past.tokens)]
                self._past = replace(past, tokens=left)
        if len(set(after)) == 1:
            self._seen, self.rows = after[0], None
        else:
            self.rows = list(after)
        if self.keys is not None and not self._owns_buffer:
            self.keys, self.values = self._held()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._take(
            lambda t: t.repeat_interleave(repeats, dim=0), lambda rows: [n for n in rows for _ in range(repeats)]
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._take(lambda t: t[indices.to(t.device)], lambda rows: torch.tensor(rows)[indices.cpu()].tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, for beam search."""
        self._take(
            lambda t: t.index_select(0, beam_idx.to(t.device)), lambda rows: [rows[i] for i in beam_idx.tolist()]
        )

    def _take(self, tensors: Callable[[Tensor], Tensor], rows: Callable[[list[int]], list[int]]) -> None:
        if self.keys is None or self.values is None:
            return
        with _outliving():
            self.keys, self.values = tensors(self.keys), tensors(self.values)
            if self.rows is not None:
                self.rows = rows(self.rows)
            if self._past is not None:
                past = self._past
                places = rows(list(range(len(past.tokens))))
                self._past = Past([past.tokens[place] for place in places], tensors(past.keys), tensors(past.values))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.entries}/{self.schedule.window} entries, {self.seen} tokens seen)"


class FreqKVHybridLayer(FreqKVLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc, valid-type]
    """The entries of a layer that also has a convolution or recurrent state, which is transformers' own."""

    def __init__(
        self, config: FreqKVConfig, compressor: Compressor, preallocate: bool = True, number_of_states: int = 1
    ) -> None:
        FreqKVLayer.__init__(self, config, compressor, preallocate)
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

    def crop(self, tokens_to_remove: int, rows: list[int] | None = None) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        FreqKVLayer.crop(self, tokens_to_remove, rows)

    def _take(self, tensors: Callable[[Tensor], Tensor], rows: Callable[[list[int]], list[int]]) -> None:
        FreqKVLayer._take(self, tensors, rows)
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                states[index] = None if state is None else tensors(state)
