"""Compressors that keep some entries as they are, by a score: attention, or novelty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from freqkv.compressors import Pair, Span

__all__ = ["KeepAttended", "KeepNovel", "best", "keep_attended", "keep_entries", "keep_novel", "leverage"]

RIDGE = 2.0  # of the keys' mean sum of squares in a channel: a rare direction is worth more than others, up to a point
TIE_SLOPE = 1e-3  # over a span: of equal keys, as those of one token in the first layer, the later is kept
_TINY = 1e-30  # where all keys are the same


@dataclass(frozen=True)
class KeepAttended:
    """Keep the entries that the last queries attend to most, for each KV head; they stay in order.

    The score of an entry is the attention that it gets from the last `queries` queries (:meth:`Span.attention`), averaged
    over them and over the query heads of its KV head, then over the `pool` entries around it, as in SnapKV
    (arXiv 2404.14469). Which entries are kept has no gradient; keys and values have theirs.

    Parameters
    ----------
    queries : int
        How many queries have a say.
    pool : int
        Width of the average along the sequence, odd; 1 for none.
    """

    queries: int = 64
    pool: int = 7

    def __post_init__(self) -> None:
        _check_counts(queries=self.queries, pool=self.pool)
        _check_odd(self.pool)

    def __call__(self, span: Span) -> Pair:
        with torch.no_grad():
            weights = span.attention()
            rows, kv_heads, n, _ = span.keys.shape
            scores = _pooled(weights.reshape(rows, kv_heads, -1, n).mean(dim=2), self.pool)
            kept = best(scores, span.keep)
        return keep_entries(span, kept)

    @property
    def __name__(self) -> str:
        return "keep_attended" if self == keep_attended else f"keep_attended(queries={self.queries}, pool={self.pool})"


@dataclass(frozen=True)
class KeepNovel:
    """Keep the passages that are least like the rest, the same tokens in all heads; and keys of each head's own.

    The novelty of an entry is the leverage of its key (:func:`leverage`) among those of the span and of the entries behind
    it, in the KV head where that is largest, averaged over the `pool` entries around it. An entry counts as much as the most
    novel one among itself and the `lead` entries behind it: what leads to something new is kept with it. The last
    `lead + pool // 2` entries wait for the next fold, which sees what they lead to; they take at most half of the places. No
    queries are needed. Which entries are kept has no gradient; keys and values have theirs. Leverage as a score of keys
    before RoPE: Compactor (arXiv 2507.08143).

    In most layers novelty says little; in a few it tells facts from the text around them. So one layer may choose for others.
    Beside those, each KV head may keep entries by itself: those whose keys point away from the mean key (KeyDiff, arXiv
    2504.15364), which serves predictions. They stand before the others, which so have the same slots in all layers, and after
    the first fold they are no candidates for novelty.

    Of SmolLM2's three KV heads one tells facts from the text. Models with many were not measured: there the largest leverage
    over heads may be that of a head which tells nothing.

    Parameters
    ----------
    pool : int
        Width of the average along the sequence, odd; 1 for none.
    lead : int
        How many entries in front of a novel one are worth as much as it; 0 for none.
    layer : int, optional
        Layers behind this one keep the tokens that it keeps, those before it the most recent ones; all of them need the same
        schedule. By default each layer chooses for itself.
    per_head : float
        Which share of the entries kept each head chooses for itself. It needs a schedule that folds one span at a time, always
        from the same slot to as many entries.

    Raises
    ------
    ValueError
        At a fold, if what `layer` keeps is not there, or if several spans are folded at once and `per_head` is not 0.
    """

    pool: int = 7
    lead: int = 8
    layer: int | None = None
    per_head: float = 0.0

    def __post_init__(self) -> None:
        _check_counts(pool=self.pool)
        _check_odd(self.pool)
        for name in ("lead", "layer"):
            value = getattr(self, name)
            if name == "layer" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 0")
        share = self.per_head
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise ValueError(f"per_head={share!r} must be a share, of at least 0 and less than 1")

    def __call__(self, span: Span) -> Pair:
        if self.per_head and span.folds > 1:
            raise ValueError(
                f"per_head={self.per_head} needs a schedule that folds one span at a time, this one folds {span.folds}: pass "
                "KeepNovel per_head=0, or another schedule"
            )
        return keep_entries(span, self._with_each_heads(span, self._for_all_heads(span)))

    def _for_all_heads(self, span: Span) -> Tensor:
        """Places of what all heads keep, `(rows, 1, entries)`."""
        if self.layer is None:
            return self._novel(span)
        if span.layer_idx < self.layer:
            rows, _, n, _ = span.keys.shape
            count = span.keep - self._each_heads(span)
            return torch.arange(n - count, n, device=span.keys.device).expand(rows, 1, -1)
        if span.layer_idx == self.layer:
            span.shared[self] = self._novel(span)
        elif self not in span.shared:
            raise ValueError(
                f"layer {span.layer_idx} is to keep what layer {self.layer} keeps, which is not there: it has to be a "
                "compressed layer of the same schedule before it and, in calls without a cache, on the same device. Pass "
                "KeepNovel another layer=, or none"
            )
        chosen: Tensor = span.shared[self]
        return chosen.to(span.keys.device)

    def _each_heads(self, span: Span) -> int:
        """How many entries each head keeps by itself."""
        return int(self.per_head * span.keep)

    @torch.no_grad()
    def _novel(self, span: Span) -> Tensor:
        count = span.keep - self._each_heads(span)
        start = 0 if span.is_first else span.keep - count  # what stands before are other tokens in each head
        novelty = leverage(span.keys[:, :, start:], span.following_keys).amax(dim=1, keepdim=True)
        scores = _pooled(novelty, self.pool)
        if self.lead:
            ahead = functional.pad(scores, (0, self.lead), value=-torch.inf)
            scores = functional.max_pool1d(ahead.flatten(0, 1), self.lead + 1, stride=1).unflatten(0, scores.shape[:2])
        waiting = min(self.lead + self.pool // 2, count // 2)
        scores[..., scores.shape[-1] - waiting :] = torch.inf
        return start + best(scores, count)

    @torch.no_grad()
    def _with_each_heads(self, span: Span, chosen: Tensor) -> Tensor:
        """`chosen`, and before them those that each head keeps by itself, `(rows, kv_heads, keep)`."""
        count = self._each_heads(span)
        if not count:
            return chosen
        chosen = chosen.expand(-1, span.keys.shape[1], -1)
        every = span.keys if span.following_keys is None else torch.cat([span.keys, span.following_keys], dim=-2)
        mean = functional.normalize(every, dim=-1).mean(dim=-2, keepdim=True)
        later = torch.linspace(0, TIE_SLOPE, span.keys.shape[2], dtype=mean.dtype, device=mean.device)
        apart = later - functional.cosine_similarity(span.keys, mean, dim=-1)
        scores = apart.scatter(-1, chosen, -torch.inf)
        return torch.cat([best(scores, count), chosen], dim=-1)

    @property
    def __name__(self) -> str:
        if self == keep_novel:
            return "keep_novel"
        share = f", per_head={self.per_head:g}" if self.per_head else ""
        return f"keep_novel(pool={self.pool}, lead={self.lead}, layer={self.layer}{share})"


def leverage(keys: Tensor, others: Tensor | None = None) -> Tensor:
    """How far each key is from the mean of all, measured by how far keys usually are in that direction.

    `diag(X (X' X + lambda I)^-1 X')` of the centred keys `X`, with twice the mean diagonal of `X' X` for `lambda`.

    Parameters
    ----------
    keys : Tensor
        `(..., n, head_dim)`.
    others : Tensor, optional
        `(..., m, head_dim)`: keys beside them, which are among all but get no score.

    Returns
    -------
    Tensor
        `(..., n)`, from 0 to 1.
    """
    every = keys if others is None else torch.cat([keys, others], dim=-2)
    mean = every.mean(dim=-2, keepdim=True)
    centred, every = keys - mean, every - mean
    moments = every.mT @ every
    ridge = RIDGE * moments.diagonal(dim1=-2, dim2=-1).mean(dim=-1) + _TINY
    moments = moments + ridge[..., None, None] * torch.eye(keys.shape[-1], dtype=keys.dtype, device=keys.device)
    solved: Tensor = torch.linalg.solve(moments, centred.mT)
    return (centred * solved.mT).sum(dim=-1)


def keep_entries(span: Span, kept: Tensor) -> Pair:
    """The entries of a span at the places `kept`, `(rows, kv_heads or 1, keep)`."""
    places = kept[..., None]
    return span.keys.take_along_dim(places, dim=2), span.values.take_along_dim(places, dim=2)


def best(scores: Tensor, keep: int) -> Tensor:
    """The places of the `keep` highest scores, in order; of equal ones the last. `(..., n)` to `(..., keep)`."""
    back = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    return (scores.shape[-1] - 1 - back).sort(dim=-1).values


def _pooled(scores: Tensor, width: int) -> Tensor:
    """Averages over `width` neighbours; at the ends over those that are there."""
    if width == 1:
        return scores
    return functional.avg_pool1d(scores, width, stride=1, padding=width // 2, count_include_pad=False)


def _check_counts(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def _check_odd(pool: int) -> None:
    if pool % 2 == 0:
        raise ValueError(f"pool={pool} must be odd, so that entries stand in the middle")


keep_attended = KeepAttended()
keep_novel = KeepNovel()
