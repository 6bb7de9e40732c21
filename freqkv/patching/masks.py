"""Masks of parts: what the tokens of a part may see, as an attention implementation takes it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from freqkv.models.upstream import MASK_FUNCTIONS, causal_mask, dense_mask, takes_dense_masks
from freqkv.parts import Part

__all__ = ["MASKS_KEPT", "Masks", "aligns_right", "no_mask"]

# Masks that are kept within a forward. All layers of a call and all steps of a long prompt ask for the same few; where they
# differ from part to part, as those of ragged rows do, each layer makes them anew rather than hold them all.
MASKS_KEPT = 4


@functools.cache
def no_mask() -> Tensor:
    """What stands in the place of a mask over the whole input, so that the decoder builds none.

    One of four dimensions is taken as it is. No attention function can use it, which every layer would notice that does not
    replace it.
    """
    with torch.inference_mode(False):
        return torch.empty((1, 1, 1, 0), device="cpu")


def aligns_right(part: Part, attention: str) -> bool:
    """Whether the attention implementation wants the last entries of all rows in the last place."""
    # Dense masks say anything. flash-attention takes padding in front only, and flex compiles for the masks it knows.
    return not part.uniform and part.width > 1 and not takes_dense_masks(attention)


class QueryOffset:
    """Tells `causal_mask` that the queries stand behind `held` entries."""

    is_compileable = False

    def __init__(self, held: int) -> None:
        self.held = held

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.held

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.held + query_length, 0


class Masks:
    """The masks of parts; the last ones are kept until :meth:`clear`."""

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}
        self._see_all: frozenset[str] = frozenset()  # attention implementations that need no mask for a single token

    def of_uniform(
        self, config: Any, attention: str, hidden_states: Tensor, tokens: int, held: int, always: bool = False
    ) -> Any:
        """The mask of `tokens` tokens behind `held` entries, for rows that are all alike.

        It may be None where the implementation needs to be told no more than "causal", unless `always` asks for one.
        """
        if tokens == 1 and not always and attention in self._see_all:
            return None
        dtype, device = hidden_states.dtype, hidden_states.device
        key = attention, tokens, held, dtype, device, always
        kept = self._kept
        if key not in kept:
            _check_mask_function(attention)
            with torch.inference_mode(False):
                inputs = torch.empty((1, tokens, 0), dtype=dtype, device=device)
                # A further condition is taken to ask for more than a causal mask, so that one is made in any case.
                mask = causal_mask(config, inputs, None, QueryOffset(held), _everything if always else None)
            self._kept = kept = {**(kept if len(kept) < MASKS_KEPT else {}), key: mask}
            if tokens == 1 and mask is None:
                self._see_all = self._see_all | {attention}
        return kept[key]

    def of_ragged(self, config: Any, attention: str, dtype: torch.dtype, device: torch.device, part: Part) -> Any:
        """The same for ragged rows, each of which sees its own entries."""
        _check_mask_function(attention)
        aligned = aligns_right(part, attention)
        with torch.inference_mode(False):
            entries = torch.tensor(part.entries, device=device)
            inputs = torch.empty((len(part.rows), part.width, 0), dtype=dtype, device=device)
            behind = QueryOffset(part.longest - part.width)
            slots = torch.arange(part.longest, device=device)
            if part.width == 1 and takes_dense_masks(
                attention
            ):  # at every token: so without all that a mask could need
                return dense_mask((slots < entries[:, None])[:, None, None], attention, dtype)
            if part.width == 1 or aligned:
                held = slots >= part.longest - entries[:, None] if aligned else slots < entries[:, None]
                return causal_mask(config, inputs, held, behind)
            # Queries are right-aligned, entries are not. Where there is no token, something must be seen all the same.
            queries = torch.arange(behind.held, part.longest, device=device)[:, None]
            seen = (slots <= queries + (entries - part.longest)[:, None, None]) | (slots == 0)  # rows, queries, entries

            def own(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
                return seen[batch_idx, q_idx - behind.held, kv_idx]

            return causal_mask(config, inputs, None, behind, own)

    def clear(self) -> None:
        """Called when a forward ends: masks are made for a call, not for the model's life."""
        self._kept = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}


def _check_mask_function(attention: str) -> None:
    if attention not in MASK_FUNCTIONS:
        raise ValueError(
            f"attn_implementation={attention!r} has no mask function, so that FreqKV cannot tell it what a segment may see: "
            "register one with transformers.AttentionMaskInterface.register, or use eager, sdpa, flex_attention or "
            "flash_attention_2"
        )


def _everything(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx.new_ones((), dtype=torch.bool)
