"""A conversation is a file of fixed size, and goes on from it bit for bit."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_llama, tokens
from safetensors import safe_open
from transformers.cache_utils import DynamicSlidingWindowLayer

import freqkv
from freqkv import CacheFileError, FreqKVCache, FreqKVConfig, UnsupportedModelError, files
from freqkv.files import METADATA_KEY
from freqkv.layer import FreqKVLayer
from freqkv.models.upstream import CACHE

N = 23
CONFIG = FreqKVConfig(window=N, sink_tokens=3, recent_tokens=2)


def patched(attention="eager", **settings):
    model = tiny_llama(attention=attention, **settings)
    freqkv.patch(model)
    return model


MODEL = patched()


@torch.no_grad()
def fed(model, length, batch=1, cache=None, seed=1):
    cache = FreqKVCache(model.config, CONFIG) if cache is None else cache
    model(tokens(length, batch, seed).clamp(max=99), **{CACHE: cache})
    return cache


def reloaded(cache, model, folder, **options):
    path = Path(folder) / "conversation.safetensors"
    cache.save(path, model)
    return FreqKVCache.load(path, model, **options)


def same_contents(one, two, model, folder):
    files = [Path(folder) / name for name in ("one", "two")]
    for cache, file in zip((one, two), files, strict=True):
        cache.save(file, model)
    return files[0].read_bytes() == files[1].read_bytes()


@torch.no_grad()
def assert_go_on_alike(model, one, two, folder, masks=(None,) * 4, batch=1):
    """Over a compression, in one call and token by token."""
    for turn, (length, mask) in enumerate(zip((1, 1, N, 3), masks, strict=True)):
        ids = tokens(length, batch, seed=100 + turn).clamp(min=3, max=99)
        logits = [model(ids, attention_mask=mask, **{CACHE: cache}).logits for cache in (one, two)]
        assert torch.equal(*logits), turn
    assert one.tokens_seen == two.tokens_seen
    assert same_contents(one, two, model, folder)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "conversation.safetensors"
    fed(MODEL, 2 * N + 3).save(path, MODEL)
    return path


# What other versions stored.


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon_h1"])
@torch.no_grad()
def test_a_file_that_version_0_1_0_saved_goes_on(name):
    """With transformers 5.23: 49 tokens of two rows; and what they answered to 30 more."""
    model = tiny_llama(attention="eager") if name == "llama" else zoo.tiny_model(name)
    model.set_attn_implementation("eager")
    freqkv.patch(model)
    saved = Path(__file__).parent / "data" / f"saved_by_0_1_0_{name}.safetensors"
    cache = FreqKVCache.load(saved, model)
    assert (cache.tokens_seen, cache.batch_size, cache.config) == (49, 2, CONFIG)
    logits = model(tokens(30, 2, seed=5).clamp(3, 99), **{CACHE: cache}).logits[:, -1]
    expected = safetensors.torch.load_file(saved.with_name(f"{saved.stem}_next.safetensors"))["logits"]
    assert torch.allclose(logits, expected, atol=1e-5 * expected.abs().max())


# What is stored, and that it goes on.


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("length", [1, N, N + 1, 4 * N + 5])
def test_going_on_is_bit_for_bit(attention, length, tmp_path):
    model = patched(attention)
    cache = fed(model, length, batch=2)
    loaded = reloaded(cache, model, tmp_path)
    assert (loaded.tokens_seen, loaded.entries, loaded.config) == (length, cache.entries, CONFIG)
    assert repr(loaded) == repr(cache)
    assert_go_on_alike(model, cache, loaded, tmp_path, batch=2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_ragged_rows(attention, tmp_path):
    model = patched(attention)
    lengths = [1, 7, N, 3 * N + 5]
    mask = (torch.arange(lengths[-1]) >= lengths[-1] - torch.tensor(lengths)[:, None]).long()
    cache = FreqKVCache(model.config, CONFIG)
    model(tokens(lengths[-1], 4), attention_mask=mask, **{CACHE: cache})
    # rows that end at different places, so that there is padding beyond that of the longest row
    new = torch.tensor([[1, 1], [1, 1], [0, 1], [1, 0]])
    mask = torch.cat([mask, new], 1)
    model(tokens(2, 4, seed=7), attention_mask=mask, **{CACHE: cache})
    loaded = reloaded(cache, model, tmp_path)
    assert loaded.row_tokens == cache.row_tokens == [3, 9, N + 1, 3 * N + 6]
    assert loaded.tokens_seen == cache.tokens_seen == 3 * N + 7
    with pytest.raises(RuntimeError, match="which tokens were padding"):
        copy.deepcopy(loaded).crop(-1)
    copy.deepcopy(loaded).crop(0)
    masks = [torch.cat([mask, torch.ones(4, n, dtype=torch.long)], 1) for n in (1, 2, N + 2, N + 5)]
    assert_go_on_alike(model, cache, loaded, tmp_path, masks, batch=4)


@torch.no_grad()
def test_rows_that_became_equal(tmp_path):
    """After padding, all rows have as many tokens, which are fewer than the cache has seen."""
    cache = FreqKVCache(MODEL.config, CONFIG)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    MODEL(tokens(4, 2), attention_mask=mask, **{CACHE: cache})
    loaded = reloaded(cache, MODEL, tmp_path)
    assert loaded.row_tokens == [3, 3]
    assert loaded.tokens_seen == 4
    masks = [torch.cat([mask, torch.ones(2, n, dtype=torch.long)], 1) for n in (1, 2, N + 2, N + 5)]
    assert_go_on_alike(MODEL, cache, loaded, tmp_path, masks, batch=2)


FAMILIES = [
    "gemma3_text",
    "gemma3n_text",
    "falcon_h1",
    "qwen3_next",
    "deepseek_v2",
    "lfm2",
    "minimax",
    "zaya",
    "smollm3",
]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layers_of_other_kinds(family, attention, tmp_path):
    """Sliding layers, recurrent and convolution states, those beside attention, MLA, and a family's own list."""
    model = zoo.tiny_model(family)
    model.set_attn_implementation(attention)
    freqkv.patch(model)
    sizes = set()
    cache = FreqKVCache(model.config, CONFIG)
    for length in (2, N - 2, N + 3, 8 * N):
        fed(model, length, 2, cache).save(tmp_path / "file", model)
        sizes.add((tmp_path / "file").stat().st_size)
    assert len(sizes) == 1
    loaded = FreqKVCache.load(tmp_path / "file", model)
    assert type(loaded) is type(cache)
    assert [type(a) for a in loaded.layers] == [type(b) for b in cache.layers]
    assert_go_on_alike(model, cache, loaded, tmp_path, batch=2)


@torch.no_grad()
def test_ragged_rows_beside_sliding_layers(tmp_path):
    model = zoo.tiny_model("gemma3_text")
    freqkv.patch(model)
    mask = torch.ones(2, 2 * N, dtype=torch.long)
    mask[0, : N + 4] = 0
    cache = FreqKVCache(model.config, CONFIG)
    model(tokens(2 * N, 2).clamp(3, 99), attention_mask=mask, **{CACHE: cache})
    loaded = reloaded(cache, model, tmp_path)
    masks = [torch.cat([mask, torch.ones(2, n, dtype=torch.long)], 1) for n in (1, 2, N + 2, N + 5)]
    assert_go_on_alike(model, cache, loaded, tmp_path, masks, batch=2)


@torch.no_grad()
def test_cross_attention_layers_keep_what_they_were_shown(tmp_path):
    model = zoo.tiny_model("mllama")
    freqkv.patch(model)
    cache = fed(model, N + 3)
    (index,) = [i for i, layer in enumerate(cache.layers) if type(layer).__name__ == "DynamicLayer"][:1]
    keys = torch.randn(1, 2, 9, 16)
    cache.layers[index].update(keys, keys)
    layer = reloaded(cache, model, tmp_path).layers[index]
    assert torch.equal(layer.keys, keys)
    assert torch.equal(layer.values, keys)


@given(
    before=st.lists(st.integers(1, 2 * N), max_size=4),
    after=st.lists(st.integers(1, N + 3), min_size=1, max_size=3),
    attention=st.sampled_from(["eager", "sdpa"]),
    numbers=st.sampled_from([{}, {"window": N + 4}]),
)
@torch.no_grad()
def test_saving_anywhere_changes_nothing(tmp_path_factory, before, after, attention, numbers):
    """Any number of tokens before and after, in any calls; also in a model patched with other numbers."""
    model = SHARED[attention]
    folder = tmp_path_factory.mktemp("anywhere")
    ids = tokens(sum(before) + sum(after))
    plain, cache = (FreqKVCache(model.config, CONFIG) for _ in range(2))
    with freqkv.patch(model, **numbers):
        start = 0
        for place, length in enumerate([*before, *after]):
            if place == len(before):
                cache = reloaded(cache, model, folder)
                assert cache.tokens_seen == sum(before)
            call = ids[:, start : start + length]
            assert torch.equal(*(model(call, **{CACHE: each}).logits for each in (plain, cache)))
            start += length
        assert same_contents(plain, cache, model, folder)


SHARED = {name: patched(name) for name in ("eager", "sdpa")}


@pytest.mark.parametrize("batch", [1, 3])
def test_files_of_one_size(batch, tmp_path):
    sizes = {}
    for length in (1, N, 2 * N + 3, 10 * N, 100 * N):
        cache = fed(MODEL, length, batch)
        cache.save(tmp_path / "file", MODEL)
        sizes[length] = (tmp_path / "file").stat().st_size
    assert len(set(sizes.values())) == 1
    assert sizes[N] < cache.nbytes + 3000


def test_ragged_rows_have_files_of_that_size_too(tmp_path):
    fed(MODEL, N, 3).save(tmp_path / "even", MODEL)
    cache = FreqKVCache(MODEL.config, CONFIG)
    mask = torch.ones(3, 3 * N, dtype=torch.long)
    mask[0, : 2 * N] = mask[1, :5] = 0
    with torch.no_grad():
        MODEL(tokens(3 * N, 3), attention_mask=mask, **{CACHE: cache})
    cache.save(tmp_path / "ragged", MODEL)
    assert (tmp_path / "even").stat().st_size == (tmp_path / "ragged").stat().st_size


@torch.no_grad()
def test_only_entries_in_use_are_stored(tmp_path):
    """Not what a crop took back, and the same state gives the same bytes."""
    cache, straight = fed(MODEL, N - 5), fed(MODEL, N - 5)
    MODEL(tokens(4, seed=9), **{CACHE: cache})
    cache.crop(-4)
    assert same_contents(cache, straight, MODEL, tmp_path)
    with safe_open(tmp_path / "one", "pt") as file:
        names = set(file.keys())
        keys = file.get_tensor("0.keys")
    assert names == {f"{i}.{name}" for i in range(2) for name in ("keys", "values")}
    assert keys.shape == (1, 2, N, 16)
    assert keys[:, :, : N - 5].any()
    assert not keys[:, :, N - 5 :].any()


def test_an_empty_cache(tmp_path):
    fresh = reloaded(FreqKVCache(MODEL.config, CONFIG), MODEL, tmp_path)
    cache = fed(MODEL, N)
    cache.reset()
    emptied = reloaded(cache, MODEL, tmp_path)
    assert fresh.tokens_seen == emptied.tokens_seen == 0
    assert_go_on_alike(MODEL, fresh, emptied, tmp_path)


@torch.no_grad()
def test_a_loaded_cache_does_all_that_others_do(tmp_path):
    cache = fed(MODEL, 2 * N, 2)
    loaded = reloaded(cache, MODEL, tmp_path)
    for each in (cache, loaded):
        fed(MODEL, 2, 2, each).crop(-2)
        each.batch_select_indices(torch.tensor([1]))
    assert_go_on_alike(MODEL, cache, copy.deepcopy(loaded), tmp_path)
    loaded.reset()
    assert_go_on_alike(MODEL, FreqKVCache(MODEL.config, CONFIG), loaded, tmp_path)


@pytest.mark.parametrize("family", ["gemma3_text", "lfm2"])
@torch.no_grad()
def test_what_was_recorded_to_crop_is_left_out(family, tmp_path):
    model = zoo.tiny_model(family)
    freqkv.patch(model)
    cache, plain = (FreqKVCache(model.config, CONFIG) for _ in range(2))
    cache.activate_past_recording()
    for each in (cache, plain):
        fed(model, 2, 1, each)
        fed(model, 2 * N, 1, each, seed=3)
    assert_go_on_alike(model, plain, reloaded(cache, model, tmp_path), tmp_path)


def test_only_new_tokens_after_loading(tmp_path):
    """As the README says: the text of the conversation is not needed. A cache that `generate` made will do, too."""
    options = {"max_new_tokens": N, "do_sample": False}
    prompt, new = tokens(N + 5), tokens(7, seed=5)
    with freqkv.patch(MODEL, CONFIG):
        output = MODEL.generate(prompt, return_dict_in_generate=True, **options)
    cache = output[CACHE]
    turn = torch.cat([output.sequences, new], 1)
    loaded = reloaded(cache, MODEL, tmp_path)
    fresh = turn[:, cache.tokens_seen :]
    mask = fresh.new_ones(turn.shape)
    answer = MODEL.generate(fresh, attention_mask=mask, **{CACHE: loaded}, **options)
    expected = MODEL.generate(turn, **{CACHE: cache}, **options)
    assert torch.equal(answer[:, fresh.shape[1] :], expected[:, turn.shape[1] :])


def test_generate_goes_on(tmp_path):
    options = {"max_new_tokens": 2 * N, "do_sample": False}
    prompt = tokens(N + 5)
    cache = FreqKVCache(MODEL.config, CONFIG)
    first = MODEL.generate(prompt, **{CACHE: cache}, **options)
    turn = torch.cat([first, tokens(7, seed=5)], 1)
    loaded = reloaded(cache, MODEL, tmp_path)
    expected = MODEL.generate(turn, **{CACHE: cache}, **options)
    assert torch.equal(MODEL.generate(turn, **{CACHE: loaded}, **options), expected)


@torch.no_grad()
def test_inference_mode_and_autograd(tmp_path):
    cache = fed(MODEL, N + 3)
    with torch.inference_mode():
        loaded = reloaded(cache, MODEL, tmp_path)
    assert_go_on_alike(MODEL, cache, loaded, tmp_path)
    with torch.enable_grad():
        attached = FreqKVCache(MODEL.config, CONFIG)
        MODEL(tokens(N + 3), **{CACHE: attached})
        loaded = reloaded(attached, MODEL, tmp_path)
    assert not loaded.layers[0].keys.requires_grad
    assert_go_on_alike(MODEL, fed(MODEL, N + 3), loaded, tmp_path)


@torch.no_grad()
def test_bfloat16_and_autocast(tmp_path):
    half = patched(dtype=torch.bfloat16)
    cache = fed(half, N + 3)
    loaded = reloaded(cache, half, tmp_path)
    assert loaded.layers[0].keys.dtype == torch.bfloat16
    assert_go_on_alike(half, cache, loaded, tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = fed(MODEL, N + 3)
        assert_go_on_alike(MODEL, cache, reloaded(cache, MODEL, tmp_path), tmp_path)


def test_compressors(tmp_path):
    def other(keys, values, keep):
        return keys[..., :keep, :], values[..., :keep, :]

    for compressor in (freqkv.keep_recent, freqkv.mean_pool):
        cache = fed(MODEL, N + 2, cache=FreqKVCache(MODEL.config, CONFIG, compressor=compressor))
        loaded = reloaded(cache, MODEL, tmp_path)
        assert loaded.compressor is compressor
        assert_go_on_alike(MODEL, cache, loaded, tmp_path)
        with pytest.raises(CacheFileError, match=f"compressed by {compressor.__name__}, and compressor= is low_pass"):
            reloaded(cache, MODEL, tmp_path, compressor=freqkv.low_pass_entries)
    cache = fed(MODEL, N + 2, cache=FreqKVCache(MODEL.config, CONFIG, compressor=other))
    assert_go_on_alike(MODEL, cache, reloaded(cache, MODEL, tmp_path, compressor=other), tmp_path)
    with pytest.raises(CacheFileError, match=r"compressed by other \(custom\).*pass it as compressor="):
        reloaded(cache, MODEL, tmp_path)
    other.__name__ = "keep_recent"  # is not FreqKV's own for that
    with pytest.raises(CacheFileError, match=r"keep_recent \(custom\)"):
        reloaded(cache, MODEL, tmp_path)
    with pytest.raises(TypeError, match="compressor is a function"):
        reloaded(cache, MODEL, tmp_path, compressor=3)


# Files that do not belong to the model.


def refused(path, model, match):
    with pytest.raises(CacheFileError, match=match) as caught:
        FreqKVCache.load(path, model)
    assert str(path) in str(caught.value)


def test_another_model(saved, tmp_path):
    refused(saved, tiny_llama(seed=1), "has the shape of this model, LlamaForCausalLM, but other weights")
    refused(saved, tiny_llama(rope="linear"), "was filled by LlamaForCausalLM with RoPE parameters")
    refused(saved, tiny_llama(layers=3), "with number of layers 2; this model, LlamaForCausalLM, has 3")
    refused(saved, tiny_llama(heads=2, head_dim=8), "with head size 16")
    refused(saved, tiny_llama(tie_word_embeddings=True), "whose parameters have other names or shapes")
    refused(saved, tiny_llama(dtype=torch.bfloat16), "holds float32 entries, this model works in bfloat16: .*float32")
    refused(saved, zoo.tiny_model("qwen2"), "with model type 'llama'; this model, Qwen2ForCausalLM, has 'qwen2'")
    one_weight = copy.deepcopy(MODEL)
    with torch.no_grad():
        one_weight.model.layers[1].mlp.down_proj.weight += 1e-3
    refused(saved, one_weight, "but other weights")
    MODEL.config._name_or_path = "/home/somebody/models/the-good-one"
    try:
        fed(MODEL, 3).save(saved, MODEL)
        refused(saved, tiny_llama(seed=1), "filled by LlamaForCausalLM the-good-one, which has the shape")
        assert b"somebody" not in saved.read_bytes()
    finally:
        MODEL.config._name_or_path = ""
    with pytest.raises(TypeError, match="pass the model that will use the cache, not a LlamaConfig"):
        FreqKVCache.load(saved, MODEL.config)


def test_layers_of_another_kind(tmp_path):
    model = zoo.tiny_model("gemma3_text")
    freqkv.patch(model)
    fed(model, N).save(tmp_path / "file", model)
    model.config.sliding_window = 7
    refused(tmp_path / "file", model, r"holds a layer \d of kind .*'sliding_window': 11.*'sliding_window': 7")


def test_the_model_that_saves(tmp_path):
    """Must be the right one; without it, the file tells the shape only, which is said."""
    with pytest.raises(ValueError, match="made for a model of another shape than this LlamaForCausalLM"):
        fed(MODEL, 3).save(tmp_path / "file", tiny_llama(layers=3))
    assert not list(tmp_path.iterdir())


def test_weights_that_were_not_looked_at(tmp_path, caplog):
    from accelerate import cpu_offload

    cache = fed(MODEL, N + 3)
    cache.save(tmp_path / "whole", MODEL)
    cache.save(tmp_path / "nameless")
    offloaded = cpu_offload(tiny_llama(), execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in offloaded.parameters())
    freqkv.patch(offloaded)
    with caplog.at_level(logging.WARNING, "freqkv"):
        loaded = FreqKVCache.load(tmp_path / "whole", offloaded)
        assert "weights were not compared" in caplog.messages[-1]
        assert caplog.messages[-1].endswith("when it was loaded")
        cache.save(tmp_path / "offloaded", offloaded)
        assert FreqKVCache.load(tmp_path / "offloaded", MODEL).tokens_seen == N + 3
        assert caplog.messages[-1].endswith("when it was saved")
        assert len(caplog.messages) == 2
        FreqKVCache.load(tmp_path / "nameless", MODEL)
        assert "does not tell which model filled it" in caplog.messages[-1]
    assert loaded.layers[1].keys.device.type == "cpu"
    assert_go_on_alike(offloaded, copy.deepcopy(cache), loaded, tmp_path)
    refused(tmp_path / "nameless", tiny_llama(layers=3), "was filled by another model with number of layers 2")
    with torch.device("meta"):
        nowhere = type(MODEL)(MODEL.config)
    assert FreqKVCache.load(tmp_path / "whole", nowhere).layers[0].keys.is_meta


# Files that are damaged, or something else.


def rewritten(path, change, checksum=False):
    """The same file with another header."""
    with safe_open(path, "pt") as file:
        info = json.loads(file.metadata()[METADATA_KEY])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(info, tensors)
    if checksum:
        info["checksum"] = files._checksum(info, tensors)
    path.write_bytes(safetensors.torch.save(tensors, {METADATA_KEY: files._rendered(info)}))


def test_any_changed_byte(saved):
    """In the header each, in the tensors some."""
    data = saved.read_bytes()
    body = 8 + int.from_bytes(data[:8], "little")
    with saved.open("r+b", buffering=0) as file:  # in place: to write the whole file anew takes ten times as long
        for place in [*range(body), *range(body, len(data), 97), len(data) - 1]:
            for changed in (data[place] ^ 1, data[place] ^ 0xFF, data[place]):
                file.seek(place)
                file.write(bytes([changed]))
                if changed != data[place]:
                    refused(saved, MODEL, r"Take another copy of it|has format version|no cache of FreqKV")
    assert FreqKVCache.load(saved, MODEL).tokens_seen == 2 * N + 3


def test_cut_off_and_continued(saved):
    data = saved.read_bytes()
    for length in [*range(0, 60), *range(60, len(data), 211), len(data) - 1]:
        saved.write_bytes(data[:length])
        refused(saved, MODEL, "cut off, changed, or no safetensors file .*Take another copy")
    saved.write_bytes(data + b"\0")
    refused(saved, MODEL, "cut off, changed")


def test_something_else(saved, shipped, tmp_path):
    class Executed:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    for data in (b"", b"hello", pickle.dumps(Executed()), b"\0" * 100, b"PK\3\4" * 50):
        saved.write_bytes(data)
        refused(saved, MODEL, "no safetensors file")
    torch.save(Executed(), saved)
    refused(saved, MODEL, "no safetensors file")
    assert not (tmp_path / "executed").exists()
    refused(shipped / "model.safetensors", MODEL, "is a safetensors file, but no cache of FreqKV")
    refused(tmp_path, MODEL, "is a folder")
    with pytest.raises(FileNotFoundError):
        FreqKVCache.load(tmp_path / "nothing", MODEL)
    for text in (
        "",
        "[]",
        "{}",
        "null",
        '{"format_version": 1}',
        '{"format_version": 1, "checksum": ""}',
        "1" * 5000,
        "[" * 5000,
    ):
        saved.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}, {METADATA_KEY: text}))
        refused(saved, MODEL, "its header is not one of FreqKV|its checksum is wrong")


def test_another_format_version(saved):
    rewritten(saved, lambda info, tensors: info.update(format_version=3, freqkv="9.9"))
    refused(saved, MODEL, "has format version 3, written by FreqKV 9.9; this FreqKV reads version 1 and 2")


def test_a_header_that_contradicts_itself(saved):
    """Not by accident, but by somebody who made a checksum for it."""
    data = saved.read_bytes()
    changes = [
        lambda info, tensors: tensors.pop("0.values"),
        lambda info, tensors: tensors.update({"7.keys": torch.zeros(1)}),
        lambda info, tensors: tensors.update({"0.keys": tensors["0.keys"][:, :, :5].clone()}),
        lambda info, tensors: info["counts"].update(rows=[1, 2]),
        lambda info, tensors: info["counts"].pop("tokens_seen"),
    ]
    for change in changes:
        saved.write_bytes(data)
        rewritten(saved, change, checksum=True)
        refused(saved, MODEL, "contradict each other|its header is not one of FreqKV")


# Writing.


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_all_as_it_was(step, error, saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*args):
        raise error

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(type(error)):
        fed(MODEL, 5).save(saved, MODEL)
    assert list(saved.parent.iterdir()) == [saved]
    assert saved.read_bytes() == before


def test_where_files_go(tmp_path):
    cache = fed(MODEL, 5)
    with pytest.raises(IsADirectoryError):
        cache.save(tmp_path, MODEL)
    with pytest.raises(FileNotFoundError, match=r"no such folder to save to: .*nowhere'"):
        cache.save(tmp_path / "nowhere" / "file", MODEL)
    assert not list(tmp_path.iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "file")
    cache.save(str(tmp_path / "link"), MODEL)
    assert (tmp_path / "link").is_symlink()
    assert FreqKVCache.load(str(tmp_path / "file"), MODEL).tokens_seen == 5
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


@torch.no_grad()
def test_a_spent_cache_and_one_within_a_forward(tmp_path, monkeypatch):
    cache, within = fed(MODEL, N), []

    def save(*args):
        with pytest.raises(RuntimeError, match="within a forward, or spent"):
            cache.save(tmp_path / "file", MODEL)
        within.append(True)

    hook = MODEL.model.layers[1].register_forward_pre_hook(save)
    fed(MODEL, 3, cache=cache)
    hook.remove()
    assert within
    cache.save(tmp_path / "file", MODEL)

    update, calls = FreqKVLayer.update, []

    def interrupted(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return update(self, *args, **kwargs)

    monkeypatch.setattr(FreqKVLayer, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fed(MODEL, 3, cache=cache)
    assert cache.is_spent
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(RuntimeError, match="can only be reset"):
        cache.save(tmp_path / "file", MODEL)
    assert (tmp_path / "file").read_bytes() == before
    cache.reset()
    cache.save(tmp_path / "file", MODEL)


def test_a_layer_of_which_nothing_is_known(tmp_path):
    class Unheard(DynamicSlidingWindowLayer):
        """Has who knows what beside its keys."""

    model = zoo.tiny_model("gemma3_text")
    freqkv.patch(model)
    cache = fed(model, 5)
    index = next(i for i, layer in enumerate(cache.layers) if type(layer) is DynamicSlidingWindowLayer)
    cache.layers[index].__class__ = Unheard
    with pytest.raises(UnsupportedModelError, match=f"layer {index} keeps a Unheard, of which FreqKV does not know"):
        cache.save(tmp_path / "file", model)
    assert not list(tmp_path.iterdir())
