"""`generate` on a patched model."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny_llama, tokens
from transformers import DynamicCache, TextStreamer

import freqkv
from freqkv import FreqKVCache
from freqkv.models.upstream import CACHE

N = 32


@pytest.fixture(scope="module")
def model():
    model = tiny_llama(attention="sdpa")
    freqkv.patch(model)
    return model


def new_cache(model, **numbers):
    return FreqKVCache(model.config, **{"window": N, "recent_tokens": 3, **numbers})


@torch.no_grad()
def manual_greedy(model, ids, cache, new_tokens):
    """One forward for the prompt, then one per token."""
    start = cache.get_seq_length()
    logits = model(ids[:, start:], **{CACHE: cache}).logits[:, -1]
    for _ in range(new_tokens - 1):
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        logits = model(ids[:, -1:], **{CACHE: cache}).logits[:, -1]
    return torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)


@pytest.mark.parametrize("prompt", [1, N - 1, N, N + 1, 2 * N + 3, 10 * N])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_equals_a_manual_loop(model, prompt, batch):
    ids = tokens(prompt, batch)
    cache = new_cache(model)
    output = model.generate(ids, **{CACHE: cache}, max_new_tokens=3 * N, do_sample=False)
    assert torch.equal(output, manual_greedy(model, ids, new_cache(model), 3 * N))
    assert cache.tokens_seen == prompt + 3 * N - 1
    assert cache.entries <= N


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_below_the_window_generate_is_the_library_s_own(attention):
    model = tiny_llama(attention=attention)
    ids = tokens(20, batch=2)
    settings = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **{CACHE: DynamicCache(config=model.config)}, **settings)
    freqkv.patch(model)
    output = model.generate(ids, **{CACHE: new_cache(model)}, **settings)
    assert torch.equal(output.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(output.logits, expected.logits, strict=True))


def test_sampling_with_a_seed_is_reproducible(model):
    ids = tokens(50)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate(ids, **{CACHE: new_cache(model)}, max_new_tokens=60, do_sample=True, top_k=20))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("chunk", [1, 7, N, 3 * N + 1])
def test_prefill_chunk_size(model, chunk):
    ids = tokens(5 * N + 2)
    expected = model.generate(ids, **{CACHE: new_cache(model)}, max_new_tokens=40, do_sample=False)
    output = model.generate(
        ids, **{CACHE: new_cache(model)}, max_new_tokens=40, do_sample=False, prefill_chunk_size=chunk
    )
    assert torch.equal(output, expected)


def test_a_second_generate_goes_on_with_the_same_cache(model):
    ids = tokens(2 * N + 3)
    cache = new_cache(model)
    first = model.generate(ids, **{CACHE: cache}, max_new_tokens=N, do_sample=False)
    turn = torch.cat([first, tokens(17, seed=5)], 1)
    second = model.generate(turn, **{CACHE: cache}, max_new_tokens=N, do_sample=False)
    fresh = model.generate(turn, **{CACHE: new_cache(model)}, max_new_tokens=N, do_sample=False)
    assert torch.equal(second, fresh)
    assert cache.tokens_seen == turn.shape[1] + N - 1


def test_inputs_embeds(model):
    ids = tokens(2 * N + 5)
    expected = model.generate(ids, **{CACHE: new_cache(model)}, max_new_tokens=N, do_sample=False)
    embeds = model.get_input_embeddings()(ids)
    output = model.generate(inputs_embeds=embeds, **{CACHE: new_cache(model)}, max_new_tokens=N, do_sample=False)
    assert torch.equal(output, expected[:, ids.shape[1] :])


def test_numbers_make_generate_use_a_cache_of_its_own(model):
    ids = tokens(2 * N)
    expected = model.generate(ids, **{CACHE: new_cache(model)}, max_new_tokens=N, do_sample=False)
    plain = model.generate(ids, **{CACHE: DynamicCache(config=model.config)}, max_new_tokens=N, do_sample=False)
    with freqkv.patch(model, window=N, recent_tokens=3):
        output = model.generate(ids, max_new_tokens=N, do_sample=False, return_dict_in_generate=True)
        assert isinstance(output[CACHE], FreqKVCache)
        assert torch.equal(output.sequences, expected)
        explicit = DynamicCache(config=model.config)
        other = model.generate(ids, **{CACHE: explicit}, max_new_tokens=N, do_sample=False)
        assert torch.equal(other, plain), "an explicit cache wins"
        uncached = model.generate(ids, use_cache=False, max_new_tokens=5, do_sample=False)
        assert torch.equal(uncached, expected[:, : 2 * N + 5])
    assert torch.equal(model.generate(ids, max_new_tokens=N, do_sample=False), plain)


def test_streamer_and_long_runs(model):
    """The cache stays where it is while the text goes on."""

    class Count(TextStreamer):
        def __init__(self):
            self.values = []

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.values.append(None)

    cache, streamer = new_cache(model), Count()
    model.generate(tokens(40), **{CACHE: cache}, max_new_tokens=1, do_sample=False)
    pointers = [layer.keys.data_ptr() for layer in cache.layers]
    size = cache.nbytes
    history = tokens(40)
    history = model.generate(
        torch.cat([history, tokens(1)], 1), **{CACHE: cache}, max_new_tokens=1000, streamer=streamer
    )
    assert len(streamer.values) == 1002
    assert cache.nbytes == size
    assert [layer.keys.data_ptr() for layer in cache.layers] == pointers
    assert cache.tokens_seen == history.shape[1] - 1


def test_beams_and_repeated_rows(model):
    """Rows of equal length are reordered with their entries, compressed ones too."""
    ids = tokens(2 * N, batch=2)
    beams = model.generate(
        ids, **{CACHE: new_cache(model)}, max_new_tokens=2 * N, num_beams=3, do_sample=False, early_stopping=True
    )
    for row in range(2):
        alone = model.generate(
            ids[row : row + 1], **{CACHE: new_cache(model)}, max_new_tokens=2 * N, num_beams=3, do_sample=False
        )
        assert torch.equal(beams[row : row + 1], alone)
    cache = new_cache(model)
    with torch.no_grad():
        model(ids, **{CACHE: cache})
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(2)
        one = model(tokens(9, 2), **{CACHE: cache}).logits
        two = model(tokens(9, 2).repeat_interleave(2, 0), **{CACHE: repeated}).logits
        assert torch.allclose(two, one.repeat_interleave(2, 0), atol=1e-4)
        repeated.batch_select_indices(torch.tensor([3]))
        assert repeated.layers[0].keys.shape[0] == 1


def test_crop_rolls_back_to_the_last_compression(model):
    ids = tokens(N + 10)
    cache = new_cache(model)
    with torch.no_grad():
        model(ids, **{CACHE: cache})
        kept = copy.deepcopy(cache)
        model(tokens(3, seed=9), **{CACHE: cache})
        cache.crop(-3)
        one = model(tokens(5, seed=4), **{CACHE: cache}).logits
        two = model(tokens(5, seed=4), **{CACHE: kept}).logits
    assert torch.equal(one, two)
    with pytest.raises(RuntimeError, match="compressed since"):
        cache.crop(-20)
    with pytest.raises(ValueError, match="minus the number"):
        cache.crop(5)
    with pytest.raises(ValueError, match="cannot remove 100 of 47"):
        cache.crop(-100)
    assert cache.tokens_seen == N + 15


def test_hidden_states_and_attentions(model):
    ids = tokens(2 * N)
    with torch.no_grad():
        output = model(ids, **{CACHE: new_cache(model)}, output_hidden_states=True)
        assert [h.shape for h in output.hidden_states] == [(1, 2 * N, 48)] * 3
        eager = tiny_llama(attention="eager")
        freqkv.patch(eager)
        cache = new_cache(eager)
        weights = eager(ids[:, :20], **{CACHE: cache}, output_attentions=True).attentions
        assert [w.shape for w in weights] == [(1, 4, 20, 20)] * 2
        with pytest.raises(ValueError, match="Feed at most 12 tokens"):
            eager(ids, **{CACHE: cache}, output_attentions=True)
        assert cache.tokens_seen == 20
        eager(ids[:, :12], **{CACHE: cache}, output_attentions=True)
