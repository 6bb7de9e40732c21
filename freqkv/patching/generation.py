"""What `generate` asks a patched model for: a cache, and the inputs of each forward."""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import Tensor, nn

from freqkv.cache import FreqKVCache
from freqkv.hiding import hidden_tokens
from freqkv.models.upstream import (
    CACHE,
    PREPARE_CACHE,
    PREPARE_INPUTS,
    Cache,
    GenerationMixin,
    cache_of,
    renamed,
)
from freqkv.patching.methods import Method
from freqkv.patching.state import PatchState, Wrapper

__all__ = ["PrepareCache", "PrepareInputs"]

logger = logging.getLogger(__name__)


class PrepareCache(Wrapper):
    """With settings, `generate` gets a FreqKVCache where it would have made a DynamicCache."""

    name = PREPARE_CACHE

    def __call__(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        named = self.named(args, kwargs)
        generation_config, model_kwargs = named["generation_config"], named["model_kwargs"]
        if (
            self.state.settings is not None
            and cache_of(model_kwargs) is None
            and generation_config.use_cache is not False
        ):
            if (
                self.state.drops_caches()
            ):  # before 5.24, in any training mode: the whole text is fed at each step, as unpatched
                generation_config.use_cache = model_kwargs["use_cache"] = False
            elif generation_config.cache_implementation is not None:
                _warn_implementation(generation_config.cache_implementation)
            else:
                cache = model_kwargs[CACHE] = self.state.new_cache()
                if generation_config.is_assistant:  # its drafts may be rejected
                    cache.activate_past_recording()
        return original(*args, **kwargs)


class CacheLengths(Cache):
    """Stands in for a cache while inputs are prepared: caches that are compiled get masks made there, FreqKV makes its own."""

    is_compileable = False

    def __init__(self, cache: FreqKVCache) -> None:
        Cache.__init__(self, layers=cache.layers)
        self.tokens_seen = cache.tokens_seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens_seen


class PrepareInputs(Wrapper):
    """What a forward of `generate` is fed goes on where the cache ends."""

    name = PREPARE_INPUTS

    def __init__(self, model: nn.Module, state: PatchState) -> None:
        super().__init__(model, state)
        self.model = model

    def __call__(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        cache = cache_of(kwargs)
        if not isinstance(cache, FreqKVCache):
            return original(*args, **kwargs)
        cache.check_usable()  # before its lengths are looked at
        lengths = CacheLengths(cache)
        kwargs = {**renamed(kwargs, self.cache_name), self.cache_name: lengths}
        inputs = original(*args, **kwargs)
        if cache_of(inputs) is not lengths:
            # Phi-3 drops its cache where a text grows to the length from which its frequencies change; those of slots do not.
            inputs = getattr(GenerationMixin, self.name)(self.model, *args, **kwargs)
        inputs = {name: cache if value is lengths else value for name, value in inputs.items()}
        _check_continues(inputs, cache.tokens_seen)
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
    history = cache.history
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= seen:
        hidden = hidden_tokens(cache, mask[:, :seen].bool())
        history = history if hidden is None else history.without(hidden.columns)
    if not history.begins(ids, mask):
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


@functools.cache
def _warn_implementation(implementation: str) -> None:
    logger.warning(
        "cache_implementation=%r, of the call or of model.generation_config, asks for a cache of transformers: such calls run "
        "without FreqKV, and what freqkv.patch was given (window, ...) does not hold for them. Set it to None",
        implementation,
    )
