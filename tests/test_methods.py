"""Replaced methods: a patched model is for torch, accelerate and Python what it is unpatched."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from models import tiny_llama, tokens
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, LlamaForCausalLM, StaticCache

import freqkv
from freqkv import FreqKVCache
from freqkv.models.modules import own_class
from freqkv.models.upstream import CACHE
from freqkv.patching.methods import replacements

N = 16


@pytest.fixture
def model():
    return tiny_llama(attention="sdpa", context=64)


@pytest.fixture(autouse=True)
def no_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def without(cache_class, model):
    if cache_class is None:
        return {"use_cache": False}
    length = {"max_cache_len": 32} if cache_class is StaticCache else {}
    return {CACHE: cache_class(config=model.config, **length)}


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_a_patched_model_can_be_exported(model, strict):
    ids = tokens(11)
    expected = model(ids, use_cache=False).logits
    freqkv.patch(model)
    program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=strict)
    assert torch.equal(program.module()(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("cache_class", [None, DynamicCache, StaticCache])
@torch.no_grad()
def test_a_patched_model_is_one_graph_without_freqkv_in_the_call(model, cache_class):
    ids = tokens(11)
    graphs = []
    for patched in (False, True):
        if patched:
            freqkv.patch(model)
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        graphs.append(compiled(ids, **without(cache_class, model)).logits)
        torch.compiler.reset()
    assert torch.equal(*graphs)


@pytest.mark.parametrize("numbers", [{}, {"window": N}])
def test_generate_compiles_whole_graphs_with_a_static_cache(model, numbers):
    """And none again: the graph of the first single token serves all others."""
    graphs = []

    def backend(graph, inputs, **options):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend)
    config._compile_all_devices = True
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static", "compile_config": config}
    expected = model.generate(tokens(7), **options)
    unpatched = len(graphs)
    assert unpatched == 1
    torch.compiler.reset()
    graphs.clear()
    del model._compiled_call  # transformers keeps it
    freqkv.patch(model, **numbers)
    assert torch.equal(model.generate(tokens(7), **options), expected)
    assert len(graphs) == unpatched


@torch.no_grad()
def test_replicas_compute_with_their_own_weights(model):
    """As nn.DataParallel makes them for each device, here with weights of zero; then with FreqKV in the call."""
    ids = tokens(2 * N)
    freqkv.patch(model)
    modules = list(model.modules())
    replicas = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        replica = replicas[id(module)]
        for name, child in module._modules.items():
            setattr(replica, name, replicas[id(child)])
        for name, weight in module._parameters.items():
            setattr(replica, name, None if weight is None else torch.zeros_like(weight))
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    replica = replicas[id(model)]
    assert not replica(ids, use_cache=False).logits.any()
    assert not replica(ids, **{CACHE: FreqKVCache(model.config, window=N)}).logits.any()
    assert model(ids, use_cache=False).logits.any()


@torch.no_grad()
def test_names_types_and_signatures_stay(model, tmp_path):
    plain = tiny_llama(attention="sdpa", context=64)
    freqkv.patch(model, window=N)
    for patched, module in zip(model.modules(), plain.modules(), strict=True):
        assert isinstance(patched, type(module))
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(patched), name) == getattr(type(module), name)
        assert inspect.signature(patched.forward) == inspect.signature(module.forward)
        assert own_class(patched) is type(module)
    assert repr(model) == repr(plain)
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM
    assert type(freqkv.patch(tiny_llama()).model) is type(model), "one class for all instances"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
@torch.no_grad()
def test_copies_are_patched_and_independent(model, copied):
    ids = tokens(3 * N)
    freqkv.patch(model, window=N)
    expected = model(ids, use_cache=False).logits
    if copied == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copied(model)
    assert type(other) is type(model)
    assert torch.equal(other(ids, use_cache=False).logits, expected)
    freqkv.unpatch(model)
    assert torch.equal(other(ids, use_cache=False).logits, expected)
    freqkv.unpatch(other)
    assert type(other) is LlamaForCausalLM
    assert torch.equal(other(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert not list(replacements(other))


@pytest.mark.parametrize("keep", [True, False])
@torch.no_grad()
def test_accelerate_wraps_and_unwraps_a_patched_model(model, keep):
    """Mixed precision wraps `forward`, and unwrapping follows `__wrapped__` down to what it takes for the original."""
    ids = tokens(3 * N)
    freqkv.patch(model, window=N)
    exact = model(ids, use_cache=False).logits
    with torch.autocast("cpu"):
        expected = model(ids, use_cache=False).logits.float()
    accelerator = Accelerator(cpu=True)
    accelerator.native_amp = True  # what mixed_precision="bf16" sets, which cannot be unset for the tests that follow
    wrapped = accelerator.prepare_model(model, evaluation_mode=True)
    assert torch.equal(wrapped(ids, use_cache=False).logits, expected)
    unwrapped = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=keep)
    assert torch.equal(unwrapped(ids, use_cache=False).logits, expected if keep else exact)
    accelerator.free_memory()


@pytest.mark.parametrize("order", ["hook first", "patch first", "both sides"])
@torch.no_grad()
def test_hooks_of_accelerate_are_kept(model, order):
    """As `device_map` sets them: a forward on the instance, with the one before it kept under another name."""

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    ids, attention = tokens(3 * N), model.model.layers[1].self_attn
    expected = model(ids, use_cache=False).logits
    before, after = Counting(), Counting()
    if order != "patch first":
        add_hook_to_module(attention, before)
    freqkv.patch(model, window=N)
    if order != "hook first":
        add_hook_to_module(attention, after, append=order == "both sides")
    compressed = model(ids, use_cache=False).logits
    assert not torch.allclose(compressed, expected)
    counts = before.calls, after.calls
    assert any(counts)
    freqkv.unpatch(model)
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert (before.calls > counts[0], after.calls > counts[1]) == (order != "patch first", order != "hook first")
    remove_hook_from_module(attention, recurse=True)
    assert torch.equal(model(ids, use_cache=False).logits, expected)


@torch.no_grad()
def test_a_class_that_another_library_derives_is_left_to_it(model):
    """As FSDP2 does with whatever it shards."""
    ids = tokens(3 * N)
    expected = model(ids, use_cache=False).logits
    freqkv.patch(model, window=N)
    compressed = model(ids, use_cache=False).logits
    attention = model.model.layers[0].self_attn
    attention.__class__ = derived = type("FSDPAttention", (type(attention),), {})
    assert torch.equal(model(ids, use_cache=False).logits, compressed)
    freqkv.unpatch(model)
    assert type(attention) is derived
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    freqkv.patch(model, window=N)
    assert type(attention) is derived
    assert torch.equal(model(ids, use_cache=False).logits, compressed)


@torch.no_grad()
def test_methods_that_are_replaced_on_the_class_are_heeded(monkeypatch):
    """As libraries of kernels do, also after a model of the class was patched."""
    freqkv.unpatch(freqkv.patch(tiny_llama()).model)
    calls = []
    for cls in (LlamaForCausalLM, type(tiny_llama().model.layers[0].self_attn)):

        def counted(self, *args, forward=cls.forward, **kwargs):
            calls.append(type(self).__name__)
            return forward(self, *args, **kwargs)

        counted.__signature__ = inspect.signature(cls.forward)
        monkeypatch.setattr(cls, "forward", counted)
    model = tiny_llama()
    freqkv.patch(model)
    for given in ({}, {CACHE: FreqKVCache(model.config, window=N)}):
        calls.clear()
        model(tokens(5), **given)
        assert calls == ["LlamaForCausalLM", "LlamaAttention", "LlamaAttention"]


@torch.no_grad()
def test_a_forward_that_the_instance_had_is_given_back():
    model = tiny_llama()
    own = model.model.layers[0].self_attn.forward
    model.model.layers[0].self_attn.forward = functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))
    before = model.model.layers[0].self_attn.forward
    freqkv.patch(model)
    freqkv.unpatch(model)
    assert model.model.layers[0].self_attn.__dict__["forward"] is before
