"""What tells one model from others: its name, the shapes of its parameters, and samples of its weights."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from freqkv.errors import CacheFileError
from freqkv.models.analysis import analyse
from freqkv.models.modules import computes_on

__all__ = ["Fingerprint", "check_fingerprint", "fingerprint", "layer_devices", "model_name"]

logger = logging.getLogger(__name__)

SAMPLES = 64  # bytes of each parameter that go into the checksum of the weights


@dataclass(frozen=True)
class Fingerprint:
    """What a file tells of the model that filled its cache.

    Attributes
    ----------
    name, type : str
    parameters : str
        SHA-256 over the names and shapes of its parameters.
    weights : str or None
        SHA-256 over samples of them; None where some were not in memory.
    """

    name: str
    type: str | None
    parameters: str
    weights: str | None


def fingerprint(model: PreTrainedModel) -> Fingerprint:
    """That of a model."""
    kind = getattr(model.config, "model_type", None)
    return Fingerprint(model_name(model), kind, _parameter_checksum(model), _weight_checksum(model))


def check_fingerprint(path: Any, stored: Fingerprint, model: PreTrainedModel) -> None:
    """Raise CacheFileError where another model filled the cache in a file."""
    own = fingerprint(model)
    if stored.parameters != own.parameters:
        raise CacheFileError(
            f"{path} was filled by {stored.name}, whose parameters have other names or shapes than those of this model, "
            f"{own.name}: load it into the model that filled it"
        )
    if stored.weights is None or own.weights is None:
        logger.warning(
            "%s was filled by a model of the shape of this one, but their weights were not compared: they were not all in "
            "memory (offloaded, sharded, or on the meta device) when it was %s",
            path,
            "saved" if stored.weights is None else "loaded",
        )
    elif stored.weights != own.weights:
        raise CacheFileError(
            f"{path} was filled by {stored.name}, which has the shape of this model, {own.name}, but other weights: "
            "load it into the model that filled it, or feed the text to a new cache"
        )


def model_name(model: PreTrainedModel) -> str:
    """Its class, and what it was loaded from."""
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
        where = torch.linspace(0, raw.numel() - 1, min(SAMPLES, raw.numel()), dtype=torch.float64, device="cpu")
        where = where.long()
        digest.update(name.encode())
        digest.update(raw[where.to(raw.device)].cpu().numpy().data)
    return digest.hexdigest()


def layer_devices(model: PreTrainedModel, layers: int) -> list[torch.device]:
    """Where the keys and states of each layer are made."""
    present = {parameter.device for parameter in model.parameters()}
    if len(present) == 1 and not any(device.type == "meta" for device in present):
        return [present.pop()] * layers
    found: dict[int, torch.device] = {}
    for module in analyse(model).decoder.modules():
        index, device = getattr(module, "layer_idx", None), computes_on(module)
        if isinstance(index, int) and device is not None:
            found.setdefault(index, device)
    elsewhere = next(iter(found.values()), model.device)
    return [found.get(index, elsewhere) for index in range(layers)]
