"""The order of the modules: each imports only from those before it, at its top; and what importing the library does."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import freqkv

PACKAGE = Path(freqkv.__file__).parent
# From the ground up. A module may import those before it.
MODULES = """
version errors transform schedule
models models.upstream models.modules models.rules models.adapters models.kinds models.states
rotary rotation parts padding history compressors selection config settings presets
folding buffers rollback entries layer tracked hiding forward compiled
models.observation models.calibration models.layers models.analysis models.support models.fingerprint
files session cache
evaluation.text evaluation.losses evaluation.intervals evaluation.wordings evaluation.tasks evaluation.asking evaluation.methods
evaluation.records evaluation
patching patching.methods patching.masks patching.shared_kv patching.right_padding patching.outputs
patching.tables patching.queries patching.state patching.inputs patching.attention patching.decoder
patching.generation patching.handle
recommendation
"""
ORDER = MODULES.split()
OPTIONAL = {"deepspeed"}  # imported where a model brings it along
LINES, CLASS_LINES = 350, 250


def source(name):
    path = PACKAGE.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def tree(name):
    return ast.parse(source(name).read_text())


def test_all_modules_are_in_the_order():
    there = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
    } - {"__init__"}
    assert there == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_downwards_and_stand_at_the_top(name):
    module = tree(name)
    before = {f"freqkv.{other}" for other in ORDER[: ORDER.index(name)]}
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            origins = [node.module]
            if f"{node.module}.{node.names[0].name}" in before or node.module == "freqkv":
                origins = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            origins = [alias.name for alias in node.names]
        else:
            continue
        for origin in origins:
            if origin.split(".")[0] == "freqkv":
                assert origin in before, f"line {node.lineno} imports upwards"
            assert node in module.body or origin in OPTIONAL, f"line {node.lineno} imports {origin} inside something"


@pytest.mark.parametrize("name", ORDER)
def test_files_and_classes_are_read_in_one_sitting(name):
    assert len(source(name).read_text().splitlines()) <= LINES
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno + 1 <= CLASS_LINES, node.name


def test_importing_loads_nothing_optional_and_changes_nothing():
    """What transformers loads by itself does not count."""
    code = """
import sys
import accelerate, scipy, torch, transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
before = set(sys.modules)
threads, grad, dtype = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
import freqkv, freqkv.evaluation
assert (threads, grad, dtype) == (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    optional = "bitsandbytes datasets deepspeed hypothesis lm_eval matplotlib pandas peft pytest torchao trl"
    assert not set(optional.split()) & set(done.stdout.split())
    assert "freqkv" in done.stdout.split()
    assert "freqkv" not in done.stderr


def test_public_names_are_sorted_and_there():
    assert freqkv.__all__ == sorted(freqkv.__all__)
    assert all(hasattr(freqkv, name) for name in freqkv.__all__)
