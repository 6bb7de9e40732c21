"""What a model is made of, as far as a cache is concerned: its attention layers, and how each rotates what it caches.

Nothing here goes by class names. Attention modules are found by what their forward takes, layer kinds are those of
transformers' own cache for the model, and rotation is measured: a few tokens are replayed through each attention module
twice, at slot 0 (where RoPE turns nothing) and at other slots.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from freqkv.cache import Everywhere, FreqKVCache, UnsupportedModelError
from freqkv.config import FreqKVConfig
from freqkv.families import FamilyRule, rule_for
from freqkv.layer import FreqKVHybridLayer, FreqKVLayer
from freqkv.observation import NOT_GIVEN, embeddings_given
from freqkv.rotary import KeyRotation, SlotTable, TableVersion, find_rotation, sinusoid_table, slot_table
from freqkv.upstream import (
    ATTENTION_CACHE_NAMES,
    HOOK,
    HOOKED_FORWARD,
    SINUSOIDS,
    Cache,
    LinearAttentionAndFullAttentionLayer,
    cache_name,
    is_rotary,
    missing,
    outdated,
)

__all__ = ["Analysis", "AttentionLayer", "Support", "analyse", "supported"]

# A module that serves several cache layers is told which by one of these.
INDEX_ARGUMENTS = ("layer_idx", "cycle_offset")
# Far apart, so that channels that turn slowly show, and no multiple of each other.
REPLAYED_SLOTS = (1, 3, 17, 101, 1009)
NO_ROTATION = (
    "has no rotary position embeddings that FreqKV can find: it moves keys between positions by RoPE, which learned, ALiBi "
    "or relative positions do not allow"
)


@dataclass(frozen=True)
class Rotary:
    """Where the embeddings of a layer come from: a child of `owner`, and its table if it has one for each layer type."""

    owner: nn.Module
    name: str
    layer_type: str | None = None

    @property
    def source(self) -> Any:
        return getattr(self.owner, self.name)

    def version(self) -> TableVersion:
        """Another one when tables have to be made anew, as after `model.to(...)`."""
        return TableVersion(self.source)

    def table(self, slots: int, device: torch.device) -> SlotTable:
        source = self.source
        if isinstance(source, Tensor):
            return sinusoid_table(source, slots, device)
        return slot_table(source, slots, device, self.layer_type)


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module whose cache is compressed.

    Attributes
    ----------
    name : str
        Of the module in the model.
    module : nn.Module
    layer_idx : int
        Its layer in the cache; the first one if it serves several.
    cache_argument, positions : str
        Under which names its forward takes the cache, and what tells positions: "position_embeddings", "position_ids"
        if it rotates by itself, or "" if it knows none.
    reads_shared : bool
        Whether it has no keys of its own and attends to those of an earlier layer (Gemma 3n, Gemma 4).
    hybrid : bool
        Whether its layer in the cache also holds a convolution or recurrent state.
    rotary : Rotary or None
    rotation : KeyRotation or None
        None if it does not rotate what it caches.
    keeps_state : bool
        Whether the module carries a state of its own from token to token in the cache (ZAYA).
    rule : FamilyRule
    """

    name: str
    module: nn.Module
    layer_idx: int
    cache_argument: str
    positions: str
    reads_shared: bool
    hybrid: bool
    rotary: Rotary | None
    rotation: KeyRotation | None
    keeps_state: bool
    rule: FamilyRule

    @property
    def kind(self) -> Any:
        """The same for layers that stand at slots in the same way."""
        return self.rotary, self.positions, self.rotation, None if self.rule.key_scale is None else self.layer_idx

    def scale(self) -> Tensor | None:
        """By what it multiplies keys after rotation, `(head_dim,)`."""
        if self.rule.key_scale is None:
            return None
        weight: Tensor = self.module.get_submodule(self.rule.key_scale).weight  # type: ignore[assignment]
        return weight

    def __str__(self) -> str:
        if self.reads_shared:
            return f"{self.name}, reads the entries of an earlier layer"
        return f"{self.name}, {'keys not rotated' if self.rotation is None else self.rotation}"


@dataclass(frozen=True)
class Analysis:
    """What :func:`analyse` finds.

    Attributes
    ----------
    decoder : nn.Module
        The innermost model that hands a cache to its layers.
    around : list of nn.Module
        The models around it, innermost first.
    layers : list of AttentionLayer
        The attention modules whose cache is compressed.
    others : dict of int to str
        Kinds of the cache layers left to transformers, by index.
    """

    decoder: nn.Module
    around: list[nn.Module]
    layers: list[AttentionLayer]
    others: dict[int, str]


def analyse(model: PreTrainedModel) -> Analysis:
    """Find out how the model rotates and caches its keys.

    Raises
    ------
    UnsupportedModelError
        Naming the family, the reason, and what to use instead.
    """
    return _Analyst(model).analysis()


class _Analyst:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.family = f"{type(model).__name__} (model type {getattr(model.config, 'model_type', 'unknown')!r})"
        self.text_config = model.config.get_text_config(decoder=True)
        self.rule = rule_for(self.text_config)
        self._verdicts: dict[Any, tuple[KeyRotation | None, bool]] = {}

    def refuse(self, reason: str, instead: str = "Use transformers' DynamicCache for it") -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.family} {reason}. {instead}")

    def analysis(self) -> Analysis:
        config = self.model.config
        if lacks := missing():
            raise UnsupportedModelError(outdated(lacks))
        if getattr(config, "is_encoder_decoder", False):
            raise self.refuse(
                "is an encoder-decoder; FreqKV compresses the cache of decoder-only models",
                "Use transformers' EncoderDecoderCache for it",
            )
        for rule in (self.rule, rule_for(config)):
            if rule.refused:
                raise self.refuse(f"is not supported: {rule.why}")
        if getattr(self.text_config, "alibi", False):
            raise self.refuse("has ALiBi positions (alibi=True), which tie a key to the place where it entered")
        decoder, attentions = self._find_decoder()
        try:
            cache = FreqKVCache(config, FreqKVConfig(window=16))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self.family} cannot be compressed: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise self.refuse(
                f"has a configuration of which transformers makes no DynamicCache ({type(error).__name__}: {error})"
            ) from error

        compressed = {index for index, layer in enumerate(cache.layers) if isinstance(layer, FreqKVLayer)}
        layer_types = getattr(self.text_config, "layer_types", None) or []
        full_types = {layer_types[index] for index in compressed if index < len(layer_types)}
        if not self.rule.unrotated and not any(is_rotary(m) or _has_sinusoids(m) for m in decoder.modules()):
            raise self.refuse(NO_ROTATION)
        prefix = next(name for name, module in self.model.named_modules() if module is decoder)
        chosen = []
        for name, module in attentions.items():
            own = getattr(module, "layer_idx", None)
            index = own if isinstance(own, int) and "layer_idx" not in _parameters(module) else min(compressed)
            reads_shared = bool(getattr(module, "is_kv_shared_layer", False))
            if index in compressed or (reads_shared and layer_types[index] in full_types):
                chosen.append((name, module, index, reads_shared))
        given = self._embeddings_given(decoder, prefix, [name for name, *_ in chosen])
        found_layers = (self._layer(*each, cache, given[each[0]]) for each in chosen)
        layers = [layer for layer in found_layers if layer is not None]
        several = any(set(INDEX_ARGUMENTS) & set(_parameters(layer.module)) for layer in layers)
        found = {layer.layer_idx for layer in layers if not layer.reads_shared}
        if found != compressed and not (layers and several):
            raise self.refuse(
                f"keeps keys and values in layers {sorted(compressed)}, but has attention modules for {sorted(found)} only"
            )
        bidirectional = [layer.name for layer in layers if getattr(layer.module, "is_causal", True) is False]
        if bidirectional:
            raise self.refuse(f"lets tokens see later ones in {bidirectional[0]} (is_causal=False)")
        self._check_positions(decoder, layers)
        others = {index: type(layer).__name__ for index, layer in enumerate(cache.layers) if index not in compressed}
        around = [module for module in _around(self.model, prefix) if _is_decoder(module)] if prefix else []
        return Analysis(decoder, around, layers, others)

    def _find_decoder(self) -> tuple[nn.Module, dict[str, nn.Module]]:
        """The innermost model around the attention modules that has a cache, and those modules by name."""
        groups: dict[nn.Module, dict[str, nn.Module]] = {}
        for name, module in self.model.named_modules():
            if not _is_attention(module):
                continue
            decoder = next((around for around in _around(self.model, name) if _is_decoder(around)), None)
            if decoder is not None:
                groups.setdefault(decoder, {})[name] = module
        if not groups:
            raise self.refuse("has no attention layers with rotary position embeddings and a key-value cache")
        if len(groups) == 1:
            return next(iter(groups.items()))
        layers = getattr(self.text_config, "num_hidden_layers", None)
        ours = [group for group in groups.items() if getattr(group[0], "config", None) is self.text_config]
        if len(ours) != 1:
            names = ", ".join(type(decoder).__name__ for decoder in groups)
            raise self.refuse(
                f"has several stacks of attention layers with a cache ({names}), and its configuration ({layers} layers) does "
                "not tell which of them generates",
                "Patch the language model inside by itself",
            )
        return ours[0]

    def _layer(
        self, name: str, module: nn.Module, index: int, reads_shared: bool, cache: FreqKVCache, given: Any
    ) -> AttentionLayer | None:
        parameters = _parameters(module)
        rotary = self._rotary(name, module, index, given)
        positions = next((p for p in ("position_embeddings", "position_ids") if p in parameters), "")
        if rotary is None:
            positions = ""
        layer = AttentionLayer(
            name=name,
            module=module,
            layer_idx=index,
            cache_argument=cache_name(parameters, ATTENTION_CACHE_NAMES) or "",
            positions=positions,
            reads_shared=reads_shared,
            hybrid=not reads_shared and isinstance(cache.layers[index], FreqKVHybridLayer),
            rotary=rotary,
            rotation=None,
            keeps_state=False,
            rule=self.rule,
        )
        if reads_shared:
            return layer
        try:
            rotation, keeps_state = self._calibrate(layer)
        except UnsupportedModelError:
            raise
        except _NoUpdate:
            return None  # some other part of a layer that takes the cache as well
        except _NotAsked as asked:
            raise self.refuse(f"needs more of a cache than keys and values in {name}: {asked}") from None
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except ValueError as error:
            raise self.refuse(f"rotates what {name} caches in a way that FreqKV does not know: {error}") from error
        except Exception as error:
            raise self.refuse(
                f"could not be looked at: {name}, run by itself, raised {type(error).__name__}: {error}"
            ) from error
        return replace(layer, rotation=rotation, keeps_state=keeps_state)

    def _slots(self, device: torch.device) -> Tensor:
        """The slots that tokens are replayed at."""
        context = getattr(self.text_config, "max_position_embeddings", None) or REPLAYED_SLOTS[-1] + 1
        return torch.tensor([slot for slot in REPLAYED_SLOTS if slot < context], device=device)

    def _embeddings_given(self, decoder: nn.Module, prefix: str, names: list[str]) -> dict[str, Any]:
        """What the decoder gives the layers around attention modules, see `freqkv.observation`."""
        device = _execution_device(self.model, prefix) or next(
            (tensor.device for tensor in self.model.buffers() if not tensor.is_meta), torch.device("cpu")
        )
        inside = {name: name.removeprefix(f"{prefix}.") for name in names}
        slots, width = self._slots(device), self.text_config.hidden_size
        try:
            with _weights_present(self.model, prefix):
                found = embeddings_given(decoder, list(inside.values()), slots, width, self.model.dtype)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self._has_no_weights():  # to be looked at again where they are there
                return dict.fromkeys(names, NOT_GIVEN)
            raise self.refuse(
                f"could not be looked at: {type(decoder).__name__}, run by itself, raised {type(error).__name__}: {error}"
            ) from error
        return {name: found[inner] for name, inner in inside.items()}

    def _has_no_weights(self) -> bool:
        return any(
            parameter.is_meta and _execution_device(self.model, name.rpartition(".")[0]) is None
            for name, parameter in self.model.named_parameters()
        )

    def _rotary(self, name: str, module: nn.Module, index: int, given: Any) -> Rotary | None:
        """Where the embeddings that the decoder gives a layer come from; None if it gives none."""
        nearest = self._nearest_rotary(name, module, index)
        if given is NOT_GIVEN or "position_embeddings" not in _parameters(module):
            return nearest
        if given is None:
            return None
        for rotary in itertools.chain([] if nearest is None else [nearest], self._all_rotaries()):
            if self._gives(rotary, given):
                return rotary
        raise self.refuse(f"gives {name} position embeddings that come from none of its rotary modules as they are")

    def _all_rotaries(self) -> Iterator[Rotary]:
        types = dict.fromkeys(getattr(self.text_config, "layer_types", None) or ())
        for owner in self.model.modules():
            for name, child in owner.named_children():
                if is_rotary(child):
                    by_type = "layer_type" in inspect.signature(child.forward).parameters
                    yield from (Rotary(owner, name, kind) for kind in (types if by_type else (None,)))

    def _gives(self, rotary: Rotary, given: Any) -> bool:
        """Whether a rotary module makes these embeddings of the replayed slots."""
        tensors = (given,) if isinstance(given, Tensor) else tuple(given)
        slots = self._slots(tensors[0].device)
        try:
            table = rotary.table(int(slots[-1]) + 1, tensors[0].device)
        except (ValueError, AttributeError):  # it has none for this type of layers
            return False
        if table.native is None:
            return False
        own = table.embeddings(slots, tensors[0].dtype)
        own = (own,) if isinstance(own, Tensor) else own
        return len(own) == len(tensors) and all(
            a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=4 * torch.finfo(a.dtype).eps)
            for a, b in zip(own, tensors, strict=True)
        )

    def _nearest_rotary(self, name: str, module: nn.Module, index: int) -> Rotary | None:
        """The nearest rotary module, in the attention module or in what is around it."""
        for owner in (module, *_around(self.model, name)):
            if _has_sinusoids(owner) and "position_ids" in _parameters(module):
                return Rotary(owner, SINUSOIDS)
            for child_name, child in owner.named_children():
                if is_rotary(child):
                    types = getattr(self.text_config, "layer_types", None)
                    if "layer_type" not in inspect.signature(child.forward).parameters or not types:
                        return Rotary(owner, child_name)
                    tables = [name.removesuffix("inv_freq") for name, _ in child.named_buffers()]
                    # Layers of a type without a table of its own do not rotate.
                    return Rotary(owner, child_name, types[index]) if f"{types[index]}_" in tables else None
        return None

    def _check_positions(self, decoder: nn.Module, layers: list[AttentionLayer]) -> None:
        if any(layer.rotation is not None for layer in layers) or self.rule.unrotated:
            return
        # Where full attention layers know no positions, layers of another kind that have RoPE do (Cohere 2, EXAONE 4).
        if not any(is_rotary(module) for module in decoder.modules()):
            raise self.refuse(NO_ROTATION)

    @torch.no_grad()
    def _calibrate(self, layer: AttentionLayer) -> tuple[KeyRotation | None, bool]:
        """How it rotates, and whether it keeps a state of its own."""
        module = layer.module
        if any(p.is_meta for p in module.parameters()) and _execution_device(self.model, layer.name) is None:
            # No weights to look at, as in `supported(config)`: how keys are rotated does not depend on them.
            key = type(module), layer.rotary and layer.rotary.layer_type, _traits(module)
            if key not in self._verdicts:
                self._verdicts[key] = self._measure(
                    layer, _with_random_weights(module), torch.float32, torch.device("cpu")
                )
            return self._verdicts[key]
        with _weights_present(self.model, layer.name):
            # Quantized modules may have no parameters.
            held = next(itertools.chain(module.parameters(), module.buffers(), self.model.parameters()), torch.empty(0))
            device = _execution_device(self.model, layer.name) or held.device
            return self._measure(layer, module, self.model.dtype, device)

    def _measure(
        self, layer: AttentionLayer, module: nn.Module, dtype: torch.dtype, device: torch.device
    ) -> tuple[KeyRotation | None, bool]:
        slots = self._slots(device)
        table = None if layer.rotary is None else layer.rotary.table(int(slots[-1]) + 1, device)
        width = getattr(module, "attention_hidden_size", None) or self.text_config.hidden_size
        hidden = torch.randn(1, len(slots), width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        recorders = _Recorder(), _Recorder()
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
    layer: AttentionLayer,
    recorder: _Recorder,
    hidden: Tensor,
    table: SlotTable | None,
    rows: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What the module hands to `update` for tokens at the slots `rows`."""
    call: dict[str, Any] = {
        name: None
        for name, parameter in inspect.signature(_forward(module)).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    call |= {name: layer.layer_idx for name in ("layer_idx",) if name in _parameters(module)}
    call |= {"shared_kv_states": {}} if "shared_kv_states" in call else {}
    call["hidden_states"] = hidden
    call[layer.cache_argument] = recorder
    if table is not None and table.native is not None:
        call["position_embeddings"] = table.embeddings(rows, dtype)
    if "position_ids" in _parameters(module):
        call["position_ids"] = rows[None]
    devices = [hidden.device] if hidden.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):  # dropout of a model in training draws numbers
            _forward(module)(**call)
    except _Recorded as recorded:
        return recorded.tensors
    raise _NoUpdate


class _Recorded(Exception):  # noqa: N818 - the wanted outcome, not an error
    """Ends a replay as soon as the module hands over what it caches."""

    def __init__(self, tensors: tuple[Tensor, Tensor]) -> None:
        self.tensors = tensors


class _NoUpdate(Exception):  # noqa: N818
    """The module did not hand over anything."""


class _NotAsked(Exception):  # noqa: N818
    """The module asks its cache for what FreqKV has not."""


class _Recorder(Cache):
    """An empty cache that keeps what a module wants to store."""

    def __init__(self) -> None:
        super().__init__(layers=Everywhere([LinearAttentionAndFullAttentionLayer(number_of_states=8)]))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    @property
    def has_state(self) -> bool:
        return any(self.layers[0].is_conv_states_initialized.values())

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int = 0, *args: Any, **kwargs: Any) -> Any:
        raise _Recorded((key_states, value_states))

    def update_indexer(self, *args: Any, **kwargs: Any) -> Any:
        raise _NotAsked(
            "an indexer picks single tokens out of the cache (sparse attention), which no longer exist once they are compressed"
        )


def _forward(module: nn.Module) -> Any:
    """The module's own forward, behind what accelerate put before it."""
    return getattr(module, HOOKED_FORWARD) if hasattr(module, HOOK) else module.forward


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _is_attention(module: nn.Module) -> bool:
    parameters = _parameters(module)
    return (
        "hidden_states" in parameters
        and "attention_mask" in parameters
        and cache_name(parameters, ATTENTION_CACHE_NAMES) is not None
        and (isinstance(getattr(module, "layer_idx", None), int) or "layer_idx" in parameters)
        and not any(_is_attention(child) for child in module.modules() if child is not module)
    )


def _is_decoder(module: nn.Module) -> bool:
    parameters = _parameters(module)
    return "input_ids" in parameters and cache_name(parameters) is not None


def _has_sinusoids(module: nn.Module) -> bool:
    return isinstance(getattr(module, SINUSOIDS, None), Tensor)


def _around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules around the one called `name`, innermost first."""
    while name:
        name = name.rpartition(".")[0]
        yield model.get_submodule(name)


def _hooks(model: nn.Module, name: str) -> list[tuple[nn.Module, Any]]:
    """Accelerate's hooks on the way to a module, outermost first, the module's own included."""
    path = [model.get_submodule(name), *_around(model, name)]
    return [(module, getattr(module, HOOK)) for module in reversed(path) if hasattr(module, HOOK)]


def _execution_device(model: nn.Module, name: str) -> torch.device | None:
    """Where accelerate runs a module whose weights are elsewhere; None if it has no say in it."""
    hooks = [hook for _, hook in _hooks(model, name)]
    hooks += [getattr(inner, HOOK) for inner in model.get_submodule(name).modules() if hasattr(inner, HOOK)]
    device = next((d for d in (getattr(hook, "execution_device", None) for hook in hooks) if d is not None), None)
    return None if device is None else torch.device(device)


@contextmanager
def _weights_present(model: nn.Module, name: str) -> Iterator[None]:
    """Run accelerate's hooks around a module, which bring offloaded weights and take them away again; gather weights that
    DeepSpeed keeps in parts.
    """
    with ExitStack() as stack:
        parts = [weight for weight in model.get_submodule(name).parameters() if hasattr(weight, "ds_id")]
        if parts:
            from deepspeed import zero

            stack.enter_context(zero.GatheredParameters(parts))
        for module, hook in _hooks(model, name):
            hook.pre_forward(module)
            stack.callback(hook.post_forward, module, torch.empty(0))
        yield


def _traits(module: nn.Module) -> Any:
    """What besides its weights tells one attention module from another."""
    plain = (bool, int, float, str, type(None))
    own = {name: value for name, value in vars(module).items() if isinstance(value, plain) and name != "layer_idx"}
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return tuple(sorted(own.items(), key=lambda item: item[0])), shapes


def _with_random_weights(module: nn.Module) -> nn.Module:
    """A copy in float32; what is no parameter, such as a rotary table, stays as it is."""
    config = getattr(module, "config", None)
    module = copy.deepcopy(module, {id(config): config})
    generator = torch.Generator().manual_seed(0)
    for inner in module.modules():
        for name, parameter in list(inner.named_parameters(recurse=False)):
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            offset = 0.0 if parameter.ndim > 1 else 1.0
            weight = offset + spread * torch.randn(parameter.shape, generator=generator)
            setattr(inner, name, nn.Parameter(weight, requires_grad=False))
    return module


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
                f"{type(model_or_config).__name__}: transformers cannot build its causal language model ({error})"
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
