"""Families of models that general rules do not cover: what each needs, or why it is refused.

Everything else about a model is found out from the model itself (`freqkv.models.analysis`). An entry here says why.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

__all__ = ["FAMILY_RULES", "FamilyRule", "rule_for", "with_base"]


@dataclass(frozen=True)
class FamilyRule:
    """What one family needs.

    Attributes
    ----------
    why : str
        The reason.
    refused : bool
        Whether FreqKV cannot serve it; `why` is then part of the error.
    unrotated : bool
        Whether its attention knows no positions by design, so that keys are low-passed as they are. From outside, a
        model with ALiBi or learned positions looks the same.
    key_scale : str or None
        The norm inside the attention module whose weight multiplies keys after rotation.
    cache_class : str or None
        `module:class` that the model requires its cache to be an instance of.
    cache_state : str or None
        The list by layer in which that class keeps its own state, first dimension batch.
    always_masks : bool
        Whether its attention needs a mask also where others are content with "causal".
    mask_key : str or None
        The entry for cached attention where the attention module takes several masks in a dict.
    """

    why: str
    refused: bool = False
    unrotated: bool = False
    key_scale: str | None = None
    cache_class: str | None = None
    cache_state: str | None = None
    always_masks: bool = False
    mask_key: str | None = None

    def load_cache_class(self) -> type | None:
        if self.cache_class is None:
            return None
        module, name = self.cache_class.split(":")
        loaded: type = getattr(importlib.import_module(module), name)
        return loaded


_HUNYUAN = FamilyRule("norms keys after RoPE, with a weight for each channel", key_scale="key_layernorm")
_JAMBA = FamilyRule("recurrent layers tell the order of tokens, attention knows no positions", unrotated=True)

FAMILY_RULES: dict[str, FamilyRule] = {
    "blt": FamilyRule(
        "its layers run over patches of bytes, through several stacks with caches of their own", refused=True
    ),
    "deepseek_v4": FamilyRule(
        "its layers keep compressed blocks of their own beside a sliding window, and rotate attention outputs back",
        refused=True,
    ),
    "doge": FamilyRule("hides some entries of its own choice in the mask", always_masks=True),
    "dory": FamilyRule("its decoder adds layers to the cache while it runs, one for each loop", refused=True),
    "granitemoehybrid": _JAMBA,
    "hunyuan_v1_dense": _HUNYUAN,
    "hunyuan_v1_moe": _HUNYUAN,
    "jamba": _JAMBA,
    "kimi_linear": _JAMBA,
    "minimax": FamilyRule(
        "takes no other cache than its own class, which keeps the state of its lightning attention",
        cache_class="transformers.models.minimax.modeling_minimax:MiniMaxCache",
        cache_state="linear_cache",
    ),
    "nemotron_h": _JAMBA,
    "paligemma": FamilyRule("the tokens of its prompt see each other, also later ones (PrefixLM)", refused=True),
    "zamba": _JAMBA,
    "zamba2": _JAMBA,
    "zaya": FamilyRule("hands its attention the masks of convolution and attention in one dict", mask_key="causal"),
}

NO_RULE = FamilyRule("general rules hold")


def rule_for(text_config: Any) -> FamilyRule:
    """The rule of a model's family; one that changes nothing for most."""
    return FAMILY_RULES.get(getattr(text_config, "model_type", ""), NO_RULE)


def with_base(cls: Any, rule: FamilyRule) -> Any:
    """A class of caches, derived from the one that a family requires its caches to be instances of."""
    base = rule.load_cache_class()
    return cls if base is None or issubclass(cls, base) else _derived(cls, base)


@functools.cache
def _derived(cls: Any, base: Any) -> Any:
    return type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__doc__": cls.__doc__})
