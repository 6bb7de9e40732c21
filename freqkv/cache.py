"""The cache: one buffer of `window` entries per layer, keys rotated at their slots, folded in place when it is full.

It knows the schedule, the compressor and rotations, and nothing of models.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
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
        Tokens that have entered.
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
        self.seen = 0
        self.intact = True
        self._owns_buffer = False  # else keys and values may be part of a graph, and are never written to

    @property
    def entries(self) -> int:
        """Entries held."""
        return self.schedule.entries(self.seen)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values) if t is not None)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        entering: tuple[Segment, SlotRotation] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Fold if the schedule says so, append the tokens, return all entries held.

        Parameters
        ----------
        key_states, value_states : Tensor
            `(batch, kv_heads, tokens, head_dim)`, rotated at their slots.
        entering : (Segment, SlotRotation)
            Which tokens these are, and how this layer rotates.

        Returns
        -------
        tuple of Tensor
            Keys and values `(batch, kv_heads, entries, head_dim)`.

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
        segment, rotation = entering
        self._check(key_states, value_states)
        if self.preallocate and not torch.is_grad_enabled():
            self._ensure_buffer(key_states, value_states)
            assert self.keys is not None
            assert self.values is not None
            folded = self._folded(segment.fold, rotation) if segment.fold is not None else ()
            self.intact = False
            for buffer, entries in zip((self.keys, self.values), folded, strict=False):
                buffer[:, :, segment.slot - entries.shape[2] : segment.slot] = entries
            self.keys[:, :, segment.slot : segment.entries] = key_states
            self.values[:, :, segment.slot : segment.entries] = value_states
        elif self.seen == 0:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values, self._owns_buffer = key_states, value_states, False
        else:
            keys, values = self._held()
            if segment.fold is not None:
                start = segment.fold.start
                folded_keys, folded_values = self._folded(segment.fold, rotation)
                keys = torch.cat([keys[:, :, :start], folded_keys, key_states], dim=-2)
                values = torch.cat([values[:, :, :start], folded_values, value_states], dim=-2)
            else:
                keys = torch.cat([keys, key_states], dim=-2)
                values = torch.cat([values, value_states], dim=-2)
            self.keys, self.values, self._owns_buffer = keys, values, False
        self.seen += segment.stop - segment.start
        self.intact = True
        return self._held()

    def _held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys[:, :, : self.entries], self.values[:, :, : self.entries]

    def _folded(self, fold: Fold, rotation: SlotRotation) -> tuple[Tensor, Tensor]:
        """What stands behind `fold.start` once the fold is done, in the dtype of the cache."""
        held = dict(zip(STREAMS, (t[:, :, fold.start :] for t in self._held()), strict=True))
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

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        if self.seen == 0 or self.keys is None or self.values is None:
            return
        for name, held, new in (("keys", self.keys, key_states), ("values", self.values, value_states)):
            for what, has, brings in (
                ("batch size", held.shape[0], new.shape[0]),
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

    def _ensure_buffer(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make `keys` and `values` plain buffers of `window` slots that hold the present entries."""
        held = self._held() if self.seen else (None, None)
        buffers = []
        for stored, entries, new in ((self.keys, held[0], key_states), (self.values, held[1], value_states)):
            shape = (*new.shape[:2], self.schedule.window, new.shape[3])
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
                buffer[:, :, : entries.shape[2]] = entries.detach()
            buffers.append(buffer)
        self.keys, self.values = buffers
        self._owns_buffer = True
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
        self.seen = 0
        self.intact = True
        if not self._owns_buffer:
            self.keys = self.values = None
            self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Raises
        ------
        ValueError
            If `tokens_to_remove` is positive or removes more than was seen.
        RuntimeError
            If a compression lies among them: what was there before it is gone.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        seen = self.seen + tokens_to_remove
        if seen < 0:
            raise ValueError(f"cannot remove {-tokens_to_remove} of {self.seen} tokens")
        if self.schedule.compressions(seen) != self.schedule.compressions(self.seen):
            raise RuntimeError(
                f"cannot remove {-tokens_to_remove} tokens: the cache was compressed since, and the entries from before "
                "are gone. Keep a copy (copy.deepcopy(cache)) to return to"
            )
        self.seen = seen
        if self.keys is not None and not self._owns_buffer:
            self.keys, self.values = self._held()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[indices], self.values[indices]

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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        CacheLayerMixin.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        FreqKVLayer.crop(self, tokens_to_remove)


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

    _announced: tuple[Segment, SlotRotation] | None = None

    def announce(self, segment: Segment, rotation: SlotRotation) -> None:
        """Tell which tokens the next :meth:`update` brings, rotated by `rotation` at the slots of `segment`."""
        self._announced = segment, rotation

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
        self._touched = False

    @property
    def tokens_seen(self) -> int:
        """Tokens that have entered, compressed ones included."""
        return self._compressed[0].seen

    @property
    def entries(self) -> int:
        """Entries that each compressed layer holds, at most `config.window`."""
        return self._compressed[0].entries

    @property
    def schedule(self) -> Schedule:
        """The schedule of the compressed layers."""
        return self._compressed[0].schedule

    @property
    def compressions(self) -> int:
        """How often each of them was compressed."""
        return self._compressed[0].schedule.compressions(self.tokens_seen)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, all layers."""
        held = (t for layer in self.layers for t in (layer.__dict__.get("keys"), layer.__dict__.get("values")))
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    @property
    def compressed_layers(self) -> list[int]:
        """Indices of the layers that FreqKV compresses; the others are transformers' own."""
        return [index for index, layer in enumerate(self.layers) if isinstance(layer, FreqKVLayer)]

    def begin_forward(self, tokens: int) -> None:
        """Note that a forward of `tokens` tokens starts.

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
        missed = [i for i in self.compressed_layers if self.layers[i].seen != self.forward_start + self.forward_tokens]
        if missed:
            raise RuntimeError(
                f"{self.forward_tokens} tokens went through the model without entering layers {missed} of this FreqKVCache: "
                "the model drops caches on the way to its attention layers, or runs other layers than its configuration "
                "says. Call cache.reset(), and report the model"
            )
        self.forward_start = None

    def abort_forward(self) -> None:
        """Note that the forward was interrupted: nothing happened, or the cache is spent."""
        self.withdraw()
        if not self.is_spent:
            self.forward_start = None

    @property
    def is_spent(self) -> bool:
        """Whether an interrupted forward left the cache unusable until :meth:`reset`."""
        interrupted = self.forward_start is not None and self._touched
        seen = self.tokens_seen
        return interrupted or any(layer.seen != seen or not layer.intact for layer in self._compressed)

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
        before = [copy.copy(layer.__dict__) for layer in self.layers]
        for layer in self.layers:
            for name in ("conv_states", "recurrent_states"):
                if name in layer.__dict__:
                    setattr(layer, name, dict(getattr(layer, name)))
        try:
            super().crop(tokens_to_remove)
        except Exception:
            for layer, state in zip(self.layers, before, strict=True):
                layer.__dict__.clear()
                layer.__dict__.update(state)
            raise

    def reset(self) -> None:
        """Forget all tokens; buffers stay allocated."""
        super().reset()
        self._reset_extra_state()
        self.withdraw()
        self.forward_start = None
        self._touched = False

    def _reset_extra_state(self) -> None:
        if self._extra_state is not None:
            setattr(self, self._extra_state, NoneBeyond())

    def _map_extra_state(self, function: Callable[[Tensor], Tensor]) -> None:
        states = getattr(self, self._extra_state) if self._extra_state is not None else []
        states[:] = [function(state) if isinstance(state, Tensor) else state for state in states]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, for beam search."""
        Cache.reorder_cache(self, beam_idx)
        self._map_extra_state(lambda state: state[beam_idx.to(state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        Cache.batch_repeat_interleave(self, repeats)
        self._map_extra_state(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        Cache.batch_select_indices(self, indices)
        self._map_extra_state(lambda state: state[indices])

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
