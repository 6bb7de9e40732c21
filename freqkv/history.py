"""Digests of the token ids that a cache has seen: they tell a conversation that goes on from another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["History"]

# Calls whose ids are kept as they are until a digest is asked for, or there are as many.
PENDING = 64
# Odd constants of more than 62 bits, with which products wrap around (splitmix64, signed).
FACTORS = -7046029254386353131, -4658895280553007687, -7723592293110705685


@dataclass(frozen=True, eq=False)
class History:
    """What is known of the ids that entered.

    Each column of a row adds a hash of its id and its place to a sum modulo 2 ** 64; padding adds 0. Sums are kept for the
    last columns, so that the history can go back as far as a cache can.

    Attributes
    ----------
    kept : int
        Columns whose sums are kept, at least.
    columns : int
        How many entered.
    sums : Tensor or None
        `(batch, at most kept)` int64, up to each of the last columns before those that are pending; None if there are none, or
        if it is not known what entered (embeddings).
    pending : tuple of (Tensor, Tensor or None)
        Ids `(batch, tokens)` of the last calls, and which of them are not padding.
    known : bool
        Whether all that entered were ids.
    """

    kept: int
    columns: int = 0
    sums: Tensor | None = None
    pending: tuple[tuple[Tensor, Tensor | None], ...] = ()
    known: bool = True

    def extended(self, tokens: int, ids: Tensor | None, token_mask: Tensor | None) -> History:
        """With `tokens` more columns, of these ids; None if they came as embeddings."""
        if not self.known or ids is None or ids.shape[1] != tokens:
            return History(self.kept, self.columns + tokens, known=False)
        pending = *self.pending, (ids.detach().clone(), token_mask)
        longer = History(self.kept, self.columns + tokens, self.sums, pending)
        return longer._flushed() if len(longer.pending) >= PENDING else longer

    def cropped(self, columns: int) -> History:
        """Without the last `columns`."""
        if columns == 0:
            return self
        flushed = self._flushed()
        left = 0 if flushed.sums is None else flushed.sums.shape[1] - columns
        if flushed.sums is None or (left <= 0 and columns < self.columns):
            return History(self.kept, self.columns - columns, known=False)
        if columns == self.columns:
            return History(self.kept)
        return replace(flushed, columns=self.columns - columns, sums=flushed.sums[:, :left])

    def without(self, hidden: Tensor) -> History:
        """With some of the last columns, `(batch, last)` bool, taken for padding."""
        flushed = self._flushed()
        sums = flushed.sums
        if sums is None:
            return flushed
        complete = sums.shape[1] == self.columns  # else the first hash that is kept cannot be told from those before it
        own = sums.diff(dim=1, prepend=torch.zeros_like(sums[:, :1]) if complete else sums[:, :1])
        last = min(hidden.shape[1], own.shape[1])
        gone = torch.zeros_like(own, dtype=torch.bool)
        gone[:, own.shape[1] - last :] = hidden[:, hidden.shape[1] - last :].to(own.device)
        if bool(hidden[:, : hidden.shape[1] - last].any()) or (not complete and bool(gone[:, 0].any())):
            return History(self.kept, self.columns, known=False)
        return replace(flushed, sums=sums - (own * gone).cumsum(1))

    def taken(self, rows: Callable[[Tensor], Tensor]) -> History:
        """With other rows."""
        flushed = self._flushed()
        return flushed if flushed.sums is None else replace(flushed, sums=rows(flushed.sums))

    def begins(self, ids: Tensor, mask: Tensor | None) -> bool:
        """Whether a text begins with what entered; True also where that is not known.

        Parameters
        ----------
        ids : Tensor
            `(batch, tokens)`, at least as many as entered.
        mask : Tensor or None
            `(batch, tokens)`: zeros where padding is.
        """
        flushed = self._flushed()
        if flushed.sums is None or flushed.sums.shape[0] != ids.shape[0]:
            return True
        token_mask = None if mask is None else mask[:, : self.columns].bool()
        sums = _hashes(ids[:, : self.columns], token_mask, 0).sum(1)
        return torch.equal(sums, flushed.sums[:, -1].to(sums.device))

    def _flushed(self) -> History:
        """The same without what is pending."""
        if not self.pending:
            return self
        count = sum(ids.shape[1] for ids, _ in self.pending)
        ids = torch.cat([ids for ids, _ in self.pending], dim=1)
        everywhere = torch.ones_like(ids, dtype=torch.bool).split([ids.shape[1] for ids, _ in self.pending], dim=1)
        pairs = zip(self.pending, everywhere, strict=True)
        masks = [whole if token_mask is None else token_mask.to(ids.device) for (_, token_mask), whole in pairs]
        new = _hashes(ids, torch.cat(masks, dim=1), self.columns - count).cumsum(1)
        if self.sums is not None:
            before = self.sums.to(new.device)
            new = torch.cat([before, before[:, -1:] + new], dim=1)
        return replace(self, sums=new[:, -self.kept :], pending=())


def _hashes(ids: Tensor, token_mask: Tensor | None, start: int) -> Tensor:
    """A number for each id at its place, 0 for padding."""
    places = torch.arange(start + 1, start + 1 + ids.shape[1], device=ids.device)
    mixed = ids.long() + 1 + places * FACTORS[0]
    for factor in FACTORS[1:]:
        mixed = (mixed ^ (mixed >> 30)) * factor
    mixed = mixed ^ (mixed >> 31)
    return mixed if token_mask is None else mixed * token_mask.to(mixed.device)
