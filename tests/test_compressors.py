"""Compressors: spans, queries, and selection by attention, against a plain float64 loop and on every path of the engine."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from compressing import NUMBERS, N, double, feed, new_cache, padded_ids, same
from models import ROPE_TYPES, tiny_llama, tokens
from oracle import llama_logits
from strategies import Tiers
from transformers import DynamicCache

import freqkv
from freqkv import (
    Fold,
    FreqKVCache,
    FreqKVConfig,
    KeepAttended,
    Span,
    UnsupportedModelError,
    keep_attended,
    keep_recent,
)
from freqkv.models.upstream import CACHE

ATTENDED = KeepAttended(queries=6, pool=3)


@pytest.mark.parametrize("rope", ["default", "dynamic", "yarn"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_keep_attended_is_the_float64_loop(heads, kv_heads, rope):
    model = tiny_llama(heads, kv_heads, rope=rope)
    ids = tokens(5 * N)
    numbers = N, 3, 0.5, 5
    expected = llama_logits(model, ids[0], *numbers, attended=(6, 3))
    other = llama_logits(model, ids[0], *numbers, squeeze=lambda x, keep: x[:, -keep:])
    freqkv.patch(model)
    logits = feed(model.double(), ids, new_cache(model, ATTENDED), [2 * N, 1, 3])
    assert abs(logits[0].numpy() - expected).max() <= 1e-4
    assert abs(other - expected).max() > 0.1, "which entries are kept matters"


@pytest.mark.parametrize("queries", [1, 6, 13, 40])
def test_more_queries_than_tokens_between_two_folds(queries):
    """Then those since the fold before have a say: 12 tokens come between two folds."""
    model = tiny_llama()
    ids = tokens(4 * N)
    expected = llama_logits(model, ids[0], N, 3, 0.5, 5, attended=(queries, 1))
    freqkv.patch(model)
    cache = new_cache(model, KeepAttended(queries, 1))
    assert abs(feed(model.double(), ids, cache, [7])[0].numpy() - expected).max() <= 1e-4
    assert cache.layers[0].buffers.tensors["queries"].shape[2] == queries


@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_every_backend_and_split(attention):
    ids = tokens(3 * N + 2, batch=2)
    model = double("eager") if attention == "eager" else double("sdpa")
    expected = feed(model, ids, new_cache(model, ATTENDED), [])
    if attention == "flex_attention":  # which takes no float64
        model = tiny_llama(attention=attention)
        freqkv.patch(model)
        exact = tiny_llama(attention="eager")
        freqkv.patch(exact)
        expected = feed(exact, ids, new_cache(exact, ATTENDED), [])
    whole = feed(model, ids, new_cache(model, ATTENDED), [N - 1])
    bound = 1e-4 if attention == "flex_attention" else 1e-5
    assert same(whole, expected, bound)
    if attention != "flex_attention":  # each length is compiled
        assert same(feed(model, ids, new_cache(model, ATTENDED), [1] * 40), expected)
        assert same(feed(model, ids, new_cache(model, ATTENDED), [N + 1, 2, 17]), expected)


def test_flash_attention(flash_attention, monkeypatch):
    monkeypatch.setattr(torch, "float16", torch.float32)  # what the stand-in accepts
    ids = tokens(3 * N + 2)
    model, exact = tiny_llama(attention="eager"), tiny_llama(attention="eager")
    model.config._attn_implementation = "flash_attention_2"
    for each in (model, exact):
        freqkv.patch(each)
    expected = feed(exact, ids, new_cache(exact, ATTENDED), [])
    assert same(feed(model, ids, new_cache(model, ATTENDED), []), expected, 1e-4)
    assert same(feed(model, ids, new_cache(model, ATTENDED), [1] * 50), expected, 1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_rows_alone(side):
    model = double()
    lengths = [2 * N + 5, 7, 3 * N + 1]
    ids, mask = padded_ids(lengths, side)
    cache = new_cache(model, ATTENDED)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, **{CACHE: cache}).logits
        more = tokens(N, batch=3, seed=5)
        wider = torch.cat([mask, torch.ones_like(more)], 1)
        after = [
            model(more[:, i : i + 1], attention_mask=wider[:, : mask.shape[1] + i + 1], **{CACHE: cache}).logits
            for i in range(N)
        ]
    for row in range(3):
        alone = new_cache(model, ATTENDED)
        own = ids[row, mask[row].bool()][None]
        assert same(logits[row, mask[row].bool()], feed(model, own, alone, [])[0])
        assert same(torch.cat(after, 1)[row], feed(model, more[row : row + 1], alone, [5])[0])


def test_beams_and_rows_that_are_taken():
    model = double()
    ids = tokens(N + 3, batch=2)
    options = {"max_new_tokens": 2 * N, "do_sample": False, "num_beams": 3}
    batch = model.generate(ids, **{CACHE: new_cache(model, ATTENDED)}, **options)
    for row in range(2):
        alone = model.generate(ids[row : row + 1], **{CACHE: new_cache(model, ATTENDED)}, **options)
        assert torch.equal(batch[row], alone[0])


@pytest.mark.parametrize("record", [False, True])
def test_cropped_tokens_leave_no_queries(record):
    """Others took their place: within the tokens since the last fold, and over it where the past is recorded."""
    model = double()
    ids, other = tokens(4 * N), tokens(9, seed=7)
    seen = N + 3  # three tokens after the first fold
    cache = new_cache(model, ATTENDED)
    if record:
        cache.activate_past_recording()
    feed(model, ids[:, :seen], cache, [])
    feed(model, other[:, :5], cache, [])
    kept = seen - 5 if record else seen
    cache.crop(kept - seen - 5)
    logits = feed(model, ids[:, kept:], cache, [2])
    assert same(logits, feed(model, ids, new_cache(model, ATTENDED), [])[:, kept:])
    cache = new_cache(model, ATTENDED)
    feed(model, ids[:, :seen], cache, [])
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-5)


@pytest.mark.parametrize("length", [5, N - 2, 2 * N + 3])
def test_saved_and_loaded(length, tmp_path):
    model = double()
    ids = tokens(4 * N, batch=2)
    cache = new_cache(model, ATTENDED)
    feed(model, ids[:, :length], cache, [length // 2])
    cache.save(tmp_path / "cache", model)
    loaded = FreqKVCache.load(tmp_path / "cache", model)
    assert loaded.compressor == ATTENDED
    assert loaded.nbytes == cache.nbytes
    expected = feed(model, ids[:, length:], cache, [])
    assert torch.equal(feed(model, ids[:, length:], loaded, []), expected)
    with pytest.raises(
        freqkv.CacheFileError, match=r"compressed by keep_attended with .*'queries': 6.* keep_attended with"
    ):
        FreqKVCache.load(tmp_path / "cache", model, compressor=keep_attended)


def test_a_cache_of_more_than_keys_and_values_counts_its_queries():
    model = double()
    cache, plain = new_cache(model, ATTENDED), new_cache(model, keep_recent)
    for each in (cache, plain):
        feed(model, tokens(2 * N), each, [])
    assert cache.nbytes - plain.nbytes == 2 * 4 * 6 * 16 * 8  # layers, heads, queries, head size, float64


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_without_a_cache_is_streaming(checkpointing):
    model = tiny_llama().double()
    ids, mask = padded_ids([2 * N + 7, 12, N + 2])
    labels = ids.masked_fill(mask == 0, -100)
    freqkv.patch(model, **NUMBERS, compressor=ATTENDED)
    cache = new_cache(model, ATTENDED)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, **{CACHE: cache}).logits
    model.train()
    if checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    output = model(ids, attention_mask=mask, labels=labels, use_cache=False)
    assert same(output.logits[mask.bool()], expected[mask.bool()])
    output.loss.backward()
    weight = model.model.layers[0].self_attn.v_proj.weight
    got = weight.grad.clone()
    direction = got / got.norm()
    losses = []
    for step in (3e-5, -3e-5):
        with torch.no_grad():
            weight += step * direction
            losses.append(model(ids, attention_mask=mask, labels=labels, use_cache=False).loss)
            weight -= step * direction
    slope = (losses[0] - losses[1]) / 6e-5
    assert abs(slope - (got * direction).sum()) <= 1e-2 * abs(slope)


def test_below_the_window_nothing_changes():
    model = tiny_llama(attention="sdpa")
    ids = tokens(N)
    with torch.no_grad():
        expected = model(ids, **{CACHE: DynamicCache(config=model.config)}).logits
    freqkv.patch(model)
    assert torch.equal(feed(model, ids, new_cache(model, ATTENDED), []), expected)


def test_the_attention_implementation_may_change_between_calls():
    model = tiny_llama().double()
    freqkv.patch(model)
    ids = tokens(3 * N)
    expected = feed(model, ids, new_cache(model, ATTENDED), [])
    cache, logits = new_cache(model, ATTENDED), []
    for start, attention in enumerate(("sdpa", "eager", "sdpa")):
        model.set_attn_implementation(attention)
        logits.append(feed(model, ids[:, start * N : (start + 1) * N], cache, []))
    assert same(torch.cat(logits, 1), expected)


def watching(spans, queries=0):
    """A compressor that notes its spans, and keeps the most recent entries."""

    def watch(span: Span):
        spans.append(span)
        return keep_recent(span.keys, span.values, span.keep)

    watch.queries = queries
    return watch


@pytest.mark.parametrize("rope", ROPE_TYPES)
def test_what_a_span_tells(rope):
    model = tiny_llama(rope=rope).double()
    spans, raw = [], []
    q_proj = model.model.layers[1].self_attn.q_proj
    freqkv.patch(model)
    q_proj.register_forward_hook(lambda module, args, output: raw.append(output.detach()))
    ids = tokens(N + 15)
    feed(model, ids, new_cache(model, watching(spans, 6)), [4, N])
    of_last = [span for span in spans if span.layer_idx == 1]
    assert [span.layer_idx for span in spans] == [0, 1] * (len(spans) // 2)
    assert len(of_last) == 2
    projected = torch.cat(raw, 1).view(1, ids.shape[1], 4, 16).transpose(1, 2)
    for span, token in zip(of_last, (N, N + 12), strict=True):
        assert (span.start, span.keep, span.keys.shape[2], span.query_start) == (3, 11, 23, N - 6)
        assert same(span.queries, projected[:, :, token - 6 : token], 1e-6)
        assert span.scaling == 0.25
        weights = span.attention()
        sums = weights.sum(-1)
        assert same(sums, torch.ones_like(sums))
        assert bool((weights.triu(span.query_start - span.start + 1) == 0).all()), "no query sees later entries"
    assert same(of_last[0].rotate(of_last[0].keys, 3)[:, :, :5], model_keys(model, ids[:, :N])[:, :, 3:8], 1e-6)


def model_keys(model, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **{CACHE: cache})
    freqkv.unpatch(model)
    return cache.layers[1].keys


def test_a_span_without_queries_says_how_to_get_them():
    spans = []
    model = double()
    feed(model, tokens(N + 1), new_cache(model, watching(spans)), [])
    assert spans[0].queries is None
    with pytest.raises(ValueError, match="queries = 64"):
        spans[0].attention()


@pytest.mark.parametrize("compressor", [keep_recent, ATTENDED, KeepAttended(29, 1)])
def test_a_schedule_of_several_folds_is_the_float64_loop(compressor):
    model = tiny_llama()
    schedule = Tiers(29, 2, 6)
    ids = tokens(4 * N)

    def folds(token, entries):
        return [(fold.start, fold.stop, fold.keep) for fold in schedule.folds_before(token)]

    attended = None if compressor is keep_recent else (compressor.queries, compressor.pool)
    expected = llama_logits(
        model, ids[0], 29, 2, 0.5, 6, squeeze=lambda x, keep: x[:, -keep:], attended=attended, schedule=folds
    )
    freqkv.patch(model)
    model = model.double()
    for lengths in ([], [29, 1, 40], [1] * 60):
        cache = FreqKVCache(model.config, schedule=schedule, compressor=compressor)
        logits = feed(model, ids, cache, lengths)
        assert abs(logits[0].numpy() - expected).max() <= 1e-4
    assert cache.compressions == schedule.compressions(4 * N) > 4
    with freqkv.patch(model, schedule=schedule, compressor=compressor):
        assert same(model(ids, use_cache=False).logits, logits)
    rows, mask = padded_ids([3 * N, 9, N + 2])
    with torch.no_grad():
        cache = FreqKVCache(model.config, schedule=schedule, compressor=compressor)
        together = model(rows, attention_mask=mask, **{CACHE: cache}).logits
    for row in range(3):
        alone = FreqKVCache(model.config, schedule=schedule, compressor=compressor)
        own = rows[row, mask[row].bool()][None]
        assert same(together[row, mask[row].bool()], feed(model, own, alone, [])[0])


def test_schedules_by_layer(tmp_path):
    """The second layer folds in two tiers and holds fewer entries; the first follows the numbers."""
    model = tiny_llama(attention="eager").double()
    freqkv.patch(model)
    ids = tokens(3 * N)
    schedule = {1: Tiers(17, 1, 2)}
    spans = []
    cache = new_cache(model, watching(spans), schedule=schedule)
    whole = feed(model, ids, cache, [])
    assert [layer.entries for layer in cache.layers] == [
        FreqKVConfig(**NUMBERS).schedule.entries(3 * N),
        schedule[1].entries(3 * N),
    ]
    assert cache.entries == cache.layers[0].entries
    assert {(s.layer_idx, s.start, s.keys.shape[2], s.keep) for s in spans} == {
        (0, 3, 23, 11),
        (1, 1, 7, 1),
        (1, 2, 7, 3),
    }
    spans_before = len(spans)
    assert same(feed(model, ids, new_cache(model, watching(spans), schedule=schedule), [1] * 50), whole)
    assert len(spans) == 2 * spans_before
    ragged, mask = padded_ids([2 * N, 20])
    with torch.no_grad():
        together = model(
            ragged, attention_mask=mask, **{CACHE: new_cache(model, keep_recent, schedule=schedule)}
        ).logits
    alone = feed(model, ragged[1:, -20:], new_cache(model, keep_recent, schedule=schedule), [])
    assert same(together[1, -20:], alone[0])
    with freqkv.patch(model, **NUMBERS, compressor=watching([]), schedule=schedule):
        assert same(model(ids, use_cache=False).logits, whole)
        out = model.generate(ids[:, :9], max_new_tokens=N, do_sample=False, return_dict_in_generate=True)
        assert out[CACHE].schedules == schedule
    cache = new_cache(model, keep_recent, schedule=schedule)
    feed(model, ids[:, :40], cache, [])
    cache.save(tmp_path / "file", model)
    expected = feed(model, ids[:, 40:], copy.deepcopy(cache), [])
    loaded = FreqKVCache.load(tmp_path / "file", model, schedule=schedule)
    assert torch.equal(feed(model, ids[:, 40:], loaded, []), expected)
    for wrong in (None, {1: Tiers(19, 1, 2)}, Tiers(17, 1, 2)):
        with pytest.raises(freqkv.CacheFileError, match=r"filled with schedule by layer .*Tiers.*, this cache has "):
            FreqKVCache.load(tmp_path / "file", model, schedule=wrong)


def refused(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_what_is_no_schedule_is_refused():
    model = double()

    def make(**options):
        return lambda: FreqKVCache(model.config, **options)

    refused(TypeError, "schedule is a freqkv.Schedule", make(schedule="paper"))
    refused(TypeError, "dict by layer index, got the key 'a'", make(schedule={"a": Tiers(9)}))
    refused(ValueError, r"names layers \[2\], but the compressed layers are \[0, 1\]", make(schedule={2: Tiers(9)}))
    refused(ValueError, "either one schedule for all layers or the numbers", make(schedule=Tiers(9), window=16))

    class Plain(freqkv.Schedule):
        window = 9

        def folds_before(self, token):
            return (Fold(0, 4, 2),)

    refused(TypeError, "Plain must be a frozen dataclass", make(schedule=Plain()))
    refused(
        ValueError,
        "static=True: in a compiled token",
        make(schedule={1: Tiers(9)}, window=9, sink_tokens=1, static=True),
    )
    make(schedule={0: Tiers(9), 1: Tiers(9)}, window=16, static=True)()
    shared = zoo.tiny_model("gemma3n_text")
    freqkv.patch(shared)
    index = FreqKVCache(shared.config, window=16).compressed_layers[0]
    cache = FreqKVCache(shared.config, window=16, schedule={index: Tiers(9)})
    refused(ValueError, "works on the entries of several layers", lambda: shared(tokens(4), **{CACHE: cache}))
    assert cache.tokens_seen == 0


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("falcon", "does not attend through transformers' attention interface"),
        ("deepseek_v3", "caches a latent vector"),
        ("hunyuan_v1_dense", "multiplies what it rotated by weights"),
    ],
)
def test_families_without_queries_are_refused(family, reason):
    model = zoo.tiny_model(family)
    with pytest.raises(UnsupportedModelError, match=f"compressor keep_attended asks for queries, but .* {reason}"):
        freqkv.patch(model, window=16, compressor=keep_attended)
    freqkv.patch(model)
    cache = FreqKVCache(model.config, window=16, compressor=keep_attended)
    with pytest.raises(UnsupportedModelError, match=reason):
        model(tokens(4), **{CACHE: cache})
    assert cache.tokens_seen == 0
    cache = FreqKVCache(model.config, window=16)
    model(tokens(20), **{CACHE: cache})


@pytest.mark.parametrize(
    "family", ["qwen3", "gemma3_text", "gpt_neox", "cohere", "falcon_h1", "smollm3", "phi3", "glm4"]
)
def test_families_with_queries(family):
    """Split by split, and token by token, the same: what a layer records are its own queries before RoPE."""
    model = zoo.tiny_model(family)
    freqkv.patch(model)
    ids = tokens(40)
    numbers = {"window": 16, "sink_tokens": 1, "recent_tokens": 2, "compressor": KeepAttended(4, 1)}
    whole = feed(model, ids, FreqKVCache(model.config, **numbers), [])
    other = feed(model, ids, FreqKVCache(model.config, **{**numbers, "compressor": keep_recent}), [])
    split = feed(model, ids, FreqKVCache(model.config, **numbers), [16, 1, 1, 9])
    assert same(split, whole, 3e-4)
    assert not same(other, whole, 1e-2)


def test_what_is_no_compressor_is_refused():
    model = double()

    def with_queries(keys, values, keep):
        return keys, values

    with_queries.queries = 8

    def make(compressor, **options):
        return lambda: FreqKVCache(model.config, window=N, compressor=compressor, **options)

    refused(TypeError, "asks for queries, so it must take a freqkv.Span", make(with_queries))
    refused(TypeError, "takes 2 arguments: it must be a function of a freqkv.Span", make(lambda a, b: (a, b)))
    refused(ValueError, "static=True: compiled single tokens record no queries", make(keep_attended, static=True))
    for queries in (-1, 2.5, True):

        def wrong(span):
            return span.keys, span.values

        wrong.queries = queries
        refused(TypeError, "must be a number of queries", make(wrong))
    refused(ValueError, "queries=0 must be a whole number", lambda: KeepAttended(queries=0))
    refused(ValueError, "pool=4 must be odd", lambda: KeepAttended(pool=4))
