"""Whether FreqKV serves a model, told without patching it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from freqkv.errors import UnsupportedModelError
from freqkv.models.analysis import analyse
from freqkv.models.layers import Analysis

__all__ = ["Support", "find_model", "supported"]


@dataclass(frozen=True)
class Support:
    """Answer of :func:`supported`; true if FreqKV serves the model.

    Attributes
    ----------
    reason : str
        Why not, and what to use instead; empty if it does.
    analysis : Analysis or None
        What the model is made of, if it does.
    """

    reason: str
    analysis: Analysis | None = None

    def __bool__(self) -> bool:
        return self.analysis is not None

    def __str__(self) -> str:
        if self.analysis is None:
            return f"no: {self.reason}"
        left = f", {len(self.analysis.others)} left to transformers" if self.analysis.others else ""
        return f"yes: {len(self.analysis.layers)} attention modules compressed{left}"


def find_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, also where it stands inside one of another library (PEFT, DDP, `torch.compile`).

    Raises
    ------
    TypeError
        If there is none, or more than one.
    """
    if isinstance(model, PreTrainedModel):
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"pass a transformers model, not a {type(model).__name__}")
    found: list[PreTrainedModel] = []
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel) and not any(inner in set(outer.modules()) for outer in found):
            found.append(inner)
    if len(found) != 1:
        raise TypeError(
            f"pass a transformers model; a {type(model).__name__} has {len(found) or 'none'} of them inside"
        )
    return found[0]


def supported(model_or_config: nn.Module | PreTrainedConfig) -> Support:
    """Tell whether FreqKV serves a model, without patching it.

    Parameters
    ----------
    model_or_config : PreTrainedModel or PreTrainedConfig
        A configuration alone is enough: the model is then built without weights, and its attention modules are tried one
        by one with random ones. A model may stand inside one of PEFT.

    Raises
    ------
    TypeError
        If it is neither.
    """
    if isinstance(model_or_config, PreTrainedConfig):
        try:
            model = _without_weights(model_or_config)
        except (ValueError, ImportError) as error:
            return Support(
                f"{type(model_or_config).__name__}: transformers cannot build its causal language model "
                f"({str(error).splitlines()[0][:200]})"
            )
    elif isinstance(model_or_config, nn.Module):
        model = find_model(model_or_config)
    else:
        raise TypeError(f"pass a transformers model or its config, not a {type(model_or_config).__name__}")
    try:
        return Support("", analyse(model))
    except UnsupportedModelError as error:
        return Support(str(error))


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    config = copy.deepcopy(config)  # building a model writes into its configuration
    auto = AutoModelForCausalLM
    if type(config) not in auto._model_mapping and type(config) in AutoModelForImageTextToText._model_mapping:
        auto = AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]), _LargeOnMeta():
        model: PreTrainedModel = auto.from_config(config)
    return model


class _LargeOnMeta(TorchFunctionMode):
    """Tensors of weights' size take no memory; what rotary modules compute is smaller, and stays real."""

    FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.FACTORIES and kwargs.get("device") is None:
            with torch.device("meta"):
                shaped: Tensor = func(*args, **kwargs)
            if shaped.numel() >= 2**16:
                return shaped
        return func(*args, **kwargs)
