"""One file for one conversation: what a cache holds, in safetensors format.

The file has the same size after ten tokens and after ten million: tensors are stored at the length they grow to, and the
header, one JSON string in the safetensors metadata, has room for any number of tokens. The header tells what the cache was
made for, so that a file cannot go on in a model that did not fill it, and a checksum over itself and all tensors. Nothing
in it is ever executed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from freqkv.analysis import analyse
from freqkv.cache import FreqKVCache, UnsupportedModelError
from freqkv.compressors import Compressor, check_compressor, keep_recent, low_pass_entries, mean_pool
from freqkv.config import FreqKVConfig, geometry
from freqkv.upstream import HOOK

__all__ = ["CacheFileError", "load_cache", "save_cache"]

logger = logging.getLogger(__name__)

AnyCache = TypeVar("AnyCache", bound=FreqKVCache)

FORMAT_VERSION = 1
# One key only: safetensors writes several in an order of its own, and the same cache is to give the same bytes.
METADATA_KEY = "freqkv_cache"
ENTRIES, SLIDING, WHOLE, STATES = "entries", "sliding", "whole", "states"
# What is stored of each kind of layer. Kinds that are not named here are refused: nothing must be left out unnoticed.
KINDS = {
    "FreqKVLayer": (ENTRIES,),
    "FreqKVHybridLayer": (ENTRIES, STATES),
    "DynamicSlidingWindowLayer": (SLIDING,),
    "LinearAttentionLayer": (STATES,),
    "LinearAttentionAndSlidingWindowAttentionLayer": (SLIDING, STATES),
    "DynamicLayer": (WHOLE,),  # cross-attention: as long as what it was shown
    "DummyLayer": (),
}
SHIPPED = {function.__name__: function for function in (low_pass_entries, keep_recent, mean_pool)}
SAMPLES = 64  # bytes of each parameter that go into the checksum of the weights
WIDEST = 10**18  # counts in the header have room for numbers of as many digits


class CacheFileError(ValueError):
    """A file that cannot be loaded into this model; the message tells why and what to do."""


def save_cache(cache: FreqKVCache, path: str | os.PathLike[str], model: PreTrainedModel | None = None) -> None:
    """Write a cache to one file. See :meth:`FreqKVCache.save`."""
    if cache.forward_start is not None or cache.is_spent:
        raise RuntimeError(
            "this FreqKVCache is within a forward, or spent because one was interrupted half-way, and its layers do not "
            "agree: save between calls. A spent cache can only be reset()"
        )
    if model is not None and _plain(geometry(model.config)) != _plain(cache.geometry):
        raise ValueError(
            f"this FreqKVCache was made for a model of another shape than this {type(model).__name__}: pass the model that "
            "filled it"
        )
    with torch.no_grad():
        info, tensors = _contents(cache)
        info["model"] = None if model is None else _fingerprint(model)
        info["checksum"] = _checksum(info, tensors)
        data = safetensors.torch.save(tensors, {METADATA_KEY: _rendered(info)})
    _write(Path(os.path.realpath(path)), data)


def load_cache(
    kind: type[AnyCache],
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    compressor: Compressor | None = None,
    static: bool = False,
) -> AnyCache:
    """Make a cache of class `kind` from a file. See :meth:`FreqKVCache.load`."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"pass the model that will use the cache, not a {type(model).__name__}")
    info, tensors = _read(Path(path))
    chosen = _chosen_compressor(path, info["compressor"], compressor)
    _check_shape(path, info, model)
    # Tensors made in inference mode could not be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        cache = kind(model.config, FreqKVConfig(**info["config"]), compressor=chosen, static=static)
        _check_layers(path, info, cache)
        devices = _layer_devices(model, len(cache.layers))
        _check_dtype(path, info, model, devices)
        _check_weights(path, info, model)
        try:
            _fill(cache, info, tensors, devices)
        except torch.OutOfMemoryError:
            raise  # a RuntimeError, and not the file's fault
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise _damaged(path, f"its header and its tensors contradict each other ({error!r})") from error
    return cache


def _contents(cache: FreqKVCache) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header without what is known of the model, and the tensors, on the CPU."""
    from freqkv import __version__

    first = cache.layers[cache.compressed_layers[0]]
    tensors: dict[str, Tensor] = {}
    sliding: dict[str, list[int]] = {}
    states: dict[str, list[bool]] = {}
    for index, layer in enumerate(cache.layers):
        parts = KINDS.get(type(layer).__name__)
        if parts is None:
            raise UnsupportedModelError(
                f"layer {index} keeps a {type(layer).__name__}, of which FreqKV does not know what to store, so that this "
                "cache cannot be saved. Save the text instead, and feed it to a new cache"
            )
        held = {name: layer.__dict__.get(name) for name in ("keys", "values")}
        if ENTRIES in parts and layer.seen and layer.keys is not None:
            for name, buffer in held.items():
                tensors[f"{index}.{name}"] = _entries_in_use(layer, buffer)
        elif SLIDING in parts and layer.is_initialized:
            longest = layer.sliding_window - 1
            held = {name: entries[:, :, -longest:] for name, entries in held.items()}  # more is kept to crop only
            sliding[str(index)] = [held["keys"].shape[2], layer.cumulative_length]
            for name, entries in held.items():
                tensors[f"{index}.{name}"] = functional.pad(entries, (0, 0, 0, longest - entries.shape[2]))
        elif WHOLE in parts and layer.is_initialized:
            tensors |= {f"{index}.{name}": entries.clone() for name, entries in held.items()}
        if STATES in parts:
            states[str(index)] = [layer.has_previous_state[i] for i in range(layer.number_of_states)]
            tensors |= {f"{index}.{name}": state.clone() for name, state in _states(layer)}
    for index, state in enumerate(_extra_states(cache)):
        if isinstance(state, Tensor):
            tensors[f"{index}.extra"] = state.clone()
    keys = next((tensors[f"{i}.keys"] for i in cache.compressed_layers if f"{i}.keys" in tensors), None)
    info = {
        "format_version": FORMAT_VERSION,
        "freqkv": __version__,
        "transformers": transformers.__version__,
        "config": asdict(cache.config),
        "compressor": _compressor_name(cache.compressor),
        "dtype": None if keys is None else str(keys.dtype).removeprefix("torch."),
        "geometry": _plain(cache.geometry),
        "layers": _kinds(cache),
        "states": states,
        "counts": {
            "tokens_seen": cache.tokens_seen,
            "padding": cache._padding,
            "ragged": int(first.rows is not None),
            "rows": first.row_tokens(0 if keys is None else keys.shape[0]),
            "sliding": sliding,
        },
    }
    return info, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _entries_in_use(layer: Any, buffer: Tensor) -> Tensor:
    """`(batch, kv_heads, window, head_dim)` on the CPU: zeros behind the entries of each row."""
    stored = torch.zeros((*buffer.shape[:2], layer.schedule.window, buffer.shape[3]), dtype=buffer.dtype)
    stored[:, :, : layer.entries] = buffer[:, :, : layer.entries].cpu()
    for row, tokens in enumerate(layer.row_tokens(buffer.shape[0])):
        stored[row, :, layer.schedule.entries(tokens) :] = 0
    return stored


def _states(layer: Any) -> Iterator[tuple[str, Tensor]]:
    """Convolution and recurrent states of a layer, as it has them when it does not record its past."""
    for index in range(layer.number_of_states):
        if layer.is_conv_states_initialized[index]:
            size, state = layer.conv_kernel_size[index], layer.conv_states[index]
            state = functional.pad(state[..., -size:], (max(0, size - state.shape[-1]), 0))
            yield f"conv_states.{index}", state
        if layer.is_recurrent_states_initialized[index]:
            yield f"recurrent_states.{index}", layer.recurrent_states[index]


def _extra_states(cache: FreqKVCache) -> list[Any]:
    """What the family keeps beside its layers, by layer."""
    return [] if cache._extra_state is None else getattr(cache, cache._extra_state)  # type: ignore[no-any-return]


def _fill(cache: FreqKVCache, info: dict[str, Any], tensors: dict[str, Tensor], devices: list[torch.device]) -> None:
    """Put what was stored into a new cache."""
    counts = info["counts"]
    left = dict(tensors)

    def take(index: int, name: str) -> Tensor | None:
        stored = left.pop(f"{index}.{name}", None)
        # A copy of its own: what safetensors returns may be a part of the file.
        return None if stored is None else stored.to(devices[index], copy=True)

    for index, layer in enumerate(cache.layers):
        parts = KINDS[type(layer).__name__]
        keys, values = (take(index, name) if parts else None for name in ("keys", "values"))
        if ENTRIES in parts:
            layer._seen = counts["tokens_seen"] - counts["padding"]
            layer.rows = list(counts["rows"]) if counts["ragged"] else None
            shapes = [(len(counts["rows"]), layer.schedule.window) if layer.seen else None] * 2
            if [None if t is None else (t.shape[0], t.shape[2]) for t in (keys, values)] != shapes:
                raise ValueError(f"layer {index}: {layer.seen} tokens in {counts['rows']}")
        if keys is not None and values is not None:
            layer.lazy_initialization(keys, values)
            if ENTRIES in parts:
                layer._owns_buffer = True
            elif SLIDING in parts:
                held, layer.cumulative_length = counts["sliding"][str(index)]
                keys, values = keys[:, :, :held], values[:, :, :held]
            layer.keys, layer.values = keys, values
        if STATES in parts:
            for number, has_previous in enumerate(info["states"][str(index)]):
                layer.has_previous_state[number] = has_previous
                for name in ("conv_states", "recurrent_states"):
                    state = take(index, f"{name}.{number}")
                    if state is not None:
                        layer.lazy_initialization(**{name: state}, state_idx=number)
                        getattr(layer, name)[number].copy_(state)
    extra = _extra_states(cache)
    for name in sorted((name for name in left if name.endswith(".extra")), key=lambda name: int(name.split(".")[0])):
        index = int(name.split(".")[0])
        extra += [[] for _ in range(len(extra), index)]  # as the family's own class fills up
        extra.append(take(index, "extra"))
    if left:
        raise ValueError(f"unknown tensors {', '.join(left)}")
    cache._padding = counts["padding"]
    cache.history = cache.history.extended(counts["tokens_seen"], None, None)  # which is not stored
    if counts["ragged"] or counts["padding"]:
        # Which of the last tokens were padding is not stored, since they may be any number: they cannot be cropped.
        cache._last_real = torch.ones((len(counts["rows"]), 0), dtype=torch.bool)


def _kinds(cache: FreqKVCache) -> list[dict[str, Any]]:
    """What kind of layer each one is, with the sizes that are no tensor's."""
    return [
        {
            "kind": type(layer).__name__,
            **{name: vars(layer)[name] for name in ("sliding_window", "number_of_states") if name in vars(layer)},
        }
        for layer in cache.layers
    ]


def _compressor_name(compressor: Compressor) -> str:
    """The same in every process, unlike `repr`."""
    name = getattr(compressor, "__name__", type(compressor).__name__)
    return name if SHIPPED.get(name) is compressor else f"{name} (custom)"


def _chosen_compressor(path: Any, stored: str, given: Compressor | None) -> Compressor:
    if given is None and stored in SHIPPED:
        return SHIPPED[stored]
    if given is None:
        raise CacheFileError(f"{path} was compressed by {stored}, which is not FreqKV's own: pass it as compressor=")
    if _compressor_name(check_compressor(given)) != stored:
        raise CacheFileError(
            f"{path} was compressed by {stored}, and compressor= is {_compressor_name(given)}: pass the one that it was "
            "filled with, or feed the text to a new cache"
        )
    return given


def _fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What tells this model from others."""
    return {
        "name": _name(model),
        "type": getattr(model.config, "model_type", None),
        "parameters": _parameter_checksum(model),
        "weights": _weight_checksum(model),
    }


def _name(model: PreTrainedModel) -> str:
    # Of a path, only the last part: files are passed on, and folders tell about their owner.
    name = Path(str(getattr(model.config, "_name_or_path", None) or "")).name
    return f"{type(model).__name__} {name}".rstrip()


def _parameter_checksum(model: nn.Module) -> str:
    shapes = sorted(f"{name} {tuple(parameter.shape)}" for name, parameter in model.named_parameters())
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()


def _weight_checksum(model: nn.Module) -> str | None:
    """Over a few values of each parameter; None where some are not at hand (offloaded, sharded, on the meta device)."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        data = parameter.data
        if data.is_meta or type(data) is not Tensor:
            return None
        raw = data.reshape(-1).view(torch.uint8)
        where = torch.linspace(0, raw.numel() - 1, min(SAMPLES, raw.numel()), dtype=torch.float64).long()
        digest.update(name.encode())
        digest.update(_bytes(raw[where.to(raw.device)].cpu()))
    return digest.hexdigest()


def _check_shape(path: Any, info: dict[str, Any], model: PreTrainedModel) -> None:
    there = "another model" if info["model"] is None else info["model"]["name"]
    stored, own = info["geometry"], _plain(geometry(model.config))
    if info["model"] is not None:
        stored = {"model type": info["model"]["type"], **stored}
        own = {"model type": getattr(model.config, "model_type", None), **own}
    for what in own:
        if stored.get(what) != own[what]:
            raise CacheFileError(
                f"{path} was filled by {there} with {what} {stored.get(what)!r}; this model, {_name(model)}, has "
                f"{own[what]!r}: load it into the model that filled it"
            )


def _check_layers(path: Any, info: dict[str, Any], cache: FreqKVCache) -> None:
    stored, here = info["layers"], _kinds(cache)
    if len(stored) != len(here):
        raise CacheFileError(
            f"{path} holds {len(stored)} layers, a cache for this model {len(here)}: load it into the model that filled it, "
            f"with the transformers that it was saved with ({info['transformers']})"
        )
    for index, (there, own) in enumerate(zip(stored, here, strict=True)):
        if there != own:
            raise CacheFileError(
                f"{path} holds a layer {index} of kind {there}, a cache for this model {own}: load it into the model that "
                f"filled it, with the transformers that it was saved with ({info['transformers']})"
            )


def _check_dtype(path: Any, info: dict[str, Any], model: PreTrainedModel, devices: list[torch.device]) -> None:
    allowed = [model.dtype]
    where = devices[0].type
    if torch.amp.is_autocast_available(where) and torch.is_autocast_enabled(where):
        allowed.append(torch.get_autocast_dtype(where))
    names = [str(dtype).removeprefix("torch.") for dtype in allowed]
    if info["dtype"] is not None and info["dtype"] not in names:
        raise CacheFileError(
            f"{path} holds {info['dtype']} entries, this model works in {' or '.join(names)}: load the model with "
            f"dtype=torch.{info['dtype']}"
        )


def _check_weights(path: Any, info: dict[str, Any], model: PreTrainedModel) -> None:
    stored = info["model"]
    if stored is None:
        logger.warning(
            "%s does not tell which model filled it, only its shape: save with cache.save(path, model) to have that checked",
            path,
        )
        return
    if stored["parameters"] != _parameter_checksum(model):
        raise CacheFileError(
            f"{path} was filled by {stored['name']}, whose parameters have other names or shapes than those of this model, "
            f"{_name(model)}: load it into the model that filled it"
        )
    weights = _weight_checksum(model)
    if stored["weights"] is None or weights is None:
        logger.warning(
            "%s was filled by a model of the shape of this one, but their weights were not compared: they were not all in "
            "memory (offloaded, sharded, or on the meta device) when it was %s",
            path,
            "saved" if stored["weights"] is None else "loaded",
        )
    elif stored["weights"] != weights:
        raise CacheFileError(
            f"{path} was filled by {stored['name']}, which has the shape of this model, {_name(model)}, but other weights: "
            "load it into the model that filled it, or feed the text to a new cache"
        )


def _layer_devices(model: PreTrainedModel, layers: int) -> list[torch.device]:
    """Where the keys and states of each layer are made."""
    present = {parameter.device for parameter in model.parameters()}
    if len(present) == 1 and not any(device.type == "meta" for device in present):
        return [present.pop()] * layers
    found: dict[int, torch.device] = {}
    for module in analyse(model).decoder.modules():
        index, device = getattr(module, "layer_idx", None), _computes_on(module)
        if isinstance(index, int) and device is not None:
            found.setdefault(index, device)
    elsewhere = next(iter(found.values()), model.device)
    return [found.get(index, elsewhere) for index in range(layers)]


def _computes_on(module: nn.Module) -> torch.device | None:
    """Where a module computes: where its weights are, or where accelerate brings them."""
    for inner in module.modules():
        device = getattr(getattr(inner, HOOK, None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((parameter.device for parameter in module.parameters() if not parameter.is_meta), None)


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def _rendered(info: dict[str, Any]) -> str:
    """As JSON, in a length that does not depend on counts."""
    counts = info["counts"]
    batch = max(len(counts["rows"]), 1)
    widest = dict.fromkeys(counts, WIDEST) | {
        "rows": [WIDEST] * batch,
        "sliding": {index: [WIDEST] * 2 for index in counts["sliding"]},
    }
    return json.dumps(info).ljust(len(json.dumps({**info, "counts": widest})))


def _checksum(info: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the header without this, and over name, dtype, shape and bytes of each tensor."""
    rest = {name: value for name, value in info.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(rest).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """Those of a contiguous tensor on the CPU, without a copy where that is possible."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file that is whole."""
    if path.is_dir():
        raise CacheFileError(f"{path} is a folder: name the file that cache.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise _damaged(path, f"it is cut off, changed, or no safetensors file ({error})") from error
    if text is None:
        raise CacheFileError(
            f"{path} is a safetensors file, but no cache of FreqKV: name the file that cache.save wrote"
        )
    try:
        info = json.loads(text)
        if info["format_version"] != FORMAT_VERSION:
            raise CacheFileError(
                f"{path} has format version {info['format_version']!r}, written by FreqKV {info.get('freqkv')}; this FreqKV "
                f"reads version {FORMAT_VERSION}: load it with that FreqKV, or feed the text to a new cache"
            )
        # Rendered again, so that no byte of the header can change unnoticed, not even a space.
        intact = info["checksum"] == _checksum(info, tensors) and text == _rendered(info)
    except CacheFileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header is not one of FreqKV ({type(error).__name__})") from error
    if not intact:
        raise _damaged(path, "its checksum is wrong")
    return info, tensors


def _damaged(path: Any, reason: str) -> CacheFileError:
    return CacheFileError(
        f"{path} cannot be loaded: {reason}. Take another copy of it, or feed the text to a new cache"
    )


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
