"""The cache: one buffer of `window` entries per layer, keys rotated at their slots, folded in place when it is full.

It knows the schedule, the compressor and rotations, and nothing of models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from freqkv.compressors import Compressor, check_compressor, low_pass_entries
from freqkv.config import FreqKVConfig, geometry, make_config
from freqkv.rotary import SlotRotation
from freqkv.schedule import Fold, Segment
from freqkv.transform import compute_dtype

__all__ = ["FreqKVCache", "FreqKVLayer", "UnsupportedModelError"]


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
        self._entering: tuple[Segment, SlotRotation] | None = None
        self._owns_buffer = False  # else keys and values may be part of a graph, and are never written to

    @property
    def entries(self) -> int:
        """Entries held."""
        return self.schedule.entries(self.seen)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values) if t is not None)

    def expect(self, segment: Segment, rotation: SlotRotation) -> None:
        """Announce the tokens that the next :meth:`update` brings, rotated by `rotation` at the slots of `segment`."""
        self._entering = segment, rotation

    def forget_expected(self) -> None:
        """Withdraw :meth:`expect`."""
        self._entering = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Fold if the schedule says so, append the announced tokens, return all entries held.

        Parameters
        ----------
        key_states, value_states : Tensor
            `(batch, kv_heads, tokens, head_dim)`, keys rotated at their slots.

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
        if self._entering is None:
            raise RuntimeError(
                "a FreqKVCache works with a patched model only: call freqkv.patch(model) before the forward or generate"
            )
        segment, rotation = self._entering
        self._entering = None
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
        all_keys, all_values = self._held()
        keys, values = all_keys[:, :, fold.start :], all_values[:, :, fold.start :]
        squeezed = fold.stop - fold.start
        with torch.autocast(keys.device.type, enabled=False):  # float32 means float32 in here
            raw = rotation.unrotate(keys, fold.start)
            span = values[:, :, :squeezed].to(compute_dtype(values.dtype))
            folded = self.compressor(raw[:, :, :squeezed], span, fold.keep)
            if not (isinstance(folded, tuple) and len(folded) == 2 and all(isinstance(t, Tensor) for t in folded)):
                raise TypeError(
                    f"compressor {_name(self.compressor)} must return (keys, values), it returned {type(folded)}"
                )
            folded_keys, folded_values = folded
            for name, before, after in (("keys", raw, folded_keys), ("values", values, folded_values)):
                wanted = (*before.shape[:2], fold.keep, before.shape[-1])
                if tuple(after.shape) != wanted:
                    raise ValueError(
                        f"compressor {_name(self.compressor)} returned {name} of shape {tuple(after.shape)}, expected {wanted}"
                    )
            folded_keys = rotation.rotate(torch.cat([folded_keys, raw[:, :, squeezed:]], dim=-2), fold.start)
        folded_values = torch.cat([folded_values.to(values.dtype), values[:, :, squeezed:]], dim=-2)
        return folded_keys.to(keys.dtype), folded_values

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
        self._entering = None
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


class FreqKVCache(Cache):
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
        If the model has layers that are not full attention.

    Examples
    --------
    >>> freqkv.patch(model)
    >>> cache = FreqKVCache(model.config, window=4096)
    >>> model.generate(**inputs, past_key_values=cache, max_new_tokens=20_000)
    """

    layers: list[FreqKVLayer]

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
        for index, layer in enumerate(layers):
            if type(layer) is not DynamicLayer:
                raise UnsupportedModelError(
                    f"layer {index} of {type(model_config).__name__} keeps a {type(layer).__name__}; FreqKV serves models "
                    "whose layers are all full attention so far. Use transformers' DynamicCache for this model"
                )
        super().__init__(layers=[FreqKVLayer(self.config, self.compressor) for _ in layers])
        self._begun_at: int | None = None

    @property
    def tokens_seen(self) -> int:
        """Tokens that have entered, compressed ones included."""
        return self.layers[0].seen

    @property
    def entries(self) -> int:
        """Entries that each layer holds, at most `config.window`."""
        return self.layers[0].entries

    @property
    def compressions(self) -> int:
        """How often each layer was compressed."""
        return self.layers[0].schedule.compressions(self.tokens_seen)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def begin_forward(self) -> None:
        """Note that a forward starts.

        Raises
        ------
        RuntimeError
            If an earlier forward broke off after tokens had entered some layer.
        """
        if self.is_spent:
            raise RuntimeError(
                "this FreqKVCache is spent: a forward was interrupted half-way and its layers no longer agree "
                f"({sorted({layer.seen for layer in self.layers})} tokens seen). Call cache.reset() and start again"
            )
        self._begun_at = self.tokens_seen

    def end_forward(self) -> None:
        """Note that the forward came to its end."""
        self._begun_at = None

    @property
    def is_spent(self) -> bool:
        """Whether an interrupted forward left the cache unusable until :meth:`reset`."""
        seen = self.tokens_seen
        interrupted = self._begun_at is not None and self._begun_at != seen
        return interrupted or any(layer.seen != seen or not layer.intact for layer in self.layers)

    def reset(self) -> None:
        """Forget all tokens; buffers stay allocated."""
        super().reset()
        self._begun_at = None

    def __repr__(self) -> str:
        numbers = self.config
        about = (
            f"{len(self.layers)} layers, {self.tokens_seen} tokens seen, {self.entries}/{numbers.window} entries held, "
            f"{self.compressions} compressions, {self.nbytes} bytes"
        )
        if self.layers[0].keys is not None:
            about += f" of {str(self.layers[0].keys.dtype).removeprefix('torch.')} on {self.layers[0].keys.device}"
        if self.is_spent:
            about += ", spent: call reset()"
        return (
            f"FreqKVCache(window={numbers.window}, sink_tokens={numbers.sink_tokens}, retain_ratio="
            f"{numbers.retain_ratio}, recent_tokens={numbers.recent_tokens}, compressor={_name(self.compressor)}: {about})"
        )


def _name(compressor: Compressor) -> str:
    return getattr(compressor, "__name__", repr(compressor))
