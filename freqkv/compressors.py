"""What squeezes a span of the cache: functions `(keys, values, keep) -> (keys, values)`.

A compressor gets the entries of one fold, keys *before* RoPE and values, `(batch, heads, n, head_dim)` each (the two
head sizes may differ), in float32 (float64 for float64 models), and returns `keep` entries of each in their place. It
must not look at anything else: what is squeezed, and when, is the schedule's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor
from torch.nn import functional

from freqkv.transform import low_pass

__all__ = ["Compressor", "check_compressor", "compressor_name", "keep_recent", "low_pass_entries", "mean_pool"]

Compressor: TypeAlias = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def low_pass_entries(keys: Tensor, values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """FreqKV: keep the lowest frequencies of each head and channel (arXiv 2505.00570, section 3.2)."""
    return low_pass(keys, keep, dim=-2), low_pass(values, keep, dim=-2)


def keep_recent(keys: Tensor, values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Keep the last `keep` entries: behind sink tokens, StreamingLLM's rule (arXiv 2309.17453)."""
    return keys[..., -keep:, :], values[..., -keep:, :]


def mean_pool(keys: Tensor, values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Average `keep` runs of neighbouring entries, each n / keep long (overlapping by one where that is no integer)."""

    def pool(x: Tensor) -> Tensor:
        runs = functional.adaptive_avg_pool1d(x.flatten(0, 1).transpose(1, 2), keep)  # (batch * heads, head_dim, keep)
        return runs.transpose(1, 2).reshape(*x.shape[:2], keep, x.shape[-1])

    return pool(keys), pool(values)


def check_compressor(compressor: Compressor) -> Compressor:
    """Raise TypeError where a compressor cannot be called."""
    if not callable(compressor):
        raise TypeError(f"compressor is a function (keys, values, keep) -> (keys, values), got {compressor!r}")
    return compressor


def compressor_name(compressor: Compressor) -> str:
    """What messages call it."""
    return getattr(compressor, "__name__", repr(compressor))
