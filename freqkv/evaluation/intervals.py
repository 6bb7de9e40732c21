"""Intervals: Wilson's for shares, the paired bootstrap for differences between two caches on the same texts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Interval", "paired_bootstrap", "wilson_interval"]


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it.

    Attributes
    ----------
    estimate, low, high : float
        In the unit of what is estimated.
    """

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share, which holds for few trials and for shares near 0 and 1, too.

    Parameters
    ----------
    successes : float
        Between 0 and `trials`; partly right answers may count in parts.
    trials : int
        At least 1.
    confidence : float
        Between 0 and 1.

    Returns
    -------
    Interval
        Shares from 0 to 1; the estimate is ``successes / trials``.

    Raises
    ------
    ValueError
        If the numbers are out of these bounds.

    Notes
    -----
    E. B. Wilson, Journal of the American Statistical Association 22 (1927), 209-212.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes must lie between 0 and trials >= 1, got {successes} of {trials}")
    z = statistics.NormalDist().inv_cdf((1 + _checked(confidence)) / 2)
    share = successes / trials
    scale = 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return Interval(share, max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share)))


def paired_bootstrap(
    differences: Sequence[Sequence[float]],
    weights: Sequence[Sequence[float]] | None = None,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the mean difference of two arms that were measured on the same blocks of the same documents.

    Documents are drawn with replacement, then as many blocks within each drawn document: blocks of a document resemble each
    other, and drawing blocks alone would give intervals that are too narrow.

    Parameters
    ----------
    differences : sequence (documents) of sequences (blocks) of float
        For each block the difference of the two arms' totals, such as their losses in bits.
    weights : the same shape, optional
        The size of each block, such as its bytes; 1 by default. The estimate is the sum of the differences divided by that of
        the weights.
    confidence : float
        Between 0 and 1.
    samples : int
        Draws, at least 1.
    seed : int
        Of the draws.

    Returns
    -------
    Interval
        In units of `differences` over those of `weights`.

    Raises
    ------
    ValueError
        If a document has no block, if the shapes differ, if a weight is not positive, or if a number is out of its bounds.
    """
    if not differences or not all(differences):
        raise ValueError("there must be at least one document, and a block in each")
    if weights is None:
        weights = [[1.0] * len(blocks) for blocks in differences]
    if [len(blocks) for blocks in differences] != [len(blocks) for blocks in weights]:
        raise ValueError("weights must have as many documents and blocks as differences")
    if min(min(blocks) for blocks in weights) <= 0:
        raise ValueError("weights must be positive")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    tail = (1 - _checked(confidence)) / 2
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([len(blocks) for blocks in differences])
    longest = int(counts.max())
    totals = torch.zeros(2, len(counts), longest, dtype=torch.float64)
    for kind, table in enumerate((differences, weights)):
        for document, blocks in enumerate(table):
            totals[kind, document, : len(blocks)] = torch.tensor(blocks, dtype=torch.float64)
    drawn = torch.randint(len(counts), (samples, len(counts)), generator=generator)
    places = torch.rand(samples, len(counts), longest, generator=generator, dtype=torch.float64)
    places = (places * counts[drawn][..., None]).long()
    used = torch.arange(longest) < counts[drawn][..., None]  # as many blocks as the drawn document has
    sums = [(kind[drawn[..., None], places] * used).sum(dim=(1, 2)) for kind in totals]
    low, high = torch.quantile(sums[0] / sums[1], torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    estimate = (totals[0].sum() / totals[1].sum()).item()
    return Interval(estimate, low, high)


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return confidence
