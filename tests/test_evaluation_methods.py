"""Methods at equal bytes, counted by hand; intervals against scipy and by simulation."""

from __future__ import annotations

import functools
import itertools
import math
import random

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_llama, tokens
from transformers import DynamicCache, StaticCache

import freqkv
from freqkv import FreqKVCache, KeepAttended, keep_recent, low_pass_entries, mean_pool
from freqkv.evaluation import (
    METHODS,
    Interval,
    Method,
    cache_bytes,
    freqkv_method,
    method,
    paired_bootstrap,
    register,
    wilson_interval,
    window_of_equal_bytes,
)
from freqkv.models.upstream import CACHE

BUILT_IN = ("full", "recent", "recent-r8", "freqkv", "freqkv-r8", "mean-r8", "attended-r8", "streaming", "recommended")
HEADS = [(4, 2), (4, 1), (4, 4), (6, 2)]
HEAD_DIM, LAYERS, FLOAT = 16, 2, 4


@pytest.fixture
def methods():
    """What a test registers is taken away again."""
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


@functools.cache
def model_of(heads=4, kv_heads=2):
    model = tiny_llama(heads, kv_heads, layers=LAYERS, head_dim=HEAD_DIM, attention="sdpa")
    freqkv.patch(model)
    return model


@torch.no_grad()
def after(model, cache, length, batch=1):
    model(tokens(length, batch), **{CACHE: cache}, use_cache=True)
    return cache


def entry_bytes(kv_heads):
    """A key and a value of every KV head, in every layer."""
    return LAYERS * kv_heads * 2 * HEAD_DIM * FLOAT


# Methods


def test_the_methods_that_are_there():
    assert tuple(METHODS) == BUILT_IN
    assert all(isinstance(each, Method) and name == each.name for name, each in METHODS.items())
    assert [name for name, each in METHODS.items() if not each.bounded] == ["full"]
    assert all(method(name) is METHODS[name] for name in BUILT_IN)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("window", [61, 64, 128])
@pytest.mark.parametrize("name", BUILT_IN)
def test_bytes_are_those_of_the_window(name, window, heads, kv_heads):
    model = model_of(heads, kv_heads)
    allowed = window * entry_bytes(kv_heads)
    assert cache_bytes(after(model, DynamicCache(config=model.config), window)) == allowed
    most = 0
    cache = METHODS[name].make(model.config, window)
    for length in (window, window + 1, window + 4):  # 3 windows + 5
        most = max(most, cache_bytes(after(model, cache, length)))
    if METHODS[name].bounded:
        assert 0.9 * allowed <= most <= allowed
        assert 0.9 * allowed <= cache_bytes(cache)
    else:
        assert most == (3 * window + 5) * entry_bytes(kv_heads)


@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_of_other_caches(batch):
    model = model_of()
    assert cache_bytes(DynamicCache(config=model.config)) == 0
    assert cache_bytes(after(model, DynamicCache(config=model.config), 17, batch)) == 17 * batch * entry_bytes(2)
    static = after(model, StaticCache(config=model.config, max_cache_len=40), 17, batch)
    held = 40 * batch * entry_bytes(2)
    assert held <= cache_bytes(static) <= held + 1024, "counters of a layer are a few bytes"


def test_bytes_inside_of_lists_and_quantized_tensors():
    """Counted by hand, on layers that hold their tensors as quantized caches do."""

    class Layer:
        def __init__(self):
            self.keys = torch.zeros(3, 5, dtype=torch.float16)  # 30
            self.packed = (torch.zeros(7, dtype=torch.uint8), {"scale": torch.zeros(2), "shape": (3, 5)})  # 7 + 8
            self.nested = [[torch.zeros(1, dtype=torch.int64)], None, "name", 4]  # 8
            self.length = 12

    class Layers:
        layers = (Layer(), Layer())

    assert cache_bytes(Layers()) == 2 * (30 + 15 + 8)

    class Packed(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, (64, 64), dtype=torch.float32)

        def __init__(self, inner):
            self.inner = inner

        def __tensor_flatten__(self):
            return ["inner"], None

        @classmethod
        def __torch_dispatch__(cls, *args, **kwargs):
            raise NotImplementedError

    layer = Layer()
    layer.keys = Packed(torch.zeros(11, dtype=torch.uint8))
    Layers.layers = (layer,)
    assert cache_bytes(Layers()) == 11 + 15 + 8


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@given(st.integers(2, 300), st.integers(1, 300))
def test_the_window_beside_queries(heads, kv_heads, window, queries):
    """The largest in which queries and entries fit: a query has `heads` vectors, an entry `2 * kv_heads`."""
    config, compressor = model_of(heads, kv_heads).config, KeepAttended(queries)
    fits = [n for n in range(1, window + 1) if n * 2 * kv_heads + queries * heads <= window * 2 * kv_heads]
    if fits:
        assert window_of_equal_bytes(config, window, compressor) == fits[-1]
    else:
        with pytest.raises(ValueError, match=f"the {queries} queries of .* window={window} has no room"):
            window_of_equal_bytes(config, window, compressor)
    for other in (low_pass_entries, keep_recent, mean_pool):
        assert window_of_equal_bytes(config, window, other) == window


def built(spec, window=64, model=None):
    return method(spec).make((model or model_of()).config, window)


def test_numbers_behind_a_name():
    cache = built("freqkv:recent_tokens=8,retain_ratio=0.25")
    assert isinstance(cache, FreqKVCache)
    assert (cache.config.window, cache.config.recent_tokens, cache.config.retain_ratio) == (64, 8, 0.25)
    assert method("freqkv:recent_tokens=8,retain_ratio=0.25").name == "freqkv:recent_tokens=8,retain_ratio=0.25"
    assert method("freqkv:recent_tokens=8").bounded
    sinks = built("mean:sink_tokens=2,recent_tokens=0").config
    assert (sinks.sink_tokens, sinks.recent_tokens) == (2, 0)
    assert built("recent:recent_tokens=0.25").config.recent_tokens == 16
    assert built("recent:recent_tokens=0.3", 61).config.recent_tokens == 18
    assert built("attended:queries=8,pool=3").config.window == 64 - 8
    assert built("attended:queries=8,recent_tokens=0.25").config.recent_tokens == 14, "a share of the smaller window"
    plain = METHODS["freqkv"].make(model_of().config, 64).config
    assert (plain.window, plain.recent_tokens) == (64, 0)
    assert METHODS["freqkv-r8"].make(model_of().config, 64).config.recent_tokens == 8


@pytest.mark.parametrize(
    ("spec", "compressor"), [("freqkv", low_pass_entries), ("recent", keep_recent), ("mean", mean_pool)]
)
def test_a_name_with_numbers_is_the_cache_of_these_numbers(spec, compressor):
    """Logits are those of a cache that is made by hand."""
    model, ids = model_of(), tokens(200)
    by_hand = FreqKVCache(model.config, window=64, recent_tokens=9, retain_ratio=0.25, compressor=compressor)
    with torch.no_grad():
        one = model(ids, **{CACHE: built(f"{spec}:recent_tokens=9,retain_ratio=0.25")}).logits
        assert torch.equal(one, model(ids, **{CACHE: by_hand}).logits)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("nothing", "no method 'nothing'.*full, recent.*novel with numbers"),
        ("", "no method ''"),
        ("attended", "no method 'attended'"),  # asks for a number of queries
        ("full:recent_tokens=8", "no method 'full:recent_tokens=8'"),
        ("freqkv-r8:sink_tokens=1", "no method 'freqkv-r8:sink_tokens=1'"),
        ("freqkv:", "'freqkv:': '' is not name=number"),
        ("freqkv:recent_tokens", "'recent_tokens' is not name=number"),
        ("freqkv:recent_tokens=8,retain_ratio=half", "'retain_ratio=half' is not name=number"),
        ("freqkv:recent_tokens=8,,sink_tokens=1", "'' is not name=number"),
        ("freqkv:sink_tokens=1,window=8,pages=2", "no number pages, window"),
        ("freqkv:queries=8", "no number queries"),
        ("attended:queries=8,fool=3", "no number fool"),
        ("attended:queries=0", "queries=0"),
        ("attended:queries=8,pool=4", "pool=4"),
    ],
)
def test_errors_name_what_is_wrong(spec, named):
    with pytest.raises(ValueError, match=named):
        method(spec)


def test_a_method_of_ones_own(methods):
    made = []

    def make(config, window):
        made.append(window)
        return FreqKVCache(config, window=window // 2)

    own = register("mine", make)
    assert method("mine") is own is methods["mine"]
    assert own.bounded
    assert built("mine", 60).config.window == 30
    assert made == [60]
    other = register("mine", lambda config, window: DynamicCache(config=config), bounded=False)
    assert method("mine") is other, "the later one counts"
    assert not other.bounded
    assert "mine" in methods
    with pytest.raises(ValueError, match="mine"):  # told with the others
        method("other")


@pytest.mark.parametrize("name", ["", "a:b", ":"])
def test_names_that_cannot_be(methods, name):
    with pytest.raises(ValueError, match="no colon"):
        register(name, lambda config, window: None)
    with pytest.raises(TypeError, match="make is a function"):
        register("mine", 5)
    assert "mine" not in methods


def test_a_freqkv_method_of_ones_own():
    made = freqkv_method("k", KeepAttended(queries=4, pool=1), recent_tokens=0.5, sink_tokens=3, retain_ratio=0.75)
    config = made.make(model_of(6, 2).config, 40).config  # 4 queries of 6 heads take 6 entries of 2 KV heads
    assert (config.window, config.recent_tokens, config.sink_tokens, config.retain_ratio) == (34, 17, 3, 0.75)
    cache = after(model_of(6, 2), made.make(model_of(6, 2).config, 40), 125)
    assert 0.9 * 40 * entry_bytes(2) <= cache_bytes(cache) <= 40 * entry_bytes(2)


# Wilson's interval


@given(st.integers(1, 400), st.data(), st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99]))
def test_wilson_is_that_of_scipy(trials, data, confidence):
    successes = data.draw(st.integers(0, trials))
    found = wilson_interval(successes, trials, confidence)
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert found.estimate == successes / trials
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= found.low <= found.estimate <= found.high <= 1


def test_wilson_of_parts_lies_between_whole_numbers():
    below, parts, above = (wilson_interval(x, 10) for x in (3, 3.5, 4))
    assert below.low < parts.low < above.low
    assert below.high < parts.high < above.high
    assert parts.estimate == 0.35
    assert 0 == wilson_interval(0, 5).low < wilson_interval(0, 5).high < 0.5
    assert 0.5 < wilson_interval(5, 5).low < wilson_interval(5, 5).high == 1


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_wilson_covers(share):
    """About as often as it says: 2000 draws of 40."""
    draws = np.random.default_rng(0).binomial(40, share, 2000)
    intervals = [wilson_interval(int(x), 40, 0.9) for x in draws]
    assert 0.85 < np.mean([i.low <= share <= i.high for i in intervals]) < 0.97


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (1, 0), (-1, 5), (6, 5), (math.nan, 5), (1, -3)])
def test_wilson_errors(successes, trials):
    with pytest.raises(ValueError, match=f"got {successes} of {trials}"):
        wilson_interval(successes, trials)


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 95, math.nan])
def test_confidence_errors(confidence):
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        wilson_interval(1, 2, confidence)
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        paired_bootstrap([[1.0]], confidence=confidence)


def test_intervals_are_told():
    assert str(Interval(0.123456, -1.0, 12345.678)) == "0.1235 [-1, 1.235e+04]"


# The paired bootstrap


def drawn(documents, blocks, spread, seed=0, mean=0.0, noise=1.0):
    """Documents whose means differ by `spread`."""
    rng = np.random.default_rng(seed)
    middles = mean + spread * rng.standard_normal(documents)
    return [(m + noise * rng.standard_normal(blocks)).tolist() for m in middles]


def test_bootstrap_of_single_blocks_is_that_of_scipy():
    """With a block in each document it is the plain percentile bootstrap of the mean."""
    values = np.random.default_rng(1).gamma(2.0, size=40)
    found = paired_bootstrap([[x] for x in values], confidence=0.9, samples=20_000)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert found.estimate == pytest.approx(values.mean())
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03 * width)


def test_bootstrap_of_one_document_is_that_of_scipy():
    values = np.random.default_rng(3).gamma(2.0, size=50)
    found = paired_bootstrap([values.tolist()], samples=20_000)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(4)
    ).confidence_interval
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03 * width)


def test_weighted_bootstrap_is_that_of_scipy():
    """A ratio of sums, both drawn together."""
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 9, 40).astype(float)
    totals = sizes * (0.5 + rng.standard_normal(40))
    found = paired_bootstrap([[x] for x in totals], [[x] for x in sizes], samples=20_000)
    expected = scipy.stats.bootstrap(
        (totals, sizes), lambda x, w, axis: x.sum(axis) / w.sum(axis), paired=True, n_resamples=20_000,
        method="percentile", rng=np.random.default_rng(6),
    ).confidence_interval  # fmt: skip
    assert found.estimate == pytest.approx(totals.sum() / sizes.sum())
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03 * width)


def test_bootstrap_is_the_loop_over_documents_and_blocks():
    """Documents of different numbers of blocks, against a plain loop with other random numbers."""
    table = [x[: 2 + 5 * (i % 4)] for i, x in enumerate(drawn(9, 20, 0.7))]
    weights = [[1.0 + (i + j) % 3 for j in range(len(x))] for i, x in enumerate(table)]
    found = paired_bootstrap(table, weights, confidence=0.8, samples=20_000)
    rng, means = random.Random(0), []
    for _ in range(8000):
        total = size = 0.0
        for document in rng.choices(range(9), k=9):
            for block in rng.choices(range(len(table[document])), k=len(table[document])):
                total += table[document][block]
                size += weights[document][block]
        means.append(total / size)
    low, high = np.quantile(means, [0.1, 0.9])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.04 * (high - low))
    assert found.estimate == pytest.approx(sum(map(sum, table)) / sum(map(sum, weights)))


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.floats(-5, 5))
def test_constant_differences_have_no_width(counts, value):
    weights = [[float(1 + i + j) for j in range(count)] for i, count in enumerate(counts)]
    for found in (
        paired_bootstrap([[value] * count for count in counts], samples=200),
        paired_bootstrap([[value * w for w in row] for row in weights], weights, samples=200),
    ):
        assert (found.estimate, found.low, found.high) == pytest.approx((value,) * 3, rel=1e-9, abs=1e-12)


def test_the_seed_decides():
    table = drawn(6, 7, 0.5)
    assert paired_bootstrap(table, samples=500) == paired_bootstrap(table, samples=500)
    assert paired_bootstrap(table, samples=500, seed=1) != paired_bootstrap(table, samples=500)
    assert paired_bootstrap(table, samples=1).low == paired_bootstrap(table, samples=1).high


def test_documents_that_differ_make_it_wider():
    """Than the same blocks, had they been drawn without regard to documents."""
    table = drawn(8, 30, 1.0)
    pooled = paired_bootstrap([list(itertools.chain(*table))])
    found = paired_bootstrap(table)
    assert found.estimate == pytest.approx(pooled.estimate)
    assert found.high - found.low > 2 * (pooled.high - pooled.low)
    alike = drawn(8, 30, 0.0)
    pooled, found = paired_bootstrap([list(itertools.chain(*alike))]), paired_bootstrap(alike)
    assert found.high - found.low < 1.8 * (pooled.high - pooled.low)


def test_confidence_widens():
    table = drawn(8, 10, 0.5)
    narrow, middle, wide = (paired_bootstrap(table, confidence=c) for c in (0.5, 0.9, 0.99))
    assert wide.low < middle.low < narrow.low < narrow.high < middle.high < wide.high


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_bootstrap_covers(spread):
    """The true mean, about as often as it says; blocks alone would not, where documents differ."""
    mean, own, pooled = 0.3, [], []
    for seed in range(200):
        table = drawn(20, 6, spread, seed, mean)
        found = paired_bootstrap(table, confidence=0.9, samples=400, seed=seed)
        own.append(found.low <= mean <= found.high)
        found = paired_bootstrap([list(itertools.chain(*table))], confidence=0.9, samples=400, seed=seed)
        pooled.append(found.low <= mean <= found.high)
    assert 0.8 < np.mean(own) <= 1
    assert spread == 0 or np.mean(own) < 0.97
    assert spread == 0 or np.mean(pooled) < 0.75


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([],), "at least one document"),
        (([[1.0], []],), "a block in each"),
        (([[1.0]], [[1.0], [1.0]]), "as many documents and blocks"),
        (([[1.0, 2.0]], [[1.0]]), "as many documents and blocks"),
        (([[1.0, 2.0]], [[1.0, 0.0]]), "weights must be positive"),
        (([[1.0, 2.0]], [[1.0, -1.0]]), "weights must be positive"),
        (([[1.0]], None, 0.9, 0), "samples must be at least 1, got 0"),
    ],
)
def test_bootstrap_errors(arguments, named):
    with pytest.raises(ValueError, match=named):
        paired_bootstrap(*arguments)
