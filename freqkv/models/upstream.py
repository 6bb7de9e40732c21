"""The names and signatures of transformers that FreqKV depends on. When a release renames one, only this module changes.

Names are listed newest first. `missing()` compares the installed release with what FreqKV needs. `freqkv.patch` and
`freqkv.supported` call it first, so that a release without something is refused and does not give wrong results.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

__all__ = [
    "ATTENTION_CACHE_NAMES",
    "ATTENTION_REGISTRY",
    "CACHE",
    "CACHE_NAMES",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "DynamicLayer",
    "EAGER_ATTENTION",
    "GenerationMixin",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionLayer",
    "MASK_FUNCTIONS",
    "PREPARE_CACHE",
    "PREPARE_INPUTS",
    "TESTED",
    "cache_name",
    "cache_of",
    "causal_mask",
    "check_crop",
    "config_with_attention",
    "dense_mask",
    "frequencies",
    "is_rotary",
    "missing",
    "outdated",
    "recording_attention",
    "renamed",
    "takes_dense_masks",
]

# The oldest and the newest release that FreqKV is tested with; README says the same.
TESTED = "5.17", "5.24"

# The names of the cache: as an argument of models, of mask functions and of `generate`, and in the outputs of models.
CACHE_NAMES = "cache", "past_key_values"
# Older attention modules use one more name.
ATTENTION_CACHE_NAMES = *CACHE_NAMES, "layer_past"
# Methods of a model that `generate` calls before its first forward and before each one.
PREPARE_CACHE = "_prepare_cache_for_generation"
PREPARE_INPUTS = "prepare_inputs_for_generation"
# The attributes in which accelerate keeps its hook on a module, and the forward that the hook calls.
HOOK, HOOKED_FORWARD = "_hf_hook", "_old_forward"
RELEASE = Version(transformers.__version__)
# Whether gradient checkpointing takes the cache away from layers only where gradients are computed.
CHECKPOINTS_WITH_GRADIENTS_ONLY = Version("5.24") <= RELEASE
# Under which name a module of modeling code finds the registry of attention functions, and its own one for "eager".
ATTENTION_REGISTRY, EAGER_ATTENTION = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"
# What FreqKV appends to the name of an attention implementation that records queries, and where a module keeps who wants them.
RECORDING, RECORDER = "_freqkv_recording", "_freqkv_recorder"
# Buffers of rotary modules: the frequencies; or a table of all positions, `[sin | cos]`; and the first frequencies, kept by
# RoPE types that change them with the length of the input.
FREQUENCIES = "inv_freq"
SINUSOIDS = "embed_positions"
ORIGINAL_FREQUENCIES = "original_inv_freq"

# The first parameters of what FreqKV calls or overrides: name of the module, of the function in it, its parameters, in which
# `CACHE` stands for any of CACHE_NAMES.
SEAM = (
    ("cache_utils", "Cache.__init__", ("self", "layers")),
    ("cache_utils", "Cache.update", ("self", "key_states", "value_states", "layer_idx", "args", "kwargs")),
    ("cache_utils", "Cache.get_mask_sizes", ("self", "query_length", "layer_idx")),
    ("cache_utils", "Cache.get_query_offset", ("self", "layer_idx")),
    ("cache_utils", "Cache.get_seq_length", ("self", "layer_idx")),
    ("cache_utils", "Cache.crop", ("self", "tokens_to_remove")),
    ("cache_utils", "Cache.reorder_cache", ("self", "beam_idx")),
    ("cache_utils", "Cache.batch_repeat_interleave", ("self", "repeats")),
    ("cache_utils", "Cache.batch_select_indices", ("self", "indices")),
    ("cache_utils", "Cache.activate_past_recording", ("self",)),
    ("cache_utils", "Cache.update_conv_state", ("self", "conv_states", "layer_idx")),
    ("cache_utils", "Cache.update_recurrent_state", ("self", "recurrent_states", "layer_idx")),
    ("cache_utils", "CacheLayerMixin.update", ("self", "key_states", "value_states", "args", "kwargs")),
    ("cache_utils", "CacheLayerMixin.lazy_initialization", ("self", "key_states", "value_states")),
    ("cache_utils", "CacheLayerMixin.get_mask_sizes", ("self", "query_length")),
    ("cache_utils", "LinearAttentionLayer.update_conv_state", ("self", "conv_states", "state_idx")),
    ("cache_utils", "LinearAttentionAndFullAttentionLayer.crop", ("self", "tokens_to_remove")),
    ("cache_utils", "DynamicCache.__init__", ("self", "ddp_cache_data", "config")),
    ("masking_utils", "create_causal_mask", ("config", "inputs_embeds", "attention_mask", "CACHE", "position_ids")),
    ("masking_utils", "eager_mask", ("batch_size",)),
    ("masking_utils", "sdpa_mask", ("batch_size",)),
    ("generation", f"GenerationMixin.{PREPARE_CACHE}", ("self", "generation_config", "model_kwargs")),
    ("generation", f"GenerationMixin.{PREPARE_INPUTS}", ("self", "input_ids", "next_sequence_length", "CACHE")),
    (
        "models.llama.modeling_llama",
        "LlamaForCausalLM.forward",
        ("self", "input_ids", "attention_mask", "position_ids"),
    ),
    ("models.llama.modeling_llama", "LlamaAttention.forward", ("self", "hidden_states", "position_embeddings")),
    ("models.llama.modeling_llama", "LlamaRotaryEmbedding.forward", ("self", "x", "position_ids")),
)
# The abstract methods of transformers' cache layers that FreqKV's layers define.
LAYER_METHODS = frozenset({"lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "get_max_length"})


def _find(module: str, name: str) -> Any:
    """An object of transformers; None if the release does not have it."""
    try:
        found: Any = importlib.import_module(f"transformers.{module}")
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found


def _class(module: str, name: str) -> Any:
    """A class to derive from. If the release does not have it, an empty class, and `missing` reports it."""
    return _find(module, name) or type(name, (), {})


Cache = _class("cache_utils", "Cache")
CacheLayerMixin = _class("cache_utils", "CacheLayerMixin")
DynamicCache = _class("cache_utils", "DynamicCache")
DynamicLayer = _class("cache_utils", "DynamicLayer")
LinearAttentionLayer = _class("cache_utils", "LinearAttentionLayer")
LinearAttentionAndFullAttentionLayer = _class("cache_utils", "LinearAttentionAndFullAttentionLayer")
GenerationMixin = _class("generation", "GenerationMixin")
MASK_FUNCTIONS = _find("masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS")
eager_mask = _find("masking_utils", "eager_mask")
sdpa_mask = _find("masking_utils", "sdpa_mask")
_attention_functions = _find("modeling_utils", "ALL_ATTENTION_FUNCTIONS")
_create_causal_mask = _find("masking_utils", "create_causal_mask")


def _parameters(function: Any) -> list[str]:
    return [] if function is None else list(inspect.signature(function).parameters)


def cache_name(parameters: Collection[str], names: tuple[str, ...] = CACHE_NAMES) -> str | None:
    """The name of the cache among these parameters of a function; None if it takes no cache."""
    return next((name for name in names if name in parameters), None)


CACHE = cache_name(_parameters(_create_causal_mask)) or CACHE_NAMES[0]
"""The name of the cache in the installed transformers: `model(**{CACHE: cache})` works with every release."""


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model, under any of its names; None without one.

    Raises
    ------
    ValueError
        If two names are given with different caches.
    """
    given = {name: arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None}
    caches = list(given.values())
    if len(caches) > 1 and caches[0] is not caches[1]:
        raise ValueError(f"{' and '.join(given)} are two names of one argument, and name two caches: pass one of them")
    return caches[0] if caches else None


def renamed(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """`arguments` with the cache called `name`.

    Releases that renamed it accept the former name with a warning, but some of their models ignore it silently.
    """
    if not any(other in arguments for other in CACHE_NAMES if other != name):
        return arguments
    cache = cache_of(arguments)
    return {**{key: value for key, value in arguments.items() if key not in CACHE_NAMES}, name: cache}


def causal_mask(config: Any, hidden_states: Tensor, attention_mask: Any, cache: Any, and_mask: Any = None) -> Any:
    """The mask of full attention, in the form that the attention implementation of `config` takes.

    Parameters
    ----------
    hidden_states : Tensor
        `(batch, tokens, ...)`; only its shape, dtype and device are used.
    attention_mask : Tensor or None
        `(batch, entries)` bool: true for entries that are not padding.
    cache : object
        Gives the number of entries (`get_mask_sizes`) and how many of them come before the tokens (`get_query_offset`).
    and_mask : callable, optional
        `(batch, head, query, entry) -> bool`: a further condition.
    """
    return _create_causal_mask(config, hidden_states, attention_mask, cache, and_mask_function=and_mask)


def takes_dense_masks(attention: str) -> bool:
    """Whether an attention implementation takes masks of queries by entries."""
    return MASK_FUNCTIONS.get(attention) in (eager_mask, sdpa_mask)


def dense_mask(seen: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    """What is seen, `(batch, 1, queries, entries)` bool, as an implementation takes it that takes dense masks."""
    if MASK_FUNCTIONS[attention] is sdpa_mask:
        return seen
    return seen.new_zeros((), dtype=dtype).where(seen, torch.finfo(dtype).min)


def check_crop(layer: Any, crop: Any, tokens_to_remove: int) -> None:
    """Raise what `crop(layer, tokens_to_remove)` would raise, with the layer as it was."""
    layer = copy.copy(layer)  # cropping replaces tensors, and does not write to them
    for name, value in list(layer.__dict__.items()):
        if isinstance(value, dict):
            layer.__dict__[name] = dict(value)
    crop(layer, tokens_to_remove)
    window, keys = getattr(layer, "sliding_window", None), getattr(layer, "keys", None)
    if isinstance(window, int) and isinstance(keys, Tensor) and tokens_to_remove:
        # Such a layer drops what its window leaves, and goes back over that without a word.
        needed, held = min(window - 1, layer.get_seq_length()), keys.shape[-2]
        if held < needed:
            raise RuntimeError(
                f"cannot remove {-tokens_to_remove} tokens: a layer with a sliding window would be left with {held} of the "
                f"{needed} tokens that it needs. Call cache.activate_past_recording() before the tokens enter, remove them all "
                "at once, or keep a copy (copy.deepcopy(cache)) to return to"
            )


def config_with_attention(config: Any, attention: str) -> Any:
    """A shallow copy of a configuration that names another attention implementation."""
    new = object.__new__(type(config))
    # The property `_attn_implementation` would set it in configurations inside this one as well, which are shared.
    new.__dict__.update(config.__dict__, _attn_implementation_internal=attention)
    return new


def recording_attention(attention: str) -> str:
    """The name of an attention implementation that hands queries to the module's recorder, and delegates to `attention`.

    A recorder is a pair: a function of (query_states, scaling), and the function of the module for "eager".
    """
    name = attention + RECORDING
    if name not in _attention_functions:

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
            record, eager = getattr(module, RECORDER)
            scaling = kwargs.get("scaling")
            record(query, query.shape[-1] ** -0.5 if scaling is None else scaling)
            function = _attention_functions.get_interface(attention, eager)
            return function(module, query, key, value, mask, *args, **kwargs)

        _attention_functions.register(name, attend)
        if attention in MASK_FUNCTIONS:
            MASK_FUNCTIONS.register(name, MASK_FUNCTIONS[attention])
    return name


def frequencies(rotary: nn.Module) -> str | None:
    """The name of the buffer from which a module computes rotary embeddings; None if it has no such buffer."""
    names = [name for name, _ in rotary.named_buffers(recurse=False, remove_duplicate=False)]
    return next((name for name in names if name.endswith((FREQUENCIES, SINUSOIDS))), None)


def is_rotary(module: nn.Module) -> bool:
    """Whether a module computes rotary embeddings of positions."""
    return frequencies(module) is not None and "position_ids" in _parameters(module.forward)


@functools.cache
def missing() -> tuple[str, ...]:
    """What FreqKV needs and the installed transformers lacks, one phrase for each; empty if nothing is missing."""
    lacks = []
    if Version(TESTED[0]) > RELEASE:
        lacks.append("it is older than any that was tested")
    for module, name, wanted in SEAM:
        function = _find(module, name)
        if function is None:
            lacks.append(f"transformers.{module}.{name} is not there")
            continue
        has = _parameters(function)[: len(wanted)]
        matches = len(has) == len(wanted) and all(
            mine in CACHE_NAMES if ours == "CACHE" else mine == ours for mine, ours in zip(has, wanted, strict=True)
        )
        if not matches:
            lacks.append(f"transformers.{module}.{name} takes ({', '.join(has)}, ...), not ({', '.join(wanted)}, ...)")
    undefined = set(getattr(CacheLayerMixin, "__abstractmethods__", ())) - LAYER_METHODS
    if undefined:
        lacks.append(f"CacheLayerMixin asks layers for {', '.join(sorted(undefined))}")
    if "and_mask_function" not in _parameters(_create_causal_mask):
        lacks.append("create_causal_mask takes no and_mask_function")
    if MASK_FUNCTIONS is None or not {"eager", "sdpa"} <= set(MASK_FUNCTIONS.valid_keys()):
        lacks.append("transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS has no masks for eager and sdpa")
    attention = _parameters(_find("models.llama.modeling_llama", "LlamaAttention.forward"))
    if cache_name(attention) is None:
        lacks.append(f"attention modules take none of {', '.join(CACHE_NAMES)}")
    if not lacks:
        mask = torch.empty(1, 1, 1, 0, device="cpu")
        config = transformers.LlamaConfig(attn_implementation="eager")
        if causal_mask(config, torch.empty(1, 2, 0, device="cpu"), mask, None) is not mask:
            lacks.append("create_causal_mask does not take a mask of four dimensions as it is")
    return tuple(lacks)


def outdated(lacks: Collection[str]) -> str:
    """The error message for a release that lacks something (see :func:`missing`)."""
    return (
        f"transformers {transformers.__version__} is not what FreqKV was written for: {'; '.join(lacks)}. It is tested with "
        f"transformers {TESTED[0]} to {TESTED[1]}: install one of these, or a newer FreqKV"
    )
