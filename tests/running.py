"""Feeding models: in calls of any length, and rows of different length."""

from __future__ import annotations

import torch
from models import tokens
from torch import nn

from freqkv.models.upstream import CACHE

__all__ = ["close", "difference", "in_float64", "padded", "rows_of", "stream"]


@torch.no_grad()
def stream(model, ids, cache, splits):
    """Logits of `ids` fed through `cache` in calls of the lengths in `splits`, then token by token."""
    outputs, start = [], 0
    for length in [*splits, *[1] * (ids.shape[1] - sum(splits))]:
        outputs.append(model(ids[:, start : start + length], **{CACHE: cache}).logits)
        start += length
    return torch.cat(outputs, 1)


def padded(rows, side="left", pad=0):
    """`input_ids` and `attention_mask` of rows of different length."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def rows_of(lengths, seed=0):
    """Random rows of these lengths."""
    return [tokens(length, seed=seed + i)[0] for i, length in enumerate(lengths)]


def difference(one, other):
    """The largest, relative to the largest value."""
    return ((one - other).abs().max() / other.abs().max()).item()


def close(logits, truth, bound=3e-4):
    """Whether they differ by no more than `bound`, relative to the largest; raises with the difference if not."""
    error = difference(logits, truth)
    assert error <= bound, error
    return True


class _Float64RMSNorm(nn.Module):
    """A norm in the dtype of its input; those of transformers are in float32 whatever that is."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def in_float64(model):
    """A Llama in float64, its norms as well."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, _Float64RMSNorm(child))
    return model.double()
