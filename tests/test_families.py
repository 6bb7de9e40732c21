"""Other families of Llama's shape: full attention, rotary embeddings handed to the attention layers."""

from __future__ import annotations

import pytest
import torch
from models import tokens
from test_method import stream
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import freqkv
from freqkv import FreqKVCache

N = 23
FAMILIES = {
    "gemma": {"head_dim": 16},
    "granite": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None, "num_local_experts": 3, "num_experts_per_tok": 2},
    "olmo2": {},
    "phi3": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "stablelm": {"partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": None},
}


def tiny(family: str):
    config = AutoConfig.for_model(
        family,
        vocab_size=101,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **FAMILIES[family],
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    model = tiny(family)
    ids = tokens(4 * N + 3)
    plain = stream(model, ids[:, :N], DynamicCache(config=model.config), [9])
    raw_keys = keys_without_rotation(model, ids[:, :N])

    freqkv.patch(model)
    assert torch.equal(stream(model, ids[:, :N], FreqKVCache(model.config, window=N), [9]), plain)

    spans = []

    def spy(keys, values, keep):
        spans.append(keys)
        return freqkv.low_pass_entries(keys, values, keep)

    cache = FreqKVCache(model.config, window=N, recent_tokens=3, compressor=spy)
    whole = stream(model, ids, cache, [ids.shape[1]])
    assert torch.allclose(spans[0], raw_keys[:, :, 4 : N - 3], atol=1e-5), "keys are unrotated exactly"
    for splits in ([], [N + 1, 2 * N]):
        parts = stream(model, ids, FreqKVCache(model.config, window=N, recent_tokens=3), splits)
        assert torch.allclose(parts, whole, atol=2e-4)
    with freqkv.patch(model, window=N, recent_tokens=3), torch.no_grad():
        assert torch.allclose(model(ids, use_cache=False).logits, whole, atol=2e-4)


@torch.no_grad()
def keys_without_rotation(model, ids):
    """What the first layer caches when the rotary module turns nothing: its input does not depend on positions."""
    rotary = model.model.rotary_emb
    rotary.forward = lambda *args, **kwargs: tuple(
        torch.full_like(t, fill) for t, fill in zip(type(rotary).forward(rotary, *args, **kwargs), (1, 0), strict=True)
    )
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    del rotary.forward
    return cache.layers[0].keys
