"""The schedule against a cache simulated with a list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freqkv import Fold, FreqKVConfig, Segment


@st.composite
def configs(draw, max_window: int = 80):
    window = draw(st.integers(3, max_window))
    sinks = draw(st.integers(0, window - 2))
    recents = draw(st.integers(0, window - 2 - sinks))
    span = window - sinks - recents
    keep = draw(st.integers(1, span - 1))
    return FreqKVConfig(window, sinks, (keep + 0.5) / span, recents)


def simulate(config: FreqKVConfig, tokens: int):
    """For each token: its slot, whether a compression came right before it, and the entries held after it."""
    held, rows = 0, []
    for _ in range(tokens):
        compressed = held == config.window
        if compressed:
            span = config.window - config.sink_tokens - config.recent_tokens
            held = config.sink_tokens + int(span * config.retain_ratio) + config.recent_tokens
        rows.append((held, compressed, held + 1))
        held += 1
    return rows


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


@given(configs(), st.lists(st.integers(1, 200), min_size=1, max_size=6))
def test_segments_of_any_split_are_the_simulation(config, calls):
    rows = iter(simulate(config, sum(calls)))
    schedule, seen = config.schedule, 0
    for call in calls:
        position = 0
        for segment in schedule.segments(seen, call):
            assert segment.start == position < segment.stop
            for token in range(segment.start, segment.stop):
                slot, compressed, entries = next(rows)
                assert slot == segment.slot + token - segment.start
                assert compressed == (segment.fold is not None and token == segment.start)
            assert segment.entries == entries
            position = segment.stop
        assert position == call
        seen += call


def test_paper_settings():
    schedule = FreqKVConfig(window=4096).schedule
    assert schedule.fold == Fold(4, 4096, 2046)
    assert (schedule.floor, schedule.step) == (2050, 2046)
    assert schedule.segments(0, 5000) == [Segment(0, 4096, 0, None), Segment(4096, 5000, 2050, schedule.fold)]


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
