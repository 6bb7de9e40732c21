"""Conversations that are rewritten, or others, are told from those that go on."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_llama, tokens

import freqkv
from freqkv import FreqKVCache
from freqkv.history import PENDING, History
from freqkv.models.upstream import CACHE

N = 16
MODEL = tiny_llama()
freqkv.patch(MODEL)
OPTIONS = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": [0]}


def new_cache():
    return FreqKVCache(MODEL.config, window=N)


# Digests


@given(st.lists(st.integers(1, 40), min_size=1, max_size=2 * PENDING), st.data())
def test_splits_do_not_matter_and_ids_and_places_do(splits, data):
    length = sum(splits)
    ids = tokens(length, 2, seed=length)
    real = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) > 0.2
    history, start = History(10), 0
    for split in splits:
        part = slice(start, start + split)
        history = history.extended(split, ids[:, part], real[:, part])
        start += split
    assert history.columns == length
    longer, mask = torch.cat([ids, tokens(3, 2)], 1), torch.cat([real, real[:, :1].expand(2, 3)], 1)
    assert history.begins(longer, mask.long())
    column = data.draw(st.integers(0, length - 1))
    changed = longer.clone()
    changed[1, column] += 1
    assert history.begins(changed, mask) == (not real[1, column])
    shown = mask.clone()
    shown[0, column] ^= True
    assert not history.begins(longer, shown)
    removed = data.draw(st.integers(1, length))
    cropped = history.cropped(removed)
    assert cropped.columns == length - removed
    if removed < 10 or removed == length:
        assert cropped.begins(longer, mask)
    again = cropped.extended(removed, ids[:, length - removed :], real[:, length - removed :])
    assert again.begins(longer, mask)
    assert history.taken(lambda t: t[[1, 0, 1]]).begins(longer[[1, 0, 1]], mask[[1, 0, 1]])


def test_order_matters():
    ids = torch.tensor([[5, 6, 7, 8]])
    assert not History(4).extended(4, ids, None).begins(ids.flip(1), None)
    assert not History(4).extended(4, torch.tensor([[0, 0, 0, 1]]), None).begins(torch.tensor([[0, 0, 1, 0]]), None)


def test_what_is_not_known_is_taken_for_right():
    history = History(4).extended(3, tokens(3), None)
    for unknown in (history.extended(2, None, None), History(4, known=False).extended(3, tokens(3), None)):
        assert unknown.begins(tokens(9, seed=7), None)
    far = history.extended(50, tokens(50), None).cropped(20)
    assert far.columns == 33
    assert far.begins(tokens(60, seed=7), None)
    assert History(4).begins(tokens(5), None)


# In generate


@pytest.mark.parametrize("turn", ["longer than the window", "short"])
def test_a_conversation_that_is_rewritten_is_refused(turn):
    """As a template does that leaves the thoughts of earlier turns out; DynamicCache takes it for the same one."""
    cache, prompt = new_cache(), tokens(N + 7 if turn == "longer than the window" else 5)
    answer = MODEL.generate(prompt, **{CACHE: cache}, **OPTIONS)
    held = copy.deepcopy(cache)
    new = tokens(12, seed=9)
    rewritten = torch.cat([answer[:, :2], answer[:, 3:], new], 1)
    other = tokens(answer.shape[1] + 12, seed=11)
    edited = torch.cat([answer, new], 1)
    edited[0, 1] += 1
    for wrong in (rewritten, other, edited):
        with pytest.raises(ValueError, match=r"does not begin with the .* tokens that this FreqKVCache has seen"):
            MODEL.generate(wrong, **{CACHE: cache}, **OPTIONS)
        assert cache.tokens_seen == held.tokens_seen
        assert not cache.is_spent
    whole = torch.cat([answer, new], 1)
    output = MODEL.generate(whole, **{CACHE: cache}, **OPTIONS)
    assert torch.equal(output, MODEL.generate(whole, **{CACHE: new_cache()}, **OPTIONS))
    cache.reset()
    MODEL.generate(other, **{CACHE: cache}, **OPTIONS)


@torch.no_grad()
def test_rows_that_change_places_take_their_history_along():
    """As beams do; those of a search are not the texts that it returns, which go on in another cache."""
    cache, ids = new_cache(), tokens(2 * N, 3)
    MODEL(ids, **{CACHE: cache})
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 5, 2]))
    rows = torch.cat([ids[[2, 0, 0]], tokens(3, 3)], 1)
    MODEL.generate(rows, **{CACHE: copy.deepcopy(cache)}, **OPTIONS)
    with pytest.raises(ValueError, match="does not begin with"):
        MODEL.generate(rows[[1, 0, 2]], **{CACHE: cache}, **OPTIONS)


@pytest.mark.parametrize("more", [{}, {"prompt_lookup_num_tokens": 2}])
def test_turns_that_go_on_are_taken(more):
    """Padded rows and drafts that were taken back included."""
    batch = 1 if "prompt_lookup_num_tokens" in more else 2
    ids, mask = tokens(9, batch), torch.ones(batch, 9, dtype=torch.long)
    if batch == 2:
        mask[1, :4] = 0
        ids = ids * mask
    cache = new_cache()
    for turn in range(3):
        options = {**OPTIONS, "max_new_tokens": N, **(more if turn == 0 else {})}
        output = MODEL.generate(ids, attention_mask=mask, **{CACHE: cache}, **options)
        rows = output.shape[0]
        new = tokens(4, rows, seed=turn)
        mask = mask.repeat_interleave(rows // mask.shape[0], 0)
        mask = torch.cat([mask, torch.ones(rows, output.shape[1] - mask.shape[1] + 4, dtype=torch.long)], 1)
        ids = torch.cat([output, new], 1)
    assert cache.history.known
    assert cache.history.columns == cache.tokens_seen
    wrong = ids.clone()
    wrong[-1, 6] += 1
    with pytest.raises(ValueError, match="does not begin with"):
        MODEL.generate(wrong, attention_mask=mask, **{CACHE: cache}, **OPTIONS)


def test_new_tokens_alone_are_no_rewritten_conversation():
    cache = new_cache()
    answer = MODEL.generate(tokens(5), **{CACHE: cache}, **OPTIONS)
    new = torch.cat([answer[:, -1:], tokens(cache.tokens_seen + 5, seed=9)], 1)  # longer than what was seen
    mask = torch.ones(1, cache.tokens_seen + new.shape[1], dtype=torch.long)
    MODEL.generate(new, attention_mask=mask, **{CACHE: cache}, **OPTIONS)


@torch.no_grad()
def test_what_came_as_embeddings_or_from_a_file_is_not_compared(tmp_path):
    cache = new_cache()
    MODEL(inputs_embeds=MODEL.get_input_embeddings()(tokens(5)), **{CACHE: cache})
    MODEL.generate(tokens(9, seed=5), **{CACHE: cache}, **OPTIONS)
    cache.save(tmp_path / "talk.safetensors", MODEL)
    loaded = FreqKVCache.load(tmp_path / "talk.safetensors", MODEL)
    assert loaded.history.columns == loaded.tokens_seen
    MODEL.generate(tokens(40, seed=6), **{CACHE: loaded}, **OPTIONS)


@torch.no_grad()
def test_static_caches_know_their_tokens():
    cache = FreqKVCache(MODEL.config, window=N, static=True)
    ids = tokens(3 * N)
    for token in ids.split(1, dim=1):
        MODEL(token, **{CACHE: cache})
    assert cache.history.begins(torch.cat([ids, ids], 1), None)
    assert not cache.history.begins(torch.cat([ids.flip(1), ids], 1), None)
