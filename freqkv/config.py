"""The four numbers of the method, validated."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from freqkv.schedule import Fold, FreqKVSchedule, Schedules, check_schedule

__all__ = ["FreqKVConfig", "geometry", "make_config", "with_schedule"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FreqKVConfig:
    """What a FreqKV cache holds and when it is compressed.

    Parameters
    ----------
    window : int, optional
        Entries (tokens or compressed slots) that each layer holds at most, N. None stands for the model's own context
        length (`max_position_embeddings`). Positions are slots, so all positions are below `window`.
    sink_tokens : int
        First tokens of a sequence that are never compressed, S.
    retain_ratio : float
        Share of the compressed span that is kept at a compression, the paper's gamma: of `n = window - sink_tokens -
        recent_tokens` entries, `int(n * retain_ratio)` remain.
    recent_tokens : int
        Last entries that wait one compression, untouched, R. The paper uses 0; a model that was not fine-tuned reads
        its latest words unblurred with 32 to 128.

    Raises
    ------
    TypeError
        If a number is not of its kind.
    ValueError
        If the numbers cannot work together; the message names the limits.
    """

    window: int | None = None
    sink_tokens: int = 4
    retain_ratio: float = 0.5
    recent_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("window", "sink_tokens", "recent_tokens"):
            value = getattr(self, name)
            if value is None and name == "window":
                continue
            if isinstance(value, bool):
                raise TypeError(f"{name} is a number of tokens, got {value!r}")
            try:
                object.__setattr__(self, name, operator.index(value))
            except TypeError:
                raise TypeError(f"{name} is a whole number of tokens, got {value!r}") from None
        if isinstance(self.retain_ratio, bool) or not isinstance(self.retain_ratio, (int, float)):
            raise TypeError(f"retain_ratio is a number between 0 and 1, got {self.retain_ratio!r}")
        if not 0 < self.retain_ratio < 1:
            raise ValueError(f"retain_ratio={self.retain_ratio} must lie between 0 and 1, both excluded")
        for name in ("sink_tokens", "recent_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.window is not None:
            self._fold(self.window)

    def _fold(self, window: int) -> Fold:
        if window < 2:
            raise ValueError(f"window={window} must be 2 or more")
        span = window - self.sink_tokens - self.recent_tokens
        if span < 2:
            raise ValueError(
                f"window={window} leaves {span} entries between sink_tokens={self.sink_tokens} and "
                f"recent_tokens={self.recent_tokens}; their sum must be at most {window - 2}, or window at least "
                f"{self.sink_tokens + self.recent_tokens + 2}"
            )
        keep = int(span * self.retain_ratio)
        if not 1 <= keep < span:
            raise ValueError(
                f"retain_ratio={self.retain_ratio} keeps {keep} of the {span} entries between sink_tokens="
                f"{self.sink_tokens} and recent_tokens={self.recent_tokens} of window={window}; it must keep between 1 "
                f"and {span - 1}, so lie in [{1 / span:.4g}, 1)"
            )
        return Fold(self.sink_tokens, window - self.recent_tokens, keep)

    @property
    def schedule(self) -> FreqKVSchedule:
        """The schedule of a layer. Raises ValueError while `window` is None: see :meth:`resolve`."""
        if self.window is None:
            raise ValueError("window is None: call resolve(model.config) first")
        return FreqKVSchedule(self.window, self._fold(self.window))

    def resolve(self, model_config: Any) -> FreqKVConfig:
        """Fill in `window` from a model's configuration and warn once if it exceeds the model's context length.

        Parameters
        ----------
        model_config : PreTrainedConfig
            Its text part tells `max_position_embeddings`.

        Raises
        ------
        ValueError
            If `window` is None and the model does not tell its context length.
        """
        text_config = model_config.get_text_config(decoder=True)
        context = getattr(text_config, "max_position_embeddings", None)
        if self.window is None:
            if not context:
                raise ValueError(
                    f"{type(text_config).__name__} does not tell its context length (max_position_embeddings); pass window="
                )
            return replace(self, window=context)._checked(text_config)
        if context and self.window > context:
            _warn_beyond_context(self.window, context)
        return self._checked(text_config)

    def _checked(self, text_config: Any) -> FreqKVConfig:
        """Warn once where a RoPE type rotates by other frequencies in long sequences than in short ones."""
        parameters = getattr(text_config, "rope_parameters", None) or {}
        for rope in (parameters, *(each for each in parameters.values() if isinstance(each, dict))):  # or by layer type
            original = rope.get("original_max_position_embeddings")
            if rope.get("rope_type") == "longrope" and original and self.window is not None and self.window > original:
                _warn_long_frequencies(self.window, original)
        return self


def make_config(config: FreqKVConfig | None, **numbers: float | None) -> FreqKVConfig | None:
    """One FreqKVConfig from what an entry point was given; None if it was given nothing."""
    given = {name: value for name, value in numbers.items() if value is not None}
    if config is None:
        return FreqKVConfig(**given) if given else None  # type: ignore[arg-type]
    if not isinstance(config, FreqKVConfig):
        raise TypeError(
            f"config is a FreqKVConfig, got {config!r}; pass numbers by name, for example window={config!r}"
        )
    if given:
        raise ValueError(f"give the numbers either in config or by name, not both: {', '.join(given)}")
    return config


def with_schedule(config: FreqKVConfig | None, schedule: Schedules | None) -> FreqKVConfig | None:
    """The numbers that go with schedules: of one for all layers its window; else those that were given.

    Raises
    ------
    TypeError
        If it is none, or no dict of them by layer index.
    ValueError
        If numbers are given that one schedule for all leaves without effect.
    """
    if schedule is None:
        return config
    if isinstance(schedule, Mapping):
        for index, each in schedule.items():
            if isinstance(index, bool) or not isinstance(index, int):
                raise TypeError(f"schedule is a dict by layer index, got the key {index!r}")
            check_schedule(each)
        return config or FreqKVConfig()
    window = check_schedule(schedule).window
    whole = FreqKVConfig(window=window, sink_tokens=0)
    if config not in (None, whole):
        raise ValueError(
            f"give either one schedule for all layers or the numbers, not both: schedule={schedule} decides what {config} would"
        )
    return whole


def geometry(model_config: Any) -> dict[str, Any]:
    """What of a model's configuration a cache must match: the shape of what it holds, and what its slots mean."""
    text_config = model_config.get_text_config(decoder=True)

    def numbers(name: str) -> Any:
        """Some families have other numbers in other layers, and their configuration raises where asked for one."""
        try:
            return getattr(text_config, name, None)
        except AttributeError:
            raise
        except Exception:
            return tuple(getattr(layer, name, None) for layer in text_config.per_layer_config)

    heads, hidden = numbers("num_attention_heads"), numbers("hidden_size")
    evenly = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None
    return {
        "number of layers": getattr(text_config, "num_hidden_layers", None),
        "number of KV heads": numbers("num_key_value_heads") or heads,
        "head size": numbers("head_dim") or evenly,
        "context length": getattr(text_config, "max_position_embeddings", None),
        "RoPE parameters": copy.deepcopy(getattr(text_config, "rope_parameters", None)),
    }


@cache
def _warn_long_frequencies(window: int, original: int) -> None:
    logger.warning(
        "this model's RoPE (longrope) has other frequencies for sequences of more than %d tokens: a window of %d uses those "
        "for all tokens, where the plain model starts with the short ones. Pass window=%d or less to use the short ones.",
        original,
        window,
        original,
    )


@cache
def _warn_beyond_context(window: int, context: int) -> None:
    logger.warning(
        "window=%d is larger than the model's context length of %d tokens: slots from %d on are positions the model was "
        "not trained on, and quality there is what its RoPE extrapolation gives. Pass window=%d or less to stay inside.",
        window,
        context,
        context,
        context,
    )
