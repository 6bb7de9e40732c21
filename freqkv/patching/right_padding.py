"""Padded rows of a call without a cache: all padding is moved behind the tokens, where it changes nothing before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["RightPadded"]


class RightPadded:
    """Rows moved so that all padding stands behind them.

    Parameters
    ----------
    token_mask : Tensor
        `(batch, tokens)` bool, True where not padding.
    """

    def __init__(self, token_mask: Tensor) -> None:
        self.shape = token_mask.shape
        self.order = torch.argsort((~token_mask).to(torch.uint8), dim=1, stable=True)

    def apply(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a decoder, moved."""
        return {name: self._moved(value, self.order) for name, value in kwargs.items()}

    def undo(self, output: Any) -> Any:
        """What the decoder returns, moved back."""
        back = torch.argsort(self.order, dim=1)
        if isinstance(output, tuple):
            return tuple(self._moved(value, back) for value in output)
        for name in list(output):
            output[name] = self._moved(output[name], back)
        return output

    def _moved(self, value: Any, order: Tensor) -> Any:
        if isinstance(value, tuple):
            return tuple(self._moved(each, order) for each in value)
        if not isinstance(value, Tensor):
            return value
        batch, tokens = self.shape
        order = order.to(value.device)
        if value.ndim == 4 and value.shape[0] == batch and value.shape[2:] == (tokens, tokens):  # attention weights
            by_query = value.gather(2, order[:, None, :, None].expand(value.shape))
            return by_query.gather(3, order[:, None, None, :].expand(value.shape))
        if value.shape[:2] != self.shape:
            return value
        return value.gather(1, order.view(*order.shape, *[1] * (value.ndim - 2)).expand(value.shape))
