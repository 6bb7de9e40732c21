"""The method as a loop over single tokens around models that are not patched, for families that rotate differently.

Nothing of the package is in the loop: slots are a formula, entries are unrotated float64 vectors in lists, scipy
transforms them, and when a token attends, all keys are rotated at their slots by the function of the family's own file.
"""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest
import torch
import zoo
from catching import Catcher, Caught, identity
from oracle import low_pass
from running import difference, stream
from transformers.cache_utils import Cache

import freqkv
from freqkv import FreqKVCache
from freqkv.models.rules import FAMILY_RULES
from freqkv.models.upstream import CACHE

SETTINGS = [(19, 3, 0.5, 0), (19, 3, 0.37, 0), (23, 3, 0.5, 5), (23, 3, 0.37, 5)]  # window, sinks, ratio, recents

EXACT = 1e-12  # float64 throughout
ROUNDED = 1e-6  # norms, softmax or rotation in float32, whatever the dtype of the model
FAMILIES = {
    "codegen": ROUNDED,
    "cohere": ROUNDED,
    "deepseek_v2": ROUNDED,
    "deepseek_v3": ROUNDED,
    "ernie4_5": ROUNDED,
    "falcon": EXACT,
    "gemma": ROUNDED,
    "glm": ROUNDED,
    "glm4": ROUNDED,
    "glm4_moe": ROUNDED,
    "gpt_neox": EXACT,
    "gptj": ROUNDED,
    "granite": ROUNDED,
    "helium": ROUNDED,
    "hunyuan_v1_dense": ROUNDED,
    "llama": ROUNDED,
    "nanochat": ROUNDED,
    "nemotron": EXACT,
    "olmo2": ROUNDED,
    "persimmon": EXACT,
    "phi": EXACT,
    "phi3": ROUNDED,
    "qwen2": ROUNDED,
    "qwen3": ROUNDED,
    "stablelm": EXACT,
    "starcoder2": EXACT,
}


@functools.cache
def models_of(family, **rope):
    """The same model twice in float64, the second one patched."""
    plain, patched = zoo.tiny_model(family), zoo.tiny_model(family)
    if rope:  # what attention modules read of it; rotary modules have read theirs
        plain.config.rope_parameters |= rope
        patched.config.rope_parameters |= rope
    freqkv.patch(patched)  # in float32: norms behind the rotation round more than it takes for rounding in float64
    for model in (plain, patched):
        model.set_experts_implementation("eager")  # the others know no float64
        model.double()
    return plain, patched


def attentions(model):
    """The attention modules by layer."""
    found = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    return {module.layer_idx: module for module in found}


def rotated(module, keys, embeddings):
    """Keys `(1, heads, n, dim)` rotated by the function that the file of their module rotates its own with."""
    file = sys.modules[type(module).__module__]
    if isinstance(embeddings, torch.Tensor) and embeddings.is_complex():
        dims = 2 * embeddings.shape[-1]
        turned = file.apply_rotary_emb(keys[..., :dims], keys[..., :dims], embeddings)[1]
    elif isinstance(embeddings, torch.Tensor):  # GPT-J: [sin | cos], and heads stand behind tokens
        sin, cos = embeddings[None].chunk(2, dim=-1)
        dims = 2 * sin.shape[-1]
        turned = file.apply_rotary_pos_emb(keys[..., :dims].transpose(1, 2), sin, cos).transpose(1, 2)
    elif type(module).__name__.startswith(("GPTJ", "CodeGen")):  # the same, out of a rotary module (5.24)
        dims = 2 * embeddings[0].shape[-1]
        turned = file.apply_rotary_pos_emb(keys[..., :dims].transpose(1, 2), *embeddings).transpose(1, 2)
    else:
        dims = embeddings[0].shape[-1]
        turned = file.apply_rotary_pos_emb(keys[..., :dims], keys[..., :dims], *embeddings)[1]
    return torch.cat([turned, keys[..., dims:]], dim=-1)


class Book(Cache):
    """Entries of one sequence that enters token by token, unrotated."""

    def __init__(self, model, window, sinks, ratio, recents):
        super().__init__(layers=[])
        entries = window - sinks - recents
        self.window, self.span, self.keep = window, slice(sinks, window - recents), int(entries * ratio)
        self.step = entries - self.keep
        self.token = self.folds = 0
        self.modules = attentions(model)
        self.held = {index: ([], []) for index in self.modules}
        rotary = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
        self.embeddings = rotary[0] if rotary else self.sinusoids

    @property
    def slot(self):
        if self.token < self.window:
            return self.token
        return self.window - self.step + (self.token - self.window) % self.step

    def sinusoids(self, _, positions):
        return self.modules[0].embed_positions[positions[0]].double()

    def look(self, module, args, kwargs):
        """Before an attention module runs: what would it cache for this token if its embeddings turned nothing?"""
        call = dict(zip(["hidden_states"], args, strict=False)) | kwargs
        call["layer_past" if "layer_past" in call else CACHE] = Catcher()
        if call.get("position_embeddings") is None:
            call["position_ids"] = torch.zeros_like(call["position_ids"])
        else:
            call["position_embeddings"] = identity(call["position_embeddings"], module)
        with pytest.raises(Caught) as caught:
            module.forward(**call)
        keys, values = caught.value.args
        if hasattr(module, "key_layernorm"):  # HunYuan's weights multiply what is turned already
            keys = keys / module.key_layernorm.weight
        self.entering = keys[0, :, 0].numpy(), values[0, :, 0].numpy()

    def update(self, keys, values, layer_idx, *args, **kwargs):
        for held, entry in zip(self.held[layer_idx], self.entering, strict=True):
            if self.token >= self.window and (self.token - self.window) % self.step == 0:
                held[self.span] = low_pass(np.stack(held[self.span], axis=1), self.keep).swapaxes(0, 1)
                self.folds += 1
            assert len(held) == self.slot
            held.append(entry)
        module = self.modules[layer_idx]
        latent = hasattr(module, "kv_lora_rank")  # DeepSeek's caches (latent, rotated key)
        streams = [torch.from_numpy(np.stack(held, axis=1))[None] for held in self.held[layer_idx]]
        slots = torch.arange(self.slot + 1)[None]
        streams[latent] = rotated(module, streams[latent], self.embeddings(torch.zeros(1).double(), slots))
        if hasattr(module, "key_layernorm"):
            streams[0] *= module.key_layernorm.weight
        for stream_, own in zip(streams, (keys, values), strict=True):
            assert difference(stream_[:, :, -1:], own) <= 1e-6, (
                "the last one stands as the module itself has rotated it"
            )
        return tuple(streams)


@torch.no_grad()
def by_the_book(model, ids, setting):
    """Logits of one sequence, and how often each layer was compressed."""
    book, logits = Book(model, *setting), []
    hooks = [module.register_forward_pre_hook(book.look, with_kwargs=True) for module in book.modules.values()]
    everything = torch.zeros(1, 1, 1, 1, dtype=torch.float64)  # one token sees all entries: a mask that hides nothing
    for token in ids[0]:
        place = {"position_ids": torch.tensor([[book.slot]]), "attention_mask": everything}
        logits.append(model(token[None, None], **{CACHE: book}, **place).logits)
        book.token += 1
    for hook in hooks:
        hook.remove()
    return torch.cat(logits, dim=1), book.folds / 2 / len(book.modules)


@torch.no_grad()
def compare(models, setting, bound):
    plain, patched = models
    window, sinks, ratio, recents = setting
    ids = torch.randint(3, 100, (1, 2 * window + 7), generator=torch.Generator().manual_seed(1))
    expected, folds = by_the_book(plain, ids, setting)
    uncompressed = plain(ids, use_cache=False).logits
    assert difference(expected[:, :window], uncompressed[:, :window]) <= bound
    assert difference(expected[:, window:], uncompressed[:, window:]) > 0.1
    cache = FreqKVCache(plain.config, window=window, sink_tokens=sinks, retain_ratio=ratio, recent_tokens=recents)
    logits = stream(patched, ids, cache, [window - 3, 1, window + 4, 3])
    assert cache.compressions == folds >= 3
    assert difference(logits, expected) <= bound


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_loop(family, setting):
    compare(models_of(family), setting, FAMILIES[family])


def test_ministral():
    """Its queries are scaled by the true count of tokens, as in the plain model; here not at all."""
    compare(models_of("ministral3", llama_4_scaling_beta=0.0), SETTINGS[0], ROUNDED)


def test_a_norm_behind_rope_shows_before_it_is_trained(monkeypatch):
    """Its weights are all ones then, and would only later make the keys of a fold wrong."""
    monkeypatch.delitem(FAMILY_RULES, "hunyuan_v1_dense")
    model = zoo.tiny_model("hunyuan_v1_dense")
    weights = {name: weight for name, weight in model.named_parameters() if "key_layernorm" in name}
    for weight in weights.values():
        torch.nn.init.ones_(weight)
    support = freqkv.supported(model)
    assert not support
    assert "a norm behind RoPE needs a rule" in support.reason
    assert all(bool((weight == 1).all()) for weight in weights.values()), "the model itself is not touched"
