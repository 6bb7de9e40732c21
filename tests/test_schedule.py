"""The schedule against a cache simulated with a list."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Tiers, configs, simulate

from freqkv import Fold, FreqKVConfig, FreqKVSchedule, Schedule
from freqkv.parts import Call


@given(configs(), st.integers(1, 400))
def test_slots_entries_and_compressions(config, tokens):
    schedule = config.schedule
    compressions = 0
    for token, (slot, compressed, entries) in enumerate(simulate(config, tokens)):
        compressions += compressed
        assert schedule.slot(token) == slot < config.window
        assert schedule.entries(token + 1) == entries <= config.window
        assert schedule.compressions(token + 1) == compressions
    assert schedule.entries(0) == schedule.compressions(0) == 0


@given(configs(), st.integers(0, 400))
def test_closed_forms_are_what_walking_through_the_tokens_finds(config, token):
    schedule = config.schedule

    class Walked(FreqKVSchedule):
        """The same folds, and all else as every schedule has it."""

        entries, compressions = Schedule.entries, Schedule.compressions
        next_fold, previous_fold = Schedule.next_fold, Schedule.previous_fold

    walked = Walked(schedule.window, schedule.fold)
    for ask in ("entries", "compressions", "next_fold", "previous_fold", "slot"):
        assert getattr(schedule, ask)(token) == getattr(walked, ask)(token), ask


@pytest.mark.parametrize("schedule", [Tiers(16), Tiers(23, 0, 0), Tiers(37, 4, 9)])
def test_a_schedule_of_several_folds_is_its_simulation(schedule):
    held, folded, last = 0, 0, 0
    for token in range(5 * schedule.window):
        due = schedule.next_fold(token)
        folds = schedule.folds_before(token)
        for fold in folds:
            held += fold.keep - (fold.stop - fold.start)
        folded += bool(folds)
        last = token if folds else last
        assert (due == token) == bool(folds)
        assert schedule.previous_fold(token) == last
        assert schedule.slot(token) == held < schedule.window
        held += 1
        assert (schedule.entries(token + 1), schedule.compressions(token + 1)) == (held, folded)
    assert folded > 3


def test_a_schedule_that_does_not_hold_its_window_is_refused():
    @dataclass(frozen=True)
    class Late(Schedule):
        window: int

        def folds_before(self, token):
            return (Fold(0, 4, 2),) if token == self.window + 1 else ()

    @dataclass(frozen=True)
    class Wide(Schedule):
        window: int

        def folds_before(self, token):
            return (Fold(0, self.window + 1, 1),) if token == self.window else ()

    with pytest.raises(ValueError, match=r"leaves no slot for token 8: 8 entries are held, and its window is 8"):
        Late(8).entries(9)
    with pytest.raises(ValueError, match=r"folds .* before token 8, of 8 entries: start and stop must lie among them"):
        Wide(8).entries(9)

    @dataclass(frozen=True)
    class Bare(Schedule):
        window: int

        def folds_before(self, token):
            return Fold(0, 4, 2)

    with pytest.raises(TypeError, match=r"folds_before\(1\) must return a tuple of Folds"):
        Bare(8).entries(9)


@given(configs(), st.lists(st.integers(1, 200), min_size=1, max_size=6))
def test_parts_of_any_split_are_the_simulation(config, calls):
    rows = iter(simulate(config, sum(calls)))
    schedule, seen = config.schedule, 0
    for tokens in calls:
        position = seen
        for part in Call((seen, seen), tokens).parts(schedule):
            assert part.first == (position, position)
            assert part.stops[0] > position
            for token in range(part.first[0], part.stops[0]):
                slot, compressed, entries = next(rows)
                assert slot == part.slots[0] + token - part.first[0]
                assert compressed == (bool(part.folds) and token == part.first[0])
            assert part.longest == entries
            position = part.stops[0]
        seen += tokens
        assert position == seen


def test_paper_settings():
    schedule = FreqKVConfig(window=4096).schedule
    assert schedule.fold == Fold(4, 4096, 2046)
    assert (schedule.floor, schedule.step) == (2050, 2046)
    first, second = Call((0,), 5000).parts(schedule)
    assert (first.first, first.stops, first.slots, first.folds) == ((0,), (4096,), (0,), [])
    assert (second.first, second.stops, second.slots) == ((4096,), (5000,), (2050,))
    assert second.folds == [((schedule.fold,), (0,))]


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ({"window": 1}, ValueError, "window=1 must be 2 or more"),
        ({"window": 8, "sink_tokens": 4, "recent_tokens": 3}, ValueError, "must be at most 6"),
        ({"window": 10, "retain_ratio": 0.1}, ValueError, r"keeps 0 of the 6 entries .* lie in \[0.1667, 1\)"),
        ({"retain_ratio": 1.0}, ValueError, "retain_ratio=1.0 must lie between 0 and 1"),
        ({"retain_ratio": 0}, ValueError, "retain_ratio=0 must lie"),
        ({"retain_ratio": "half"}, TypeError, "retain_ratio is a number"),
        ({"sink_tokens": -1}, ValueError, "sink_tokens=-1 must be 0 or more"),
        ({"recent_tokens": -3}, ValueError, "recent_tokens=-3 must be 0 or more"),
        ({"window": 4.5}, TypeError, "window is a whole number"),
        ({"sink_tokens": True}, TypeError, "sink_tokens is a number of tokens"),
        ({"sink_tokens": None}, TypeError, "sink_tokens is a whole number"),
    ],
)
def test_numbers_that_cannot_work(numbers, error, message):
    with pytest.raises(error, match=message):
        FreqKVConfig(**numbers)


def test_a_config_is_frozen_and_complete_only_with_a_window():
    config = FreqKVConfig()
    with pytest.raises(AttributeError):
        config.window = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="resolve"):
        _ = config.schedule
