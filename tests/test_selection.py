"""Selection by novelty, against a plain float64 loop and on every path of the engine."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import zoo
from compressing import NUMBERS, N, double, feed, new_cache, padded_ids, same
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_llama, tokens
from oracle import llama_logits, most_novel
from strategies import Tiers

import freqkv
from freqkv import FreqKVCache, KeepNovel, Span, keep_novel, keep_recent
from freqkv.models.upstream import CACHE
from freqkv.selection import best, leverage

ALONE, LED = KeepNovel(pool=3, lead=2), KeepNovel(pool=3, lead=2, layer=0)
PER_HEAD = KeepNovel(pool=3, lead=2, layer=0, per_head=0.4)
ALL = pytest.mark.parametrize("compressor", [ALONE, LED, PER_HEAD], ids=["alone", "led", "per_head"])
BOTH = pytest.mark.parametrize("compressor", [ALONE, LED], ids=["alone", "led"])


@pytest.mark.parametrize(
    "compressor", [ALONE, LED, PER_HEAD, KeepNovel(1, 0), KeepNovel(5, 4, 1, 0.6), KeepNovel(1, 0, per_head=0.3)]
)
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_keep_novel_is_the_float64_loop(compressor, kv_heads):
    model = tiny_llama(4, kv_heads)
    ids = tokens(5 * N)
    novel = compressor.pool, compressor.lead, compressor.layer, compressor.per_head
    expected = llama_logits(model, ids[0], N, 3, 0.5, 5, novel=novel)
    other = llama_logits(model, ids[0], N, 3, 0.5, 5, squeeze=lambda x, keep: x[:, -keep:])
    freqkv.patch(model)
    logits = feed(model.double(), ids, new_cache(model, compressor), [2 * N, 1, 3])
    assert abs(logits[0].numpy() - expected).max() <= 1e-4
    assert abs(other - expected).max() > 0.1, "which entries are kept matters"


def test_layers_behind_the_one_that_chooses_keep_its_tokens():
    """Of a model whose layers would choose differently."""
    model, ids = double(), tokens(N + 1)
    kept: dict = {}

    def noting(compressor):
        def note(span: Span):
            made = compressor(span)
            kept.setdefault(compressor, []).append((span.keys, made[0]))
            return made

        return note

    for compressor in (ALONE, LED):
        feed(model, ids, new_cache(model, noting(compressor)), [])
    places = {
        c: [[int((keys[0, 0] == k).all(-1).nonzero()) for k in made[0, 0]] for keys, made in found]
        for c, found in kept.items()
    }
    assert places[ALONE][0] == places[LED][0] == places[LED][1] != places[ALONE][1]


@pytest.mark.slow
@ALL
def test_flex_attention(compressor):
    ids = tokens(3 * N + 2)
    model, exact = tiny_llama(attention="flex_attention"), tiny_llama(attention="eager")
    for each in (model, exact):
        freqkv.patch(each)
    expected = feed(exact, ids, new_cache(exact, compressor), [])
    assert same(feed(model, ids, new_cache(model, compressor), [N - 1]), expected, 1e-4)


@ALL
def test_beams(compressor):
    model, ids = double(), tokens(N + 3, batch=2)
    options = {"max_new_tokens": 2 * N, "do_sample": False, "num_beams": 3}
    batch = model.generate(ids, **{CACHE: new_cache(model, compressor)}, **options)
    for row in range(2):
        alone = model.generate(ids[row : row + 1], **{CACHE: new_cache(model, compressor)}, **options)
        assert torch.equal(batch[row], alone[0])


@ALL
def test_saved_and_loaded(compressor, tmp_path):
    model, ids = double(), tokens(4 * N, batch=2)
    cache = new_cache(model, compressor)
    feed(model, ids[:, : 2 * N], cache, [])
    cache.save(tmp_path / "cache", model)
    loaded = FreqKVCache.load(tmp_path / "cache", model)
    assert loaded.compressor == compressor
    assert torch.equal(feed(model, ids[:, 2 * N :], loaded, []), feed(model, ids[:, 2 * N :], cache, []))
    with pytest.raises(freqkv.CacheFileError, match=r"compressed by keep_novel with .*'pool': 3.* keep_novel with"):
        FreqKVCache.load(tmp_path / "cache", model, compressor=keep_novel)


@ALL
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_training_without_a_cache_is_streaming(compressor, checkpointing):
    """Layers are told what the one before them chose, when gradient checkpointing runs them again as well."""
    ids, mask = padded_ids([2 * N + 7, 12, N + 2])
    grads = []
    for reentrant in {None: [None], False: [None, False], True: [None, True]}[checkpointing]:
        model = tiny_llama().double()
        labels = ids.masked_fill(mask == 0, -100)
        freqkv.patch(model, **NUMBERS, compressor=compressor)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, **{CACHE: new_cache(model, compressor)}).logits
        model.train()
        if reentrant is not None:
            model.enable_input_require_grads()
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        output = model(ids, attention_mask=mask, labels=labels, use_cache=False)
        assert same(output.logits[mask.bool()], expected[mask.bool()])
        model(tokens(3 * N, batch=3, seed=3), use_cache=False)  # another forward before this one goes back
        output.loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(grads[0], grads[-1], strict=True):
        assert same(a, b, 1e-8)


def test_copies_of_a_patched_model_hand_on_choices_of_their_own():
    """Among calls of the model that they were copied from."""
    model, ids = tiny_llama().double(), tokens(3 * N)
    freqkv.patch(model, **NUMBERS, compressor=LED)
    expected = model(ids, use_cache=False).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        model(tokens(2 * N, seed=3), use_cache=False)
        assert torch.equal(twin(ids, use_cache=False).logits, expected)


@BOTH
def test_several_folds_at_once_and_schedules_by_layer(compressor):
    model, ids, schedule = double(), tokens(4 * N), Tiers(29, 2, 6)
    options = {"schedule": schedule, "compressor": compressor}
    whole = feed(model, ids, FreqKVCache(model.config, **options), [])
    assert same(feed(model, ids, FreqKVCache(model.config, **options), [29, 1, 40]), whole)
    cache = new_cache(model, compressor, schedule={1: Tiers(17, 1, 2)})
    if compressor is ALONE:
        assert same(
            feed(model, ids, cache, [5]),
            feed(model, ids, new_cache(model, compressor, schedule={1: Tiers(17, 1, 2)}), []),
        )
        return
    with pytest.raises(ValueError, match="layer 1 is to keep what layer 0 keeps, which is not there"):
        feed(model, ids, cache, [])
    assert cache.tokens_seen == 0 or cache.is_spent


def test_entries_of_each_head_need_one_span():
    """Else they would become candidates of the other span, at slots where heads and layers hold different tokens."""
    model, ids = double(), tokens(40)
    cache = FreqKVCache(model.config, schedule=Tiers(29, 2, 6), compressor=PER_HEAD)
    with pytest.raises(ValueError, match=r"per_head=0\.4 needs a schedule .* one span at a time, this one folds 2"):
        feed(model, ids, cache, [])
    assert cache.tokens_seen == 0 or cache.is_spent


@pytest.mark.parametrize("family", ["gemma3_text", "deepseek_v3", "falcon", "falcon_h1", "gpt_neox", "qwen3"])
def test_families(family):
    model, ids = zoo.tiny_model(family), tokens(40)
    freqkv.patch(model)
    first = FreqKVCache(model.config, window=16).compressed_layers[0]
    for compressor in (ALONE, KeepNovel(3, 2, first), KeepNovel(3, 2, first, per_head=0.4)):
        numbers = {"window": 16, "sink_tokens": 1, "recent_tokens": 2, "compressor": compressor}
        whole = feed(model, ids, FreqKVCache(model.config, **numbers), [])
        assert same(feed(model, ids, FreqKVCache(model.config, **numbers), [16, 1, 1, 9]), whole, 3e-4)
        other = feed(model, ids, FreqKVCache(model.config, **{**numbers, "compressor": keep_recent}), [])
        assert not same(other, whole, 1e-3)


def test_a_static_cache():
    model, ids = double(), tokens(3 * N)
    for compressor in (ALONE, LED):
        expected = feed(model, ids, new_cache(model, compressor), [])
        assert same(feed(model, ids, new_cache(model, compressor, static=True), [9] + [1] * (2 * N)), expected)


def test_below_the_window_nothing_changes():
    model, ids = double(), tokens(N)
    caches = new_cache(model, LED), new_cache(model, keep_recent)
    assert torch.equal(*(feed(model, ids, cache, [7]) for cache in caches))


def test_no_state_is_kept_between_calls():
    """A copy goes on as the cache itself does, and the compressor holds nothing."""
    model, ids = double(), tokens(3 * N)
    cache = new_cache(model, LED)
    feed(model, ids[:, : N + 2], cache, [])
    other = copy.deepcopy(cache)
    assert torch.equal(feed(model, ids[:, N + 2 :], cache, []), feed(model, ids[:, N + 2 :], other, []))
    assert cache.nbytes == new_cache_bytes(model, ids)


def new_cache_bytes(model, ids):
    plain = new_cache(model, keep_recent)
    feed(model, ids, plain, [])
    return plain.nbytes


@given(st.integers(1, 40), st.integers(0, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_leverage_is_the_loop_and_lies_between_0_and_1(n, others, dim, seed):
    keys = torch.randn(2, n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    every = torch.cat(
        [keys, torch.randn(2, others, dim, generator=torch.Generator().manual_seed(seed + 1)).double()], 1
    )
    scores = leverage(keys, every[:, n:] if others else None)
    assert bool((scores >= -1e-12).all())
    assert bool((scores <= 1 + 1e-12).all())
    centred = every[0] - every[0].mean(0)
    moments = centred.mT @ centred
    ridge = 2 * moments.trace() / dim + 1e-30
    wanted = [x @ torch.linalg.solve(moments + ridge * torch.eye(dim, dtype=torch.float64), x) for x in centred[:n]]
    assert torch.allclose(scores[0], torch.stack(wanted), atol=1e-9)


@pytest.mark.parametrize("value", [1.0, 0.1, 1e-20, 1e15])
def test_leverage_of_equal_keys_is_alike(value):
    """Nothing but rounding of their mean, the same for all."""
    found = leverage(torch.full((1, 7, 4), value))
    assert torch.isfinite(found).all()
    assert (found == found[0, 0]).all()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.data())
def test_of_equal_scores_the_last_are_kept(scores, data):
    keep = data.draw(st.integers(1, len(scores)))
    wanted = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], -i))[:keep])
    assert best(torch.tensor(scores, dtype=torch.float32), keep).tolist() == wanted


def test_what_leads_to_something_new_is_kept_with_it():
    keys = torch.zeros(1, 1, 30, 4, dtype=torch.float64)
    keys += 1e-3 * torch.randn(keys.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys[..., 20, :] = 1.0
    places = torch.arange(30.0, dtype=torch.float64).view(1, 1, 30, 1)
    kept = KeepNovel(pool=1, lead=3)(Span(keys, places, 7))[1].flatten().tolist()
    assert kept == [17, 18, 19, 20, 27, 28, 29] == most_novel(keys[0].numpy(), keys[0, :, :0].numpy(), 7, 1, 3).tolist()
    kept = KeepNovel(pool=1, lead=3)(Span(keys, places, 2))[1].flatten().tolist()
    assert kept == [20, 29], "the last ones wait for what they lead to, and take half of the places at most"


def test_numbers_are_checked():
    for options, message in (
        ({"pool": 4}, "pool=4 must be odd"),
        ({"pool": 0}, "pool=0 must be a whole number of at least 1"),
        ({"lead": -1}, "lead=-1 must be a whole number of at least 0"),
        ({"layer": True}, "layer=True must be a whole number"),
        ({"per_head": 1.0}, "per_head=1.0 must be a share"),
        ({"per_head": -0.1}, "per_head=-0.1 must be a share"),
    ):
        with pytest.raises(ValueError, match=message):
            KeepNovel(**options)
