"""The schedule: which slot a token takes and when which entries are squeezed. Pure integers.

With `floor = sink_tokens + kept + recent_tokens` and `step = window - floor`, token `t` of a sequence takes slot `t`
while `t < window`, afterwards slot `floor + (t - window) % step`; right before token `t` enters, the entries
`[sink_tokens, window - recent_tokens)` are squeezed to `kept` whenever `t >= window` and `(t - window) % step == 0`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Fold", "Round", "Schedule", "Segment"]


@dataclass(frozen=True)
class Fold:
    """Slots `[start, stop)` are squeezed to `keep` entries; what lies before stays, what lies behind moves left."""

    start: int
    stop: int
    keep: int


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens that enter together.

    Attributes
    ----------
    start, stop : int
        The tokens of the call, counted from its first.
    slot : int
        The slot of the first token; the rest follow it. Also the number of entries held before they enter.
    fold : Fold or None
        What is squeezed before they enter.
    """

    start: int
    stop: int
    slot: int
    fold: Fold | None

    @property
    def entries(self) -> int:
        """Entries held once the segment has entered."""
        return self.slot + self.stop - self.start


@dataclass(frozen=True)
class Round:
    """Tokens of several rows that enter together, each row at slots of its own.

    Attributes
    ----------
    rows : tuple of int
        The rows that bring tokens, of all rows of the batch.
    starts, stops : tuple of int
        For each of them, which of the tokens that it brings in this call.
    slots : tuple of int
        The slot of the first of them.
    fold : Fold or None
        What is squeezed before they enter, in the rows `folding`.
    folding : tuple of int
        Places in `rows`.
    """

    rows: tuple[int, ...]
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    slots: tuple[int, ...]
    fold: Fold | None
    folding: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return tuple(stop - start for start, stop in zip(self.starts, self.stops, strict=True))

    @property
    def entries(self) -> tuple[int, ...]:
        """Entries that each row holds once they have entered."""
        return tuple(slot + count for slot, count in zip(self.slots, self.counts, strict=True))


@dataclass(frozen=True)
class Schedule:
    """The paper's schedule: one fold of everything between the sinks and the most recent entries, when full.

    Parameters
    ----------
    window : int
        Entries that a layer holds at most, N.
    fold : Fold
        Applied to a full window each time one more token arrives.
    """

    window: int
    fold: Fold

    @property
    def floor(self) -> int:
        """Entries held right after a compression."""
        return self.window - self.step

    @property
    def step(self) -> int:
        """Tokens that enter between two compressions."""
        return self.fold.stop - self.fold.start - self.fold.keep

    def slot(self, token: int) -> int:
        """The slot that token `token` (counted from 0 in its own sequence) takes when it enters."""
        return token if token < self.window else self.floor + (token - self.window) % self.step

    def entries(self, seen: int) -> int:
        """Entries held after `seen` tokens."""
        return self.slot(seen - 1) + 1 if seen else 0

    def compressions(self, seen: int) -> int:
        """Compressions executed while `seen` tokens entered."""
        return 0 if seen <= self.window else (seen - self.window - 1) // self.step + 1

    def segments(self, seen: int, tokens: int) -> list[Segment]:
        """Cut the next `tokens` tokens, `seen` having entered before, into runs between which the cache is folded."""
        segments = []
        start = 0
        while start < tokens:
            slot = self.slot(seen + start)
            fold = self.fold if seen + start >= self.window and slot == self.floor else None
            stop = min(tokens, start + self.window - slot)
            segments.append(Segment(start, stop, slot, fold))
            start = stop
        return segments

    def rounds(self, seen: Sequence[int], tokens: Sequence[int]) -> list[Round]:
        """The same for rows that have `seen` and bring `tokens` tokens each: every row goes on to its own next fold."""
        rounds = []
        done = [0] * len(seen)
        while rows := tuple(row for row, brings in enumerate(tokens) if done[row] < brings):
            starts = tuple(done[row] for row in rows)
            slots = tuple(self.slot(seen[row] + done[row]) for row in rows)
            stops = tuple(
                min(tokens[row], done[row] + self.window - slot) for row, slot in zip(rows, slots, strict=True)
            )
            folding = tuple(
                place
                for place, (row, slot) in enumerate(zip(rows, slots, strict=True))
                if seen[row] + done[row] >= self.window and slot == self.floor
            )
            rounds.append(Round(rows, starts, stops, slots, self.fold if folding else None, folding))
            for row, stop in zip(rows, stops, strict=True):
                done[row] = stop
        return rounds
