"""What a decoder gives its layers decides how they rotate: none, embeddings of one rotary module, or of one among several."""

from __future__ import annotations

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
import zoo
from accelerate import cpu_offload
from catching import Catcher, Caught, identity
from models import tiny_llama, tokens
from running import stream
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache

import freqkv
from freqkv import FreqKVCache
from freqkv.models.analysis import analyse
from freqkv.models.observation import embeddings_given
from freqkv.models.upstream import CACHE

N, SINKS, RECENT = 29, 3, 4
FULL, SLIDING = "full_attention", "sliding_attention"


def from_config(model_class, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config).float()
    zoo._reinitialise(model, 0)
    return model.eval()


def granite_swa(thetas):
    default = zoo.tiny_config("granite_swa")
    kinds = {"layer_types": [FULL, SLIDING, FULL, FULL], "layer_rope_theta": thetas}
    config = type(default).from_dict({**default.to_dict(), **kinds})
    return from_config(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)


def muse_glimmer():
    config = transformers.MuseGlimmerConfig().text_config
    sizes = {name: zoo.SIZE[name] for name in zoo.SIZE if hasattr(config, name)}
    kinds = {"layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 2, "num_hidden_layers": 8, "layer_rope_theta": None}
    config = type(config).from_dict({**config.to_dict(), **sizes, **kinds, "pad_token_id": 0})
    return from_config(transformers.models.muse_glimmer.modeling_muse_glimmer.MuseGlimmerTextModel, config)


MODELS = {
    "one theta a layer": lambda: granite_swa([10000.0, 10000.0, 300.0, 5e5]),
    "one theta a layer, some without": lambda: granite_swa([10000.0, 10000.0, 0, 5e5]),
    "none for full attention": muse_glimmer,
}
if hasattr(transformers, "LaraMiniConfig"):
    MODELS["none for full attention, beside linear attention"] = lambda: zoo.tiny_model("lara_mini")
if not hasattr(transformers, "GraniteSWAConfig"):
    MODELS = {name: make for name, make in MODELS.items() if "theta" not in name}
if not hasattr(transformers, "MuseGlimmerConfig"):
    MODELS.pop("none for full attention")
ALL = pytest.mark.parametrize("name", MODELS)


def text(length):
    return torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(1))


def raw_entries(model, ids):
    """`(keys, values)` of each full attention layer before RoPE: its own forward, with embeddings that turn nothing."""
    caught = []

    def look(module, args, kwargs):
        given = kwargs["position_embeddings"]
        with pytest.raises(Caught) as entries:
            module.forward(
                **{**kwargs, "position_embeddings": None if given is None else identity(given), CACHE: Catcher()}
            )
        caught.append((given, entries.value.args))

    kinds = model.config.get_text_config().layer_types
    modules = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "k_proj")]
    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in modules if kinds[m.layer_idx] == FULL]
    with torch.no_grad():
        model(ids, **{CACHE: DynamicCache(config=model.config)})
    for hook in hooks:
        hook.remove()
    return caught


@ALL
def test_the_compressor_gets_what_was_there_before_rope(name):
    model, ids = MODELS[name](), text(N + 1)
    truth = raw_entries(model, ids[:, :N])
    spans = []

    def spy(keys, values, keep):
        spans.append((keys.clone(), values.clone()))
        return freqkv.low_pass_entries(keys, values, keep)

    with freqkv.patch(model) as handle, torch.no_grad():
        assert ["not rotated" in line for line in str(handle).splitlines() if "self_attn" in line] == [
            given is None for given, _ in truth
        ]
        model(
            ids, **{CACHE: FreqKVCache(model.config, window=N, sink_tokens=SINKS, recent_tokens=RECENT, compressor=spy)}
        )
    assert len(spans) == len(truth) >= 2
    for span, (_, raw) in zip(spans, truth, strict=True):
        for entries, expected in zip(span, raw, strict=True):
            expected = expected[:, :, SINKS : N - RECENT]
            assert ((entries - expected).abs().max() / expected.abs().max()).item() <= 1e-5


@ALL
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_below_the_window_it_is_the_model_with_a_dynamic_cache_bit_for_bit(name, attention):
    model = MODELS[name]()
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"transformers has no {attention} for it")
    if not hasattr(model, "lm_head"):
        model.forward = lambda *args, forward=model.forward, **kwargs: Logits(forward(*args, **kwargs))
    plain = stream(model, text(N), DynamicCache(config=model.config), [9, 1, 5])
    model.__dict__.pop("forward", None)
    freqkv.patch(model)
    if not hasattr(model, "lm_head"):
        model.forward = lambda *args, forward=model.forward, **kwargs: Logits(forward(*args, **kwargs))
    ours = stream(model, text(N), FreqKVCache(model.config, window=N, sink_tokens=SINKS), [9, 1, 5])
    assert torch.equal(ours, plain)


class Logits:
    """A model without a head, whose last hidden states are taken for logits."""

    def __init__(self, output):
        self.logits = output.last_hidden_state


def test_looking_leaves_the_model_as_it_was():
    model = tiny_llama(rope="dynamic", context=16)
    ids = tokens(40)
    with torch.no_grad():
        before = model(ids).logits, model(ids[:, :9]).logits
        state = {name: dict(module.__dict__) for name, module in model.named_modules()}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        given = embeddings_given(
            model.model, ["layers.0.self_attn", "layers.1.self_attn"], torch.tensor([1, 3, 15]), 48, torch.float32
        )
        assert all(torch.equal(value, dict(model.named_buffers())[name]) for name, value in buffers.items())
        assert {name: dict(module.__dict__) for name, module in model.named_modules()} == state
        assert torch.equal(model(ids).logits, before[0])
        assert torch.equal(model(ids[:, :9]).logits, before[1])
    cos, sin = tiny_llama(rope="dynamic", context=16).model.rotary_emb(torch.zeros(1), torch.tensor([[1, 3, 15]]))
    for each in given.values():
        assert torch.equal(each[0], cos)
        assert torch.equal(each[1], sin)


@pytest.mark.parametrize("used_before", [False, True])
@torch.no_grad()
def test_hidden_states_and_attention_weights_are_collected_from_the_layers(used_before):
    """transformers puts hooks on them at the first forward that asks for it, which looking is not."""
    model = tiny_llama(output_hidden_states=True, output_attentions=True)
    if used_before:
        model(tokens(5))
    assert freqkv.supported(model)
    for patched in (False, True):
        if patched:
            freqkv.patch(model, window=N)
        output = model(tokens(5))
        assert (len(output.hidden_states), len(output.attentions)) == (3, 2)


def test_a_patched_model_is_looked_at_as_it_is_unpatched():
    model = tiny_llama()
    expected = [str(layer) for layer in analyse(model).layers]
    freqkv.patch(model, window=N)
    assert [str(layer) for layer in analyse(model).layers] == expected
    assert freqkv.supported(model)


def test_embeddings_that_no_rotary_module_gives_are_refused():
    """Here one that answers otherwise each time, as one with noise or state would."""
    model = tiny_llama()
    forward = type(model.model.rotary_emb).forward

    class Noisy(type(model.model.rotary_emb)):
        def forward(self, x, position_ids):
            cos, sin = forward(self, x, position_ids)
            return cos * (1 + 0.1 * torch.rand(1)), sin

    model.model.rotary_emb.__class__ = Noisy
    with pytest.raises(freqkv.UnsupportedModelError, match="none of its rotary modules"):
        freqkv.patch(model)


def test_a_decoder_that_does_not_run_like_this_is_refused():
    model = tiny_llama()

    class Strange(type(model.model)):
        def forward(self, input_ids=None, **kwargs):
            raise KeyError("a_missing_argument")

    Strange.forward.__signature__ = inspect.signature(type(model.model).forward)
    model.model.__class__ = Strange
    with pytest.raises(freqkv.UnsupportedModelError, match=r"could not be looked at: Strange.*a_missing_argument"):
        freqkv.patch(model)


@torch.no_grad()
def test_looking_leaves_no_hooks_and_no_random_numbers_behind():
    model = tiny_llama(output_hidden_states=True, output_attentions=True).train()
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    children = {name: dict(m._modules) for name, m in model.named_modules()}
    state = torch.get_rng_state()
    assert freqkv.supported(model)
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert {name: dict(m._modules) for name, m in model.named_modules()} == children
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_looking_does_not_disturb_forwards_in_other_threads():
    model, ids = tiny_llama(), tokens(5)
    expected = model(ids).logits
    done = threading.Event()

    def look():
        while not done.is_set():
            assert freqkv.supported(model)

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            for _ in range(150):
                assert torch.equal(model(ids).logits, expected)
        finally:
            done.set()
        looking.result()


@pytest.mark.parametrize("family", ["zaya", "hrm_text", "llama", "gemma4_text"])
@torch.no_grad()
def test_weights_that_accelerate_brings(family):
    """Decoders with parameters of their own run with them."""
    model = zoo.tiny_model(family)
    cpu_offload(model, execution_device=torch.device("cpu"))
    ids = torch.randint(3, 100, (1, 3 * N), generator=torch.Generator().manual_seed(1))
    try:
        model(input_ids=ids)
    except KeyError:
        pytest.skip("this transformers does not run it offloaded")
    freqkv.patch(model)
    cache = FreqKVCache(model.config, window=N)
    assert model(input_ids=ids, **{CACHE: cache}).logits.isfinite().all()
    assert cache.tokens_seen == 3 * N
