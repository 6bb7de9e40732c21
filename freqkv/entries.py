"""What a layer of the cache holds: which entries are in use, its rows, its state, and going back.

How tokens enter, and when entries are folded, is `freqkv.layer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from freqkv.buffers import Buffers, outside_inference_mode
from freqkv.compressors import Compressor, queries_wanted, takes_span
from freqkv.models.upstream import CacheLayerMixin
from freqkv.rollback import Past, check_rewind, rewound
from freqkv.schedule import Schedule

__all__ = ["EntriesLayer", "LayerState"]


@dataclass(frozen=True)
class LayerState:
    """What a layer holds.

    Attributes
    ----------
    counts : tuple of int
        Tokens that have entered each row.
    tensors : dict of str to Tensor
        `keys`, `values` and, where the compressor asks for them, `queries`.
    scaling : float
        By which the model multiplies queries times keys.
    """

    counts: tuple[int, ...]
    tensors: dict[str, Tensor]
    scaling: float = 1.0


class EntriesLayer(CacheLayerMixin):
    """The entries of one full-attention layer, as long as nothing enters.

    Parameters
    ----------
    schedule : Schedule
    compressor : callable
        See `freqkv.compressors`.
    layer_idx : int
        Which layer of the cache it is, for the compressor.
    whole : bool
        Whether its buffers have all slots of the window from the first token on; else they grow.
    for_one_call : bool
        Whether it lives for one call only, and needs no buffers.

    Attributes
    ----------
    counts : tuple of int
        Tokens that have entered each row; () before the first.
    intact : bool
        False from the first write of an update to its end.
    """

    is_sliding = False
    is_croppable = True  # once past recording is activated, which whoever asks does; else `crop` raises

    def __init__(
        self,
        schedule: Schedule,
        compressor: Compressor,
        layer_idx: int = 0,
        whole: bool = False,
        for_one_call: bool = False,
    ) -> None:
        self.buffers = Buffers(schedule.window, whole)
        super().__init__()
        self.schedule = schedule
        self.compressor = compressor
        self.layer_idx = layer_idx
        self.for_one_call = for_one_call
        self.wanted_queries = queries_wanted(compressor)
        self.takes_span = takes_span(compressor)
        self.scaling = 1.0
        self.counts: tuple[int, ...] = ()
        self.intact = True
        self.record_past = False
        self.past: Past | None = None

    @property
    def seen(self) -> int:
        """Tokens that have entered, of the longest row."""
        return max(self.counts, default=0)

    @property
    def entries(self) -> int:
        """Entries held, by the longest row."""
        return max(map(self.schedule.entries, self.counts), default=0)

    @property
    def keys(self) -> Tensor | None:
        """`(batch, kv_heads, entries, head_dim)`, rotated at their slots; None before the first token."""
        return self._in_use("keys")

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        _check_nothing("keys", keys)

    @property
    def values(self) -> Tensor | None:
        """`(batch, kv_heads, entries, head_dim)`; None before the first token."""
        return self._in_use("values")

    @values.setter
    def values(self, values: Tensor | None) -> None:
        _check_nothing("values", values)

    def _in_use(self, name: str) -> Tensor | None:
        buffer = self.buffers.tensors.get(name)
        return None if buffer is None or not self.seen else buffer.narrow(2, 0, self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for entries, and for queries where the compressor asks for them."""
        return self.buffers.nbytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

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
        """Forget all tokens; buffers stay allocated."""
        self.counts, self.past = (), None
        self.intact = True
        self.is_initialized = self.buffers.clear()

    def activate_past_recording(self) -> None:
        """From now on keep a copy of the entries from before the last compression, so that :meth:`crop` can go back over it.

        It takes at most another `window` entries, and is let go once :meth:`crop` has gone back to it.
        """
        self.record_past = True

    def check_rewind(self, after: tuple[int, ...]) -> None:
        """Raise where :meth:`rewind` cannot go back to `after` tokens in each row."""
        check_rewind(self.past, self.schedule, self.counts, after, self.record_past)

    def rewind(self, after: tuple[int, ...]) -> None:
        """Go back to when `after` tokens had entered each row. Call :meth:`check_rewind` before."""
        self.past = rewound(self.past, self.schedule, self.buffers, self.counts, after)
        self.counts = after

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens of each row. See :meth:`FreqKVCache.crop`."""
        after = tuple(count + tokens_to_remove for count in self.counts)
        self.check_rewind(after)
        self.rewind(after)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._take(
            lambda t: t.repeat_interleave(repeats, dim=0), lambda rows: [n for n in rows for _ in range(repeats)]
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._take(
            lambda t: t[indices.to(t.device)], lambda rows: torch.tensor(rows, device="cpu")[indices.cpu()].tolist()
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, for beam search."""
        self._take(
            lambda t: t.index_select(0, beam_idx.to(t.device)), lambda rows: [rows[i] for i in beam_idx.tolist()]
        )

    def _take(self, tensors: Callable[[Tensor], Tensor], rows: Callable[[list[int]], list[int]]) -> None:
        if not self.counts:
            return
        places = rows(list(range(len(self.counts))))
        self.buffers.take(tensors)
        self.counts = tuple(self.counts[place] for place in places)
        if self.past is not None:
            with outside_inference_mode():
                kept = {name: tensors(tensor) for name, tensor in self.past.tensors.items()}
            self.past = Past(tuple(self.past.counts[place] for place in places), kept)

    def state(self) -> LayerState:
        """What it holds, without what was recorded to go back to; zeros behind the entries of each row."""
        tensors = {name: tensor.detach().clone() for name, tensor in self.buffers.tensors.items() if self.seen}
        folded = self.schedule.compressions(self.seen) > 0
        slots = self.schedule.window if folded else self.buffers.capacity_for(self.entries)
        for name in tensors.keys() & {"keys", "values"}:
            rows, heads, _, size = tensors[name].shape
            stored = tensors[name].new_zeros(rows, heads, slots, size)
            for row, count in enumerate(self.counts):
                held = self.schedule.entries(count)
                stored[row, :, :held] = tensors[name][row, :, :held]
            tensors[name] = stored
        return LayerState(self.counts, tensors, self.scaling)

    def load_state(self, state: LayerState) -> None:
        """Take over what :meth:`state` gave; the tensors become its own.

        Raises
        ------
        ValueError
            If counts and tensors contradict each other.
        """
        batch, longest = len(state.counts), max(map(self.schedule.entries, state.counts), default=0)
        if set(state.tensors) - {"queries"} != ({"keys", "values"} if longest else set()):
            raise ValueError(f"{longest} entries in {sorted(state.tensors)}")
        for name, tensor in state.tensors.items():
            slots = (self.wanted_queries,) * 2 if name == "queries" else (longest, self.schedule.window)
            if tensor.shape[0] != batch or not slots[0] <= tensor.shape[2] <= slots[1]:
                raise ValueError(f"{name} of shape {tuple(tensor.shape)} for tokens {state.counts}")
        self.counts, self.scaling = state.counts, state.scaling
        self.buffers.tensors = dict(state.tensors)
        self.buffers.owned = longest > 0
        if longest:
            self.lazy_initialization(state.tensors["keys"], state.tensors["values"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.entries}/{self.schedule.window} entries, {self.seen} tokens seen)"


def _check_nothing(name: str, given: Tensor | None) -> None:
    """Transformers sets them to None when it makes a layer; what they are follows from the buffers."""
    if given is not None:
        raise AttributeError(f"{name} of a FreqKV layer cannot be set: they are what has entered through update")
