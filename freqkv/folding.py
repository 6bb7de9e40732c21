"""Folding: keys lose their rotation, a compressor takes the span, what is left is rotated at its new slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from freqkv.compressors import Compressor, Span, compress
from freqkv.rotation import SlotRotation
from freqkv.schedule import Fold
from freqkv.transform import full_precision

__all__ = ["Queries", "fold"]


@dataclass(frozen=True)
class Queries:
    """The last queries before a fold, `(rows, heads, m, head_dim)`, before RoPE, and by what the model scales their scores."""

    states: Tensor
    scaling: float


def fold(
    folds: Sequence[Fold],
    keys: Tensor,
    values: Tensor,
    rotation: SlotRotation,
    compressor: Compressor,
    layer_idx: int,
    queries: Queries | None,
    takes: bool | None = None,
    shared: Sequence[dict[Any, Any]] | None = None,
    is_first: bool = True,
) -> tuple[int, tuple[Tensor, Tensor]]:
    """What stands behind some slot once entries are folded.

    Parameters
    ----------
    folds : sequence of Fold
        One after the other.
    keys, values : Tensor
        `(rows, kv_heads, entries, head_dim)`, all entries of rows that are alike, rotated at their slots.
    takes : bool, optional
        Whether the compressor takes a Span.
    shared : sequence of dict, optional
        For each fold, what its compressor hands from layer to layer.
    is_first : bool
        Whether nothing was folded before these.

    Returns
    -------
    int
        The slot; what lies before it stays.
    tuple of Tensor
        Keys and values from there on, in their dtypes, in memory of their own.
    """
    start = min(fold.start for fold in folds)
    with full_precision(keys.device):
        raw = rotation.unrotate((keys[:, :, start:], values[:, :, start:]), start)
        for place, each in enumerate(folds):
            first, last = each.start - start, each.stop - start
            entries = raw[0][:, :, first:last], raw[1][:, :, first:last]
            handed = {} if shared is None else shared[place]
            span = Span(
                *entries,
                each.keep,
                layer_idx,
                each.start,
                shared=handed,
                following_keys=raw[0][:, :, last:],
                is_first=is_first,
                folds=len(folds),
            )
            if queries is not None:
                held = start + raw[0].shape[2]
                recent = queries.states[:, :, -held:]  # after a first fold, fewer may be left than there were queries
                span = dataclasses.replace(
                    span,
                    queries=recent.to(raw[0].dtype, copy=True),  # the buffer is written to again
                    query_start=held - recent.shape[2],  # they are the last tokens that entered
                    scaling=queries.scaling,
                    rotate=rotation.rotate_one,
                )
            kept = compress(compressor, span, takes)
            raw = (_spliced(raw[0], kept[0], first, last), _spliced(raw[1], kept[1], first, last))
        rotated = rotation.rotate(raw, start)
        return start, (rotated[0].to(keys.dtype), rotated[1].to(values.dtype))


def _spliced(entries: Tensor, kept: Tensor, first: int, last: int) -> Tensor:
    return torch.cat([entries[:, :, :first], kept.to(entries.dtype), entries[:, :, last:]], dim=2)
