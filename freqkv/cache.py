"""The cache that users hold: compressed layers beside transformers' own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from freqkv import session
from freqkv.compiled import CompiledStep
from freqkv.compressors import Compressor, check_compressor, compressor_name, low_pass_entries, queries_wanted
from freqkv.config import FreqKVConfig, geometry, with_schedule
from freqkv.forward import Forward
from freqkv.layer import FreqKVHybridLayer, FreqKVLayer
from freqkv.models.kinds import layer_kinds
from freqkv.models.rules import rule_for, with_base
from freqkv.presets import preset_or_numbers
from freqkv.schedule import Schedule, Schedules, check_layers, schedule_of
from freqkv.tracked import TrackedCache

__all__ = ["FreqKVCache"]


class FreqKVCache(TrackedCache):
    """A KV cache of bounded size for models that ran through `freqkv.patch` (arXiv 2505.00570).

    Parameters
    ----------
    model_config : PreTrainedConfig
        `model.config` of the model that will use the cache.
    config : FreqKVConfig, optional
        The four numbers; or give them by name:
    window, sink_tokens, retain_ratio, recent_tokens
        See :class:`FreqKVConfig`, whose defaults hold.
    compressor : callable, optional
        What a span is compressed by, a function of `(keys, values, keep)` or of a `Span`; the low-pass by default. See
        `freqkv.compressors`.
    schedule : Schedule or dict of int to Schedule, optional
        When entries are folded: one schedule for all layers, in place of the numbers, or those of some layers by their
        index. The paper's by default. See `freqkv.schedule`.
    preset : str, optional
        `"paper"`, `"streaming"` (sinks and the most recent tokens) or `"recommended"`: a compressor with its numbers, see
        `freqkv.PRESETS`. Numbers and a compressor that are given beside it take the place of its own.
    static : bool
        For `torch.compile`: single tokens go through graphs of fixed shapes, which are compiled once. They attend to whole
        buffers under a mask, so that it does not pay without compilation. `generate` compiles with such a cache where it does
        with a `StaticCache`; elsewhere, compile `model.forward`. Memory is taken whole at the first token.
    offloading : bool
        Refused; transformers' own caches take it.

    Raises
    ------
    TypeError, ValueError
        If the numbers cannot work together, or `offloading` is asked for.
    UnsupportedModelError
        If the model has no full attention layer.

    Notes
    -----
    Full attention layers are compressed. Layers that are bounded already (sliding, chunked, linear attention, state
    spaces, convolutions) keep transformers' own state.

    Examples
    --------
    >>> freqkv.patch(model)
    >>> cache = FreqKVCache(model.config, window=4096)
    >>> model.generate(**inputs, cache=cache, max_new_tokens=20_000)  # transformers before 5.24: past_key_values=cache
    """

    def __new__(cls, model_config: Any = None, *args: Any, **kwargs: Any) -> FreqKVCache:
        text_config = model_config.get_text_config(decoder=True) if hasattr(model_config, "get_text_config") else None
        cache: FreqKVCache = object.__new__(with_base(cls, rule_for(text_config)))
        return cache

    def __init__(
        self,
        model_config: Any,
        config: FreqKVConfig | None = None,
        *,
        window: int | None = None,
        sink_tokens: int | None = None,
        retain_ratio: float | None = None,
        recent_tokens: int | None = None,
        compressor: Compressor | None = None,
        schedule: Schedules | None = None,
        preset: str | None = None,
        static: bool = False,
        offloading: bool = False,
    ) -> None:
        if offloading:
            raise ValueError(
                "offloading=True: FreqKV does not move entries between devices. The cache never grows beyond its window: pass "
                "a smaller window, or use transformers' DynamicCache(config=model.config, offloading=True)"
            )
        if not isinstance(static, bool):
            raise TypeError(f"static must be True or False, got {static!r}")
        if not hasattr(model_config, "get_text_config"):
            raise TypeError(
                f"pass model.config of the model that will use the cache, not a {type(model_config).__name__}"
            )
        chosen, compressor = preset_or_numbers(
            preset,
            model_config,
            config,
            compressor,
            schedule,
            window=window,
            sink_tokens=sink_tokens,
            retain_ratio=retain_ratio,
            recent_tokens=recent_tokens,
        )
        chosen = with_schedule(chosen, schedule)
        self.config = (chosen or FreqKVConfig()).resolve(model_config)
        self.compressor = low_pass_entries if compressor is None else check_compressor(compressor)
        self.schedules = schedule
        self.geometry = geometry(model_config)
        self.static = static
        kinds = layer_kinds(model_config)
        check_layers(schedule, [index for index, kind in enumerate(kinds) if kind.compressed])
        paper: Schedule | None = None if isinstance(schedule, Schedule) else self.config.schedule
        layers: list[Any] = []
        for index, kind in enumerate(kinds):
            if not kind.compressed:
                layers.append(kind.layer)
                continue
            own = schedule_of(index, schedule, paper)
            if kind.number_of_states:
                layers.append(FreqKVHybridLayer(own, self.compressor, index, number_of_states=kind.number_of_states))
            else:
                layers.append(FreqKVLayer(own, self.compressor, index, whole=static))
        crossing = frozenset(index for index, kind in enumerate(kinds) if kind.crossing)
        extra_state = rule_for(model_config.get_text_config(decoder=True)).cache_state
        TrackedCache.__init__(self, layers, crossing, extra_state)
        self.forward_class = with_base(Forward, rule_for(model_config.get_text_config(decoder=True)))
        self.wanted_queries = queries_wanted(self.compressor)
        first = self._compressed[0].schedule
        self.has_one_schedule = all(each is first or each == first for each in self.layer_schedules)
        self.compiled_step: CompiledStep | None = None
        if static:
            _check_static(self, type(model_config).__name__)
            self.compiled_step = CompiledStep(self)

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile single tokens, which asks for a `static` cache."""
        return self.static

    @property
    def entries(self) -> int:
        """Entries that each compressed layer holds, at most `config.window`."""
        return max(layer.entries for layer in self._compressed)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the entries; None as long as it is empty."""
        keys = self._compressed[0].keys
        return None if keys is None else keys.dtype

    @property
    def schedule(self) -> Schedule:
        """The schedule of the first compressed layer, which is that of all unless they were given their own."""
        return self._compressed[0].schedule

    @property
    def longest_window(self) -> int:
        """Of all compressed layers: slots are below it."""
        return max(layer.schedule.window for layer in self._compressed)

    def is_filled(self, batch: int, device: torch.device) -> bool:
        """Whether all compressed layers hold buffers of their whole window for `batch` rows, on `device`."""
        return all(layer.buffers.whole_on(batch, device) and layer.seen for layer in self._compressed)

    @property
    def compressions(self) -> int:
        """How often the layers were compressed, in the longest row."""
        return max(layer.schedule.compressions(layer.seen) for layer in self._compressed)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys, values and queries, all layers."""
        others = [layer for layer in self.layers if not isinstance(layer, FreqKVLayer)]
        held = (getattr(layer, name, None) for layer in others for name in ("keys", "values"))
        own: int = sum(layer.nbytes for layer in self._compressed)
        return int(own + sum(t.numel() * t.element_size() for t in held if t is not None))

    def save(self, path: str | os.PathLike[str], model: PreTrainedModel | None = None) -> None:
        """Write what the cache holds to one safetensors file, whose size does not grow once the window is full.

        It is written beside `path` and takes its name when it is complete. What was recorded for :meth:`crop` is not
        stored.

        Parameters
        ----------
        path : str or PathLike
            A file; one that exists is replaced.
        model : PreTrainedModel, optional
            The model that filled the cache, so that the file tells it from others of the same shape.

        Raises
        ------
        RuntimeError
            If the cache is spent or within a forward.
        ValueError
            If the cache was not made for this model.
        UnsupportedModelError
            If a layer is of a kind of which FreqKV does not know what to store.
        OSError
            If the file cannot be written; one that was there before is still there.
        """
        session.save_cache(self, path, model)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        *,
        compressor: Compressor | None = None,
        schedule: Schedules | None = None,
        static: bool = False,
    ) -> FreqKVCache:
        """A cache with what :meth:`save` wrote, on the devices of the model's layers.

        Parameters
        ----------
        path : str or PathLike
        model : PreTrainedModel
            The model that filled the cache.
        compressor, schedule : optional
            Those that the cache was filled with, where they are not FreqKV's own.
        static : bool
            See :class:`FreqKVCache`.

        Raises
        ------
        CacheFileError
            If the file is damaged, was written by something else, or does not belong to this model (type, shape, kinds of
            layers, dtype, weights), compressor or schedule. A ValueError; see `freqkv.session`.
        TypeError
            If `model` is no model, or `compressor` cannot be called.
        OSError
            If the file cannot be read.
        """
        cache: FreqKVCache = session.load_cache(cls, path, model, compressor, schedule, static)
        return cache

    def __iter__(self) -> Iterator[Any]:
        """`(keys, values, None)` of each layer, entries in use; None where there are none, as for transformers' caches."""
        for layer in self.layers:
            sliding = getattr(layer, "_sliding_window_tensor", None)
            yield getattr(layer, "keys", None), getattr(layer, "values", None), sliding

    def __repr__(self) -> str:
        numbers, keys = self.config, self._compressed[0].keys
        compressed, layers = len(self._compressed), len(self.layers)
        words = f"{layers} layers" if compressed == layers else f"{compressed} of {layers} layers compressed"
        about = (
            f"{words}, {self.tokens_seen} tokens seen, {self.entries}/{numbers.window} entries held, "
            f"{self.compressions} compressions, {self.nbytes} bytes"
        )
        if keys is not None:
            about += f" of {str(keys.dtype).removeprefix('torch.')} on {keys.device}"
        if self.is_spent:
            about += ", spent: call reset()"
        given = repr(numbers).removeprefix("FreqKVConfig(").removesuffix(")")
        if isinstance(self.schedules, Schedule):
            given = f"schedule={self.schedules}"
        elif self.schedules:
            given += f", schedule={dict(self.schedules)}"
        name = compressor_name(self.compressor)
        return f"FreqKVCache({given}, compressor={name}{', static=True' if self.static else ''}: {about})"


def _check_static(cache: FreqKVCache, model: str) -> None:
    """Raise ValueError where compiled single tokens cannot serve a cache."""
    if any(type(layer) is not FreqKVLayer for layer in cache.layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not FreqKVLayer}))
        raise ValueError(
            f"static=True needs a model all of whose layers are full attention and nothing else, {model} has others "
            f"({kinds}). Leave it out"
        )
    if not cache.has_one_schedule:
        raise ValueError(
            "static=True: in a compiled token all layers write to the same slot, so that they need the same schedule. Pass one "
            "schedule for all, or leave static out"
        )
    if cache.wanted_queries:
        raise ValueError(
            f"static=True: compiled single tokens record no queries, which compressor={compressor_name(cache.compressor)} "
            "asks for. Leave static out"
        )
