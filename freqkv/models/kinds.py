"""Which layers of transformers' own cache for a model FreqKV compresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from freqkv.errors import UnsupportedModelError
from freqkv.models.upstream import CacheLayerMixin, DynamicCache, DynamicLayer, LinearAttentionAndFullAttentionLayer

__all__ = ["LayerKind", "layer_kinds"]


@dataclass(frozen=True)
class LayerKind:
    """One layer.

    Attributes
    ----------
    layer : object
        As transformers' DynamicCache has it.
    compressed : bool
        Whether FreqKV's takes its place: it is full attention.
    number_of_states : int
        Convolution or recurrent states that it has beside keys and values, if it is compressed.
    crossing : bool
        Whether it holds images that tokens attend to, and no tokens.
    """

    layer: Any
    compressed: bool
    number_of_states: int
    crossing: bool


def layer_kinds(model_config: Any) -> list[LayerKind]:
    """The layers of a model's cache.

    Raises
    ------
    UnsupportedModelError
        If one of them holds more for each token than keys and values, or none is full attention.
    """
    text_config = model_config.get_text_config(decoder=True)
    crossing = frozenset(getattr(text_config, "cross_attention_layers", None) or ())
    kinds = []
    for index, layer in enumerate(DynamicCache(config=model_config).layers):
        compressed = index not in crossing and type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer)
        states = getattr(layer, "number_of_states", 0) if compressed else 0
        if index not in crossing and not compressed and isinstance(layer, CacheLayerMixin) and not layer.is_sliding:
            raise UnsupportedModelError(
                f"layer {index} of {type(model_config).__name__} keeps a {type(layer).__name__}, which holds more for each "
                "token than keys and values (sparse attention picks single tokens, which no longer exist once they are "
                "compressed). Use transformers' DynamicCache for this model"
            )
        kinds.append(LayerKind(layer, compressed, states, index in crossing))
    if not any(kind.compressed for kind in kinds):
        names = ", ".join(sorted({type(kind.layer).__name__ for kind in kinds}))
        raise UnsupportedModelError(
            f"{type(model_config).__name__} has no full attention layer ({names}): all its layers are bounded already "
            "and there is nothing to compress. Use transformers' DynamicCache for this model"
        )
    return kinds
