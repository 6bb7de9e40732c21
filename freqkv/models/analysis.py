"""What a model is made of, as far as a cache is concerned: its attention layers, and how each rotates what it caches.

Nothing here goes by class names. Attention modules are found by what their forward takes, layer kinds are those of
transformers' own cache for the model, and rotation is measured: a few tokens are replayed through each attention module
twice, at slot 0 (where RoPE turns nothing) and at other slots.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from freqkv.errors import UnsupportedModelError
from freqkv.models.calibration import Calibration, NeedsMoreThanKeysAndValues, NoUpdate, replayed_slots
from freqkv.models.kinds import LayerKind, layer_kinds
from freqkv.models.layers import Analysis, AttentionLayer, Rotary
from freqkv.models.modules import execution_device, parameter_names, parents, weights_present
from freqkv.models.observation import NOT_GIVEN, embeddings_given
from freqkv.models.rules import rule_for
from freqkv.models.upstream import ATTENTION_CACHE_NAMES, SINUSOIDS, cache_name, is_rotary, missing, outdated

__all__ = ["analyse"]

# A module that serves several cache layers is told which by one of these.
INDEX_ARGUMENTS = ("layer_idx", "cycle_offset")
NO_ROTATION = (
    "has no rotary position embeddings that FreqKV can find: it moves keys between positions by RoPE, which learned, ALiBi "
    "or relative positions do not allow"
)


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
        self.calibration = Calibration(model, self.text_config)

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
            kinds = layer_kinds(config)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self.family} cannot be compressed: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise self.refuse(
                f"has a configuration of which transformers makes no DynamicCache ({type(error).__name__}: {error})"
            ) from error

        compressed = {index for index, kind in enumerate(kinds) if kind.compressed}
        layer_types = getattr(self.text_config, "layer_types", None) or []
        full_types = {layer_types[index] for index in compressed if index < len(layer_types)}
        if not self.rule.unrotated and not any(is_rotary(m) or _has_sinusoids(m) for m in decoder.modules()):
            raise self.refuse(NO_ROTATION)
        prefix = next(name for name, module in self.model.named_modules() if module is decoder)
        chosen = []
        for name, module in attentions.items():
            own = getattr(module, "layer_idx", None)
            index = own if isinstance(own, int) and "layer_idx" not in parameter_names(module) else min(compressed)
            reads_shared = bool(getattr(module, "is_kv_shared_layer", False))
            if index in compressed or (reads_shared and layer_types[index] in full_types):
                chosen.append((name, module, index, reads_shared))
        given = self._embeddings_given(decoder, prefix, [name for name, *_ in chosen])
        found_layers = (self._layer(*each, kinds, given[each[0]]) for each in chosen)
        layers = [layer for layer in found_layers if layer is not None]
        several = any(layer.serves_several for layer in layers)
        found = {layer.layer_idx for layer in layers if not layer.reads_shared}
        if found != compressed and not (layers and several):
            raise self.refuse(
                f"keeps keys and values in layers {sorted(compressed)}, but has attention modules for {sorted(found)} only"
            )
        bidirectional = [layer.name for layer in layers if getattr(layer.module, "is_causal", True) is False]
        if bidirectional:
            raise self.refuse(f"lets tokens see later ones in {bidirectional[0]} (is_causal=False)")
        self._check_positions(decoder, layers)
        others = {index: type(kind.layer).__name__ for index, kind in enumerate(kinds) if index not in compressed}
        around = [module for module in parents(self.model, prefix) if _is_decoder(module)] if prefix else []
        return Analysis(decoder, around, layers, others)

    def _find_decoder(self) -> tuple[nn.Module, dict[str, nn.Module]]:
        """The innermost model around the attention modules that has a cache, and those modules by name."""
        groups: dict[nn.Module, dict[str, nn.Module]] = {}
        for name, module in self.model.named_modules():
            if not _is_attention(module):
                continue
            decoder = next((around for around in parents(self.model, name) if _is_decoder(around)), None)
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
        self, name: str, module: nn.Module, index: int, reads_shared: bool, kinds: list[LayerKind], given: Any
    ) -> AttentionLayer | None:
        parameters = parameter_names(module)
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
            hybrid=not reads_shared and kinds[index].number_of_states > 0,
            rotary=rotary,
            rotation=None,
            keeps_state=False,
            serves_several=bool(set(INDEX_ARGUMENTS) & set(parameters)),
            rule=self.rule,
        )
        if reads_shared:
            return layer
        try:
            rotation, keeps_state = self.calibration.of(layer)
        except UnsupportedModelError:
            raise
        except NoUpdate:
            return None  # some other part of a layer that takes the cache as well
        except NeedsMoreThanKeysAndValues as asked:
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

    def _embeddings_given(self, decoder: nn.Module, prefix: str, names: list[str]) -> dict[str, Any]:
        """What the decoder gives the layers around attention modules, see `freqkv.observation`."""
        device = execution_device(self.model, prefix) or next(
            (tensor.device for tensor in self.model.buffers() if not tensor.is_meta), torch.device("cpu")
        )
        inside = {name: name.removeprefix(f"{prefix}.") for name in names}
        slots, width = replayed_slots(self.text_config, device), self.text_config.hidden_size
        try:
            with weights_present(self.model, prefix):
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
            parameter.is_meta and execution_device(self.model, name.rpartition(".")[0]) is None
            for name, parameter in self.model.named_parameters()
        )

    def _rotary(self, name: str, module: nn.Module, index: int, given: Any) -> Rotary | None:
        """Where the embeddings that the decoder gives a layer come from; None if it gives none."""
        nearest = self._nearest_rotary(name, module, index)
        if given is NOT_GIVEN or "position_embeddings" not in parameter_names(module):
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
        slots = replayed_slots(self.text_config, tensors[0].device)
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
        for owner in (module, *parents(self.model, name)):
            if _has_sinusoids(owner) and "position_ids" in parameter_names(module):
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


def _is_attention(module: nn.Module) -> bool:
    parameters = parameter_names(module)
    return (
        "hidden_states" in parameters
        and "attention_mask" in parameters
        and cache_name(parameters, ATTENTION_CACHE_NAMES) is not None
        and (isinstance(getattr(module, "layer_idx", None), int) or "layer_idx" in parameters)
        and not any(_is_attention(child) for child in module.modules() if child is not module)
    )


def _is_decoder(module: nn.Module) -> bool:
    parameters = parameter_names(module)
    return "input_ids" in parameters and cache_name(parameters) is not None


def _has_sinusoids(module: nn.Module) -> bool:
    return isinstance(getattr(module, SINUSOIDS, None), Tensor)
