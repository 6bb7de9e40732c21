"""The forwards of the decoder and of the models around it: where a call of FreqKV begins and ends.

The outermost model begins a :class:`Forward` and hands it on in the place of the cache; the decoder checks its arguments and
keeps itself from building a mask over the whole input.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from freqkv.cache import FreqKVCache
from freqkv.compiled import CompiledStep, uncompiled
from freqkv.forward import Forward, Request, returned, run
from freqkv.models.adapters import check_whole_call
from freqkv.models.upstream import Cache, cache_of, renamed, takes_dense_masks
from freqkv.patching.inputs import check_cache, check_decoder_arguments, is_not_text, request_of, tokens_of, wants
from freqkv.patching.masks import no_mask
from freqkv.patching.methods import Method
from freqkv.patching.right_padding import RightPadded
from freqkv.patching.state import PatchState, Wrapper

__all__ = ["DecoderForward", "ModelForward"]

logger = logging.getLogger(__name__)


class ModelForward(Wrapper):
    """Stands in for the forward of a model around the decoder, such as one with images, or with the language model head.

    Such a model may turn the mask that a caller gave into others before the decoder sees it, and asks the cache how large
    they are. So the outermost one looks at what the caller gave, and begins the forward of the cache.
    """

    def __init__(self, module: nn.Module, state: PatchState) -> None:
        super().__init__(module, state)
        self.module = module

    def __call__(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        named = self.named(args, kwargs)
        cache = cache_of(named)
        if isinstance(cache, (Forward, CompiledStep)):
            return self._inside(original, renamed(named, self.cache_name), cache)
        if not isinstance(cache, FreqKVCache):
            if cache is not None or self.state.settings is None:
                self._check_other(cache)
                return original(*args, **kwargs)
            return self._without_cache(original, named)
        named = renamed(named, self.cache_name)
        if cache.static:
            return self._static(original, named, cache)
        if torch.compiler.is_compiling():
            return self._uncompiled(original, named, cache, warn=True)
        return self._with_cache(original, named, cache)

    def _inside(self, original: Method, kwargs: dict[str, Any], forward: Forward | CompiledStep) -> Any:
        """Within the forward of a model around this one."""
        return original(**kwargs)

    def _with_cache(self, original: Method, kwargs: dict[str, Any], cache: FreqKVCache) -> Any:
        """A forward of the cache, from its begin to its end."""
        check_cache(cache, self.state)
        inputs = tokens_of(kwargs)
        if inputs is None:
            return original(**kwargs)  # raises in its own words
        forward = cache.forward_class(request_of(kwargs, inputs, cache, self.state), cache)
        return run(forward, lambda stand_in: self._begun(original, {**kwargs, self.cache_name: stand_in}, stand_in))

    def _begun(self, original: Method, kwargs: dict[str, Any], forward: Forward) -> Any:
        """Within a forward that this model has begun."""
        return original(**kwargs)

    def _without_cache(self, original: Method, kwargs: dict[str, Any]) -> Any:
        """A call with settings that brings no cache: the decoder inside is told what this model was called with."""
        inputs = tokens_of(kwargs)
        if inputs is None:
            return original(**kwargs)
        forward = Forward(request_of(kwargs, inputs, None, self.state))
        kwargs = {**renamed(kwargs, self.cache_name), self.cache_name: forward}
        return returned(original(**kwargs), forward, None)

    def _check_other(self, cache: Any) -> None:
        """Warn, or raise ValueError, where a call with another cache, or None, is not what it seems to be."""
        expected = cache is None or self.state.settings is None or isinstance(cache, Cache)
        if not expected and not torch.compiler.is_compiling():
            _warn_other(type(cache).__name__)

    def _static(self, original: Method, kwargs: dict[str, Any], cache: FreqKVCache) -> Any:
        """A call with a cache for compiled graphs: a single token has one, all else is not compiled."""
        request = self._begin_step(kwargs, cache)
        if request is None:
            return self._uncompiled(original, kwargs, cache)
        step = cache.compiled_step
        assert step is not None
        output = self._inside(original, {**kwargs, self.cache_name: step}, step)
        return self._end_step(cache, request, output)

    @uncompiled
    def _begin_step(self, kwargs: dict[str, Any], cache: FreqKVCache) -> Request | None:
        """Begin a single token for all rows where there is nothing else to heed; else None."""
        inputs = tokens_of(kwargs)
        config = self.state.model_config
        if inputs is None or not (
            inputs.shape[1] == 1
            and not torch.is_grad_enabled()
            and cache.row_tokens is None
            and cache.is_filled(inputs.shape[0], inputs.device)
            and takes_dense_masks(config._attn_implementation)
            and not wants(kwargs, config, "output_attentions")
            and not any(is_not_text(name, value) for name, value in kwargs.items())
        ):
            return None
        check_cache(cache, self.state)
        request = request_of(kwargs, inputs, cache, self.state)
        if request.token_mask is not None or request.mask_given or request.hidden is not None:
            return None
        if not self.state.has_one_module_per_layer:
            raise ValueError(
                "static=True needs a model each of whose attention modules has one cache layer; here some serve several. "
                "Leave it out"
            )
        tables, window, device = self.state.tables, cache.longest_window, inputs.device
        assert cache.compiled_step is not None
        cache.compiled_step.begin(cache, tables.embeddings(window, device), lambda: tables.rotations(window, device))
        return request

    @uncompiled
    def _end_step(self, cache: FreqKVCache, request: Request, output: Any) -> Any:
        assert cache.compiled_step is not None
        cache.compiled_step.commit(cache, request)
        return returned(output, cache.compiled_step, cache)

    @uncompiled
    def _uncompiled(self, original: Method, kwargs: dict[str, Any], cache: FreqKVCache, warn: bool = False) -> Any:
        if warn:
            _warn_not_static()
        return self._with_cache(original, kwargs, cache)


class DecoderForward(ModelForward):
    """Stands in for the forward of the decoder."""

    def _inside(self, original: Method, kwargs: dict[str, Any], forward: Forward | CompiledStep) -> Any:
        if isinstance(forward, CompiledStep):
            config = self.state.model_config
            return original(**{**kwargs, "attention_mask": forward.mask(config._attn_implementation)})
        if forward.cache is None:
            return self._unknown_cache(original, kwargs, forward.request, inside=True)
        return self._in_forward(original, kwargs, forward, inside=True)

    def _begun(self, original: Method, kwargs: dict[str, Any], forward: Forward) -> Any:
        return self._in_forward(original, kwargs, forward, inside=False)

    def _without_cache(self, original: Method, kwargs: dict[str, Any]) -> Any:
        return self._unknown_cache(original, renamed(kwargs, self.cache_name), None, inside=False)

    def _unknown_cache(self, original: Method, kwargs: dict[str, Any], request: Request | None, inside: bool) -> Any:
        """A call that brings no cache: one is made, if it is to be returned."""
        use_cache = kwargs.get("use_cache") if request is None else request.use_cache
        if use_cache is None:  # training has no use for one
            use_cache = getattr(self.state.model_config, "use_cache", True) and not self.module.training
        keeps = bool(use_cache) and not self.state.drops_caches()
        kwargs = {**kwargs, self.cache_name: None, "use_cache": keeps}
        inputs = self._one_input(kwargs)
        if request is None:
            request = request_of({**kwargs, "use_cache": None}, inputs, None, self.state)
        if not keeps:
            return self._uncached(original, kwargs, request, inputs.shape[1], inside)
        cache = self.state.new_cache()
        forward = cache.forward_class(request, cache)
        return run(
            forward,
            lambda stand_in: self._in_forward(original, {**kwargs, self.cache_name: stand_in}, stand_in, inside),
        )

    def _one_input(self, kwargs: dict[str, Any]) -> Tensor:
        inputs = tokens_of(kwargs)
        if inputs is None or (kwargs.get("input_ids") is not None and kwargs.get("inputs_embeds") is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        return inputs

    def _in_forward(self, original: Method, kwargs: dict[str, Any], forward: Forward, inside: bool) -> Any:
        """The decoder within the forward of a cache."""
        if self.state.drops_caches():
            raise RuntimeError(
                "this FreqKVCache would not reach the attention layers: gradient checkpointing drops caches. For training, "
                "patch with a config, freqkv.patch(model, window=...), and pass no cache"
            )
        tokens = self._one_input(kwargs).shape[1]
        check_decoder_arguments(kwargs, tokens, forward.request, forward, self.state, inside)
        forward.enter_decoder(tokens, wants(kwargs, self.state.model_config, "output_attentions"))
        if self.state.makes_all_masks and not forward.request.mask_given:
            kwargs = {**kwargs, "attention_mask": no_mask()}
        try:
            return original(**kwargs)
        finally:
            self.state.masks.clear()

    def _uncached(self, original: Method, kwargs: dict[str, Any], request: Request, tokens: int, inside: bool) -> Any:
        """The decoder over a whole input, of which nothing is kept."""
        check_decoder_arguments(kwargs, tokens, request, None, self.state, inside)
        aligned = None
        if request.token_mask is not None:
            for layer in self.state.analysis.layers:  # tokens are moved
                check_whole_call(layer.module, rows=True, tokens=False)
            aligned = RightPadded(request.token_mask)
            kwargs = aligned.apply(kwargs)
        if self.state.makes_all_masks and not request.mask_given:
            # Padding stands behind all tokens, none of which sees it.
            kwargs = {**kwargs, "attention_mask": None if self.state.fits(tokens) else no_mask()}
        try:
            output = original(**kwargs)
            return output if aligned is None else aligned.undo(output)
        finally:
            self.state.masks.clear()

    def _check_other(self, cache: Any) -> None:
        super()._check_other(cache)
        if self.state.settings is not None and cache is not None and self.state.drops_caches():
            raise ValueError(
                f"{self.cache_name} is a {type(cache).__name__}, which gradient checkpointing drops on the way to "
                "attention layers, so that they could not tell that it was there. Pass no cache in training"
            )


@functools.cache
def _warn_other(kind: str) -> None:
    logger.warning(
        "a %s, as continuous batching (generate_batch) brings, keeps entries in a way of its own: such calls run without "
        "FreqKV, and what freqkv.patch was given (window, ...) does not hold for them",
        kind,
    )


@functools.cache
def _warn_not_static() -> None:
    logger.warning(
        "this model is compiled, but calls with this FreqKVCache run uncompiled. Make it with static=True, so that single "
        "tokens are compiled once"
    )
