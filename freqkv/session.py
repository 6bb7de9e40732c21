"""One file for one conversation: what a cache holds, in safetensors format.

The file does not grow once the window is full. Its header tells what the cache was made for, so that it cannot go on in a model
that did not fill it.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from freqkv.compressors import (
    Compressor,
    check_compressor,
    compressor_parameters,
)
from freqkv.config import FreqKVConfig, geometry
from freqkv.entries import LayerState
from freqkv.errors import CacheFileError, UnsupportedModelError
from freqkv.files import damaged, plain, read_file, write_file
from freqkv.layer import FreqKVLayer
from freqkv.models.fingerprint import (
    Fingerprint,
    check_fingerprint,
    fingerprint,
    layer_devices,
    model_name,
)
from freqkv.models.states import load_state, sizes, state_of
from freqkv.schedule import Schedule, Schedules
from freqkv.settings import compressor_of, name_of
from freqkv.version import __version__

__all__ = ["load_cache", "save_cache"]

logger = logging.getLogger(__name__)

# Version 1 is that of FreqKV 0.1.0: the paper's schedule, and buffers of the whole window.
READS, WRITES = (1, 2), 2


def save_cache(cache: Any, path: str | os.PathLike[str], model: PreTrainedModel | None = None) -> None:
    """Write a cache to one file. See :meth:`FreqKVCache.save`."""
    if cache.is_under_way or cache.is_spent:
        raise RuntimeError(
            "this FreqKVCache is within a forward, or spent because one was interrupted half-way, and its layers do not "
            "agree: save between calls. A spent cache can only be reset()"
        )
    if model is not None and plain(geometry(model.config)) != plain(cache.geometry):
        raise ValueError(
            f"this FreqKVCache was made for a model of another shape than this {type(model).__name__}: pass the model that "
            "filled it"
        )
    with torch.no_grad():
        header, tensors = _contents(cache)
        header["model"] = None if model is None else asdict(fingerprint(model))
        write_file(Path(os.path.realpath(path)), header, tensors)


def load_cache(
    kind: type[Any],
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    compressor: Compressor | None = None,
    schedule: Schedules | None = None,
    static: bool = False,
) -> Any:
    """Make a cache of class `kind` from a file. See :meth:`FreqKVCache.load`."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"pass the model that will use the cache, not a {type(model).__name__}")
    header, tensors = read_file(Path(path), READS)
    chosen = _chosen_compressor(path, header, compressor)
    _check_shape(path, header, model)
    config: FreqKVConfig | None = FreqKVConfig(**header["config"])
    if isinstance(schedule, Schedule):
        config = None  # it decides all
    # Tensors made in inference mode could not be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        cache = kind(model.config, config, compressor=chosen, schedule=schedule, static=static)
        _check_layers(path, header, cache)
        _check_schedules(path, header, cache)
        devices = layer_devices(model, len(cache.layers))
        _check_dtype(path, header, model, devices)
        if header["model"] is None:
            logger.warning(
                "%s does not tell which model filled it, only its shape: save with cache.save(path, model) to have that "
                "checked",
                path,
            )
        else:
            check_fingerprint(path, Fingerprint(**header["model"]), model)
        try:
            _fill(cache, header, tensors, devices)
        except torch.OutOfMemoryError:
            raise  # a RuntimeError, and not the file's fault
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise damaged(path, f"its header and its tensors contradict each other ({error!r})") from error
    return cache


def _contents(cache: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header without what is known of the model, and the tensors, on the CPU."""
    tensors: dict[str, Tensor] = {}
    sliding: dict[str, list[int]] = {}
    states: dict[str, list[bool]] = {}
    scaling: dict[str, float] = {}
    for index, layer in enumerate(cache.layers):
        try:
            stored = state_of(layer)
        except KeyError:
            raise UnsupportedModelError(
                f"layer {index} keeps a {type(layer).__name__}, of which FreqKV does not know what to store, so that this "
                "cache cannot be saved. Save the text instead, and feed it to a new cache"
            ) from None
        held = stored.tensors
        if isinstance(layer, FreqKVLayer):
            own = layer.state()
            held = {**held, **own.tensors}
            if "queries" in own.tensors:
                scaling[str(index)] = own.scaling
        tensors |= {f"{index}.{name}": tensor for name, tensor in held.items()}
        if stored.sliding is not None:
            sliding[str(index)] = stored.sliding
        if stored.has_previous is not None:
            states[str(index)] = stored.has_previous
    for index, state in enumerate(cache.extra_state or []):
        if isinstance(state, Tensor):
            tensors[f"{index}.extra"] = state.clone()
    keys = next((tensors[f"{i}.keys"] for i in cache.compressed_layers if f"{i}.keys" in tensors), None)
    header = {
        "format_version": WRITES,
        "freqkv": __version__,
        "transformers": transformers.__version__,
        "config": asdict(cache.config),
        "schedules": _schedules(cache),
        "compressor": _compressor_name(cache.compressor),
        "compressor_parameters": plain(compressor_parameters(cache.compressor)),
        "dtype": None if keys is None else str(keys.dtype).removeprefix("torch."),
        "geometry": plain(cache.geometry),
        "layers": [sizes(layer) for layer in cache.layers],
        "states": states,
        "scaling": scaling,
        "counts": {
            "tokens_seen": cache.tokens_seen,
            "padded": int(cache.padding.token_mask is not None),
            "rows": list(cache.counts),
            "sliding": sliding,
        },
    }
    return header, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _fill(cache: Any, header: dict[str, Any], tensors: dict[str, Tensor], devices: list[torch.device]) -> None:
    """Put what was stored into a new cache."""
    counts = header["counts"]
    left = dict(tensors)
    rows = tuple(counts["rows"])
    for index, layer in enumerate(cache.layers):

        def take(name: str, index: int = index) -> Tensor | None:
            stored = left.pop(f"{index}.{name}", None)
            # A copy of its own: what safetensors returns may be a part of the file.
            return None if stored is None else stored.to(devices[index], copy=True)

        if isinstance(layer, FreqKVLayer):
            held = {name: tensor for name in ("keys", "values", "queries") if (tensor := take(name)) is not None}
            scaling = header.get("scaling", {}).get(str(index), 1.0)
            layer.load_state(LayerState(rows, held, scaling))
        load_state(layer, take, counts["sliding"].get(str(index)), header["states"].get(str(index)))
    extra = [] if cache.extra_state is None else cache.extra_state
    for name in sorted((name for name in left if name.endswith(".extra")), key=lambda name: int(name.split(".")[0])):
        index = int(name.split(".")[0])
        extra += [[] for _ in range(len(extra), index)]  # as the family's own class fills up
        extra.append(left.pop(name).to(devices[index], copy=True))
    if left:
        raise ValueError(f"unknown tensors {', '.join(left)}")
    padded = counts["padded"] if "padded" in counts else counts["ragged"] or counts["padding"]
    cache.begin_from(counts["tokens_seen"], len(rows) if padded else None)


def _schedules(cache: Any) -> list[Any]:
    """Name and numbers of each compressed layer's schedule; one for all where they are alike."""
    told = [[schedule.name, plain(schedule.parameters())] for schedule in cache.layer_schedules]
    return told[:1] if all(each == told[0] for each in told) else told


def _check_schedules(path: Any, header: dict[str, Any], cache: Any) -> None:
    here, stored = _schedules(cache), header.get("schedules")
    if stored is not None and stored != here:
        raise CacheFileError(
            f"{path} was filled with schedule {_in_words(stored)}, this cache has {_in_words(here)}: pass the one that it was "
            "filled with as schedule=, or feed the text to a new cache"
        )


def _in_words(schedules: list[Any]) -> str:
    words = [f"{name}({', '.join(f'{k}={v}' for k, v in numbers.items())})" for name, numbers in schedules]
    return words[0] if len(words) == 1 else f"by layer [{', '.join(words)}]"


def _compressor_name(compressor: Compressor) -> str:
    """The same in every process, unlike `repr`."""
    own = getattr(compressor, "__name__", type(compressor).__name__)
    return name_of(compressor) or f"{own} (custom)"


def _chosen_compressor(path: Any, header: dict[str, Any], given: Compressor | None) -> Compressor:
    stored, numbers = header["compressor"], header.get("compressor_parameters", {})
    if given is None:
        try:
            return compressor_of(stored, **numbers)
        except ValueError:
            raise CacheFileError(
                f"{path} was compressed by {stored}, which is not FreqKV's own: pass it as compressor="
            ) from None
    own = _compressor_name(check_compressor(given)), plain(compressor_parameters(given))
    if own != (stored, numbers):
        theirs, ours = (
            name + (f" with {parameters}" if parameters else "") for name, parameters in ((stored, numbers), own)
        )
        raise CacheFileError(
            f"{path} was compressed by {theirs}, and compressor= is {ours}: pass the one that it was "
            "filled with, or feed the text to a new cache"
        )
    return given


def _check_shape(path: Any, header: dict[str, Any], model: PreTrainedModel) -> None:
    there = "another model" if header["model"] is None else header["model"]["name"]
    stored, own = header["geometry"], plain(geometry(model.config))
    if header["model"] is not None:
        stored = {"model type": header["model"]["type"], **stored}
        own = {"model type": getattr(model.config, "model_type", None), **own}
    for what in own:
        if stored.get(what) != own[what]:
            raise CacheFileError(
                f"{path} was filled by {there} with {what} {stored.get(what)!r}; this model, {model_name(model)}, has "
                f"{own[what]!r}: load it into the model that filled it"
            )


def _check_layers(path: Any, header: dict[str, Any], cache: Any) -> None:
    stored, here = header["layers"], [sizes(layer) for layer in cache.layers]
    if len(stored) != len(here):
        raise CacheFileError(
            f"{path} holds {len(stored)} layers, a cache for this model {len(here)}: load it into the model that filled it, "
            f"with the transformers that it was saved with ({header['transformers']})"
        )
    for index, (there, own) in enumerate(zip(stored, here, strict=True)):
        if there != own:
            raise CacheFileError(
                f"{path} holds a layer {index} of kind {there}, a cache for this model {own}: load it into the model that "
                f"filled it, with the transformers that it was saved with ({header['transformers']})"
            )


def _check_dtype(path: Any, header: dict[str, Any], model: PreTrainedModel, devices: list[torch.device]) -> None:
    allowed = [model.dtype]
    where = devices[0].type
    if torch.amp.is_autocast_available(where) and torch.is_autocast_enabled(where):
        allowed.append(torch.get_autocast_dtype(where))
    names = [str(dtype).removeprefix("torch.") for dtype in allowed]
    if header["dtype"] is not None and header["dtype"] not in names:
        raise CacheFileError(
            f"{path} holds {header['dtype']} entries, this model works in {' or '.join(names)}: load the model with "
            f"dtype=torch.{header['dtype']}"
        )
