"""Batches of rows of different length: each row gives what it gives alone."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_llama, tokens
from running import padded, rows_of
from transformers import DynamicCache

import freqkv
from freqkv import FreqKVCache, FreqKVConfig
from freqkv.models.upstream import CACHE
from freqkv.parts import Call

N = 23
CONFIG = FreqKVConfig(window=N, sink_tokens=3, recent_tokens=2)
LENGTHS = [1, 7, N, 3 * N + 5]


@torch.no_grad()
def alone(model, row, splits=()):
    """Logits of a row by itself."""
    cache = FreqKVCache(model.config, CONFIG)
    edges = [0, *splits, len(row)]
    return torch.cat([model(row[None, a:b], **{CACHE: cache}).logits[0] for a, b in itertools.pairwise(edges) if b > a])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_of_a_row_are_those_of_the_row_alone(attention, side):
    model = tiny_llama(attention=attention)
    freqkv.patch(model)
    rows = rows_of(LENGTHS)
    ids, mask = padded(rows, side)
    logits = model(ids, attention_mask=mask, **{CACHE: FreqKVCache(model.config, CONFIG)}).logits
    for row, got, where in zip(rows, logits, mask.bool(), strict=True):
        assert torch.allclose(got[where], alone(model, row), atol=2e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lengths", [LENGTHS, [2, 2 * N - 1], [5, 5], [N + 1] * 3])
def test_greedy_generation(attention, lengths):
    model = tiny_llama(attention=attention)
    freqkv.patch(model)
    rows = rows_of(lengths)
    ids, mask = padded(rows)
    new = 2 * N + 3
    options = {"max_new_tokens": new, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **{CACHE: FreqKVCache(model.config, CONFIG)}, **options)
    for row, got in zip(rows, together, strict=True):
        by_itself = model.generate(row[None], **{CACHE: FreqKVCache(model.config, CONFIG)}, **options)
        assert torch.equal(got[-new:], by_itself[0, -new:])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_up_to_the_window_like_dynamic_cache(attention):
    model = tiny_llama(attention=attention)
    ids, mask = padded(rows_of([3, 9, N - 4]))
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def run(cache):
        prompt = model(ids, attention_mask=mask, position_ids=positions, **{CACHE: cache}).logits
        more, longer = tokens(4, 3), torch.cat([mask, torch.ones(3, 4, dtype=torch.long)], 1)
        next_positions = positions[:, -1:] + 1 + torch.arange(4)
        turn = model(more, attention_mask=longer, position_ids=next_positions, **{CACHE: cache}).logits
        return prompt[mask.bool()], turn

    plain = run(DynamicCache(config=model.config))
    freqkv.patch(model)
    for got, truth in zip(run(FreqKVCache(model.config, CONFIG)), plain, strict=True):
        assert torch.allclose(got, truth, atol=2e-5)


@torch.no_grad()
def test_buffers_stay_where_they_are():
    """Also through rounds in which some rows have nothing to bring."""
    model = tiny_llama(attention="sdpa")
    freqkv.patch(model)
    cache = FreqKVCache(model.config, CONFIG)
    rows = rows_of([N // 2, 3 * N, 5])
    ids, mask = padded(rows)
    model(ids, attention_mask=mask, **{CACHE: cache})
    held = [buffer.data_ptr() for layer in cache.layers for buffer in (layer.keys, layer.values)]
    new = torch.tensor([[0] * 40 + [1] * 20, [1] * 60, [0] * 59 + [1]])
    model(tokens(60, 3), attention_mask=torch.cat([mask, new], 1), **{CACHE: cache})
    assert [buffer.data_ptr() for layer in cache.layers for buffer in (layer.keys, layer.values)] == held


@torch.no_grad()
def test_a_reset_cache_takes_more_rows_of_which_some_are_empty():
    model = tiny_llama(attention="sdpa")
    freqkv.patch(model)
    cache = FreqKVCache(model.config, CONFIG)
    model(tokens(9, 2), **{CACHE: cache})
    cache.reset()
    row = tokens(7)[0]
    ids, mask = padded([row[:0], row[:0], row, row[2:]])
    logits = model(ids, attention_mask=mask, **{CACHE: cache}).logits
    assert torch.allclose(logits[2], alone(model, row), atol=2e-4)
    assert cache.batch_size == 4
    more = model(tokens(3, 4), attention_mask=torch.cat([mask, mask.new_ones(4, 3)], 1), **{CACHE: cache}).logits
    assert torch.allclose(more[0], alone(model, tokens(3, 4)[0]), atol=2e-4)


def test_a_graph_over_ragged_rows_keeps_its_entries():
    """What enters later without a graph is not written into what the graph needs."""
    model = tiny_llama(attention="sdpa", kv_heads=4)  # grouped heads would be copied on the way
    freqkv.patch(model)
    cache = FreqKVCache(model.config, CONFIG)
    ids, mask = padded(rows_of([4, 9]))
    with torch.no_grad():
        model(ids, attention_mask=mask, **{CACHE: cache})
    longer = torch.cat([mask, mask.new_ones(2, 5)], 1)
    loss = model(tokens(5, 2), attention_mask=longer, **{CACHE: cache}).logits.sum()
    with torch.no_grad():
        model(tokens(1, 2), attention_mask=torch.cat([longer, mask.new_ones(2, 1)], 1), **{CACHE: cache})
    loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_masks_of_a_long_prompt_do_not_pile_up(monkeypatch):
    """There are as many as rounds, each for all rows: a few live at a time."""
    alive, most = weakref.WeakSet(), []
    original = freqkv.patching.masks.causal_mask

    def watched(*args, **kwargs):
        mask = original(*args, **kwargs)
        alive.add(mask)
        most.append(len(alive))
        return mask

    monkeypatch.setattr(freqkv.patching.masks, "causal_mask", watched)
    model = tiny_llama(attention="sdpa", layers=3)
    freqkv.patch(model)
    ids, mask = padded(rows_of([20 * N, 20 * N - 7]))
    model(ids, attention_mask=mask, **{CACHE: FreqKVCache(model.config, CONFIG)})
    assert len(most) > 20
    assert max(most) <= 5


@given(
    lengths=st.lists(st.lists(st.integers(0, 2 * N), min_size=3, max_size=3), min_size=1, max_size=4),
    sides=st.lists(st.sampled_from(["left", "right"]), min_size=4, max_size=4),
)
@torch.no_grad()
def test_turns_with_padding_of_their_own(lengths, sides):
    """Rows that bring any number of tokens in each call, also none, are compressed each at its own step."""
    lengths[0] = [max(n, 1) for n in lengths[0]]
    model = SHARED
    cache = FreqKVCache(model.config, CONFIG)
    mask = torch.zeros(3, 0, dtype=torch.long)
    entered, logits = [torch.zeros(0, dtype=torch.long)] * 3, [[] for _ in range(3)]
    for turn, (brings, side) in enumerate(zip(lengths, sides, strict=False)):
        if not any(brings):
            continue
        rows = rows_of(brings, seed=10 * turn)
        ids, new = padded(rows, side)
        mask = torch.cat([mask, new], 1)
        output = model(ids, attention_mask=mask, **{CACHE: cache}).logits
        for i, row in enumerate(rows):
            entered[i] = torch.cat([entered[i], row])
            logits[i].append(output[i][new[i].bool()])
        assert cache.tokens_seen == mask.shape[1]
        assert (cache.row_tokens or [cache.tokens_seen] * 3) == mask.sum(1).tolist()
        assert cache.entries <= N
    for row, got in zip(entered, logits, strict=True):
        assert torch.allclose(torch.cat(got), alone(model, row), atol=3e-4)


SHARED = tiny_llama()
freqkv.patch(SHARED)


@given(
    seen=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    brings=st.lists(st.integers(0, 90), min_size=4, max_size=4),
    window=st.integers(10, 40),
    recent=st.integers(0, 3),
)
def test_parts_of_ragged_rows_are_those_of_each_row_alone(seen, brings, window, recent):
    schedule = FreqKVConfig(window=window, sink_tokens=2, recent_tokens=recent).schedule
    brings = [max(1, brings[0]), *brings[1 : len(seen)]]
    mask = torch.arange(max(brings)) < torch.tensor(brings)[:, None]
    parts = Call(tuple(seen), max(brings), mask).parts(schedule)
    for row, (before, new) in enumerate(zip(seen, brings, strict=True)):
        own, counts = [], before
        for part in parts:
            if row in part.rows:
                place = part.rows.index(row)
                folds = next((folds for folds, places in part.folds if place in places), ())
                own.append((part.first[place], part.stops[place], part.slots[place], folds))
                counts = part.stops[place]
            assert part.after[row] in (counts, before + new)
        alone = Call((before,), new).parts(schedule) if new else []
        expected = [(p.first[0], p.stops[0], p.slots[0], p.folds[0][0] if p.folds else ()) for p in alone]
        assert own == expected
        assert not parts or parts[-1].after[row] == before + new


@torch.no_grad()
def test_flex_attention():
    """Two rows and two rounds: every shape is compiled anew, which takes long."""
    model = tiny_llama()
    freqkv.patch(model)
    rows = rows_of([7, N + 5])
    ids, mask = padded(rows)
    expected = [alone(model, row) for row in rows]
    model.config._attn_implementation = "flex_attention"
    logits = model(ids, attention_mask=mask, **{CACHE: FreqKVCache(model.config, CONFIG)}).logits
    for got, where, truth in zip(logits, mask.bool(), expected, strict=True):
        assert torch.allclose(got[where], truth, atol=2e-4)


@torch.no_grad()
def test_flash_attention(flash_attention, monkeypatch):
    monkeypatch.setattr(torch, "float16", torch.float32)  # what the stand-in accepts
    model = tiny_llama()
    freqkv.patch(model)
    rows = rows_of(LENGTHS)
    ids, mask = padded(rows)
    expected = [alone(model, row) for row in rows]
    model.config._attn_implementation = "flash_attention_2"
    cache = FreqKVCache(model.config, CONFIG)
    logits = model(ids, attention_mask=mask, **{CACHE: cache}).logits
    for got, where, truth in zip(logits, mask.bool(), expected, strict=True):
        assert torch.allclose(got[where], truth, atol=2e-4)
    more = tokens(5, len(rows), seed=9)
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    turn = model(more, attention_mask=longer, **{CACHE: cache}).logits
    model.config._attn_implementation = "eager"
    for row, new, got in zip(rows, more, turn, strict=True):
        assert torch.allclose(got, alone(model, torch.cat([row, new]))[-5:], atol=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_a_cache(side, attention):
    """Gradients included: padding takes no part in them."""
    model = tiny_llama(attention=attention)
    rows = rows_of(LENGTHS)
    ids, mask = padded(rows, side)
    with freqkv.patch(model, CONFIG):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        output = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False, output_hidden_states=True)
        output.logits[mask.bool()].square().sum().backward()
        assert all(h.shape[:2] == ids.shape for h in output.hidden_states)
        for i, row in enumerate(rows):
            assert torch.allclose(output.logits[i][mask[i].bool()], alone(model, row), atol=2e-4)
            own = model.get_input_embeddings()(row[None]).detach().requires_grad_()
            model(inputs_embeds=own, use_cache=False).logits.square().sum().backward()
            grad = embedded.grad[i][mask[i].bool()]
            assert torch.allclose(grad, own.grad[0], atol=1e-4 * own.grad.abs().max())
            assert not embedded.grad[i][~mask[i].bool()].any()


FAMILIES = [
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "gpt_neox",
    "gptj",
    "deepseek_v2",
    "gpt_oss",
    "qwen3_next",
    "falcon_h1",
]


@pytest.mark.parametrize("family", [*FAMILIES, "llama4_text", "smollm3", "beam", "zamba2", "minimax", "cohere2"])
def test_families(family):
    """Where other layers are transformers' own, with its own masks."""
    if family not in zoo.families():
        pytest.skip(f"this transformers has no {family}")
    model = zoo.tiny_model(family)
    model.set_attn_implementation("eager")
    freqkv.patch(model)
    rows = [row.clamp(min=3, max=99) for row in rows_of([3, 9, 2 * N + 3])]
    ids, mask = padded(rows)
    options = {"max_new_tokens": N, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = FreqKVCache(model.config, CONFIG)
    together = model.generate(ids, attention_mask=mask, **{CACHE: cache}, **options)
    for row, got in zip(rows, together, strict=True):
        by_itself = model.generate(row[None], **{CACHE: FreqKVCache(model.config, CONFIG)}, **options)
        assert torch.equal(got[-N:], by_itself[0, -N:])


def test_attention_that_keeps_a_state_takes_no_turns():
    model = zoo.tiny_model("zaya")
    freqkv.patch(model)
    ids, mask = padded([row.clamp(3, 99) for row in rows_of([3, 9])])
    cache = FreqKVCache(model.config, CONFIG)
    with pytest.raises(ValueError, match="carries a state of its own"):
        model(ids, attention_mask=mask, **{CACHE: cache})


@torch.no_grad()
def test_nan_stays_in_its_row():
    """Also what a row left behind its entries before a reset."""
    model = tiny_llama()
    freqkv.patch(model)
    rows = rows_of(LENGTHS)
    ids, mask = padded(rows)
    embeddings = model.get_input_embeddings()(ids)
    cache = FreqKVCache(model.config, CONFIG)
    clean = model(inputs_embeds=embeddings, attention_mask=mask, **{CACHE: cache}).logits
    cache.reset()
    spoiled = embeddings.clone()
    spoiled[1, -3] = float("nan")
    logits = model(inputs_embeds=spoiled, attention_mask=mask, **{CACHE: cache}).logits
    others = [0, 2, 3]
    assert torch.equal(logits[others], clean[others])
    assert logits[1, -1].isnan().all()
    cache.reset()
    assert torch.equal(model(inputs_embeds=embeddings, attention_mask=mask, **{CACHE: cache}).logits, clean)


@torch.no_grad()
def test_masks_that_cannot_be():
    model = tiny_llama()
    freqkv.patch(model)
    ids, mask = padded(rows_of([4, 9]))
    cache = FreqKVCache(model.config, CONFIG)
    model(ids, attention_mask=mask, **{CACHE: cache})
    more = tokens(2, 2)
    changed = torch.cat([torch.ones_like(mask), torch.ones_like(more)], 1)
    with pytest.raises(ValueError, match="what was padding cannot be shown"):
        model(more, attention_mask=changed, **{CACHE: cache})
    more = tokens(N - 8, 2)
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    with pytest.raises(ValueError, match="output_attentions: the weights of padded rows"):
        model(more, attention_mask=longer, **{CACHE: cache}, output_attentions=True)
    assert cache.row_tokens == [4, 9]
    assert not cache.is_spent


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_masks_of_any_dtype(dtype):
    """Also of those in which the tokens of a long row cannot be counted: 257 is 256 in bfloat16, 2049 is 2048 in float16."""
    model = tiny_llama(layers=1, context=4096)
    freqkv.patch(model)
    length = 2100
    ids, mask = tokens(length, 2), torch.ones(2, length + 1, dtype=dtype)
    mask[1, :5] = 0
    cache = FreqKVCache(model.config, CONFIG)
    model(ids, attention_mask=mask[:, :-1], **{CACHE: cache})
    model(tokens(1, 2), attention_mask=mask, **{CACHE: cache})
    assert cache.row_tokens == [length + 1, length - 4]


@torch.no_grad()
def test_another_batch_is_refused_with_or_without_a_mask():
    model = tiny_llama()
    freqkv.patch(model)
    ids, mask = padded(rows_of([4, 9]))
    cache = FreqKVCache(model.config, CONFIG)
    model(ids, attention_mask=mask, **{CACHE: cache})
    for batch in (1, 3):
        more = tokens(2, batch)
        for own in (None, torch.ones(batch, 11, dtype=torch.long)):
            with pytest.raises(ValueError, match=f"holds 2 rows, the input has {batch}"):
                model(more, attention_mask=own, **{CACHE: cache})
    assert cache.row_tokens == [4, 9]
    assert not cache.is_spent


@torch.no_grad()
def test_calls_of_nothing_but_padding():
    """Before, between and after calls with tokens."""
    model = tiny_llama()
    freqkv.patch(model)
    cache, mask = FreqKVCache(model.config, CONFIG), torch.zeros(2, 0, dtype=torch.long)
    nothing, one, both = [[0] * 4] * 2, [[0] * 4, [1] * 4], [[0, 1, 1, 1], [1] * 4]
    parts = []
    for seed, part in enumerate([nothing, nothing, both, nothing, one, both, nothing]):
        ids = tokens(4, 2, seed=seed)
        parts.append((ids, torch.tensor(part)))
        mask = torch.cat([mask, parts[-1][1]], 1)
        logits = model(ids, attention_mask=mask, **{CACHE: cache}).logits
        if part is both:
            last = logits[:, -1]
            texts = [torch.cat([ids[row][real[row].bool()] for ids, real in parts]) for row in range(2)]
            expected = torch.stack([alone(model, text)[-1] for text in texts])
            assert torch.allclose(last, expected, atol=2e-4)
        assert cache.row_tokens == mask.sum(1).tolist()


@torch.no_grad()
def test_a_patched_model_within_the_forward_of_another():
    """Each keeps to its own padding."""
    outer, inner = tiny_llama(), tiny_llama(seed=5)
    for model in (outer, inner):
        freqkv.patch(model)
    ids, mask = padded(rows_of([4, 9]))
    prompt = tokens(9, 2, seed=8)
    expected = [
        model(x, attention_mask=m, **{CACHE: FreqKVCache(model.config, CONFIG)}).logits
        for model, x, m in ((outer, ids, mask), (inner, prompt, None))
    ]
    got = []

    def run_inner(*_):
        got.append(inner(prompt, **{CACHE: FreqKVCache(inner.config, CONFIG)}).logits)

    hooked = outer.model.layers[1].register_forward_pre_hook(run_inner)
    whole = outer(ids, attention_mask=mask, **{CACHE: FreqKVCache(outer.config, CONFIG)}).logits
    hooked.remove()
    assert torch.equal(whole, expected[0])
    assert torch.equal(got[0], expected[1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gemma3_text", "gemma4_text", "qwen3_next", "zaya", "gptj", "deepseek_v3"])
@torch.no_grad()
def test_families_without_a_cache(family, side):
    model = zoo.tiny_model(family)
    model.set_attn_implementation("eager")
    rows = [row.clamp(min=3, max=99) for row in rows_of([3, 9, 2 * N + 3])]
    ids, mask = padded(rows, side)
    with freqkv.patch(model, CONFIG):
        together = model(ids, attention_mask=mask, use_cache=False).logits
        for row, got, where in zip(rows, together, mask.bool(), strict=True):
            by_itself = model(row[None], use_cache=False).logits[0]
            assert torch.allclose(got[where], by_itself, atol=3e-4 * by_itself.abs().max())
