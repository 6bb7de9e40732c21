"""Tensors of a layer that grow along the sequence, and who may write to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Buffers", "outside_inference_mode", "scatter"]

# Slots that buffers have at first, where the window has as many; then they double, up to the window.
FIRST_CAPACITY = 64


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """For tensors that are kept: those made under `torch.inference_mode` could not be written to after it."""
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def scatter(buffer: Tensor, states: Tensor, to: Tensor, taken: Tensor | None) -> None:
    """Write the rows `taken` of `(rows * heads * width, dim)` to the rows `to` of `(batch * heads * slots, dim)`."""
    states = states.reshape(-1, states.shape[-1])
    buffer.view(-1, buffer.shape[-1]).index_copy_(0, to, states if taken is None else states[taken])


class Buffers:
    """Keys, values and, where they are wanted, queries of one layer.

    Parameters
    ----------
    window : int
        Slots that keys and values have at most.
    whole : bool
        Whether they have them all from the first token on.

    Attributes
    ----------
    tensors : dict of str to Tensor
        `keys` and `values` `(batch, kv_heads, slots, head_dim)`, `queries` `(batch, heads, wanted, head_dim)`.
    owned : bool
        Whether keys and values may be written to; else they may be part of a graph.
    """

    def __init__(self, window: int, whole: bool) -> None:
        self.window, self.whole = window, whole
        self.tensors: dict[str, Tensor] = {}
        self.owned = False

    @property
    def capacity(self) -> int:
        """Slots of keys and values."""
        keys = self.tensors.get("keys")
        return 0 if keys is None else keys.shape[2]

    def capacity_for(self, slots: int) -> int:
        """How many slots buffers are made with where as many are needed."""
        return self.window if self.whole else min(self.window, max(FIRST_CAPACITY, 1 << (slots - 1).bit_length()))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold tensors of a graph, or of one call."""
        self.tensors.update(keys=keys, values=values)
        self.owned = False

    def fits(self, keys: Tensor, values: Tensor, batch: int, slots: int) -> bool:
        """Whether these states of `batch` rows can be written to slots below `slots` of what is held."""
        return self._takes("keys", keys, batch, slots) and self._takes("values", values, batch, slots)

    def make_room(self, keys: Tensor, values: Tensor, batch: int, held: int, slots: int) -> None:
        """Make keys and values of `batch` rows and at least `slots` slots, for such states; `held` entries are kept."""
        self.check(keys, values, batch if held else None)
        capacity = max(self.capacity_for(slots), min(self.capacity, self.window))
        grad, made = torch.is_grad_enabled(), {}
        for name, states in (("keys", keys), ("values", values)):
            shape = batch, states.shape[1], capacity, states.shape[3]
            with outside_inference_mode():
                made[name] = torch.zeros(shape, dtype=states.dtype, device=states.device)
            if held:
                entries = self.tensors[name][:, :, :held]
                made[name][:, :, :held] = entries if grad else entries.detach()
        self.tensors.update(made)
        self.owned = not grad

    def _takes(self, name: str, states: Tensor, batch: int, slots: int) -> bool:
        buffer = self.tensors.get(name)
        if buffer is None or not self.owned or buffer.is_inference():
            return False
        rows, heads, capacity, size = buffer.shape
        fits = rows == batch and capacity >= slots and (heads, size) == (states.shape[1], states.shape[3])
        return fits and buffer.dtype == states.dtype and buffer.device == states.device

    def check(self, keys: Tensor, values: Tensor, batch: int | None) -> None:
        """Raise ValueError where states do not go with what is held; `batch` is None if nothing is."""
        if batch is None:
            return
        for name, states in (("keys", keys), ("values", values)):
            held = self.tensors[name]
            for what, has, brings in (
                ("batch size", held.shape[0], batch),
                ("number of KV heads", held.shape[1], states.shape[1]),
                ("head size", held.shape[3], states.shape[3]),
                ("dtype", held.dtype, states.dtype),
                ("device", held.device, states.device),
            ):
                if has != brings:
                    raise ValueError(
                        f"this cache holds {name} with {what} {has}, the model brings {what} {brings}: a cache serves the "
                        "model and batch that filled it. Make a FreqKVCache of its own for each, or call reset()"
                    )

    def whole_on(self, batch: int, device: torch.device) -> bool:
        """Whether keys and values of `batch` rows have all slots of the window, on `device`, and may be written to."""
        keys = self.tensors.get("keys")
        if keys is None or not self.owned or keys.is_inference():
            return False
        return keys.shape[0] == batch and keys.shape[2] == self.window and keys.device == device

    def clear(self) -> bool:
        """Forget what is held. Returns whether the buffers stay."""
        if not self.owned or any(t.is_inference() for t in self.tensors.values()):
            self.tensors, self.owned = {}, False
            return False
        for tensor in self.tensors.values():
            # Rows that are shorter than others carry what lies behind their entries along, masked, but not if it is NaN.
            tensor.zero_()
        return True

    def take(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Have other rows."""
        with outside_inference_mode():
            self.tensors = {name: rows(tensor) for name, tensor in self.tensors.items()}
