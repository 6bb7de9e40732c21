"""Whole-model logits against the float64 loop of `oracle.py`, and the invariants of the cache."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ROPE_TYPES, tiny_llama, tokens
from oracle import llama_logits
from running import in_float64, stream
from strategies import configs
from transformers import DynamicCache

import freqkv
from freqkv import Fold, FreqKVCache, FreqKVConfig, FreqKVSchedule
from freqkv.models.upstream import CACHE
from freqkv.rotary import slot_table

SETTINGS = [  # window, sinks, ratio, recents
    FreqKVConfig(31, 4, 0.5, 0),
    FreqKVConfig(37, 0, 0.3, 5),
    FreqKVConfig(29, 3, 0.8, 11),
]
HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}


@functools.cache
def patched(**config):
    model = tiny_llama(**config)
    freqkv.patch(model)
    return model


def truth(model, ids, config):
    return llama_logits(model, ids, config.window, config.sink_tokens, config.retain_ratio, config.recent_tokens)


@pytest.mark.parametrize("config", SETTINGS, ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_logits_equal_the_float64_loop(heads, config):
    model = tiny_llama(*HEADS[heads], attention="sdpa")
    ids = tokens(6 * config.window)
    expected = truth(model, ids[0], config)
    assert 0.5 < expected.std() < 5, "logits of order 1"
    freqkv.patch(model)
    cache = FreqKVCache(model.config, config)
    logits = stream(model, ids, cache, [2 * config.window + 3, config.window - 1])
    assert abs(logits[0].double().numpy() - expected).max() <= 1e-4
    assert cache.compressions > 8

    model = in_float64(model)
    logits = stream(model, ids, FreqKVCache(model.config, config), [3 * config.window])
    assert abs(logits[0].numpy() - expected).max() <= 1e-9


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_bfloat16_loses_what_rounding_costs(config):
    """At most twice what the same model loses to bfloat16 without compression, per token."""
    model = tiny_llama(dtype=torch.bfloat16, attention="sdpa")
    ids = tokens(6 * config.window)
    expected = truth(model, ids[0], config)
    with torch.no_grad():
        plain = model(ids[:, : config.window]).logits[0].double().numpy()
    rounding = np.sqrt(((plain - expected[: config.window]) ** 2).mean())
    freqkv.patch(model)
    logits = stream(model, ids, FreqKVCache(model.config, config), [6 * config.window])
    error = np.sqrt(((logits[0].double().numpy() - expected) ** 2).mean())
    assert 0 < error <= 2 * rounding


@pytest.mark.parametrize("rope", ROPE_TYPES)
def test_rope_types(rope):
    config = FreqKVConfig(29, 2, 0.6, 3)
    model = tiny_llama(rope=rope)
    ids = tokens(4 * config.window)
    expected = truth(model, ids[0], config)
    freqkv.patch(model)
    logits = stream(model, ids, FreqKVCache(model.config, config), [50])
    assert abs(logits[0].double().numpy() - expected).max() <= 1e-4


@pytest.mark.parametrize("rope", ROPE_TYPES)
@pytest.mark.parametrize("slots", [29, 256, 300])
def test_a_slot_table_depends_on_nothing_but_the_model(rope, slots):
    """Neither on what the rotary module was called with before, which it is left to remember, nor on inference mode."""
    rotary = tiny_llama(rope=rope).model.rotary_emb
    expected = tiny_llama(rope=rope).model.rotary_emb(torch.zeros(1), torch.arange(slots)[None])
    for length in (40, 1000):
        rotary(torch.zeros(1), torch.arange(length)[None])
        buffers = copy.deepcopy(dict(rotary.named_buffers()))
        with torch.inference_mode():
            table = slot_table(rotary, slots, torch.device("cpu"))
        for rows, truth_rows in zip(table.native, expected, strict=True):
            assert torch.equal(rows, truth_rows)
            assert not rows.is_inference()
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in rotary.named_buffers())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_for_bit_like_dynamic_cache_up_to_the_window(attention, heads, dtype):
    model = tiny_llama(*HEADS[heads], attention=attention, dtype=dtype)
    window = 67
    ids = tokens(window, batch=3)
    calls = [1, 30, 1, 1, 17, 1]
    plain = stream(model, ids, DynamicCache(config=model.config), calls)
    freqkv.patch(model)
    for preallocated in (window, window + 50):
        assert torch.equal(plain, stream(model, ids, FreqKVCache(model.config, window=preallocated), calls))


@pytest.mark.parametrize("rope", ROPE_TYPES)
def test_bit_for_bit_with_each_rope_type(rope):
    """Within the length from which a type changes its frequencies (32 for the shortest here)."""
    model = tiny_llama(rope=rope)
    ids = tokens(32)
    plain = stream(model, ids, DynamicCache(config=model.config), [20])
    freqkv.patch(model)
    assert torch.equal(stream(model, ids, FreqKVCache(model.config, window=32), [20]), plain)


@settings(max_examples=30)
@given(configs(max_window=60), st.lists(st.integers(1, 20), min_size=1, max_size=6), st.sampled_from(["eager", "sdpa"]))
def test_bit_for_bit_in_any_split(config, calls, attention):
    """The same for any numbers and calls: what follows the window's last token does not matter."""
    model = patched(attention=attention)
    unpatched = tiny_llama(attention=attention)
    calls = [call for i, call in enumerate(calls) if sum(calls[: i + 1]) <= config.window] or [1]
    ids = tokens(sum(calls))
    expected = stream(unpatched, ids, DynamicCache(config=model.config), calls)
    assert torch.equal(stream(model, ids, FreqKVCache(model.config, config), calls), expected)
    with freqkv.patch(model, config), torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, unpatched(ids, use_cache=False).logits)


@settings(max_examples=30)
@given(configs(max_window=24), st.lists(st.integers(1, 40), max_size=4), st.sampled_from(["eager", "sdpa"]))
def test_split_invariance(config, splits, attention):
    """One call, any chunking, token by token, and no cache at all give the same logits and the same cache."""
    model = patched(attention=attention)
    ids = tokens(sum(splits) + 30, batch=2)
    whole, parts, single = (FreqKVCache(model.config, config) for _ in range(3))
    logits = stream(model, ids, whole, [ids.shape[1]])
    tolerance = {"atol": 2e-4, "rtol": 0}
    assert torch.allclose(stream(model, ids, parts, splits), logits, **tolerance)
    assert torch.allclose(stream(model, ids, single, []), logits, **tolerance)
    with freqkv.patch(model, config), torch.no_grad():
        assert torch.allclose(model(ids, use_cache=False).logits, logits, **tolerance)
        assert torch.allclose(model(ids).logits, logits, **tolerance)
    for one, other in zip(whole.layers, single.layers, strict=True):
        assert one.entries == other.entries == config.schedule.entries(ids.shape[1])
        used = slice(0, one.entries)
        assert torch.allclose(one.keys[:, :, used], other.keys[:, :, used], **tolerance)
        assert torch.allclose(one.values[:, :, used], other.values[:, :, used], **tolerance)


@settings(max_examples=20)
@given(configs(max_window=24), st.integers(1, 70))
def test_memory_and_positions(config, length):
    """Never more than N entries, one buffer, positions below N, masks no larger than a segment x N."""
    model = tiny_llama(attention="eager")
    cache = FreqKVCache(model.config, config)
    seen_masks, seen_cos = [], []
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    @functools.wraps(forward)
    def watched(**kwargs):
        seen_masks.append(kwargs.get("attention_mask"))
        seen_cos.append(kwargs["position_embeddings"][0])
        return forward(**kwargs)

    attention.forward = watched  # inside of the patch, which takes it for the module's own
    freqkv.patch(model)
    seen_masks.clear()
    seen_cos.clear()
    storage = None
    for call in (length, 1, 1, config.window, 2 * config.window + 3, 1):
        with torch.no_grad():
            model(tokens(call), **{CACHE: cache})
        layer = cache.layers[1]
        assert layer.keys.shape[2] == layer.values.shape[2] == cache.entries <= config.window
        assert storage in (None, layer.keys.data_ptr())
        storage = layer.keys.data_ptr()
    assert cache.get_seq_length() == cache.tokens_seen == length + 3 * config.window + 6
    rows, _ = model.model.rotary_emb(torch.zeros(1), torch.arange(config.window)[None])
    for mask, cos in zip(seen_masks, seen_cos, strict=True):
        assert mask.shape[-1] <= config.window
        assert mask.shape[-2] <= config.window
        assert any(torch.equal(cos[0], rows[0, s : s + cos.shape[1]]) for s in range(config.window))
    assert cache.nbytes == 2 * 2 * config.window * 2 * 16 * 4  # K and V, layers, entries, KV heads, head size, float32


def test_the_decoder_builds_no_mask_of_its_own(monkeypatch):
    import transformers.masking_utils as masking

    sizes = []
    eager_mask = masking.ALL_MASK_ATTENTION_FUNCTIONS["eager"]

    def watched(batch_size, q_length, kv_length, **kwargs):
        sizes.append((q_length, kv_length))
        return eager_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **kwargs)

    monkeypatch.setitem(masking.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "eager", watched)
    model = tiny_llama(attention="eager")
    freqkv.patch(model)
    sizes.clear()
    with torch.no_grad():
        model(tokens(1000), **{CACHE: FreqKVCache(model.config, window=32)})
        with freqkv.patch(model, window=32):
            model(tokens(1000), use_cache=False)
    assert sizes
    assert max(q for q, _ in sizes) <= 32
    assert max(kv for _, kv in sizes) <= 32
    assert len(sizes) <= 6, "each shape is built once and shared by layers and segments"


@settings(max_examples=15)
@given(configs(max_window=20), st.integers(1, 60), st.data())
def test_causality(config, length, data):
    """Changing token t never changes what comes before t."""
    model = patched()
    ids = tokens(length)
    changed = ids.clone()
    position = data.draw(st.integers(0, length - 1))
    changed[0, position] = (changed[0, position] + 1) % 101
    with freqkv.patch(model, config), torch.no_grad():
        one, other = (model(x, use_cache=False).logits for x in (ids, changed))
    assert torch.equal(one[:, :position], other[:, :position])
    assert not torch.equal(one[:, position], other[:, position])


def test_rows_of_a_batch_are_independent():
    model = patched(attention="sdpa")
    config = FreqKVConfig(23, 2, 0.5, 3)
    ids = tokens(100, batch=5)
    together = stream(model, ids, FreqKVCache(model.config, config), [77])
    for row in range(5):
        alone = stream(model, ids[row : row + 1], FreqKVCache(model.config, config), [77])
        assert torch.allclose(together[row : row + 1], alone, atol=1e-4)


def test_caches_used_in_turn_do_not_see_each_other():
    model = patched(attention="sdpa")
    ids, others = tokens(90), tokens(90, seed=2)
    one, other = FreqKVCache(model.config, window=23), FreqKVCache(model.config, window=31, recent_tokens=4)
    expected = stream(model, ids, FreqKVCache(model.config, window=23), [40])
    parts = []
    with torch.no_grad():
        for start in range(0, 90, 30):
            parts.append(model(ids[:, start : start + 30], **{CACHE: one}).logits)
            model(others[:, start : start + 30], **{CACHE: other})
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-4)
    assert torch.allclose(
        stream(model, tokens(5), other, []),
        stream(model, torch.cat([others, tokens(5)], 1), FreqKVCache(model.config, other.config), [90])[:, 90:],
        atol=1e-4,
    )


def test_compressors_run_on_the_same_schedule():
    """`keep_recent` is sinks + most recent: the oracle with a slice in place of the transform."""
    config = FreqKVConfig(29, 3, 0.4, 5)
    model = tiny_llama()
    ids = tokens(120)
    expected = llama_logits(model, ids[0], 29, 3, 0.4, 5, squeeze=lambda x, keep: x[:, -keep:])
    freqkv.patch(model)
    cache = FreqKVCache(model.config, config, compressor=freqkv.keep_recent)
    logits = stream(model, ids, cache, [70])
    assert abs(logits[0].double().numpy() - expected).max() <= 1e-4
    pooled = stream(model, ids, FreqKVCache(model.config, config, compressor=freqkv.mean_pool), [70])
    assert torch.equal(pooled[:, :29], logits[:, :29])
    assert not torch.allclose(pooled[:, 60:], logits[:, 60:], atol=1e-2)


def test_more_than_half_may_be_kept():
    """Entries then move over places that others leave."""
    config = FreqKVConfig(29, 3, 0.8, 0)
    model = tiny_llama(attention="sdpa")
    ids = tokens(120)
    expected = llama_logits(model, ids[0], 29, 3, 0.8, 0, squeeze=lambda x, keep: x[:, -keep:])
    freqkv.patch(model)
    logits = stream(model, ids, FreqKVCache(model.config, config, compressor=freqkv.keep_recent), [70])
    assert abs(logits[0].double().numpy() - expected).max() <= 1e-4


def test_a_compressor_gets_unrotated_keys():
    """The first fold's span is what the projections give, before RoPE."""
    model = tiny_llama(layers=1)
    ids = tokens(40)
    spans = []

    def spy(keys, values, keep):
        spans.append((keys.clone(), values.clone()))
        return freqkv.low_pass_entries(keys, values, keep)

    freqkv.patch(model)
    stream(model, ids, FreqKVCache(model.config, window=32, sink_tokens=3, compressor=spy), [33])
    layer = model.model.layers[0]
    with torch.no_grad():
        hidden = layer.input_layernorm(model.model.embed_tokens(ids[:, 3:32]))
        keys, values = (
            proj(hidden).unflatten(-1, (2, 16)).transpose(1, 2)
            for proj in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
    assert torch.allclose(spans[0][0], keys, atol=1e-5)
    assert torch.equal(spans[0][1], values)


def test_a_schedule_that_is_given_is_executed():
    """One fold of [8, 16) to 3, as numbers that make the same one: entries behind it move left."""
    model = patched(attention="sdpa")
    ids = tokens(110)
    schedule = FreqKVSchedule(29, Fold(8, 16, 3))
    caches = [FreqKVCache(model.config, schedule=schedule) for _ in range(2)]
    assert torch.allclose(stream(model, ids, caches[0], [110]), stream(model, ids, caches[1], [3, 60]), atol=1e-4)
    numbers = FreqKVConfig(29, 8, 3 / 8 + 1e-9, 13)
    expected = truth(model, ids[0], numbers)
    caches[0].reset()
    assert abs(stream(model, ids, caches[0], [50])[0].double().numpy() - expected).max() <= 1e-4
    assert numbers.schedule == schedule


def test_gradients_flow_and_match_finite_differences():
    """Through the low-pass, without a cache, against a numeric derivative in float64."""
    model = in_float64(tiny_llama(layers=1))
    model.set_attn_implementation("sdpa")  # eager computes its softmax in float32
    freqkv.patch(model, window=9, sink_tokens=1, recent_tokens=2)
    embeddings = torch.randn(1, 25, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(scale):
        return model(inputs_embeds=embeddings * scale, use_cache=False).logits.square().mean()

    scale = torch.ones(1, 25, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, scale, eps=1e-6, atol=1e-6)


def test_training_with_a_cache_leaves_the_graph_intact():
    """With autograd on, nothing the graph needs is written in place; without it, the buffer is used again."""
    model = tiny_llama(attention="sdpa")
    freqkv.patch(model)
    cache = FreqKVCache(model.config, window=23)
    ids = tokens(70)
    first = model(ids[:, :40], **{CACHE: cache}).logits
    second = model(ids[:, 40:], **{CACHE: cache}).logits
    (first.sum() + second.sum()).backward()
    streamed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with freqkv.patch(model, window=23):
        model(ids, use_cache=False).logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, streamed[name], atol=1e-3 * parameter.grad.abs().max()), name
    with torch.no_grad():
        model(tokens(3), **{CACHE: cache})
    assert cache.layers[0].keys.shape[2] == 23
    assert not cache.layers[0].keys.requires_grad


@pytest.mark.parametrize("trained", [["q_proj"], ["q_proj", "v_proj"], ["mlp"]])
def test_parameter_efficient_training_with_a_cache(trained):
    """Frozen keys are still part of the graph, since queries are multiplied with them."""
    model = tiny_llama(attention="sdpa")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    freqkv.patch(model)
    ids = tokens(60)

    def gradients(forward):
        model.zero_grad()
        forward().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    def streamed():
        cache = FreqKVCache(model.config, window=23)
        loss = sum(model(part, **{CACHE: cache}).logits.sum() for part in ids.split([23, 20, 17], 1))
        with torch.no_grad():
            model(tokens(30), **{CACHE: cache})
        return loss

    def whole():
        with freqkv.patch(model, window=23):
            return model(ids, use_cache=False).logits.sum()

    expected = gradients(whole)
    for name, grad in gradients(streamed).items():
        assert torch.allclose(grad, expected[name], atol=1e-3 * expected[name].abs().max()), name


def test_inference_mode_and_no_grad_take_turns():
    model = patched(attention="sdpa")
    ids = tokens(100)
    cache = FreqKVCache(model.config, window=23)
    with torch.inference_mode():
        model(ids[:, :30], **{CACHE: cache})
    with torch.no_grad():
        model(ids[:, 30:60], **{CACHE: cache})
    with torch.inference_mode():
        last = model(ids[:, 60:], **{CACHE: cache}).logits
    expected = stream(model, ids, FreqKVCache(model.config, window=23), [100])[:, 60:]
    assert torch.allclose(last, expected, atol=1e-4)
