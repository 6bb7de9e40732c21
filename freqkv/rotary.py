"""Rotary embeddings: the table of all slots, its inverse, and finding out how a layer rotates what it caches.

A cached key is stored rotated at its slot. A fold needs it unrotated, and the result rotated at new slots; both come
from one table of `window` rows, computed by the model's own rotary module.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from freqkv.models.modules import shallow_copy
from freqkv.models.upstream import FREQUENCIES, ORIGINAL_FREQUENCIES, SINUSOIDS

__all__ = [
    "KeyRotation",
    "SlotTable",
    "TableVersion",
    "pristine",
    "sinusoid_table",
    "slot_table",
]

Pairing = Literal["half", "interleaved"]
Stream = Literal["keys", "values"]
Native = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class KeyRotation:
    """How an attention layer rotates what it caches.

    Attributes
    ----------
    stream : "keys" or "values"
        Which of the two tensors that it hands to `update` is rotated. Multi-head latent attention (DeepSeek) passes
        `(latent, rotated key)`, so that it is the second.
    pairing : "half" or "interleaved"
        Whether channel i rotates with channel `i + dims / 2` (Llama) or with its neighbour (GPT-J).
    dims : int
        Channels that are rotated, the first ones of each head; the others pass.
    reverse : bool
        Whether it turns the other way round (NanoChat).
    """

    stream: Stream
    pairing: Pairing
    dims: int
    reverse: bool = False

    def channels(self, pairs: int) -> tuple[slice, slice]:
        """The first channel of each pair, and the second."""
        if self.pairing == "half":
            return slice(0, pairs), slice(pairs, 2 * pairs)
        return slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)

    def __str__(self) -> str:
        what = "keys" if self.stream == "keys" else "the second of the cached tensors"
        reverse = ", reversed" if self.reverse else ""
        return f"{what} rotated in {self.dims} channels, {self.pairing} pairing{reverse}"


@dataclass(frozen=True)
class SlotTable:
    """What a rotary module returns for slots `0 .. n-1`.

    Attributes
    ----------
    native : Tensor or tuple of Tensor
        As the module returns it and attention layers take it: `(cos, sin)` (GPT-J: `(sin, cos)`) of `(..., n, width)`
        float32, or one complex tensor. Attention scaling (yarn, longrope) is part of it.
    cos, sin : Tensor
        One column a pair of channels, `(n, pairs)` float32, of the same scale.
    """

    native: Native | None
    cos: Tensor
    sin: Tensor
    _cast: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def cos_sin(self, how: KeyRotation, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cos, one column for each of `size` channels, and sin, one for each pair, of a rotation and of its inverse."""
        key = how.pairing, how.reverse, size, dtype
        tables: tuple[Tensor, Tensor, Tensor, Tensor] | None = self._cast.get(key)
        if tables is None:
            with torch.inference_mode(False):  # tables outlive the call
                cos, sin = self.cos.to(dtype), self.sin.to(dtype)
                if how.reverse:
                    sin = -sin
                norm = cos * cos + sin * sin  # not quite 1, and the square of the attention scaling where there is one

                def wide(cos: Tensor) -> Tensor:  # channels that are not rotated stay as they are
                    columns = cos.new_ones(cos.shape[0], size)
                    for channels in how.channels(cos.shape[-1]):
                        columns[:, channels] = cos
                    return columns

                tables = self._cast[key] = wide(cos), sin, wide(cos / norm), -sin / norm
        return tables

    def embeddings(self, rows: slice | Tensor, dtype: torch.dtype) -> Native:
        """`native` for the slots `rows`; real tables in `dtype`, complex ones as they are."""
        native = self._cast.get(dtype)
        if native is None:
            assert self.native is not None
            with torch.inference_mode(False):  # tables outlive the call
                native = tuple(t if t.is_complex() else t.to(dtype) for t in _tensors(self.native))
            self._cast[dtype] = native
        if isinstance(rows, slice):
            rows_of = tuple(t.narrow(-2, rows.start, rows.stop - rows.start) for t in native)
        elif rows.ndim == 1:
            rows_of = tuple(t[..., rows, :] for t in native)
        else:  # (batch, tokens): the table's own axis of one row gives way to theirs
            rows_of = tuple(t.squeeze(-3)[..., rows, :] for t in native)
        return rows_of[0] if isinstance(self.native, Tensor) else rows_of


def slot_table(rotary: nn.Module, slots: int, device: torch.device, layer_type: str | None = None) -> SlotTable:
    """The table of slots `0 .. slots-1`, from the model's own rotary module.

    RoPE types whose frequencies depend on the length (dynamic, longrope) take those of a sequence of `slots` tokens.

    Parameters
    ----------
    rotary : nn.Module
        Called as `rotary(x, position_ids)`, or `rotary(x, position_ids, layer_type)` where it has a table for each.
    """
    # Tables outlive the call, and inference tensors could not enter a graph later.
    with torch.inference_mode(False), torch.no_grad():
        rotary = pristine(rotary)
        for name, buffer in rotary.named_buffers():
            if name.endswith(SINUSOIDS):
                _check_rows(buffer, slots)
        origin = next((b.device for b in rotary.buffers()), device)
        positions = torch.arange(slots, device=origin)[None]
        if hasattr(rotary, "mrope_section"):  # text stands at the same position on all three axes
            positions = positions.expand(3, 1, slots)
        device = origin if device.type == "meta" else device
        hidden = torch.zeros(1, 1, dtype=torch.float32, device=origin)
        native = rotary(hidden, positions) if layer_type is None else rotary(hidden, positions, layer_type)
        if isinstance(native, Tensor):
            native = native.to(device)
            if not native.is_complex():
                raise ValueError(
                    f"{type(rotary).__name__} returns one real tensor, neither (cos, sin) nor a complex one"
                )
            rows = native.flatten(0, -3)[0]
            return SlotTable(native, rows.real.float().contiguous(), rows.imag.float().contiguous())
        tensors = tuple(t.to(device) for t in native)
        cos, sin = (t.flatten(0, -3)[0].float() for t in tensors)
        if not cos[0].any():  # slot 0 turns nothing: what is zero there is the sine
            cos, sin = sin, cos
        return SlotTable(tensors, *_one_column_a_pair(cos, sin))


def pristine(rotary: nn.Module) -> nn.Module:
    """A copy of a rotary module, as it was before longer inputs changed its frequencies, where its RoPE type does that."""
    with torch.inference_mode(False), torch.no_grad():
        if any(buffer.is_meta for buffer in rotary.buffers()):  # without weights: all follows from the configuration
            return type(rotary)(rotary.config)
        new: Any = shallow_copy(rotary)
        for name, buffer in list(new._buffers.items()):
            new._buffers[name] = None if buffer is None else buffer.clone()
        for prefix in _kinds(rotary):
            if changes_with_length(rotary, prefix):
                original = getattr(new, f"{prefix}{ORIGINAL_FREQUENCIES}")
                setattr(new, f"{prefix}{FREQUENCIES}", original.clone())
                setattr(new, f"{prefix}max_seq_len_cached", new.original_max_seq_len)
        return new  # type: ignore[no-any-return]


def _kinds(rotary: nn.Module) -> list[str]:
    """What stands before the names of its buffers: nothing, or the types of layers that have tables of their own."""
    names = [name for name, _ in rotary.named_buffers(recurse=False, remove_duplicate=False)]
    return [name.removesuffix(ORIGINAL_FREQUENCIES) for name in names if name.endswith(ORIGINAL_FREQUENCIES)]


def changes_with_length(rotary: nn.Module, prefix: str = "") -> bool:
    """Whether calling it with longer inputs changes its frequencies (dynamic and longrope)."""
    kind = getattr(rotary, "rope_type", "")
    if isinstance(kind, Mapping):
        kind = kind.get(prefix.rstrip("_"), "")
    return "dynamic" in kind or kind == "longrope"


class TableVersion:
    """What the tables of a rotary module follow from: equal as long as they need not be made anew.

    These are its buffers, each with the number of writes to it, and its scalings, without those that its RoPE type changes by
    itself; and its forward. They are those of `model.to(...)`, of loaders that fill in what was lost, and of users.
    """

    def __init__(self, rotary: nn.Module | Tensor) -> None:
        if isinstance(rotary, Tensor):
            self.tensors: list[Tensor] = [rotary]
            self.others: list[Any] = [_writes(rotary)]
            return
        own = [f"{prefix}{FREQUENCIES}" for prefix in _kinds(rotary) if changes_with_length(rotary, prefix)]
        # Both names may be of one tensor.
        buffers = [buffer for name, buffer in rotary.named_buffers(remove_duplicate=False) if name not in own]
        scalings = [] if own else [value for name, value in vars(rotary).items() if name.endswith("attention_scaling")]
        self.tensors = buffers
        self.others = [rotary.forward, *scalings, *map(_writes, buffers)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TableVersion) or self.others != other.others:
            return False
        return len(self.tensors) == len(other.tensors) and all(map(operator.is_, self.tensors, other.tensors))

    __hash__ = None  # type: ignore[assignment]


def _writes(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def sinusoid_table(buffer: Tensor, slots: int, device: torch.device) -> SlotTable:
    """The table of a model that keeps `[sin | cos]` of all positions in a buffer (GPT-J, CodeGen).

    Raises
    ------
    ValueError
        If it has fewer than `slots` rows.
    """
    _check_rows(buffer, slots)
    with torch.inference_mode(False):
        sin, cos = buffer[:slots].to(device).float().clone().chunk(2, dim=-1)
    return SlotTable(None, cos, sin)


def _check_rows(buffer: Tensor, slots: int) -> None:
    if buffer.shape[0] < slots:
        raise ValueError(f"the model has positions for {buffer.shape[0]} slots only: window={slots} must not be larger")


def _one_column_a_pair(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables are laid out `[pairs | pairs]` (Llama), each pair's column twice in a row (Cohere), or once (gpt-oss)."""
    pairs = cos.shape[-1] // 2
    for columns in (slice(0, pairs), slice(0, None, 2)):
        others = slice(pairs, None) if columns.step is None else slice(1, None, 2)
        if pairs and all(torch.equal(t[:, columns], t[:, others]) for t in (cos, sin)):
            return cos[:, columns].contiguous(), sin[:, columns].contiguous()
    return cos, sin


def _tensors(native: Native) -> tuple[Tensor, ...]:
    return (native,) if isinstance(native, Tensor) else native
