"""The cache: one buffer of `window` entries per layer, keys rotated at their slots, folded in place when it is full.

It knows the schedule, the compressor and rotations, and nothing of models.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from freqkv.compressors import Compressor, check_compressor, low_pass_entries
from freqkv.config import FreqKVConfig, geometry, make_config
from freqkv.families import rule_for
from freqkv.ragged import RaggedCall, RaggedRound
from freqkv.rotary import SlotRotation
from freqkv.schedule import Fold, Schedule, Segment
from freqkv.transform import compute_dtype

__all__ = ["FreqKVCache", "FreqKVHybridLayer", "FreqKVLayer", "UnsupportedModelError"]


STREAMS = ("keys", "values")


class UnsupportedModelError(ValueError):
    """The model cannot run with FreqKV; the message names the family, the reason and the way out."""


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
        self._past: tuple[int, Tensor, Tensor] | None = None
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
        self._check(key_states, value_states, key_states.shape[0])
        if tokens.fold is not None:
            self._record()
        if self.preallocate and not torch.is_grad_enabled():
            self._ensure_buffer(key_states, value_states, key_states.shape[0])
            assert self.keys is not None
            assert self.values is not None
            folded = self._folded(tokens.fold, rotation, *self._held()) if tokens.fold is not None else ()
            self.intact = False
            for buffer, entries in zip((self.keys, self.values), folded, strict=False):
                buffer[:, :, tokens.slot - entries.shape[2] : tokens.slot] = entries
            self.keys[:, :, tokens.slot : tokens.entries] = key_states
            self.values[:, :, tokens.slot : tokens.entries] = value_states
        elif self.seen == 0:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values, self._owns_buffer = key_states, value_states, False
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
        return self._held()

    def _update_ragged(
        self, key_states: Tensor, value_states: Tensor, tokens: RaggedRound, rotation: SlotRotation, aligned: bool
    ) -> tuple[Tensor, Tensor]:
        device = key_states.device
        self._check(key_states, value_states, tokens.batch)
        self._ensure_buffer(key_states, value_states, tokens.batch)
        assert self.keys is not None
        assert self.values is not None
        if tokens.fold is not None:
            self._record()
        if torch.is_grad_enabled():  # the graph needs the entries as they are
            self.keys, self.values = self.keys.clone(), self.values.clone()
        if tokens.fold is not None:
            fold, rows = tokens.fold, tokens.folding(device)
            folded = self._folded(fold, rotation, self.keys[rows], self.values[rows])
            self.intact = False
            for buffer, entries in zip((self.keys, self.values), folded, strict=True):
                buffer[rows, :, fold.start : fold.start + entries.shape[2]] = entries
        self.intact = False
        row, slot, packed_row, column = tokens.writes(device)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer[row, :, slot] = states[packed_row, :, column]
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

    def _folded(self, fold: Fold, rotation: SlotRotation, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What stands behind `fold.start` once full rows are folded, in the dtype of the cache."""
        held = dict(zip(STREAMS, (keys[:, :, fold.start :], values[:, :, fold.start :]), strict=True))
        rotated = None if rotation.how is None else rotation.how.stream
        squeezed = fold.stop - fold.start
        with torch.autocast(held["keys"].device.type, enabled=False):  # float32 means float32 in here
            raw = {
                name: rotation.unrotate(t, fold.start)
                if name == rotated
                else t[:, :, :squeezed].to(compute_dtype(t.dtype))
                for name, t in held.items()
            }
            folded = self.compressor(raw["keys"][:, :, :squeezed], raw["values"][:, :, :squeezed], fold.keep)
            if not (isinstance(folded, tuple) and len(folded) == 2 and all(isinstance(t, Tensor) for t in folded)):
                raise TypeError(
                    f"compressor {_name(self.compressor)} must return (keys, values), it returned {type(folded)}"
                )
            outcome = []
            for name, after in zip(STREAMS, folded, strict=True):
                before = held[name]
                wanted = (*before.shape[:2], fold.keep, before.shape[-1])
                if tuple(after.shape) != wanted:
                    raise ValueError(
                        f"compressor {_name(self.compressor)} returned {name} of shape {tuple(after.shape)}, expected {wanted}"
                    )
                if name == rotated:  # what follows the fold has new slots as well
                    after = rotation.rotate(torch.cat([after, raw[name][:, :, squeezed:]], dim=-2), fold.start)
                    outcome.append(after.to(before.dtype))
                else:
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

    def _ensure_buffer(self, key_states: Tensor, value_states: Tensor, batch: int) -> None:
        """Make `keys` and `values` buffers of `window` slots that hold the present entries."""
        held = self._held() if self.seen else (None, None)
        buffers = []
        for stored, entries, new in ((self.keys, held[0], key_states), (self.values, held[1], value_states)):
            shape = (batch, new.shape[1], self.schedule.window, new.shape[3])
            usable = (
                stored is not None
                and self._owns_buffer
                and not stored.is_inference()
                and (stored.shape, stored.dtype, stored.device) == (shape, new.dtype, new.device)
            )
            if usable:
                buffers.append(stored)
                continue
            with torch.inference_mode(False):  # an inference tensor could not be written by a later call outside of it
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
        if not self._owns_buffer:
            self.keys = self.values = None
            self.is_initialized = False
        else:  # rows that are shorter than others carry what lies behind their entries along, masked, but not if it is NaN
            for buffer in (self.keys, self.values):
                assert buffer is not None
                buffer.zero_()

    def activate_past_recording(self) -> None:
        """From now on keep a copy of the entries from before the last compression, so that :meth:`crop` can go back over it.

        It takes at most another `window` entries, and is let go at the next :meth:`crop`.
        """
        self.record_past = True

    def _record(self) -> None:
        if self.record_past and self.rows is None:
            keys, values = self._held()
            self._past = self.seen, keys.detach().clone(), values.detach().clone()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens of each row.

        Raises
        ------
        ValueError
            If `tokens_to_remove` is positive or removes more than was seen.
        RuntimeError
            If a compression lies among them and what was there before it was not recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        self.rewind(self._seen + tokens_to_remove if self.rows is None else [n + tokens_to_remove for n in self.rows])

    def rewind(self, target: int | list[int]) -> None:
        """Go back to when `target` tokens had entered, a number for all rows or one for each; see :meth:`crop`."""
        pairs = (
            [(self._seen, target)]
            if isinstance(target, int)
            else list(zip(self.row_tokens(len(target)), target, strict=True))
        )
        if any(after < 0 for _, after in pairs):
            raise ValueError(f"cannot remove {max(before - after for before, after in pairs)} of {self.seen} tokens")
        over = any(self.schedule.compressions(after) != self.schedule.compressions(before) for before, after in pairs)
        past = self._past
        if over and not (
            past is not None
            and isinstance(target, int)
            and self.schedule.compressions(past[0]) == self.schedule.compressions(target)
        ):
            removed = max(before - after for before, after in pairs)
            raise RuntimeError(
                f"cannot remove {removed} tokens: the cache was compressed since, and the entries from before are gone. Keep a "
                "copy (copy.deepcopy(cache)) to return to, or call cache.activate_past_recording() before"
            )
        if over and past is not None:
            self._seen = past[0]
            if self._owns_buffer:
                assert self.keys is not None
                assert self.values is not None
                self.keys[:, :, : past[1].shape[2]] = past[1]
                self.values[:, :, : past[2].shape[2]] = past[2]
            else:
                self.keys, self.values = past[1], past[2]
        if isinstance(target, int):
            self._seen, self.rows = target, None
        else:
            self.rows = target
        self._past = None
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
        self.keys, self.values = tensors(self.keys), tensors(self.values)
        if self.rows is not None:
            self.rows = rows(self.rows)
        if self._past is not None:
            self._past = self._past[0], tensors(self._past[1]), tensors(self._past[2])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.entries}/{self.schedule.window} entries, {self.seen} tokens seen)"


class FreqKVHybridLayer(FreqKVLayer, LinearAttentionAndFullAttentionLayer):
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

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        FreqKVLayer.reset(self)

    def activate_past_recording(self) -> None:
        LinearAttentionLayer.activate_past_recording(self)
        FreqKVLayer.activate_past_recording(self)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        FreqKVLayer.crop(self, tokens_to_remove)

    def _take(self, tensors: Callable[[Tensor], Tensor], rows: Callable[[list[int]], list[int]]) -> None:
        FreqKVLayer._take(self, tensors, rows)
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                states[index] = None if state is None else tensors(state)


@dataclass(frozen=True)
class Entering:
    """Which tokens are about to enter, how they are rotated, and whether the last entry of each row must come last."""

    tokens: Segment | RaggedRound
    rotation: SlotRotation
    aligned: bool = False


class Everywhere(list[Any]):
    """Layers of a cache that has the same one at whatever index a module names."""

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(0)


class NoneBeyond(list[Any]):
    """A list that has None where it has nothing yet."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index) if isinstance(index, slice) or index < len(self) else None


class SegmentedCache(Cache):
    """A cache whose layers are told, before each update, which tokens are about to enter."""

    _announced: Entering | None = None

    def announce(self, entering: Entering) -> None:
        """Tell which tokens the next :meth:`update` brings."""
        self._announced = entering

    def withdraw(self) -> None:
        """Take back what was announced and did not come."""
        self._announced = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`FreqKVLayer.update`; other layers are transformers' own."""
        if isinstance(self.layers[layer_idx], FreqKVLayer):
            kwargs["entering"], self._announced = self._announced, None
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]


@functools.cache
def _with_base(cls: Any, base: Any) -> Any:
    return type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__doc__": cls.__doc__})


class FreqKVCache(SegmentedCache):
    """A KV cache of fixed size for models that ran through `freqkv.patch` (arXiv 2505.00570).

    Parameters
    ----------
    model_config : PreTrainedConfig
        `model.config` of the model that will use the cache.
    config : FreqKVConfig, optional
        The four numbers; or give them by name:
    window, sink_tokens, retain_ratio, recent_tokens
        See :class:`FreqKVConfig`, whose defaults hold.
    compressor : callable, optional
        What squeezes a span, `(keys, values, keep) -> (keys, values)`; the low-pass by default. See
        `freqkv.compressors`.

    Raises
    ------
    TypeError, ValueError
        If the numbers cannot work together.
    UnsupportedModelError
        If the model has no full attention layer.

    Notes
    -----
    Full attention layers are compressed. Layers that are bounded already (sliding, chunked, linear attention, state
    spaces, convolutions) keep transformers' own state.

    Examples
    --------
    >>> freqkv.patch(model)
    >>> cache = FreqKVCache(model.config, window=4096)
    >>> model.generate(**inputs, past_key_values=cache, max_new_tokens=20_000)
    """

    layers: list[Any]

    def __new__(cls, model_config: Any = None, *args: Any, **kwargs: Any) -> FreqKVCache:
        text_config = model_config.get_text_config(decoder=True) if hasattr(model_config, "get_text_config") else None
        base = rule_for(text_config).load_cache_class()
        if base is not None and not issubclass(cls, base):
            cls = _with_base(cls, base)  # type: ignore[arg-type]
        cache: FreqKVCache = super().__new__(cls)
        return cache

    def __init__(
        self,
        model_config: Any,
        config: FreqKVConfig | None = None,
        *,
        window: int | None = None,
        sink_tokens: int | None = None,
        retain_ratio: float | None = None,
        recent_tokens: int | None = None,
        compressor: Compressor | None = None,
    ) -> None:
        if not hasattr(model_config, "get_text_config"):
            raise TypeError(
                f"pass model.config of the model that will use the cache, not a {type(model_config).__name__}"
            )
        chosen = make_config(
            config, window=window, sink_tokens=sink_tokens, retain_ratio=retain_ratio, recent_tokens=recent_tokens
        )
        self.config = (chosen or FreqKVConfig()).resolve(model_config)
        self.compressor = low_pass_entries if compressor is None else check_compressor(compressor)
        self.geometry = geometry(model_config)
        layers: list[Any] = DynamicCache(config=model_config).layers
        text_config = model_config.get_text_config(decoder=True)
        crossing = getattr(text_config, "cross_attention_layers", None) or ()
        for index, layer in enumerate(layers):
            if index in crossing:
                continue  # holds images, or nothing
            if type(layer) is DynamicLayer:
                layers[index] = FreqKVLayer(self.config, self.compressor)
            elif type(layer) is LinearAttentionAndFullAttentionLayer:
                states = layer.number_of_states
                layers[index] = FreqKVHybridLayer(self.config, self.compressor, number_of_states=states)
            elif isinstance(layer, CacheLayerMixin) and not layer.is_sliding:
                raise UnsupportedModelError(
                    f"layer {index} of {type(model_config).__name__} keeps a {type(layer).__name__}, which holds more for each "
                    "token than keys and values (sparse attention picks single tokens, which no longer exist once they are "
                    "compressed). Use transformers' DynamicCache for this model"
                )
        Cache.__init__(self, layers=layers)
        self._compressed = [layer for layer in layers if isinstance(layer, FreqKVLayer)]
        if not self._compressed:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
            raise UnsupportedModelError(
                f"{type(model_config).__name__} has no full attention layer ({kinds}): all its layers are bounded already "
                "and there is nothing to compress. Use transformers' DynamicCache for this model"
            )
        self._extra_state = rule_for(text_config).cache_state
        self._reset_extra_state()
        self.forward_start: int | None = None
        self.forward_tokens = 0
        self.ragged: RaggedCall | None = None
        self._padding = 0  # tokens seen, less those of the longest row
        self._last_real: Tensor | None = None
        self._touched = False

    @property
    def tokens_seen(self) -> int:
        """Tokens that have entered, compressed ones and padding included, as `generate` counts them."""
        return self._compressed[0].seen + self._padding

    @property
    def row_tokens(self) -> list[int] | None:
        """Tokens of each row without its padding; None while there was no padding, and all have :attr:`tokens_seen`."""
        layer = self._compressed[0]
        if layer.rows is not None:
            return list(layer.rows)
        return None if self._padding == 0 or layer.keys is None else [layer.seen] * layer.keys.shape[0]

    @property
    def entries(self) -> int:
        """Entries that each compressed layer holds, at most `config.window`."""
        return self._compressed[0].entries

    @property
    def start(self) -> int:
        """Tokens that each row had when the present forward began, where all rows have as many."""
        assert self.forward_start is not None
        return self.forward_start - self._padding

    @property
    def schedule(self) -> Schedule:
        """The schedule of the compressed layers."""
        return self._compressed[0].schedule

    @property
    def compressions(self) -> int:
        """How often each of them was compressed, in the longest row."""
        return self._compressed[0].schedule.compressions(self._compressed[0].seen)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, all layers."""
        held = (t for layer in self.layers for t in (layer.__dict__.get("keys"), layer.__dict__.get("values")))
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    @property
    def compressed_layers(self) -> list[int]:
        """Indices of the layers that FreqKV compresses; the others are transformers' own."""
        return [index for index, layer in enumerate(self.layers) if isinstance(layer, FreqKVLayer)]

    def begin_forward(self, tokens: int, real: Tensor | None = None) -> None:
        """Note that a forward of `tokens` tokens starts.

        Parameters
        ----------
        tokens : int
            Of each row, padding included.
        real : Tensor, optional
            `(batch, tokens)` bool: what of them is no padding; None for all.

        Raises
        ------
        RuntimeError
            If an earlier forward broke off after tokens had entered some layer.
        """
        if self.is_spent:
            raise RuntimeError(
                "this FreqKVCache is spent: a forward was interrupted half-way and its layers no longer agree "
                f"({sorted({layer.seen for layer in self._compressed})} tokens seen). Call cache.reset() and start again"
            )
        layer = self._compressed[0]
        self.ragged = None
        if real is not None or layer.rows is not None:
            if real is None:
                assert layer.rows is not None
                real = torch.ones(len(layer.rows), tokens, dtype=torch.bool)
            real = real.cpu()
            rows = layer.row_tokens(real.shape[0])
            if not real.all() or len(set(rows)) > 1:
                self.ragged = RaggedCall(self.schedule, rows, real)
            else:
                for each in self._compressed:
                    each.level()
        self._last_real = real if self._padding or self.ragged is not None else None
        self.forward_start = self.tokens_seen
        self.forward_tokens = tokens
        self._touched = False

    def end_forward(self) -> None:
        """Note that the forward came to its end.

        Raises
        ------
        RuntimeError
            If its tokens did not enter every compressed layer.
        """
        assert self.forward_start is not None
        columns = self.forward_start + self.forward_tokens
        if self.ragged is None:
            expected = [columns - self._padding]
            missed = [i for i in self.compressed_layers if self.layers[i].row_tokens(1) != expected]
        else:
            expected = self.ragged.after
            missed = [i for i in self.compressed_layers if self.layers[i].row_tokens(len(expected)) != expected]
        if missed:
            raise RuntimeError(
                f"{self.forward_tokens} tokens went through the model without entering layers {missed} of this FreqKVCache: "
                "the model drops caches on the way to its attention layers, or runs other layers than its configuration "
                "says. Call cache.reset(), and report the model"
            )
        self._padding = columns - self._compressed[0].seen
        self.forward_start = self.ragged = None

    def abort_forward(self) -> None:
        """Note that the forward was interrupted: nothing happened, or the cache is spent."""
        self.withdraw()
        if not self.is_spent:
            self.forward_start = self.ragged = None

    @property
    def is_spent(self) -> bool:
        """Whether an interrupted forward left the cache unusable until :meth:`reset`."""
        interrupted = self.forward_start is not None and self._touched
        first = self._compressed[0]
        return interrupted or any(
            (layer._seen, layer.rows) != (first._seen, first.rows) or not layer.intact for layer in self._compressed
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`FreqKVLayer.update`; other layers are transformers' own."""
        # A compressed layer changes as a whole or knows that it did not; other layers may break off anywhere.
        if not isinstance(self.layers[layer_idx], FreqKVLayer):
            self._touched = True
        updated = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._touched = True
        return updated

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        self._touched = True
        return super().update_conv_state(*args, **kwargs)  # type: ignore[no-any-return]

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        self._touched = True
        return super().update_recurrent_state(*args, **kwargs)  # type: ignore[no-any-return]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Physical length of keys after `query_length` more tokens, and the offset that aligns it to the last token.

        Within a forward, compressed layers make their own masks segment by segment: the decoder, which builds one for the
        whole input before it runs its layers, is told of one column.
        """
        if self._masks_itself(layer_idx):
            return 1, 0
        return super().get_mask_sizes(query_length, layer_idx)  # type: ignore[no-any-return]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that have entered, padding included; those of a compressed layer grow within a forward."""
        layer = self.layers[layer_idx]
        if isinstance(layer, FreqKVLayer):
            return layer.seen + self._padding
        return super().get_seq_length(layer_idx)  # type: ignore[no-any-return]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where masks count the next token from: how many it has seen, and see :meth:`get_mask_sizes`."""
        return 0 if self._masks_itself(layer_idx) else super().get_query_offset(layer_idx)  # type: ignore[no-any-return]

    def _masks_itself(self, layer_idx: int) -> bool:
        if self.forward_start is None:
            return False
        # The first layer that has a length answers for those that have none, as in transformers.
        has_length = (layer for layer in self.layers[layer_idx:] if isinstance(layer, CacheLayerMixin))
        return isinstance(next(has_length, None), FreqKVLayer)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens in all layers, or raise and leave all as they were.

        Raises
        ------
        ValueError, RuntimeError
            See :meth:`FreqKVLayer.crop`, and transformers' layers: one that slides or recurs cannot go back without
            past recording.
        """
        if self._extra_state is not None and tokens_to_remove:
            raise RuntimeError("this model's linear attention keeps no past: its cache cannot be cropped")
        target = self._rows_before(tokens_to_remove)
        columns = self.tokens_seen + tokens_to_remove
        before = [copy.copy(layer.__dict__) for layer in self.layers]
        for layer in self.layers:
            for name in ("conv_states", "recurrent_states"):
                if name in layer.__dict__:
                    setattr(layer, name, dict(getattr(layer, name)))
        try:
            for layer in self.layers:
                if isinstance(layer, FreqKVLayer) and target is not None:
                    layer.rewind(target)
                else:
                    layer.crop(tokens_to_remove)
        except Exception:
            for layer, state in zip(self.layers, before, strict=True):
                layer.__dict__.clear()
                layer.__dict__.update(state)
            raise
        if target is not None:
            self._padding = columns - self._compressed[0].seen
            assert self._last_real is not None
            self._last_real = self._last_real[:, : self._last_real.shape[1] + tokens_to_remove]

    def _rows_before(self, tokens_to_remove: int) -> list[int] | None:
        """Tokens of each row without the last columns; None where there was no padding."""
        rows = self.row_tokens
        if rows is None or tokens_to_remove > 0:
            return None
        if tokens_to_remove == 0:
            return rows
        last = self._last_real
        if last is None or last.shape[1] < -tokens_to_remove:
            raise RuntimeError(
                f"cannot remove {-tokens_to_remove} tokens: this cache holds padded rows, and knows which tokens were padding "
                "for the last call only. Keep a copy (copy.deepcopy(cache)) to return to"
            )
        removed = last[:, tokens_to_remove:].sum(1).tolist()
        return [n - gone for n, gone in zip(rows, removed, strict=True)]

    def reset(self) -> None:
        """Forget all tokens; buffers stay allocated."""
        super().reset()
        self._reset_extra_state()
        self.withdraw()
        self.forward_start = self.ragged = self._last_real = None
        self._padding = 0
        self._touched = False

    def _reset_extra_state(self) -> None:
        if self._extra_state is not None:
            setattr(self, self._extra_state, NoneBeyond())

    def _take(self, function: Callable[[Tensor], Tensor]) -> None:
        """Of what is kept beside the layers."""
        states = getattr(self, self._extra_state) if self._extra_state is not None else []
        states[:] = [function(state) if isinstance(state, Tensor) else state for state in states]
        if self._last_real is not None:
            self._last_real = function(self._last_real)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, for beam search."""
        Cache.reorder_cache(self, beam_idx)
        self._take(lambda state: state[beam_idx.to(state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        Cache.batch_repeat_interleave(self, repeats)
        self._take(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        Cache.batch_select_indices(self, indices)
        self._take(lambda state: state[indices.to(state.device)])

    def __repr__(self) -> str:
        numbers = self.config
        about = (
            f"{self._layers_in_words()}, {self.tokens_seen} tokens seen, {self.entries}/{numbers.window} entries held, "
            f"{self.compressions} compressions, {self.nbytes} bytes"
        )
        keys = self._compressed[0].keys
        if keys is not None:
            about += f" of {str(keys.dtype).removeprefix('torch.')} on {keys.device}"
        if self.is_spent:
            about += ", spent: call reset()"
        return (
            f"FreqKVCache(window={numbers.window}, sink_tokens={numbers.sink_tokens}, retain_ratio="
            f"{numbers.retain_ratio}, recent_tokens={numbers.recent_tokens}, compressor={_name(self.compressor)}: {about})"
        )

    def _layers_in_words(self) -> str:
        if len(self._compressed) == len(self.layers):
            return f"{len(self.layers)} layers"
        return f"{len(self._compressed)} of {len(self.layers)} layers compressed"


def _name(compressor: Compressor) -> str:
    return getattr(compressor, "__name__", repr(compressor))
