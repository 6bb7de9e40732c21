"""Queries of an attention module, for compressors that ask for them.

They are had where every family passes them: at transformers' attention interface. A module is run on a shallow copy of it that
goes by another attention implementation, which records the queries and delegates to the one that was chosen.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeAlias

from torch import Tensor, nn

from freqkv.errors import UnsupportedModelError
from freqkv.models.layers import AttentionLayer
from freqkv.models.modules import shallow_copy
from freqkv.models.upstream import (
    ATTENTION_REGISTRY,
    EAGER_ATTENTION,
    RECORDER,
    config_with_attention,
    recording_attention,
)
from freqkv.patching.methods import Method

__all__ = ["check_gives_queries", "recording"]

Record: TypeAlias = Callable[[Tensor, float], None]


def check_gives_queries(layer: AttentionLayer, compressor: str) -> None:
    """Raise UnsupportedModelError where the queries of a module cannot be had before RoPE."""
    code = getattr(layer.forward_function(), "__code__", None)
    reason = None
    if layer.serves_several:
        reason = "serves several layers of the cache"
    elif code is None or ATTENTION_REGISTRY not in code.co_names:
        reason = "does not attend through transformers' attention interface"
    elif layer.rotation is not None and layer.rotation.stream != "keys":
        reason = "caches a latent vector, in another space than its queries (multi-head latent attention)"
    elif layer.rule.key_scale is not None:
        reason = "multiplies what it rotated by weights (a norm behind RoPE)"
    if reason is not None:
        raise UnsupportedModelError(
            f"compressor {compressor} asks for queries, but {layer.name} {reason}. Use a compressor of keys and values"
        )


def recording(original: Method, config: Any, record: Record) -> Method:
    """A module's forward that hands its queries to `record(query_states, scaling)`.

    Parameters
    ----------
    original : callable
        The forward, bound to the module.
    config : PreTrainedConfig
        Its configuration.
    """
    function, module = _unbound(original)
    attention = config._attn_implementation
    copy: Any = shallow_copy(module)
    eager = inspect.unwrap(function).__globals__.get(EAGER_ATTENTION)  # type: ignore[attr-defined]
    copy.__dict__["config"] = config_with_attention(config, recording_attention(attention))
    copy.__dict__[RECORDER] = record, eager
    return functools.partial(function, copy)


def _unbound(method: Method) -> tuple[Method, nn.Module]:
    if isinstance(method, functools.partial):
        return method.func, method.args[0]
    assert isinstance(method, MethodType)
    return method.__func__, method.__self__  # type: ignore[return-value]
