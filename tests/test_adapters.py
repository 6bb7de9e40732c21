"""Adapters that are told of a call as a whole: right where it stays whole, else refused with the cache as it was."""

from __future__ import annotations

import pytest
import torch
from models import tiny_llama, tokens
from peft import LoraConfig, PolyConfig, get_peft_model
from transformers import DynamicCache

import freqkv
from freqkv import FreqKVCache
from freqkv.models.upstream import CACHE

N = 16
INVOCATION = [90, 91]


def with_two_adapters():
    def config(seed):
        torch.manual_seed(seed)
        return LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(tiny_llama(), config(1), adapter_name="a")
        model.add_adapter("b", config(2))
    return model.eval()


def activated():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=["q_proj", "v_proj"],
            alora_invocation_tokens=INVOCATION,
            init_lora_weights=False,
        )
        return get_peft_model(tiny_llama(), config).eval()


@torch.no_grad()
def test_adapters_by_row_where_rows_stay_together():
    """Rows of one length at any length, and padded ones below the window."""
    model, names = with_two_adapters(), ["a", "b"]
    freqkv.patch(model)
    ids, cache = tokens(3 * N, batch=2), FreqKVCache(model.config, window=N)
    together = model(input_ids=ids, adapter_names=names, **{CACHE: cache}).logits
    for row, name in enumerate(names):
        model.set_adapter(name)
        alone = model(input_ids=ids[row : row + 1], **{CACHE: FreqKVCache(model.config, window=N)}).logits
        assert torch.allclose(together[row : row + 1], alone, atol=1e-4)
    assert not torch.allclose(
        together[0], model(input_ids=ids[:1], **{CACHE: FreqKVCache(model.config, window=N)}).logits[0]
    )
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    call = {"input_ids": ids[:, :9] * mask, "attention_mask": mask, "adapter_names": names}
    expected = model(**call, **{CACHE: DynamicCache(config=model.config)}).logits
    output = model(**call, **{CACHE: FreqKVCache(model.config, window=N)}).logits
    assert torch.allclose(output[mask.bool()], expected[mask.bool()], atol=1e-4)


@torch.no_grad()
def test_adapters_by_row_are_refused_where_rows_take_turns():
    model = with_two_adapters()
    freqkv.patch(model)
    mask = torch.ones(2, N + 5, dtype=torch.long)
    mask[1, :7] = 0
    cache = FreqKVCache(model.config, window=N)
    call = {"input_ids": tokens(N + 5, 2) * mask, "attention_mask": mask, **{CACHE: cache}}
    with pytest.raises(ValueError, match=r"adapter_names speaks of the rows of a call"):
        model(**call, adapter_names=["a", "b"])
    assert cache.tokens_seen == 0
    assert not cache.is_spent


@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_activated_lora_where_a_call_stays_whole_or_nothing_is_switched_on(cached):
    model = activated()
    freqkv.patch(model, window=N)

    def given():
        return {CACHE: FreqKVCache(model.config, window=N)} if cached else {"use_cache": False}

    ids = tokens(N, seed=3)
    ids[0, 5:7] = torch.tensor(INVOCATION)
    plain = model(input_ids=ids, **{CACHE: DynamicCache(config=model.config)}).logits
    assert torch.equal(model(input_ids=ids, **given()).logits, plain)
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=ids, **given()).logits, plain)
    calm = tokens(3 * N, seed=4).clamp(max=80)
    with model.disable_adapter():
        expected = model(input_ids=calm, **given()).logits
    assert torch.allclose(model(input_ids=calm, **given()).logits, expected, atol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_activated_lora_is_refused_where_a_call_is_cut(cached):
    """It counts from the end of what it sees."""
    model = activated()
    freqkv.patch(model, window=N)
    ids = tokens(3 * N, seed=3)
    ids[0, 40:42] = torch.tensor(INVOCATION)
    cache = FreqKVCache(model.config, window=N)
    given = {CACHE: cache} if cached else {"use_cache": False}
    with pytest.raises(ValueError, match="alora_offsets speaks of the tokens of a call"):
        model(input_ids=ids, **given)
    assert cache.tokens_seen == 0
    assert not cache.is_spent
    padded = ids[:, 36:45].repeat(2, 1)
    mask = torch.ones_like(padded)
    mask[1, :2] = 0
    if not cached:  # all padding is moved behind
        with pytest.raises(ValueError, match="alora_offsets speaks of the tokens of a call"):
            model(input_ids=padded, attention_mask=mask, use_cache=False)


@torch.no_grad()
def test_token_by_token_activated_lora_is_right_beyond_the_window():
    model = activated()
    freqkv.patch(model)
    ids = tokens(3 * N, seed=3)
    cache, other = (FreqKVCache(model.config, window=N) for _ in range(2))
    outputs, plain = [], []
    for index in range(3 * N):
        call = {"input_ids": ids[:, index : index + 1]}
        outputs.append(model(**call, alora_offsets=[1 if index >= 40 else None], **{CACHE: cache}).logits)
        plain.append(model(**call, alora_offsets=[None], **{CACHE: other}).logits)
    outputs, plain = torch.cat(outputs, 1), torch.cat(plain, 1)
    assert torch.equal(outputs[:, :40], plain[:, :40])
    assert not torch.allclose(outputs[:, 40:], plain[:, 40:], atol=1e-2)


@torch.no_grad()
def test_tasks_by_row():
    """Poly routes each row by its task."""
    model = tiny_llama()
    freqkv.patch(model)  # before, since no module of a Poly model runs without task_ids
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"n_tasks": 2, "n_skills": 2, "n_splits": 1, "init_weights": False}
        model = get_peft_model(model, PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **options)).eval()
    ids, tasks = tokens(3 * N, 2), torch.tensor([0, 1])
    together = model(input_ids=ids, task_ids=tasks, **{CACHE: FreqKVCache(model.config, window=N)}).logits
    for row in range(2):
        cache = FreqKVCache(model.config, window=N)
        alone = model(input_ids=ids[row : row + 1], task_ids=tasks[row : row + 1], **{CACHE: cache}).logits
        assert torch.allclose(together[row : row + 1], alone, atol=1e-4)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with pytest.raises(ValueError, match="speaks of the rows of a call"):
        model(input_ids=ids, attention_mask=mask, task_ids=tasks, **{CACHE: FreqKVCache(model.config, window=N)})
