"""Asking whether a model is served, and looking at models whose weights are elsewhere."""

from __future__ import annotations

import accelerate
import pytest
import torch
import transformers
import zoo
from models import tiny_llama, tokens
from running import stream
from transformers import DynamicCache

import freqkv
from freqkv import FreqKVCache

N = 23


@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "deepseek_v3", "gptj", "zamba2", "gpt_oss", "bert", "moshi"]
)
def test_a_configuration_is_answered_like_the_model(family):
    by_config, by_model = freqkv.supported(zoo.tiny_config(family)), freqkv.supported(zoo.tiny_model(family))
    assert bool(by_config) == bool(by_model) == (family not in ("bert", "moshi"))
    assert str(by_config) == str(by_model)
    if by_config:
        rotations = [[layer.rotation for layer in support.analysis.layers] for support in (by_config, by_model)]
        assert rotations[0] == rotations[1]


def test_nothing_is_patched_or_drawn():
    model = tiny_llama()
    state = torch.random.get_rng_state()
    assert freqkv.supported(model)
    assert freqkv.supported(model.config)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match="not patched"):
        freqkv.unpatch(model)


def test_a_model_too_large_for_this_machine_is_answered():
    config = transformers.DeepseekV3Config()  # 671B parameters
    support = freqkv.supported(config)
    assert str(support) == "yes: 61 attention modules compressed"
    assert support.analysis.layers[-1].rotation.stream == "values"


def test_reasons():
    assert "no rotary position embeddings" in freqkv.supported(transformers.GPT2Config()).reason
    assert "ALiBi" in freqkv.supported(transformers.FalconConfig(alibi=True)).reason
    assert "cannot build its causal language model" in freqkv.supported(transformers.T5Config()).reason
    with pytest.raises(TypeError, match="a transformers model or its config, not a str"):
        freqkv.supported("meta-llama/Llama-3.1-8B")


@torch.no_grad()
def test_a_model_whose_weights_are_on_disk(tmp_path):
    """accelerate brings them for each call and takes them away: the look at a layer does the same."""
    ids = tokens(3 * N + 2)
    plain = tiny_llama()
    freqkv.patch(plain)
    expected = stream(plain, ids, FreqKVCache(plain.config, window=N), [N + 9, 7])
    model = tiny_llama()
    names = {name: "disk" for name, module in model.named_modules() if name and not list(module.children())}
    accelerate.dispatch_model(model, names, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert all(p.is_meta for p in model.model.layers.parameters())
    freqkv.patch(model)
    assert all(p.is_meta for p in model.model.layers.parameters())
    assert torch.equal(stream(model, ids, FreqKVCache(model.config, window=N), [N + 9, 7]), expected)


@torch.no_grad()
def test_whole_layers_on_disk(tmp_path):
    model = tiny_llama()
    expected = stream(model, tokens(N), DynamicCache(config=model.config), [9])
    where = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk", "model.norm": "cpu"}
    where |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    freqkv.patch(model)
    assert all(p.is_meta for p in model.model.layers.parameters())
    assert torch.equal(stream(model, tokens(N), FreqKVCache(model.config, window=N), [9]), expected)


def test_a_model_without_weights():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2))
    assert "layer 1: model.layers.1.self_attn, keys rotated in 128 channels" in repr(freqkv.patch(model))


def test_the_handle_tells_what_is_left_to_transformers():
    text = repr(freqkv.patch(zoo.tiny_model("gemma3_text")))
    assert "DynamicSlidingWindowLayer, left to transformers" in text
    assert "keys rotated in 16 channels, half pairing" in text


def test_weights_that_are_not_there_yet():
    """Keys of zeros would look as if nothing turned them."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.zero_()
    with pytest.raises(freqkv.UnsupportedModelError, match="load the weights first"):
        freqkv.patch(model)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_running_out_of_memory_says_nothing_of_the_model(error, monkeypatch):
    model = tiny_llama()

    def exhausted(*_):
        raise error

    monkeypatch.setattr(model.model.layers[0].self_attn.k_proj, "forward", exhausted)
    with pytest.raises(error):
        freqkv.supported(model)


def test_an_error_in_an_attention_module_is_told(monkeypatch):
    model = tiny_llama()

    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(model.model.layers[0].self_attn.k_proj, "forward", broken)
    assert "self_attn, run by itself, raised RuntimeError: no such kernel" in freqkv.supported(model).reason
