"""One safetensors file with a header: read as a whole or refused, written as a whole or not at all.

The header is one JSON string in the safetensors metadata, with a checksum over itself and all tensors. Nothing in it is ever
executed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from freqkv.errors import CacheFileError

__all__ = ["METADATA_KEY", "bytes_of", "damaged", "plain", "read_file", "write_file"]

# One key only: safetensors writes several in an order of its own, and the same cache is to give the same bytes.
METADATA_KEY = "freqkv_cache"
WIDEST = 10**18  # counts in the header have room for numbers of as many digits


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def bytes_of(tensor: Tensor) -> Any:
    """Those of a contiguous tensor on the CPU, without a copy where that is possible."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def damaged(path: Any, reason: str) -> CacheFileError:
    """The error for a file that is not as it was written."""
    return CacheFileError(
        f"{path} cannot be loaded: {reason}. Take another copy of it, or feed the text to a new cache"
    )


def write_file(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write header and tensors; a file that was there is replaced as a whole, or left as it was."""
    header = {**header, "checksum": _checksum(header, tensors)}
    _write(path, safetensors.torch.save(tensors, {METADATA_KEY: _rendered(header)}))


def read_file(path: Path, versions: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file that is whole.

    Raises
    ------
    CacheFileError
        If it is damaged, no cache of FreqKV, or of another version than `versions`.
    OSError
        If it cannot be read.
    """
    if path.is_dir():
        raise CacheFileError(f"{path} is a folder: name the file that cache.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise damaged(path, f"it is cut off, changed, or no safetensors file ({error})") from error
    if text is None:
        raise CacheFileError(
            f"{path} is a safetensors file, but no cache of FreqKV: name the file that cache.save wrote"
        )
    try:
        header = json.loads(text)
        if header["format_version"] not in versions:
            raise CacheFileError(
                f"{path} has format version {header['format_version']!r}, written by FreqKV {header.get('freqkv')}; this "
                f"FreqKV reads version {' and '.join(map(str, versions))}: load it with that FreqKV, or feed the text to a new "
                "cache"
            )
        # Rendered again, so that no byte of the header can change unnoticed, not even a space.
        intact = header["checksum"] == _checksum(header, tensors) and text == _rendered(header)
    except CacheFileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"its header is not one of FreqKV ({type(error).__name__})") from error
    if not intact:
        raise damaged(path, "its checksum is wrong")
    return header, tensors


def _rendered(header: dict[str, Any]) -> str:
    """As JSON, in a length that does not depend on counts."""
    counts = header["counts"]
    batch = max(len(counts["rows"]), 1)
    widest = dict.fromkeys(counts, WIDEST) | {
        "rows": [WIDEST] * batch,
        "sliding": {index: [WIDEST] * 2 for index in counts["sliding"]},
    }
    return json.dumps(header).ljust(len(json.dumps({**header, "counts": widest})))


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the header without this, and over name, dtype, shape and bytes of each tensor."""
    rest = {name: value for name, value in header.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(rest).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Replace a file as a whole, or leave all as it was."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "name a file to save to, not a folder", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder to save to", str(path.parent))
    temporary = path.with_name(f".freqkv-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # that the new name lasts, where folders can be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
