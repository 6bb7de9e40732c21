"""Rotary embeddings: the table of all slots, its inverse, and finding out how a layer rotates its keys.

A cached key is stored rotated at its slot. A fold needs it unrotated, and the result rotated at new slots; both come
from one table of `window` rows, computed by the model's own rotary module.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from freqkv.transform import compute_dtype

__all__ = ["Pairing", "SlotRotation", "find_pairing", "slot_table"]

Pairing = Literal["half", "interleaved"]
PAIRINGS: tuple[Pairing, ...] = ("half", "interleaved")


def slot_table(rotary: nn.Module, slots: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`cos` and `sin` of slots `0..slots-1`, `(slots, dims)` each, float32, from the model's own rotary module.

    Attention scaling (yarn, longrope) is part of both. RoPE types whose frequencies depend on the length (dynamic,
    longrope) take those of a sequence of `slots` tokens.
    """
    # Calling it may change buffers (dynamic RoPE types): a copy leaves the model as it was. Tables outlive the call, and
    # inference tensors could not enter a graph later.
    with torch.inference_mode(False), torch.no_grad():
        rotary = copy.deepcopy(rotary)
        if hasattr(rotary, "original_inv_freq"):  # undo what longer inputs made of the frequencies
            pristine: Any = rotary
            pristine.inv_freq = pristine.original_inv_freq.clone()
            pristine.max_seq_len_cached = pristine.original_max_seq_len
        origin = next((b.device for b in rotary.buffers() if b.device.type != "meta"), device)
        positions = torch.arange(slots, device=origin)[None]
        cos, sin = rotary(torch.zeros(1, 1, dtype=torch.float32, device=origin), positions)
        return cos[0].to(device), sin[0].to(device)


@dataclass(frozen=True)
class SlotRotation:
    """Rotation of keys at their slots, and back.

    Parameters
    ----------
    pairing : "half" or "interleaved"
        Whether channel i rotates with channel `i + dims / 2` (Llama) or with its neighbour (GPT-J).
    cos, sin : Tensor
        `(slots, dims)` float32, both channels of a pair holding the same value. Only the first `dims` channels of a
        key are rotated. A common scale of both is inverted exactly.
    """

    pairing: Pairing
    cos: Tensor
    sin: Tensor
    _cast: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def embeddings(self, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`(cos, sin)` of slots `[start, stop)` as decoder layers take them: `(1, stop - start, dims)` of `dtype`."""
        cos, sin = self._tables(dtype)
        return cos[None, start:stop], sin[None, start:stop]

    def rotate(self, keys: Tensor, slot: int) -> Tensor:
        """Rotate keys `(..., n, head_dim)` at slots `slot .. slot + n - 1`; float32 (float64 stays float64)."""
        cos, sin = self._rows(keys, slot)
        return self._turn(keys, cos, sin)

    def unrotate(self, keys: Tensor, slot: int) -> Tensor:
        """Inverse of :meth:`rotate`."""
        cos, sin = self._rows(keys, slot)
        norm = cos * cos + sin * sin  # not quite 1, and the square of the attention scaling where there is one
        return self._turn(keys, cos / norm, -sin / norm)

    def _rows(self, keys: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        rows = slice(slot, slot + keys.shape[-2])
        cos, sin = self._tables(compute_dtype(keys.dtype))
        return cos[rows], sin[rows]

    def _tables(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        tables = self._cast.get(dtype)
        if tables is None:
            with torch.inference_mode(False):  # they outlive the call
                tables = self._cast[dtype] = self.cos.to(dtype), self.sin.to(dtype)
        return tables

    def _turn(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        keys = keys.to(cos.dtype)
        dims = cos.shape[-1]
        rotated, rest = keys[..., :dims], keys[..., dims:]
        rotated = rotated * cos + _quarter_turn(rotated, self.pairing) * sin
        return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated


def _quarter_turn(x: Tensor, pairing: Pairing) -> Tensor:
    if pairing == "half":
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def find_pairing(raw: Tensor, rotated: Tensor, cos: Tensor, sin: Tensor) -> Pairing | None:
    """Tell how a layer rotates its keys from one set of keys without and with rotation.

    Parameters
    ----------
    raw, rotated : Tensor
        `(batch, heads, n, head_dim)` keys of the same tokens, replayed with identity embeddings (cos 1, sin 0) and with
        `cos, sin`.
    cos, sin : Tensor
        `(n, dims)`, as the layer got them, at slots that differ.

    Returns
    -------
    "half", "interleaved" or None
        None when neither explains `rotated` to the rounding of its dtype.
    """
    tolerance = torch.finfo(rotated.dtype).eps  # a layer that norms after RoPE is off by little more than this
    found: dict[float, Pairing] = {}
    for pairing in PAIRINGS:
        error: Any = SlotRotation(pairing, cos, sin).rotate(raw, 0) - rotated
        found[(error.norm() / rotated.to(error.dtype).norm()).item()] = pairing
    best = min(found)
    return found[best] if best <= tolerance else None
