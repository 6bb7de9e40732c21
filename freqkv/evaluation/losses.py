"""Loss of every token through a cache, bits per byte by position, and divergence from the full cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, PreTrainedModel

from freqkv.models.upstream import CACHE

__all__ = ["Divergence", "PositionBin", "bits_per_byte", "divergence", "evaluating", "kl_to_reference", "token_losses"]

SLICE = 256  # tokens whose logits are turned into losses at a time: a large vocabulary takes more memory than the model


@dataclass(frozen=True)
class PositionBin:
    """Bits per byte of the tokens at the positions ``start <= position < stop``.

    Attributes
    ----------
    start, stop : int
        Positions of the predicted tokens in their sequences.
    tokens : int
        Predicted tokens, over the whole batch.
    bytes : int
        UTF-8 bytes that these tokens stand for.
    bits_per_byte : float
        Their total loss in bits, divided by `bytes`.
    """

    start: int
    stop: int
    tokens: int
    bytes: int
    bits_per_byte: float


@dataclass(frozen=True, eq=False)
class Divergence:
    """How the predictions through a cache differ from those through a reference, token by token.

    Attributes
    ----------
    losses : Tensor, shape (batch, T - 1), float64
        Natural-log losses through the cache, as from `token_losses`.
    kl : Tensor, shape (batch, T - 1), float64
        KL(reference || cache) of the predicted distributions, in nats; entry ``[b, i]`` is that of the prediction of
        token ``input_ids[b, i + 1]``.
    same_top : Tensor, shape (batch, T - 1), bool
        Whether both find the same token the likeliest.
    """

    losses: Tensor
    kl: Tensor
    same_top: Tensor


def token_losses(
    model: PreTrainedModel, input_ids: Tensor, past_key_values: Cache | None = None, chunk_size: int = 512
) -> Tensor:
    """Loss of every token given the tokens before it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model; it runs in evaluation mode and without gradients.
    input_ids : Tensor, shape (batch, T), integer
        Sequences of one length T >= 2, without padding.
    past_key_values : transformers.Cache, optional
        An empty cache, through which the sequences stream `chunk_size` tokens at a time. It is changed in place.
        Without a cache, one forward pass sees whole sequences.
    chunk_size : int
        Tokens per forward pass through the cache.

    Returns
    -------
    Tensor, shape (batch, T - 1), float64, on the model's device
        Natural-log losses, computed in float32 (float64 for float64 models); entry ``[b, i]`` is that of token
        ``input_ids[b, i + 1]``.

    Raises
    ------
    ValueError
        If `input_ids` does not have the shape above or if `chunk_size` is not positive.
    """
    input_ids = _checked(model, input_ids, chunk_size)
    inputs, targets = input_ids[:, :-1], input_ids[:, 1:]
    with evaluating(model):
        if past_key_values is None:
            return _cross_entropy(model(input_ids=inputs, use_cache=False).logits, targets)
        losses = []
        for start in range(0, inputs.shape[1], chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = model(input_ids=inputs[:, chunk], **{CACHE: past_key_values}, use_cache=True).logits
            losses.append(_cross_entropy(logits, targets[:, chunk]))
        return torch.cat(losses, dim=1)


def divergence(
    model: PreTrainedModel, input_ids: Tensor, caches: Mapping[str, Cache], reference: str, chunk_size: int = 512
) -> dict[str, Divergence]:
    """How far predictions through several caches are from those through one of them, on the same text.

    All caches read the text side by side, so that the reference is computed once and no logits are kept. The reference is
    usually the full cache, and the text then has to fit into the model's context.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model, patched where a cache asks for it; it runs in evaluation mode and without gradients.
    input_ids : Tensor, shape (batch, T), integer
        Sequences of one length T >= 2, without padding.
    caches : mapping of str to transformers.Cache
        Empty caches by name. They are changed in place.
    reference : str
        The name of the one that the others are compared with.
    chunk_size : int
        Tokens per forward pass.

    Returns
    -------
    dict of str to Divergence
        For all of `caches`, in their order; the reference itself has a KL of 0.

    Raises
    ------
    ValueError
        If `input_ids` does not have the shape above, if `chunk_size` is not positive, or `reference` is not in `caches`.
    """
    if reference not in caches:
        raise ValueError(f"reference {reference!r} is none of the caches: {', '.join(caches)}")
    input_ids = _checked(model, input_ids, chunk_size)
    inputs, targets = input_ids[:, :-1], input_ids[:, 1:]
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in caches}
    with evaluating(model):
        for start in range(0, inputs.shape[1], chunk_size):
            chunk = slice(start, start + chunk_size)

            def logits(name: str, chunk: slice = chunk) -> Tensor:
                return model(input_ids=inputs[:, chunk], **{CACHE: caches[name]}, use_cache=True).logits  # type: ignore[no-any-return]

            of_reference = logits(reference)
            for name in caches:
                own = of_reference if name == reference else logits(name)
                parts[name].append(_compared(own, of_reference, targets[:, chunk]))
    joined = {name: [torch.cat(kind, dim=1) for kind in zip(*pieces, strict=True)] for name, pieces in parts.items()}
    return {name: Divergence(*kinds) for name, kinds in joined.items()}


def _checked(model: PreTrainedModel, input_ids: Tensor, chunk_size: int) -> Tensor:
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must have shape (batch, T) with T >= 2, got {tuple(input_ids.shape)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}")
    return input_ids.to(model.device)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    pieces = zip(logits.split(SLICE, dim=1), targets.split(SLICE, dim=1), strict=True)
    losses = [functional.cross_entropy(_exact(x).mT, y.long(), reduction="none").double() for x, y in pieces]
    return torch.cat(losses, dim=1)


def kl_to_reference(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || logits) of predicted distributions, with its gradient.

    Parameters
    ----------
    logits, reference : Tensor, shape (..., vocabulary)
        What the reference rules out (-inf, as in a padded vocabulary) counts as nothing.

    Returns
    -------
    Tensor, shape (...), float32 (float64 for float64 logits)
        In nats.
    """
    own, wanted = _exact(logits).log_softmax(-1), _exact(reference).log_softmax(-1)
    each = functional.kl_div(own, wanted, reduction="none", log_target=True)
    return each.masked_fill(wanted == -torch.inf, 0.0).sum(-1)


def _compared(logits: Tensor, reference: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, KL(reference || logits), and whether the likeliest tokens agree, each `(batch, tokens)`."""
    losses, kl, same = [], [], []
    for x, r, y in zip(*(t.split(SLICE, dim=1) for t in (logits, reference, targets)), strict=True):
        losses.append(_cross_entropy(x, y))
        kl.append(kl_to_reference(x, r).clamp_min(0).double())  # below 0 is rounding only
        same.append(x.argmax(-1) == r.argmax(-1))
    return torch.cat(losses, dim=1), torch.cat(kl, dim=1), torch.cat(same, dim=1)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode, without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def bits_per_byte(losses: Tensor, lengths: Tensor, edges: Sequence[int]) -> list[PositionBin]:
    """Bits per byte of the tokens between each two neighbouring edges.

    Parameters
    ----------
    losses : Tensor, shape (batch, T - 1), floating
        Natural-log losses from `token_losses`.
    lengths : Tensor, shape (batch, T), integer
        Bytes of all T tokens from `byte_lengths`.
    edges : sequence of int, length n + 1
        Rising positions between 0 and T. The token at position 0 is never predicted and never counted.

    Returns
    -------
    list of PositionBin, length n
        One bin for each ``edges[i] <= position < edges[i + 1]``.

    Raises
    ------
    ValueError
        If the shapes do not match, if the edges do not rise or leave the sequence, or if a bin holds no bytes.
    """
    if losses.dim() != 2 or lengths.dim() != 2 or losses.shape != lengths[:, 1:].shape:
        raise ValueError(
            "losses must have shape (batch, T - 1) and lengths (batch, T), "
            f"got {tuple(losses.shape)} and {tuple(lengths.shape)}"
        )
    length = lengths.shape[1]
    rising = all(start < stop for start, stop in itertools.pairwise(edges))
    if len(edges) < 2 or not rising or edges[0] < 0 or edges[-1] > length:
        raise ValueError(f"edges must be at least two rising positions from 0 to {length}, got {list(edges)}")
    bins = []
    for start, stop in itertools.pairwise(edges):
        part = losses[:, max(start, 1) - 1 : stop - 1]
        nats = part.double().sum().item()
        size = int(lengths[:, max(start, 1) : stop].sum().item())
        if size == 0:
            raise ValueError(f"no bytes are predicted at the positions {start} to {stop}")
        bins.append(PositionBin(start, stop, part.numel(), size, nats / math.log(2) / size))
    return bins
