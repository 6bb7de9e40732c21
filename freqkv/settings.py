"""`freqkv.json`: the numbers and the compressor that go with a model, in a file beside its weights."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from freqkv.compressors import (
    Compressor,
    check_compressor,
    compressor_name,
    compressor_parameters,
    keep_recent,
    low_pass_entries,
    mean_pool,
)
from freqkv.config import FreqKVConfig
from freqkv.selection import KeepAttended, KeepNovel

__all__ = ["FILE", "Settings", "compressor_of", "name_of"]

FILE = "freqkv.json"
_FUNCTIONS: dict[str, Compressor] = {f.__name__: f for f in (low_pass_entries, keep_recent, mean_pool)}
_CLASSES: dict[str, type[Any]] = {"keep_attended": KeepAttended, "keep_novel": KeepNovel}  # with numbers of their own


def name_of(compressor: Compressor) -> str | None:
    """The name of one of FreqKV's own compressors, the same in every process; None for another one."""
    for name, kind in _CLASSES.items():
        if type(compressor) is kind:
            return name
    name = getattr(compressor, "__name__", "")
    return name if _FUNCTIONS.get(name) is compressor else None


def compressor_of(name: str, **numbers: Any) -> Compressor:
    """One of FreqKV's own compressors by its name, with the numbers of those that have some.

    Raises
    ------
    ValueError
        If there is none of that name, or it has no such number.
    """
    if name in _FUNCTIONS and not numbers:
        return _FUNCTIONS[name]
    if name not in _CLASSES:
        about = f"has no numbers, got {numbers}" if name in _FUNCTIONS else "is none of FreqKV's own"
        raise ValueError(f"compressor {name!r} {about}: take one of {', '.join([*_FUNCTIONS, *_CLASSES])}")
    try:
        made: Compressor = _CLASSES[name](**numbers)
    except TypeError as error:
        raise ValueError(f"compressor {name!r}: {error}") from None
    return made


@dataclass(frozen=True)
class Settings:
    """Numbers and a compressor, as `FreqKVCache` and `freqkv.patch` take them.

    Attributes
    ----------
    config : FreqKVConfig
    compressor : callable

    Examples
    --------
    >>> settings = freqkv.Settings.load("folder")
    >>> cache = FreqKVCache(model.config, **settings.options)
    """

    config: FreqKVConfig
    compressor: Compressor = low_pass_entries

    @property
    def options(self) -> dict[str, Any]:
        """As arguments of :class:`FreqKVCache` and :func:`freqkv.patch`."""
        return {"config": self.config, "compressor": self.compressor}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `freqkv.json` into a folder that exists.

        Raises
        ------
        ValueError
            If the compressor is not FreqKV's own, so that a file cannot name it.
        """
        name = name_of(check_compressor(self.compressor))
        if name is None:
            raise ValueError(
                f"compressor {compressor_name(self.compressor)} is not FreqKV's own, so that {FILE} cannot name it: write down "
                "the numbers, and pass it as compressor="
            )
        told = {**asdict(self.config), "compressor": name, **compressor_parameters(self.compressor)}
        (Path(folder) / FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Settings:
        """Read a `freqkv.json`, or that of a folder. Files of version 0.1 hold the four numbers only.

        Raises
        ------
        OSError
            If there is no such file.
        ValueError
            If it holds something else.
        """
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            config = FreqKVConfig(**{name: told.pop(name) for name in asdict(FreqKVConfig()) if name in told})
            return cls(config, compressor_of(told.pop("compressor", "low_pass_entries"), **told))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is no {FILE}: {error}") from None
