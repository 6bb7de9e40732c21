"""RoPE as checkpoints on the Hub set it, each type in a family that uses it: scaled, partial, by layer type or length."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
import zoo
from catching import Catcher, Caught, identity
from running import difference, stream
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache

import freqkv
from freqkv import FreqKVCache, FreqKVConfig
from freqkv.models.upstream import CACHE

CONFIG = FreqKVConfig(29, 3, 0.5, 4)  # 22 entries between sinks and recents become 11
N, SINKS, RECENT, STEP = 29, 3, 4, 11
ORIGINAL = 64  # the length that models were trained on before it was stretched: more than N, less than the text
LONG_WINDOW = ORIGINAL + 15
LENGTH = 2 * N + 9
FOLDS = [t for t in range(N, LENGTH) if (t - N) % STEP == 0]
CHUNKS = [N + 2, 1, 3, 17]

FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
YARN_40 = {**YARN, "factor": 40.0, "beta_fast": 32, "beta_slow": 1}
SHORT = [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5]
LONG = [1.0, 1.3, 1.7, 2.2, 3.0, 4.0, 5.0, 7.0]
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": ORIGINAL,
}
LONG_CONTEXT = {"max_position_embeddings": 32 * ORIGINAL, "original_max_position_embeddings": ORIGINAL}
OLMO_3 = {**YARN, "factor": 8.0, "attention_factor": 1.2079441541679836}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MINISTRAL_3 = {**YARN, "factor": 16.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}


@dataclass(frozen=True)
class Variant:
    """A family, its RoPE, and what follows from it by the formulas of the papers.

    `scaling` multiplies the `dims` first channels of rotated keys; `model` are other arguments of its configuration.
    """

    family: str
    rope: dict[str, Any]
    scaling: float = 1.0
    dims: int = 16
    theta: float = 10000.0
    model: dict[str, Any] = field(default_factory=dict)


def partial(factor):
    return {"rope_type": "default", "partial_rotary_factor": factor}


VARIANTS = {
    "Llama 3.1": Variant("llama", {**LLAMA_3, "original_max_position_embeddings": ORIGINAL}, theta=5e5),
    "Llama dynamic": Variant(
        "llama", {"rope_type": "dynamic", "factor": 4.0}, model={"max_position_embeddings": ORIGINAL}
    ),
    "Phi-3 128k": Variant("phi3", LONGROPE, scaling=math.sqrt(1 + 5 / 6), model=LONG_CONTEXT),  # log 32 / log 64
    "Phi-4-mini": Variant(
        "phi3",
        {**LONGROPE, "short_factor": SHORT[:6], "long_factor": LONG[:6], "partial_rotary_factor": 0.75},
        scaling=math.sqrt(1 + 5 / 6),
        dims=12,
        model=LONG_CONTEXT,
    ),
    "Phi-3.5-MoE": Variant(
        "phimoe", {**LONGROPE, "factor": 32.0, "short_mscale": 1.243163121016122, "long_mscale": 1.3}, scaling=1.243163
    ),
    "Qwen2.5 yarn": Variant("qwen2", YARN, scaling=1 + 0.1 * math.log(4), theta=1e6),
    "Qwen3 yarn": Variant("qwen3", YARN, scaling=1 + 0.1 * math.log(4), theta=1e6),
    "gpt-oss": Variant(
        "gpt_oss", {**YARN, "factor": 32.0, "truncate": False}, scaling=1 + 0.1 * math.log(32), theta=15e4
    ),
    "OLMo 3": Variant(
        "olmo3", {SLIDING: {"rope_type": "default"}, FULL: OLMO_3}, scaling=1.2079441541679836, theta=5e5
    ),
    "Gemma 3": Variant(
        "gemma3_text", {SLIDING: {"rope_type": "default"}, FULL: {"rope_type": "linear", "factor": 8.0}}, theta=1e6
    ),
    "Ministral 3": Variant("ministral3", MINISTRAL_3, theta=1e6),
    "DeepSeek V3": Variant("deepseek_v3", {**YARN_40, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "DeepSeek V3, scaled": Variant(
        "deepseek_v3",
        {**YARN_40, "mscale": 1.0, "mscale_all_dim": 0.5},
        scaling=(1 + 0.1 * math.log(40)) / (1 + 0.05 * math.log(40)),
    ),
    "DeepSeek V2, scaled": Variant(
        "deepseek_v2",
        {**YARN_40, "mscale": 1.0, "mscale_all_dim": 0.707},
        scaling=(1 + 0.1 * math.log(40)) / (1 + 0.0707 * math.log(40)),
    ),
    "HunYuan": Variant("hunyuan_v1_dense", {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0}),
    "Phi-2": Variant("phi", partial(0.4), dims=6),
    "StableLM 2": Variant("stablelm", partial(0.25), dims=4),
    "Pythia": Variant("gpt_neox", partial(0.25), dims=4),
    "GLM-4.5": Variant("glm4_moe", partial(0.5), dims=8),
    "Nemotron": Variant("nemotron", partial(0.75), dims=12),
}
OTHERS = {
    "dynamic by layer type": Variant(
        "gemma3_text",
        {SLIDING: {"rope_type": "default"}, FULL: {"rope_type": "dynamic", "factor": 4.0}},
        model={"max_position_embeddings": ORIGINAL},
    )
}
# It computes other angles alone than in a row.
OWN_ANGLES_DIFFER = ("DeepSeek V2, scaled",) if transformers.__version__ < "5.20" else ()
ALL = pytest.mark.parametrize("name", VARIANTS)
BY_LENGTH = ("Llama dynamic", "Phi-3 128k", "Phi-4-mini", "Phi-3.5-MoE")


def changed(parameters, how):
    """RoPE parameters with a part changed, which leaves the weights of a model as they are."""
    lists = {name: value for name, value in parameters.items() if isinstance(value, list)}
    if how == "to plain RoPE":
        kept = {name: value for name, value in parameters.items() if name not in lists}
        return {**kept, "rope_type": "default", "partial_rotary_factor": 1.0}
    dynamic = parameters["rope_type"] == "dynamic"
    if how == "for long texts" and dynamic:
        return {**parameters, "factor": 9.0}
    if how == "for long texts":  # transformers takes the long scaling of Phi-3.5-MoE, but not its frequencies
        return {**parameters, "long_factor": [3 * f for f in lists["long_factor"]], "long_mscale": 2.0}
    if how == "to that of long texts" and dynamic:
        stretched = parameters["factor"] * LONG_WINDOW / ORIGINAL - (parameters["factor"] - 1)
        return {"rope_type": "default", "rope_theta": parameters["rope_theta"] * stretched ** (16 / 14)}
    if how == "to that of long texts" and "long_mscale" in parameters:
        return {**parameters, "short_mscale": parameters["long_mscale"]}
    if how == "to that of long texts":
        return {**parameters, "short_factor": lists["long_factor"]}
    return parameters


@functools.cache
def model_of(name, attention="eager", change=None):
    """The tiny model of a variant; see `changed`."""
    variant = VARIANTS.get(name) or OTHERS[name]
    rope = copy.deepcopy(variant.rope)
    kinds = rope if {FULL, SLIDING} & rope.keys() else {"": rope}
    kinds = {kind: changed({**parameters, "rope_theta": variant.theta}, change) for kind, parameters in kinds.items()}
    default = zoo.tiny_config(variant.family)
    config = type(default).from_dict({**default.to_dict(), **variant.model, "rope_parameters": kinds.get("", kinds)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).float()
    zoo._reinitialise(model, 0)
    model.set_attn_implementation(attention)
    return model.eval()


def text(length=LENGTH):
    return torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(1))


def full_attention(model):
    kinds = getattr(model.config, "layer_types", None)
    modules = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    return [module for module in modules if kinds is None or kinds[module.layer_idx] == FULL]


@torch.no_grad()
def raw_entries(model, ids):
    """`(keys, values)` of each full attention layer before RoPE: its own forward, with embeddings that turn nothing."""
    caught, hooks = [], []

    def look(module, args, kwargs):
        call = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        cache = "layer_past" if "layer_past" in call else CACHE
        with pytest.raises(Caught) as entries:
            module.forward(
                **{**call, "position_embeddings": identity(call["position_embeddings"], module), cache: Catcher()}
            )
        caught.append(entries.value.args)

    for module in full_attention(model):
        hooks.append(module.register_forward_pre_hook(look, with_kwargs=True))
    model(ids, **{CACHE: DynamicCache(config=model.config)})
    for hook in hooks:
        hook.remove()
    return caught


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@ALL
def test_up_to_the_window_it_is_the_model_with_a_dynamic_cache_bit_for_bit(name, attention):
    if (VARIANTS[name].family, attention) == ("gpt_oss", "sdpa"):
        pytest.skip("transformers has no sdpa for gpt-oss")
    model, ids = model_of(name, attention), text(N)
    plain = stream(model, ids, DynamicCache(config=model.config), [9, 1, 5])
    with freqkv.patch(model):
        logits = stream(model, ids, FreqKVCache(model.config, CONFIG), [9, 1, 5])
    if name in OWN_ANGLES_DIFFER:
        assert difference(logits, plain) <= 3e-6
    else:
        assert torch.equal(logits, plain)
    assert plain.std() > 0.1


@ALL
@torch.no_grad()
def test_past_the_window_all_ways_of_feeding_agree(name):
    model, ids = model_of(name), text()
    plain = model(ids, use_cache=False).logits
    with freqkv.patch(model, CONFIG):
        caches = [FreqKVCache(model.config, CONFIG) for _ in range(3)]
        whole, parts, single = (
            stream(model, ids, cache, splits) for cache, splits in zip(caches, ([LENGTH], CHUNKS, []), strict=True)
        )
        without = model(ids, use_cache=False).logits
    assert caches[0].compressions == len(FOLDS) == 4
    assert difference(parts, whole) <= 3e-4
    assert difference(single, whole) <= 3e-4
    assert difference(without, whole) <= 3e-4
    assert difference(whole[:, N:], plain[:, N:]) > 0.05, "compression changes what the model says"


@ALL
@torch.no_grad()
def test_the_compressor_gets_keys_that_are_neither_turned_nor_scaled(name):
    variant, model, ids = VARIANTS[name], model_of(name), text(N + 1)
    truth = raw_entries(model, ids[:, :N])
    spans = []

    def spy(keys, values, keep):
        spans.append((keys.clone(), values.clone()))
        return freqkv.low_pass_entries(keys, values, keep)

    with freqkv.patch(model):
        cache = FreqKVCache(model.config, CONFIG, compressor=spy)
        stream(model, ids[:, :N], cache, [N])
        held = [(cache.layers[i].keys.clone(), cache.layers[i].values.clone()) for i in cache.compressed_layers]
        assert not spans
        stream(model, ids[:, N:], cache, [1])
    assert len(spans) == len(truth) == len(held) == len(full_attention(model)) >= 2
    rotated = 1 if "deepseek" in variant.family else 0  # a latent attention hands over (latent, rotated key)
    for module, span, raw, stored in zip(full_attention(model), spans, truth, held, strict=True):
        for stream_, entries in enumerate(span):
            expected = raw[stream_]
            if stream_ == rotated and hasattr(module, "key_layernorm"):
                expected = expected / module.key_layernorm.weight  # HunYuan's norm comes behind the rotation
            assert difference(entries, expected[:, :, SINKS : N - RECENT]) <= 1e-5
        # What is stored, in contrast, is turned, and scaled: nothing is turned at slot 0.
        at_slot_0 = raw[rotated][:, :, 0].clone()
        at_slot_0[..., : variant.dims] *= variant.scaling
        assert difference(stored[rotated][:, :, 0], at_slot_0) <= 1e-5
        assert difference(stored[rotated][..., : variant.dims], raw[rotated][..., : variant.dims]) > 0.1
        assert torch.equal(stored[rotated][..., variant.dims :], raw[rotated][..., variant.dims :])


@ALL
@torch.no_grad()
def test_the_variant_matters(name):
    """The same weights with plain RoPE say something else, so that a variant that is ignored is noticed."""
    model, default, ids = model_of(name), model_of(name, change="to plain RoPE"), text()
    weights = default.state_dict()
    assert all(torch.equal(weight, weights[key]) for key, weight in model.state_dict().items())
    logits = []
    for each in (model, default):
        with freqkv.patch(each):
            logits.append(stream(each, ids, FreqKVCache(each.config, CONFIG), [LENGTH]))
    if name == "Llama dynamic":  # up to the length it was trained on, which slots do not leave, it is plain RoPE
        assert torch.equal(*logits)
    else:
        assert difference(*logits) > 0.02


@pytest.mark.parametrize("name", BY_LENGTH)
@torch.no_grad()
def test_frequencies_of_long_texts_do_not_reach_the_slots(name):
    """However long the text: slots stay below the window, and the window below the length at which they change."""
    models, ids = (model_of(name), model_of(name, change="for long texts")), text()
    assert LENGTH > ORIGINAL > N
    plain = [model(ids, use_cache=False).logits for model in models]
    assert difference(*plain) > 0.02, "plain models change beyond that length"
    for splits in ([LENGTH], CHUNKS):
        logits = []
        for model in models:
            with freqkv.patch(model):
                logits.append(stream(model, ids, FreqKVCache(model.config, CONFIG), splits))
        assert torch.equal(*logits)


@pytest.mark.parametrize("name", BY_LENGTH)
@torch.no_grad()
def test_a_window_beyond_that_length_has_the_frequencies_of_long_texts_from_the_start(name):
    models, ids = (model_of(name), model_of(name, change="to that of long texts")), text(2 * LONG_WINDOW)
    config = FreqKVConfig(LONG_WINDOW, SINKS, 0.5, RECENT)
    logits = []
    for model in models:
        with freqkv.patch(model, config):
            logits.append(stream(model, ids, FreqKVCache(model.config, config), [LONG_WINDOW + 9, 5, 7]))
            logits.append(model(ids, use_cache=False).logits)
    for each in logits[1:]:
        assert difference(each, logits[0]) <= 3e-4
    plain = models[0](ids[:, :N], use_cache=False).logits
    assert difference(logits[0][:, :N], plain) > 0.02, "which is not what the plain model starts with"


@pytest.mark.parametrize("name", BY_LENGTH)
@torch.no_grad()
def test_generate_keeps_its_cache_beyond_the_length_at_which_frequencies_change(name):
    model, ids, new = model_of(name), text(9)[:1], ORIGINAL
    with freqkv.patch(model):
        cache = FreqKVCache(model.config, CONFIG)
        answer = model.generate(ids, **{CACHE: cache}, max_new_tokens=new, do_sample=False, eos_token_id=None)
        by_hand = FreqKVCache(model.config, CONFIG)
        logits = model(ids, **{CACHE: by_hand}).logits
        for _ in range(new):
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            logits = model(ids[:, -1:], **{CACHE: by_hand}).logits
    assert ids.shape[1] > ORIGINAL + 1
    assert cache.tokens_seen == ids.shape[1] - 1
    assert torch.equal(answer, ids)


@pytest.mark.parametrize("name", ["Llama dynamic", "dynamic by layer type"])
@torch.no_grad()
def test_what_the_model_read_before_does_not_matter(name):
    """Dynamic types remember the longest text; the window is the model's own context, as it is by default."""
    logits = []
    for before in (0, 3 * ORIGINAL):
        model = copy.deepcopy(model_of(name))
        if before:
            model(text(before), use_cache=False)
        with freqkv.patch(model):
            logits.append(stream(model, text(2 * ORIGINAL), FreqKVCache(model.config), [ORIGINAL + 3, 9]))
    assert torch.equal(*logits)
