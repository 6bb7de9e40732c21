"""Stand-ins for the two functions of the flash-attention package that transformers calls."""

from __future__ import annotations

import torch

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]


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
