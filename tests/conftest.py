from __future__ import annotations

import logging
from pathlib import Path

import hypothesis
import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from flash import flash_attn_func, flash_attn_varlen_func

# No deadlines and no random seeds: CI machines are slow and a failure must come back. Nothing is stored beside the tests.
hypothesis.settings.register_profile("freqkv", deadline=None, derandomize=True, database=None, max_examples=25)
hypothesis.settings.load_profile("freqkv")
torch.set_num_threads(1)  # tensors are tiny: more threads wait for each other


@pytest.fixture(autouse=True)
def deprecations_are_errors():
    """transformers logs many of its deprecations instead of warning."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    own = "Passing `generation_config` together with"  # what assisted decoding and pipelines do themselves
    deprecated = [m for m in messages if ("deprecat" in m or "will be removed" in m) and own not in m]
    assert not deprecated, deprecated


@pytest.fixture(scope="session")
def shipped() -> Path:
    """Folder of the model that ships with the project."""
    return Path(__file__).parent.parent / "examples" / "tiny_lm"


@pytest.fixture
def flash_attention(monkeypatch):
    """transformers' own flash-attention code runs, on stand-ins for the package's two functions."""
    functions = (flash_attn_func, flash_attn_varlen_func, None, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
