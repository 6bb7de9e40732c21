"""The patch: each attention module's forward is wrapped, so that it sees slots, segments and the FreqKV cache.

No model's forward is copied. The wrapper cuts `hidden_states` into segments that fit the free entries of the layer and
calls the module's own forward once per segment, with the `(cos, sin)` of the segment's slots and the segment's mask;
the module projects, norms, rotates, updates the cache and attends with its own code. The decoder's forward is wrapped
to check the arguments of a call once and to keep it from building a mask over the whole input.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from freqkv.adapters import check_whole_call
from freqkv.analysis import Analysis, AttentionLayer, Rotary, analyse, find_model
from freqkv.cache import Everywhere, FreqKVCache, SegmentedCache, dense_mask, uncompiled
from freqkv.compressors import Compressor, check_compressor, compressor_name, low_pass_entries
from freqkv.config import FreqKVConfig, geometry, make_config
from freqkv.layer import Entering, FreqKVHybridLayer, FreqKVLayer
from freqkv.methods import Method, Replacement, replace_method, replacements, restore_methods
from freqkv.ragged import Packing, RaggedRound
from freqkv.rotary import SlotRotation, SlotTable
from freqkv.schedule import Schedule, Segment
from freqkv.upstream import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    CACHE,
    CACHE_NAMES,
    CHECKPOINTS_WITH_GRADIENTS_ONLY,
    PREPARE_CACHE,
    PREPARE_INPUTS,
    Cache,
    GenerationMixin,
    cache_name,
    cache_of,
    causal_mask,
    eager_mask,
    renamed,
    sdpa_mask,
)

__all__ = ["Patch", "patch", "unpatch"]

logger = logging.getLogger(__name__)

# What a wrapped decoder tells its wrapped layers, by the shape of an empty mask: a 4-D mask is taken as it is, so that the
# decoder builds none, and it also reaches layers that gradient checkpointing runs again.
CACHED, UNCACHED = (1, 1, 1, 0), (1, 1, 2, 0)
# Masks that are kept within a forward. All layers of a call and all steps of a long prompt ask for the same few; where they
# differ from round to round, as those of ragged rows do, each layer makes them anew rather than hold them all.
MASKS_KEPT = 4
# Windows whose tables are kept: those of caches that are used in turn. Others are made anew when they are asked for.
WINDOWS_KEPT = 4
# Under which names in `shared_kv_states` the entries of each segment are kept.
SEGMENTS = "freqkv segments"
# What a model may be called with beside images, sounds and the like.
TEXT_ARGUMENTS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "labels",
    "logits_to_keep",
    "cache_position",
)
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


def patch(
    model: nn.Module,
    config: FreqKVConfig | None = None,
    *,
    window: int | None = None,
    sink_tokens: int | None = None,
    retain_ratio: float | None = None,
    recent_tokens: int | None = None,
    compressor: Compressor | None = None,
) -> Patch:
    """Make this model instance work with :class:`FreqKVCache`.

    Without numbers, only calls that bring a `FreqKVCache` are touched. With numbers, calls that bring no cache at all
    run the method too: over the whole input without a cache (`use_cache=False`, differentiable), or with a
    `FreqKVCache` made for the call. A call that brings another cache is never touched.

    Patching again gives the model the numbers of the last call.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder-only model with rotary position embeddings, or one of PEFT, DDP or `torch.compile` around it.
    config, window, sink_tokens, retain_ratio, recent_tokens, compressor
        See :class:`FreqKVConfig` and :class:`FreqKVCache`; `FreqKVConfig()` stands for the defaults.

    Returns
    -------
    Patch
        A handle. As a context manager it restores what was there before; printed, it tells how each layer caches.

    Raises
    ------
    UnsupportedModelError
        If the model is no decoder with RoPE, or has no full attention layer. See :func:`freqkv.supported`.
    TypeError, ValueError
        If the numbers cannot work together.
    """
    model = find_model(model)
    chosen = make_config(
        config, window=window, sink_tokens=sink_tokens, retain_ratio=retain_ratio, recent_tokens=recent_tokens
    )
    if chosen is None and compressor is not None:
        chosen = FreqKVConfig()
    if chosen is not None:
        chosen = chosen.resolve(model.config)
    return Patch(model, chosen, low_pass_entries if compressor is None else check_compressor(compressor))


def unpatch(model: nn.Module) -> None:
    """Give the model its own forwards back.

    Raises
    ------
    ValueError
        If the model is not patched.
    """
    shared = _find_shared(model)
    if shared is None:
        raise ValueError("this model is not patched")
    shared.config = None
    for module in {module for module, _ in replacements(model)}:
        restore_methods(module)


class Patch:
    """Handle of a patched model.

    Attributes
    ----------
    config : FreqKVConfig or None
        The numbers with which calls without a cache run; None if such calls are left alone.
    """

    def __init__(self, model: PreTrainedModel, config: FreqKVConfig | None, compressor: Compressor) -> None:
        self.model = model
        self._numbers = config, compressor
        self._apply()

    def _apply(self) -> None:
        shared = _find_shared(self.model)
        self._previous = None if shared is None else (shared.config, shared.compressor)
        self._shared = _Shared(self.model, analyse(self.model)) if shared is None else shared
        _wrap(self.model, self._shared)
        self._shared.config, self._shared.compressor = self._numbers
        self._applied = True

    @property
    def config(self) -> FreqKVConfig | None:
        return self._shared.config

    def unpatch(self) -> None:
        """Same as `freqkv.unpatch(model)`."""
        unpatch(self.model)

    def __enter__(self) -> Patch:
        if not self._applied:
            self._apply()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._applied = False
        if _find_shared(self.model) is None:
            return  # unpatched inside
        if self._previous is None:
            self.unpatch()
        else:
            self._shared.config, self._shared.compressor = self._previous

    def __repr__(self) -> str:
        numbers = "calls with a FreqKVCache"
        if self.config is not None:
            numbers = f"{self.config}, compressor={compressor_name(self._shared.compressor)}"
        lines = [f"freqkv.Patch({type(self.model).__name__}, {numbers})"]
        analysis = self._shared.analysis
        told = {layer.layer_idx: str(layer) for layer in analysis.layers}
        told |= {index: f"{kind}, left to transformers" for index, kind in analysis.others.items() if index not in told}
        lines += [f"  layer {index}: {told[index]}" for index in sorted(told)]
        return "\n".join(lines)


class _Shared:
    """What the wrappers of one model share: the numbers for calls without a cache, slot tables and masks."""

    def __init__(self, model: PreTrainedModel, analysis: Analysis) -> None:
        self.model_config = model.config.get_text_config(decoder=True)
        self.geometry = geometry(model.config)
        self.analysis = analysis
        self.config: FreqKVConfig | None = None
        self.compressor: Compressor = low_pass_entries
        self.kinds: dict[Any, int] = {}
        self._windows: list[int] = []
        self._tables: dict[Any, tuple[Any, SlotTable]] = {}
        self._rotations: dict[Any, tuple[Any, SlotRotation]] = {}
        self._masks: dict[Any, Any] = {}
        self.cached_mark = torch.empty(CACHED)
        self._see_all: frozenset[str] = frozenset()  # attention implementations that need no mask for a single token

    @property
    def makes_all_masks(self) -> bool:
        """Whether no layer needs a mask of the decoder."""
        return not self.analysis.others and not any(layer.hybrid for layer in self.analysis.layers)

    def rotation(self, layer: AttentionLayer, kind: int, window: int, device: torch.device) -> SlotRotation:
        """How a layer rotates at its slots; tables are made anew when its rotary module, or what `model.to(...)` made of
        it, is another.
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

    def _forget(self, windows: list[int]) -> None:
        """Let the tables of some windows go."""
        for tables in (self._tables, self._rotations):
            for place in [place for place in tables if place[0] in windows]:
                del tables[place]
        self._windows = [window for window in self._windows if window not in windows]

    def _table(self, rotary: Rotary, version: Any, window: int, device: torch.device) -> SlotTable:
        key = window, rotary, device
        known = self._tables.get(key)
        if known is None or known[0] != version:
            known = self._tables[key] = version, rotary.table(window, device)
        return known[1]

    def step_tables(self, cache: FreqKVCache, device: torch.device) -> dict[int, tuple[Tensor, ...]]:
        """The embeddings of all slots, for each kind of layer that takes them."""
        tables = {}
        for kind, layer in self._one_of_each:
            table = self.rotation(layer, kind, cache.schedule.window, device).table
            if table is not None and table.native is not None:
                tables[kind] = (table.native,) if isinstance(table.native, Tensor) else table.native
        return tables

    @functools.cached_property
    def _one_of_each(self) -> list[tuple[int, AttentionLayer]]:
        return list({self.kinds[layer.kind]: layer for layer in self.analysis.layers}.items())

    @functools.cached_property
    def one_each(self) -> bool:
        """Whether each attention module has a cache layer of its own."""
        indices = [layer.layer_idx for layer in self.analysis.layers if not layer.reads_shared]
        return sorted(indices) == list(range(self.model_config.num_hidden_layers))

    def rotations(self, cache: FreqKVCache, device: torch.device) -> dict[int, SlotRotation]:
        """How each layer of a cache rotates, by its index."""
        window = cache.schedule.window
        return {
            layer.layer_idx: self.rotation(layer, self.kinds[layer.kind], window, device)
            for layer in self.analysis.layers
        }

    def mask(
        self, config: Any, attention: str, hidden_states: Tensor, tokens: int, held: int, always: bool = False
    ) -> Any:
        """The mask of `tokens` tokens behind `held` entries, for all rows, as the attention implementation takes it.

        It may be None where the implementation needs to be told no more than "causal", unless `always` asks for one.
        """
        dtype, device = hidden_states.dtype, hidden_states.device
        if tokens == 1 and not always and attention in self._see_all:
            return None
        key = attention, tokens, held, dtype, device
        masks = self._masks
        if key not in masks:
            _check_mask_function(attention)
            with torch.inference_mode(False):
                inputs = torch.empty((1, tokens, 0), dtype=dtype, device=device)
                # A further condition is taken to ask for more than a causal mask, so that none is skipped.
                mask = causal_mask(config, inputs, None, _Behind(held), _everything if always else None)
            self._masks = masks = {**(masks if len(masks) < MASKS_KEPT else {}), key: mask}
            if tokens == 1 and mask is None:
                self._see_all = self._see_all | {attention}
        return masks[key]

    def ragged_mask(
        self, config: Any, attention: str, dtype: torch.dtype, device: torch.device, part: RaggedRound, aligned: bool
    ) -> Any:
        """The same for a round of ragged rows, each of which sees its own entries."""
        _check_mask_function(attention)
        with torch.inference_mode(False):
            entries = torch.tensor(part.cut.entries, device=device)
            inputs = torch.empty((len(part.cut.rows), part.width, 0), dtype=dtype, device=device)
            behind = _Behind(part.entries - part.width)
            slots = torch.arange(part.entries, device=device)
            if part.width == 1 and _is_dense(attention):  # at every token: so without all that a mask could need
                return dense_mask((slots < entries[:, None])[:, None, None], attention, dtype)
            if part.width == 1 or aligned:
                held = slots >= part.entries - entries[:, None] if aligned else slots < entries[:, None]
                return causal_mask(config, inputs, held, behind)
            # Queries are right-aligned, entries are not. Where there is no token, something must be seen all the same.
            queries = torch.arange(behind.held, part.entries, device=device)[:, None]
            seen = (slots <= queries + (entries - part.entries)[:, None, None]) | (slots == 0)  # rows, queries, entries

            def own(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
                return seen[batch_idx, q_idx - behind.held, kv_idx]

            return causal_mask(config, inputs, None, behind, own)

    @property
    def schedule(self) -> Schedule:
        """That of calls without a cache."""
        assert self.config is not None
        return self.config.schedule

    def new_cache(self) -> FreqKVCache:
        """A cache of the numbers for calls that bring none."""
        return FreqKVCache(self.model_config, self.config, compressor=self.compressor)

    def new_layer(self, hybrid: bool = False) -> FreqKVLayer:
        """A layer of the numbers that lives for one call of an attention module."""
        assert self.config is not None
        kind = FreqKVHybridLayer if hybrid else FreqKVLayer
        return kind(self.config, self.compressor, preallocate=False)

    def drop_masks(self) -> None:
        """Called when a forward ends: masks are made for a call, not for the model's life."""
        self._masks = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_windows": [], "_tables": {}, "_rotations": {}, "_masks": {}}  # made anew in the copy


def _check_mask_function(attention: str) -> None:
    if attention not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"attn_implementation={attention!r} has no mask function, so that FreqKV cannot tell it what a segment may see: "
            "register one with transformers.AttentionMaskInterface.register, or use eager, sdpa, flex_attention or "
            "flash_attention_2"
        )


def _everything(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx.new_ones((), dtype=torch.bool)


class _Behind:
    """Tells `causal_mask` that the queries stand behind `held` entries."""

    is_compileable = False

    def __init__(self, held: int) -> None:
        self.held = held

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.held

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.held + query_length, 0


class _Wrapper(Replacement):
    """A method of a patched model."""

    def __init__(self, owner: nn.Module, shared: _Shared) -> None:
        super().__init__(owner)
        self.shared = shared
        self.cache_name = cache_name(self.parameters) or CACHE

    def leaves_alone(self, cache: Any) -> bool:
        """Whether FreqKV has nothing to do with a call that brings this cache, or None."""
        return not isinstance(cache, FreqKVCache) and (cache is not None or self.shared.config is None)


class _Part(NamedTuple):
    """A part of a call that goes through the module at once, made once for all layers that stand at slots alike.

    `take` picks its tokens from an argument that has an axis of them; None where the call has no others. `packing` is that
    of ragged rows. `arguments` take the place of the decoder's, and so does what `mask` makes, layer by layer.
    """

    number: int
    entering: Entering
    arguments: dict[str, Any]
    mask: Callable[[], Any] | None = None
    take: Callable[[Tensor, int], Tensor] | None = None
    packing: Packing | None = None


class _AttentionForward(_Wrapper):
    def __init__(self, layer: AttentionLayer, shared: _Shared) -> None:
        super().__init__(layer.module, shared)
        self.layer = layer
        self.kind = shared.kinds.setdefault(layer.kind, len(shared.kinds))
        # Before the cache was renamed, continuous batching brought its pages under what is its name now.
        self.has_former_name = layer.cache_argument == CACHE_NAMES[0]

    def __call__(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs = self.named(args, kwargs)
        cache = kwargs.get(self.layer.cache_argument)
        if cache is None and self.has_former_name and (cache := cache_of(kwargs)) is not None:
            kwargs = renamed(kwargs, self.layer.cache_argument)
        if isinstance(cache, FreqKVCache):
            if cache.stepping is not None:
                return original(**{**kwargs, **self._stepping(kwargs, cache)})
            if cache.forward_start is not None:
                return self._in_segments(original, kwargs, cache)
        mode = _mode(kwargs.get("attention_mask"))
        ours = mode == UNCACHED or not self.shared.makes_all_masks
        if cache is None and ours and self.shared.config is not None:
            return self._in_segments(original, kwargs, None)
        if mode is not None or isinstance(cache, FreqKVCache):
            raise RuntimeError(
                "only a part of this model is patched, or it was unpatched between forward and backward: call "
                "freqkv.patch(model) on the whole model, before the forward"
            )
        return original(**kwargs)

    def _in_segments(self, original: Method, kwargs: dict[str, Any], cache: FreqKVCache | None) -> Any:
        """Run the module over its tokens in segments, or rounds of ragged rows, that fit the free entries."""
        hidden_states: Tensor = kwargs["hidden_states"]
        tokens = hidden_states.shape[1]
        mapping = kwargs.get("shared_kv_states")
        shared_kv = None if mapping is None else _SharedEntries(mapping)
        holder: FreqKVCache | _OneLayer
        if cache is None:
            holder = _OneLayer(self.shared.new_layer(self.layer.hybrid))
            kwargs = {**kwargs, self.layer.cache_argument: holder}
            total = shared_kv.tokens if self.layer.reads_shared and shared_kv is not None else tokens
        else:
            # A layer that reads the entries of another one may get the last tokens of the call only.
            holder, total = cache, cache.forward_tokens
            if cache.ragged is not None and self.layer.keeps_state:
                raise ValueError(
                    f"attention_mask has zeros, but {self.layer.name} carries a state of its own from token to token, so that "
                    "rows of a batch cannot take turns. Pass rows of equal length, or one row at a time"
                )
        config = getattr(self.layer.module, "config", self.shared.model_config)
        place = self.kind, id(config), tokens, hidden_states.dtype, hidden_states.device
        parts: list[_Part] | None = holder.common.get(place)
        if parts is None:
            parts = holder.common[place] = list(self._parts(kwargs, hidden_states, config, holder, total))
        if len(parts) > 1 or any(part.packing is not None for part in parts):
            rows = all(not isinstance(p.entering.tokens, RaggedRound) or p.entering.tokens.everyone for p in parts)
            check_whole_call(self.layer.module, rows=rows, tokens=False)
        outputs = []
        for part in parts:
            taken = kwargs if part.take is None else _per_token(kwargs, tokens, part.take)
            call = {**taken, **part.arguments}
            if part.mask is not None:
                call["attention_mask"] = part.mask()
            mask_key = self.layer.rule.mask_key
            if mask_key is not None:
                call["attention_mask"] = {**(taken["attention_mask"] or {}), mask_key: call["attention_mask"]}
            if shared_kv is not None and self.layer.reads_shared:
                shared_kv.show(part.number)
            else:
                holder.announce(part.entering)
            try:
                output = original(**call)
            finally:
                holder.withdraw()
            if shared_kv is not None and not self.layer.reads_shared and len(parts) > 1:
                shared_kv.keep(total, last=part is parts[-1])
            outputs.append(output)
        spread = None
        # Weights are given out where a call has one part only.
        if cache is not None and cache.weights_asked and cache.row_tokens is not None and outputs:
            entering = parts[0].entering.tokens
            batch = range(hidden_states.shape[0])
            taking_part = entering.cut.rows if isinstance(entering, RaggedRound) else batch
            spread = functools.partial(_spread, taking_part, tokens, cache.columns_known())
        if cache is not None and cache.ragged is not None:
            return _unpacked(outputs, [part.packing for part in parts], hidden_states, spread)
        if spread is not None:
            return outputs[0][0], *_besides(outputs, spread)
        if len(outputs) == 1:
            return outputs[0]
        if isinstance(outputs[0], Tensor):
            return torch.cat(outputs, dim=1)
        return torch.cat([output[0] for output in outputs], dim=1), *_besides(outputs)

    def _parts(
        self, kwargs: dict[str, Any], hidden_states: Tensor, config: Any, holder: FreqKVCache | _OneLayer, total: int
    ) -> Iterator[_Part]:
        """What a call is cut into, of whose `total` tokens the module gets the last ones."""
        tokens, device = hidden_states.shape[1], hidden_states.device
        attention = config._attn_implementation
        rotation = self.shared.rotation(self.layer, self.kind, holder.schedule.window, device)
        given = kwargs.get("position_embeddings")
        if given is not None and not isinstance(given, Tensor):
            given = given[0]
        parts = holder.parts(total)
        for number, part in enumerate(parts):
            arguments: dict[str, Any] = {}
            make_mask: Callable[[], Any] | None = None
            take: Callable[[Tensor, int], Tensor] | None = None
            packing: Packing | None = None
            slots: slice | Tensor
            aligned = False
            if isinstance(part, Segment):
                start, stop = max(part.start - (total - tokens), 0), part.stop - (total - tokens)
                if stop <= 0:
                    continue
                if stop - start < tokens:
                    take = functools.partial(Tensor.narrow, start=start, length=stop - start)
                first = part.entries - (stop - start)  # its own first slot, unless it came without its first tokens
                if not holder.mask_given:
                    arguments["attention_mask"] = self.shared.mask(
                        config, attention, hidden_states, stop - start, first, self.layer.rule.always_masks
                    )
                slots = slice(first, part.entries)
            else:
                packing = part.packing(tokens, device)
                if packing is not None:
                    if packing.empty:
                        continue
                    take = packing.pack
                aligned = _aligns(part, attention)
                dtype = hidden_states.dtype
                make_mask = functools.partial(self.shared.ragged_mask, config, attention, dtype, device, part, aligned)
                # Only these make masks that are as large as they look, and a graph keeps what it was given in any case.
                remade = len(parts) > MASKS_KEPT and _is_dense(attention) and not torch.is_grad_enabled()
                if not remade:
                    arguments["attention_mask"] = part.made(("mask", attention, dtype, device, aligned), make_mask)
                    make_mask = None
                slots = part.slots(device)
            if given is not None and rotation.table is not None:
                arguments["position_embeddings"] = rotation.table.embeddings(slots, given.dtype)
            elif self.layer.positions == "position_ids":
                if isinstance(slots, slice):
                    slots = torch.arange(slots.start, slots.stop, device=device)[None]
                arguments["position_ids"] = slots
            yield _Part(number, Entering(part, rotation, aligned), arguments, make_mask, take, packing)

    def _stepping(self, kwargs: dict[str, Any], cache: FreqKVCache) -> dict[str, Any]:
        """The positions of a single token, as tensors."""
        given = kwargs.get("position_embeddings")
        if given is not None and self.kind in cache.step.tables:
            dtype = (given if isinstance(given, Tensor) else given[0]).dtype
            return {"position_embeddings": cache.step.embeddings(self.kind, dtype)}
        return {"position_ids": cache.step.slot[None]} if self.layer.positions == "position_ids" else {}


def _aligns(part: RaggedRound, attention: str) -> bool:
    """Whether the attention implementation wants the last entries of all rows in the last place."""
    # These take any mask. flash-attention takes padding in front only, and flex compiles for the masks it knows.
    return part.width > 1 and not _is_dense(attention)


def _is_dense(attention: str) -> bool:
    """Whether it takes masks of queries by entries."""
    return ALL_MASK_ATTENTION_FUNCTIONS.get(attention) in (eager_mask, sdpa_mask)


class _SharedEntries:
    """Entries that a layer leaves in `shared_kv_states` for later layers, one pair of tensors for each segment.

    The mapping of the model is the only thing that both layers see, also where gradient checkpointing runs them again,
    and what it holds may be moved between devices: so the segments are kept in it, as tensors.
    """

    def __init__(self, mapping: MutableMapping[Any, tuple[Tensor, ...]]) -> None:
        self.mapping = mapping
        self.before = dict(mapping)
        self.kept: dict[Any, list[Tensor]] = {}

    def keep(self, total: int, last: bool) -> None:
        """After a segment of the layer that makes them."""
        for name, entries in list(self.mapping.items()):
            if not _is_segments(name) and entries is not self.before.get(name):
                kept = self.kept.setdefault(name, [entries[0].new_empty(total, 0)])
                # The next segment may fold these in place.
                kept += [entry if last or entry.requires_grad else entry.clone() for entry in entries]
                self.before[name] = entries
                if last:
                    self.mapping[SEGMENTS, name] = tuple(kept)

    def show(self, number: int) -> None:
        """Before a segment of a layer that reads them."""
        for name, kept in list(self.mapping.items()):
            if _is_segments(name):
                self.mapping[name[1]] = kept[1 + 2 * number], kept[2 + 2 * number]

    @property
    def tokens(self) -> int:
        """How many tokens made them, all in one call."""
        kept = [entries[0].shape[0] for name, entries in self.mapping.items() if _is_segments(name)]
        # Without compression, what was left is one entry a token.
        return kept[0] if kept else int(next(iter(self.mapping.values()))[0].shape[-2])


def _is_segments(name: Any) -> bool:
    return isinstance(name, tuple) and name[0] == SEGMENTS


@dataclass(frozen=True)
class _Outer:
    """While a model around the decoder runs: what it was called with.

    Attributes: the wrappers' own `shared`, which tells one patched model from another that runs inside it, the names of
    arguments that are no text, what of the tokens is no padding (None for all), whether it got an attention mask of four
    dimensions, and its argument `use_cache`.
    """

    shared: _Shared
    inputs: set[str]
    real: Tensor | None
    mask_given: bool
    use_cache: bool | None


_OUTER: ContextVar[_Outer | None] = ContextVar("freqkv_outer", default=None)


class _ModelForward(_Wrapper):
    """Stands in for the forward of a model around the decoder, such as one with images, or with the language model head.

    Such a model may turn the mask that a caller gave into others before the decoder sees it, and asks the cache how large
    they are. So the outermost one looks at what the caller gave, and begins the forward of the cache.
    """

    def __init__(self, module: nn.Module, shared: _Shared) -> None:
        super().__init__(module, shared)
        self.module = module

    def __call__(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        named = self.named(args, kwargs)
        cache = cache_of(named)
        if self.leaves_alone(cache):
            self._check_other(cache)
            return original(*args, **kwargs)
        if isinstance(cache, FreqKVCache):
            named = renamed(named, self.cache_name)
            if cache.stepping is not None and cache.stepping is not self:  # the model around this one began it
                return self._step(original, named, cache)
            if cache.static:
                return self._static(original, named, cache)
            if torch.compiler.is_compiling():
                return self._uncompiled(original, named, warn=True)
        return self._called(original, named)

    def _check_other(self, cache: Any) -> None:
        """Raise ValueError where a call with another cache, or None, could not be left alone."""
        if not (
            cache is None or self.shared.config is None or isinstance(cache, Cache) or torch.compiler.is_compiling()
        ):
            _warn_other(type(cache).__name__)

    def _static(self, original: Method, kwargs: dict[str, Any], cache: FreqKVCache) -> Any:
        """A call with a cache for compiled graphs: a single token has one, all else is not compiled."""
        if not self._begins_step(kwargs, cache):
            return self._uncompiled(original, kwargs)
        try:
            output = self._step(original, kwargs, cache)
        except BaseException:
            cache.abort_step()
            raise
        cache.end_step()
        return output

    @uncompiled
    def _begins_step(self, kwargs: dict[str, Any], cache: FreqKVCache) -> bool:
        """Begin a single token for all rows where there is nothing else to heed."""
        inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        config = self.shared.model_config
        if inputs is None:
            return False
        plain = (
            self._outer() is None
            and inputs.shape[1] == 1
            and not torch.is_grad_enabled()
            and cache.row_tokens is None
            and cache.is_filled(inputs)
            and config._attn_implementation in ("eager", "sdpa")
            and not (config.output_attentions if (asked := kwargs.get("output_attentions")) is None else asked)
            and not any(_is_not_text(name, value) for name, value in kwargs.items())
        )
        if not plain:
            return False
        self._check_cache(cache)
        if self._check_inputs(kwargs, inputs, cache) is not None:
            return False
        if not self.shared.one_each:
            raise ValueError(
                "static=True needs a model each of whose attention modules has one cache layer; here some serve several. "
                "Leave it out"
            )
        cache.step.tables = self.shared.step_tables(cache, inputs.device)
        cache.begin_step(self, lambda: self.shared.rotations(cache, inputs.device), _ids(kwargs))
        return True

    def _step(self, original: Method, kwargs: dict[str, Any], cache: FreqKVCache) -> Any:
        return original(**{**kwargs, "attention_mask": None})

    @uncompiled
    def _uncompiled(self, original: Method, kwargs: dict[str, Any], warn: bool = False) -> Any:
        if warn:
            _warn_not_static()
        return self._called(original, kwargs)

    def _called(self, original: Method, kwargs: dict[str, Any]) -> Any:
        cache = cache_of(kwargs)
        if self._outer() is not None:
            return original(**kwargs)
        if isinstance(cache, FreqKVCache):
            self._check_cache(cache)
        inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if inputs is None:
            return original(**kwargs)  # raises in its own words
        real = self._check_inputs(kwargs, inputs, cache)
        extra = {name for name, value in kwargs.items() if _is_not_text(name, value)}
        # Set in a context of its own: an interrupt, wherever it falls, cannot leave it set.
        given = _is_custom(kwargs.get("attention_mask"))
        outer = _Outer(self.shared, extra, real, given, kwargs.get("use_cache"))
        return copy_context().run(self._inside, original, outer, cache, inputs.shape[1], kwargs)

    def _inside(
        self, original: Method, outer: _Outer, cache: FreqKVCache | None, tokens: int, kwargs: dict[str, Any]
    ) -> Any:
        _OUTER.set(outer)
        if cache is None:
            return original(**kwargs)
        return self._in_forward(original, cache, tokens, outer.real, outer.mask_given, kwargs)

    def _outer(self) -> _Outer | None:
        """The call of a model around this one, if there is one."""
        outer = _OUTER.get()
        return outer if outer is not None and outer.shared is self.shared else None

    def _in_forward(
        self,
        original: Method,
        cache: FreqKVCache,
        tokens: int,
        real: Tensor | None,
        mask_given: bool,
        kwargs: dict[str, Any],
    ) -> Any:
        try:
            cache.begin_forward(tokens, real, mask_given, _ids(kwargs))
            output = original(**kwargs)
            cache.end_forward()
        except BaseException:
            cache.abort_forward()
            raise
        return output

    def _check_cache(self, cache: FreqKVCache) -> None:
        cache.check_usable()
        if cache.geometry == self.shared.geometry:
            return
        for what, expected in self.shared.geometry.items():
            if cache.geometry[what] != expected:
                raise ValueError(
                    f"this FreqKVCache was made for a model with {what} {cache.geometry[what]}, this model has "
                    f"{expected}: make it with FreqKVCache(model.config, ...) of the model that uses it"
                )

    def _check_inputs(self, kwargs: dict[str, Any], inputs: Tensor, cache: FreqKVCache | None) -> Tensor | None:
        """What of the new tokens is no padding, `(batch, tokens)` bool; None for all of them."""
        batch, tokens = inputs.shape[:2]
        seen = 0 if cache is None else cache.tokens_seen
        if tokens == 0:
            raise ValueError(
                f"the input has no new tokens, the cache has seen {seen}: generate takes the whole conversation as its input "
                "and leaves out what the cache has seen, or only what is new, with an attention_mask of ones for both. For "
                "another conversation, use another cache or reset()"
            )
        if cache is not None and kwargs.get("use_cache") is False:
            raise ValueError("use_cache=False and a FreqKVCache contradict each other: leave one of them out")
        rows = None if cache is None else cache.row_tokens
        held = None if cache is None else cache.batch_size
        if held not in (None, batch):
            raise ValueError(
                f"this FreqKVCache holds {held} rows, the input has {batch}: a cache serves the batch that filled it. "
                "Make one for each batch, or call reset()"
            )
        mask = kwargs.get("attention_mask")
        if mask is not None and _is_custom(mask):
            self._check_custom(mask, batch, seen, tokens, cache)
            return None
        return _real_tokens(mask, batch, seen, tokens, rows)

    def _check_custom(self, mask: Tensor, batch: int, seen: int, tokens: int, cache: FreqKVCache | None) -> None:
        """That a mask of the caller's own, whose columns are tokens, goes with entries: as long as these are the tokens."""
        schedule = self.shared.schedule if cache is None else cache.schedule
        why = f"there are {seen} tokens in the cache already"
        if not self.shared.makes_all_masks:
            why = "this model has other layers than full attention, which need other masks"
        elif seen + tokens > schedule.window:
            why = f"{seen + tokens} tokens do not fit the window of {schedule.window} entries"
        elif seen == 0 and mask.shape[0] in (1, batch) and tuple(mask.shape[2:]) == (tokens, tokens):
            return
        elif seen == 0:
            why = f"it has shape {tuple(mask.shape)}, not {(batch, 1, tokens, tokens)}"
        raise ValueError(
            "FreqKV builds its own masks over cache entries and cannot use a custom 4-D attention_mask, whose columns are "
            f"tokens, except in the first call of an empty cache and below the window: {why}. Pass a 2-D attention_mask, or "
            "none"
        )


class _DecoderForward(_ModelForward):
    def _step(self, original: Method, kwargs: dict[str, Any], cache: FreqKVCache) -> Any:
        config = self.shared.model_config
        mask = cache.step.mask(cache.schedule.window, config._attn_implementation, cache.dtype)
        return original(**{**kwargs, "attention_mask": mask})

    def _check_other(self, cache: Any) -> None:
        super()._check_other(cache)
        if self.shared.config is not None and not self.shared.makes_all_masks and self._drops_caches():
            raise ValueError(
                f"{self.cache_name} is a {type(cache).__name__}, which gradient checkpointing drops on the way to "
                "attention layers, so that they could not tell that it was there. Pass no cache in training"
            )

    def _called(self, original: Method, kwargs: dict[str, Any]) -> Any:
        cache = cache_of(kwargs)
        outer = self._outer()
        if cache is None:
            use_cache = kwargs.get("use_cache") if outer is None else outer.use_cache
            if use_cache is None:  # training has no use for one
                use_cache = getattr(self.shared.model_config, "use_cache", True) and not self.module.training
            if use_cache and not self._drops_caches():
                cache = self.shared.new_cache()
            kwargs = {**renamed(kwargs, self.cache_name), self.cache_name: cache, "use_cache": cache is not None}
        elif self._drops_caches():
            raise RuntimeError(
                "this FreqKVCache would not reach the attention layers: gradient checkpointing drops caches. For training, "
                "patch with numbers, freqkv.patch(model, window=...), and pass no cache"
            )
        tokens, real = self._check_arguments(kwargs, cache)
        aligned = None
        if cache is None and real is not None:
            for layer in self.shared.analysis.layers:  # tokens are moved
                check_whole_call(layer.module, rows=True, tokens=False)
            aligned = _RightPadded(real)
            kwargs = aligned.apply(kwargs)
        mask_given = _is_custom(kwargs.get("attention_mask")) if outer is None else outer.mask_given
        if self.shared.makes_all_masks and not mask_given:
            kwargs = {**kwargs, "attention_mask": torch.empty(UNCACHED) if cache is None else self.shared.cached_mark}
        try:
            if cache is None:
                output = original(**kwargs)
                return output if aligned is None else aligned.undo(output)
            if cache.forward_start is not None and self._outer() is not None:
                cache.forward_tokens = tokens  # images may have become more tokens on the way
                return original(**kwargs)
            return self._in_forward(original, cache, tokens, real, mask_given, kwargs)
        finally:
            self.shared.drop_masks()

    def _drops_caches(self) -> bool:
        """Whether gradient checkpointing takes caches away on the way to the layers."""
        if not self.module.training or (CHECKPOINTS_WITH_GRADIENTS_ONLY and not torch.is_grad_enabled()):
            return False
        return any(getattr(module, "gradient_checkpointing", False) for module in self.module.modules())

    def _check_arguments(self, kwargs: dict[str, Any], cache: FreqKVCache | None) -> tuple[int, Tensor | None]:
        """The number of new tokens, and what of them is no padding (None for all)."""
        inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if inputs is None or (kwargs.get("input_ids") is not None and kwargs.get("inputs_embeds") is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        tokens: int = inputs.shape[1]
        outer = self._outer()
        if outer is None:
            if cache is not None:
                self._check_cache(cache)
            real = self._check_inputs(kwargs, inputs, cache)
        else:
            real = outer.real
            if real is not None and real.shape[1] != tokens:
                raise ValueError(
                    "attention_mask has zeros, and images became more tokens on the way: pass one row at a time"
                )
        own_masks = outer.inputs if outer is not None and not _is_plain(kwargs.get("attention_mask")) else set()
        if own_masks or _sees_ahead(kwargs):
            raise ValueError(
                f"the model makes attention masks of its own from {', '.join(sorted(own_masks or ['token_type_ids']))}, in "
                "which tokens of a block attend to each other, and FreqKV knows causal masks only. Use text, or "
                "transformers' DynamicCache"
            )
        ragged = real is not None or (cache is not None and cache.row_tokens is not None)
        _check_not_packed(kwargs, tokens, real)
        config = self.shared.model_config

        def wants(name: str) -> bool:
            asked = kwargs.get(name)
            return bool(getattr(config, name, False) if asked is None else asked)

        weights = wants("output_attentions")
        if cache is not None:
            cache.weights_asked = weights
        if weights:
            if ragged:
                self._check_weights_of_rows(inputs.shape[0], tokens, real, cache)
            elif tokens > 1:
                self._check_weights(tokens, cache)
        if cache is None and real is not None and wants("output_router_logits"):
            raise ValueError(
                "output_router_logits: without a cache, FreqKV runs padded rows in another order than the router's loss "
                "expects. Pass rows of equal length"
            )
        return tokens, real

    def _check_weights(self, tokens: int, cache: FreqKVCache | None) -> None:
        """That attention weights of a call form one matrix."""
        schedule, seen = (self.shared.schedule, 0) if cache is None else (cache.schedule, cache.tokens_seen)
        segments = schedule.segments(seen, tokens)
        if len(segments) > 1:
            raise ValueError(
                "output_attentions: the weights of a call that is compressed half-way are over different entries and do not "
                f"form one matrix. Feed at most {segments[0].stop} tokens now, or leave output_attentions out"
            )

    def _check_weights_of_rows(self, batch: int, tokens: int, real: Tensor | None, cache: FreqKVCache | None) -> None:
        """The same for padded rows: their weights are spread over the columns of the call, while entries are tokens."""
        schedule = self.shared.schedule if cache is None else cache.schedule
        seen = [0] * batch if cache is None else cache.row_tokens or [cache.tokens_seen] * batch
        brings = [tokens] * batch if real is None else real.sum(1).tolist()
        longest = max(a + b for a, b in zip(seen, brings, strict=True))
        unknown = tokens > schedule.window if cache is None else not cache.knows_all_columns
        if longest > schedule.window or unknown:
            raise ValueError(
                "output_attentions: the weights of padded rows are over the entries of each row, which no longer are the "
                f"tokens once more than window={schedule.window} of them came, and do not form one matrix. Pass one row at a "
                "time, or leave output_attentions out"
            )


class _RightPadded:
    """Rows moved so that all padding stands behind them, where it changes nothing before it."""

    def __init__(self, real: Tensor) -> None:
        self.shape = real.shape
        self.order = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)

    def apply(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a decoder, moved."""
        return {name: self._moved(value, self.order) for name, value in kwargs.items()}

    def undo(self, output: Any) -> Any:
        """What the decoder returns, moved back."""
        back = torch.argsort(self.order, dim=1)
        if isinstance(output, tuple):
            return tuple(self._moved(value, back) for value in output)
        for name in list(output):
            output[name] = self._moved(output[name], back)
        return output

    def _moved(self, value: Any, order: Tensor) -> Any:
        if isinstance(value, tuple):
            return tuple(self._moved(each, order) for each in value)
        if not isinstance(value, Tensor):
            return value
        batch, tokens = self.shape
        order = order.to(value.device)
        if value.ndim == 4 and value.shape[0] == batch and value.shape[2:] == (tokens, tokens):  # attention weights
            by_query = value.gather(2, order[:, None, :, None].expand(value.shape))
            return by_query.gather(3, order[:, None, None, :].expand(value.shape))
        if value.shape[:2] != self.shape:
            return value
        return value.gather(1, order.view(*order.shape, *[1] * (value.ndim - 2)).expand(value.shape))


@functools.cache
def _warn_other(kind: str) -> None:
    logger.warning(
        "a %s, as continuous batching (generate_batch) brings, keeps entries in a way of its own: such calls run without "
        "FreqKV, and what freqkv.patch was given (window, ...) does not hold for them",
        kind,
    )


@functools.cache
def _warn_implementation(implementation: str) -> None:
    logger.warning(
        "cache_implementation=%r, of the call or of model.generation_config, asks for a cache of transformers: such calls run "
        "without FreqKV, and what freqkv.patch was given (window, ...) does not hold for them. Set it to None",
        implementation,
    )


@functools.cache
def _warn_not_static() -> None:
    logger.warning(
        "this model is compiled, but calls with this FreqKVCache run uncompiled. Make it with static=True, so that single "
        "tokens are compiled once"
    )


def _is_not_text(name: str, value: Any) -> bool:
    if name in TEXT_ARGUMENTS or not isinstance(value, (Tensor, Mapping)):
        return False
    if isinstance(value, Tensor) and value.ndim == 0:  # a number, such as num_items_in_batch of Trainer
        return False
    if name.endswith("token_type_ids"):  # where 0 stands for text
        return bool(value.any()) if isinstance(value, Tensor) else True
    return len(value) > 0


def _ids(kwargs: dict[str, Any]) -> Tensor | None:
    """The ids that a model is called with, if that is all it is called with."""
    ids = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else None
    return ids if isinstance(ids, Tensor) and ids.ndim == 2 else None


def _is_custom(mask: Any) -> bool:
    """Whether it is a mask of queries by tokens of the caller's own."""
    return isinstance(mask, Tensor) and mask.ndim == 4


def _is_plain(mask: Any) -> bool:
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)


def _sees_ahead(kwargs: dict[str, Any]) -> bool:
    """Whether a decoder is asked to let tokens of a block see each other (PrefixLM)."""
    types = kwargs.get("token_type_ids")
    return types is not None and bool(types.any())


def _real_tokens(mask: Any, batch: int, seen: int, tokens: int, rows: list[int] | None) -> Tensor | None:
    """What of the new tokens is no padding; None for all."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError(
            "FreqKV builds its own masks over cache entries and cannot use a custom 4-D attention_mask, whose "
            "columns are tokens. Pass a 2-D attention_mask, or none"
        )
    if mask.shape != (batch, seen + tokens):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but there are {batch} rows of {seen} tokens in the cache "
            f"and {tokens} new ones: pass one of shape {(batch, seen + tokens)}, or none"
        )
    if rows is None and bool(mask.all()):
        return None
    mask = mask.bool()  # numbers of low precision could not be counted
    before = mask[:, :seen].sum(1).tolist()
    if before != ([seen] * batch if rows is None else rows):
        raise ValueError(
            f"attention_mask leaves {before} of the tokens before these, the cache holds {rows or [seen] * batch} in its rows: "
            "what has entered cannot be hidden, and what was padding cannot be shown"
        )
    real = mask[:, seen:]
    return None if bool(real.all()) else real


def _check_not_packed(kwargs: dict[str, Any], tokens: int, real: Tensor | None) -> None:
    packing = [name for name in PACKING_ARGUMENTS if kwargs.get(name) is not None]
    if packing:
        raise ValueError(
            f"packed sequences ({', '.join(packing)}) share one cache, and FreqKV would compress them into each "
            "other. Pass each sequence as a row of its own"
        )
    positions = kwargs.get("position_ids")
    if positions is None or tokens == 1:  # a single position cannot restart, and looking costs a device sync
        return
    # Slots take their place, and RoPE is relative: they may start anywhere, and those of padding say nothing.
    if real is None or positions.ndim != 2:
        plain = positions.diff(dim=-1) == 1
    else:
        where = real.to(positions.device)
        offset = positions - (where.cumsum(1) - 1)
        first = offset.gather(1, where.to(torch.uint8).argmax(1, keepdim=True).expand(len(offset), 1))
        plain = (offset == first) | ~where
    if not bool(plain.all()):
        if real is not None:
            raise ValueError(
                "position_ids must count the tokens of each row that are no padding. generate counts wrongly behind padding on "
                "the right: pad its prompts on the left (padding_side='left'), or leave position_ids out"
            )
        raise ValueError(
            "position_ids must count the tokens of each row: positions that restart (packed sequences) or jump (those that "
            "some models give to images) are not supported, since FreqKV rotates keys at their slots. Leave position_ids "
            "out, and pass each sequence as a row of its own"
        )


class _PrepareCacheForGeneration(_Wrapper):
    """With numbers, `generate` gets a FreqKVCache where it would have made a DynamicCache."""

    name = PREPARE_CACHE

    def __call__(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        named = self.named(args, kwargs)
        generation_config, model_kwargs = named["generation_config"], named["model_kwargs"]
        if (
            self.shared.config is not None
            and cache_of(model_kwargs) is None
            and generation_config.use_cache is not False
        ):
            if generation_config.cache_implementation is not None:
                _warn_implementation(generation_config.cache_implementation)
            else:
                cache = model_kwargs[CACHE] = self.shared.new_cache()
                if generation_config.is_assistant:  # its drafts may be rejected
                    cache.activate_past_recording()
        return original(*args, **kwargs)


class _PrepareInputsForGeneration(_Wrapper):
    """Phi-3 drops its cache where a text grows to the length from which its frequencies change; those of slots do not."""

    name = PREPARE_INPUTS

    def __init__(self, model: PreTrainedModel, shared: _Shared) -> None:
        super().__init__(model, shared)
        self.model = model

    def __call__(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        cache = cache_of(kwargs)
        if not isinstance(cache, FreqKVCache):
            return original(*args, **kwargs)
        kwargs = renamed(kwargs, self.cache_name)
        cache.check_usable()  # before its lengths are looked at
        with cache.preparing():
            inputs = original(*args, **kwargs)
        if cache_of(inputs) is not cache:
            inputs = getattr(GenerationMixin, self.name)(self.model, *args, **kwargs)
        _check_continues(inputs, cache.get_seq_length())
        if kwargs.get("is_first_iteration"):
            named = self.named(args, kwargs)
            _check_begins(named.get("input_ids"), named.get("next_sequence_length"), named.get("attention_mask"), cache)
        return inputs


def _check_begins(ids: Tensor | None, new: int | None, mask: Any, cache: FreqKVCache) -> None:
    """That the whole conversation, where it is the input of `generate`, begins with what the cache has seen.

    It is if `generate` says how many of its tokens are new; without that, all are.
    """
    seen = cache.tokens_seen
    if ids is None or new is None or not 0 < seen == ids.shape[1] - new:
        return
    if not cache.history.begins(ids, mask):
        raise ValueError(
            f"the input does not begin with the {seen} tokens that this FreqKVCache has seen: it is another conversation, or "
            "one whose earlier turns are written otherwise now (edited, or rendered without their thoughts). Use another "
            "cache, or call cache.reset(); for the new tokens alone, pass an attention_mask of ones for those seen and the new"
        )


def _check_continues(inputs: dict[str, Any], seen: int) -> None:
    """That what `generate` feeds is what the cache has not seen: it cuts its input by lengths alone, and may cut wrongly."""
    fed = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if fed is None or fed.shape[1] == 0:
        return
    tokens = fed.shape[1]
    if mask is not None:  # positions leave out the padding, its columns do not
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return
        total = mask.shape[1]
    else:
        if positions is None or positions.ndim != 2:
            return
        if tokens == 1 and positions.device.type != "cpu":  # step by step, looking costs a device sync
            return
        total = int(positions[0, -1]) + 1
    if total != seen + tokens:
        raise ValueError(
            f"generate counts {total} tokens and would feed {tokens} of them, but the cache has seen {seen}: some would be "
            "left out, or enter twice. Pass the whole conversation, which is longer than what the cache has seen; or only what "
            f"is new, with an attention_mask of ones for the {seen} tokens and the new ones; or call cache.reset(). Assisted "
            "decoding and prompt lookup begin with an empty cache: transformers feeds the whole text to them"
        )


class _OneLayer(SegmentedCache):
    """The cache of one attention call: hands its layer to whatever index the module names."""

    def __init__(self, layer: FreqKVLayer) -> None:
        super().__init__(layers=Everywhere([layer]))
        self.layer = layer
        self.common = {}

    @property
    def schedule(self) -> Schedule:
        return self.layer.schedule

    def parts(self, tokens: int) -> list[Segment | RaggedRound]:
        """All segments of the call."""
        return [*self.schedule.segments(0, tokens)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layer.seen


def _per_token(kwargs: dict[str, Any], tokens: int, take: Callable[[Tensor, int], Tensor]) -> dict[str, Any]:
    """Arguments with `take` applied to whatever has an axis of tokens, whatever it is called; all else passed on."""

    def taken(name: str, value: Any) -> Any:
        if isinstance(value, dict) and name == "attention_mask":
            return {inner: taken(inner, entry) for inner, entry in value.items()}
        if not isinstance(value, Tensor) or name == "position_embeddings":
            return value  # slots replace the embeddings
        # (batch, tokens, ...), (batch, 1, tokens, 1), or positions of (axes, batch, tokens)
        axis = next((axis for axis in (1, -2, -1) if value.ndim >= 2 and value.shape[axis] == tokens), None)
        return value if axis is None else take(value, axis)

    return {name: taken(name, value) for name, value in kwargs.items()}


def _unpacked(
    outputs: list[Any],
    packings: list[Packing | None],
    hidden_states: Tensor,
    spread: Callable[[Tensor], Tensor | None] | None = None,
) -> Any:
    """What the rounds returned, each token where it stood; zeros for padding. `spread` does so for attention weights."""
    if not outputs:  # nothing but padding
        return torch.zeros_like(hidden_states), None
    firsts = [output if isinstance(output, Tensor) else output[0] for output in outputs]
    whole = packings == [None]
    together = firsts[0]
    if not whole:
        together = together.new_zeros(*hidden_states.shape[:2], together.shape[-1])
        for packing, first in zip(packings, firsts, strict=True):
            assert packing is not None  # a round that is the whole call is the only one
            packing.unpack(first, together)
    return together if isinstance(outputs[0], Tensor) else (together, *_besides(outputs, spread))


def _besides(outputs: list[Any], spread: Callable[[Tensor], Tensor | None] | None = None) -> Iterator[Any]:
    """What modules return beside their output.

    Attention weights of different segments are over different entries and do not add up to one matrix. What else there is
    (GPT-NeoX-Japanese: a bias) is the same for all.
    """
    for first, *others in zip(*(output[1:] for output in outputs), strict=True):
        same = all(other is first for other in others)
        is_weights = isinstance(first, Tensor) and first.ndim == 4
        yield (spread(first) if is_weights and spread is not None else first) if same else None


def _spread(rows: Sequence[int], tokens: int, known: Tensor | None, weights: Tensor) -> Tensor:
    """Attention weights of padded rows over the columns of the call and of those before it; zeros for padding.

    Parameters
    ----------
    rows : sequence of int
        The rows of the batch that took part.
    tokens : int
        Columns of the call.
    known : Tensor
        `(batch, columns)` bool: what of all columns is no padding.
    weights : Tensor
        `(rows, heads, width, entries)`: queries right-aligned, entries of a row in the order of its tokens.
    """
    assert known is not None
    spread = weights.new_zeros(known.shape[0], weights.shape[1], tokens, known.shape[1])
    for place, row in enumerate(rows):
        queries, keys = known[row, -tokens:].nonzero()[:, 0], known[row].nonzero()[:, 0]
        spread[row][:, queries[:, None], keys] = weights[place, :, weights.shape[2] - len(queries) :, : len(keys)]
    return spread


def _mode(mask: Any) -> tuple[int, ...] | None:
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else None
    return shape if shape in (CACHED, UNCACHED) else None


def _find_shared(model: nn.Module) -> _Shared | None:
    return next((wrapper.shared for _, wrapper in replacements(model) if isinstance(wrapper, _Wrapper)), None)


def _wrap(model: nn.Module, shared: _Shared) -> None:
    """Wrap whatever is not wrapped yet: a part of the model may have been patched, or unpatched, by itself."""
    wrapped = {(module, replacement.name) for module, replacement in replacements(model)}
    inside = set(model.modules())
    analysis = shared.analysis
    wanted: list[tuple[Any, type[_Wrapper], Any]] = [
        *((layer.module, _AttentionForward, layer) for layer in analysis.layers),
        (analysis.decoder, _DecoderForward, analysis.decoder),
        *((module, _ModelForward, module) for module in analysis.around),
    ]
    for module in inside:
        if isinstance(module, GenerationMixin):
            wanted += [(module, _PrepareCacheForGeneration, module), (module, _PrepareInputsForGeneration, module)]
    lacking = [each for each in wanted if each[0] in inside and (each[0], each[1].name) not in wrapped]
    made = [(module, wrapper(about, shared)) for module, wrapper, about in lacking]
    for module, replacement in made:
        replace_method(module, replacement)
