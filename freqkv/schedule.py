"""Schedules: when a layer's entries are compressed, and to how many. Pure integers.

A schedule names the folds that happen right before a token enters. All else follows from that: how many entries are held,
which slot a token takes, when the next fold is due.
"""

from __future__ import annotations

import dataclasses
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

__all__ = ["Fold", "FreqKVSchedule", "Schedule", "Schedules", "check_layers", "check_schedule", "schedule_of"]


@dataclass(frozen=True)
class Fold:
    """Slots `[start, stop)` are compressed to `keep` entries; what lies before stays, what lies behind moves left."""

    start: int
    stop: int
    keep: int

    @property
    def freed(self) -> int:
        """Slots that it frees."""
        return self.stop - self.start - self.keep


class _Timeline:
    """The folds of a schedule up to some token, found by walking through it once."""

    lock = threading.Lock()

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.walked = 1  # all folds before tokens below this are known
        self.tokens = [0]  # before which something was folded; the first entry stands for the beginning
        self.held = [0]  # entries held once it was

    def walk(self, token: int) -> None:
        """Find all folds up to those right before `token`."""
        with self.lock:
            while self.walked <= token:
                held = self.held[-1] + self.walked - self.tokens[-1]
                folds = self.schedule.folds_before(self.walked)
                if not isinstance(folds, tuple) or not all(isinstance(fold, Fold) for fold in folds):
                    raise TypeError(
                        f"{self.schedule}: folds_before({self.walked}) must return a tuple of Folds, () for none, got {folds!r}"
                    )
                for fold in folds:
                    if not (0 <= fold.start < fold.stop <= held and 0 < fold.keep < fold.stop - fold.start):
                        raise ValueError(
                            f"{self.schedule} folds {fold} before token {self.walked}, of {held} entries: start and stop must "
                            "lie among them, keep between 1 and stop - start - 1"
                        )
                    held -= fold.freed
                if held >= self.schedule.window:
                    raise ValueError(
                        f"{self.schedule} leaves no slot for token {self.walked}: {held} entries are held, and its window is "
                        f"{self.schedule.window}. Its folds_before({self.walked}) must free one"
                    )
                if folds:
                    self.held.append(held)
                    self.tokens.append(self.walked)
                self.walked += 1

    def last(self, token: int) -> int:
        """The place of the last fold at or before `token`."""
        self.walk(token)
        return bisect_right(self.tokens, token) - 1


class Schedule(ABC):
    """When the entries of a layer are compressed.

    Derive a frozen dataclass of plain numbers, with `window` among them, and define :meth:`folds_before`. Tokens are counted
    from 0 in their own sequence, padding left out. The other methods follow from it by walking through the tokens once; a
    schedule that knows closed forms may override `entries`, `compressions`, `next_fold` and `previous_fold`.

    Attributes
    ----------
    window : int
        Entries that a layer holds at most, N.
    """

    window: int

    @abstractmethod
    def folds_before(self, token: int) -> tuple[Fold, ...]:
        """The folds that happen, one after the other, right before token `token` enters; () for most tokens."""

    @cached_property
    def _timeline(self) -> _Timeline:
        return _Timeline(self)

    def entries(self, seen: int) -> int:
        """Entries held after `seen` tokens."""
        if seen == 0:
            return 0
        timeline = self._timeline
        place = timeline.last(seen - 1)
        return timeline.held[place] + seen - timeline.tokens[place]

    def slot(self, token: int) -> int:
        """The slot that token `token` takes when it enters."""
        return self.entries(token + 1) - 1

    def compressions(self, seen: int) -> int:
        """How many of the first `seen` tokens found entries folded before they entered."""
        return self._timeline.last(seen - 1) if seen else 0

    def next_fold(self, token: int) -> int:
        """The first token from `token` on before which entries are folded."""
        timeline = self._timeline
        reach = token
        while True:
            timeline.walk(reach)
            place = bisect_left(timeline.tokens, max(token, 1))
            if place < len(timeline.tokens):
                return timeline.tokens[place]
            reach += self.window  # which is full by then

    def previous_fold(self, token: int) -> int:
        """The last token up to `token` before which entries were folded; 0 if there was none."""
        timeline = self._timeline
        return timeline.tokens[timeline.last(token)]

    @property
    def name(self) -> str:
        """What files call it."""
        return type(self).__name__

    def parameters(self) -> dict[str, Any]:
        """Its numbers, as a file stores them."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_timeline"}


@dataclass(frozen=True)
class FreqKVSchedule(Schedule):
    """The paper's schedule (arXiv 2505.00570): one fold of everything between the sinks and the recents of a full window.

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
        return self.fold.freed

    def folds_before(self, token: int) -> tuple[Fold, ...]:
        due = token >= self.window and (token - self.window) % self.step == 0
        return (self.fold,) if due else ()

    def entries(self, seen: int) -> int:
        if seen <= self.window:
            return seen
        return self.floor + (seen - 1 - self.window) % self.step + 1

    def compressions(self, seen: int) -> int:
        return 0 if seen <= self.window else (seen - self.window - 1) // self.step + 1

    def next_fold(self, token: int) -> int:
        if token <= self.window:
            return self.window
        return token + (self.window - token) % self.step

    def previous_fold(self, token: int) -> int:
        return 0 if token < self.window else token - (token - self.window) % self.step


# One for all layers, or those of some layers by their index; the others follow the numbers of the configuration.
Schedules: TypeAlias = Schedule | Mapping[int, Schedule]


def check_schedule(schedule: Any) -> Schedule:
    """Raise TypeError or ValueError where something is no schedule that can be told in a file."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule is a freqkv.Schedule, or a dict of them by layer index, got {schedule!r}")
    if not dataclasses.is_dataclass(schedule) or not type(schedule).__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"{type(schedule).__name__} must be a frozen dataclass, so that files can tell its numbers")
    window = getattr(schedule, "window", None)
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise ValueError(f"{schedule!r}: window must be a whole number of at least 2")
    return schedule


def check_layers(schedules: Schedules | None, compressed: list[int]) -> None:
    """Raise ValueError where schedules name layers that are not compressed."""
    unknown = sorted(set(schedules) - set(compressed)) if isinstance(schedules, Mapping) else []
    if unknown:
        raise ValueError(f"schedule names layers {unknown}, but the compressed layers are {compressed}")


def schedule_of(index: int, schedules: Schedules | None, default: Schedule | None) -> Schedule:
    """The schedule of the layer `index`."""
    chosen = schedules.get(index, default) if isinstance(schedules, Mapping) else schedules or default
    assert chosen is not None
    return chosen
