"""The forward of an attention module, run over the parts of a call.

No model's forward is copied. The module's own forward is called once for each part, with the `(cos, sin)` of the part's slots,
the part's mask, and a cache that enters the part's tokens; it projects, norms, rotates, updates the cache and attends with its
own code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freqkv.cache import FreqKVCache
from freqkv.compiled import CompiledStep
from freqkv.forward import Forward, PartCache
from freqkv.layer import FreqKVLayer
from freqkv.models.adapters import check_whole_call
from freqkv.models.layers import AttentionLayer
from freqkv.models.modules import Everywhere
from freqkv.models.upstream import CACHE_NAMES, cache_of, renamed, takes_dense_masks
from freqkv.parts import Call, Packing, Part, Run
from freqkv.patching.masks import MASKS_KEPT, aligns_right
from freqkv.patching.methods import Method
from freqkv.patching.outputs import joined, spread_weights, unpacked
from freqkv.patching.queries import recording
from freqkv.patching.shared_kv import SharedEntries
from freqkv.patching.state import PatchState, Wrapper, first_tensor

__all__ = ["AttentionForward"]


class PreparedPart(NamedTuple):
    """A part with what the module is called with, made once for all layers that stand at slots alike.

    `selection` picks its tokens from an argument that has an axis of them; None where the call has no others. `arguments` take
    the place of the decoder's, and so does what `make_mask` makes, layer by layer.
    """

    part: Part
    cache: PartCache
    selection: Run | Packing | None
    arguments: dict[str, Any]
    make_mask: Callable[[], Any] | None


class AttentionForward(Wrapper):
    """Stands in for the forward of one attention module."""

    def __init__(self, layer: AttentionLayer, state: PatchState) -> None:
        super().__init__(layer.module, state)
        self.layer = layer
        self.kind = state.tables.kinds[layer.kind]
        self.is_renamed = layer.cache_argument == CACHE_NAMES[0]

    def __call__(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs = self.named(args, kwargs)
        cache = kwargs.get(self.layer.cache_argument)
        # Before the cache was renamed, continuous batching brought its pages under what is its name now.
        if cache is None and (cache := cache_of(kwargs)) is not None and self.is_renamed:
            kwargs = renamed(kwargs, self.layer.cache_argument)
        if isinstance(cache, CompiledStep):
            return original(**{**kwargs, **self._step_arguments(kwargs, cache)})
        if isinstance(cache, Forward):
            return self._in_parts(original, kwargs, cache)
        if cache is None and self.state.settings is not None:
            return self._in_parts(original, kwargs, None)
        if isinstance(cache, FreqKVCache):
            raise RuntimeError(
                "only a part of this model is patched, or it was unpatched between forward and backward: call "
                "freqkv.patch(model) on the whole model, before the forward"
            )
        return original(**kwargs)

    def _in_parts(self, original: Method, kwargs: dict[str, Any], forward: Forward | None) -> Any:
        """Run the module over its tokens, part by part."""
        hidden_states: Tensor = kwargs["hidden_states"]
        tokens = hidden_states.shape[1]
        mapping = kwargs.get("shared_kv_states")
        shared_kv = None if mapping is None else SharedEntries(mapping)
        if forward is None:
            layers: list[Any] = Everywhere([self.state.new_layer(self.layer)])
            # A layer that reads the entries of another one may get the last tokens of the call only.
            reads = shared_kv is not None and self.layer.reads_shared
            total = shared_kv.tokens if reads and shared_kv is not None else tokens
            shared = self.state.shared_by_layers(kwargs) if layers[0].takes_span else None
            call = Call((0,) * hidden_states.shape[0], total, shared=shared)
            window, keeps_mask = self.state.window(), self.state.fits(total)
            prepared = list(self._prepared(kwargs, call.parts(layers[0].schedule), layers, window, keeps_mask, None))
        else:
            assert forward.call is not None
            layers, call = forward.layers, forward.call
            prepared = self._prepared_once(kwargs, forward)
            if self.layer.keeps_state and not call.uniform:
                raise ValueError(
                    f"attention_mask has zeros, but {self.layer.name} carries a state of its own from token to token, so that "
                    "rows of a batch cannot take turns. Pass rows of equal length, or one row at a time"
                )
        if len(prepared) > 1 or not call.uniform:
            self._check_adapters(prepared)
        outputs = []
        for each in prepared:
            outputs.append(self._run(original, kwargs, each, layers, shared_kv))
            if shared_kv is not None and not self.layer.reads_shared and len(prepared) > 1:
                shared_kv.keep(call.tokens, last=each is prepared[-1])
        spread = None
        if forward is not None and forward.weights_asked and outputs:  # given out for one part only
            mask = forward.padding.token_mask
            spread = None if mask is None else functools.partial(spread_weights, prepared[0].part.rows, tokens, mask)
        if call.uniform:
            return joined(outputs, spread)
        return unpacked(outputs, [each.selection for each in prepared], hidden_states, spread)

    def _run(
        self,
        original: Method,
        kwargs: dict[str, Any],
        prepared: PreparedPart,
        layers: list[Any],
        shared_kv: SharedEntries | None,
    ) -> Any:
        """Run the module over one part."""
        part, selection = prepared.part, prepared.selection
        tokens = kwargs["hidden_states"].shape[1]
        taken = kwargs if selection is None else _per_token(kwargs, tokens, selection.pack)
        call = {**taken, **prepared.arguments, self.layer.cache_argument: prepared.cache}
        if prepared.make_mask is not None:
            call["attention_mask"] = prepared.make_mask()
        mask_key = self.layer.rule.mask_key
        if mask_key is not None and call.get("attention_mask") is not taken.get("attention_mask"):
            call["attention_mask"] = {**(taken["attention_mask"] or {}), mask_key: call["attention_mask"]}
        if self.layer.reads_shared:
            if shared_kv is not None:
                shared_kv.show(part.number)
            return original(**call)
        index = kwargs.get("layer_idx", self.layer.layer_idx)
        layer = layers[index]
        if isinstance(layer, FreqKVLayer) and layer.wanted_queries and part.recorded(layer.wanted_queries) is not None:

            def record(query_states: Tensor, scaling: float) -> None:
                layer.record_queries(query_states, scaling, part, prepared.cache.rotation)

            original = recording(original, self.state.config_of(self.layer.module), record)
        return original(**call)

    def _prepared_once(self, kwargs: dict[str, Any], forward: Forward) -> list[PreparedPart]:
        """The parts for this layer, made once in a forward for layers that stand at slots alike."""
        hidden_states = kwargs["hidden_states"]
        cache = forward.cache
        assert isinstance(cache, FreqKVCache)
        schedule = cache.layers[self.layer.layer_idx].schedule if not self.layer.reads_shared else cache.schedule
        config = self.state.config_of(self.layer.module)
        place = (
            self.kind,
            id(schedule),
            id(config),
            hidden_states.shape[1],
            hidden_states.dtype,
            hidden_states.device,
        )
        prepared: list[PreparedPart] | None = forward.memo.get(place)
        if prepared is None:
            parts, keeps_mask = forward.parts(schedule), forward.request.mask_given
            prepared = list(self._prepared(kwargs, parts, forward.layers, cache.longest_window, keeps_mask, forward))
            forward.memo[place] = prepared
        return prepared

    def _prepared(
        self,
        kwargs: dict[str, Any],
        parts: list[Part],
        layers: list[Any],
        window: int,
        keeps_mask: bool,
        forward: Forward | None,
    ) -> Iterator[PreparedPart]:
        """What a call is cut into, of whose tokens the module may get the last ones only."""
        hidden_states: Tensor = kwargs["hidden_states"]
        tokens, dtype, device = hidden_states.shape[1], hidden_states.dtype, hidden_states.device
        config = self.state.config_of(self.layer.module)
        attention = config._attn_implementation
        rotation = self.state.tables.rotation(self.layer, self.kind, window, device)
        masks = self.state.masks
        for part in parts:
            try:
                selection = part.selection(tokens, device)
            except LookupError:
                continue
            arguments: dict[str, Any] = {}
            make_mask: Callable[[], Any] | None = None
            width = part.width
            if part.uniform:
                width = tokens if selection is None else selection.stop - selection.start  # type: ignore[union-attr]
                if not keeps_mask:
                    held, always = part.longest - width, self.layer.rule.always_masks
                    arguments["attention_mask"] = masks.of_uniform(
                        config, attention, hidden_states, width, held, always
                    )
            else:
                make_mask = functools.partial(masks.of_ragged, config, attention, dtype, device, part)
                # Only these make masks that are as large as they look, and a graph keeps what it was given in any case.
                remade = len(parts) > MASKS_KEPT and takes_dense_masks(attention) and not torch.is_grad_enabled()
                if not remade:
                    arguments["attention_mask"] = part.memo(("mask", attention, dtype, device), make_mask)
                    make_mask = None
            arguments |= self._positions(kwargs, part, width, rotation.table)
            cache = PartCache(layers, part, rotation, aligns_right(part, attention), forward)
            yield PreparedPart(part, cache, selection, arguments, make_mask)

    def _positions(self, kwargs: dict[str, Any], part: Part, width: int, table: Any) -> dict[str, Any]:
        """What tells the module the slots of a part."""
        given = first_tensor(kwargs.get("position_embeddings"))
        device = kwargs["hidden_states"].device
        slots = part.slots_of(width, device)
        if given is not None and table is not None:
            return {"position_embeddings": table.embeddings(slots, given.dtype)}
        if self.layer.positions == "position_ids":
            if isinstance(slots, slice):
                slots = torch.arange(slots.start, slots.stop, device=device)[None]
            return {"position_ids": slots}
        return {}

    def _step_arguments(self, kwargs: dict[str, Any], step: CompiledStep) -> dict[str, Any]:
        """The positions of a single token, as tensors."""
        given = first_tensor(kwargs.get("position_embeddings"))
        if given is not None and self.kind in step.tables:
            return {"position_embeddings": step.embeddings(self.kind, given.dtype)}
        return {"position_ids": step.slot[None]} if self.layer.positions == "position_ids" else {}

    def _check_adapters(self, prepared: list[PreparedPart]) -> None:
        """That no adapter inside was told of the rows or tokens of the call, which the module does not run over as a whole."""
        if len(prepared) > 1 or any(isinstance(each.selection, Packing) for each in prepared):
            rows = all(each.part.everyone for each in prepared)
            check_whole_call(self.layer.module, rows=rows, tokens=False)


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
