"""Going back: what a layer held before the last fold of each row, for caches that are asked to forget their last tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from freqkv.buffers import Buffers, outside_inference_mode
from freqkv.parts import Part
from freqkv.schedule import Schedule

__all__ = ["Past", "check_rewind", "recorded", "rewound"]


@dataclass(frozen=True)
class Past:
    """Tensors from before the last fold of each row.

    Attributes
    ----------
    counts : tuple of (int or None)
        How many tokens had entered each row then; None where nothing was folded.
    tensors : dict of str to Tensor
    """

    counts: tuple[int | None, ...]
    tensors: dict[str, Tensor]


def recorded(past: Past | None, buffers: Buffers, counts: tuple[int, ...], part: Part) -> Past:
    """The past of a layer whose rows are about to be folded before a part enters."""
    folding = [part.rows[place] for _, places in part.folds for place in places]
    held = buffers.tensors
    with outside_inference_mode():
        fits = past is not None and all(
            name in past.tensors and past.tensors[name].shape == t.shape and not past.tensors[name].is_inference()
            for name, t in held.items()
        )
        if past is None or not fits or len(folding) == len(counts):
            past = Past((None,) * len(counts), {name: t.detach().clone() for name, t in held.items()})
        else:
            for name, tensor in held.items():
                past.tensors[name][folding] = tensor[folding].detach()
    known = [counts[row] if row in folding else count for row, count in enumerate(past.counts)]
    return Past(tuple(known), past.tensors)


def check_rewind(
    past: Past | None, schedule: Schedule, before: tuple[int, ...], after: tuple[int, ...], recording: bool
) -> None:
    """Raise where a layer that has seen `before` tokens in its rows cannot go back to `after`.

    Raises
    ------
    ValueError
        If more are removed than were seen.
    RuntimeError
        If entries were folded since, and what was there before was not recorded.
    """
    removed = max((b - a for b, a in zip(before, after, strict=True)), default=0)
    longest = max(before, default=0)
    if min(after, default=0) < 0:
        raise ValueError(f"cannot remove {removed} of {longest} tokens")
    for row in _over_folds(schedule, before, after):
        count = None if past is None else past.counts[row]
        if count is None or schedule.compressions(count) != schedule.compressions(after[row]):
            last = schedule.previous_fold(longest - 1)
            between = schedule.next_fold(last + 1) - last
            hint = (
                "or call cache.activate_past_recording() before: it keeps what was there before the last compression"
                if not recording
                else f"or remove fewer than the {between} tokens between two compressions: past recording keeps what was there "
                "before the last one. Of drafts, num_assistant_tokens and prompt_lookup_num_tokens set the number"
            )
            raise RuntimeError(
                f"cannot remove {removed} tokens: the cache was compressed since, and the entries from before are gone. "
                f"Keep a copy (copy.deepcopy(cache)) to return to, {hint}"
            )


def rewound(
    past: Past | None, schedule: Schedule, buffers: Buffers, before: tuple[int, ...], after: tuple[int, ...]
) -> Past | None:
    """Go back to `after` tokens in each row, as :func:`check_rewind` allows; returns what is left of the past.

    Tensors are replaced, not written to.
    """
    over = _over_folds(schedule, before, after)
    if over:
        assert past is not None
        every = len(over) == len(after)
        with outside_inference_mode():
            for name, kept in past.tensors.items():
                if every:
                    buffers.tensors[name] = kept
                else:
                    tensor = buffers.tensors[name]
                    # Tensors of a graph have as many slots as are in use, which may be fewer than there were.
                    missing = max(0, kept.shape[2] - tensor.shape[2])
                    tensor = functional.pad(tensor, (0, 0, 0, missing)) if missing else tensor.clone()
                    tensor[over, :, : kept.shape[2]] = kept[over]
                    buffers.tensors[name] = tensor
        left = tuple(None if row in over else count for row, count in enumerate(past.counts))
        past = None if every else Past(left, past.tensors)
    if not buffers.owned:  # tensors of a graph have as many slots as are in use
        entries = max(map(schedule.entries, after), default=0)
        for name in buffers.tensors.keys() & {"keys", "values"}:
            buffers.tensors[name] = buffers.tensors[name][:, :, :entries]
    return past


def _over_folds(schedule: Schedule, before: tuple[int, ...], after: tuple[int, ...]) -> list[int]:
    """Rows that were folded in between."""
    folds = schedule.compressions
    return [row for row, (b, a) in enumerate(zip(before, after, strict=True)) if folds(b) != folds(a)]
