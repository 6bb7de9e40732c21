"""What the replaced methods of one model share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from freqkv.cache import FreqKVCache
from freqkv.compressors import Compressor, compressor_name, queries_wanted
from freqkv.config import FreqKVConfig, geometry
from freqkv.layer import FreqKVHybridLayer, FreqKVLayer
from freqkv.models.layers import Analysis, AttentionLayer
from freqkv.models.upstream import CACHE, CHECKPOINTS_WITH_GRADIENTS_ONLY, cache_name
from freqkv.patching.masks import Masks
from freqkv.patching.methods import Replacement
from freqkv.patching.queries import check_gives_queries
from freqkv.patching.tables import Tables
from freqkv.schedule import Schedule, Schedules, schedule_of

__all__ = ["PatchState", "Settings", "Wrapper", "first_tensor"]


def first_tensor(given: Any) -> Tensor | None:
    """Of an argument that is a tensor, several, or None."""
    return given if given is None or isinstance(given, Tensor) else given[0]


@dataclass(frozen=True)
class Settings:
    """What calls without a cache run with.

    Attributes
    ----------
    config : FreqKVConfig
        With its window resolved.
    compressor : callable
    schedule : Schedule or dict of int to Schedule, optional
        As :class:`FreqKVCache` takes it.
    """

    config: FreqKVConfig
    compressor: Compressor
    schedule: Schedules | None = None

    @cached_property
    def paper(self) -> Schedule:
        return self.config.schedule

    def schedule_of(self, index: int) -> Schedule:
        """The schedule of a layer."""
        return schedule_of(index, self.schedule, None if isinstance(self.schedule, Schedule) else self.paper)

    def __str__(self) -> str:
        numbers = f"schedule={self.schedule}" if isinstance(self.schedule, Schedule) else str(self.config)
        if self.schedule and not isinstance(self.schedule, Schedule):
            numbers += f", schedule={dict(self.schedule)}"
        return f"{numbers}, compressor={compressor_name(self.compressor)}"


class PatchState:
    """The analysis of a model, its tables and masks, and the settings for calls without a cache.

    Attributes
    ----------
    settings : Settings or None
        None if calls without a cache are left alone.
    """

    def __init__(self, model: PreTrainedModel, analysis: Analysis) -> None:
        self.model_config = model.config.get_text_config(decoder=True)
        self.geometry = geometry(model.config)
        self.analysis = analysis
        self.tables = Tables(analysis.layers)
        self.masks = Masks()
        self.settings: Settings | None = None
        self._shared = WeakTensorKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shared": None}  # of calls under way, by tensors that a copy does not have

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_shared": WeakTensorKeyDictionary()}

    @cached_property
    def makes_all_masks(self) -> bool:
        """Whether no layer needs a mask of the decoder."""
        return not self.analysis.others and not any(layer.hybrid for layer in self.analysis.layers)

    @cached_property
    def has_one_module_per_layer(self) -> bool:
        """Whether each attention module has a cache layer of its own, and each layer has one."""
        indices = [layer.layer_idx for layer in self.analysis.layers if not layer.reads_shared]
        return sorted(indices) == list(range(self.model_config.num_hidden_layers))

    @cached_property
    def _owning(self) -> list[AttentionLayer]:
        return [layer for layer in self.analysis.layers if not layer.reads_shared]

    def drops_caches(self) -> bool:
        """Whether gradient checkpointing takes caches away on the way to the layers."""
        decoder = self.analysis.decoder
        if not decoder.training or (CHECKPOINTS_WITH_GRADIENTS_ONLY and not torch.is_grad_enabled()):
            return False
        return any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())

    def schedules_of(self, settings: Settings) -> list[Schedule]:
        """The schedules of the layers, of some settings."""
        return [settings.schedule_of(layer.layer_idx) for layer in self._owning]

    def schedules(self) -> list[Schedule]:
        """The schedules of the layers, for calls without a cache."""
        assert self.settings is not None
        return self.schedules_of(self.settings)

    def window(self) -> int:
        """The longest window of calls without a cache."""
        return max(schedule.window for schedule in self.schedules())

    def fits(self, tokens: int) -> bool:
        """Whether a call without a cache of as many tokens is folded in no layer."""
        return all(tokens <= schedule.next_fold(1) for schedule in self.schedules())

    def check_method(self, compressor: Compressor, schedules: list[Schedule]) -> None:
        """Raise UnsupportedModelError where this model cannot run with a compressor or with schedules."""
        if queries_wanted(compressor):
            for layer in self._owning:
                check_gives_queries(layer, compressor_name(compressor))
        if len({id(schedule) for schedule in schedules}) > 1 and any(a != schedules[0] for a in schedules):
            reads = next((layer for layer in self.analysis.layers if layer.reads_shared), None)
            several = next((layer for layer in self.analysis.layers if layer.serves_several), None)
            if reads is not None or several is not None:
                from_whom = (reads or several).name  # type: ignore[union-attr]
                raise ValueError(
                    f"schedule: {from_whom} works on the entries of several layers, so that all layers of this model need the "
                    "same schedule. Pass one schedule for all"
                )

    def new_cache(self) -> FreqKVCache:
        """A cache of the settings for calls that bring none."""
        settings = self.settings
        assert settings is not None
        if isinstance(settings.schedule, Schedule):
            return FreqKVCache(self.model_config, compressor=settings.compressor, schedule=settings.schedule)
        return FreqKVCache(
            self.model_config, settings.config, compressor=settings.compressor, schedule=settings.schedule
        )

    def new_layer(self, layer: AttentionLayer) -> FreqKVLayer:
        """A layer of the settings that lives for one call of an attention module."""
        assert self.settings is not None
        kind = FreqKVHybridLayer if layer.hybrid else FreqKVLayer
        schedule = self.settings.schedule_of(layer.layer_idx)
        return kind(schedule, self.settings.compressor, layer.layer_idx, for_one_call=True)

    def shared_by_layers(self, kwargs: dict[str, Any]) -> dict[Any, Any]:
        """What compressors hand from layer to layer, of a call without a cache that a module was called in with `kwargs`.

        All layers of a call get the same tensor of positions, and get it again where gradient checkpointing runs them again.
        """
        positions = first_tensor(kwargs.get("position_embeddings"))
        if positions is None:
            positions = kwargs.get("position_ids")
        return {} if positions is None else self._shared.setdefault(positions, {})  # type: ignore[no-any-return, no-untyped-call]

    def config_of(self, module: nn.Module) -> Any:
        """The configuration that a module goes by."""
        return getattr(module, "config", self.model_config)


class Wrapper(Replacement):
    """A method of a patched model."""

    def __init__(self, owner: nn.Module, state: PatchState) -> None:
        super().__init__(owner)
        self.state = state
        self.cache_name = cache_name(self.parameters) or CACHE
