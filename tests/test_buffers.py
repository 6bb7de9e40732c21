"""Buffers grow with what enters, up to the window; nothing else changes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from models import tiny_llama, tokens
from running import padded, rows_of, stream

import freqkv
from freqkv import FreqKVCache, buffers
from freqkv.models.upstream import CACHE

N = 500
TOKEN = 2 * 2 * 2 * 16 * 4  # keys and values, layers, KV heads, head size, float32


@pytest.fixture(scope="module")
def model():
    model = tiny_llama(attention="sdpa", context=131072)
    freqkv.patch(model)
    return model


def test_a_short_text_takes_little_however_long_the_context(model, tmp_path):
    cache = FreqKVCache(model.config)
    assert cache.config.window == 131072
    model.generate(tokens(10), **{CACHE: cache}, max_new_tokens=2, do_sample=False)
    assert cache.nbytes == 64 * TOKEN
    cache.save(tmp_path / "cache", model)
    assert (tmp_path / "cache").stat().st_size < 64 * TOKEN + 10_000
    loaded = FreqKVCache.load(tmp_path / "cache", model)
    assert loaded.nbytes == cache.nbytes
    ids = tokens(150, seed=3)
    assert torch.equal(stream(model, ids, loaded, [3]), stream(model, ids, cache, [3]))


def test_they_double_up_to_the_window_and_stay(model):
    cache = FreqKVCache(model.config, window=N)
    sizes, places = [], []
    for _ in range(N + 300):
        with torch.no_grad():
            model(tokens(1), **{CACHE: cache})
        sizes.append(cache.nbytes // TOKEN)
        places.append(cache.layers[0].buffers.tensors["keys"].data_ptr())
    assert list(dict.fromkeys(sizes)) == [64, 128, 256, N]
    moved = sum(a != b for a, b in itertools.pairwise(places))
    assert moved == 3, "between growing, tokens are written in place"


def test_a_static_cache_takes_all_at_once(model):
    cache = FreqKVCache(model.config, window=N, static=True)
    with torch.no_grad():
        model(tokens(1), **{CACHE: cache})
    assert cache.nbytes == N * TOKEN


@pytest.mark.parametrize("first", [1, 3])
def test_growing_changes_nothing(model, first, monkeypatch):
    """Through ragged rows, rows that are taken, crops, resets and gradients, against buffers of the whole window."""
    lengths = [5, 61, 17]
    ids, mask = padded(rows_of(lengths))

    def run():
        cache = FreqKVCache(model.config, window=133, recent_tokens=5)
        cache.activate_past_recording()
        outputs, seen = [], mask
        for step in range(3):
            with torch.no_grad():
                outputs.append(
                    model(ids if step == 0 else tokens(9, 3, seed=step), attention_mask=seen, **{CACHE: cache}).logits
                )
            seen = torch.cat([seen, seen.new_ones(3, 9)], 1)
        cache.crop(-4)
        cache.reorder_cache(torch.tensor([2, 0, 2]))
        cache = copy.deepcopy(cache)
        for grad in (True, False, True):
            with torch.set_grad_enabled(grad):
                outputs.append(model(tokens(60, 3, seed=7), **{CACHE: cache}).logits.detach())
        outputs.append(cache.layers[0].keys)
        cache.reset()
        with torch.inference_mode():
            outputs.append(model(tokens(200), **{CACHE: cache}).logits.clone())
        return outputs

    monkeypatch.setattr(buffers, "FIRST_CAPACITY", first)
    growing = run()
    monkeypatch.setattr(buffers, "FIRST_CAPACITY", 133)
    assert all(torch.equal(a, b) for a, b in zip(growing, run(), strict=True))
