"""Compressors: what a fold makes of a span of the cache.

A compressor is a function of a :class:`Span`, or of `(keys, values, keep)`, that returns `keep` entries of each. It must not
look at anything else: what is compressed, and when, is the schedule's. One that has an attribute `queries = w` gets the last
`w` queries as well.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from freqkv.transform import low_pass

__all__ = [
    "Compressor",
    "Span",
    "check_compressor",
    "compress",
    "compressor_name",
    "keep_recent",
    "low_pass_entries",
    "mean_pool",
    "queries_wanted",
    "takes_span",
]


@dataclass(frozen=True, eq=False)
class Span:
    """The entries that one fold compresses, in float32 (float64 for float64 models).

    Attributes
    ----------
    keys, values : Tensor
        `(rows, kv_heads, n, head_dim)`, in the order of their slots: the oldest first, unless the compressor put others before
        them; keys *before* RoPE. The two head sizes may differ. They may be views
        of the cache, which it writes over after the fold: copy what is to be kept.
    keep : int
        How many entries are wanted in their place.
    layer_idx : int
        The layer of the cache, counted as the model counts its layers.
    start : int
        The slot of the first entry.
    queries : Tensor or None
        `(rows, heads, m, head_dim)`: the last queries before the fold, before RoPE, oldest first, without gradients; None
        unless the compressor asks for them. `m` is the number that it asks for, or that of the tokens since the fold before,
        if that is less.
    query_start : int
        The slot of the first of them.
    scaling : float
        By which the model multiplies queries times keys.
    rotate : callable
        `(x, slot) -> x`: RoPE at the slots from `slot` on, of queries or keys.
    shared : dict
        The same one for this fold in all layers that have the same schedule, from the first layer to the last: what a layer
        puts in there, layers behind it find.
    following_keys : Tensor or None
        `(rows, kv_heads, m, head_dim)`: keys before RoPE of the entries behind the span, which this fold leaves as they are.
        None if nothing is known of them.
    is_first : bool
        Whether nothing was folded before the token that this fold makes room for.
    folds : int
        How many folds make room for it, this one among them.
    """

    keys: Tensor
    values: Tensor
    keep: int
    layer_idx: int = 0
    start: int = 0
    queries: Tensor | None = None
    query_start: int = 0
    scaling: float = 1.0
    rotate: Callable[[Tensor, int], Tensor] = lambda x, slot: x
    shared: dict[Any, Any] = field(default_factory=dict)
    following_keys: Tensor | None = None
    is_first: bool = True
    folds: int = 1

    def attention(self) -> Tensor:
        """Attention of the queries over the entries of the span alone, `(rows, heads, m, n)`; a query sees no later entry.

        The weights of a query add up to 1, or to 0 where it stands before all entries.

        Raises
        ------
        ValueError
            If the compressor did not ask for queries.
        """
        if self.queries is None:
            raise ValueError("this span has no queries: give the compressor an attribute, such as queries = 64")
        queries, keys = self.rotate(self.queries, self.query_start), self.rotate(self.keys, self.start)
        rows, heads, count, size = queries.shape
        groups = queries.reshape(rows, keys.shape[1], -1, count, size)  # as many query heads for each KV head
        logits = (groups @ keys[:, :, None].mT).reshape(rows, heads, count, -1) * self.scaling
        query_slots = torch.arange(count, device=keys.device)[:, None] + self.query_start
        ahead = torch.arange(keys.shape[2], device=keys.device) + self.start > query_slots
        return logits.masked_fill(ahead, -torch.inf).softmax(dim=-1).nan_to_num(0.0)


Pair: TypeAlias = tuple[Tensor, Tensor]
Compressor: TypeAlias = Callable[[Tensor, Tensor, int], Pair] | Callable[[Span], Pair]


def low_pass_entries(keys: Tensor, values: Tensor, keep: int) -> Pair:
    """FreqKV: keep the lowest frequencies of each head and channel (arXiv 2505.00570, section 3.2)."""
    return low_pass(keys, keep, dim=-2), low_pass(values, keep, dim=-2)


def keep_recent(keys: Tensor, values: Tensor, keep: int) -> Pair:
    """Keep the last `keep` entries: behind sink tokens, StreamingLLM's rule (arXiv 2309.17453)."""
    return keys[..., -keep:, :], values[..., -keep:, :]


def mean_pool(keys: Tensor, values: Tensor, keep: int) -> Pair:
    """Average `keep` runs of neighbouring entries, each n / keep long (overlapping by one where that is no integer)."""

    def pool(x: Tensor) -> Tensor:
        runs = functional.adaptive_avg_pool1d(x.flatten(0, 1).transpose(1, 2), keep)  # (rows * heads, head_dim, keep)
        return runs.transpose(1, 2).reshape(*x.shape[:2], keep, x.shape[-1])

    return pool(keys), pool(values)


def takes_span(compressor: Any) -> bool:
    """Whether a compressor takes a :class:`Span`, rather than `(keys, values, keep)`.

    Raises
    ------
    TypeError
        If it takes neither one argument nor three.
    """
    try:
        parameters = inspect.signature(compressor).parameters.values()
    except ValueError:  # written in C
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    variable = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(required) == 1 and (len(positional) < 3 or positional[0].name == "span"):
        return True
    if len(required) <= 3 and (len(positional) >= 3 or variable):
        return False
    raise TypeError(
        f"compressor {compressor_name(compressor)} takes {len(required)} arguments: it must be a function of a freqkv.Span, or "
        "of (keys, values, keep)"
    )


def check_compressor(compressor: Compressor) -> Compressor:
    """Raise TypeError where something is no compressor."""
    if not callable(compressor):
        raise TypeError(f"compressor is a function (keys, values, keep) -> (keys, values), got {compressor!r}")
    if queries_wanted(compressor) and not takes_span(compressor):
        raise TypeError(
            f"compressor {compressor_name(compressor)} asks for queries, so it must take a freqkv.Span, not (keys, "
            "values, keep)"
        )
    takes_span(compressor)
    return compressor


def queries_wanted(compressor: Compressor) -> int:
    """How many of the last queries a compressor asks for, by its attribute `queries`; 0 for none."""
    queries = getattr(compressor, "queries", 0)
    try:
        count = operator.index(queries)
    except TypeError:
        count = -1
    if count < 0 or isinstance(queries, bool):
        raise TypeError(
            f"compressor {compressor_name(compressor)} has queries={queries!r}: it must be a number of queries"
        )
    return count


def compress(compressor: Compressor, span: Span, takes: bool | None = None) -> Pair:
    """What a compressor makes of a span; `takes` is what :func:`takes_span` tells, if it is known already.

    Raises
    ------
    TypeError, ValueError
        If it returns something else than a pair of tensors of the shapes that are wanted.
    """
    call: Any = compressor
    takes = takes_span(compressor) if takes is None else takes
    made: Any = call(span) if takes else call(span.keys, span.values, span.keep)
    if not (isinstance(made, tuple) and len(made) == 2 and all(isinstance(t, Tensor) for t in made)):
        raise TypeError(
            f"compressor {compressor_name(compressor)} must return (keys, values), it returned {type(made)}"
        )
    for name, before, after in (("keys", span.keys, made[0]), ("values", span.values, made[1])):
        wanted = (*before.shape[:2], span.keep, before.shape[-1])
        if tuple(after.shape) != wanted:
            by = f"compressor {compressor_name(compressor)}"
            raise ValueError(f"{by} returned {name} of shape {tuple(after.shape)}, expected {wanted}")
    return made


def compressor_name(compressor: Compressor) -> str:
    """What messages call it."""
    return getattr(compressor, "__name__", repr(compressor))


def compressor_parameters(compressor: Compressor) -> dict[str, Any]:
    """The numbers of a compressor that is a dataclass."""
    is_data = dataclasses.is_dataclass(compressor) and not isinstance(compressor, type)
    return dataclasses.asdict(compressor) if is_data else {}  # type: ignore[call-overload]
