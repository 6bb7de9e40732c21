"""The errors of FreqKV."""

from __future__ import annotations

__all__ = ["CacheFileError", "UnsupportedModelError"]


class UnsupportedModelError(ValueError):
    """The model cannot run with FreqKV; the message names the family, the reason and the way out."""


class CacheFileError(ValueError):
    """A file that cannot be loaded into this model; the message tells why and what to do."""
