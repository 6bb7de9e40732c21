"""The methods that are compared: a name and a function that makes a cache of as many bytes as the others'.

A method of one's own is one line::

    freqkv.evaluation.register("mine", lambda config, window: MyCache(config, size=window))
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig

from freqkv.cache import FreqKVCache
from freqkv.compressors import (
    Compressor,
    compressor_name,
    keep_recent,
    low_pass_entries,
    mean_pool,
    queries_wanted,
)
from freqkv.selection import KeepAttended, KeepNovel

__all__ = ["METHODS", "Method", "cache_bytes", "freqkv_method", "method", "register", "window_of_equal_bytes"]

MakeCache = Callable[[PreTrainedConfig, int], Cache]


@dataclass(frozen=True)
class Method:
    """A way to cache that is compared with others.

    Attributes
    ----------
    name : str
        Short, for command lines and tables.
    make : callable
        ``(model_config, window) -> cache``: an empty cache that takes at most the bytes of `window` entries of keys and
        values in each layer of full attention.
    bounded : bool
        Whether it stays within these bytes; False for the full cache, which is the upper line.
    """

    name: str
    make: MakeCache
    bounded: bool = True


METHODS: dict[str, Method] = {}
"""All methods by name: those below, and those that were registered."""


def register(name: str, make: MakeCache, bounded: bool = True) -> Method:
    """Add a method to `METHODS`, or replace the one of that name.

    Parameters
    ----------
    name, make, bounded
        See :class:`Method`. A name has no colon: what follows one are numbers (:func:`method`).

    Raises
    ------
    TypeError, ValueError
        If `make` cannot be called or the name is empty or has a colon.
    """
    if not callable(make):
        raise TypeError(f"make is a function (model_config, window) -> cache, got {make!r}")
    if not name or ":" in name:
        raise ValueError(f"a method's name is not empty and has no colon, got {name!r}")
    METHODS[name] = Method(name, make, bounded)
    return METHODS[name]


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds: keys, values, queries, and those inside quantized tensors.

    Parameters
    ----------
    cache : transformers.Cache
        Any; a :class:`FreqKVCache` tells its `nbytes`, of others the tensors in their layers are counted.
    """
    if isinstance(cache, FreqKVCache):
        return cache.nbytes

    def inner(value: Any) -> int:
        if isinstance(value, Tensor):
            if hasattr(value, "__tensor_flatten__"):
                return sum(inner(getattr(value, name)) for name in value.__tensor_flatten__()[0])
            return int(value.numel() * value.element_size())
        if isinstance(value, dict):
            return sum(map(inner, value.values()))
        return sum(map(inner, value)) if isinstance(value, (tuple, list)) else 0

    return sum(inner(vars(layer)) for layer in cache.layers)


def window_of_equal_bytes(model_config: PreTrainedConfig, window: int, compressor: Compressor) -> int:
    """The window in which entries and the queries that a compressor keeps take no more bytes than `window` entries alone.

    Parameters
    ----------
    model_config : PreTrainedConfig
        Its numbers of heads say how large a query is beside an entry.
    window : int
        Entries that the bytes are those of.
    compressor : callable
        See `freqkv.compressors`; most keep no queries.

    Returns
    -------
    int
        `window`, or less.

    Raises
    ------
    ValueError
        If the queries alone take as much.
    """
    queries = queries_wanted(compressor)
    if not queries:
        return window
    text = model_config.get_text_config(decoder=True)
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    # An entry is a key and a value of each KV head, a query one vector of each head.
    fewer = int(-(-queries * text.num_attention_heads // (2 * kv_heads)))
    if fewer >= window:
        raise ValueError(
            f"the {queries} queries of {compressor_name(compressor)} take the bytes of {fewer} entries, window={window} has no "
            "room for them: ask for fewer queries, or take a larger window"
        )
    return window - fewer


def freqkv_method(name: str, compressor: Compressor = low_pass_entries, **numbers: Any) -> Method:
    """A method that is a :class:`FreqKVCache`.

    Parameters
    ----------
    name : str
        See :class:`Method`.
    compressor : callable
        See `freqkv.compressors`. The window is made smaller for the queries that it keeps.
    **numbers
        `sink_tokens`, `retain_ratio`, `recent_tokens`, `schedule`: see :class:`FreqKVCache`. `recent_tokens` below 1 is a share
        of the window.

    Returns
    -------
    Method
    """

    def make(model_config: PreTrainedConfig, window: int) -> Cache:
        size = window_of_equal_bytes(model_config, window, compressor)
        own = dict(numbers)
        if 0 < own.get("recent_tokens", 0) < 1:
            own["recent_tokens"] = int(size * own["recent_tokens"])
        return FreqKVCache(model_config, window=size, compressor=compressor, **own)

    return Method(name, make)


# Which compressor stands behind a name; those that are classes take numbers of their own.
COMPRESSORS: dict[str, Compressor | type] = {
    "freqkv": low_pass_entries,
    "recent": keep_recent,
    "mean": mean_pool,
    "attended": KeepAttended,
    "novel": KeepNovel,
}


def method(spec: str) -> Method:
    """The method that a word on a command line stands for.

    Parameters
    ----------
    spec : str
        A name in `METHODS`; or ``freqkv``, ``recent``, ``mean``, ``attended`` or ``novel`` with numbers behind a colon:
        ``"freqkv:recent_tokens=64,retain_ratio=0.25"``, ``"attended:queries=16,recent_tokens=0.25"``. `recent_tokens` below 1
        is a share of the window.

    Returns
    -------
    Method
        Its name is `spec`.

    Raises
    ------
    ValueError
        If there is no such method, or numbers are not `name=number`.
    """
    if spec in METHODS:
        return METHODS[spec]
    name, colon, numbers = spec.partition(":")
    if name not in COMPRESSORS or not colon:
        raise ValueError(
            f"there is no method {spec!r}: take one of {', '.join(METHODS)}, or {', '.join(COMPRESSORS)} with numbers"
        )
    given: dict[str, Any] = {}
    for part in numbers.split(","):
        key, equals, value = part.partition("=")
        try:
            given[key] = float(value) if "." in value else int(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"method {spec!r}: {part!r} is not name=number")
    compressor = COMPRESSORS[name]
    fields = {field.name for field in dataclasses.fields(compressor)} if isinstance(compressor, type) else set()
    own = {key: given.pop(key) for key in fields & set(given)}
    if unknown := set(given) - {"sink_tokens", "retain_ratio", "recent_tokens"}:
        raise ValueError(f"method {spec!r}: it has no number {', '.join(sorted(unknown))}")
    return freqkv_method(spec, compressor(**own) if isinstance(compressor, type) else compressor, **given)


def _preset(name: str, model_config: PreTrainedConfig, window: int) -> Cache:
    return FreqKVCache(model_config, preset=name, window=window)


def _full(model_config: PreTrainedConfig, window: int) -> Cache:
    return DynamicCache(config=model_config)


def _register_own() -> None:
    register("full", _full, bounded=False)
    for each in (
        freqkv_method("recent", keep_recent),
        freqkv_method("recent-r8", keep_recent, recent_tokens=1 / 8),
        freqkv_method("freqkv"),
        freqkv_method("freqkv-r8", recent_tokens=1 / 8),
        freqkv_method("mean-r8", mean_pool, recent_tokens=1 / 8),
        freqkv_method("attended-r8", KeepAttended(queries=16), recent_tokens=1 / 8),
    ):
        METHODS[each.name] = each
    for name in ("streaming", "recommended"):
        register(name, functools.partial(_preset, name))


_register_own()
