"""How an attention module rotates what it caches, found by replaying a few tokens through it at two sets of slots."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from freqkv.models.modules import (
    Everywhere,
    execution_device,
    parameter_names,
    shallow_copy,
    unhooked_forward,
    weights_present,
)
from freqkv.models.upstream import HOOK, Cache, LinearAttentionAndFullAttentionLayer
from freqkv.rotary import KeyRotation, SlotTable
from freqkv.rotation import find_rotation

__all__ = ["Calibration", "NeedsMoreThanKeysAndValues", "NoUpdate", "replayed_slots"]

# Far apart, so that channels that turn slowly show, and no multiple of each other.
REPLAYED_SLOTS = (1, 3, 17, 101, 1009)


def replayed_slots(text_config: Any, device: torch.device) -> Tensor:
    """The slots that tokens are replayed at."""
    context = getattr(text_config, "max_position_embeddings", None) or REPLAYED_SLOTS[-1] + 1
    return torch.tensor([slot for slot in REPLAYED_SLOTS if slot < context], device=device)


class Calibration:
    """Measures the attention layers of one model."""

    def __init__(self, model: PreTrainedModel, text_config: Any) -> None:
        self.model = model
        self.text_config = text_config
        self._verdicts: dict[Any, tuple[KeyRotation | None, bool]] = {}

    @torch.no_grad()
    def of(self, layer: Any) -> tuple[KeyRotation | None, bool]:
        """How it rotates, and whether it keeps a state of its own."""
        module = layer.module
        if any(p.is_meta for p in module.parameters()) and execution_device(self.model, layer.name) is None:
            # No weights to look at, as in `supported(config)`: how keys are rotated does not depend on them.
            key = type(module), layer.rotary and layer.rotary.layer_type, _traits(module)
            if key not in self._verdicts:
                self._verdicts[key] = self._measure(
                    layer, _with_random_weights(module), torch.float32, torch.device("cpu")
                )
            return self._verdicts[key]
        with weights_present(self.model, layer.name):
            # Quantized modules may have no parameters.
            held = next(itertools.chain(module.parameters(), module.buffers(), self.model.parameters()), None)
            device = execution_device(self.model, layer.name) or (torch.device("cpu") if held is None else held.device)
            return self._measure(layer, _with_uneven_norms(module), self.model.dtype, device)

    def _measure(
        self, layer: Any, module: nn.Module, dtype: torch.dtype, device: torch.device
    ) -> tuple[KeyRotation | None, bool]:
        slots = replayed_slots(self.text_config, device)
        table = None if layer.rotary is None else layer.rotary.table(int(slots[-1]) + 1, device)
        width = getattr(module, "attention_hidden_size", None) or self.text_config.hidden_size
        generator = torch.Generator("cpu").manual_seed(0)
        hidden = torch.randn(1, len(slots), width, generator=generator, device="cpu").to(device, dtype)
        recorders = Recorder(), Recorder()
        raw, rotated = (
            _replay(module, layer, recorder, hidden, table, rows, dtype)
            for recorder, rows in zip(recorders, (torch.zeros_like(slots), slots), strict=True)
        )
        scale = None
        if layer.rule.key_scale is not None:
            scale = module.get_submodule(layer.rule.key_scale).weight
            if bool((scale == 0).any()):  # type: ignore[union-attr]
                raise ValueError(f"{layer.rule.key_scale} multiplies some channels of the keys by 0")
        rotation = find_rotation(raw, rotated, table, slots, scale)  # type: ignore[arg-type]
        return rotation, recorders[0].has_state


def _replay(
    module: nn.Module,
    layer: Any,
    recorder: Recorder,
    hidden: Tensor,
    table: SlotTable | None,
    rows: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What the module hands to `update` for tokens at the slots `rows`."""
    call: dict[str, Any] = {
        name: None
        for name, parameter in inspect.signature(unhooked_forward(module)).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    call |= {name: layer.layer_idx for name in ("layer_idx",) if name in parameter_names(module)}
    call |= {"shared_kv_states": {}} if "shared_kv_states" in call else {}
    call["hidden_states"] = hidden
    call[layer.cache_argument] = recorder
    if table is not None and table.native is not None:
        call["position_embeddings"] = table.embeddings(rows, dtype)
    if "position_ids" in parameter_names(module):
        call["position_ids"] = rows[None]
    devices = [hidden.device] if hidden.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):  # dropout of a model in training draws numbers
            unhooked_forward(module)(**call)
    except Recorded as recorded:
        return recorded.tensors
    raise NoUpdate


class Recorded(Exception):  # noqa: N818 - the wanted outcome, not an error
    """Ends a replay as soon as the module hands over what it caches."""

    def __init__(self, tensors: tuple[Tensor, Tensor]) -> None:
        self.tensors = tensors


class NoUpdate(Exception):  # noqa: N818
    """The module did not hand over anything."""


class NeedsMoreThanKeysAndValues(Exception):  # noqa: N818
    """The module asks its cache for what FreqKV has not."""


class Recorder(Cache):
    """An empty cache that keeps what a module wants to store."""

    def __init__(self) -> None:
        super().__init__(layers=Everywhere([LinearAttentionAndFullAttentionLayer(number_of_states=8)]))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    @property
    def has_state(self) -> bool:
        return any(self.layers[0].is_conv_states_initialized.values())

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int = 0, *args: Any, **kwargs: Any) -> Any:
        raise Recorded((key_states, value_states))

    def update_indexer(self, *args: Any, **kwargs: Any) -> Any:
        raise NeedsMoreThanKeysAndValues(
            "an indexer picks single tokens out of the cache (sparse attention), which no longer exist once they are compressed"
        )


def _traits(module: nn.Module) -> Any:
    """What besides its weights tells one attention module from another."""
    plain = (bool, int, float, str, type(None))
    own = {name: value for name, value in vars(module).items() if isinstance(value, plain) and name != "layer_idx"}
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return tuple(sorted(own.items(), key=lambda item: item[0])), shapes


def _with_uneven_norms(module: nn.Module) -> nn.Module:
    """A module that shares all weights but those vectors that are constant, as norms before training are.

    A norm behind RoPE whose weights are all ones would not show.
    """
    new = shallow_copy(module)
    generator = torch.Generator("cpu").manual_seed(0)
    for name, child in module.named_children():
        constant = {
            key: weight
            for key, weight in child.named_parameters(recurse=False)
            if weight.ndim == 1
            and weight.is_floating_point()
            and not weight.is_meta
            and bool((weight == weight[:1]).all())
        }
        if constant and not hasattr(child, HOOK):  # else its hook brings its weights
            uneven = new._modules[name] = shallow_copy(child)
            for key, weight in constant.items():
                noise = 0.1 * torch.randn(weight.shape, generator=generator, device="cpu")
                uneven._parameters[key] = nn.Parameter(weight + noise.to(weight), requires_grad=False)
    return new


def _with_random_weights(module: nn.Module) -> nn.Module:
    """A copy in float32; what is no parameter, such as a rotary table, stays as it is."""
    config = getattr(module, "config", None)
    module = copy.deepcopy(module, {id(config): config})
    generator = torch.Generator("cpu").manual_seed(0)
    for inner in module.modules():
        for name, parameter in list(inner.named_parameters(recurse=False)):
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            offset = 0.0 if parameter.ndim > 1 else 1.0
            weight = offset + spread * torch.randn(parameter.shape, generator=generator, device="cpu")
            setattr(inner, name, nn.Parameter(weight, requires_grad=False))
    return module
