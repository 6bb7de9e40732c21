"""Hypothesis strategies, and a schedule that folds in several places at once."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from freqkv import Fold, FreqKVConfig, Schedule

__all__ = ["Tiers", "configs", "simulate"]


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


@dataclass(frozen=True)
class Tiers(Schedule):
    """A full window is folded twice: its older half to a quarter, then the rest of what lies before the recents to a half."""

    window: int
    sinks: int = 1
    recents: int = 2

    def folds_before(self, token):
        if token < self.window or (token - self.window) % self.step:
            return ()
        return self._folds

    @property
    def _folds(self):
        span = self.window - self.sinks - self.recents
        old = span // 2
        first = Fold(self.sinks, self.sinks + old, max(1, old // 4))
        behind = first.start + first.keep
        rest = span - old
        return first, Fold(behind, behind + rest, max(1, rest // 2))

    @property
    def step(self):
        return sum(fold.freed for fold in self._folds)
