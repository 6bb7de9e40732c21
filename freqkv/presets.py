"""Presets: a name for numbers and a compressor that go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from freqkv.compressors import Compressor, keep_recent, low_pass_entries
from freqkv.config import FreqKVConfig, make_config
from freqkv.models.kinds import layer_kinds
from freqkv.schedule import Schedules
from freqkv.selection import KeepNovel
from freqkv.settings import Settings

__all__ = ["PRESETS", "Preset", "choosing_layer", "preset_or_numbers"]

DEPTH = 0.2  # of the layers, where keys tell novel passages from others: see examples/results/retention.md


@dataclass(frozen=True)
class Preset:
    """Numbers and a compressor.

    Attributes
    ----------
    name : str
    about : str
        What it keeps, in a sentence.
    compressor : callable
        ``model_config -> compressor``.
    recent : float
        The default of `recent_tokens`, as a share of the window.
    folds : int or None
        How often entries are folded while as many tokens enter as a window holds, which gives the default of `retain_ratio`;
        None for the default of :class:`FreqKVConfig`.
    """

    name: str
    about: str
    compressor: Callable[[Any], Compressor]
    recent: float = 0.0
    folds: int | None = None

    def settings(self, model_config: Any, **given: Any) -> Settings:
        """Of a model; numbers that are given take the place of its own, and the window is by default the model's context.

        Raises
        ------
        TypeError, ValueError
            If the numbers cannot work together.
        """
        window = FreqKVConfig(given.pop("window", None)).resolve(model_config).window
        assert window is not None
        numbers = {"recent_tokens": int(window * self.recent), **given, "window": window}
        if self.folds is not None and "retain_ratio" not in given:
            between = FreqKVConfig(**numbers).schedule.fold  # what is folded does not hang on the ratio
            span = between.stop - between.start
            freed = min(max(1, round(window / self.folds)), span - 1)
            numbers["retain_ratio"] = (span - freed + 0.5) / span  # rounded down to whole entries
        return Settings(FreqKVConfig(**numbers), self.compressor(model_config))


def choosing_layer(model_config: Any) -> int:
    """The compressed layer at a fifth of the depth."""
    compressed = [index for index, kind in enumerate(layer_kinds(model_config)) if kind.compressed]
    return compressed[min(round(DEPTH * len(compressed)), len(compressed) - 1)]


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "paper",
            "the low frequencies of all that lies behind the sinks (FreqKV as published)",
            lambda model_config: low_pass_entries,
        ),
        Preset(
            "streaming",
            "sinks and the most recent tokens (StreamingLLM)",
            lambda model_config: keep_recent,
            folds=8,
        ),
        Preset(
            "recommended",
            "sinks, the most recent two thirds of the window, and passages and keys that are least like the rest (KeepNovel)",
            lambda model_config: KeepNovel(layer=choosing_layer(model_config), per_head=0.4),
            recent=2 / 3,
            folds=8,
        ),
    )
}
"""All presets by name."""


def preset_or_numbers(
    preset: str | None,
    model_config: Any,
    config: FreqKVConfig | None,
    compressor: Compressor | None,
    schedule: Schedules | None,
    **numbers: float | None,
) -> tuple[FreqKVConfig | None, Compressor | None]:
    """Configuration and compressor from what an entry point was given; None for what was not.

    Raises
    ------
    ValueError
        If there is no such preset, or if it comes with a config or a schedule.
    """
    if preset is None:
        return make_config(config, **numbers), compressor
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}: take one of {', '.join(PRESETS)}")
    for name, value in (("config", config), ("schedule", schedule)):
        if value is not None:
            raise ValueError(
                f"preset={preset!r} brings its own numbers, and so does {name}: give one of them. Single numbers beside a "
                "preset, such as recent_tokens=64, take the place of its own"
            )
    given = {name: value for name, value in numbers.items() if value is not None}
    chosen = PRESETS[preset].settings(model_config, **given)
    return chosen.config, chosen.compressor if compressor is None else compressor
