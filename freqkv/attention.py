"""The patch: each attention module's forward is wrapped, so that it sees slots, segments and the FreqKV cache.

No model's forward is copied. The wrapper cuts `hidden_states` into segments that fit the free entries of the layer and
calls the module's own forward once per segment, with the `(cos, sin)` of the segment's slots and the segment's mask;
the module projects, norms, rotates, updates the cache and attends with its own code. The decoder's forward is wrapped
to check the arguments of a call once and to keep it from building a mask over the whole input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from freqkv.cache import FreqKVCache, FreqKVLayer, UnsupportedModelError, geometry, make_config
from freqkv.compressors import Compressor, low_pass_entries
from freqkv.config import FreqKVConfig
from freqkv.rotary import Pairing, SlotRotation, find_pairing, slot_table

__all__ = ["Patch", "patch", "unpatch"]

# A 4-D mask is taken as it is: given one of this shape, a decoder builds none, and wrapped layers make their own.
PLACEHOLDER_SHAPE = (1, 1, 1, 0)
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


def patch(
    model: PreTrainedModel,
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
        A decoder-only model with rotary position embeddings.
    config, window, sink_tokens, retain_ratio, recent_tokens, compressor
        See :class:`FreqKVConfig` and :class:`FreqKVCache`; `FreqKVConfig()` stands for the defaults.

    Returns
    -------
    Patch
        A handle. As a context manager it restores what was there before; printed, it tells how each layer caches.

    Raises
    ------
    UnsupportedModelError
        If the model is no decoder with RoPE and full attention in every layer.
    TypeError, ValueError
        If the numbers cannot work together.
    """
    chosen = make_config(
        config, window=window, sink_tokens=sink_tokens, retain_ratio=retain_ratio, recent_tokens=recent_tokens
    )
    if chosen is None and compressor is not None:
        chosen = FreqKVConfig()
    if chosen is not None:
        chosen = chosen.resolve(model.config)
    shared = _find_shared(model)
    previous = None if shared is None else (shared.config, shared.compressor)
    if shared is None:
        shared = _install(model)
    shared.config, shared.compressor = chosen, compressor or low_pass_entries
    return Patch(model, shared, previous)


def unpatch(model: PreTrainedModel) -> None:
    """Give the model its own forwards back.

    Raises
    ------
    ValueError
        If the model is not patched.
    """
    wrapped = [(module, name, wrapper) for module, name, wrapper in _wrappers(model)]
    if not wrapped:
        raise ValueError("this model is not patched")
    for module, name, wrapper in wrapped:
        if name == wrapper.name and wrapper.replaced is None:
            del module.__dict__[name]
        else:  # the instance had a forward of its own before, or somebody has wrapped ours since
            module.__dict__[name] = wrapper.original


class Patch:
    """Handle of a patched model.

    Attributes
    ----------
    config : FreqKVConfig or None
        The numbers with which calls without a cache run; None if such calls are left alone.
    """

    def __init__(
        self, model: PreTrainedModel, shared: _Shared, previous: tuple[FreqKVConfig | None, Compressor] | None
    ) -> None:
        self.model = model
        self._shared = shared
        self._previous = previous

    @property
    def config(self) -> FreqKVConfig | None:
        return self._shared.config

    def unpatch(self) -> None:
        """Same as `freqkv.unpatch(model)`."""
        unpatch(self.model)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._previous is None:
            self.unpatch()
        else:
            self._shared.config, self._shared.compressor = self._previous

    def __repr__(self) -> str:
        numbers = "calls with a FreqKVCache" if self.config is None else str(self.config)
        lines = [f"freqkv.Patch({type(self.model).__name__}, {numbers})"]
        for layer_idx, (name, pairing) in self._shared.layers.items():
            lines.append(f"  layer {layer_idx}: {name}, keys rotated, {pairing} pairing")
        return "\n".join(lines)


class _Shared:
    """What the wrappers of one model share: the numbers for calls without a cache, slot tables and masks."""

    def __init__(self, model_config: Any, rotary: nn.Module) -> None:
        self.model_config = model_config
        self.geometry = geometry(model_config)
        self.rotary = rotary
        self.config: FreqKVConfig | None = None
        self.compressor: Compressor = low_pass_entries
        self.layers: dict[int, tuple[str, Pairing]] = {}
        self._rotations: dict[Any, SlotRotation] = {}
        self._masks: dict[Any, Any] = {}

    def rotation(self, layer_idx: int, window: int, device: torch.device) -> SlotRotation:
        pairing = self.layers[layer_idx][1]
        key = pairing, window, device
        rotation = self._rotations.get(key)
        if rotation is None:
            rotation = SlotRotation(pairing, *slot_table(self.rotary, window, device))
            self._rotations[key] = rotation
        return rotation

    def mask(self, config: Any, hidden_states: Tensor, held: int) -> Any:
        """The mask of one segment behind `held` entries, as the attention implementation takes it."""
        batch, tokens, _ = hidden_states.shape
        key = config._attn_implementation, batch, tokens, held, hidden_states.dtype, hidden_states.device
        if key not in self._masks:
            # All layers of a call and all steps of a long prompt ask for the same few shapes; more need not be kept.
            kept = self._masks if len(self._masks) < 4 else {}
            with torch.inference_mode(False):  # a mask outlives the call that made it
                like = torch.empty((batch, tokens, 0), dtype=hidden_states.dtype, device=hidden_states.device)
                kept = {**kept, key: create_causal_mask(config, like, None, _Behind(held))}
            self._masks = kept
            return kept[key]
        return self._masks[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rotations": {}, "_masks": {}}  # made anew where the copy lives


class _Behind:
    """Tells `create_causal_mask` that the queries stand behind `held` entries."""

    is_compileable = False

    def __init__(self, held: int) -> None:
        self.held = held

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.held

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.held + query_length, 0


class _Wrapper:
    """Stands in for a method of one instance."""

    def __init__(self, owner: Any, name: str, shared: _Shared) -> None:
        self.shared = shared
        self.name = name
        self.replaced = owner.__dict__.get(name)
        self.original: Callable[..., Any] = getattr(owner, name)
        self.parameters = list(inspect.signature(self.original).parameters)
        self.__wrapped__ = self.original  # what inspect.signature reads
        self.__name__ = name

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs} if args else kwargs


class _AttentionForward(_Wrapper):
    def __init__(self, module: nn.Module, shared: _Shared) -> None:
        super().__init__(module, "forward", shared)
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = self.named(args, kwargs)
        cache = kwargs.get("past_key_values")
        layer_idx: int = self.module.layer_idx  # type: ignore[assignment]
        if isinstance(cache, FreqKVCache):
            layer = cache.layers[layer_idx]
        elif cache is None and self.shared.config is not None:
            layer = FreqKVLayer(self.shared.config, self.shared.compressor, preallocate=False)
            kwargs = {**kwargs, "past_key_values": _OneLayer(layer)}
        elif _is_placeholder(kwargs.get("attention_mask")):
            raise RuntimeError(
                "the FreqKVCache of this forward did not reach its attention layers: gradient checkpointing drops caches. "
                "For training, patch with numbers, freqkv.patch(model, window=...), and pass no cache"
            )
        else:
            return self.original(**kwargs)

        hidden_states: Tensor = kwargs["hidden_states"]
        tokens = hidden_states.shape[1]
        rotation = self.shared.rotation(layer_idx, layer.schedule.window, hidden_states.device)
        dtype = kwargs["position_embeddings"][0].dtype
        outputs = []
        segments = layer.schedule.segments(layer.seen, tokens)
        for segment in segments:
            call = kwargs if len(segments) == 1 else _sliced(kwargs, segment.start, segment.stop, tokens)
            hidden = call["hidden_states"]
            layer.expect(segment, rotation)
            try:
                output = self.original(
                    **{
                        **call,
                        "position_embeddings": rotation.embeddings(segment.slot, segment.entries, dtype),
                        "attention_mask": self.shared.mask(self.module.config, hidden, segment.slot),
                    }
                )
            finally:
                layer.forget_expected()
            outputs.append(output)
        if len(outputs) == 1:
            return outputs[0]
        # Attention weights of different segments are over different entries: they do not add up to one matrix.
        return torch.cat([output[0] for output in outputs], dim=1), *(None for _ in outputs[0][1:])


class _DecoderForward(_Wrapper):
    def __init__(self, decoder: nn.Module, shared: _Shared) -> None:
        super().__init__(decoder, "forward", shared)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = self.named(args, kwargs)
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, FreqKVCache):
            if cache is not None or self.shared.config is None:
                return self.original(**kwargs)
            use_cache = kwargs.get("use_cache")
            if getattr(self.shared.model_config, "use_cache", True) if use_cache is None else use_cache:
                cache = FreqKVCache(self.shared.model_config, self.shared.config, compressor=self.shared.compressor)
                kwargs = {**kwargs, "past_key_values": cache}
        if cache is not None:
            self._check_cache(cache)
            cache.begin_forward()
        self._check_arguments(kwargs, cache)
        output = self.original(**{**kwargs, "attention_mask": torch.empty(PLACEHOLDER_SHAPE)})
        if cache is not None:
            cache.end_forward()
        return output

    def _check_cache(self, cache: FreqKVCache) -> None:
        for what, expected in self.shared.geometry.items():
            if cache.geometry[what] != expected:
                raise ValueError(
                    f"this FreqKVCache was made for a model with {what} {cache.geometry[what]}, this model has "
                    f"{expected}: make it with FreqKVCache(model.config, ...) of the model that uses it"
                )

    def _check_arguments(self, kwargs: dict[str, Any], cache: FreqKVCache | None) -> None:
        inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if inputs is None or (kwargs.get("input_ids") is not None and kwargs.get("inputs_embeds") is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        tokens = inputs.shape[1]
        seen = 0 if cache is None else cache.tokens_seen

        mask = kwargs.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise ValueError(
                    "FreqKV builds its own masks over cache entries and cannot use a custom 4-D attention_mask, whose "
                    "columns are tokens. Pass a 2-D attention_mask of ones, or none"
                )
            if not bool(mask[:, -tokens:].all()):
                raise ValueError(
                    "attention_mask has zeros: FreqKV does not serve padded batches so far. Pass rows of equal length, "
                    "or one row at a time"
                )
        packing = [name for name in PACKING_ARGUMENTS if kwargs.get(name) is not None]
        if packing:
            raise ValueError(
                f"packed sequences ({', '.join(packing)}) share one cache, and FreqKV would compress them into each "
                "other. Pass each sequence as a row of its own"
            )
        positions = kwargs.get("position_ids")
        if positions is not None and tokens > 1:  # a single position cannot restart, and looking costs a device sync
            counted = torch.arange(seen, seen + tokens, device=positions.device)
            if not bool((positions == counted).all()):
                raise ValueError(
                    f"position_ids must count the tokens of each row, here from {seen} to {seen + tokens - 1}: "
                    "positions that restart (packed sequences) or jump are not supported, since FreqKV rotates keys at "
                    "their slots. Leave position_ids out, and pass each sequence as a row of its own"
                )
        config = self.shared.model_config
        wants_attentions = kwargs.get("output_attentions")
        if getattr(config, "output_attentions", False) if wants_attentions is None else wants_attentions:
            numbers = self.shared.config if cache is None else cache.config
            assert numbers is not None
            if len(numbers.schedule.segments(seen, tokens)) > 1:
                raise ValueError(
                    "output_attentions: the weights of a call that is compressed half-way are over different entries "
                    f"and do not form one matrix. Feed at most {numbers.schedule.segments(seen, tokens)[0].stop} tokens "
                    "now, or leave output_attentions out"
                )


class _PrepareCacheForGeneration(_Wrapper):
    """With numbers, `generate` gets a FreqKVCache where it would have made a DynamicCache."""

    def __init__(self, model: PreTrainedModel, shared: _Shared) -> None:
        super().__init__(model, "_prepare_cache_for_generation", shared)

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if (
            self.shared.config is not None
            and model_kwargs.get("past_key_values") is None
            and generation_config.use_cache is not False
            and generation_config.cache_implementation is None
        ):
            model_kwargs["past_key_values"] = FreqKVCache(
                self.shared.model_config, self.shared.config, compressor=self.shared.compressor
            )
        return self.original(generation_config, model_kwargs, *args, **kwargs)


class _OneLayer:
    """The cache of one attention call: hands its layer to whatever index the module names."""

    def __init__(self, layer: FreqKVLayer) -> None:
        self.layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.layer.update(key_states, value_states)


class _Recorder:
    """A cache that keeps what a module wants to store."""

    keys: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys = key_states
        return key_states, value_states


def _sliced(kwargs: dict[str, Any], start: int, stop: int, tokens: int) -> dict[str, Any]:
    """Arguments of tokens `[start, stop)`: whatever is `(batch, tokens, ...)` is sliced, all else passed on."""

    def per_token(name: str, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == tokens and name != "attention_mask"

    return {name: value[:, start:stop] if per_token(name, value) else value for name, value in kwargs.items()}


def _is_placeholder(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.shape == PLACEHOLDER_SHAPE


def _wrappers(model: nn.Module) -> Iterator[tuple[nn.Module, str, _Wrapper]]:
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, _Wrapper):
                yield module, name, value


def _find_shared(model: nn.Module) -> _Shared | None:
    return next((wrapper.shared for _, _, wrapper in _wrappers(model)), None)


def _install(model: PreTrainedModel) -> _Shared:
    family = f"{type(model).__name__} (model type {getattr(model.config, 'model_type', 'unknown')!r})"
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{family} is an encoder-decoder; FreqKV compresses the cache of decoder-only models. Use transformers' "
            "EncoderDecoderCache for it"
        )
    attentions = {name: module for name, module in model.named_modules() if _is_attention(module)}
    decoder, rotary = _find_rotary(model)
    if not attentions or rotary is None or decoder is None:
        raise UnsupportedModelError(
            f"{family} has no rotary position embeddings that its decoder hands to its attention layers: FreqKV moves keys "
            "between positions by RoPE, which learned, ALiBi or relative positions do not allow. Use transformers' "
            "DynamicCache for it"
        )
    FreqKVCache(model.config, FreqKVConfig(window=16))  # raises by name where a layer is not full attention

    config = model.config.get_text_config(decoder=True)
    shared = _Shared(config, rotary)
    for name, module in attentions.items():
        pairing = _calibrate(module, rotary)
        if pairing is None:
            raise UnsupportedModelError(
                f"{family} rotates the keys of {name} in a way that FreqKV does not know (neither half nor interleaved "
                "pairing explains them). Use transformers' DynamicCache for it, and report the family"
            )
        shared.layers[int(module.layer_idx)] = name, pairing  # type: ignore[arg-type]
    if sorted(shared.layers) != list(range(config.num_hidden_layers)):
        raise UnsupportedModelError(
            f"{family} has {config.num_hidden_layers} layers, but attention modules were found for {sorted(shared.layers)} "
            "only. Use transformers' DynamicCache for it, and report the family"
        )
    for module in attentions.values():
        module.__dict__["forward"] = _AttentionForward(module, shared)
    decoder.__dict__["forward"] = _DecoderForward(decoder, shared)
    if hasattr(model, "_prepare_cache_for_generation"):
        model.__dict__["_prepare_cache_for_generation"] = _PrepareCacheForGeneration(model, shared)
    return shared


def _is_attention(module: nn.Module) -> bool:
    if not isinstance(getattr(module, "layer_idx", None), int):
        return False
    parameters = inspect.signature(module.forward).parameters
    return {"hidden_states", "position_embeddings", "past_key_values"} <= set(parameters) and not any(
        _is_attention(child) for child in module.children()
    )


def _find_rotary(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The module that turns positions into `(cos, sin)`, and its parent, the decoder."""
    for parent in model.modules():
        for child in parent.children():
            if hasattr(child, "inv_freq") and "position_ids" in inspect.signature(child.forward).parameters:
                return parent, child
    return None, None


@torch.no_grad()
def _calibrate(module: nn.Module, rotary: nn.Module) -> Pairing | None:
    """Replay a few tokens with and without rotation, and see what the module does to its keys."""
    config: Any = module.config
    weight = next(p for p in module.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 5, config.hidden_size, generator=generator).to(weight.device, weight.dtype)
    cos, sin = slot_table(rotary, hidden.shape[1], weight.device)
    recorded = []
    implementation = config._attn_implementation
    config._attn_implementation = "eager"  # others may compile, or take half precision only
    devices = [weight.device] if weight.device.type == "cuda" else []
    try:
        for embeddings in ((torch.ones_like(cos), torch.zeros_like(sin)), (cos, sin)):
            recorder = _Recorder()
            with torch.random.fork_rng(devices):  # dropout of a model in training draws numbers
                module(
                    hidden_states=hidden,
                    position_embeddings=tuple(t[None].to(hidden.dtype) for t in embeddings),
                    attention_mask=None,
                    past_key_values=recorder,
                )
            recorded.append(recorder.keys)
    finally:
        config._attn_implementation = implementation
    raw, rotated = recorded
    return find_pairing(raw, rotated, cos, sin)
