"""The schedule: which slot a token takes and when which entries are squeezed. Pure integers.

With `floor = sink_tokens + kept + recent_tokens` and `step = window - floor`, token `t` of a sequence takes slot `t`
while `t < window`, afterwards slot `floor + (t - window) % step`; right before token `t` enters, the entries
`[sink_tokens, window - recent_tokens)` are squeezed to `kept` whenever `t >= window` and `(t - window) % step == 0`.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Fold", "Schedule", "Segment"]


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
