"""Every attention implementation of transformers gives the same tokens."""

from __future__ import annotations

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from models import tiny_llama, tokens

import freqkv
from freqkv import FreqKVCache
from freqkv.upstream import CACHE

N = 32


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
):
    """flash-attention 2's contract: `(batch, length, heads, dim)`, grouped heads, causal aligned lower right."""
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert k.shape[1] >= q.shape[1], "no query may be without a key"
    assert dropout_p == 0
    assert window_size == (-1, -1)
    groups = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(groups, 2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * (softmax_scale or q.shape[-1] ** -0.5)
    if causal:
        late = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
        scores = scores.masked_fill(late, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float()).to(q.dtype)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    """The same for rows packed behind each other, `(total, heads, dim)`."""
    rows = [
        flash_attn_func(q[a:b][None], k[c:d][None], v[c:d][None], dropout_p, softmax_scale, causal)[0]
        for a, b, c, d in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:], strict=False)
    ]
    return torch.cat(rows)


@pytest.fixture
def flash_attention(monkeypatch):
    """transformers' own flash-attention code runs, on stand-ins for the package's two functions."""
    functions = (flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(flash, "_loaded_implementation", None)


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
