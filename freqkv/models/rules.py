"""Rules for families of models that need special handling or are refused.

Everything else about a model is found out from the model itself (`freqkv.models.analysis`). Each rule gives its reason.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

__all__ = ["FAMILY_RULES", "FamilyRule", "rule_for", "with_base"]


@dataclass(frozen=True)
class FamilyRule:
    """The special handling of one family.

    Attributes
    ----------
    why : str
        The reason for the rule.
    refused : bool
        Whether FreqKV refuses it; `why` is then part of the error.
    unrotated : bool
        Whether its attention has no positions by design, so that keys are compressed without rotation. This cannot be
        measured: a model with ALiBi or learned positions looks the same.
    key_scale : str or None
        The name of the norm in the attention module whose weight multiplies keys after rotation.
    cache_class : str or None
        The class, as `module:class`, of which the model requires its cache to be an instance.
    cache_state : str or None
        The attribute in which that class keeps a state of its own: a list by layer of tensors `(batch, ...)`.
    always_masks : bool
        Whether its attention needs a mask where other families can do with `is_causal`.
    mask_key : str or None
        The key of the mask for cached attention, if the attention module takes several masks in a dict.
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
        """The class named by `cache_class`; None without one."""
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
    """The rule for a model's family; NO_RULE for most families."""
    return FAMILY_RULES.get(getattr(text_config, "model_type", ""), NO_RULE)


def with_base(cls: Any, rule: FamilyRule) -> Any:
    """A class of caches, derived from the one that a family requires its caches to be instances of."""
    base = rule.load_cache_class()
    return cls if base is None or issubclass(cls, base) else _derived(cls, base)


@functools.cache
def _derived(cls: Any, base: Any) -> Any:
    return type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__doc__": cls.__doc__})
