"""Presets, settings in files, and recommendations measured on a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zoo
from models import tiny_llama, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

import freqkv
from freqkv import (
    PRESETS,
    FreqKVCache,
    FreqKVConfig,
    KeepAttended,
    KeepNovel,
    Settings,
    keep_recent,
    low_pass_entries,
    recommend,
)
from freqkv.evaluation import CODE, Haystack
from freqkv.models.upstream import CACHE
from freqkv.presets import choosing_layer
from freqkv.recommendation import Candidate, best_of, bytes_per_entry, facts_kept

SHIPPED = Path(__file__).parent.parent / "examples" / "tiny_lm"
ALL = pytest.mark.parametrize("preset", PRESETS)


def test_the_paper_is_what_a_cache_is_without_a_preset():
    config = tiny_llama().config
    cache, plain = FreqKVCache(config, preset="paper", window=33), FreqKVCache(config, window=33)
    assert cache.config == plain.config
    assert cache.compressor is plain.compressor is low_pass_entries


@pytest.mark.parametrize("window", [32, 33, 101, 512, 1024, 4096])
@pytest.mark.parametrize("preset", ["streaming", "recommended"])
def test_eight_folds_while_a_window_enters(preset, window):
    config = tiny_llama().config
    for given in ({}, {"recent_tokens": window // 3}, {"sink_tokens": 0}):
        schedule = FreqKVCache(config, preset=preset, window=window, **given).schedule
        assert schedule.step == round(window / 8)


def test_numbers_and_compressors_beside_a_preset_take_the_place_of_its_own():
    config = tiny_llama().config
    cache = FreqKVCache(config, preset="recommended", window=64, sink_tokens=2, recent_tokens=5, retain_ratio=0.25)
    assert cache.config == FreqKVConfig(64, 2, 0.25, 5)
    assert isinstance(cache.compressor, KeepNovel)
    assert FreqKVCache(config, preset="recommended", window=64, compressor=keep_recent).compressor is keep_recent
    context = FreqKVCache(config, preset="streaming").config
    assert context.window == config.max_position_embeddings


def test_what_contradicts_a_preset_is_refused():
    config = tiny_llama().config
    with pytest.raises(ValueError, match="no preset 'best': take one of paper, streaming, recommended"):
        FreqKVCache(config, preset="best")
    with pytest.raises(ValueError, match="preset='paper' brings its own numbers, and so does config"):
        FreqKVCache(config, FreqKVConfig(64), preset="paper")
    with pytest.raises(ValueError, match="and so does schedule"):
        freqkv.patch(tiny_llama(), preset="paper", schedule=FreqKVConfig(64).schedule)
    with pytest.raises(ValueError, match="window=6 leaves"):
        FreqKVCache(config, preset="paper", window=6, sink_tokens=5)


@ALL
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3"])
def test_families_run_each_preset(preset, family):
    """One with full attention, one with sliding layers, one with multi-head latent attention: a call, its splits, no cache."""
    model, ids = zoo.tiny_model(family), tokens(90)
    freqkv.patch(model)

    @torch.no_grad()
    def run(*lengths):
        cache = FreqKVCache(model.config, preset=preset, window=32)
        return torch.cat([model(part, **{CACHE: cache}).logits for part in ids.split(lengths, dim=1)], 1)

    whole = run(90)
    assert torch.allclose(run(33, 1, 1, 20, 35), whole, atol=3e-4)
    with freqkv.patch(model, preset=preset, window=32), torch.no_grad():
        assert torch.allclose(model(ids, use_cache=False).logits, whole, atol=3e-4)
        out = model.generate(ids[:, :9], max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    assert out[CACHE].config == FreqKVCache(model.config, preset=preset, window=32).config
    assert out[CACHE].compressor == FreqKVCache(model.config, preset=preset, window=32).compressor


def test_the_layer_that_chooses_is_a_compressed_one():
    for family in ("llama", "gemma3_text", "qwen3_5_text", "deepseek_v3"):
        config = zoo.tiny_model(family).config
        assert choosing_layer(config) in FreqKVCache(config, window=32).compressed_layers


@pytest.mark.parametrize(
    "compressor", [low_pass_entries, keep_recent, KeepAttended(3, 5), KeepNovel(3, 0, 1), KeepNovel(), freqkv.mean_pool]
)
def test_settings_are_read_as_they_were_written(compressor, tmp_path):
    settings = Settings(FreqKVConfig(64, 2, 0.25, 5), compressor)
    settings.save(tmp_path)
    assert Settings.load(tmp_path) == Settings.load(tmp_path / "freqkv.json") == settings
    cache = FreqKVCache(tiny_llama().config, **settings.options)
    assert cache.config == settings.config
    assert cache.compressor == compressor


def test_settings_of_version_0_1_and_what_is_none(tmp_path):
    (tmp_path / "freqkv.json").write_text(
        json.dumps({"window": 64, "sink_tokens": 4, "retain_ratio": 0.5, "recent_tokens": 0})
    )
    assert Settings.load(tmp_path) == Settings(FreqKVConfig(64))
    with pytest.raises(OSError, match="nothing"):
        Settings.load(tmp_path / "nothing")
    for text, message in (
        ("[1]", "is no freqkv.json"),
        ('{"compressor": "best"}', "'best' is none of FreqKV's own: take one of low_pass_entries"),
        ('{"pool": 3}', "'low_pass_entries' has no numbers"),
        ('{"compressor": "keep_novel", "width": 3}', "unexpected keyword argument 'width'"),
        ('{"window": 1}', "window=1 must be 2 or more"),
    ):
        (tmp_path / "freqkv.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Settings.load(tmp_path)
    with pytest.raises(ValueError, match=r"so that freqkv\.json cannot name it"):
        Settings(FreqKVConfig(64), lambda keys, values, keep: (keys, values)).save(tmp_path)


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    source = Path(torch.__file__).with_name("_tensor_str.py").read_text(encoding="utf-8")
    return model, AutoTokenizer.from_pretrained(SHIPPED), source


def test_recommend_measures_and_leaves_the_model_as_it_was(shipped):
    model, tokenizer, text = shipped
    found = recommend(model, tokenizer, text, window=64, wording=CODE)
    assert [each.name for each in found.candidates] == [
        "paper", "streaming", "novel passages, R = 0.5N", "novel passages, R = 0.67N"
    ]  # fmt: skip
    assert found.candidates[1].facts == 0, "sinks and the most recent tokens hold nothing of four windows back"
    assert all(each.kl > 0 for each in found.candidates)
    assert found.settings == best_of(found.candidates).settings
    assert set(found.facts_by_layer) == set(range(model.config.num_hidden_layers))
    assert "(recommended)" in str(found)
    assert len(str(found).splitlines()) == 8
    with pytest.raises(ValueError, match="not patched"):
        freqkv.unpatch(model)
    per_entry = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim * 4
    by_memory = recommend(model, tokenizer, text, memory=64 * per_entry + 5, wording=CODE)
    assert by_memory == found


@pytest.mark.parametrize(
    ("measured", "best"),
    [
        ({"a": (0.10, 0.0), "b": (0.12, 0.9), "c": (0.11, 0.8)}, "c"),  # nearly as many facts, and nearer
        ({"a": (0.10, 0.7), "b": (0.12, 0.9)}, "b"),  # fewer than four fifths of the most
        ({"a": (0.10, 0.0), "b": (0.09, 0.0), "c": (0.11, 0.0)}, "b"),  # nothing keeps facts
        ({"a": (0.10, 0.0), "b": (0.50, 0.01)}, "b"),
    ],
)
def test_the_nearest_of_those_that_keep_facts_is_recommended(measured, best):
    settings = Settings(FreqKVConfig(64), keep_recent)
    assert best_of([Candidate(name, settings, *figures) for name, figures in measured.items()]).name == best


def test_facts_are_kept_where_everything_is_and_nowhere_where_nothing_is(shipped):
    """A window that holds the whole text but a little; and the most recent tokens only."""
    model, tokenizer, text = shipped
    with freqkv.patch(model):
        assert bytes_per_entry(model) == 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * (
            model.config.head_dim * 4
        )
        sample = Haystack(tokenizer, text, CODE).sample("single_needle", 250, 0, 0.3)
        recent = facts_kept(model, tokenizer, [sample], Settings(FreqKVConfig(64), keep_recent))
        assert set(recent.values()) == {0.0}
        most = facts_kept(model, tokenizer, [sample], Settings(FreqKVConfig(245, 4, 0.5, 235), keep_recent))
        assert set(most.values()) == {1.0}


def test_what_cannot_be_measured_is_refused(shipped):
    model, tokenizer, text = shipped
    for options, message in (
        ({}, "either memory= in bytes or window="),
        ({"window": 64, "memory": 10**6}, "either memory= in bytes or window="),
        ({"memory": 1000}, "memory=1000 holds 0 entries, less than 32"),
        ({"window": 8}, "window holds 8 entries, less than 32"),
        ({"window": 500}, "leave the model's context of 512"),
    ):
        with pytest.raises(ValueError, match=message):
            recommend(model, tokenizer, text, **options)
    with pytest.raises(ValueError, match="4 windows of 64 are 256: give more text"):
        recommend(model, tokenizer, "x = 1\n", window=64)
