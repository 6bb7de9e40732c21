"""Every attention implementation of transformers gives the same tokens."""

from __future__ import annotations

import pytest
import torch
from models import tiny_llama, tokens

import freqkv
from freqkv import FreqKVCache
from freqkv.models.upstream import CACHE

N = 32


def run(model, attention, ids, new_tokens):
    model.config._attn_implementation = attention
    cache = FreqKVCache(model.config, window=N, recent_tokens=3)
    with torch.no_grad():
        logits = model(ids, **{CACHE: cache}).logits
    generated = model.generate(
        ids,
        **{CACHE: FreqKVCache(model.config, window=N, recent_tokens=3)},
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return logits, generated


@pytest.mark.parametrize("batch", [1, 2])
def test_eager_and_sdpa(batch):
    model = tiny_llama()
    freqkv.patch(model)
    ids = tokens(3 * N + 5, batch)
    logits, generated = run(model, "eager", ids, 2 * N)
    other, same = run(model, "sdpa", ids, 2 * N)
    assert torch.allclose(logits, other, atol=1e-4)
    assert torch.equal(generated, same)


def test_flex_attention():
    model = tiny_llama(kv_heads=2)
    freqkv.patch(model)
    ids = tokens(2 * N + 5)
    logits, generated = run(model, "eager", ids, 4)
    other, same = run(model, "flex_attention", ids, 4)
    assert torch.allclose(logits, other, atol=1e-4)
    assert torch.equal(generated, same)


@pytest.mark.parametrize("batch", [1, 3])
def test_flash_attention_2(flash_attention, batch):
    model = tiny_llama(dtype=torch.bfloat16)
    freqkv.patch(model)
    ids = tokens(3 * N + 5, batch)
    logits, _ = run(model, "eager", ids, 1)
    exact = tiny_llama()
    freqkv.patch(exact)
    truth, _ = run(exact, "eager", ids, 1)
    other, generated = run(model, "flash_attention_2", ids, 40)
    eager_error, flash_error = ((x.float() - truth).square().mean().sqrt() for x in (logits, other))
    assert flash_error <= 2 * eager_error
    assert generated.shape == (batch, 3 * N + 45)


def test_flash_attention_2_float32_model(flash_attention, monkeypatch):
    """In float32, where the stand-in rounds nothing, flash-attention's alignment gives the same logits and tokens."""
    monkeypatch.setattr(torch, "float16", torch.float32)  # what the stand-in accepts
    model = tiny_llama()
    freqkv.patch(model)
    ids = tokens(3 * N + 5)
    logits, generated = run(model, "eager", ids, 40)
    other, same = run(model, "flash_attention_2", ids, 40)
    assert torch.allclose(logits, other, atol=1e-4)
    assert torch.equal(generated, same)
    with freqkv.patch(model, window=N, recent_tokens=3), torch.no_grad():
        assert torch.allclose(model(ids, use_cache=False).logits, logits, atol=1e-4)
