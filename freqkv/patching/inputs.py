"""Checks of what a model is called with: what FreqKV cannot serve exactly is refused here, with the cache as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from freqkv.cache import FreqKVCache
from freqkv.forward import Forward, Request
from freqkv.hiding import hidden_tokens
from freqkv.patching.state import PatchState

__all__ = [
    "check_cache",
    "check_decoder_arguments",
    "is_not_text",
    "request_of",
    "tokens_of",
    "wants",
]

# What a model may be called with beside images, sounds and the like.
TEXT_ARGUMENTS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "labels",
    "logits_to_keep",
    "cache_position",
)
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


def tokens_of(kwargs: dict[str, Any]) -> Tensor | None:
    """The ids or embeddings that a model is called with, `(batch, tokens, ...)`."""
    embeds: Tensor | None = kwargs.get("inputs_embeds")
    return kwargs.get("input_ids") if embeds is None else embeds


def request_of(kwargs: dict[str, Any], inputs: Tensor, cache: FreqKVCache | None, state: PatchState) -> Request:
    """What a model is called with, once it is checked.

    Raises
    ------
    ValueError
        If it does not go with the cache.
    """
    batch, tokens = inputs.shape[:2]
    seen = 0 if cache is None else cache.tokens_seen
    if tokens == 0:
        raise ValueError(
            f"the input has no new tokens, the cache has seen {seen}: generate takes the whole conversation as its input "
            "and leaves out what the cache has seen, or only what is new, with an attention_mask of ones for both. For "
            "another conversation, use another cache or reset()"
        )
    if cache is not None and kwargs.get("use_cache") is False:
        raise ValueError("use_cache=False and a FreqKVCache contradict each other: leave one of them out")
    held = None if cache is None else cache.batch_size
    if held not in (None, batch):
        raise ValueError(
            f"this FreqKVCache holds {held} rows, the input has {batch}: a cache serves the batch that filled it. "
            "Make one for each batch, or call reset()"
        )
    mask = kwargs.get("attention_mask")
    mask_given = isinstance(mask, Tensor) and mask.ndim == 4  # of queries by tokens, of the caller's own
    if mask_given:
        assert isinstance(mask, Tensor)
        _check_custom(mask, batch, seen, tokens, cache, state)
        mask = None
    token_mask, hidden = _token_mask(mask, batch, seen, tokens), None
    if token_mask is not None:
        if cache is not None and seen and not (cache.row_tokens is None and bool(token_mask.all())):
            hidden = hidden_tokens(cache, token_mask[:, :seen])
        token_mask = token_mask[:, seen:]
        token_mask = None if bool(token_mask.all()) else token_mask
    ids = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else None
    return Request(
        batch=batch,
        tokens=tokens,
        token_mask=token_mask,
        ids=ids if isinstance(ids, Tensor) and ids.ndim == 2 else None,
        mask_given=mask_given,
        other_inputs=frozenset(name for name, value in kwargs.items() if is_not_text(name, value)),
        use_cache=kwargs.get("use_cache"),
        hidden=hidden,
    )


def check_cache(cache: FreqKVCache, state: PatchState) -> None:
    """Raise where a cache cannot be used, or not with this model."""
    cache.check_usable()
    if cache.geometry != state.geometry:
        for what, expected in state.geometry.items():
            if cache.geometry[what] != expected:
                raise ValueError(
                    f"this FreqKVCache was made for a model with {what} {cache.geometry[what]}, this model has "
                    f"{expected}: make it with FreqKVCache(model.config, ...) of the model that uses it"
                )
    if cache.wanted_queries or not cache.has_one_schedule:
        state.check_method(cache.compressor, cache.layer_schedules)


def is_not_text(name: str, value: Any) -> bool:
    """Whether an argument brings something else than text."""
    if name in TEXT_ARGUMENTS or not isinstance(value, (Tensor, Mapping)):
        return False
    if isinstance(value, Tensor) and value.ndim == 0:  # a number, such as num_items_in_batch of Trainer
        return False
    if name.endswith("token_type_ids"):  # where 0 stands for text
        return bool(value.any()) if isinstance(value, Tensor) else True
    return len(value) > 0


def wants(kwargs: dict[str, Any], config: Any, name: str) -> bool:
    """Whether an output is asked for, by the call or by the configuration."""
    asked = kwargs.get(name)
    return bool(getattr(config, name, False) if asked is None else asked)


def _check_custom(
    mask: Tensor, batch: int, seen: int, tokens: int, cache: FreqKVCache | None, state: PatchState
) -> None:
    """That a mask of the caller's own, whose columns are tokens, goes with entries: as long as these are the tokens."""
    schedules = state.schedules() if cache is None else cache.layer_schedules
    fits = all(seen + tokens <= schedule.next_fold(1) for schedule in schedules)
    why = f"there are {seen} tokens in the cache already"
    if not state.makes_all_masks:
        why = "this model has other layers than full attention, which need other masks"
    elif not fits:
        why = f"{seen + tokens} tokens do not fit the window of {min(s.window for s in schedules)} entries"
    elif seen == 0 and mask.shape[0] in (1, batch) and tuple(mask.shape[2:]) == (tokens, tokens):
        return
    elif seen == 0:
        why = f"it has shape {tuple(mask.shape)}, not {(batch, 1, tokens, tokens)}"
    raise ValueError(
        "FreqKV builds its own masks over cache entries and cannot use a custom 4-D attention_mask, whose columns are "
        f"tokens, except in the first call of an empty cache and below the window: {why}. Pass a 2-D attention_mask, or "
        "none"
    )


def _token_mask(mask: Any, batch: int, seen: int, tokens: int) -> Tensor | None:
    """A mask of all columns, as bool; None where nothing is padding.

    Raises
    ------
    ValueError
        If it is no mask of these columns.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError(
            "FreqKV builds its own masks over cache entries and cannot use a custom 4-D attention_mask, whose "
            "columns are tokens. Pass a 2-D attention_mask, or none"
        )
    if mask.shape != (batch, seen + tokens):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but there are {batch} rows of {seen} tokens in the cache "
            f"and {tokens} new ones: pass one of shape {(batch, seen + tokens)}, or none"
        )
    return mask.bool()  # numbers of low precision could not be counted


def check_decoder_arguments(
    kwargs: dict[str, Any], tokens: int, request: Request, forward: Forward | None, state: PatchState, inside: bool
) -> None:
    """Raise ValueError where a decoder is called with what FreqKV cannot serve.

    Parameters
    ----------
    kwargs : dict
        Its arguments.
    tokens : int
        The new tokens that reach it.
    request : Request
        What the outermost model was called with.
    forward : Forward or None
        The forward of a cache.
    inside : bool
        Whether there is a model around it.
    """
    token_mask = request.token_mask
    if token_mask is not None and token_mask.shape[1] != tokens:
        raise ValueError("attention_mask has zeros, and images became more tokens on the way: pass one row at a time")
    mask = kwargs.get("attention_mask")
    is_plain = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    types = kwargs.get("token_type_ids")
    own_masks = request.other_inputs if inside and not is_plain else frozenset()
    if own_masks or (types is not None and bool(types.any())):
        raise ValueError(
            f"the model makes attention masks of its own from {', '.join(sorted(own_masks or ['token_type_ids']))}, in "
            "which tokens of a block attend to each other, and FreqKV knows causal masks only. Use text, or "
            "transformers' DynamicCache"
        )
    _check_not_packed(kwargs, tokens, token_mask)
    config = state.model_config
    if wants(kwargs, config, "output_attentions"):
        _check_weights(request, tokens, forward, state)
    if forward is None and token_mask is not None and wants(kwargs, config, "output_router_logits"):
        raise ValueError(
            "output_router_logits: without a cache, FreqKV runs padded rows in another order than the router's loss "
            "expects. Pass rows of equal length"
        )


def _check_weights(request: Request, tokens: int, forward: Forward | None, state: PatchState) -> None:
    """That attention weights of a call form one matrix over its columns."""
    cache = None if forward is None else forward.cache
    assert cache is None or isinstance(cache, FreqKVCache)
    schedules = state.schedules() if cache is None else cache.layer_schedules
    mask = request.token_mask
    before = (0,) * request.batch if cache is None or not cache.counts else cache.counts
    if mask is None and (cache is None or cache.row_tokens is None):
        first_fold = min(schedule.next_fold(before[0] + 1) for schedule in schedules)
        if tokens > 1 and before[0] + tokens > first_fold:
            raise ValueError(
                "output_attentions: the weights of a call that is compressed half-way are over different entries and do not "
                f"form one matrix. Feed at most {first_fold - before[0]} tokens now, or leave output_attentions out"
            )
        return
    brings = [tokens] * request.batch if mask is None else mask.sum(1).tolist()
    longest = max(a + b for a, b in zip(before, brings, strict=True))
    limit = min(schedule.next_fold(1) for schedule in schedules)
    unknown = tokens > limit if cache is None else not cache.padding.knows_all
    if longest > limit or unknown:
        raise ValueError(
            "output_attentions: the weights of padded rows are over the entries of each row, which no longer are the "
            f"tokens once more than window={limit} of them came, and do not form one matrix. Pass one row at a "
            "time, or leave output_attentions out"
        )


def _check_not_packed(kwargs: dict[str, Any], tokens: int, token_mask: Tensor | None) -> None:
    packing = [name for name in PACKING_ARGUMENTS if kwargs.get(name) is not None]
    if packing:
        raise ValueError(
            f"packed sequences ({', '.join(packing)}) share one cache, and FreqKV would compress them into each "
            "other. Pass each sequence as a row of its own"
        )
    positions = kwargs.get("position_ids")
    if positions is None or tokens == 1:  # a single position cannot restart, and looking costs a device sync
        return
    # Slots take their place, and RoPE is relative: they may start anywhere, and those of padding say nothing.
    if token_mask is None or positions.ndim != 2:
        plain = positions.diff(dim=-1) == 1
    else:
        where = token_mask.to(positions.device)
        offset = positions - (where.cumsum(1) - 1)
        first = offset.gather(1, where.int().argmax(1, keepdim=True).expand(len(offset), 1))
        plain = (offset == first) | ~where
    if not bool(plain.all()):
        if token_mask is not None:
            raise ValueError(
                "position_ids must count the tokens of each row that are no padding. generate counts wrongly behind padding on "
                "the right: pad its prompts on the left (padding_side='left'), or leave position_ids out"
            )
        raise ValueError(
            "position_ids must count the tokens of each row: positions that restart (packed sequences) or jump (those that "
            "some models give to images) are not supported, since FreqKV rotates keys at their slots. Leave position_ids "
            "out, and pass each sequence as a row of its own"
        )
