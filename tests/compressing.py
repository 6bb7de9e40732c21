"""A small model in float64 and caches of a small window, for tests of compressors."""

from __future__ import annotations

import functools

import torch
from models import tiny_llama, tokens

import freqkv
from freqkv import FreqKVCache
from freqkv.models.upstream import CACHE

__all__ = ["NUMBERS", "N", "double", "feed", "new_cache", "padded_ids", "same"]

N = 31
NUMBERS = {"window": N, "sink_tokens": 3, "recent_tokens": 5}


@functools.cache
def double(attention="sdpa", rope="default", **config):
    """A patched model whose selections do not hang on rounding."""
    model = tiny_llama(attention=attention, rope=rope, **config).double()
    freqkv.patch(model)
    return model


def new_cache(model, compressor, **options):
    return FreqKVCache(model.config, **{**NUMBERS, **options}, compressor=compressor)


@torch.no_grad()
def feed(model, ids, cache, lengths, **options):
    outputs, start = [], 0
    for length in [*lengths, ids.shape[1] - sum(lengths)]:
        outputs.append(model(ids[:, start : start + length], **{CACHE: cache}, **options).logits)
        start += length
    return torch.cat(outputs, 1)


def same(a, b, atol=1e-5):  # norms of transformers round to float32
    return torch.allclose(a, b, atol=atol, rtol=0)


def padded_ids(lengths, side="left"):
    """Rows of random tokens, and their mask."""
    ids = tokens(max(lengths), batch=len(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        gap = slice(None, max(lengths) - length) if side == "left" else slice(length, None)
        mask[row, gap] = 0
    return ids, mask
