"""Checks for PEFT adapters that get a value for each row or token of a call.

PEFT passes per-call arguments (`adapter_names`, the offsets of activated LoRA, task ids, X-LoRA's scalings) to projections by
hooks that it sets during a call. These values have the shape of the whole call. They do not fit when FreqKV runs an attention
module over a part of the rows or tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

__all__ = ["check_whole_call"]

# Hooks with one value for each row. All other hooks of PEFT may have one for each token.
OF_ROWS = ("_adapter_names_pre_forward_hook", "pre_hook")


def check_whole_call(module: nn.Module, rows: bool, tokens: bool) -> None:
    """Raise ValueError if adapters in `module` hold values for a whole call, and the module runs over a part of it.

    Parameters
    ----------
    rows, tokens : bool
        Whether the module runs over all rows, and over all tokens in their order.
    """
    for name, hook in _hooks(module):
        if not (rows and (tokens or name in OF_ROWS)):
            what = ", ".join(getattr(hook, "keywords", None) or [name.strip("_")])
            raise ValueError(
                f"PEFT's {what} speaks of the {'tokens' if rows else 'rows'} of a call as a whole, and FreqKV has to cut this "
                "call: rows of different length are compressed each at its own step, and prompts in runs that fit the window. "
                "Pass one row at a time, a window larger than the text, or transformers' DynamicCache"
            )


def _hooks(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The hooks of PEFT on a module and on the modules inside it, each after the name of its function."""
    for inner in module.modules():
        for hook in inner._forward_pre_hooks.values():
            function = hook.func if isinstance(hook, partial) else hook
            if not str(getattr(function, "__module__", "")).startswith("peft."):
                continue
            offsets = hook.keywords.get("alora_offsets") if isinstance(hook, partial) else None
            if offsets is None or any(offset is not None for offset in offsets):  # else it is switched on in no row
                yield getattr(function, "__name__", "hook"), hook
