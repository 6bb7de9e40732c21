"""Rows of a batch that ended early go back to where they ended, once a mask says so."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from models import tiny_llama, tokens
from transformers import DynamicCache

import freqkv
from freqkv import FreqKVCache
from freqkv.models.upstream import CACHE

N = 24
NUMBERS = {"window": N, "sink_tokens": 1, "recent_tokens": 3}


@pytest.fixture(scope="module")
def model():
    model = tiny_llama(attention="sdpa")
    freqkv.patch(model)
    return model


def chat(model, cache, turns, new_tokens):
    """Turns of a batch, each of which ends when all rows have; returns the tokens of each row, in turn."""
    ids, mask, said = turns[0], torch.ones_like(turns[0]), []
    for turn in [*turns[1:], None]:
        start = ids.shape[1]
        ids = model.generate(
            ids,
            attention_mask=mask,
            **{CACHE: cache},
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=STOP,
            pad_token_id=0,
            suppress_tokens=[0],  # which stands for padding only
        )
        said.append([row[row != 0].tolist() for row in ids[:, start:]])
        mask = torch.cat([mask, (ids[:, start:] != 0).long()], 1)
        if turn is not None:
            ids, mask = torch.cat([ids, turn], 1), torch.cat([mask, torch.ones_like(turn)], 1)
    return said


STOP = [1, 5, 17, 23, 42, 61, 77, 88, 93]  # some of which come early


@pytest.mark.parametrize("new_tokens", [6, 9])
def test_a_batch_of_chats_is_each_chat_alone(model, new_tokens):
    """Compared by tokens, through four turns and several compressions."""
    turns = [tokens(11, batch=3, seed=seed) for seed in range(4)]
    cache = FreqKVCache(model.config, **NUMBERS)
    cache.activate_past_recording()
    together = chat(model, cache, turns, new_tokens)
    assert any(len({len(row) for row in turn}) > 1 for turn in together[:-1]), "some rows end before others"
    assert cache.compressions > 2
    for row in range(3):
        alone = FreqKVCache(model.config, **NUMBERS)
        expected = chat(model, alone, [turn[row : row + 1] for turn in turns], new_tokens)
        assert [turn[row] for turn in together] == [turn[0] for turn in expected]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_below_the_window_it_is_a_dynamic_cache(family):
    model = tiny_llama() if family == "llama" else zoo.tiny_model(family)
    turns = [tokens(4, batch=3, seed=seed) for seed in range(3)]
    expected = chat(model, DynamicCache(config=model.config), turns, 5)
    freqkv.patch(model)
    assert chat(model, FreqKVCache(model.config, window=128), turns, 5) == expected


def fed(model, length, batch=2, record=False):
    cache = FreqKVCache(model.config, **NUMBERS)
    if record:
        cache.activate_past_recording()
    with torch.no_grad():
        model(tokens(length, batch), **{CACHE: cache})
    return cache


@torch.no_grad()
def test_logits_after_tokens_that_are_hidden(model):
    ids, new = tokens(N - 4, 2), tokens(N, 2, seed=9)
    cache = fed(model, N - 4)
    mask = torch.ones(2, 2 * N - 4, dtype=torch.long)
    mask[1, N - 9 : N - 4] = 0
    logits = model(new, attention_mask=mask, **{CACHE: cache}).logits
    assert cache.row_tokens == [2 * N - 4, 2 * N - 9]
    for row, length in enumerate((N - 4, N - 9)):
        alone = FreqKVCache(model.config, **NUMBERS)
        model(ids[row : row + 1, :length], **{CACHE: alone})
        expected = model(new[row : row + 1], **{CACHE: alone}).logits
        assert torch.allclose(logits[row], expected[0], atol=1e-4)


@torch.no_grad()
def test_what_cannot_be_hidden_is_refused_and_changes_nothing(model):
    cache = fed(model, N + 3)
    expected = model(tokens(3, 2), **{CACHE: copy.deepcopy(cache)}).logits
    for hidden, error, message in (
        (slice(N - 6, N), ValueError, "only the last tokens of a row can be hidden"),
        (slice(0, 1), ValueError, "only the last tokens of a row can be hidden"),
        (slice(N - 2, None), RuntimeError, "compressed since.*activate_past_recording"),
    ):
        mask = torch.ones(2, N + 3, dtype=torch.long)
        mask[1, hidden] = 0
        with pytest.raises(error, match=message):
            model(tokens(3, 2), attention_mask=torch.cat([mask, mask[:, :1].new_ones(2, 3)], 1), **{CACHE: cache})
    assert torch.equal(model(tokens(3, 2), **{CACHE: cache}).logits, expected)
    states = zoo.tiny_model("qwen3_next")
    freqkv.patch(states)
    cache = fed(states, 6)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5] = 0
    with pytest.raises(ValueError, match="layers with a convolution or recurrent state cannot forget"):
        states(tokens(2, 2), attention_mask=mask, **{CACHE: cache})
    assert cache.tokens_seen == 6


def test_a_cache_from_a_file_knows_no_earlier_padding(model, tmp_path):
    cache = FreqKVCache(model.config, **NUMBERS)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        model(tokens(12, 2), attention_mask=mask, **{CACHE: cache})
    cache.save(tmp_path / "cache", model)
    loaded = FreqKVCache.load(tmp_path / "cache", model)
    mask = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1)
    mask[1, 10:12] = 0
    with pytest.raises(RuntimeError, match="knows which tokens were padding for the last 0 only"):
        model(tokens(2, 2), attention_mask=mask, **{CACHE: loaded})
    with torch.no_grad():
        model(tokens(2, 2), attention_mask=mask, **{CACHE: cache})
    assert cache.row_tokens == [11, 12]


def test_a_rewritten_history_is_still_noticed(model):
    """The digest leaves out what is hidden, and nothing else."""
    first = tokens(7, 2)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 5:7] = 0
    conversation = torch.cat([first, tokens(5, 2, seed=3)], 1)
    options = {"max_new_tokens": 2, "do_sample": False, "attention_mask": mask}
    model.generate(conversation, **{CACHE: fed(model, 7)}, **options)
    conversation[1, 5:7] = 50  # padding may be anything
    model.generate(conversation, **{CACHE: fed(model, 7)}, **options)
    conversation[1, 4] += 1
    with pytest.raises(ValueError, match="does not begin with the 7 tokens"):
        model.generate(conversation, **{CACHE: fed(model, 7)}, **options)


@pytest.mark.parametrize("grad", [False, True])
def test_a_row_goes_back_over_a_fold_with_and_without_gradients(model, grad):
    """Tensors of a graph have as many slots as are in use, fewer than before the fold."""
    ids = tokens(N + 8, batch=2)
    cache = FreqKVCache(model.config, **NUMBERS)
    cache.activate_past_recording()
    mask = torch.ones(2, N + 6, dtype=torch.long)
    mask[0, N - 2 : N + 4] = 0
    with torch.set_grad_enabled(grad):
        model(ids[:, : N - 1], **{CACHE: cache})
        model(ids[:, N - 1 : N + 4], **{CACHE: cache})
        logits = model(ids[:, N + 4 : N + 6], attention_mask=mask, **{CACHE: cache}).logits
    assert cache.counts == (N, N + 6)
    with torch.no_grad():
        for row in range(2):
            kept = ids[row : row + 1, : N + 6][:, mask[row].bool()]
            alone = model(kept, **{CACHE: FreqKVCache(model.config, **NUMBERS)}).logits[:, -2:]
            assert torch.allclose(logits[row], alone[0], atol=1e-4)


def test_a_call_that_fails_brings_back_what_its_mask_hid(model):
    ids = tokens(N + 12, batch=2)
    for told, folds in ((9, False), (N + 3, True)):
        cache = FreqKVCache(model.config, **NUMBERS)
        cache.activate_past_recording()
        mask = torch.ones(2, told + 2, dtype=torch.long)
        mask[0, told - 5 : told] = 0
        with torch.no_grad():
            model(ids[:, : min(told, N - 1)], **{CACHE: cache})
            model(ids[:, N - 1 : told], **{CACHE: cache}) if folds else None
            assert (cache.compressions > 0) == folds
            whole = copy.deepcopy(cache)
            for wrong in ({"input_ids": torch.full((2, 2), 9999)}, {"input_ids": ids[:, :2], "cu_seq_lens_q": mask[0]}):
                with pytest.raises((IndexError, ValueError)):
                    model(**wrong, attention_mask=mask, **{CACHE: cache})
                assert cache.counts == (told, told)
                assert not cache.is_spent
            logits = [model(ids[:, told : told + 3], **{CACHE: each}).logits for each in (cache, whole)]
        assert torch.equal(*logits)


def test_a_mask_that_moves_padding_is_refused(model):
    """As many tokens in each row, but others."""
    ids = tokens(9, batch=2)
    first, moved = torch.ones(2, 8, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
    first[1, :3] = 0
    moved[1, 5:8] = 0
    cache = FreqKVCache(model.config, **NUMBERS)
    with torch.no_grad():
        model(ids[:, :8], attention_mask=first, **{CACHE: cache})
        with pytest.raises(ValueError, match="what was padding cannot be shown"):
            model(ids[:, 8:], attention_mask=moved, **{CACHE: cache})
    assert cache.counts == (8, 5)
