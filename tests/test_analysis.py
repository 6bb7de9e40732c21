"""Every entry of transformers' causal-LM mapping: it works in full, or it is refused by name."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
import zoo
from catching import Catcher, Caught, identity
from every_family import (
    ATTENTION,
    CHUNKS,
    FLOOR,
    LENGTH,
    LOOSE,
    OTHER_KERNEL,
    OWN_SPLITS_DIFFER,
    REASON,
    RECENT,
    SEES_AHEAD,
    SINKS,
    STEP,
    TRANSFORMERS,
    N,
    feed,
)
from running import close
from transformers import DynamicCache

import freqkv
from freqkv import FreqKVCache
from freqkv.forward import Forward
from freqkv.models.analysis import analyse
from freqkv.models.upstream import CACHE

# One of each kind; the others are slow tests.
KINDS = """
cohere2 deepseek_v3 doge falcon_h1 gemma3_text gemma3n_text gemma4_text gptj hunyuan_v1_dense llama minimax mllama nanochat phi
qwen3_next zamba2 zaya
"""
EVERYDAY = KINDS.split()


@functools.cache
def model_of(family, attention):
    model = zoo.tiny_model(family)
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"transformers has no {attention} for {family}")
    return model


def families(reason):
    return [family for family in zoo.families() if (family in REASON) == reason and family not in zoo.NOT_BUILT]


class Spy:
    """Sees what an attention module is called with, between the patch and the module's own forward."""

    def __init__(self, module):
        self.forward = module.forward
        self.names = list(inspect.signature(module.forward).parameters)
        self.calls = []
        self.__wrapped__ = module.forward

    def __call__(self, *args, **kwargs):
        self.calls.append(dict(zip(self.names, args, strict=False)) | kwargs)
        return self.forward(*args, **kwargs)

    def positions(self):
        """`(1, tokens, ...)` of all calls, whatever tells positions."""
        given = []
        for call in self.calls:
            embeddings = call.get("position_embeddings")
            told = call.get("position_ids") if embeddings is None else embeddings
            given.append(told if isinstance(told, torch.Tensor) or told is None else told[0])
        return None if any(told is None for told in given) else torch.cat(given, dim=1)


def unrotated(layer, spy):
    """What the module caches for the tokens of a call when its embeddings turn nothing."""
    call = {**spy.calls[0], layer.cache_argument: Catcher()}
    if call.get("position_embeddings") is not None:
        call["position_embeddings"] = identity(call["position_embeddings"], layer.module)
    elif call.get("position_ids") is not None:
        call["position_ids"] = torch.zeros_like(call["position_ids"])
    with pytest.raises(Caught) as caught:
        spy.forward(**call)
    return caught.value.args


def slots(length):
    return torch.tensor([t if t < N else FLOOR + (t - N) % STEP for t in range(length)])


def embeddings_at(layer, positions):
    if layer.rotary is None:
        return None
    if layer.positions == "position_ids":
        return positions[None]
    rotary = layer.rotary.source
    positions = positions.expand(3, 1, -1) if hasattr(rotary, "mrope_section") else positions[None]
    kind = () if layer.rotary.layer_type is None else (layer.rotary.layer_type,)
    table = rotary(torch.zeros(1), positions, *kind)
    return table if isinstance(table, torch.Tensor) else table[0]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family in EVERYDAY else pytest.mark.slow) for family in families(reason=False)],
)
@torch.no_grad()
def test_family(family, attention):
    model = model_of(family, attention)
    ids = torch.randint(3, 100, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    plain_splits = [N] if family in OWN_SPLITS_DIFFER else [9, 1, 5]

    def plain_cache():
        return (
            None if family == "minimax" else DynamicCache(config=model.config)
        )  # it takes only one that it made itself

    if family == "minimax":
        plain_splits = [N]
    plain = feed(model, ids[:, :N], plain_cache(), plain_splits)
    unpatched = model(input_ids=ids, use_cache=False).logits

    layers = {layer.name: layer for layer in analyse(model).layers}
    others = {name: m for name, m in model.named_modules() if name not in layers and getattr(m, "is_sliding", False)}
    for module in [*(layer.module for layer in layers.values()), *others.values()]:
        module.forward = Spy(module)
    spies = {name: layer.module.forward for name, layer in layers.items()}
    try:
        freqkv.patch(model)
        spans = []

        def spy(keys, values, keep):
            spans.append((keys.clone(), values.clone()))  # values are a view of the buffer
            return freqkv.low_pass_entries(keys, values, keep)

        def cache(**more):
            return FreqKVCache(model.config, window=N, sink_tokens=SINKS, recent_tokens=RECENT, **more)

        if (family, attention) not in SEES_AHEAD:
            logits = feed(model, ids[:, :N], cache(), plain_splits)
            assert close(logits, plain, 1e-6) if family in OTHER_KERNEL else torch.equal(logits, plain), (
                "below the window"
            )

        for each in [*spies.values(), *(module.forward for module in others.values())]:
            each.calls.clear()
        observed = cache(compressor=spy)
        whole = feed(model, ids, observed, [LENGTH])
        assert not torch.allclose(whole, unpatched, rtol=0.05), "compression changes what the model says"
        check_positions(layers, spies, others)
        check_spans(layers, spies, spans)
        assert observed.tokens_seen == LENGTH
        assert observed.entries == slots(LENGTH)[-1] + 1

        chunks = [N] if family in OWN_SPLITS_DIFFER else CHUNKS
        parts = cache()
        bound = LOOSE.get(family, 3e-4)
        assert close(feed(model, ids, parts, chunks), whole, bound)
        for one, other in zip(observed.layers, parts.layers, strict=True):
            if isinstance(one, freqkv.layer.FreqKVLayer):
                held = one.entries
                assert close(other.keys[:, :, :held], one.keys[:, :, :held], bound)
                assert close(other.values[:, :, :held], one.values[:, :, :held], bound)
        assert close(feed(model, ids, cache(), [3] if family in OWN_SPLITS_DIFFER else []), whole, bound)
        with freqkv.patch(model, window=N, sink_tokens=SINKS, recent_tokens=RECENT):
            assert close(model(input_ids=ids, use_cache=False).logits, whole)
        generated(model, ids[:, :9], cache)
        freqkv.unpatch(model)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, unpatched)
    finally:
        if freqkv.patching.handle.find_state(model) is not None:
            freqkv.unpatch(model)
        for module in [*(layer.module for layer in layers.values()), *others.values()]:
            module.__dict__.pop("forward", None)


def check_positions(layers, spies, others):
    for name, layer in layers.items():
        told, expected = spies[name].positions(), embeddings_at(layer, slots(LENGTH))
        if told is None or expected is None:
            assert layer.rotation is None
            continue
        times = told.shape[1] // LENGTH  # modules that serve several cache layers run as often
        assert torch.equal(told, torch.cat([expected] * times, dim=1)), "layers that are compressed stand at slots"
    for module in others.values():
        whole = module.forward.calls
        assert [call["hidden_states"].shape[1] for call in whole] == [LENGTH], (
            "sliding layers run over the call as it is"
        )
        masks = [call[CACHE] for call in whole]
        assert all(isinstance(cache, Forward) for cache in masks)


def check_spans(layers, spies, spans):
    """Keys of the first fold of each layer, against the module's own with embeddings that turn nothing."""
    owners = [layer for layer in layers.values() if not layer.reads_shared]
    folds = 1 + (LENGTH - N - 1) // STEP
    assert len(spans) % folds == 0
    if len(spans) != folds * len(owners):
        return  # a module that serves several cache layers
    for index, layer in enumerate(owners):
        for stream, raw in enumerate(spans[index * folds]):
            truth = unrotated(layer, spies[layer.name])[stream][:, :, SINKS : N - RECENT]
            if stream == 0 and layer.scale() is not None:
                truth = truth / layer.scale()
            assert close(raw, truth), "what is low-passed has no rotation left"


def generated(model, prompt, cache):
    """Greedy `generate` past several windows, and the same by hand."""
    new = 2 * N + 1
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ones = torch.ones_like(prompt)
    answer = model.generate(prompt, attention_mask=ones, **{CACHE: cache()}, **options)
    held, ids = cache(), prompt
    logits = feed(model, prompt, held, [prompt.shape[1]])
    counts = "position_ids" in inspect.signature(model.forward).parameters
    for _ in range(new):
        token = logits[:, -1].argmax(-1, keepdim=True)
        positions = {"position_ids": torch.tensor([[ids.shape[1]]])} if counts else {}
        ids = torch.cat([ids, token], dim=1)
        if ids.shape[1] < prompt.shape[1] + new:
            logits = model(input_ids=token, **{CACHE: held}, use_cache=True, **positions).logits
    assert torch.equal(answer, ids)


@pytest.mark.parametrize("family", families(reason=True))
def test_refusal(family):
    model = zoo.tiny_model(family)
    with pytest.raises(freqkv.UnsupportedModelError, match=REASON[family]) as refusal:
        freqkv.patch(model)
    assert type(model).__name__ in str(refusal.value)
    assert "Use transformers'" in str(refusal.value)


def test_no_family_is_skipped_silently():
    """What cannot be built here is listed with its reason, and the list is short."""
    known = set(zoo.families())
    assert set(zoo.NOT_BUILT) <= known
    assert len(zoo.NOT_BUILT) <= 5
    assert all(len(reason) > 20 for reason in zoo.NOT_BUILT.values())
    if TRANSFORMERS >= (5, 24):
        assert set(REASON) <= known
        assert len(families(reason=False)) >= 105
