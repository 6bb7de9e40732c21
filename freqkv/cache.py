"""The cache: compressed layers beside transformers' own, and what a forward must leave them in."""

from __future__ import annotations

import copy
import functools
import operator
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from freqkv.compressors import Compressor, check_compressor, compressor_name, low_pass_entries
from freqkv.config import FreqKVConfig, geometry, make_config
from freqkv.families import rule_for
from freqkv.history import History
from freqkv.layer import Entering, FreqKVHybridLayer, FreqKVLayer
from freqkv.ragged import RaggedCall, RaggedRound
from freqkv.rotary import SlotRotation
from freqkv.schedule import Schedule, Segment
from freqkv.upstream import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    sdpa_mask,
)

__all__ = ["FreqKVCache", "SegmentedCache", "UnsupportedModelError", "dense_mask", "uncompiled"]

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Keep Dynamo out of a function and of all that it calls."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


class UnsupportedModelError(ValueError):
    """The model cannot run with FreqKV; the message names the family, the reason and the way out."""


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
    common: dict[Any, Any]  # what the layers of one forward share
    mask_given = False  # whether the present forward has an attention mask of the caller's own
    weights_asked = False  # and whether it returns attention weights

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
        layer = self.layers[layer_idx]
        if isinstance(layer, FreqKVLayer):
            entering, self._announced = self._announced, None
            return layer.update(key_states, value_states, entering=entering)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]


@functools.cache
def _with_base(cls: Any, base: Any) -> Any:
    return type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__doc__": cls.__doc__})


class Step:
    """What the graph of a single token reads, at addresses that stay.

    Attributes
    ----------
    slot : Tensor
        `(1,)`: where the token goes.
    seen : Tensor
        `()`: how many tokens had entered before.
    tables : dict
        The embeddings of all slots, for each kind of layer.
    """

    def __init__(self) -> None:
        self._make(torch.device("cpu"))
        self.tables: dict[int, tuple[Tensor, ...]] = {}

    def _make(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # they are written to in any mode
            self.slot = torch.zeros(1, dtype=torch.long, device=device)
            self.seen = torch.zeros((), dtype=torch.long, device=device)

    def place(self, slot: int, seen: int, device: torch.device) -> None:
        if self.slot.device != device or self.slot.is_inference():  # as copies are that were made in that mode
            self._make(device)
        self.slot.fill_(slot)
        self.seen.fill_(seen)

    def embeddings(self, kind: int, dtype: torch.dtype) -> Tensor | tuple[Tensor, ...]:
        """What the module gets in place of the decoder's embeddings."""
        rows = tuple(t.index_select(-2, self.slot) for t in self.tables[kind])
        rows = tuple(t if t.is_complex() else t.to(dtype) for t in rows)
        return rows if len(rows) > 1 else rows[0]

    def mask(self, window: int, attention: str, dtype: torch.dtype) -> Tensor:
        """`(1, 1, 1, window)`: all slots up to the token's own."""
        seen = (torch.arange(window, device=self.slot.device) <= self.slot)[None, None, None]
        return dense_mask(seen, attention, dtype)


def dense_mask(seen: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    """What is seen, `(batch, 1, queries, entries)` bool, as an implementation takes it that takes all of it."""
    if ALL_MASK_ATTENTION_FUNCTIONS[attention] is sdpa_mask:
        return seen
    return seen.new_zeros((), dtype=dtype).where(seen, torch.finfo(dtype).min)


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
    static : bool
        For `torch.compile`: single tokens go through graphs of fixed shapes, which are compiled once. They attend to whole
        buffers under a mask, so that it does not pay without compilation. `generate` compiles with such a cache where it does
        with a `StaticCache`; elsewhere, compile `model.forward`.
    offloading : bool
        Refused; transformers' own caches take it.

    Raises
    ------
    TypeError, ValueError
        If the numbers cannot work together, or `offloading` is asked for.
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
    >>> model.generate(**inputs, cache=cache, max_new_tokens=20_000)  # transformers before 5.24: past_key_values=cache
    """

    layers: list[Any]
    _prepares = False

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
        static: bool = False,
        offloading: bool = False,
    ) -> None:
        if offloading:
            raise ValueError(
                "offloading=True: FreqKV does not move entries between devices. The cache never grows beyond its window: pass "
                "a smaller window, or use transformers' DynamicCache(config=model.config, offloading=True)"
            )
        if not isinstance(static, bool):
            raise TypeError(f"static must be True or False, got {static!r}")
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
        self._crossing = frozenset(getattr(text_config, "cross_attention_layers", None) or ())  # these hold images
        for index, layer in enumerate(layers):
            if index in self._crossing:
                continue
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
        self.common = {}
        self._padding = 0  # tokens seen, less those of the longest row
        self._entering_real: Tensor | None = None  # what is no padding, of this call
        self._last_real: Tensor | None = None  # and of the columns before it, see _remembered
        self.history = History(self.config.schedule.window)
        # Ids of this call, and what of it is no padding.
        self._entering: tuple[Tensor | None, Tensor | None] = None, None
        self._began: tuple[int, list[int] | None] = (0, None)
        self._touched = False
        self.static = static
        self.stepping: object | None = None  # whoever began the single token that is under way
        self.step = Step()
        if static and any(type(layer) is not FreqKVLayer for layer in layers):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers if type(layer) is not FreqKVLayer}))
            raise ValueError(
                f"static=True needs a model all of whose layers are full attention and nothing else, "
                f"{type(model_config).__name__} has others ({kinds}). Leave it out"
            )

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile single tokens, which asks for a `static` cache."""
        return self.static and not self._prepares

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """While `generate` prepares inputs: caches that are compiled get masks made there, FreqKV makes its own."""
        self._prepares = True
        try:
            yield
        finally:
            self._prepares = False

    @property
    def is_croppable(self) -> bool:
        """Whether :meth:`crop` can go back at all, once past recording is activated; assisted decoding asks for it."""
        return self._extra_state is None and super().is_croppable  # type: ignore[no-any-return]

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
        if self._padding == 0:
            return None
        held = self._last_real if layer.keys is None else layer.keys  # nothing but padding came so far
        return None if held is None else [layer.seen] * held.shape[0]

    @property
    def batch_size(self) -> int | None:
        """Rows of the batch that it serves; None as long as it is empty."""
        layer = self._compressed[0]
        held = layer.keys if layer.seen else self._last_real if self._padding else None
        return None if held is None else held.shape[0]

    @property
    def entries(self) -> int:
        """Entries that each compressed layer holds, at most `config.window`."""
        return self._compressed[0].entries

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        assert self._compressed[0].keys is not None
        return self._compressed[0].keys.dtype

    def is_filled(self, inputs: Tensor) -> bool:
        """Whether all compressed layers hold buffers for the rows of `inputs`, on its device."""
        batch, device = inputs.shape[0], inputs.device
        return all(layer.is_filled(batch, device) for layer in self._compressed)

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

    def begin_forward(
        self, tokens: int, real: Tensor | None = None, mask_given: bool = False, ids: Tensor | None = None
    ) -> None:
        """Note that a forward of `tokens` tokens starts.

        Parameters
        ----------
        tokens : int
            Of each row, padding included.
        real : Tensor, optional
            `(batch, tokens)` bool: what of them is no padding; None for all.
        mask_given : bool
            Whether layers are to get the mask that the caller gave the model, in place of one made here.
        ids : Tensor, optional
            `(batch, tokens)`: their ids.

        Raises
        ------
        RuntimeError
            If an earlier forward broke off after tokens had entered some layer.
        """
        self.check_usable()
        self._entering = ids, real
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
        if real is None and (padded := self.row_tokens) is not None:
            real = torch.ones(len(padded), tokens, dtype=torch.bool)
        self._entering_real = real if self._padding or self.ragged is not None else None
        self._began = layer._seen, layer.rows
        self.forward_start = self.tokens_seen
        self.forward_tokens = tokens
        self.mask_given = mask_given
        self.common = {}
        self._touched = False

    @property
    def knows_all_columns(self) -> bool:
        """Whether it is known of all columns so far which of them were padding."""
        return self._last_real is None or self._last_real.shape[1] >= self.tokens_seen

    def columns_known(self) -> Tensor | None:
        """What of the columns up to the end of the present forward is no padding, `(batch, columns)`; None for all.

        The first ones may be missing, see :meth:`crop`.
        """
        return self._remembered()

    def parts(self, tokens: int) -> list[Segment | RaggedRound]:
        """What the present forward of `tokens` tokens is cut into."""
        parts: list[Segment | RaggedRound] | None = self.common.get("parts")
        if parts is None:
            parts = [*(self.schedule.segments(self.start, tokens) if self.ragged is None else self.ragged.rounds)]
            self.common["parts"] = parts
        return parts

    @uncompiled
    def begin_step(
        self, by: object, rotations: Callable[[], dict[int, SlotRotation]], ids: Tensor | None = None
    ) -> None:
        """Note that a forward of a single token starts whose graph reads :attr:`step`, and compress if it is time.

        `rotations` tells how the layers rotate, by their indices.
        """
        self.begin_forward(1, ids=ids)
        (segment,) = self.parts(1)
        assert isinstance(segment, Segment)
        how = {} if segment.fold is None else rotations()
        for index, layer in enumerate(self._compressed):  # a static cache has no others
            if segment.fold is not None:
                layer.fold_now(segment.fold, how[index])
            layer.intact = False
        self.step.place(segment.slot, self.tokens_seen, self._compressed[0].device)
        self.stepping = by

    @uncompiled
    def end_step(self) -> None:
        """Note that it came to its end."""
        for layer in self._compressed:
            layer.end_step()
        self.history = self.history.extended(1, *self._entering)
        self.forward_start = self.stepping = None
        self.common = {}

    @uncompiled
    def abort_step(self) -> None:
        """Note that it was interrupted: the cache is spent."""
        self.stepping = None
        self.common = {}

    def check_usable(self) -> None:
        """Raise RuntimeError if an earlier forward broke off after tokens had entered some layer."""
        if self.is_spent:
            raise RuntimeError(
                "this FreqKVCache is spent: a forward was interrupted half-way and its layers no longer agree "
                f"({sorted({layer.seen for layer in self._compressed})} tokens seen). Call cache.reset() and start again"
            )

    def end_forward(self) -> None:
        """Note that the forward came to its end.

        Raises
        ------
        RuntimeError
            If its tokens did not enter every compressed layer.
        """
        assert self.forward_start is not None
        columns = self.forward_start + self.forward_tokens
        seen, rows = columns - self._padding, None
        if self.ragged is not None:
            rows = self.ragged.after
        missed = [
            layer
            for layer in self._compressed
            if (layer._seen != seen or layer.rows is not None if rows is None else layer.row_tokens(len(rows)) != rows)
        ]
        if missed:
            indices = [index for index in self.compressed_layers if self.layers[index] in missed]
            raise RuntimeError(
                f"{self.forward_tokens} tokens went through the model without entering layers {indices} of this FreqKVCache: "
                "the model drops caches on the way to its attention layers, or runs other layers than its configuration "
                "says. Call cache.reset(), and report the model"
            )
        self._padding = columns - self._compressed[0].seen
        self._last_real = self._remembered()
        self.history = self.history.extended(self.forward_tokens, *self._entering)
        self.forward_start = self.ragged = None
        self.common = {}

    def _remembered(self) -> Tensor | None:
        """What of the last columns is no padding, `(batch, columns)`, as far back as :meth:`crop` may go; None for all."""
        real, before = self._entering_real, self._last_real
        if real is None:
            return None
        assert self.forward_start is not None
        if before is None:  # there was none so far
            before = real.new_ones(real.shape[0], min(self.forward_start, self.schedule.window))
        return torch.cat([before, real], dim=1)[:, -max(self.schedule.window, real.shape[1]) :]

    def abort_forward(self) -> None:
        """Note that the forward was interrupted: nothing happened, or the cache is spent."""
        self.withdraw()
        self.common = {}
        if not self.is_spent:
            self.forward_start = self.ragged = None

    @property
    def is_spent(self) -> bool:
        """Whether an interrupted forward left the cache unusable until :meth:`reset`."""
        first = self._compressed[0]
        seen, rows = first._seen, first.rows
        if self.forward_start is not None and (self._touched or (seen, rows) != self._began):
            return True
        return any(layer._seen != seen or layer.rows != rows or not layer.intact for layer in self._compressed)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`FreqKVLayer.update`; other layers are transformers' own."""
        if self.stepping is not None:
            return self.layers[layer_idx].step(key_states, value_states, self.step.slot)  # type: ignore[no-any-return]
        layer = self.layers[layer_idx]
        if not isinstance(layer, FreqKVLayer):  # it may break off anywhere
            self._touched = True
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        entering, self._announced = self._announced, None
        updated = layer.update(key_states, value_states, entering=entering)  # as a whole, or it knows that it did not
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
        if self.stepping is not None:
            return self.step.seen  # type: ignore[return-value]
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
        tokens_to_remove = operator.index(tokens_to_remove)
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
            for index, layer in enumerate(self.layers):
                if isinstance(layer, FreqKVLayer):
                    layer.crop(tokens_to_remove, target)
                elif index not in self._crossing:
                    layer.crop(tokens_to_remove)
        except Exception:
            for layer, state in zip(self.layers, before, strict=True):
                layer.__dict__.clear()
                layer.__dict__.update(state)
            raise
        self.history = self.history.cropped(-tokens_to_remove)
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
                f"for the last {0 if last is None else last.shape[1]} only. Keep a copy (copy.deepcopy(cache)) to return to"
            )
        removed = last[:, tokens_to_remove:].sum(1).tolist()
        return [n - gone for n, gone in zip(rows, removed, strict=True)]

    def reset(self) -> None:
        """Forget all tokens; buffers stay allocated."""
        for layer in self.layers:
            if isinstance(layer, DynamicLayer) and not isinstance(layer, FreqKVLayer):
                layer.keys = layer.values = None  # older versions of transformers zero them, and keep their length
                layer.is_initialized = False
        super().reset()
        self._reset_extra_state()
        self.withdraw()
        self.forward_start = self.ragged = self._last_real = self.stepping = None
        self._padding = 0
        self._touched = False
        self.history = History(self.config.schedule.window)
        self.common = {}

    def _reset_extra_state(self) -> None:
        if self._extra_state is not None:
            setattr(self, self._extra_state, NoneBeyond())

    def save(self, path: str | os.PathLike[str], model: PreTrainedModel | None = None) -> None:
        """Write what the cache holds to one safetensors file, whose size does not depend on how many tokens were seen.

        It is written beside `path` and takes its name when it is complete. What was recorded for :meth:`crop` is not
        stored.

        Parameters
        ----------
        path : str or PathLike
            A file; one that exists is replaced.
        model : PreTrainedModel, optional
            The model that filled the cache, so that the file tells it from others of the same shape.

        Raises
        ------
        RuntimeError
            If the cache is spent or within a forward.
        ValueError
            If the cache was not made for this model.
        UnsupportedModelError
            If a layer is of a kind of which FreqKV does not know what to store.
        OSError
            If the file cannot be written; one that was there before is still there.
        """
        from freqkv.serialization import save_cache

        save_cache(self, path, model)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        *,
        compressor: Compressor | None = None,
        static: bool = False,
    ) -> FreqKVCache:
        """A cache with what :meth:`save` wrote, on the devices of the model's layers.

        Parameters
        ----------
        path : str or PathLike
        model : PreTrainedModel
            The model that filled the cache.
        compressor : callable, optional
            The one that the cache was filled with, if it is not one of FreqKV's own.
        static : bool
            See :class:`FreqKVCache`.

        Raises
        ------
        CacheFileError
            If the file is damaged, was written by something else, or does not belong to this model (type, shape, kinds of
            layers, dtype, weights) or compressor. A ValueError; see `freqkv.serialization`.
        TypeError
            If `model` is no model, or `compressor` cannot be called.
        OSError
            If the file cannot be read.
        """
        from freqkv.serialization import load_cache

        return load_cache(cls, path, model, compressor, static)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, for beam search."""
        self._take(Cache.reorder_cache, beam_idx, lambda state: state[beam_idx.to(state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._take(Cache.batch_repeat_interleave, repeats, lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._take(Cache.batch_select_indices, indices, lambda state: state[indices.to(state.device)])

    def _take(self, of_layers: Callable[[Cache, Any], None], what: Any, of_rest: Callable[[Tensor], Tensor]) -> None:
        columns = self.tokens_seen
        of_layers(self, what)
        self._padding = columns - self._compressed[0].seen  # the longest row may be another one now
        states = getattr(self, self._extra_state) if self._extra_state is not None else []
        states[:] = [of_rest(state) if isinstance(state, Tensor) else state for state in states]
        if self._last_real is not None:
            self._last_real = of_rest(self._last_real)
        self.history = self.history.taken(of_rest)

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
        name = compressor_name(self.compressor)
        return (
            f"FreqKVCache(window={numbers.window}, sink_tokens={numbers.sink_tokens}, retain_ratio="
            f"{numbers.retain_ratio}, recent_tokens={numbers.recent_tokens}, compressor={name}"
            f"{', static=True' if self.static else ''}: {about})"
        )

    def _layers_in_words(self) -> str:
        if len(self._compressed) == len(self.layers):
            return f"{len(self.layers)} layers"
        return f"{len(self._compressed)} of {len(self.layers)} layers compressed"
