"""What an attention module hands to its cache, with embeddings that turn nothing."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, LinearAttentionAndFullAttentionLayer

__all__ = ["Catcher", "Caught", "identity"]


class Caught(Exception):  # noqa: N818 - what was wanted
    """Ends a call as soon as the module stores something; `args` is what."""


class Catcher(Cache):
    """An empty cache that stores nothing."""

    def __init__(self, layers: int = 40) -> None:
        super().__init__(layers=[LinearAttentionAndFullAttentionLayer() for _ in range(layers)])

    def update(self, keys, values, *args, **kwargs):
        raise Caught(keys, values)


def identity(embeddings, module=None):
    """No turn and no scaling, in the shape of these, which `module` takes."""
    if isinstance(embeddings, torch.Tensor):
        return torch.ones_like(embeddings)
    first, second = embeddings
    if type(module).__name__.startswith(("GPTJ", "CodeGen")):  # (sin, cos)
        return torch.zeros_like(first), torch.ones_like(second)
    return torch.ones_like(first), torch.zeros_like(second)
