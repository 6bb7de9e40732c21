"""What the cache shows: entries in use, layer by layer, as transformers' own does."""

from __future__ import annotations

import random

import pytest
import torch
import zoo
from models import tiny_llama, tokens
from strategies import Tiers
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


class Life:
    """A cache of three rows to which anything happens, and what each row has said so far."""

    ROWS, NUMBERS = 3, {"window": 150, "recent_tokens": 7}

    def __init__(self, model, seed, folder, **options):
        self.model, self.folder, self.options = model, folder, options
        self.random = random.Random(seed)
        self.cache = self.new()
        self.cache.activate_past_recording()
        self.said = [torch.zeros(0, dtype=torch.long) for _ in range(self.ROWS)]
        self.mask = torch.zeros(self.ROWS, 0, dtype=torch.long)

    def new(self):
        numbers = self.NUMBERS if "schedule" not in self.options else {}
        return FreqKVCache(self.model.config, **numbers, **self.options)

    def feed(self, mask=None, most=160):
        tokens_in = self.random.choice([n for n in (1, 2, 17, 70, 160) if n <= most])
        ids = tokens(tokens_in, self.ROWS, seed=self.random.randrange(10**6))
        new = torch.ones(self.ROWS, tokens_in, dtype=torch.long)
        if self.random.random() < 0.4 and tokens_in > 1:
            for row in range(self.ROWS):
                new[row, : self.random.randrange(tokens_in)] = 0
        before = self.mask if mask is None else mask
        mode = self.random.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])
        with mode():
            call = {"attention_mask": torch.cat([before, new], 1), CACHE: self.cache}
            logits = self.model(ids, **call).logits.detach().clone()
        self.mask = torch.cat([before, new], 1)
        self.said = [torch.cat([said, own[keep.bool()]]) for said, own, keep in zip(self.said, ids, new, strict=True)]
        for row, keep in enumerate(new.bool()):
            with torch.no_grad():
                alone = self.model(self.said[row][None], **{CACHE: self.new()}).logits[0, -int(keep.sum()) :]
            assert torch.allclose(logits[row, keep], alone, atol=2e-3), row

    def crop(self):
        gone = min(self.random.randrange(1, 4), self.mask.shape[1])
        self.cache.crop(-gone)
        lost = self.mask[:, self.mask.shape[1] - gone :].sum(1).tolist()
        self.said = [said[: len(said) - n] for said, n in zip(self.said, lost, strict=True)]
        self.mask = self.mask[:, : self.mask.shape[1] - gone]

    def reorder(self):
        places = [self.random.randrange(self.ROWS) for _ in range(self.ROWS)]
        self.cache.reorder_cache(torch.tensor(places))
        self.said, self.mask = [self.said[place] for place in places], self.mask[places]

    def end_early(self):
        row = self.random.randrange(self.ROWS)
        last = self.mask[row].nonzero()[-2:, 0]
        hidden = self.mask.clone()
        hidden[row, last] = 0
        whole, self.said[row] = self.said[row], self.said[row][: len(self.said[row]) - len(last)]
        try:
            self.feed(hidden, most=2)
        except RuntimeError:
            self.said[row] = whole
            raise

    def save(self):
        self.cache.save(self.folder / "cache", self.model)
        schedule = self.options.get("schedule")
        loaded = FreqKVCache.load(self.folder / "cache", self.model, schedule=schedule)
        assert loaded.counts == self.cache.counts
        self.cache = loaded
        self.cache.activate_past_recording()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 9))])
@pytest.mark.parametrize("options", [{}, {"compressor": freqkv.keep_attended}, {"schedule": Tiers(90, 2, 11)}], ids=str)
def test_random_lives(options, seed, tmp_path):
    """Whatever happened, each row goes on as alone; what cannot be taken back is refused and changes nothing."""
    model = tiny_llama()
    freqkv.patch(model)
    life = Life(model, seed, tmp_path, **options)
    life.feed()
    for _ in range(12):
        try:
            life.random.choice([life.feed, life.feed, life.feed, life.crop, life.reorder, life.end_early, life.save])()
        except RuntimeError as error:
            if "cannot remove" not in str(error):
                raise
