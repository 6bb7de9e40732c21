"""What the cache shows: entries in use, layer by layer, as transformers' own does."""

from __future__ import annotations

import pytest
import torch
import zoo
from models import tiny_llama, tokens
from transformers import DynamicCache

import freqkv
from freqkv import FreqKVCache
from freqkv.models.upstream import CACHE

N = 24


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.no_grad()
def test_layers_show_the_entries_in_use(family):
    """Below the window those of a DynamicCache, also where it is iterated; beyond it as many as are held."""
    model = tiny_llama() if family == "llama" else zoo.tiny_model(family)
    plain, cache = DynamicCache(config=model.config), FreqKVCache(model.config, window=N)
    ids = tokens(N - 3, 2).clamp(3, 99)
    model(ids, **{CACHE: plain})
    freqkv.patch(model)
    model(ids, **{CACHE: cache})
    pairs = list(zip(plain, cache, strict=True))
    assert len(pairs) == model.config.num_hidden_layers
    for (keys, values, *_), (own_keys, own_values, *_) in pairs:
        assert torch.equal(keys, own_keys)
        assert torch.equal(values, own_values)
    for index, layer in enumerate(cache.layers):
        assert layer.keys.shape == plain.layers[index].keys.shape
    model(tokens(30, 2).clamp(3, 99), **{CACHE: cache})
    for index in cache.compressed_layers:
        assert cache.layers[index].keys.shape[2] == cache.layers[index].values.shape[2] == cache.entries < N


def test_an_empty_cache():
    cache = FreqKVCache(tiny_llama().config, window=N)
    assert cache.dtype is None
    assert cache.batch_size is None
    assert [keys for keys, *_ in cache] == [None, None]
    assert cache.layers[0].keys is None
    assert cache.nbytes == cache.entries == cache.tokens_seen == cache.compressions == 0
    with pytest.raises(AttributeError, match="keys of a FreqKV layer cannot be set"):
        cache.layers[0].keys = torch.zeros(1)


def test_what_a_cache_tells_of_itself():
    model = tiny_llama(dtype=torch.bfloat16)
    freqkv.patch(model)
    cache = FreqKVCache(model.config, window=N, recent_tokens=3)
    with torch.no_grad():
        model(tokens(2 * N), **{CACHE: cache})
    assert cache.dtype == torch.bfloat16
    assert repr(cache) == (
        "FreqKVCache(window=24, sink_tokens=4, retain_ratio=0.5, recent_tokens=3, compressor=low_pass_entries: 2 layers, "
        f"48 tokens seen, {cache.entries}/24 entries held, {cache.compressions} compressions, "
        f"{cache.nbytes} bytes of bfloat16 on cpu)"
    )
