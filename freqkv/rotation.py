"""Rotation of what a layer caches, at its slots and back, and finding out how a layer rotates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from freqkv.rotary import KeyRotation, SlotTable, Stream
from freqkv.transform import compute_dtype

__all__ = ["SlotRotation", "find_rotation"]


@dataclass(frozen=True)
class SlotRotation:
    """How one layer rotates its (keys, values) at slots: one of the two, or neither.

    Parameters
    ----------
    table : SlotTable or None
        None for a layer that does not rotate.
    how : KeyRotation or None
        Likewise.
    scale : Tensor, optional
        `(head_dim,)`, by which the layer multiplies its keys once they are rotated (HunYuan's norm).
    """

    table: SlotTable | None
    how: KeyRotation | None
    scale: Tensor | None = None

    def rotate(self, pair: tuple[Tensor, Tensor], slot: int) -> tuple[Tensor, Tensor]:
        """Rotate keys and values `(..., n, head_dim)` at slots `slot .. slot + n - 1`; float32 (float64 stays float64)."""
        return self._applied(pair, slot, back=False)

    def unrotate(self, pair: tuple[Tensor, Tensor], slot: int) -> tuple[Tensor, Tensor]:
        """Inverse of :meth:`rotate`."""
        return self._applied(pair, slot, back=True)

    def _applied(self, pair: tuple[Tensor, Tensor], slot: int, back: bool) -> tuple[Tensor, Tensor]:
        stream = None if self.how is None else self.how.stream
        turned = self.unrotate_one if back else self.rotate_one
        keys, values = (
            turned(entries, slot) if stream == name else entries.to(compute_dtype(entries.dtype))
            for name, entries in (("keys", pair[0]), ("values", pair[1]))
        )
        return keys, values

    def rotate_one(self, entries: Tensor, slots: int | slice | Tensor) -> Tensor:
        """Rotate `(rows, heads, n, head_dim)` at slots from a number on, or at those of a tensor `(rows, n)`."""
        if self.how is None:
            return entries.to(compute_dtype(entries.dtype))
        rotated = self._turned(entries, *self._cos_sin(entries, slots, back=False))
        return rotated if self.scale is None else rotated * self.scale.to(rotated)

    def unrotate_one(self, entries: Tensor, slots: int | slice | Tensor) -> Tensor:
        """Inverse of :meth:`rotate_one`."""
        if self.how is None:
            return entries.to(compute_dtype(entries.dtype))
        cos, sin = self._cos_sin(entries, slots, back=True)
        if self.scale is not None:
            entries = entries.to(cos.dtype) / self.scale.to(cos)
        return self._turned(entries, cos, sin)

    def _cos_sin(self, entries: Tensor, slots: int | slice | Tensor, back: bool) -> tuple[Tensor, Tensor]:
        """Cos, one column a channel, and sin, one column a pair, of the rotation or of its inverse."""
        assert self.table is not None
        assert self.how is not None
        tables = self.table.cos_sin(self.how, entries.shape[-1], compute_dtype(entries.dtype))
        cos, sin = tables[2:] if back else tables[:2]
        if isinstance(slots, Tensor):
            return cos[slots][:, None], sin[slots][:, None]
        first = slots.start if isinstance(slots, slice) else slots
        return cos.narrow(0, first, entries.shape[-2]), sin.narrow(0, first, entries.shape[-2])

    def _turned(self, entries: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        entries = entries.to(cos.dtype)
        assert self.how is not None
        first, second = self.how.channels(sin.shape[-1])
        turned = entries * cos
        turned[..., first].addcmul_(entries[..., second], sin, value=-1)
        turned[..., second].addcmul_(entries[..., first], sin)
        return turned


def find_rotation(
    raw: tuple[Tensor, Tensor],
    rotated: tuple[Tensor, Tensor],
    table: SlotTable | None,
    slots: Tensor,
    scale: Tensor | None,
) -> KeyRotation | None:
    """Tell how a layer rotates from what it caches for the same tokens at slot 0 and at `slots`.

    Parameters
    ----------
    raw, rotated : tuple of Tensor
        What the layer hands to `update`, `(batch, heads, n, dim)` each: with all tokens at slot 0, where RoPE turns
        nothing, and with token i at `slots[i]`.
    table : SlotTable or None
        What it got its embeddings from.
    slots : Tensor
        `(n,)`, none of them 0.
    scale : Tensor or None
        See :class:`SlotRotation`.

    Returns
    -------
    KeyRotation or None
        None if positions make no difference: the layer does not rotate.

    Raises
    ------
    ValueError
        If no known rotation explains the difference to the rounding of its dtype, or all is zero.
    """
    streams: dict[Stream, tuple[Tensor, Tensor]] = {"keys": (raw[0], rotated[0]), "values": (raw[1], rotated[1])}
    moved = [name for name, (before, after) in streams.items() if not torch.equal(before, after)]
    if not moved:
        if table is not None and not all(bool(t.any()) for t in raw):
            raise ValueError("what it caches is all zero, and shows no rotation: load the weights first")
        return None
    if len(moved) == 2 or table is None:
        raise ValueError("both cached tensors depend on positions" if table is not None else "no rotary table is known")
    before, after = streams[moved[0]]
    dims = 2 * table.cos.shape[-1]
    if dims > before.shape[-1]:
        raise ValueError(f"the rotary module turns {dims} channels, the cached tensor has {before.shape[-1]}")
    dtype = compute_dtype(before.dtype)
    cos, sin = table.cos.to(dtype), table.sin.to(dtype)
    size = (cos[0] ** 2 + sin[0] ** 2).sqrt()  # `raw` holds the attention scaling already
    at_slots = SlotTable(None, cos[slots] / size, sin[slots] / size)
    scale = torch.ones((), dtype=dtype, device=before.device) if scale is None else scale.to(dtype)
    found: dict[float, KeyRotation] = {}
    for pairing in ("half", "interleaved"):
        for reverse in (False, True):
            how = KeyRotation(moved[0], pairing, dims, reverse)  # type: ignore[arg-type]
            error: Any = SlotRotation(at_slots, how).rotate_one(before / scale, 0) * scale - after
            found[(error.norm() / after.to(dtype).norm()).item()] = how
    best = min(found)
    # Some modules rotate in float32 whatever the model's dtype. What another rotation, or a norm after it, does to the keys
    # is larger by orders of magnitude.
    if not best <= max(2 * torch.finfo(after.dtype).eps, 1e-5):
        raise ValueError(
            f"neither half nor interleaved pairing explains them: off by {best:.1e} (a norm behind RoPE needs a rule with "
            "key_scale, see freqkv/README.md)"
        )
    return found[best]
