"""Static caches: single tokens through one graph of fixed shapes, compiled once."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from models import tiny_llama, tokens
from running import padded, rows_of
from transformers import CompileConfig

import freqkv
from freqkv import FreqKVCache, FreqKVConfig
from freqkv.models.upstream import CACHE

N = 23
CONFIG = FreqKVConfig(window=N, sink_tokens=3, recent_tokens=2)
NEW = 2 * N + 9
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def patched(family="llama", attention="sdpa"):
    if family == "llama":
        model = tiny_llama(attention=attention)
    else:
        model = zoo.tiny_model(family)
        model.set_attn_implementation(attention)
    freqkv.patch(model)
    return model


def generate(model, ids, static, cache=None, **options):
    cache = FreqKVCache(model.config, CONFIG, static=static) if cache is None else cache
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE: cache}, **OPTIONS, **options), cache


def check_equal(got, expected):
    """The same tokens, and logits to rounding: whole buffers are summed in another order."""
    assert torch.equal(got.sequences, expected.sequences)
    for one, two in zip(got.logits, expected.logits, strict=True):
        assert torch.allclose(one, two, atol=2e-4)


@pytest.fixture
def graphs():
    """What was compiled, graph by graph."""
    torch._dynamo.reset()
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    made_with = backend
    yield made, made_with
    torch._dynamo.reset()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gptj", "deepseek_v3", "phi", "nanochat", "smollm3", "hunyuan_v1_dense"])
@pytest.mark.parametrize("prompt", [5, N + 1])
def test_tokens_are_those_of_any_cache(family, attention, prompt):
    model = patched(family, attention)
    ids = tokens(prompt, 2).clamp(3, 99)
    expected, other = generate(model, ids, static=False)
    got, cache = generate(model, ids, static=True)
    check_equal(got, expected)
    assert (cache.tokens_seen, cache.entries, cache.compressions) == (
        other.tokens_seen,
        other.entries,
        other.compressions,
    )
    assert cache.compressions > 2
    for layer in cache.layers:
        assert layer.buffers.capacity == N


@pytest.mark.parametrize("way", ["forward", "model", "generate"])
@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")
def test_one_graph_serves_all_tokens(way, graphs):
    """Through compressions, another conversation on the same cache, and attention masks that grow."""
    made, backend = graphs
    model = patched()
    ids = tokens(9, 2)
    expected, _ = generate(model, ids, static=False)
    options = {}
    if way == "forward":
        model.forward = torch.compile(model.forward, backend=backend)
    elif way == "generate":
        options["compile_config"] = CompileConfig(backend=backend, mode=None)
        options["compile_config"]._compile_all_devices = True
    if way == "model":
        compiled, cache = torch.compile(model, backend=backend), FreqKVCache(model.config, CONFIG, static=True)
        with torch.no_grad():
            rows = ids
            for step in range(NEW):
                new = rows[:, -1:] if step else rows
                mask = torch.ones_like(rows)
                logits = compiled(new, **{CACHE: cache}, attention_mask=mask).logits[:, -1]
                assert torch.allclose(logits, expected.logits[step], atol=2e-4)
                rows = torch.cat([rows, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(rows, expected.sequences)
    else:
        got, cache = generate(model, ids, True, **options)
        check_equal(got, expected)
        cache.reset()
        check_equal(generate(model, ids, True, cache, **options)[0], expected)
    assert cache.compressions > 2
    assert len(made) == 1


@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")
def test_other_caches_in_a_compiled_model_say_that_they_are_not(graphs, caplog):
    made, backend = graphs
    model = patched()
    ids = tokens(9, 2)
    expected, _ = generate(model, ids, static=False)
    model.forward = torch.compile(model.forward, backend=backend)
    freqkv.patching.decoder._warn_not_static.cache_clear()
    got, _ = generate(model, ids, static=False)
    assert torch.equal(got.sequences, expected.sequences)
    assert not made
    assert sum("static=True" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("lengths", [[4, 9], [1, N + 1, 3 * N + 5]])
def test_padded_rows_go_the_ordinary_way(lengths):
    model = patched()
    ids, mask = padded(rows_of(lengths))
    outputs = [
        model.generate(
            ids,
            attention_mask=mask,
            **{CACHE: FreqKVCache(model.config, CONFIG, static=static)},
            max_new_tokens=NEW,
            do_sample=False,
        )
        for static in (False, True)
    ]
    assert torch.equal(*outputs)


@torch.no_grad()
def test_turns_crops_and_copies():
    model = patched()
    static, other = (FreqKVCache(model.config, CONFIG, static=static) for static in (True, False))
    for cache in (static, other):
        cache.activate_past_recording()

    def feed(length, seed):
        ids = tokens(length, 2, seed=seed)
        one, two = (model(ids, **{CACHE: cache}).logits for cache in (static, other))
        assert torch.allclose(one, two, atol=2e-4)

    feed(N - 1, 1)
    for seed in range(4):  # over a compression
        feed(1, seed)
    for cache in (static, other):
        cache.crop(-3)
    assert static.compressions == other.compressions == 0
    feed(1, 5)
    feed(2 * N, 6)
    static, other = copy.deepcopy(static), copy.deepcopy(other)
    for seed in range(N):
        feed(1, seed)


def test_beams():
    model = patched()
    ids = tokens(9, 2)
    outputs = [
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE: FreqKVCache(model.config, CONFIG, static=static)},
            max_new_tokens=N,
            num_beams=3,
            do_sample=False,
        )
        for static in (False, True)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("at", [N - 3, N])
def test_a_token_that_breaks_off(at):
    """Where a compression is due, and where it is not."""
    model = patched()
    cache = FreqKVCache(model.config, CONFIG, static=True)
    ids = tokens(at + 3)
    with torch.no_grad():
        expected = model(ids, **{CACHE: FreqKVCache(model.config, CONFIG)}).logits
        model(ids[:, :at], **{CACHE: cache})

        def broken(*_):
            raise KeyboardInterrupt

        hook = model.model.layers[1].register_forward_pre_hook(broken)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, at : at + 1], **{CACHE: cache})
        hook.remove()
        for call in (ids[:, at : at + 1], ids[:, at:]):
            with pytest.raises(RuntimeError, match="spent"):
                model(call, **{CACHE: cache})
        cache.reset()
        model(ids[:, :at], **{CACHE: cache})
        steps = [model(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(at, at + 3)]
    assert torch.allclose(torch.cat(steps, 1), expected[:, at:], atol=2e-4)


@torch.no_grad()
def test_a_loaded_cache(tmp_path):
    model = patched()
    cache = FreqKVCache(model.config, CONFIG, static=True)
    model(tokens(2 * N, 2), **{CACHE: cache})
    cache.save(tmp_path / "cache", model)
    loaded = FreqKVCache.load(tmp_path / "cache", model, static=True)
    assert loaded.is_compileable
    for seed in range(N):
        ids = tokens(1, 2, seed=seed)
        one, two = (model(ids, **{CACHE: each}).logits for each in (cache, loaded))
        assert torch.equal(one, two)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next", "falcon_h1"])
def test_models_with_other_layers_are_refused(family):
    with pytest.raises(ValueError, match="static=True needs a model all of whose layers"):
        FreqKVCache(zoo.tiny_config(family), CONFIG, static=True)


def test_caches_made_in_inference_mode():
    model = patched()
    with torch.inference_mode():
        made = FreqKVCache(model.config, CONFIG, static=True)
        copied = copy.deepcopy(made)
    expected, _ = generate(model, tokens(9), static=True)
    for cache in (made, copied):
        got, _ = generate(model, tokens(9), static=True, cache=cache)
        assert torch.equal(got.sequences, expected.sequences)


def test_a_fold_that_fails_leaves_a_static_cache_as_it_was(tmp_path):
    fails = [False]

    def compressor(keys, values, keep):
        if fails[0]:
            raise OSError("on purpose")
        return freqkv.keep_recent(keys, values, keep)

    model, ids = patched(), tokens(N + 3)
    caches = [FreqKVCache(model.config, CONFIG, compressor=compressor, static=True) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :N], **{CACHE: cache})
        fails[0] = True
        with pytest.raises(OSError, match="on purpose"):
            model(ids[:, N : N + 1], **{CACHE: caches[0]})
        fails[0] = False
        assert not caches[0].is_spent
        caches[0].save(tmp_path / "cache.safetensors")
        logits = [model(ids[:, N : N + 1], **{CACHE: cache}).logits for cache in caches]
    assert torch.equal(*logits)
