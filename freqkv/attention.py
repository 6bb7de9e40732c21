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
from transformers.generation import GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask

from freqkv.cache import FreqKVCache, FreqKVLayer, UnsupportedModelError
from freqkv.compressors import Compressor, check_compressor, low_pass_entries
from freqkv.config import FreqKVConfig, geometry, make_config
from freqkv.rotary import Pairing, SlotRotation, find_pairing, slot_table

__all__ = ["Patch", "patch", "unpatch"]

# What a wrapped decoder tells its wrapped layers, by the shape of an empty mask: a 4-D mask is taken as it is, so that the
# decoder builds none, and it also reaches layers that gradient checkpointing runs again.
CACHED, UNCACHED = (1, 1, 1, 0), (1, 1, 2, 0)
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
    return Patch(model, chosen, low_pass_entries if compressor is None else check_compressor(compressor))


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
        wrapper.shared.config = None  # for those who keep the wrapper elsewhere
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

    def __init__(self, model: PreTrainedModel, config: FreqKVConfig | None, compressor: Compressor) -> None:
        self.model = model
        self._numbers = config, compressor
        self._apply()

    def _apply(self) -> None:
        shared = _find_shared(self.model)
        self._previous = None if shared is None else (shared.config, shared.compressor)
        self._shared = _analyse(self.model) if shared is None else shared
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
        numbers = "calls with a FreqKVCache" if self.config is None else str(self.config)
        lines = [f"freqkv.Patch({type(self.model).__name__}, {numbers})"]
        for layer_idx, (name, pairing) in self._shared.layers.items():
            lines.append(f"  layer {layer_idx}: {name}, keys rotated, {pairing} pairing")
        return "\n".join(lines)


class _Shared:
    """What the wrappers of one model share: the numbers for calls without a cache, slot tables and masks."""

    def __init__(self, model_config: Any, decoder: nn.Module, rotary_name: str) -> None:
        self.model_config = model_config
        self.geometry = geometry(model_config)
        self.decoder = decoder
        self.rotary_name = rotary_name
        self.config: FreqKVConfig | None = None
        self.compressor: Compressor = low_pass_entries
        self.layers: dict[int, tuple[str, Pairing]] = {}
        self._rotations: dict[Any, tuple[Tensor, SlotRotation]] = {}
        self._masks: dict[Any, Any] = {}

    def rotation(self, layer_idx: int, window: int, device: torch.device) -> SlotRotation:
        """The slots of one layer; made anew when the rotary module, or what `model.to(...)` made of it, is another."""
        rotary = getattr(self.decoder, self.rotary_name)
        frequencies = getattr(rotary, "original_inv_freq", rotary.inv_freq)
        pairing = self.layers[layer_idx][1]
        key = pairing, window, device
        known = self._rotations.get(key)
        if known is None or known[0] is not frequencies:
            known = frequencies, SlotRotation(pairing, *slot_table(rotary, window, device))
            self._rotations[key] = known
        return known[1]

    def mask(self, config: Any, hidden_states: Tensor, held: int) -> Any:
        """The mask of one segment behind `held` entries, for all rows, as the attention implementation takes it."""
        tokens, dtype, device = hidden_states.shape[1], hidden_states.dtype, hidden_states.device
        key = config._attn_implementation, tokens, held, dtype, device
        masks = self._masks
        if key not in masks:
            if config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
                raise ValueError(
                    f"attn_implementation={config._attn_implementation!r} has no mask function, so that FreqKV cannot tell it "
                    "what a segment may see: register one with transformers.AttentionMaskInterface.register, or use "
                    "eager, sdpa, flex_attention or flash_attention_2"
                )
            # All layers of a call and all steps of a long prompt ask for the same few shapes; more need not be kept.
            with torch.inference_mode(False):
                mask = create_causal_mask(
                    config, torch.empty((1, tokens, 0), dtype=dtype, device=device), None, _Behind(held)
                )
            self._masks = masks = {**(masks if len(masks) < 4 else {}), key: mask}
        return masks[key]

    def new_cache(self) -> FreqKVCache:
        """A cache of the numbers for calls that bring none."""
        return FreqKVCache(self.model_config, self.config, compressor=self.compressor)

    def new_layer(self) -> FreqKVLayer:
        """A layer of the numbers that lives for one call of an attention module."""
        assert self.config is not None
        return FreqKVLayer(self.config, self.compressor, preallocate=False)

    def drop_masks(self) -> None:
        """Called when a forward ends: masks are made for a call, not for the model's life."""
        self._masks = {}

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
        mode = _mode(kwargs.get("attention_mask"))
        if isinstance(cache, FreqKVCache) and mode == CACHED:
            layer = cache.layers[layer_idx]
        elif cache is None and mode == UNCACHED and self.shared.config is not None:
            layer = self.shared.new_layer()
            kwargs = {**kwargs, "past_key_values": _OneLayer(layer)}
        elif mode == CACHED:
            raise RuntimeError(
                "the FreqKVCache of this forward did not reach its attention layers: gradient checkpointing drops caches. "
                "For training, patch with numbers, freqkv.patch(model, window=...), and pass no cache"
            )
        elif mode == UNCACHED or isinstance(cache, FreqKVCache):
            raise RuntimeError(
                "only a part of this model is patched, or it was unpatched between forward and backward: call "
                "freqkv.patch(model) on the whole model, before the forward"
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
        if cache is None and self.shared.config is not None:
            use_cache = kwargs.get("use_cache")
            if use_cache is None:
                use_cache = getattr(self.shared.model_config, "use_cache", True)
            if use_cache and not self.shared.decoder.training:  # training has no use for one
                cache = self.shared.new_cache()
            kwargs = {**kwargs, "past_key_values": cache, "use_cache": cache is not None}
        elif not isinstance(cache, FreqKVCache):
            return self.original(**kwargs)
        if cache is not None:
            self._check_cache(cache)
            cache.begin_forward()
        self._check_arguments(kwargs, cache)
        mode = UNCACHED if cache is None else CACHED
        try:
            output = self.original(**{**kwargs, "attention_mask": torch.empty(mode)})
        finally:
            self.shared.drop_masks()
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
        batch, tokens = inputs.shape[:2]
        seen = 0 if cache is None else cache.tokens_seen
        if tokens == 0:
            raise ValueError(
                f"the input has no new tokens, the cache has seen {seen}: generate takes the whole conversation as its input "
                "and leaves out what the cache has seen. For another conversation, use another cache or reset()"
            )
        if cache is not None and kwargs.get("use_cache") is False:
            raise ValueError("use_cache=False and a FreqKVCache contradict each other: leave one of them out")

        _check_mask(kwargs.get("attention_mask"), batch, seen, tokens)
        _check_not_packed(kwargs, seen, tokens)
        config = self.shared.model_config
        wants_attentions = kwargs.get("output_attentions")
        if getattr(config, "output_attentions", False) if wants_attentions is None else wants_attentions:
            layer = self.shared.new_layer() if cache is None else cache.layers[0]
            segments = layer.schedule.segments(seen, tokens)
            if len(segments) > 1:
                raise ValueError(
                    "output_attentions: the weights of a call that is compressed half-way are over different entries "
                    f"and do not form one matrix. Feed at most {segments[0].stop} tokens now, or leave "
                    "output_attentions out"
                )


def _check_mask(mask: Any, batch: int, seen: int, tokens: int) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError(
            "FreqKV builds its own masks over cache entries and cannot use a custom 4-D attention_mask, whose "
            "columns are tokens. Pass a 2-D attention_mask of ones, or none"
        )
    if mask.shape != (batch, seen + tokens):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but there are {batch} rows of {seen} tokens in the cache "
            f"and {tokens} new ones: pass one of shape {(batch, seen + tokens)}, or none"
        )
    if not bool(mask.all()):
        raise ValueError(
            "attention_mask has zeros: FreqKV does not serve padded batches so far. Pass rows of equal length, "
            "or one row at a time"
        )


def _check_not_packed(kwargs: dict[str, Any], seen: int, tokens: int) -> None:
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
            model_kwargs["past_key_values"] = self.shared.new_cache()
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


def _mode(mask: Any) -> tuple[int, ...] | None:
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else None
    return shape if shape in (CACHED, UNCACHED) else None


def _wrappers(model: nn.Module) -> Iterator[tuple[nn.Module, str, _Wrapper]]:
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, _Wrapper):
                yield module, name, value


def _find_shared(model: nn.Module) -> _Shared | None:
    return next((wrapper.shared for _, _, wrapper in _wrappers(model)), None)


def _wrap(model: nn.Module, shared: _Shared) -> None:
    """Wrap whatever is not wrapped yet: a part of the model may have been patched, or unpatched, by itself."""
    wrapped = {(module, wrapper.name) for module, _, wrapper in _wrappers(model)}
    for module in list(model.modules()):
        if _is_attention(module) and (module, "forward") not in wrapped:
            module.__dict__["forward"] = _AttentionForward(module, shared)
        if module is shared.decoder and (module, "forward") not in wrapped:
            module.__dict__["forward"] = _DecoderForward(module, shared)
        name = "_prepare_cache_for_generation"
        if isinstance(module, GenerationMixin) and (module, name) not in wrapped:
            module.__dict__[name] = _PrepareCacheForGeneration(module, shared)


def _analyse(model: PreTrainedModel) -> _Shared:
    """Find out how the model rotates and caches its keys, or refuse it."""
    family = f"{type(model).__name__} (model type {getattr(model.config, 'model_type', 'unknown')!r})"
    instead = "Use transformers' DynamicCache for it"
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{family} is an encoder-decoder; FreqKV compresses the cache of decoder-only models. Use transformers' "
            "EncoderDecoderCache for it"
        )
    attentions = {name: module for name, module in model.named_modules() if _is_attention(module)}
    decoder, rotary_name = _find_rotary(model, attentions)
    if decoder is None:
        if any(_is_rotary(module) for module in model.modules()):
            raise UnsupportedModelError(
                f"{family} has rotary position embeddings, but does not hand them to its attention layers as "
                f"position_embeddings, together with past_key_values, which is all that FreqKV serves so far. {instead}"
            )
        raise UnsupportedModelError(
            f"{family} has no rotary position embeddings: FreqKV moves keys between positions by RoPE, which learned, ALiBi "
            f"or relative positions do not allow. {instead}"
        )
    FreqKVCache(model.config, FreqKVConfig(window=16))  # raises by name where a layer is not full attention

    config = model.config.get_text_config(decoder=True)
    shared = _Shared(config, decoder, rotary_name)
    for name, module in attentions.items():
        try:
            pairing = _calibrate(module, getattr(decoder, rotary_name), model.dtype)
        except Exception as error:
            raise UnsupportedModelError(
                f"{family}: a few tokens could not be run through {name} alone, to see how it rotates its keys "
                f"({type(error).__name__}: {error}). {instead}"
            ) from error
        if pairing is None:
            raise UnsupportedModelError(
                f"{family} rotates the keys of {name} in a way that FreqKV does not know (neither half nor interleaved "
                f"pairing explains what it caches). {instead}"
            )
        shared.layers[int(module.layer_idx)] = name, pairing  # type: ignore[arg-type]
    if sorted(shared.layers) != list(range(config.num_hidden_layers)):
        raise UnsupportedModelError(
            f"{family} has {config.num_hidden_layers} layers, but attention modules were found for {sorted(shared.layers)} "
            f"only. {instead}"
        )
    return shared


def _is_attention(module: nn.Module) -> bool:
    if not isinstance(getattr(module, "layer_idx", None), int):
        return False
    parameters = inspect.signature(module.forward).parameters
    return {"hidden_states", "position_embeddings", "past_key_values"} <= set(parameters) and not any(
        _is_attention(child) for child in module.children()
    )


def _is_rotary(module: nn.Module) -> bool:
    return hasattr(module, "inv_freq") and "position_ids" in inspect.signature(module.forward).parameters


def _find_rotary(model: nn.Module, attentions: dict[str, nn.Module]) -> tuple[nn.Module | None, str]:
    """The nearest module around the attention modules that owns a rotary module: the decoder; and the rotary's name."""
    for name in attentions:
        while name:
            name = name.rpartition(".")[0]
            decoder = model.get_submodule(name)
            for child_name, child in decoder.named_children():
                if _is_rotary(child):
                    return decoder, child_name
    return None, ""


@torch.no_grad()
def _calibrate(module: nn.Module, rotary: nn.Module, dtype: torch.dtype) -> Pairing | None:
    """Replay a few tokens with and without rotation, and see what the module does to its keys."""
    config: Any = module.config
    hook = getattr(module, "_hf_hook", None)  # of accelerate, where weights are elsewhere between calls
    device = torch.device(getattr(hook, "execution_device", None) or next(module.parameters()).device)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 5, config.hidden_size, generator=generator).to(device, dtype)
    cos, sin = (t.to(dtype) for t in slot_table(rotary, hidden.shape[1], device))
    recorded = []
    implementation = config._attn_implementation
    config._attn_implementation = "eager"  # others may compile, or take half precision only
    devices = [device] if device.type == "cuda" else []
    try:
        for embeddings in ((torch.ones_like(cos), torch.zeros_like(sin)), (cos, sin)):
            recorder = _Recorder()
            with torch.random.fork_rng(devices):  # dropout of a model in training draws numbers
                module.forward(
                    hidden_states=hidden,
                    position_embeddings=tuple(t[None] for t in embeddings),
                    attention_mask=None,
                    past_key_values=recorder,
                )
            recorded.append(recorder.keys)
    finally:
        config._attn_implementation = implementation
    raw, rotated = recorded
    return find_pairing(raw, rotated, cos, sin)
