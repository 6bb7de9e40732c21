"""Which of the columns that a cache has seen were padding, as far back as it can be asked to forget them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from freqkv.parts import Call

__all__ = ["Padding"]


@dataclass(frozen=True, eq=False)
class Padding:
    """The last columns of a cache.

    Attributes
    ----------
    kept : int
        How many columns are remembered, at least those of the last call.
    columns : int
        How many there were.
    token_mask : Tensor or None
        `(batch, last columns)` bool on the CPU, True where not padding; None as long as nothing was padding.
    """

    kept: int
    columns: int = 0
    token_mask: Tensor | None = None

    @property
    def knows_all(self) -> bool:
        """Whether it is known of all columns which of them were padding."""
        return self.token_mask is None or self.token_mask.shape[1] >= self.columns

    def extended(self, call: Call) -> Padding:
        """With the columns of a call."""
        columns, mask, before = self.columns + call.tokens, call.token_mask, self.token_mask
        if mask is None and before is None:
            return Padding(self.kept, columns)
        if mask is None:
            mask = torch.ones(call.batch, call.tokens, dtype=torch.bool, device="cpu")
        if before is None:
            before = mask.new_ones(call.batch, min(self.columns, self.kept))
        last = torch.cat([before.to(mask.device), mask], dim=1)[:, -max(self.kept, call.tokens) :]
        return replace(self, columns=columns, token_mask=last)

    def cropped(self, columns: int) -> Padding:
        """Without the last `columns`."""
        mask = self.token_mask
        if mask is not None:
            mask = mask[:, : mask.shape[1] - columns]
        return replace(self, columns=self.columns - columns, token_mask=mask)

    def without(self, hidden: Tensor) -> Padding:
        """With some of the last columns, `(batch, last)` bool on the CPU, taken for padding."""
        mask = self.token_mask
        if mask is None:
            mask = torch.ones(hidden.shape[0], min(self.columns, self.kept), dtype=torch.bool, device="cpu")
        last = min(mask.shape[1], hidden.shape[1])
        mask = mask.clone()
        mask[:, mask.shape[1] - last :] &= ~hidden[:, hidden.shape[1] - last :].to(mask.device)
        return replace(self, token_mask=mask)

    def before(self, counts: tuple[int, ...], columns: int) -> tuple[int, ...]:
        """Tokens of each row without the last `columns`, of which it has `counts` with them.

        Raises
        ------
        RuntimeError
            If it is not known which of them were padding.
        """
        if columns <= 0 or self.token_mask is None:
            return tuple(count - columns for count in counts)
        known = self.token_mask.shape[1]
        if known < columns:
            raise RuntimeError(
                f"cannot remove {columns} tokens: this cache holds padded rows, and knows which tokens were padding for the "
                f"last {known} only. Keep a copy (copy.deepcopy(cache)) to return to"
            )
        removed = self.token_mask[:, known - columns :].sum(1).tolist()
        return tuple(count - gone for count, gone in zip(counts, removed, strict=True))

    def taken(self, rows: Callable[[Tensor], Tensor]) -> Padding:
        """With other rows."""
        return self if self.token_mask is None else replace(self, token_mask=rows(self.token_mask))
