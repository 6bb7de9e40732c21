"""Calls whose rows bring different numbers of tokens: which tokens of which rows go through the model together.

Padding takes no slot and enters no transform. A call is cut into rounds, in each of which every row that has tokens left
goes on to its own next fold. The tokens of a round are packed, right-aligned, and handed to the attention module as a
batch of the rows that take part; what it returns goes back to where the tokens stood.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from freqkv.schedule import Fold, Round, Schedule

__all__ = ["RaggedCall", "RaggedRound"]


class RaggedCall:
    """The rounds of one call.

    Parameters
    ----------
    schedule : Schedule
    seen : list of int
        Tokens that each row has in the cache.
    real : Tensor
        `(batch, tokens)` bool on the CPU: what of the call is no padding.
    """

    def __init__(self, schedule: Schedule, seen: list[int], real: Tensor) -> None:
        self.real = real
        self.seen = seen
        self.brings: list[int] = real.sum(1).tolist()
        self.rounds = [RaggedRound(self, cut) for cut in schedule.rounds(seen, self.brings)]

    @cached_property
    def columns(self) -> Tensor:
        """For each row, the columns of its tokens, in order, before those of its padding."""
        return torch.argsort((~self.real).to(torch.uint8), dim=1, stable=True)

    @property
    def after(self) -> list[int]:
        """Tokens that each row has once the call has entered."""
        return [seen + brings for seen, brings in zip(self.seen, self.brings, strict=True)]


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a round are found among the last columns of a call, on one device.

    Attributes
    ----------
    rows, columns : Tensor
        `(rows, 1)` and `(rows, width)`: the token at each place of the packed batch; any other token where there is none.
    real : Tensor
        `(rows, width)` bool: whether there is one.
    empty : bool
        Whether it has no token at all.
    """

    rows: Tensor
    columns: Tensor
    real: Tensor
    empty: bool

    def pack(self, value: Tensor, axis: int) -> Tensor:
        """The tokens of the round from an argument whose axis `axis` is that of tokens."""
        batch = 0 if axis % value.ndim == 1 or value.ndim == 4 else 1  # positions may be (axes, batch, tokens)
        moved = value.movedim((batch, axis), (0, 1))
        rows = self.rows if moved.shape[0] > 1 else torch.zeros_like(self.rows)
        packed = moved[rows, self.columns]
        return packed.movedim((0, 1), (batch, axis))

    def unpack(self, packed: Tensor, into: Tensor) -> None:
        """Write `(rows, width, dim)` to its places in `(batch, tokens, dim)`."""
        rows = self.rows.expand_as(self.columns)
        into[rows[self.real], self.columns[self.real]] = packed[self.real]


class RaggedRound:
    """One round, and the tensors that all layers need for it, made once."""

    def __init__(self, call: RaggedCall, cut: Round) -> None:
        self.call = call
        self.cut = cut
        self.batch, self.tokens = call.real.shape
        self.width = max(cut.counts)
        self.entries = max(cut.entries)
        self.everyone = len(cut.rows) == self.batch
        self.even = min(cut.counts) == self.width  # no row brings fewer tokens than another
        self._made: dict[Any, Any] = {}

    @property
    def fold(self) -> Fold | None:
        """What is squeezed before the tokens enter."""
        return self.cut.fold

    def made(self, key: Any, make: Any) -> Any:
        """What `make` returns, once for each key."""
        if key not in self._made:
            with torch.inference_mode(False):
                self._made[key] = make()
        return self._made[key]

    def packing(self, last: int, device: torch.device) -> Packing | None:
        """Where its tokens are among the last `last` columns of the call; None where it is the call as it is."""
        if self.everyone and self.even and self.width == last == self.tokens:
            return None
        return self.made(("packing", last, device), lambda: self._packing(last, device))  # type: ignore[no-any-return]

    def _packing(self, last: int, device: torch.device) -> Packing:
        rows = torch.tensor(self.cut.rows)[:, None]
        place, real = self._places(torch.tensor(self.cut.stops)[:, None])
        columns = self.call.columns[rows, place.clamp(min=0)] - (self.tokens - last)
        real = real & (columns >= 0)
        return Packing(rows.to(device), columns.clamp(min=0).to(device), real.to(device), not real.any())

    def _places(self, stops: Tensor) -> tuple[Tensor, Tensor]:
        """`(rows, width)`: numbers that end at `stops`, right-aligned, and which of them are tokens."""
        back = torch.arange(self.width - 1, -1, -1)
        counts = torch.tensor(self.cut.counts)[:, None]
        return stops - 1 - back, (back < counts).expand(len(self.cut.rows), self.width)

    def slots(self, device: torch.device) -> Tensor:
        """`(rows, width)`: the slot of each token, 0 where there is none."""

        def make() -> Tensor:
            slots, _ = self._places(torch.tensor(self.cut.entries)[:, None])
            return slots.clamp(min=0).to(device)

        return self.made(("slots", device), make)  # type: ignore[no-any-return]

    def writes(self, heads: int, window: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Where all tokens go: rows of the buffer `(batch * heads * window, dim)`, and the rows of the packed states
        `(rows * heads * width, dim)` that go there; None for all of them in their order.
        """

        def make() -> tuple[Tensor, Tensor | None]:
            slots, real = self._places(torch.tensor(self.cut.entries)[:, None])
            sequences = torch.tensor(self.cut.rows)[:, None, None] * heads + torch.arange(heads)[None, :, None]
            to = sequences * window + slots[:, None]
            if self.even:
                return to.flatten().to(device), None
            real = real[:, None].expand(-1, heads, -1)
            return to[real].to(device), real.flatten().nonzero()[:, 0].to(device)

        return self.made(("writes", heads, window, device), make)  # type: ignore[no-any-return]

    def rows(self, device: torch.device) -> Tensor:
        """The rows that take part."""
        return self.made(("rows", device), lambda: torch.tensor(self.cut.rows, device=device))  # type: ignore[no-any-return]

    def folding(self, device: torch.device) -> Tensor:
        """The rows that are folded first."""

        def make() -> Tensor:
            return torch.tensor([self.cut.rows[place] for place in self.cut.folding], device=device)

        return self.made(("folding", device), make)  # type: ignore[no-any-return]

    def aligned(self, device: torch.device) -> Tensor:
        """`(rows, entries)`: slots in an order that puts the last entry of each row last."""

        def make() -> Tensor:
            last = torch.tensor(self.cut.entries, device=device)[:, None]
            return (torch.arange(self.entries, device=device) - (self.entries - last)).clamp(min=0)

        return self.made(("aligned", device), make)  # type: ignore[no-any-return]
