"""What FreqKV relies on in transformers. A failure here says what a new release changed, before anything else fails."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from models import tiny_llama, tokens
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, Trainer, TrainingArguments, cache_utils, masking_utils

import freqkv
from freqkv import FreqKVCache
from freqkv.models import upstream
from freqkv.models.upstream import CACHE, CACHE_NAMES, SEAM, cache_of, renamed

ROOT = Path(__file__).parent.parent
N = 16
INSTALLED = Version(transformers.__version__)
OLD, NEW = "past_key_values", "cache"
RENAMED = Version("5.24") <= INSTALLED  # the release that renamed the one to the other


def changed(what):
    return (
        f"transformers {transformers.__version__} changed {what}, which freqkv relies on: read its release notes and adapt "
        "freqkv/models/upstream.py"
    )


# What is there


def test_nothing_is_missing():
    assert upstream.missing() == (), changed("; ".join(upstream.missing()))


def test_masks_can_be_asked_for():
    known = set(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.valid_keys())
    assert {"eager", "sdpa", "flex_attention", "flash_attention_2"} <= known, changed("the mask functions")


def test_masks_of_four_dimensions_are_taken_as_they_are():
    model = tiny_llama()
    mask = torch.empty(1, 1, 1, 0)
    taken = upstream.causal_mask(model.config, torch.empty(1, 5, 48), mask, None)
    assert taken is mask, changed("masks of four dimensions, which decoders took as they are")


def test_layers_follow_the_configuration():
    config = transformers.Gemma3TextConfig(layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2)
    kinds = [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "DynamicLayer"], changed("the layers of DynamicCache(config=...)")


def test_attention_modules_tell_what_they_are():
    attention = tiny_llama().model.layers[1].self_attn
    wanted = {"hidden_states", "position_embeddings", "attention_mask", CACHE}
    assert attention.layer_idx == 1, changed("layer_idx of attention modules")
    assert wanted <= set(inspect.signature(attention.forward).parameters), changed("the arguments of attention modules")


def test_rotary_modules_tell_what_they_are():
    rotary = tiny_llama().model.rotary_emb
    assert list(inspect.signature(rotary.forward).parameters)[:2] == ["x", "position_ids"], changed("rotary modules")
    assert upstream.frequencies(rotary) == "inv_freq", changed("inv_freq of rotary modules")


def test_layers_say_whether_they_can_be_cropped():
    assert cache_utils.DynamicLayer.is_croppable, changed("is_croppable of layers")
    assert FreqKVCache(tiny_llama().config, window=N).is_croppable
    assert all(isinstance(layer.is_croppable, bool) for layer in FreqKVCache(tiny_llama().config, window=N).layers)
    assert not FreqKVCache(zoo.tiny_config("minimax"), window=N).is_croppable  # its lightning attention keeps no past


@pytest.mark.parametrize("former", [OLD])
def test_the_former_name_is_taken_for_as_long_as_was_announced(former):
    """By `generate` until 6.0, by modules until 5.40: then what is said of it here and in README has to go."""
    model, call = tiny_llama(), {former: DynamicCache(config=tiny_llama().config), "max_new_tokens": 2}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.generate(tokens(3), **call)
        model.model.layers[0].self_attn(
            torch.zeros(1, 2, 48), model.model.rotary_emb(torch.zeros(1), torch.arange(2)[None]), None, **{former: None}
        )
    said = " ".join(str(warning.message) for warning in caught if former in str(warning.message))
    assert bool(said) == RENAMED, changed("how it takes the former name of the cache")
    if RENAMED:
        assert "6.0" in said, changed("until when generate takes the former name of the cache")
        assert "5.40" in said, changed("until when modules take the former name of the cache")


# What is said of it


def test_versions_are_the_same_everywhere():
    oldest, newest = upstream.TESTED
    (wanted,) = map(
        SpecifierSet, re.findall(r'^    "transformers(.*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    )
    assert f"{oldest}.0" in wanted
    assert f"{newest}.0" in wanted
    assert "5.99" in wanted, "no cap that shuts out the next release"
    assert "6.0.0" not in wanted
    before = f"5.{int(oldest.split('.')[1]) - 1}.0"
    assert before not in wanted
    ci = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^(?:newest|oldest)=(.*)$", ci, re.MULTILINE) == [newest, oldest]
    assert f"transformers {oldest} to {newest}" in (ROOT / "README.md").read_text()


def refused(match):
    upstream.missing.cache_clear()
    try:
        with pytest.raises(freqkv.UnsupportedModelError, match=match) as error:
            freqkv.patch(tiny_llama())
        support = freqkv.supported(tiny_llama())
        assert not support
        assert support.reason == str(error.value)
    finally:
        upstream.missing.cache_clear()
    assert transformers.__version__ in str(error.value)
    assert "tested with transformers 5.17 to 5.24" in str(error.value)


@pytest.mark.parametrize("entry", SEAM, ids=lambda entry: entry[1])
@pytest.mark.parametrize("how", ["gone", "another signature"])
def test_a_release_that_breaks_the_seam_is_refused(monkeypatch, entry, how):
    find = upstream._find

    def broken(module, name):
        if (module, name) != entry[:2]:
            return find(module, name)
        return None if how == "gone" else lambda something_else: None

    monkeypatch.setattr(upstream, "_find", broken)
    refused(rf"{re.escape(entry[1])} (is not there|takes \(something_else, ...\))")


def test_other_breaks_are_refused(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(upstream, "RELEASE", Version("5.16.1"))
        refused("older than any that was tested")

    class Asks(cache_utils.CacheLayerMixin):
        pass

    Asks.__abstractmethods__ = frozenset({"update", "get_a_new_thing"})
    with monkeypatch.context() as patched:
        patched.setattr(upstream, "CacheLayerMixin", Asks)
        refused("asks layers for get_a_new_thing")
    with monkeypatch.context() as patched:
        patched.setattr(upstream, "MASK_FUNCTIONS", None)
        refused("no masks for eager and sdpa")
    with monkeypatch.context() as patched:
        patched.setattr(upstream, "causal_mask", lambda *args: torch.zeros(1))
        refused("mask of four dimensions")


# Both names


def test_the_cache_among_arguments():
    cache, other = object(), object()
    assert cache_of({}) is cache_of({OLD: None, NEW: None}) is None
    for name in CACHE_NAMES:
        assert cache_of({name: cache}) is cache
        assert renamed({name: cache, "use_cache": True}, CACHE) == {CACHE: cache, "use_cache": True}
    assert cache_of({OLD: cache, NEW: cache}) is cache
    assert renamed({OLD: None, NEW: cache}, OLD) == {OLD: cache}
    with pytest.raises(ValueError, match="two names of one argument"):
        cache_of({OLD: cache, NEW: other})


def spelled(name, cache):
    """What `generate` takes: before the renaming, only the name that is the former one now."""
    return {name if RENAMED else OLD: cache}


@pytest.mark.parametrize("name", [OLD, NEW])
@torch.no_grad()
def test_models_take_the_cache_under_both_names(name):
    """Without a warning, in keywords and by position; on all releases, some of which would drop the other name unread."""
    model, ids = tiny_llama(), tokens(3 * N)
    freqkv.patch(model)

    def cache():
        return FreqKVCache(model.config, window=N)

    expected = model(ids, **{CACHE: cache()}).logits
    for inner in (model, model.model):
        held = cache()
        output = inner(ids, **{name: held})
        assert held.tokens_seen == 3 * N
        assert output[CACHE] is held
        assert torch.equal(model.lm_head(output[0]) if inner is model.model else output.logits, expected)
        held = cache()
        inner(ids, None, None, held)
        assert held.tokens_seen == 3 * N
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, **{OLD: cache(), NEW: cache()})
    other = DynamicCache(config=model.config)
    assert torch.equal(model(ids, **{CACHE: other}).logits, tiny_llama()(ids).logits)


@pytest.mark.skipif(not RENAMED, reason="there is no former name yet")
@torch.no_grad()
def test_a_layer_that_uses_the_former_name_hands_its_cache_on():
    """As code from elsewhere may; attention modules take it until 5.40."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                {OLD if name == NEW else name: value for name, value in kwargs.items()},
            ),
            with_kwargs=True,
        )
    freqkv.patch(model, window=N)
    for cache in (FreqKVCache(model.config, window=N), DynamicCache(config=model.config)):
        model(tokens(2 * N), **{NEW: cache})
        assert cache.get_seq_length() == 2 * N


@pytest.mark.parametrize("name", [OLD, NEW])
@pytest.mark.filterwarnings(
    "ignore:.past_key_values. is deprecated.*generate:FutureWarning"
)  # transformers' own, of the call
@torch.no_grad()
def test_generate_takes_the_cache_under_both_names(name):
    model, ids = tiny_llama(), tokens(9)
    freqkv.patch(model)
    options = {"max_new_tokens": 3 * N, "do_sample": False, "return_dict_in_generate": True}
    with freqkv.patch(model, window=N):
        expected = model.generate(ids, **options)
    for more in (
        {},
        {"assistant_model": tiny_llama(seed=4), "num_assistant_tokens": 3},
        {"prompt_lookup_num_tokens": 2},
    ):
        cache = FreqKVCache(model.config, window=N)
        output = model.generate(ids, **spelled(name, cache), **options, **more)
        assert torch.equal(output.sequences, expected.sequences)
        assert output[CACHE] is cache
    assert isinstance(expected[CACHE], FreqKVCache)


@pytest.mark.parametrize("name", [OLD, NEW])
@torch.no_grad()
def test_compiled_steps_take_the_cache_under_both_names(name):
    model, ids = tiny_llama(attention="sdpa"), tokens(2 * N)
    freqkv.patch(model)
    expected, held = [], FreqKVCache(model.config, window=N)
    for token in ids.split(1, dim=1):
        expected.append(model(token, **{CACHE: held}).logits)
    torch.compiler.reset()
    step = torch.compile(model.forward, backend="eager")
    static = FreqKVCache(model.config, window=N, static=True)
    for token, logits in zip(ids.split(1, dim=1), expected, strict=True):
        assert torch.allclose(step(token, **{name: static}).logits, logits, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("name", [OLD, NEW])
@torch.no_grad()
def test_peft_passes_the_cache_on_under_both_names(name):
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    freqkv.patch(model)
    cache = FreqKVCache(model.config, window=N)
    model(input_ids=tokens(3 * N), **{name: cache})
    assert cache.tokens_seen == 3 * N


def test_a_pipeline_has_the_cache_of_the_numbers(shipped):
    pipe = transformers.pipeline("text-generation", model=str(shipped), dtype=torch.float32)
    freqkv.patch(pipe.model, window=64)
    made = []

    class Watched(FreqKVCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("freqkv.patching.state.FreqKVCache", Watched)
        pipe("def add(a, b):\n", max_new_tokens=80, do_sample=False, return_full_text=False)
    (cache,) = made
    assert cache.tokens_seen > 64
    assert cache.compressions >= 1


def test_trainer_leaves_the_cache_out_of_its_predictions(tmp_path):
    """Outputs under the former and the present name are no logits."""
    model = tiny_llama()
    freqkv.patch(model, window=N)
    data = [{"input_ids": row, "labels": row} for row in tokens(2 * N, batch=2)]
    trainer = Trainer(model, TrainingArguments(tmp_path, report_to=[], use_cpu=True), train_dataset=data)
    output = trainer.predict(data)
    assert output.predictions.shape == (2, 2 * N, 101)
    assert output.metrics["test_loss"] > 0
