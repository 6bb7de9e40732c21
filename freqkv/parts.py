"""Parts of a call: the tokens that go through a layer together, because no fold comes between them.

Padding takes no slot and enters no transform, so that rows of a batch may be at different slots. In each part, every row that
has tokens left goes on to its own next fold. A batch whose rows are all alike is the case where the counts are equal: its
parts are slices, those of other batches are packed, right-aligned, and handed to the attention module as a batch of the rows
that take part.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from freqkv.schedule import Fold, Schedule

__all__ = ["Call", "Packing", "Part", "Run"]

Made = TypeVar("Made")


class Call:
    """The tokens that one call brings.

    Parameters
    ----------
    before : tuple of int
        Tokens that each row has in the cache.
    tokens : int
        Columns of the call, padding included.
    token_mask : Tensor, optional
        `(batch, tokens)` bool on the CPU, True where not padding; None where nothing is.
    shared : dict, optional
        What compressors hand from layer to layer, see :meth:`Part.shared`; empty where the layers have one call in common.
    """

    def __init__(
        self,
        before: tuple[int, ...],
        tokens: int,
        token_mask: Tensor | None = None,
        shared: MutableMapping[Any, Any] | None = None,
    ) -> None:
        self.shared = {} if shared is None else shared
        self.before = before
        self.batch = len(before)
        self.tokens = tokens
        self.token_mask = token_mask
        self.counts: tuple[int, ...] = (
            (tokens,) * self.batch if token_mask is None else tuple(token_mask.sum(1).tolist())
        )
        self.uniform = token_mask is None and before.count(before[0]) == self.batch

    @cached_property
    def columns(self) -> Tensor:
        """`(batch, tokens)`: for each row, the columns of its tokens, in order, before those of its padding."""
        if self.token_mask is None:
            return torch.arange(self.tokens, device="cpu").expand(self.batch, -1)
        return torch.argsort((~self.token_mask).to(torch.uint8), dim=1, stable=True)

    @cached_property
    def after(self) -> tuple[int, ...]:
        """Tokens that each row has once the call has entered."""
        return tuple(before + count for before, count in zip(self.before, self.counts, strict=True))

    def parts(self, schedule: Schedule) -> list[Part]:
        """What the call is cut into for layers of this schedule."""
        if self.uniform:
            return self._uniform_parts(schedule)
        parts: list[Part] = []
        done = [0] * self.batch
        while rows := tuple(row for row in range(self.batch) if done[row] < self.counts[row]):
            first = [self.before[row] + done[row] for row in rows]
            left = [self.counts[row] - done[row] for row in rows]
            stops = [min(token + n, schedule.next_fold(token + 1)) for token, n in zip(first, left, strict=True)]
            parts.append(Part(self, schedule, len(parts), rows, tuple(first), tuple(stops)))
            for row, stop in zip(rows, stops, strict=True):
                done[row] = stop - self.before[row]
        return parts

    def _uniform_parts(self, schedule: Schedule) -> list[Part]:
        rows, parts = tuple(range(self.batch)), list[Part]()
        first, end = self.before[0], self.before[0] + self.tokens
        while first < end:
            stop = min(end, schedule.next_fold(first + 1))
            parts.append(Part(self, schedule, len(parts), rows, (first,) * self.batch, (stop,) * self.batch))
            first = stop
        return parts


class Run:
    """The columns of a part where all rows are alike, among the last ones of a call."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def pack(self, value: Tensor, axis: int) -> Tensor:
        """The tokens of the part from an argument whose axis `axis` is that of tokens."""
        return value.narrow(axis, self.start, self.stop - self.start)


class Packing:
    """Where the tokens of a part are found among the last columns of a call, on one device.

    Attributes
    ----------
    rows, columns : Tensor
        `(rows, 1)` and `(rows, width)`: the token at each place of the packed batch; any other token where there is none.
    token_mask : Tensor
        `(rows, width)` bool: whether there is one.
    """

    def __init__(self, rows: Tensor, columns: Tensor, token_mask: Tensor) -> None:
        self.rows, self.columns, self.token_mask = rows, columns, token_mask

    def pack(self, value: Tensor, axis: int) -> Tensor:
        """The tokens of the part from an argument whose axis `axis` is that of tokens."""
        batch = 0 if axis % value.ndim == 1 or value.ndim == 4 else 1  # positions may be (axes, batch, tokens)
        moved = value.movedim((batch, axis), (0, 1))
        rows = self.rows if moved.shape[0] > 1 else torch.zeros_like(self.rows)
        packed = moved[rows, self.columns]
        return packed.movedim((0, 1), (batch, axis))

    def unpack(self, packed: Tensor, into: Tensor) -> None:
        """Write `(rows, width, dim)` to its places in `(batch, tokens, dim)`."""
        rows = self.rows.expand_as(self.columns)
        into[rows[self.token_mask], self.columns[self.token_mask]] = packed[self.token_mask]


class Part:
    """Tokens that enter together, with the tensors that all layers need for them, made once.

    Attributes
    ----------
    number : int
        Its place in the call.
    rows : tuple of int
        The rows that bring tokens, of all rows of the batch.
    first, stops : tuple of int
        For each of them, the first token and the one behind the last, counted in its own sequence.
    counts, slots, entries : tuple of int
        For each of them, how many tokens it brings, the slot of the first, and the entries held once they have entered.
    folds : list of (tuple of Fold, tuple of int)
        What happens before they enter, and in which rows: places in `rows`. Rows that are folded alike, with as many tokens
        since the fold before, stand together.
    uniform : bool
        Whether all rows are alike.
    """

    def __init__(
        self,
        call: Call,
        schedule: Schedule,
        number: int,
        rows: tuple[int, ...],
        first: tuple[int, ...],
        stops: tuple[int, ...],
    ) -> None:
        self.call, self.schedule, self.number = call, schedule, number
        self.rows, self.first, self.stops = rows, first, stops
        self.uniform = call.uniform
        if self.uniform:
            slot, count = schedule.slot(first[0]), stops[0] - first[0]
            self.width, self.longest = count, slot + count
            self.counts, self.slots = (count,) * len(rows), (slot,) * len(rows)
            self.entries = (slot + count,) * len(rows)
            folds = schedule.folds_before(first[0])
            self.folds = [(folds, tuple(range(len(rows))))] if folds else []
        else:
            self.counts = tuple(stop - token for token, stop in zip(first, stops, strict=True))
            self.slots = tuple(map(schedule.slot, first))
            self.entries = tuple(slot + count for slot, count in zip(self.slots, self.counts, strict=True))
            self.width, self.longest = max(self.counts), max(self.entries)
            self.folds = self._groups()
        self.batch = call.batch
        self.everyone = len(rows) == call.batch
        self.even = self.uniform or min(self.counts) == self.width  # no row brings fewer tokens than another
        self._memo: dict[Any, Any] = {}

    def _groups(self) -> list[tuple[tuple[Fold, ...], tuple[int, ...]]]:
        groups: dict[Any, list[int]] = {}
        for place, token in enumerate(self.first):
            if folds := self.schedule.folds_before(token):
                alike = folds, self.since_fold(place), self.schedule.entries(token), self.is_first_fold(place)
                groups.setdefault(alike, []).append(place)
        return [(folds, tuple(places)) for (folds, *_), places in groups.items()]

    @cached_property
    def after(self) -> tuple[int, ...]:
        """Tokens that each row of the batch has once the part has entered."""
        if self.uniform:
            return self.stops
        # All rows that have tokens take part from the first part on: those that do not any more have ended.
        after = list(self.call.after)
        for row, stop in zip(self.rows, self.stops, strict=True):
            after[row] = stop
        return tuple(after)

    def since_fold(self, place: int) -> int:
        """Tokens that the row at `place` has taken in since the fold before the one that is due now."""
        token = self.first[place]
        return token - self.schedule.previous_fold(token - 1)

    def is_first_fold(self, place: int) -> bool:
        """Whether nothing was folded in the row at `place` before the part enters."""
        return self.schedule.previous_fold(self.first[place] - 1) == 0

    def memo(self, key: Any, make: Callable[[], Made]) -> Made:
        """What `make` returns, once for each key."""
        if key not in self._memo:
            with torch.inference_mode(False):
                self._memo[key] = make()
        return self._memo[key]  # type: ignore[no-any-return]

    def shared(self, group: int) -> list[dict[Any, Any]]:
        """For each fold of group `group` of `folds`, what its compressor hands from layer to layer of the same schedule."""
        key = repr(self.schedule), self.number, group
        if key not in self.call.shared:
            self.call.shared[key] = [{} for _ in self.folds[group][0]]
        return self.call.shared[key]  # type: ignore[no-any-return]

    def selection(self, last: int, device: torch.device) -> Run | Packing | None:
        """Where its tokens are among the last `last` columns of the call; None where it is the call as it is.

        Raises
        ------
        LookupError
            If none of its tokens are among them.
        """
        total = self.call.tokens
        if self.uniform:
            behind = self.call.before[0] + total - last
            start, stop = max(self.first[0] - behind, 0), self.stops[0] - behind
            if stop <= 0:
                raise LookupError
            return None if stop - start == last else Run(start, stop)
        if self.everyone and self.even and self.width == last == total:
            return None
        packing = self.memo(("packing", last, device), partial(self._packing, last, device))
        if packing is None:
            raise LookupError
        return packing

    def _packing(self, last: int, device: torch.device) -> Packing | None:
        rows = torch.tensor(self.rows, device="cpu")[:, None]
        brought = [stop - self.call.before[row] for row, stop in zip(self.rows, self.stops, strict=True)]
        place, token_mask = self._places(torch.tensor(brought, device="cpu")[:, None])
        columns = self.call.columns[rows, place.clamp(min=0)] - (self.call.tokens - last)
        token_mask = token_mask & (columns >= 0)
        if not token_mask.any():
            return None
        return Packing(rows.to(device), columns.clamp(min=0).to(device), token_mask.to(device))

    def _places(self, stops: Tensor) -> tuple[Tensor, Tensor]:
        """`(rows, width)`: numbers that end at `stops`, right-aligned, and which of them are tokens."""
        back = torch.arange(self.width - 1, -1, -1, device="cpu")
        counts = torch.tensor(self.counts, device="cpu")[:, None]
        return stops - 1 - back, (back < counts).expand(len(self.rows), self.width)

    def slots_of(self, width: int, device: torch.device) -> slice | Tensor:
        """The slots of its last `width` tokens where all rows are alike; else `(rows, width)`, 0 where there is none."""
        if self.uniform:
            return slice(self.longest - width, self.longest)
        return self.memo(("slots", device), lambda: self._places(self._entries)[0].clamp(min=0).to(device))

    @property
    def _entries(self) -> Tensor:
        return torch.tensor(self.entries, device="cpu")[:, None]

    def writes(self, heads: int, capacity: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Where all tokens go: rows of the buffer `(batch * heads * capacity, dim)`, and the rows of the packed states
        `(rows * heads * width, dim)` that go there; None for all of them in their order.
        """
        return self.memo(("writes", heads, capacity, device), lambda: self._writes(heads, capacity, device))

    def _writes(self, heads: int, capacity: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        slots, token_mask = self._places(self._entries)
        return self._scattered(slots, token_mask, heads, capacity, device, whole=self.even)

    def _scattered(
        self, places: Tensor, wanted: Tensor, heads: int, capacity: int, device: torch.device, whole: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows, head = torch.tensor(self.rows, device="cpu"), torch.arange(heads, device="cpu")
        sequences = rows[:, None, None] * heads + head[None, :, None]
        to = sequences * capacity + places[:, None]
        if whole:
            return to.flatten().to(device), None
        wanted = wanted[:, None].expand(-1, heads, -1)
        return to[wanted].to(device), wanted.flatten().nonzero()[:, 0].to(device)

    def rows_on(self, device: torch.device) -> Tensor:
        """The rows that take part, as a tensor."""
        return self.memo(("rows", device), lambda: torch.tensor(self.rows, device=device))

    def group_rows(self, group: int, device: torch.device) -> Tensor:
        """The rows that are folded as group `group` of `folds`."""

        def make() -> Tensor:
            return torch.tensor([self.rows[place] for place in self.folds[group][1]], device=device)

        return self.memo(("group", group, device), make)

    def aligned(self, device: torch.device) -> Tensor:
        """`(rows, entries)`: slots in an order that puts the last entry of each row last."""

        def make() -> Tensor:
            slots = torch.arange(self.longest, device=device)
            return (slots - (self.longest - self._entries.to(device))).clamp(min=0)

        return self.memo(("aligned", device), make)

    def recorded(self, queries: int) -> list[tuple[int, int]] | None:
        """For each row, which of its tokens are among the last `queries` before its next fold, and to which place the first of
        them goes: (tokens from the end of the part, place); None if there are none in any row.
        """
        found = []
        for token, stop in zip(self.first, self.stops, strict=True):
            due = self.schedule.next_fold(stop)
            begin = max(token, due - queries)
            found.append((max(0, stop - begin), queries - (due - begin)))
        return found if any(count for count, _ in found) else None

    def query_writes(self, queries: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same as :meth:`writes`, for a buffer of the last `queries` queries before each row's next fold."""

        def make() -> tuple[Tensor, Tensor]:
            found = self.recorded(queries)
            assert found is not None
            counts, places = torch.tensor(found, device="cpu").split(1, dim=1)
            back = torch.arange(self.width - 1, -1, -1, device="cpu")
            to, taken = self._scattered(
                places + counts - 1 - back,
                (back < counts).expand(len(self.rows), -1),
                heads,
                queries,
                device,
                whole=False,
            )
            assert taken is not None
            return to, taken

        return self.memo(("queries", queries, heads, device), make)
