"""What an attention module returned for the parts of a call, put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from freqkv.parts import Packing, Run

__all__ = ["joined", "spread_weights", "unpacked"]

Spread: TypeAlias = Callable[[Tensor], Tensor]


def joined(outputs: list[Any], spread: Spread | None = None) -> Any:
    """Outputs of parts that follow each other; `spread` is applied to attention weights."""
    if len(outputs) == 1 and spread is None:
        return outputs[0]
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs, dim=1)
    return torch.cat([output[0] for output in outputs], dim=1), *_extra_outputs(outputs, spread)


def unpacked(
    outputs: list[Any], selections: list[Run | Packing | None], hidden_states: Tensor, spread: Spread | None = None
) -> Any:
    """Outputs of packed parts, each token where it stood; zeros for padding."""
    if not outputs:  # nothing but padding
        return torch.zeros_like(hidden_states), None
    firsts = [output if isinstance(output, Tensor) else output[0] for output in outputs]
    together = firsts[0]
    if selections != [None]:
        together = together.new_zeros(*hidden_states.shape[:2], together.shape[-1])
        for selection, first in zip(selections, firsts, strict=True):
            assert isinstance(selection, Packing)  # a part that is the whole call is the only one
            selection.unpack(first, together)
    return together if isinstance(outputs[0], Tensor) else (together, *_extra_outputs(outputs, spread))


def _extra_outputs(outputs: list[Any], spread: Spread | None) -> Iterator[Any]:
    """What modules return beside their output.

    Attention weights of different parts are over different entries and do not add up to one matrix. What else there is
    (GPT-NeoX-Japanese: a bias) is the same for all.
    """
    for first, *others in zip(*(output[1:] for output in outputs), strict=True):
        same = all(other is first for other in others)
        is_weights = isinstance(first, Tensor) and first.ndim == 4
        yield (spread(first) if is_weights and spread is not None else first) if same else None


def spread_weights(rows: Sequence[int], tokens: int, token_mask: Tensor, weights: Tensor) -> Tensor:
    """Attention weights of padded rows over the columns of the call and of those before it; zeros for padding.

    Parameters
    ----------
    rows : sequence of int
        The rows of the batch that took part.
    tokens : int
        Columns of the call.
    token_mask : Tensor
        `(batch, columns)` bool: which of all columns are not padding.
    weights : Tensor
        `(rows, heads, width, entries)`: queries right-aligned, entries of a row in the order of its tokens.
    """
    spread = weights.new_zeros(token_mask.shape[0], weights.shape[1], tokens, token_mask.shape[1])
    for place, row in enumerate(rows):
        queries, keys = token_mask[row, -tokens:].nonzero()[:, 0], token_mask[row].nonzero()[:, 0]
        spread[row][:, queries[:, None], keys] = weights[place, :, weights.shape[2] - len(queries) :, : len(keys)]
    return spread
