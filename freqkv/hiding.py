"""Rows that ended early: tokens at the end of a row that a later call's mask takes for padding.

`generate` feeds padding to rows that have ended while others go on, and tells so only with the mask of the next turn. Such rows
go back by themselves to where they ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from freqkv.tracked import TrackedCache

__all__ = ["Hidden", "hidden_tokens", "hide"]


@dataclass(frozen=True, eq=False)
class Hidden:
    """Tokens that have entered and are padding now.

    Attributes
    ----------
    columns : Tensor
        `(batch, last columns)` bool on the CPU.
    counts : tuple of int
        Tokens that each row keeps.
    """

    columns: Tensor
    counts: tuple[int, ...]


def hidden_tokens(cache: TrackedCache, mask: Tensor) -> Hidden | None:
    """What a mask hides of the tokens in a cache; None if it leaves what is held.

    Parameters
    ----------
    cache : TrackedCache
    mask : Tensor
        `(batch, columns)` bool, of all columns that have entered.

    Raises
    ------
    ValueError
        If it hides other tokens than the last ones of a row, shows what was padding, or a layer cannot forget tokens.
    RuntimeError
        If entries were compressed since, and what was there before was not recorded; or if it is not known any more which of
        the tokens that it hides were padding.
    """
    counts, mask = cache.counts, mask.cpu()
    left = tuple(mask.sum(1).tolist())
    known = cache.padding.token_mask
    if left == counts and (known is None or torch.equal(mask[:, mask.shape[1] - known.shape[1] :], known.cpu())):
        return None
    if known is None:
        known = torch.ones(len(counts), cache.tokens_seen, dtype=torch.bool, device="cpu")
    last = mask[:, mask.shape[1] - known.shape[1] :]
    gone = known & ~last
    # Once a token is hidden, so are all behind it; and what stands before the known columns is as it was.
    ends = all(bool((row[here].diff() >= 0).all()) for row, here in zip(gone.int(), known, strict=True))
    after = tuple(count - n for count, n in zip(counts, gone.sum(1).tolist(), strict=True))
    if after != left and not cache.padding.knows_all:
        raise RuntimeError(
            f"cannot remove the tokens that attention_mask hides: this cache knows which tokens were padding for the last "
            f"{known.shape[1]} only (one from a file, for those since it was loaded). Let rows end before it is saved, or keep "
            "a copy (copy.deepcopy(cache)) to return to"
        )
    if not ends or bool((last & ~known).any()) or after != left:
        raise ValueError(
            f"attention_mask leaves {list(left)} of the tokens before these, the cache holds {list(counts)} in its rows: of "
            "what has entered, only the last tokens of a row can be hidden, and what was padding cannot be shown"
        )
    if cache.keeps_states:
        raise ValueError(
            "attention_mask hides tokens that have entered, which layers with a convolution or recurrent state cannot forget. "
            "Feed each row by itself, or keep a copy of the cache (copy.deepcopy(cache)) from before"
        )
    cache.check_rewind(after)
    return Hidden(gone, after)


def hide(cache: TrackedCache, hidden: Hidden) -> Callable[[], None]:
    """Let the rows of a cache go back, as :func:`hidden_tokens` found that they can.

    Returns
    -------
    callable
        Brings them back, as long as no token has entered since: going back replaces tensors, and does not write to them.
    """
    layers = [cache.layers[index] for index in cache.compressed_layers]
    before = [(layer.counts, layer.past, dict(layer.buffers.tensors)) for layer in layers]
    padding, history = cache.padding, cache.history

    def undo() -> None:
        for layer, (counts, past, tensors) in zip(layers, before, strict=True):
            layer.counts, layer.past, layer.buffers.tensors = counts, past, tensors
        cache.padding, cache.history = padding, history

    cache.rewind(hidden.counts, hidden.columns)
    return undo
