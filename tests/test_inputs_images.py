"""Models with images around a decoder: text, images that are tokens like others to the decoder, and images that are not."""

from __future__ import annotations

import pytest
import torch
import zoo
from every_family import CHUNKS, LENGTH, RECENT, SINKS, N
from running import close
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)

import freqkv
from freqkv import FreqKVCache
from freqkv.models.upstream import CACHE

ATTENTION = ("eager", "sdpa")
IMAGE, START, END = 100, 102, 103  # token ids
NUMBERS = {"window": N, "sink_tokens": SINKS, "recent_tokens": RECENT}
GENERATION = {"max_new_tokens": 2 * N + 1, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 16}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}}
VISION = {  # 3 x 3 patches
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}  # 2 x 2 patches make a token
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 101,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def _llava():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=LlamaConfig(**TEXT, **HEADS),
        image_token_index=IMAGE,
    )
    return LlavaForConditionalGeneration(config)


def _gemma3():
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=Gemma3TextConfig(
            **TEXT, **HEADS, sliding_window=11, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        mm_tokens_per_image=9,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return Gemma3ForConditionalGeneration(config)


def _paligemma():
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=GemmaConfig(**TEXT, **HEADS),
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )
    return PaliGemmaForConditionalGeneration(config)


def _qwen2_vl():
    vision = {**QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    config = Qwen2VLConfig(vision_config=vision, text_config={**TEXT, **MROPE}, **QWEN_TOKENS)
    return Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl():
    vision = {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config={**TEXT, **MROPE}, **QWEN_TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config)


BUILD = {
    "llava": _llava,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
}


def model_of(name, attention="eager"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUILD[name]().float()
    zoo._reinitialise(model, 0)
    model.set_attn_implementation(attention)
    return model.eval()


def cache_of(model):
    return FreqKVCache(model.config, **NUMBERS)


def text(length=LENGTH):
    return torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(1))


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def feed(model, ids, cache, splits, images=None, at=0):
    """Logits of `ids` in calls of these lengths, then token by token; `images` go with call `at`."""
    outputs, start = [], 0
    for number, length in enumerate([*splits, *[1] * (ids.shape[1] - sum(splits))]):
        more = (images or {}) if number == at else {}
        call = ids[:, start : start + length]
        outputs.append(model(input_ids=call, **{CACHE: cache}, use_cache=True, **more).logits)
        start += length
    return torch.cat(outputs, 1)


def check_past_the_window(model, ids, splits, images=None):
    """All ways to read `ids` give the same; the logits."""
    cache = cache_of(model)
    whole = feed(model, ids, cache, [LENGTH], images)
    assert cache.tokens_seen == LENGTH
    assert cache.compressions > 1
    for each in splits:
        assert close(feed(model, ids, cache_of(model), each, images), whole)
    with freqkv.patch(model, **NUMBERS):
        assert close(model(input_ids=ids, use_cache=False, **(images or {})).logits, whole)
    return whole


def check_generated(model, prompt, images=None):
    """Greedy `generate` past several windows, and the same by hand."""
    images = images or {}
    ones = torch.ones_like(prompt)
    answer = model.generate(prompt, attention_mask=ones, **{CACHE: cache_of(model)}, **images, **GENERATION)
    cache, ids = cache_of(model), prompt
    logits = feed(model, prompt, cache, [prompt.shape[1]], images)
    for _ in range(GENERATION["max_new_tokens"]):
        token = logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        logits = model(input_ids=token, **{CACHE: cache}, use_cache=True).logits
    assert torch.equal(answer, ids)
    with freqkv.patch(model, **NUMBERS):
        assert torch.equal(model.generate(prompt, attention_mask=ones, **images, **GENERATION), ids)


MODELS = [name for name in BUILD if name != "paligemma"]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_text(name, attention):
    model, ids = model_of(name, attention), text()
    plain = feed(model, ids[:, :N], DynamicCache(config=model.config), [9, 1, 5])
    unpatched = model(input_ids=ids, use_cache=False).logits
    freqkv.patch(model)
    logits = feed(model, ids[:, :N], cache_of(model), [9, 1, 5])
    assert torch.equal(logits, plain)
    whole = check_past_the_window(model, ids, [CHUNKS, []])
    assert not torch.allclose(whole, unpatched, rtol=0.05), "compression changes what the model says"
    freqkv.unpatch(model)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, unpatched)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_generate_text(name, attention):
    model = model_of(name, attention)
    freqkv.patch(model)
    check_generated(model, text(9))


@torch.no_grad()
def test_token_types_of_text():
    """As Gemma 3's processor gives them where there is no image: all 0."""
    model, ids = model_of("gemma3"), text()
    types = torch.zeros_like(ids)
    freqkv.patch(model)
    whole = feed(model, ids, cache_of(model), [LENGTH])
    assert torch.equal(feed(model, ids, cache_of(model), [LENGTH], {"token_type_ids": types}), whole)
    with freqkv.patch(model, **NUMBERS):
        assert close(model(input_ids=ids, token_type_ids=types, use_cache=False).logits, whole)


@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_images_that_are_tokens_like_others(attention):
    model, ids = model_of("llava", attention), text()
    ids[:, 3:12] = IMAGE
    images = {"pixel_values": noise(2, 3, 12, 12)}
    plain = feed(model, ids[:, :N], DynamicCache(config=model.config), [13, 1, 5], images)
    freqkv.patch(model)
    assert torch.equal(feed(model, ids[:, :N], cache_of(model), [13, 1, 5], images), plain)
    whole = check_past_the_window(model, ids, [CHUNKS, [12]], images)
    other = feed(model, ids, cache_of(model), [LENGTH], {"pixel_values": -images["pixel_values"]})
    assert not torch.allclose(whole[:, N:], other[:, N:], rtol=0.05), "images reach what comes behind the window"
    check_generated(model, ids[:, :15], images)


@torch.no_grad()
def test_an_image_across_the_window_and_in_a_later_call():
    model, ids = model_of("llava"), text()
    ids[:, N - 4 : N + 5] = IMAGE
    images = {"pixel_values": noise(2, 3, 12, 12)}
    freqkv.patch(model)
    whole = feed(model, ids, cache_of(model), [LENGTH], images)
    assert close(feed(model, ids, cache_of(model), [10, N - 1, 4], images, at=1), whole)


@torch.no_grad()
def test_an_image_that_does_not_fit_its_tokens():
    """The model raises before the decoder runs: nothing has entered the cache."""
    model, ids = model_of("llava"), text()
    ids[:, 3:12] = IMAGE
    freqkv.patch(model)
    cache = cache_of(model)
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(input_ids=ids, **{CACHE: cache}, pixel_values=noise(1, 3, 12, 12))
    assert (cache.tokens_seen, cache.is_spent) == (0, False)
    assert close(
        feed(model, ids, cache, [LENGTH], {"pixel_values": noise(2, 3, 12, 12)}),
        feed(model, ids, cache_of(model), CHUNKS, {"pixel_values": noise(2, 3, 12, 12)}),
    )


def with_image(name):
    """A prompt with an image that is more than tokens like others, as the processor of the model gives it."""
    ids = text(20)
    if name.startswith("qwen"):
        ids[:, 3], ids[:, 4:8], ids[:, 8] = START, IMAGE, END
        images = {"pixel_values": noise(32, 3 * 2 * 16), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
        return {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(), **images}
    ids[:, 3:12] = IMAGE
    return {"input_ids": ids, "token_type_ids": (ids == IMAGE).long(), "pixel_values": noise(2, 3, 12, 12)}


REFUSED = {
    "gemma3": "token_type_ids",
    "qwen2_vl": "position_ids",
    "qwen2_5_vl": "position_ids",
}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_images_that_are_not(name, attention):
    """Their tokens see each other, or stand at the same position: an error that says so, and a cache as it was."""
    model, inputs = model_of(name, attention), with_image(name)
    plain = model(**inputs, **{CACHE: DynamicCache(config=model.config)}).logits
    freqkv.patch(model)
    cache = cache_of(model)
    with pytest.raises(ValueError, match=REFUSED[name]):
        model(**inputs, **{CACHE: cache})
    assert (cache.tokens_seen, cache.is_spent) == (0, False)
    with pytest.raises(ValueError, match=REFUSED[name]):
        model.generate(**inputs, **{CACHE: cache}, **GENERATION)
    assert (cache.tokens_seen, cache.is_spent) == (0, False)
    with freqkv.patch(model, **NUMBERS):
        for use_cache in (False, True):
            with pytest.raises(ValueError, match=REFUSED[name]):
                model(**inputs, use_cache=use_cache)
    assert torch.equal(model(**inputs, **{CACHE: DynamicCache(config=model.config)}).logits, plain)


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_text_in_calls_after_a_refused_image(name):
    model, ids = model_of(name), text()
    freqkv.patch(model)
    whole = feed(model, ids, cache_of(model), [LENGTH])
    cache = cache_of(model)
    with pytest.raises(ValueError, match=REFUSED[name]):
        model(**with_image(name), **{CACHE: cache})
    assert close(feed(model, ids, cache, CHUNKS), whole)


@torch.no_grad()
def test_generate_text_after_a_refused_image():
    model = model_of("qwen2_vl")
    freqkv.patch(model)
    with pytest.raises(ValueError, match="position_ids"):
        model(**with_image("qwen2_vl"), **{CACHE: cache_of(model)})
    check_generated(model, text(9))


def test_a_model_whose_prompt_sees_ahead_is_refused():
    with pytest.raises(freqkv.UnsupportedModelError, match=r"the tokens of its prompt see each other.*\(PrefixLM\)"):
        freqkv.patch(model_of("paligemma"))


@torch.no_grad()
def test_a_decoder_whose_tokens_see_ahead_is_refused():
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, use_bidirectional_attention=True,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    support = freqkv.supported(Gemma3ForCausalLM(config))
    assert "lets tokens see later ones" in support.reason
