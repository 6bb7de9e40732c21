"""What patching touches, and what is refused, by message."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
import zoo
from models import tiny_llama, tokens
from transformers import DynamicCache

import freqkv
from freqkv import FreqKVCache, FreqKVConfig
from freqkv.models.rules import FAMILY_RULES
from freqkv.models.upstream import CACHE, CHECKPOINTS_WITH_GRADIENTS_ONLY

N = 23


def instance_state(model):
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


@torch.no_grad()
def plain_outputs(model):
    ids = tokens(3 * N, batch=2)
    return [
        model(ids).logits,
        model(ids, use_cache=False).logits,
        model(ids, **{CACHE: DynamicCache(config=model.config)}).logits,
        model.generate(ids, max_new_tokens=5, do_sample=False),
    ]


def test_unpatched_patched_and_unpatched_again_behave_alike():
    model, untouched = tiny_llama(), tiny_llama()
    before = instance_state(model)
    expected = plain_outputs(model)
    handle = freqkv.patch(model)
    for a, b in zip(expected, plain_outputs(model), strict=True):
        assert torch.equal(a, b), "a patched model without FreqKV in the call"
    model.generate(tokens(3 * N), **{CACHE: FreqKVCache(model.config, window=N)}, max_new_tokens=5)
    handle.unpatch()
    for a, b in zip(expected, plain_outputs(model), strict=True):
        assert torch.equal(a, b)
    after = instance_state(model)
    assert before.keys() == after.keys()
    assert all(before[name].keys() == after[name].keys() for name in before), "nothing is left on the instance"
    for a, b in zip(expected, plain_outputs(untouched), strict=True):
        assert torch.equal(a, b), "other instances are not touched"
    with pytest.raises(ValueError, match="not patched"):
        freqkv.unpatch(model)


def test_patching_changes_neither_weights_nor_random_numbers():
    model = tiny_llama(attention_dropout=0.5).train()
    weights = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    freqkv.patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "eager"


def test_patch_is_idempotent_and_takes_the_last_numbers():
    model = tiny_llama()
    freqkv.patch(model)
    forward = model.model.layers[0].self_attn.forward
    handle = freqkv.patch(model, window=N)
    assert model.model.layers[0].self_attn.forward == forward
    assert handle.config == FreqKVConfig(N)
    with freqkv.patch(model, window=N + 5, recent_tokens=2):
        assert handle.config == FreqKVConfig(N + 5, recent_tokens=2)
        with freqkv.patch(model):
            assert handle.config is None
        assert handle.config == FreqKVConfig(N + 5, recent_tokens=2)
    assert handle.config == FreqKVConfig(N)
    handle.unpatch()
    with pytest.raises(RuntimeError, match="inside"), freqkv.patch(model):
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match="not patched"):
        handle.unpatch()


def test_forwards_that_others_wrapped_before_or_after_are_kept():
    """As accelerate's hooks do: the forward before theirs is kept on the instance under another name."""
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    calls = []

    def wrapped(forward, name):
        @functools.wraps(forward)
        def call(*args, **kwargs):
            calls.append(name)
            return forward(*args, **kwargs)

        return call

    before = wrapped(attention.forward, "before")
    attention.forward = before
    freqkv.patch(model)
    attention._old_forward = attention.forward
    attention.forward = wrapped(lambda *args, **kwargs: attention._old_forward(*args, **kwargs), "after")
    with torch.no_grad():
        calls.clear()
        model(tokens(3 * N), **{CACHE: FreqKVCache(model.config, window=N)})
        assert set(calls) == {"before", "after"}
        freqkv.unpatch(model)
        calls.clear()
        assert attention._old_forward is before
        model(tokens(5))
        assert set(calls) == {"before", "after"}


class Wrapped(torch.nn.Module):
    """Forwards what it does not have to the model inside, as PEFT does."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


@pytest.mark.parametrize("way", ["wrapper", "part first", "part taken off"])
def test_generate_uses_the_numbers_however_the_model_was_patched(way):
    model = tiny_llama()
    if way == "wrapper":
        freqkv.patch(Wrapped(model), window=N)
        output = Wrapped(model).generate(tokens(5), max_new_tokens=2, return_dict_in_generate=True)
    else:
        if way == "part first":
            freqkv.patch(model.model, window=N)
        else:
            freqkv.patch(model, window=N)
            freqkv.unpatch(model.model)
            assert isinstance(
                model.generate(tokens(5), max_new_tokens=2, return_dict_in_generate=True)[CACHE], DynamicCache
            )
        freqkv.patch(model, window=N)
        output = model.generate(tokens(5), max_new_tokens=2, return_dict_in_generate=True)
    assert isinstance(output[CACHE], FreqKVCache)
    freqkv.unpatch(model)
    fresh = instance_state(tiny_llama())
    assert all(state.keys() == fresh[name].keys() for name, state in instance_state(model).items())


def test_a_wrapper_that_somebody_kept_does_nothing_once_unpatched():
    model = tiny_llama()
    expected = plain_outputs(model)
    freqkv.patch(model, window=N)
    for module in (model.model, model.model.layers[0].self_attn):
        kept = module.forward
        module.forward = functools.wraps(kept)(lambda *args, kept=kept, **kwargs: kept(*args, **kwargs))
    freqkv.unpatch(model)
    for a, b in zip(expected, plain_outputs(model), strict=True):
        assert torch.equal(a, b)


def test_a_handle_can_be_entered_again_and_left_early():
    model = tiny_llama()
    handle = freqkv.patch(model, window=N)
    for _ in range(2):
        with handle:
            assert isinstance(model(tokens(3))[CACHE], FreqKVCache)
        assert isinstance(model(tokens(3))[CACHE], DynamicCache)
    assert handle.config is None
    with handle:
        freqkv.unpatch(model)
    with pytest.raises(ValueError, match="not patched"):
        handle.unpatch()


@torch.no_grad()
def test_tables_follow_the_model():
    """`model.bfloat16()` and a new rotary module change what slots mean; below the window nothing may differ."""
    model = tiny_llama()
    freqkv.patch(model)
    ids = tokens(N)
    model(ids, **{CACHE: FreqKVCache(model.config, window=N)})
    model.bfloat16()
    plain = model(ids, **{CACHE: DynamicCache(config=model.config)}).logits
    assert torch.equal(model(ids, **{CACHE: FreqKVCache(model.config, window=N)}).logits, plain)
    model.model.rotary_emb = tiny_llama(rope="linear").model.rotary_emb
    other = model(ids, **{CACHE: DynamicCache(config=model.config)}).logits
    assert not torch.equal(other, plain)
    assert torch.equal(model(ids, **{CACHE: FreqKVCache(model.config, window=N)}).logits, other)


def assigned(rotary):
    rotary.inv_freq = torch.nn.Buffer(rotary.inv_freq / 4, persistent=False)


def in_place(rotary):
    rotary.inv_freq /= 4


def original_lost(rotary):
    """As a loader leaves it that fills in `inv_freq` of a model from the meta device, but not its copy."""
    rotary.original_inv_freq.zero_()


def both_changed(rotary):
    rotary.inv_freq /= 4
    rotary.original_inv_freq /= 4


def scaled(rotary):
    rotary.attention_scaling = 1.3


def other_forward(rotary):
    forward = rotary.forward
    rotary.forward = lambda x, position_ids: forward(x, position_ids / 4)


def emptied_and_filled_in(rotary):
    """`to_empty` in place of weights that were on the meta device, then what transformers computes for it again."""
    inv_freq = rotary.inv_freq.clone()
    rotary.to("meta").to_empty(device="cpu")
    rotary.original_inv_freq.fill_(float("nan"))
    rotary.inv_freq.copy_(inv_freq)


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("when", ["before the patch", "after its first use"])
@pytest.mark.parametrize("rope", ["default", "linear", "yarn"])
@pytest.mark.parametrize(
    "change", [assigned, in_place, original_lost, both_changed, scaled, other_forward, emptied_and_filled_in]
)
@torch.no_grad()
def test_tables_are_what_the_rotary_module_returns_now(change, rope, when, numbers):
    model, ids = tiny_llama(rope=rope), tokens(N)

    def cached():
        return {} if numbers else {CACHE: FreqKVCache(model.config, window=N)}

    if when == "after its first use":
        freqkv.patch(model, **({"window": N} if numbers else {}))
        before = model(ids, **cached()).logits
    change(model.model.rotary_emb)
    freqkv.patch(model, **({"window": N} if numbers else {}))
    plain = model(ids, **{CACHE: DynamicCache(config=model.config)}).logits
    assert torch.equal(model(ids, **cached()).logits, plain)
    if when == "after its first use" and change not in (original_lost, emptied_and_filled_in):
        assert not torch.allclose(plain, before, atol=1e-3)
    assert model(tokens(3 * N), **cached()).logits.isfinite().all()


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
@torch.no_grad()
def test_tables_of_frequencies_that_change_with_the_length_are_made_once(rope):
    """The module changes them itself at a call with another length, which must not count as a change."""
    model = tiny_llama(rope=rope)
    handle = freqkv.patch(model)
    cache = FreqKVCache(model.config, window=N)
    model(tokens(5), **{CACHE: cache})
    tables = {id(table) for _, table in handle._state.tables._tables.values()}
    for length in (1, 300, 1):
        model.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])
        model(tokens(2 * N), **{CACHE: cache})
    assert {id(table) for _, table in handle._state.tables._tables.values()} == tables


@torch.no_grad()
def test_tables_of_old_windows_are_let_go():
    model = tiny_llama()
    shared = freqkv.patch(model)._state.tables
    caches = {window: FreqKVCache(model.config, window=window) for window in range(8, 40)}
    for window, cache in caches.items():
        model(tokens(2 * window), **{CACHE: cache})
        assert len(shared._tables) <= freqkv.patching.tables.WINDOWS_KEPT
        assert len(shared._rotations) <= freqkv.patching.tables.WINDOWS_KEPT
    for window in (8, 39, 8):
        whole = FreqKVCache(model.config, window=window)
        expected = model(torch.cat([tokens(2 * window), tokens(3)], 1), **{CACHE: whole}).logits[:, -3:]
        cache = copy.deepcopy(caches[window])
        assert torch.allclose(model(tokens(3), **{CACHE: cache}).logits, expected, atol=1e-4)


def test_threads_with_a_cache_each():
    model = tiny_llama()
    freqkv.patch(model)
    prompts = [tokens(10 + 13 * i, seed=i) for i in range(4)]

    def generate(ids):
        cache = FreqKVCache(model.config, window=N)
        return model.generate(ids, **{CACHE: cache}, max_new_tokens=40, do_sample=False)

    expected = [generate(ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        for output, truth in zip(pool.map(generate, prompts), expected, strict=True):
            assert torch.equal(output, truth)


def test_the_handle_tells_how_each_layer_caches():
    text = repr(freqkv.patch(tiny_llama(layers=3)))
    assert "LlamaForCausalLM, calls with a FreqKVCache" in text
    assert "layer 2: model.layers.2.self_attn, keys rotated in 16 channels, half pairing" in text


def test_signatures_stay():
    model = tiny_llama()
    before = inspect.signature(model.model.forward), inspect.signature(model.model.layers[0].self_attn.forward)
    freqkv.patch(model)
    after = inspect.signature(model.model.forward), inspect.signature(model.model.layers[0].self_attn.forward)
    assert before == after


def test_positional_arguments():
    model = tiny_llama()
    freqkv.patch(model, window=N)
    ids = tokens(3 * N)
    with torch.no_grad():
        by_name = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
        by_place = model.model(ids, torch.ones_like(ids), None, None, None, False)[0]
    assert torch.equal(by_name, by_place)


@torch.no_grad()
def test_copies_of_a_patched_model_stand_alone():
    model = tiny_llama()
    freqkv.patch(model, window=N)
    ids = tokens(3 * N)
    expected = model(ids, use_cache=False).logits
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copied, loaded):
        assert torch.equal(twin(ids, use_cache=False).logits, expected)
        twin.model.layers[0].self_attn.q_proj.weight.zero_()
        assert not torch.equal(twin(ids, use_cache=False).logits, expected)
        assert torch.equal(model(ids, use_cache=False).logits, expected)
        freqkv.unpatch(twin)
    assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_a_saved_model_is_an_unpatched_one(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "plain")
    freqkv.patch(model, window=N)
    model.save_pretrained(tmp_path / "patched")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "patched" / file.name).read_bytes()
    freqkv.patch(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "patched"))


def test_window_beyond_the_context_warns_once(caplog):
    model = tiny_llama(context=77)
    with caplog.at_level(logging.WARNING, logger="freqkv"):
        FreqKVCache(model.config, window=78)
        FreqKVCache(model.config, window=78)
        freqkv.patch(model, window=78)
        FreqKVCache(model.config, window=77)
    assert [record.getMessage() for record in caplog.records] == [
        "window=78 is larger than the model's context length of 77 tokens: slots from 77 on are positions the model was "
        "not trained on, and quality there is what its RoPE extrapolation gives. Pass window=77 or less to stay inside."
    ]


def test_frequencies_of_long_sequences_warn_once(caplog):
    with caplog.at_level(logging.WARNING, logger="freqkv"):
        for _ in range(2):
            FreqKVCache(tiny_llama(rope="longrope").config)
        FreqKVCache(tiny_llama(rope="longrope").config, window=64)
        FreqKVCache(tiny_llama(rope="yarn").config)
    assert [record.getMessage()[:62] for record in caplog.records if record.name.startswith("freqkv")] == [
        "this model's RoPE (longrope) has other frequencies for sequenc"
    ]


def test_the_window_is_the_context_length_by_default():
    model = tiny_llama(context=77)
    assert FreqKVCache(model.config).config == FreqKVConfig(77)
    assert freqkv.patch(model, FreqKVConfig()).config == FreqKVConfig(77)
    config = copy.copy(model.config)
    config.max_position_embeddings = 0
    with pytest.raises(ValueError, match=r"does not tell its context length .* pass window="):
        FreqKVCache(config)


def test_a_cache_tells_its_state():
    model = tiny_llama()
    freqkv.patch(model)
    cache = FreqKVCache(model.config, window=N, recent_tokens=3)
    assert (cache.tokens_seen, cache.entries, cache.compressions, cache.nbytes) == (0, 0, 0, 0)
    with torch.no_grad():
        model(tokens(3 * N), **{CACHE: cache})
    size = 2 * 2 * N * 2 * 16 * 4
    assert (cache.tokens_seen, cache.compressions, cache.nbytes) == (69, 6, size)
    assert repr(cache) == (
        "FreqKVCache(window=23, sink_tokens=4, retain_ratio=0.5, recent_tokens=3, compressor=low_pass_entries: 2 layers, "
        f"69 tokens seen, 21/23 entries held, 6 compressions, {size} bytes of float32 on cpu)"
    )
    assert repr(cache.layers[0]) == "FreqKVLayer(21/23 entries, 69 tokens seen)"
    assert "compressor=low_pass_entries, static=True: " in repr(FreqKVCache(model.config, window=N, static=True))
    with pytest.raises(TypeError, match="static must be True or False, got 'yes'"):
        FreqKVCache(model.config, window=N, static="yes")
    assert "compressor=keep_recent)" in repr(freqkv.patch(model, window=N, compressor=freqkv.keep_recent))
    freqkv.patch(model)
    assert len(cache) == 2
    assert cache.get_mask_sizes(1, 0) == (22, 48)
    assert cache.get_max_length() == -1
    cache.reset()
    assert (cache.tokens_seen, cache.entries, cache.nbytes) == (0, 0, size)


# Refusals


def test_an_unpatched_model_is_refused():
    model = tiny_llama()
    cache = FreqKVCache(model.config, window=N)
    with pytest.raises(RuntimeError, match=r"patched model only: call freqkv.patch\(model\)"):
        model.generate(tokens(5), **{CACHE: cache}, max_new_tokens=2)
    freqkv.patch(model)
    model.generate(tokens(5), **{CACHE: cache}, max_new_tokens=2)


TINY = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
NOT_ROTARY = {
    "gpt2": transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, **TINY),
    "bloom": transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, **TINY),
    "mpt": transformers.MptConfig(d_model=16, n_layers=1, n_heads=2, **TINY),
    "opt": transformers.OPTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=16, **TINY
    ),
}


@pytest.mark.parametrize("family", NOT_ROTARY)
def test_models_without_rope_are_refused(family):
    model = transformers.AutoModelForCausalLM.from_config(NOT_ROTARY[family])
    before = instance_state(model)
    with pytest.raises(
        freqkv.UnsupportedModelError, match=rf"model type '{family}'\) has no rotary .* Use transformers' DynamicCache"
    ):
        freqkv.patch(model)
    assert all(before[name].keys() == state.keys() for name, state in instance_state(model).items())


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, **TINY
    )
    with pytest.raises(freqkv.UnsupportedModelError, match=r"'t5'.* is an encoder-decoder"):
        freqkv.patch(transformers.T5ForConditionalGeneration(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rotation_does_not_explain_is_refused_in_any_dtype(dtype, monkeypatch):
    """HunYuan norms keys after RoPE; here nobody says so."""
    monkeypatch.delitem(FAMILY_RULES, "hunyuan_v1_dense")
    config = transformers.HunYuanDenseV1Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, **TINY,
    )  # fmt: skip
    model = transformers.HunYuanDenseV1ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "key_layernorm" in name:
                weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(freqkv.UnsupportedModelError, match=r"rotates what model.layers.0.self_attn caches in a way"):
        freqkv.patch(model.to(dtype))


def test_attention_functions_without_masks_are_refused():
    model = tiny_llama(attention="sdpa")
    freqkv.patch(model)
    transformers.AttentionInterface.register("mine", transformers.AttentionInterface()["sdpa"])
    model.config._attn_implementation = "mine"
    cache = FreqKVCache(model.config, window=N)
    with pytest.raises(ValueError, match="attn_implementation='mine' has no mask function"):
        model(tokens(5), **{CACHE: cache})
    model.config._attn_implementation = "sdpa"
    model(tokens(5), **{CACHE: cache})


def test_models_whose_every_layer_slides_are_refused():
    config = transformers.MistralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        sliding_window=8, **TINY,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config)
    with pytest.raises(
        freqkv.UnsupportedModelError, match=r"MistralConfig has no full attention layer .DynamicSlidingWindowLayer."
    ):
        freqkv.patch(model)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"layers": 3}, "number of layers 3, this model has 2"),
        ({"kv_heads": 1}, "number of KV heads 1, this model has 2"),
        ({"head_dim": 8}, "head size 8, this model has 16"),
        ({"context": 128}, "context length 128, this model has 256"),
        ({"rope": "linear"}, "RoPE parameters .*linear.* this model has .*default"),
    ],
)
def test_a_cache_of_another_model_is_refused(other, message):
    model = tiny_llama()
    freqkv.patch(model)
    with pytest.raises(ValueError, match=message):
        model(tokens(5), **{CACHE: FreqKVCache(tiny_llama(**other).config, window=N)})


def test_a_cache_filled_in_another_dtype_or_batch_is_refused_and_unharmed():
    model = tiny_llama()
    freqkv.patch(model)
    cache = FreqKVCache(model.config, window=N)
    with torch.no_grad():
        model(tokens(2 * N), **{CACHE: cache})
        expected = model(tokens(4), **{CACHE: copy.deepcopy(cache)}).logits
        with pytest.raises(ValueError, match="holds 1 rows, the input has 2"):
            model(tokens(5, batch=2), **{CACHE: cache})
        with pytest.raises(ValueError, match=r"dtype torch.float32, the model brings dtype torch.bfloat16"):
            copy.deepcopy(model).bfloat16()(tokens(5), **{CACHE: cache})
        assert torch.equal(model(tokens(4), **{CACHE: cache}).logits, expected)
        meta = copy.deepcopy(cache)
        for layer in meta.layers:
            layer.buffers.take(lambda tensor: tensor.to("meta"))
        with pytest.raises(ValueError, match="device meta, the model brings device cpu"):
            model(tokens(5), **{CACHE: meta})


@pytest.mark.parametrize("with_cache", [True, False])
def test_arguments_that_freqkv_cannot_serve(with_cache):
    model = tiny_llama()
    freqkv.patch(model, window=N)
    ids = tokens(30, batch=2)
    cache = FreqKVCache(model.config, window=N) if with_cache else None
    call = {CACHE: cache, "use_cache": with_cache}
    packed = torch.cat([torch.arange(10), torch.arange(20)])[None]
    with pytest.raises(ValueError, match="packed sequences"):
        model(ids, position_ids=packed, **call)
    with pytest.raises(ValueError, match="must count the tokens of each row"):
        model(ids, position_ids=2 * torch.arange(30)[None], **call)
    with pytest.raises(ValueError, match=r"packed sequences \(cu_seq_lens_q\)"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 10, 30]), **call)
    with pytest.raises(ValueError, match="custom 4-D attention_mask"):
        model(ids, attention_mask=torch.ones(2, 1, 30, 30), **call)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\), but there are 2 rows of 0 tokens"):
        model(ids, attention_mask=torch.ones(1, 3), **call)
    with pytest.raises(ValueError, match=r"no new tokens, the cache has seen 0: generate takes the whole conversation"):
        model(ids[:, :0], **call)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(**call)
    assert cache is None or cache.tokens_seen == 0
    model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(30)[None], **call)
    if cache is not None:
        with pytest.raises(ValueError, match="contradict each other"):
            model(ids, **{CACHE: cache}, use_cache=False)
        late = torch.ones(2, 60)
        late[0, 2] = 0
        with pytest.raises(ValueError, match="only the last tokens of a row can be hidden"):
            model(ids, attention_mask=late, **{CACHE: cache})


def test_entry_points_share_one_config():
    model = tiny_llama()
    for entry in (
        lambda *args, **numbers: FreqKVCache(model.config, *args, **numbers),
        lambda *args, **numbers: freqkv.patch(model, *args, **numbers),
    ):
        with pytest.raises(TypeError, match=r"pass numbers by name, for example window=64"):
            entry(64)
        with pytest.raises(ValueError, match="not both: window"):
            entry(FreqKVConfig(64), window=32)
        with pytest.raises(ValueError, match="must be at most 6"):
            entry(window=8, sink_tokens=7)
        with pytest.raises(TypeError, match="unexpected keyword"):
            entry(windows=8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """Gives the gradients of a run without it; a cache, which it would drop, is refused."""
    model = tiny_llama().train()
    ids = tokens(2 * N)
    weights = model.lm_head.weight, model.model.layers[0].self_attn.k_proj.weight

    def gradients(**call):
        model.zero_grad()
        model(ids, **call).logits.square().mean().backward()
        return [weight.grad.clone() for weight in weights]

    plain = gradients(use_cache=False)
    freqkv.patch(model, window=N)
    expected = gradients(use_cache=False)
    assert not torch.allclose(expected[1], plain[1], rtol=0.1)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for call in ({"use_cache": False}, {}):
        for grad, truth in zip(gradients(**call), expected, strict=True):
            assert torch.allclose(grad, truth, atol=1e-5 * truth.abs().max())
    with pytest.raises(ValueError, match="DynamicCache, which gradient checkpointing drops"):
        gradients(**{CACHE: DynamicCache(config=model.config)})
    for numbers in ({"window": N}, {}):
        freqkv.patch(model, **numbers)
        with pytest.raises(RuntimeError, match="gradient checkpointing drops caches"):
            model(ids, **{CACHE: FreqKVCache(model.config, window=N)})


@torch.no_grad()
def test_a_mask_of_the_callers_own_below_the_window():
    """Nothing is compressed there, so that its columns are entries; here each token sees every other one before it."""
    model, plain, ids = tiny_llama(), tiny_llama(), tokens(N - 2, 2)
    freqkv.patch(model)
    length = ids.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & (
        torch.arange(length) % 2 == torch.arange(length)[:, None] % 2
    )
    mask = torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    for each in (mask, mask.expand(2, 1, -1, -1)):
        caches = DynamicCache(config=model.config), FreqKVCache(model.config, window=N)
        assert torch.equal(
            *(m(ids, attention_mask=each, **{CACHE: c}).logits for m, c in zip((plain, model), caches, strict=True))
        )
        assert not torch.allclose(plain(ids).logits, plain(ids, attention_mask=each).logits)
        more = tokens(1, 2)
        assert torch.equal(*(m(more, **{CACHE: c}).logits for m, c in zip((plain, model), caches, strict=True)))
        with pytest.raises(ValueError, match="tokens in the cache already"):
            model(more, attention_mask=torch.zeros(1, 1, 1, N), **{CACHE: caches[1]})
        assert caches[1].tokens_seen == N - 1
    with freqkv.patch(model, window=N):
        for use_cache in (True, False):
            expected = plain(ids, attention_mask=mask).logits
            assert torch.equal(model(ids, attention_mask=mask, use_cache=use_cache).logits, expected)
            with pytest.raises(ValueError, match=rf"{N + 1} tokens do not fit the window of {N} entries"):
                model(tokens(N + 1), attention_mask=torch.zeros(1, 1, N + 1, N + 1), use_cache=use_cache)
            with pytest.raises(ValueError, match="it has shape"):
                model(ids, attention_mask=mask[..., 1:], use_cache=use_cache)
    sliding = zoo.tiny_model("gemma3_text")
    freqkv.patch(sliding)
    with pytest.raises(ValueError, match="other layers than full attention"):
        sliding(ids, attention_mask=mask, **{CACHE: FreqKVCache(sliding.config, window=N)})


@torch.no_grad()
def test_a_cache_that_is_asked_for_in_training_is_made():
    """By those who sample while they train, in a loop of their own."""
    model, plain, ids = tiny_llama().train(), tiny_llama().train(), tokens(5)
    freqkv.patch(model, window=N)
    caches = [None, None]
    for _ in range(3 * N):
        outputs = [m(ids, **{CACHE: cache}, use_cache=True) for m, cache in zip((model, plain), caches, strict=True)]
        caches = [output[CACHE] for output in outputs]
        assert isinstance(caches[0], FreqKVCache)
        if caches[0].tokens_seen <= N:
            assert torch.equal(*(output.logits for output in outputs))
        ids = outputs[0].logits[:, -1:].argmax(-1)
    assert caches[0].compressions > 1


@pytest.mark.parametrize("gradients", [True, False])
def test_checkpointing_and_caches(gradients):
    """Checkpointed layers get no cache; from 5.24 on those that compute no gradients are not checkpointed."""
    model = tiny_llama().train()
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    freqkv.patch(model, window=N)
    cache = FreqKVCache(model.config, window=N)
    with torch.set_grad_enabled(gradients):
        if gradients or not CHECKPOINTS_WITH_GRADIENTS_ONLY:
            with pytest.raises(RuntimeError, match="gradient checkpointing drops caches"):
                model(tokens(2 * N), **{CACHE: cache})
            assert cache.tokens_seen == 0
        else:
            model(tokens(2 * N), **{CACHE: cache})
            assert cache.tokens_seen == 2 * N


def test_generate_while_training_with_checkpointing():
    """Where no cache would reach the layers, the whole text is fed at each step, as unpatched; the method is the same."""
    model, options = tiny_llama(), {"max_new_tokens": 2 * N, "do_sample": False}
    plain = model.generate(tokens(5), **options)
    freqkv.patch(model, window=4 * N)
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    assert torch.equal(model.train().generate(tokens(5), **options), plain)
    freqkv.patch(model, window=N)
    answer = model.generate(tokens(5), **options)
    assert torch.equal(answer, model.eval().generate(tokens(5), **options))
    assert not torch.equal(answer, plain)


def test_right_padded_prompts_of_generate_are_refused_by_their_name():
    """Without a cache, transformers counts the positions of what it generates wrongly behind them."""
    model = tiny_llama()
    freqkv.patch(model, window=3 * N)
    ids, mask = tokens(9, 2), torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    with pytest.raises(ValueError, match="padding_side='left'"):
        model.generate(ids, attention_mask=mask, max_new_tokens=4, use_cache=False)


def test_a_forward_in_training_makes_no_cache():
    model = tiny_llama().train()
    freqkv.patch(model, window=N)
    assert model(tokens(2 * N)).get(CACHE) is None
    assert isinstance(model.eval()(tokens(2 * N))[CACHE], FreqKVCache)


def test_a_compressor_that_returns_the_wrong_shape_is_named():
    model = tiny_llama()
    freqkv.patch(model)

    def keep_all(keys, values, keep):
        return keys, values

    with pytest.raises(TypeError, match=r"compressor is a function .* got 'mean'"):
        FreqKVCache(model.config, window=N, compressor="mean")
    with pytest.raises(TypeError, match=r"compressor is a function .* got 'mean'"):
        freqkv.patch(model, window=N, compressor="mean")
    with pytest.raises(TypeError, match=r"pass model.config .* not a LlamaForCausalLM"):
        FreqKVCache(model)
    lone = FreqKVCache(model.config, window=N, compressor=lambda keys, values, keep: keys[:, :, :keep])
    with torch.no_grad(), pytest.raises(TypeError, match=r"must return \(keys, values\)"):
        model(tokens(2 * N), **{CACHE: lone})
    cache = FreqKVCache(model.config, window=N, compressor=keep_all)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"compressor keep_all returned keys of shape \(1, 2, 19, 16\)"),
    ):
        model(tokens(2 * N), **{CACHE: cache})


@pytest.mark.parametrize("where", ["first layer", "last layer", "after the layers", "inside update"])
def test_an_interrupted_forward_spends_the_cache(where):
    model = tiny_llama()
    freqkv.patch(model)
    cache = FreqKVCache(model.config, window=N)
    ids = tokens(3 * N + 2)
    with torch.no_grad():
        model(ids[:, :N], **{CACHE: cache})

        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        if where == "inside update":
            cache.layers[1].compressor = interrupt
        target = {
            "first layer": model.model.layers[0].mlp,
            "last layer": model.model.layers[1].mlp,
            "after the layers": model.model.norm,
            "inside update": model.lm_head,
        }[where]
        hook = target.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, N:], **{CACHE: cache})
        hook.remove()
        cache.layers[1].compressor = freqkv.low_pass_entries
        assert "spent: call reset()" in repr(cache)
        with pytest.raises(RuntimeError, match=r"interrupted half-way .* Call cache.reset\(\)"):
            model(ids[:, N:], **{CACHE: cache})
        cache.reset()
        again = model(ids, **{CACHE: cache}).logits
        assert torch.equal(again, model(ids, **{CACHE: FreqKVCache(model.config, window=N)}).logits)


def test_an_error_before_any_token_entered_leaves_the_cache_as_it_was():
    model = tiny_llama()
    freqkv.patch(model)
    cache = FreqKVCache(model.config, window=N)
    ids = tokens(3 * N)
    with torch.no_grad():
        model(ids[:, : 2 * N], **{CACHE: cache})
        with pytest.raises(IndexError):
            model(ids[:, 2 * N :] + 1000, **{CACHE: cache})
        logits = model(ids[:, 2 * N :], **{CACHE: cache}).logits
        whole = model(ids, **{CACHE: FreqKVCache(model.config, window=N)}).logits
    assert torch.allclose(logits, whole[:, 2 * N :], atol=1e-4)


def test_a_cache_is_copied_whole():
    model = tiny_llama()
    freqkv.patch(model)
    cache = FreqKVCache(model.config, window=N)
    with torch.no_grad():
        model(tokens(2 * N), **{CACHE: cache})
        branch = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
        one = model(tokens(N, seed=3), **{CACHE: cache}).logits
        two = model(tokens(N, seed=3), **{CACHE: branch}).logits
    assert torch.equal(one, two)


@torch.no_grad()
def test_another_rotary_module_is_noticed():
    """Also one that calls its buffers otherwise."""

    class Other(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.register_buffer("angles", 2 * base.inv_freq)

        def forward(self, x, position_ids):
            angles = position_ids[..., None].float() * torch.cat([self.angles, self.angles])
            return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    model = tiny_llama(attention="sdpa")
    freqkv.patch(model)
    ids = tokens(20)
    before = model(ids, **{CACHE: FreqKVCache(model.config, window=32)}).logits
    model.model.rotary_emb = Other(model.model.rotary_emb)
    after = model(ids, **{CACHE: FreqKVCache(model.config, window=32)}).logits
    freqkv.unpatch(model)
    assert torch.equal(after, model(ids, **{CACHE: DynamicCache(config=model.config)}).logits)
    assert not torch.allclose(after, before, atol=1e-2)


@torch.no_grad()
def test_layers_may_attend_in_different_ways():
    """Each gets the mask that its own implementation takes, also where it was chosen after the patch."""
    model = tiny_llama(attention="sdpa")
    freqkv.patch(model)
    ids = tokens(90)
    expected = model(ids, **{CACHE: FreqKVCache(model.config, window=32)}).logits
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    model.model.layers[1].self_attn.config = config
    got = model(ids, **{CACHE: FreqKVCache(model.config, window=32)}).logits
    assert torch.allclose(got, expected, atol=1e-4)
