"""What FreqKV relies on in transformers. A failure here says what a new release changed, before anything else fails."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from models import tiny_llama
from transformers import DynamicCache, cache_utils, masking_utils
from transformers.generation import GenerationMixin

LAYERS = [
    "CacheLayerMixin",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
]


def parameters(function):
    return list(inspect.signature(function).parameters)


def changed(what):
    return (
        f"transformers {transformers.__version__} changed {what}, which freqkv relies on: read its release notes, adapt "
        "freqkv/cache.py or freqkv/attention.py, or lower the upper bound in pyproject.toml"
    )


@pytest.mark.parametrize("name", LAYERS)
def test_layer_classes_are_there(name):
    assert hasattr(cache_utils, name), changed(f"cache_utils.{name}")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (cache_utils.Cache.__init__, ["self", "layers"]),
        (cache_utils.Cache.update, ["self", "key_states", "value_states", "layer_idx", "args", "kwargs"]),
        (cache_utils.Cache.get_mask_sizes, ["self", "query_length", "layer_idx"]),
        (cache_utils.Cache.get_query_offset, ["self", "layer_idx"]),
        (cache_utils.Cache.get_seq_length, ["self", "layer_idx"]),
        (cache_utils.Cache.crop, ["self", "tokens_to_remove"]),
        (cache_utils.Cache.reorder_cache, ["self", "beam_idx"]),
        (cache_utils.Cache.batch_repeat_interleave, ["self", "repeats"]),
        (cache_utils.Cache.batch_select_indices, ["self", "indices"]),
        (cache_utils.CacheLayerMixin.update, ["self", "key_states", "value_states", "args", "kwargs"]),
        (cache_utils.CacheLayerMixin.lazy_initialization, ["self", "key_states", "value_states"]),
        (cache_utils.CacheLayerMixin.get_mask_sizes, ["self", "query_length"]),
        (cache_utils.LinearAttentionLayer.update_conv_state, ["self", "conv_states", "state_idx"]),
        (
            masking_utils.create_causal_mask,
            ["config", "inputs_embeds", "attention_mask", "past_key_values", "position_ids"],
        ),
        (GenerationMixin._prepare_cache_for_generation, ["self", "generation_config", "model_kwargs"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signatures(function, expected):
    assert parameters(function)[: len(expected)] == expected, changed(f"the arguments of {function.__qualname__}")


def test_what_a_cache_layer_must_define():
    needed = {"lazy_initialization", "update", "get_mask_sizes", "get_seq_length"}
    abstract = set(cache_utils.CacheLayerMixin.__abstractmethods__)
    assert abstract <= needed | {"get_max_length"}, changed(
        f"what a cache layer must define: {sorted(abstract - needed)}"
    )


def test_masks_can_be_asked_for():
    assert "and_mask_function" in parameters(masking_utils.create_causal_mask), changed("create_causal_mask")
    known = set(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.valid_keys())
    assert {"eager", "sdpa", "flex_attention", "flash_attention_2"} <= known, changed("the mask functions")


def test_masks_of_four_dimensions_are_taken_as_they_are():
    model = tiny_llama()
    mask = torch.empty(1, 1, 1, 0)
    taken = masking_utils.create_causal_mask(model.config, torch.empty(1, 5, 48), mask, None)
    assert taken is mask, changed("masks of four dimensions, which decoders took as they are")


def test_layers_follow_the_configuration():
    config = transformers.Gemma3TextConfig(layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2)
    kinds = [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "DynamicLayer"], changed("the layers of DynamicCache(config=...)")


def test_attention_modules_tell_what_they_are():
    attention = tiny_llama().model.layers[1].self_attn
    wanted = {"hidden_states", "position_embeddings", "attention_mask", "past_key_values"}
    assert attention.layer_idx == 1, changed("layer_idx of attention modules")
    assert wanted <= set(parameters(attention.forward)), changed("the arguments of attention modules")


def test_rotary_modules_tell_what_they_are():
    rotary = tiny_llama().model.rotary_emb
    assert parameters(rotary.forward)[:2] == ["x", "position_ids"], changed("the arguments of rotary modules")
    assert "inv_freq" in dict(rotary.named_buffers()), changed("inv_freq of rotary modules")
