"""Weights on disk, on several processes, in other dtypes, in copies and in threads."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from models import tiny_llama, tokens
from running import padded, rows_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, TorchAoConfig

import freqkv
from freqkv import FreqKVCache, FreqKVConfig
from freqkv.models.upstream import CACHE

N = 23
CONFIG = FreqKVConfig(window=N, sink_tokens=3, recent_tokens=2)
BATCHES = {"uniform": [2 * N + 3] * 3, "ragged": [3, N + 1, 3 * N + 5]}
NEW = N + 7


def batch(kind):
    return padded(rows_of(BATCHES[kind]))


def generate(model, kind="ragged", **options):
    ids, mask = batch(kind)
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    options.setdefault(CACHE, FreqKVCache(model.config, CONFIG))
    return model.generate(ids, attention_mask=mask, **options)


@torch.no_grad()
def logits(model, kind="ragged", cache=None, **call):
    """Of all tokens that are no padding."""
    ids, mask = batch(kind)
    cache = FreqKVCache(model.config, CONFIG) if cache is None else cache
    return model(ids, attention_mask=mask, **{CACHE: cache}, **call).logits[mask.bool()]


def patched(**config):
    model = tiny_llama(**config)
    freqkv.patch(model)
    return model


@pytest.fixture(scope="module")
def model():
    return patched()


@pytest.fixture(scope="module")
def expected(model):
    return {kind: generate(model, kind) for kind in BATCHES}


# Weights elsewhere

DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "disk",
    "lm_head": "disk",
}
OFFLOAD = {
    "device map": lambda model, folder: dispatch_model(model, DEVICE_MAP, offload_dir=folder, main_device="cpu"),
    "all on disk": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
    "all in memory": lambda model, folder: cpu_offload(model, execution_device="cpu"),
}


@pytest.mark.parametrize("way", OFFLOAD)
@pytest.mark.parametrize("first", ["patch", "offload"])
def test_offloaded_weights(way, first, model, expected, tmp_path):
    other = tiny_llama()
    if first == "patch":
        freqkv.patch(other)
    OFFLOAD[way](other, tmp_path)
    assert any(weight.is_meta for weight in other.parameters())
    if first == "offload":
        freqkv.patch(other)
    for kind in BATCHES:
        assert torch.equal(generate(other, kind), expected[kind])
    freqkv.patch(other, CONFIG)
    assert torch.equal(generate(other, **{CACHE: None}), expected["ragged"])
    ids, mask = batch("ragged")
    with torch.no_grad():
        uncached = other(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    assert torch.allclose(uncached, logits(model), atol=2e-4)
    freqkv.unpatch(other)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, tiny_llama()(ids).logits)


def test_loaded_onto_a_device_map(expected, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=DEVICE_MAP,
        offload_folder=tmp_path / "offload",
        dtype=torch.float32,
        attn_implementation="eager",
    )
    freqkv.patch(other)
    assert any(weight.is_meta for weight in other.parameters())
    for kind in BATCHES:
        assert torch.equal(generate(other, kind), expected[kind])


WORKER = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
import freqkv
from freqkv import FreqKVCache
import test_devices
from freqkv.models.upstream import CACHE

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, attn_implementation="eager", tp_plan="auto"
)
freqkv.patch(model)
outputs, heads = {}, []
for kind in test_devices.BATCHES:
    cache = FreqKVCache(model.config, test_devices.CONFIG)
    outputs[kind] = test_devices.generate(model, kind, **{CACHE: cache})
    heads.append(cache.layers[0].keys.shape[1])
torch.save((outputs, heads, dist.get_world_size()), f"{sys.argv[1]}/rank{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_tensor_parallel(tmp_path):
    """Two processes with half of the heads each write what one process writes."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    plain = tiny_llama(kv_heads=2)
    plain.resize_token_embeddings(102)  # which two processes can share
    plain.save_pretrained(tmp_path)
    single = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    freqkv.patch(single)
    (tmp_path / "worker.py").write_text(WORKER)
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        outputs, heads, size = torch.load(tmp_path / f"rank{rank}.pt")
        assert (heads, size) == ([1, 1], 2)
        for kind, output in outputs.items():
            assert torch.equal(output, generate(single, kind))


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", BATCHES)
def test_a_model_that_changes_its_dtype_after_it_was_patched_and_used(dtype, kind, model):
    changed = patched()
    generate(changed, kind)
    changed.to(dtype)
    fresh = patched(dtype=dtype)
    cache = FreqKVCache(changed.config, CONFIG)
    output = logits(changed, kind, cache)
    assert torch.equal(output, logits(fresh, kind))
    assert {layer.keys.dtype for layer in cache.layers} == {layer.values.dtype for layer in cache.layers} == {dtype}
    reference = logits(model, kind)
    rounding = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-5}[dtype]
    assert (output.float() - reference).abs().max() < rounding * reference.abs().max()
    assert torch.equal(logits(changed.float(), kind).isfinite().all(), torch.tensor(True))
    assert generate(changed, kind).shape == generate(model, kind).shape


def test_a_cache_of_another_dtype_is_refused_until_it_is_reset(expected):
    changed = patched()
    cache = FreqKVCache(changed.config, CONFIG)
    generate(changed, **{CACHE: cache})
    changed.double()
    with pytest.raises(ValueError, match=r"dtype torch.float32, the model brings dtype torch.float64"):
        changed(tokens(4, 3), **{CACHE: cache})
    cache.reset()
    assert torch.equal(generate(changed, **{CACHE: cache}), expected["ragged"])
    assert cache.layers[0].keys.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_each_row_in_bfloat16_is_that_of_the_row_alone(dtype):
    """To the rounding of the dtype, with weights in it and under autocast."""
    half = patched(dtype=dtype)
    rows = rows_of(BATCHES["ragged"])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        together = logits(half).split(BATCHES["ragged"])
        for row, got in zip(rows, together, strict=True):
            alone = half(row[None], **{CACHE: FreqKVCache(half.config, CONFIG)}).logits[0]
            assert (got - alone).abs().max() <= 0.05 * alone.abs().max()
            assert got.dtype == torch.bfloat16


def test_autocast(model):
    cache = FreqKVCache(model.config, CONFIG)
    reference = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = logits(model, cache=cache)
        tokens_written = generate(model)
    assert output.dtype == torch.bfloat16
    assert 0 < (output - reference).abs().max() < 0.05 * reference.abs().max()
    assert torch.equal(logits(model), reference), "nothing of it is left behind"
    assert torch.equal(tokens_written[:, : -NEW + 1], generate(model)[:, : -NEW + 1]), "the first of them"
    trained = tiny_llama()
    freqkv.patch(trained, CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        trained(tokens(3 * N), use_cache=False).logits.float().square().mean().backward()
    gradients = [weight.grad for weight in trained.parameters()]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() and grad.any() for grad in gradients)


def test_offloading_is_refused(model):
    with pytest.raises(ValueError, match=r"offloading=True.*smaller window"):
        FreqKVCache(model.config, CONFIG, offloading=True)


def quantized(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.skipif(not hasattr(torch, "ao"), reason="this torch cannot quantize by itself")
@pytest.mark.parametrize("first", ["patch", "quantize"])
def test_quantized_linears(first, model):
    """Their scales are those of a whole call, so that a text in one call and token by token agree to these only."""
    if first == "patch":
        other = quantized(patched())
    else:
        other = quantized(tiny_llama())
        freqkv.patch(other)
    assert not any(type(module) is torch.nn.Linear for module in other.modules())
    reference = logits(model)
    assert (logits(other) - reference).abs().max() < 0.2 * reference.abs().max()
    ids = tokens(3 * N)
    cache = FreqKVCache(other.config, CONFIG)
    with torch.no_grad():
        steps = [other(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(ids.shape[1])]
        whole = other(ids, **{CACHE: FreqKVCache(other.config, CONFIG)}).logits
    assert (torch.cat(steps, 1) - whole).abs().max() < 0.2 * whole.abs().max()


def quantization(kind):
    if kind == "torchao int8":
        return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "bitsandbytes int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


@pytest.mark.parametrize("kind", ["bitsandbytes int8", "bitsandbytes 4 bit", "torchao int8"])
@pytest.mark.filterwarnings("ignore")
def test_weights_quantized_as_they_are_loaded(kind, tmp_path):
    config = quantization(kind)
    tiny_llama(head_dim=32).save_pretrained(tmp_path)
    plain, other = (
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, device_map="cpu", dtype="float32"
        ).eval()
        for _ in range(2)
    )
    freqkv.patch(other)
    short, ids = tokens(N, 2), tokens(3 * N, 2)
    with torch.no_grad():
        assert torch.equal(
            other(short, **{CACHE: FreqKVCache(other.config, CONFIG)}).logits,
            plain(short, **{CACHE: DynamicCache(config=plain.config)}).logits,
        )
        reference = tiny_llama(head_dim=32)
        freqkv.patch(reference)
        expected = reference(ids, **{CACHE: FreqKVCache(reference.config, CONFIG)}).logits
        whole = other(ids, **{CACHE: FreqKVCache(other.config, CONFIG)}).logits
        cache = FreqKVCache(other.config, CONFIG)
        steps = torch.cat([other(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(ids.shape[1])], 1)
    # bitsandbytes int8 quantizes inputs too, in float16 and by the scales of each call
    assert (steps - whole).norm() < (0.1 if kind == "bitsandbytes int8" else 1e-3) * whole.norm()
    assert 0 < (whole - expected).norm() < (0.5 if kind == "bitsandbytes 4 bit" else 0.15) * expected.norm()


# Copies


def copied(model):
    return copy.deepcopy(model)


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("way", [copied, saved, pickled, lambda model: copy.deepcopy(model).to("cpu")])
@pytest.mark.parametrize("numbers", [None, CONFIG])
@pytest.mark.parametrize("used", [False, True])
def test_copies_work_and_stand_alone(way, numbers, used, expected):
    original = tiny_llama()
    freqkv.patch(original, numbers)
    if used:
        generate(original)
    twin = way(original)
    for kind in BATCHES:
        assert torch.equal(generate(twin, kind), expected[kind])
        if numbers is not None:
            assert torch.equal(generate(twin, kind, **{CACHE: None}), expected[kind])
    with torch.no_grad():
        original.model.layers[0].self_attn.q_proj.weight.zero_()
    assert torch.equal(generate(twin), expected["ragged"])
    freqkv.unpatch(original)
    assert torch.equal(generate(twin), expected["ragged"])
    freqkv.unpatch(twin)
    with torch.no_grad():
        assert torch.equal(twin(tokens(9)).logits, tiny_llama()(tokens(9)).logits)
    with pytest.raises(ValueError, match="not patched"):
        freqkv.unpatch(twin)


@pytest.mark.parametrize("numbers", [None, CONFIG])
def test_what_is_saved_is_an_unpatched_model(numbers, tmp_path, expected):
    tiny_llama().save_pretrained(tmp_path / "plain")
    model = tiny_llama()
    freqkv.patch(model, numbers)
    generate(model)
    model.save_pretrained(tmp_path / "patched")
    files = sorted(file.name for file in (tmp_path / "plain").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "patched").iterdir())
    for file in files:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "patched" / file).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "patched", dtype=torch.float32, attn_implementation="eager"
    )
    with pytest.raises(ValueError, match="not patched"):
        freqkv.unpatch(loaded)
    freqkv.patch(loaded)
    assert torch.equal(generate(loaded), expected["ragged"])


def test_weights_loaded_into_a_patched_model_are_used(expected):
    other = patched(seed=1)
    before = generate(other)
    assert not torch.equal(before, expected["ragged"])
    other.load_state_dict(tiny_llama().state_dict())
    assert torch.equal(generate(other), expected["ragged"])


# Threads


@pytest.mark.parametrize("numbers", [None, CONFIG])
def test_threads_that_share_a_model(numbers, model, expected):
    """With a cache each, of one kind of batch and of both at a time."""
    shared = copy.deepcopy(model)
    freqkv.patch(shared, numbers)
    kinds = ["uniform", "ragged", "ragged", "uniform", "ragged"] * 3
    call = {} if numbers is None else {CACHE: None}
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda kind: generate(shared, kind, **call), kinds))
    for kind, output in zip(kinds, outputs, strict=True):
        assert torch.equal(output, expected[kind])


def test_a_thread_that_fails_does_not_disturb_another(model, expected):
    def fail(_):
        with pytest.raises(IndexError):
            model(tokens(3 * N) + 1000, **{CACHE: FreqKVCache(model.config, CONFIG)})

    with ThreadPoolExecutor(2) as pool:
        failing = pool.map(fail, range(50))
        outputs = list(pool.map(lambda kind: generate(model, kind), [*BATCHES] * 2))
        list(failing)
    for kind, output in zip([*BATCHES] * 2, outputs, strict=True):
        assert torch.equal(output, expected[kind])


@pytest.mark.parametrize("compressor", [freqkv.low_pass_entries, freqkv.keep_attended])
def test_a_default_device_that_is_not_the_models(compressor, tmp_path):
    """Every tensor is made where it belongs: on "meta", none would have values."""
    ids, mask = padded(rows_of([7, 40, 90]))
    new = tokens(5, 3)
    wide = torch.cat([mask, torch.ones_like(new)], 1)
    hidden = torch.cat([wide, torch.ones_like(new)], 1)
    hidden[1, -8:-5] = 0  # rows that ended early
    outcomes = []
    for device in ("cpu", "meta"):
        model = tiny_llama(attention="eager")
        with torch.device(device), torch.no_grad():
            freqkv.patch(model)
            cache = FreqKVCache(model.config, window=24, compressor=compressor)
            cache.activate_past_recording()
            logits = [model(ids, attention_mask=mask, **{CACHE: cache}).logits]
            logits.append(model(new, attention_mask=wide, **{CACHE: cache}).logits)
            logits.append(model(new, attention_mask=hidden, **{CACHE: cache}).logits)
            cache.crop(-2)
            cache.save(tmp_path / "cache", model)
            loaded = FreqKVCache.load(tmp_path / "cache", model)
            logits.append(model(new, **{CACHE: loaded}).logits)
            with freqkv.patch(model, window=24, compressor=compressor):
                logits.append(model(ids, attention_mask=mask, use_cache=False).logits)
        outcomes.append(logits)
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))
