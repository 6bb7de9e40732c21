"""Every compressor under every kind of schedule, through everything that is done to a cache."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import tiny_llama, tokens
from running import in_float64, padded, rows_of, stream
from strategies import Tiers, configs

import freqkv
from freqkv import FreqKVCache, KeepAttended, KeepNovel, keep_recent, low_pass_entries, mean_pool
from freqkv.models.upstream import CACHE

COMPRESSORS = {
    "low-pass": low_pass_entries,
    "recent": keep_recent,
    "mean": mean_pool,
    "attended": KeepAttended(queries=5, pool=3),
    "novel": KeepNovel(pool=3, lead=2),
    "novel, one layer for all": KeepNovel(pool=1, lead=1, layer=0),
    "novel, and entries of each head": KeepNovel(pool=3, lead=1, layer=1, per_head=0.5),
    "novel, the layers behind one": KeepNovel(pool=3, lead=0, layer=1),
}
BOUND = 1e-9  # the model is one of float64 throughout, whose logits are of order 1

LONGEST = 24  # window: any more tokens are folded
PER_HEAD = "novel, and entries of each head"  # of one span at a time, see test_selection

every = pytest.mark.parametrize("name", COMPRESSORS)
numbers = configs(max_window=LONGEST).map(lambda config: {"config": config})
tiers = st.builds(Tiers, st.integers(9, LONGEST), st.integers(0, 2), st.integers(0, 3))
schedules = st.one_of(numbers, tiers.map(lambda schedule: {"schedule": schedule}))


@functools.cache
def model_of():
    model = in_float64(tiny_llama(layers=3, attention="sdpa"))  # eager computes its softmax in float32
    freqkv.patch(model)
    return model


def options_of(name, schedule):
    assume(name != PER_HEAD or "config" in schedule)
    return {**schedule, "compressor": COMPRESSORS[name]}


def same(a, b):
    return torch.allclose(a, b, atol=BOUND, rtol=0)


def whole(model, ids, **options):
    return stream(model, ids, FreqKVCache(model.config, **options), [ids.shape[1]])


@every
@settings(max_examples=20)
@given(
    schedules,
    st.lists(st.tuples(st.sampled_from(["feed", "save", "copy", "try"]), st.integers(1, 30)), min_size=1, max_size=5),
)
def test_split_saved_copied_and_gone_back(name, tmp_path_factory, schedule, steps):
    """Whatever is done between the calls, and into whatever calls the tokens are split: one call's logits."""
    model, options = model_of(), options_of(name, schedule)
    steps = [*steps, ("try", LONGEST + 1)]
    folder = tmp_path_factory.mktemp("matrix")
    ids = tokens(sum(count for _, count in steps), batch=2)
    cache, start, logits = FreqKVCache(model.config, **options), 0, []
    cache.activate_past_recording()
    for step, count in steps:
        if step == "save":
            cache.save(folder / "cache", model)
            cache = FreqKVCache.load(folder / "cache", model, schedule=schedule.get("schedule"))
            assert cache.compressor == COMPRESSORS[name]
            cache.activate_past_recording()
        elif step == "copy":
            before, cache = cache, copy.deepcopy(cache)
            stream(model, tokens(7, batch=2, seed=5), before, [4])
        elif step == "try":  # other tokens, over one fold at most, and back
            held = cache.layers[0].schedule
            other = min(count, held.next_fold(held.next_fold(max(start, 1)) + 1) - start)
            stream(model, tokens(other, batch=2, seed=7), cache, [other])
            cache.crop(-other)
        logits.append(stream(model, ids[:, start : start + count], cache, [count]))
        start += count
    assert same(torch.cat(logits, 1), whole(model, ids, **options))
    assert cache.entries == cache.schedule.entries(start) <= cache.longest_window
    assert cache.compressions


@every
@settings(max_examples=12)
@given(schedules, st.lists(st.integers(1, 50), min_size=2, max_size=3), st.sampled_from(["left", "right"]), st.data())
def test_rows_are_rows_alone(name, schedule, lengths, side, data):
    """Rows of any lengths, padded on either side, that are taken, repeated and reordered on the way."""
    model, options = model_of(), options_of(name, schedule)
    rows = rows_of(lengths)
    ids, mask = padded(rows, side)
    cache = FreqKVCache(model.config, **options)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, **{CACHE: cache}).logits
    for row, own in enumerate(rows):
        assert same(logits[row, mask[row].bool()], whole(model, own[None], **options)[0])
    taken = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
    cache.batch_select_indices(torch.tensor(taken))
    more = tokens(LONGEST + 1, batch=len(taken), seed=5)
    with torch.no_grad():
        after = model(more, attention_mask=torch.cat([mask[taken], torch.ones_like(more)], 1), **{CACHE: cache}).logits
    for place, row in enumerate(taken):
        alone = whole(model, torch.cat([rows[row], more[place]])[None], **options)
        assert same(after[place], alone[0, -LONGEST - 1 :])


@every
@settings(max_examples=8)
@given(schedules, st.integers(LONGEST + 1, 60), st.integers(1, 59))
def test_without_a_cache(name, schedule, length, split):
    """Logits and gradients are those of streaming under autograd, and no token takes gradients from later ones."""
    model, options, ids = model_of(), options_of(name, schedule), tokens(length)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    place, split = length - 2, min(split, length - 1)
    cache, parts = FreqKVCache(model.config, **options), embeds.split([split, length - split], dim=1)
    streamed = torch.cat([model(inputs_embeds=part, **{CACHE: cache}).logits for part in parts], 1)
    with freqkv.patch(model, **options):
        logits = model(inputs_embeds=embeds, use_cache=False).logits
    assert same(logits, streamed)
    gradients = [torch.autograd.grad(each[0, place].square().sum(), embeds)[0][0] for each in (logits, streamed)]
    assert same(*gradients)
    assert gradients[0][place].any()
    assert not gradients[0][place + 1 :].any()
    assert cache.compressions


@every
@settings(max_examples=6)
@given(configs(max_window=24), st.integers(1, 40))
def test_a_static_cache(name, config, prompt):
    """Single tokens through whole buffers; a compressor that wants queries is refused by name."""
    model, options = model_of(), {"config": config, "compressor": COMPRESSORS[name]}
    if name == "attended":
        with pytest.raises(ValueError, match=r"keep_attended.*queries"):
            FreqKVCache(model.config, **options, static=True)
        return
    ids = tokens(prompt + 30)
    logits = stream(model, ids, FreqKVCache(model.config, **options, static=True), [prompt])
    assert same(logits, whole(model, ids, **options))
