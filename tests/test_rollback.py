"""Assisted decoding, prompt lookup, and what they need: going back over a compression."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
import transformers
import zoo
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from models import tiny_llama, tokens
from running import padded, rows_of
from transformers import DynamicCache

import freqkv
from freqkv import FreqKVCache, FreqKVConfig
from freqkv.models.upstream import CACHE

TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])
N = 23
CONFIG = FreqKVConfig(window=N, sink_tokens=3, recent_tokens=2)
STEP = CONFIG.schedule.step
MODEL = tiny_llama(attention="sdpa")
MODEL.generation_config.pad_token_id = None  # any token may be generated, and none of them is padding
freqkv.patch(MODEL)


def draft(noise, seed=3, length=None, target=MODEL):
    """The target with other weights: the more noise, the more of what it proposes is rejected."""
    model = copy.deepcopy(target)
    freqkv.unpatch(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(noise * weight.std() * torch.randn(weight.shape, generator=generator))
    model.generation_config.assistant_confidence_threshold = 0
    if length is not None:
        model.generation_config.num_assistant_tokens = length
        model.generation_config.num_assistant_tokens_schedule = "constant"
    return model


DRAFTS = {noise: draft(noise) for noise in (0.0, 0.1, 0.3, 1.0)}


@contextlib.contextmanager
def count_forwards(model):
    calls = []
    hook = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


def with_length(model, length, schedule="constant"):
    model.generation_config.num_assistant_tokens = length
    model.generation_config.num_assistant_tokens_schedule = schedule
    return model


@settings(max_examples=12, phases=[Phase.generate])
@given(
    prompt=st.integers(1, 3 * N),
    length=st.integers(3, 10),
    noise=st.sampled_from([*DRAFTS]),
    window=st.sampled_from([23, 31]),
    recent=st.integers(0, 3),
)
def test_an_assistant_changes_no_token(prompt, length, noise, window, recent):
    config = FreqKVConfig(window=window, recent_tokens=recent)
    assume(length <= config.schedule.step)
    ids = tokens(prompt)
    options = {"max_new_tokens": 2 * window, "do_sample": False}
    expected = MODEL.generate(ids, **{CACHE: FreqKVCache(MODEL.config, config)}, **options)
    cache = FreqKVCache(MODEL.config, config)
    output = MODEL.generate(ids, **{CACHE: cache}, assistant_model=with_length(DRAFTS[noise], length), **options)
    assert torch.equal(output, expected)
    assert cache.tokens_seen == output.shape[1] - 1
    assert cache.entries <= window


def test_drafts_are_accepted_and_rejected():
    """So that what holds above is not for want of either."""
    forwards = []
    for noise in (0.0, 0.1, 1.0):
        with count_forwards(MODEL) as count:
            cache = FreqKVCache(MODEL.config, CONFIG)
            assistant = with_length(DRAFTS[noise], 5)
            MODEL.generate(tokens(N), **{CACHE: cache}, assistant_model=assistant, max_new_tokens=60, do_sample=False)
        forwards.append(len(count))
    assert 10 < min(forwards) < 55 < max(forwards) <= 60, forwards


def test_an_assistant_whose_drafts_grow():
    """The default schedule: two tokens more after each draft that was right."""
    assistant = with_length(DRAFTS[0.1], 4, "heuristic")
    ids, options = tokens(40), {"max_new_tokens": 150, "do_sample": False}
    expected = MODEL.generate(ids, **{CACHE: FreqKVCache(MODEL.config, window=64)}, **options)
    cache = FreqKVCache(MODEL.config, window=64)
    assert torch.equal(MODEL.generate(ids, **{CACHE: cache}, assistant_model=assistant, **options), expected)
    assert cache.compressions == 5


def test_drafts_longer_than_the_tokens_between_two_compressions_say_so():
    """One compression is recorded, the last."""
    assistant = with_length(DRAFTS[1.0], STEP + 5)
    cache = FreqKVCache(MODEL.config, CONFIG)
    with pytest.raises(RuntimeError, match="Of drafts, num_assistant_tokens"):
        MODEL.generate(tokens(40), **{CACHE: cache}, assistant_model=assistant, max_new_tokens=3 * N, do_sample=False)


@pytest.mark.parametrize("length", [3, 6, 9])
def test_prompt_lookup(length):
    ids = tokens(13).repeat(1, 4)
    options = {"max_new_tokens": 3 * N, "do_sample": False}
    expected = MODEL.generate(ids, **{CACHE: FreqKVCache(MODEL.config, CONFIG)}, **options)
    cache = FreqKVCache(MODEL.config, CONFIG)
    output = MODEL.generate(ids, **{CACHE: cache}, prompt_lookup_num_tokens=length, **options)
    assert torch.equal(output, expected)
    more = torch.cat([output, tokens(5, seed=4)], 1)
    expected = MODEL.generate(more, **{CACHE: FreqKVCache(MODEL.config, CONFIG)}, **options)
    assert torch.equal(MODEL.generate(more, **{CACHE: cache}, **options), expected), "the conversation goes on"


def test_what_is_sampled_was_scored_as_the_text_alone_is():
    torch.manual_seed(0)
    options = {"max_new_tokens": 2 * N, "do_sample": True, "return_dict_in_generate": True, "output_logits": True}
    cache = FreqKVCache(MODEL.config, CONFIG)
    assistant = with_length(DRAFTS[0.1], 5)
    with count_forwards(MODEL) as count:
        output = MODEL.generate(tokens(N), **{CACHE: cache}, assistant_model=assistant, **options)
    assert 2 * N / 6 <= len(count) < 2 * N
    with torch.no_grad():
        alone = MODEL(output.sequences[:, :-1], **{CACHE: FreqKVCache(MODEL.config, CONFIG)}).logits
    assert torch.allclose(torch.cat(output.logits), alone[0, N - 1 :], atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox", "deepseek_v2"])
def test_families(family):
    model = zoo.tiny_model(family)
    freqkv.patch(model)
    ids = tokens(9).clamp(3, 99).repeat(1, 4)
    options = {"max_new_tokens": 2 * N, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **{CACHE: FreqKVCache(model.config, CONFIG)}, **options)
    for assistant in (
        {"prompt_lookup_num_tokens": 5},
        {"assistant_model": draft(0.1, length=5, target=model)},
    ):
        if "assistant_model" in assistant and family == "gemma3_text" and TRANSFORMERS < (5, 23):
            continue  # older versions of transformers cannot run a draft model with sliding layers, with any cache
        cache = FreqKVCache(model.config, CONFIG)
        assert torch.equal(model.generate(ids, **{CACHE: cache}, **assistant, **options), expected)


def test_a_single_row_with_padding():
    ids, mask = padded([tokens(9)[0], tokens(14)[0]])
    options = {"max_new_tokens": 2 * N, "do_sample": False}
    expected = MODEL.generate(tokens(9), **{CACHE: FreqKVCache(MODEL.config, CONFIG)}, **options)
    cache = FreqKVCache(MODEL.config, CONFIG)
    assistant = with_length(DRAFTS[1.0], 5)
    output = MODEL.generate(ids[:1], attention_mask=mask[:1], **{CACHE: cache}, assistant_model=assistant, **options)
    assert torch.equal(output[:, 14:], expected[:, 9:])


# Assistants that are patched themselves


def test_a_target_patched_with_numbers():
    ids, options = tokens(2 * N), {"max_new_tokens": 2 * N, "do_sample": False}
    expected = MODEL.generate(ids, **{CACHE: FreqKVCache(MODEL.config, CONFIG)}, **options)
    with freqkv.patch(MODEL, CONFIG):
        assert torch.equal(MODEL.generate(ids, assistant_model=with_length(DRAFTS[0.3], 5), **options), expected)


@pytest.mark.parametrize("length", [3, 8])
def test_an_assistant_patched_with_numbers(length):
    assistant = draft(0.3, length=length)
    freqkv.patch(assistant, CONFIG)
    ids, options = tokens(2 * N), {"max_new_tokens": 2 * N, "do_sample": False}
    expected = MODEL.generate(ids, **{CACHE: FreqKVCache(MODEL.config, CONFIG)}, **options)
    output = MODEL.generate(ids, **{CACHE: FreqKVCache(MODEL.config, CONFIG)}, assistant_model=assistant, **options)
    assert torch.equal(output, expected)


def test_a_patched_assistant_for_a_plain_target():
    """Up to the window of the assistant."""
    plain, assistant = draft(0.0), draft(0.3, length=5)
    freqkv.patch(assistant, window=128)
    ids, options = tokens(N), {"max_new_tokens": 2 * N, "do_sample": False}
    assert torch.equal(plain.generate(ids, assistant_model=assistant, **options), plain.generate(ids, **options))


# crop


@torch.no_grad()
def feed(cache, ids, chunks, mask=None):
    """Logits of the chunks of `ids`."""
    outputs, start = [], 0
    for chunk in chunks:
        outputs.append(MODEL(ids[:, start : start + chunk], **{CACHE: cache}).logits)
        start += chunk
    return outputs


def same_from_here(cache, truth, exact):
    """Whether two caches hold the same, seen from what the model makes of them."""
    cache, truth = copy.deepcopy(cache), copy.deepcopy(truth)
    assert (cache.tokens_seen, cache.entries, cache.compressions, cache.row_tokens) == (
        truth.tokens_seen,
        truth.entries,
        truth.compressions,
        truth.row_tokens,
    )
    batch = cache.layers[0].keys.shape[0] if cache.layers[0].keys is not None else 1
    one, two = (torch.cat(feed(c, tokens(N, batch, seed=8), [3, N - 3]), 1) for c in (cache, truth))
    return torch.equal(one, two) if exact else torch.allclose(one, two, atol=1e-4)


def tensor_bytes(value):
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    return sum(map(tensor_bytes, value)) if isinstance(value, (tuple, list)) else 0


@given(
    before=st.integers(1, 4 * N),
    rounds=st.lists(
        st.tuples(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.floats(0, 1)), min_size=1, max_size=4
    ),
    batch=st.integers(1, 2),
)
def test_a_recorded_past_is_gone_back_to(before, rounds, batch):
    """Feeding and taking back, again and again, leaves what never feeding would have left."""
    cache, truth = (FreqKVCache(MODEL.config, CONFIG) for _ in range(2))
    for each in (cache, truth):
        feed(each, tokens(before, batch), [before])
    cache.activate_past_recording()
    exact = True
    for turn, (chunks, share) in enumerate(rounds):
        ids = tokens(sum(chunks), batch, seed=turn + 3)
        feed(cache, ids, chunks)
        gone = round(share * ids.shape[1])
        kept = ids.shape[1] - gone
        edges = [0, *itertools.accumulate(chunks)]
        if cache.compressions - CONFIG.schedule.compressions(cache.tokens_seen - gone) > 1:
            held = copy.deepcopy(cache)
            with pytest.raises(RuntimeError, match=f"cannot remove {gone} tokens"):
                cache.crop(-gone)
            assert same_from_here(cache, held, exact=True)
            return
        cache.crop(-gone)
        own = [b - a for a, b in itertools.pairwise([*(edge for edge in edges if edge < kept), kept]) if b > a]
        feed(truth, ids[:, :kept], own)
        exact &= kept in edges
        assert same_from_here(cache, truth, exact)
    for layer in cache.layers:
        assert tensor_bytes(held_by(layer)) <= 2 * layer.nbytes


def held_by(layer):
    return [*layer.buffers.tensors.values(), *(layer.past.tensors.values() if layer.past is not None else ())]


def test_recording_takes_one_window_more_at_most():
    cache = FreqKVCache(MODEL.config, CONFIG)
    cache.activate_past_recording()
    most = 0
    for turn in range(5 * N):
        feed(cache, tokens(1, seed=turn), [1])
        most = max(most, *(tensor_bytes(held_by(layer)) for layer in cache.layers))
    window = 2 * N * 2 * 16 * 4
    assert window < most <= 2 * window


@given(before=st.integers(1, 3 * N), fed=st.integers(1, 2 * STEP), share=st.floats(0, 1))
def test_without_recording_a_crop_goes_back_to_the_last_compression_or_changes_nothing(before, fed, share):
    cache = FreqKVCache(MODEL.config, CONFIG)
    ids, gone = tokens(fed, seed=3), round(share * fed)
    feed(cache, tokens(before), [before])
    truth = copy.deepcopy(cache)
    feed(cache, ids, [1] * fed)
    if cache.compressions == CONFIG.schedule.compressions(before + fed - gone):
        cache.crop(-gone)
        feed(truth, ids, [1] * (fed - gone))
    else:
        truth = copy.deepcopy(cache)
        with pytest.raises(
            RuntimeError, match=rf"cannot remove {gone} tokens: .* compressed since.*activate_past_recording"
        ):
            cache.crop(-gone)
    assert same_from_here(cache, truth, exact=True)


def test_what_a_crop_over_two_compressions_advises():
    cache = FreqKVCache(MODEL.config, CONFIG)
    feed(cache, tokens(N), [N])
    cache.activate_past_recording()
    feed(cache, tokens(STEP + 1), [STEP + 1])
    with pytest.raises(
        RuntimeError, match=f"fewer than the {STEP} tokens between two compressions.*num_assistant_tokens"
    ):
        cache.crop(-STEP - 1)


def test_crop_takes_any_whole_number():
    cache, truth = (FreqKVCache(MODEL.config, CONFIG) for _ in range(2))
    feed(cache, tokens(9), [9])
    feed(truth, tokens(9), [7])
    cache.crop(-torch.tensor(2))
    assert same_from_here(cache, truth, exact=False)
    assert type(cache.tokens_seen) is int


@pytest.mark.parametrize("record", [False, True])
@given(
    first=st.lists(st.integers(1, 2 * N), min_size=3, max_size=3),
    last=st.lists(st.integers(0, STEP), min_size=3, max_size=3).filter(any),
    side=st.sampled_from(["left", "right"]),
    shares=st.lists(st.floats(0, 1), min_size=2, max_size=2),
)
@torch.no_grad()
def test_ragged_rows_go_back_within_the_last_call(record, first, last, side, shares):
    """Across a compression where it was recorded; else they cannot, and nothing is changed."""
    ids, mask = padded(rows_of(first))
    more, new = padded(rows_of(last, seed=20), side)
    cache = FreqKVCache(MODEL.config, CONFIG)
    if record:
        cache.activate_past_recording()
    MODEL(ids, attention_mask=mask, **{CACHE: cache})
    before = copy.deepcopy(cache)
    MODEL(more, attention_mask=torch.cat([mask, new], 1), **{CACHE: cache})
    if cache.row_tokens is None:
        return
    columns = more.shape[1]
    for share in shares:
        gone = round(share * columns)
        if gone == 0:
            continue
        columns -= gone
        truth = copy.deepcopy(before)
        if columns:
            MODEL(more[:, :columns], attention_mask=torch.cat([mask, new[:, :columns]], 1), **{CACHE: truth})
        schedule, rows = CONFIG.schedule, [m + n for m, n in zip(first, new[:, :columns].sum(1).tolist(), strict=True)]
        if any(
            schedule.compressions(a) != schedule.compressions(b) for a, b in zip(rows, cache.row_tokens, strict=True)
        ):
            held = copy.deepcopy(cache)
            if not record:
                with pytest.raises(RuntimeError, match="cannot remove"):
                    cache.crop(-gone)
            try:
                cache.crop(-gone)
            except RuntimeError:  # further back than the last compression of a row
                assert same_from_here(cache, held, exact=True)
                return
        else:
            cache.crop(-gone)
        assert (cache.row_tokens or [cache.tokens_seen] * len(rows)) == rows
        held = copy.deepcopy(cache), copy.deepcopy(truth)
        follow = tokens(N, 3, seed=8)
        one, two = (MODEL(follow, **{CACHE: each}).logits for each in held)
        assert torch.allclose(one, two, atol=2e-4)


@pytest.mark.parametrize("removed", [1, 3, 4, 8])
@pytest.mark.parametrize("padding_first", [True, False])
@torch.no_grad()
def test_ragged_rows_go_back_over_several_calls(padding_first, removed):
    """As drafts do that are made token by token; padding lies before or among what is removed."""
    ids, mask = padded(rows_of([4, 9]))
    new = tokens(3, 2, seed=5)
    calls = [(new[:, i : i + 1], torch.ones(2, 1, dtype=torch.long)) for i in range(3)]
    calls.insert(0 if padding_first else 2, (ids, mask))
    ids, mask = (torch.cat(parts, dim=1) for parts in zip(*calls, strict=True))
    cache, truth = (FreqKVCache(MODEL.config, CONFIG) for _ in range(2))
    start = 0
    for call, _ in calls:
        start += call.shape[1]
        MODEL(call, attention_mask=mask[:, :start], **{CACHE: cache})
    cache.crop(-removed)
    MODEL(ids[:, :-removed], attention_mask=mask[:, :-removed], **{CACHE: truth})
    assert (cache.row_tokens or [cache.tokens_seen] * 2) == mask[:, :-removed].sum(1).tolist()
    follow = tokens(4, 2, seed=8)
    one, two = (MODEL(follow, **{CACHE: each}).logits for each in (cache, truth))
    assert torch.allclose(one, two, atol=2e-4)


@torch.no_grad()
def test_ragged_rows_go_back_no_further_than_padding_is_known():
    ids, mask = padded(rows_of([4, 9]))
    cache = FreqKVCache(MODEL.config, CONFIG)
    MODEL(ids, attention_mask=mask, **{CACHE: cache})
    for index in range(N):
        MODEL(tokens(1, 2, seed=index), **{CACHE: cache})
    truth = copy.deepcopy(cache)
    with pytest.raises(RuntimeError, match=f"for the last {N} only"):
        cache.crop(-N - 1)
    assert same_from_here(cache, truth, exact=True)
    assert cache.row_tokens == [4 + N, 9 + N]


@pytest.mark.parametrize("before", [N // 2, N - 2])
@torch.no_grad()
def test_sliding_layers_go_back_as_far(before):
    """They record a past of their own."""
    model = zoo.tiny_model("gemma3_text")
    freqkv.patch(model)
    first, wrong, right = (tokens(n, 2, seed=n).clamp(3, 99) for n in (before, 5, 6))
    cache, truth = (FreqKVCache(model.config, CONFIG) for _ in range(2))
    for each in (cache, truth):
        model(first, **{CACHE: each})
    cache.activate_past_recording()
    model(wrong, **{CACHE: cache})
    cache.crop(-5)
    assert (cache.tokens_seen, cache.compressions) == (before, 0)
    for step in range(6):
        one, two = (model(right[:, step : step + 1], **{CACHE: each}).logits for each in (cache, truth))
        assert torch.equal(one, two)
        cache.crop(0)


@torch.no_grad()
def test_linear_layers_go_back_as_those_of_a_dynamic_cache():
    """Which is to rounding only, in transformers itself; below the window there is nothing else."""
    model = zoo.tiny_model("qwen3_next")
    first, wrong, right = (tokens(n, 2, seed=n).clamp(3, 99) for n in (9, 5, 6))

    def run(cache):
        model(first, **{CACHE: cache})
        cache.activate_past_recording()
        model(wrong, **{CACHE: cache})
        cache.crop(-5)
        return model(right, **{CACHE: cache}).logits

    expected = run(DynamicCache(config=model.config))
    freqkv.patch(model)
    assert torch.equal(run(FreqKVCache(model.config, CONFIG)), expected)


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("family", ["falcon_h1", "zamba2"])
@torch.no_grad()
def test_layers_with_a_state_beside_padded_entries(record, family):
    """The state goes back with the entries, as that of a DynamicCache does, or neither does."""
    model = zoo.tiny_model(family)
    ids, mask = padded([row.clamp(3, 99) for row in rows_of([4, 9])])
    wrong, right = (tokens(n, 2, seed=n).clamp(3, 99) for n in (3, 2))

    def longer(columns):
        return torch.cat([mask, torch.ones(2, columns, dtype=torch.long)], 1)

    def start(cache):
        model(ids, attention_mask=mask, **{CACHE: cache})
        if record:
            cache.activate_past_recording()
        model(wrong, attention_mask=longer(3), **{CACHE: cache})
        return cache

    def go_on(cache, columns):
        return model(right, attention_mask=longer(columns), **{CACHE: cache}).logits

    plain = start(DynamicCache(config=model.config))
    if record:
        plain.crop(-3)
    expected = go_on(plain, 2 if record else 5)
    freqkv.patch(model)
    cache = start(FreqKVCache(model.config, CONFIG))
    if record:
        cache.crop(-3)
    else:
        with pytest.raises(RuntimeError):
            cache.crop(-3)
    assert cache.row_tokens == ([4, 9] if record else [7, 12])
    assert torch.allclose(go_on(cache, 2 if record else 5), expected, atol=1e-4)


@torch.no_grad()
def test_a_crop_after_a_call_that_failed():
    """It goes by the padding of the last call that entered."""
    ids, mask = padded(rows_of([4, 9]))
    cache = FreqKVCache(MODEL.config, CONFIG)
    MODEL(ids, attention_mask=mask, **{CACHE: cache})
    truth = copy.deepcopy(cache)
    failing = torch.cat([mask, torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])], 1)
    with pytest.raises(IndexError):
        MODEL(torch.full((2, 4), 10_000), attention_mask=failing, **{CACHE: cache})
    assert not cache.is_spent
    for each in (cache, truth):
        each.crop(-3)
    assert cache.row_tokens == [1, 6]
    assert same_from_here(cache, truth, exact=True)


@pytest.mark.parametrize("lengths", [[N - 1, N - 1], [5, N - 1]])
@torch.no_grad()
def test_a_short_crop_keeps_the_recorded_past(lengths):
    ids, mask = padded(rows_of(lengths))
    cache, truth = (FreqKVCache(MODEL.config, CONFIG) for _ in range(2))
    for each in (cache, truth):
        MODEL(ids, attention_mask=mask, **{CACHE: each})
    cache.activate_past_recording()
    MODEL(tokens(5, 2), **{CACHE: cache})  # squeezes the longer rows
    assert cache.compressions == 1
    for removed in (0, -1, -1):
        cache.crop(removed)
        assert cache.compressions == 1
    cache.crop(-3)
    assert cache.compressions == 0
    assert same_from_here(cache, truth, exact=True)


@torch.no_grad()
def test_a_crop_that_another_layer_refuses_changes_nothing():
    """Also where entries from before a compression had been put back by then."""
    model = zoo.tiny_model("gemma3_text")
    freqkv.patch(model)
    cache = FreqKVCache(model.config, CONFIG)
    first, more = (tokens(n, 2, seed=n).clamp(3, 99) for n in (N, 2))
    model(first, **{CACHE: cache})
    for layer in cache.layers:
        if isinstance(layer, freqkv.layer.FreqKVLayer):
            layer.activate_past_recording()
    model(more[:, :1], **{CACHE: cache})
    cache.layers.reverse(), cache._compressed.reverse()  # a sliding layer, which cannot go back, comes last
    truth = copy.deepcopy(cache)
    with pytest.raises(RuntimeError, match="does not track past states"):
        cache.crop(-1)
    for each in (cache, truth):
        each.layers.reverse(), each._compressed.reverse()
    one, two = (model(more[:, 1:], **{CACHE: each}).logits for each in (cache, truth))
    assert torch.equal(one, two)


@torch.no_grad()
def test_what_was_seen_of_an_image_is_no_text_to_remove():
    """Cross-attention layers hold the image's entries, one each for a patch."""
    model = zoo.tiny_model("mllama")
    freqkv.patch(model)
    cache = FreqKVCache(model.config, CONFIG)
    crossing = model.config.get_text_config().cross_attention_layers[0]
    model(tokens(9, 2).clamp(3, 99), **{CACHE: cache})
    cache.layers[crossing].update(torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8))
    cache.crop(-5)
    assert cache.tokens_seen == 4
    assert cache.layers[crossing].keys.shape[-2] == 4


def test_a_plain_cache_of_a_patched_model_is_assisted_as_before():
    ids, options = tokens(N), {"max_new_tokens": N, "do_sample": False}
    expected = draft(0.0).generate(ids, **options)
    cache = DynamicCache(config=MODEL.config)
    assistant = with_length(DRAFTS[0.3], 5)
    assert torch.equal(MODEL.generate(ids, **{CACHE: cache}, assistant_model=assistant, **options), expected)


def test_more_than_was_seen_cannot_be_cropped():
    ids, mask = padded(rows_of([4, 6]))
    for masked in ({}, {"attention_mask": mask}):
        cache = FreqKVCache(MODEL.config, CONFIG)
        with pytest.raises(ValueError, match="cannot remove 1 of 0 tokens"):
            cache.crop(-1)
        with torch.no_grad():
            MODEL(ids, **masked, **{CACHE: cache})
        with pytest.raises(ValueError, match="cannot remove 7 of 6 tokens"):
            cache.crop(-7)
        assert cache.tokens_seen == 6


@pytest.mark.parametrize("rows", [1, 2])
def test_a_fold_that_fails_keeps_what_was_recorded(rows):
    """Also where the rows are folded at different steps."""
    fails = [False]

    def compressor(keys, values, keep):
        if fails[0]:
            raise OSError("on purpose")
        return freqkv.keep_recent(keys, values, keep)

    cache = FreqKVCache(MODEL.config, CONFIG, compressor=compressor)
    cache.activate_past_recording()
    ids = tokens(N + STEP + 4, batch=rows)
    mask = torch.ones_like(ids)
    mask[1:, :2] = 0
    folds_at = CONFIG.schedule.next_fold(N + 1)
    with torch.no_grad():
        for start, stop in ((0, N), (N, N + 1), (N + 1, folds_at)):
            MODEL(ids[:, start:stop], attention_mask=mask[:, :stop], **{CACHE: cache})
        fails[0] = True
        with pytest.raises(OSError, match="on purpose"):
            MODEL(ids[:, folds_at : folds_at + 1], attention_mask=mask[:, : folds_at + 1], **{CACHE: cache})
        fails[0] = False
        assert not cache.is_spent
        assert cache.tokens_seen == folds_at
        cache.crop(N - 2 - folds_at)
        other = FreqKVCache(MODEL.config, CONFIG, compressor=compressor)
        MODEL(ids[:, : N - 2], attention_mask=mask[:, : N - 2], **{CACHE: other})
        following = {"attention_mask": mask[:, : N + 1]}
        logits = [MODEL(ids[:, N - 2 : N + 1], **following, **{CACHE: each}).logits for each in (cache, other)]
    assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.parametrize("crops", [(5,), (1, 4)])
def test_a_sliding_layer_that_cannot_go_back_is_named(crops):
    """Transformers' own layer goes back over what it has let go without a word, and breaks at the next token."""
    model = zoo.tiny_model("gemma3_text")
    freqkv.patch(model)
    window = model.config.sliding_window
    ids = tokens(2 * window + 9)
    cache = FreqKVCache(model.config, window=4 * window)
    cache.activate_past_recording()
    with torch.no_grad():
        seen = 2 * window
        model(ids[:, :seen], **{CACHE: cache})
        cache.crop(-crops[0])
        seen -= crops[0]
        for crop in crops[1:]:
            with pytest.raises(RuntimeError, match="a layer with a sliding window would be left with"):
                cache.crop(-crop)
        assert cache.tokens_seen == seen
        logits = model(ids[:, seen : seen + 2], **{CACHE: cache}).logits
        plain = model(ids[:, : seen + 2]).logits[:, -2:]
    assert torch.allclose(logits, plain, atol=1e-4)
