"""What every cache of FreqKV keeps account of: which tokens entered, in which rows, and whether all layers agree on it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from freqkv.history import History
from freqkv.layer import FreqKVHybridLayer, FreqKVLayer
from freqkv.models.upstream import Cache, DynamicLayer, LinearAttentionLayer, check_crop
from freqkv.padding import Padding
from freqkv.parts import Call
from freqkv.schedule import Schedule

__all__ = ["TrackedCache"]


class NoneBeyond(list[Any]):
    """A list that has None where it has nothing yet."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index) if isinstance(index, slice) or index < len(self) else None


class TrackedCache(Cache):
    """Layers, and what has entered them.

    Parameters
    ----------
    layers : list
        Compressed layers, of the same tokens, and transformers' own.
    crossing : frozenset of int
        Layers that hold images, and no tokens.
    extra_state : str or None
        The name of the list in which the family keeps more, by layer, first dimension batch (MiniMax).

    Attributes
    ----------
    padding : Padding
        The columns that have entered.
    history : History
        A digest of their ids.
    """

    layers: list[Any]

    def __init__(self, layers: list[Any], crossing: frozenset[int], extra_state: str | None) -> None:
        Cache.__init__(self, layers=layers)
        self._compressed = [layer for layer in layers if isinstance(layer, FreqKVLayer)]
        self._crossing = crossing
        self.extra_state_name = extra_state
        self._clear()

    def _clear(self) -> None:
        longest = max(layer.schedule.window for layer in self._compressed)
        self.padding = Padding(longest)
        self.history = History(longest)
        self._began: tuple[int, ...] | None = (
            None  # tokens of each row before the forward that is under way, or was interrupted
        )
        self._touched = False
        if self.extra_state_name is not None:
            setattr(self, self.extra_state_name, NoneBeyond())

    @property
    def is_croppable(self) -> bool:
        """Whether :meth:`crop` can go back at all, once past recording is activated; assisted decoding asks for it."""
        return self.extra_state_name is None and super().is_croppable  # type: ignore[no-any-return]

    @property
    def extra_state(self) -> list[Any] | None:
        """What the family keeps by layer beside the layers (MiniMax)."""
        return None if self.extra_state_name is None else getattr(self, self.extra_state_name)  # type: ignore[no-any-return]

    @property
    def compressed_layers(self) -> list[int]:
        """Indices of the layers that FreqKV compresses; the others are transformers' own."""
        return [index for index, layer in enumerate(self.layers) if isinstance(layer, FreqKVLayer)]

    @property
    def layer_schedules(self) -> list[Schedule]:
        """The schedules of all compressed layers."""
        return [layer.schedule for layer in self._compressed]

    @property
    def tokens_seen(self) -> int:
        """Tokens that have entered, compressed ones and padding included, as `generate` counts them."""
        return self.padding.columns

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each row without its padding; () as long as it is empty."""
        mask = self.padding.token_mask
        return self._compressed[0].counts or (() if mask is None else (0,) * mask.shape[0])

    @property
    def row_tokens(self) -> list[int] | None:
        """Tokens of each row without its padding; None while there was no padding, and all have :attr:`tokens_seen`."""
        counts, columns = self.counts, self.tokens_seen
        return None if counts.count(columns) == len(counts) else list(counts)

    @property
    def batch_size(self) -> int | None:
        """Rows of the batch that it serves; None as long as it is empty."""
        return len(self.counts) or None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that have entered, padding included."""
        layer = self.layers[layer_idx]
        return self.tokens_seen if isinstance(layer, FreqKVLayer) else super().get_seq_length(layer_idx)  # type: ignore[no-any-return]

    def begin(self) -> None:
        """Note that a forward starts. Call :meth:`check_usable` before."""
        self._began = self._compressed[0].counts
        self._touched = False

    @property
    def is_under_way(self) -> bool:
        """Whether a forward has begun and not ended."""
        return self._began is not None

    def begin_from(self, columns: int, padded_rows: int | None) -> None:
        """Note what was seen by a cache that was saved; rows are given where some of its columns were padding."""
        # Which of the last tokens were padding is not stored, since they may be any number: they cannot be cropped.
        mask = None if padded_rows is None else torch.ones((padded_rows, 0), dtype=torch.bool, device="cpu")
        self.padding = Padding(self.padding.kept, columns, mask)
        self.history = self.history.extended(columns, None, None)  # ids are not stored

    def touch(self) -> None:
        """Note that the forward under way has changed a layer."""
        self._touched = True

    def commit(self, call: Call, ids: Tensor | None) -> None:
        """Note that the tokens of a call are in, `ids` `(batch, tokens)` if they came as such.

        Raises
        ------
        RuntimeError
            If they did not enter every compressed layer.
        """
        nothing = (0,) * call.batch
        missed = [layer.layer_idx for layer in self._compressed if (layer.counts or nothing) != call.after]
        if missed:
            raise RuntimeError(
                f"{call.tokens} tokens went through the model without entering layers {missed} of this FreqKVCache: the model "
                "drops caches on the way to its attention layers, or runs other layers than its configuration says. Call "
                "cache.reset(), and report the model"
            )
        self.padding = self.padding.extended(call)
        self.history = self.history.extended(call.tokens, ids, call.token_mask)
        self._began = None

    def abort(self) -> None:
        """Note that the forward was interrupted: nothing happened, or the cache is spent."""
        if not self.is_spent:
            self._began = None

    @property
    def is_spent(self) -> bool:
        """Whether an interrupted forward left the cache unusable until :meth:`reset`."""
        counts = self._compressed[0].counts
        if self._began is not None and (self._touched or counts != self._began):
            return True
        return any(layer.counts != counts or not layer.intact for layer in self._compressed)

    def check_usable(self) -> None:
        """Raise RuntimeError if an earlier forward broke off after tokens had entered some layer."""
        if self.is_spent:
            raise RuntimeError(
                "this FreqKVCache is spent: a forward was interrupted half-way and its layers no longer agree "
                f"({sorted({layer.seen for layer in self._compressed})} tokens seen). Call cache.reset() and start again"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens in all layers, or raise and leave all as they were.

        Raises
        ------
        ValueError
            If `tokens_to_remove` is positive or removes more than was seen.
        RuntimeError
            If a compression lies among them and what was there before it was not recorded; or if a layer of transformers
            cannot go back, as one that slides or recurs without past recording.
        """
        tokens_to_remove = operator.index(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if self.extra_state_name is not None and tokens_to_remove:
            raise RuntimeError("this model's linear attention keeps no past: its cache cannot be cropped")
        if -tokens_to_remove > self.tokens_seen:
            raise ValueError(f"cannot remove {-tokens_to_remove} of {self.tokens_seen} tokens")
        counts = self.counts
        after = self.padding.before(counts, -tokens_to_remove)
        self.check_rewind(after)
        # How each layer of transformers goes back; a hybrid one has both kinds of state.
        crops = [
            (layer, LinearAttentionLayer.crop if isinstance(layer, FreqKVHybridLayer) else type(layer).crop)
            for index, layer in enumerate(self.layers)
            if type(layer) is not FreqKVLayer and index not in self._crossing
        ]
        for layer, crop in crops:
            check_crop(layer, crop, tokens_to_remove)
        for layer, crop in crops:
            crop(layer, tokens_to_remove)
        for layer in self._compressed:
            if layer.counts:
                layer.rewind(after)
        self.padding = self.padding.cropped(-tokens_to_remove)
        self.history = self.history.cropped(-tokens_to_remove)

    @property
    def keeps_states(self) -> bool:
        """Whether something in it cannot forget single rows' tokens: a convolution or recurrent state."""
        return self.extra_state_name is not None or any(hasattr(layer, "has_previous_state") for layer in self.layers)

    def check_rewind(self, after: tuple[int, ...]) -> None:
        """Raise where compressed layers cannot go back to `after` tokens in each row. See :meth:`crop`."""
        for layer in self._compressed:
            if layer.counts:
                layer.check_rewind(after)

    def rewind(self, after: tuple[int, ...], hidden: Tensor) -> None:
        """Let rows go back to `after` tokens; columns stay, of which `hidden`, `(batch, last)`, are padding from now on."""
        for layer in self._compressed:
            if layer.counts:
                layer.rewind(after)
        self.padding = self.padding.without(hidden)
        self.history = self.history.without(hidden)

    def reset(self) -> None:
        """Forget all tokens; buffers stay allocated."""
        for layer in self.layers:
            if isinstance(layer, DynamicLayer) and not isinstance(layer, FreqKVLayer):
                layer.keys = layer.values = None  # older versions of transformers zero them, and keep their length
                layer.is_initialized = False
        super().reset()
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, for beam search."""
        self._take(Cache.reorder_cache, beam_idx, lambda state: state[beam_idx.to(state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._take(Cache.batch_repeat_interleave, repeats, lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._take(Cache.batch_select_indices, indices, lambda state: state[indices.to(state.device)])

    def _take(self, of_layers: Callable[[Cache, Any], None], what: Any, of_rest: Callable[[Tensor], Tensor]) -> None:
        of_layers(self, what)
        states = self.extra_state or []
        states[:] = [of_rest(state) if isinstance(state, Tensor) else state for state in states]
        self.padding = self.padding.taken(of_rest)
        self.history = self.history.taken(of_rest)
