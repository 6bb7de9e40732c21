"""One call of a model: what it was called with, the parts it is cut into, and the end of it.

A forward stands in for the cache on its way through the model. Each attention module gets an adapter of it that is bound to
one part and enters that part's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from freqkv.hiding import Hidden, hide
from freqkv.layer import FreqKVLayer
from freqkv.models.upstream import CACHE_NAMES, Cache, CacheLayerMixin
from freqkv.padding import Padding
from freqkv.parts import Call, Part
from freqkv.rotation import SlotRotation
from freqkv.schedule import Schedule
from freqkv.tracked import TrackedCache

__all__ = ["Forward", "PartCache", "Request", "returned"]


@dataclass(slots=True, eq=False)
class Request:
    """What the outermost model was called with.

    Attributes
    ----------
    batch, tokens : int
    token_mask : Tensor or None
        `(batch, tokens)` bool, True where a new token is not padding; None where none is.
    ids : Tensor or None
        `(batch, tokens)`, if it was called with ids.
    mask_given : bool
        Whether it got an attention mask of four dimensions, which its layers are to get as it is.
    other_inputs : frozenset of str
        Arguments that are not text, such as images.
    use_cache : bool or None
    hidden : Hidden or None
        Tokens in the cache that its mask takes for padding.
    """

    batch: int
    tokens: int
    token_mask: Tensor | None = None
    ids: Tensor | None = None
    mask_given: bool = False
    other_inputs: frozenset[str] = field(default_factory=frozenset)
    use_cache: bool | None = None
    hidden: Hidden | None = None


class Forward(Cache):
    """The cache of a model for the length of one call.

    Parameters
    ----------
    request : Request
    cache : TrackedCache, optional
        Where the tokens go; None for a call that keeps nothing. It then is like an empty cache.
    """

    def __init__(self, request: Request, cache: TrackedCache | None = None) -> None:
        Cache.__init__(self, layers=[] if cache is None else cache.layers)
        self.request = request
        self.cache = cache
        self.memo: dict[Any, Any] = {}
        self.call: Call | None = None
        self.weights_asked = False
        self._parts: dict[int, list[Part]] = {}
        self._extra_state: list[Any] | None = None
        self._undo: Callable[[], None] | None = None
        if cache is not None and cache.extra_state is not None:
            self._extra_state = list(cache.extra_state)
            setattr(self, str(cache.extra_state_name), cache.extra_state)

    def begin(self) -> None:
        """Start; see :meth:`TrackedCache.begin`."""
        if self.cache is not None:
            if self.request.hidden is not None:
                self._undo = hide(self.cache, self.request.hidden)
            self.cache.begin()

    def enter_decoder(self, tokens: int, weights_asked: bool) -> None:
        """Note how many tokens reach the decoder (images may have become more), and whether it returns attention weights."""
        self.call = self._call(tokens)
        self.weights_asked = weights_asked

    def _call(self, tokens: int) -> Call:
        assert self.cache is not None
        mask = self.request.token_mask
        return Call(self.cache.counts or (0,) * self.request.batch, tokens, None if mask is None else mask.cpu())

    def commit(self) -> None:
        """End: the tokens are in. See :meth:`TrackedCache.commit`."""
        if self.cache is not None:
            call = self.call or self._call(self.request.tokens)
            ids = self.request.ids
            self.cache.commit(call, None if ids is None or ids.shape[1] != call.tokens else ids)

    def abort(self) -> None:
        """End: it was interrupted. See :meth:`TrackedCache.abort`."""
        if self.cache is not None:
            before, state = self._extra_state or [], self.cache.extra_state or []
            if len(before) != len(state) or any(a is not b for a, b in zip(before, state, strict=True)):
                self.cache.touch()
            self.cache.abort()
            if self._undo is not None and not self.cache.is_spent:
                self._undo()

    def parts(self, schedule: Schedule) -> list[Part]:
        """What the call is cut into for layers of this schedule, each part made once."""
        assert self.call is not None
        parts = self._parts.get(id(schedule))
        if parts is None:
            parts = self._parts[id(schedule)] = self.call.parts(schedule)
        return parts

    @property
    def padding(self) -> Padding:
        """The columns up to the end of the call."""
        assert self.cache is not None
        assert self.call is not None
        return self.cache.padding.extended(self.call)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Of layers that are transformers' own; a compressed layer is reached through a :class:`PartCache` only."""
        self.touch()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        self.touch()
        return super().update_conv_state(*args, **kwargs)  # type: ignore[no-any-return]

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        self.touch()
        return super().update_recurrent_state(*args, **kwargs)  # type: ignore[no-any-return]

    def touch(self) -> None:
        """Note that a layer was changed: a forward that breaks off now leaves the cache spent."""
        if self.cache is not None:
            self.cache.touch()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of entries under a mask, and the offset that aligns them to the last token.

        Compressed layers get masks of their parts. A decoder that builds one for the whole input before it runs its layers is
        told of one column.
        """
        return (1, 0) if self._is_compressed(layer_idx) else super().get_mask_sizes(query_length, layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where masks count the next token from; see :meth:`get_mask_sizes`."""
        return 0 if self._is_compressed(layer_idx) else super().get_query_offset(layer_idx)  # type: ignore[no-any-return]

    def _is_compressed(self, layer_idx: int) -> bool:
        # The first layer that has a length answers for those that have none, as in transformers.
        has_length = (layer for layer in self.layers[layer_idx:] if isinstance(layer, CacheLayerMixin))
        return isinstance(next(has_length, None), FreqKVLayer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that had entered before the call, padding included; of a layer of transformers, those that have now."""
        if self.cache is not None and isinstance(self.layers[layer_idx], FreqKVLayer):
            return self.cache.tokens_seen
        return super().get_seq_length(layer_idx)  # type: ignore[no-any-return]


class PartCache(Cache):
    """The cache of an attention module for the length of one part.

    Parameters
    ----------
    layers : list
    part : Part
    rotation : SlotRotation
    align_right : bool
        See :meth:`FreqKVLayer.update`.
    forward : Forward or None
        The call that it is part of; None if nothing is kept.
    """

    def __init__(
        self,
        layers: list[Any],
        part: Part,
        rotation: SlotRotation,
        align_right: bool = False,
        forward: Forward | None = None,
    ) -> None:
        Cache.__init__(self, layers=layers)
        self.part = part
        self.rotation = rotation
        self.align_right = align_right
        self.forward = forward

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`FreqKVLayer.update`; other layers are transformers' own."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, FreqKVLayer):
            self._touch()
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]
        held = layer.update(
            key_states, value_states, part=self.part, rotation=self.rotation, align_right=self.align_right
        )
        self._touch()  # it is updated as a whole, or knows that it was not
        return held

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        self._touch()
        return super().update_conv_state(*args, **kwargs)  # type: ignore[no-any-return]

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        self._touch()
        return super().update_recurrent_state(*args, **kwargs)  # type: ignore[no-any-return]

    def _touch(self) -> None:
        if self.forward is not None:
            self.forward.touch()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that have entered a layer, padding before the call included."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, FreqKVLayer):
            return super().get_seq_length(layer_idx)  # type: ignore[no-any-return]
        if self.forward is None or self.forward.cache is None:
            return layer.seen
        return layer.seen + self.forward.cache.tokens_seen - max(self.part.call.before)


def returned(output: Any, stand_in: Any, cache: Any) -> Any:
    """What a model returned, with the cache in the place of what stood in for it."""
    if type(output) is tuple:
        return tuple(cache if value is stand_in else value for value in output)
    if isinstance(output, dict):
        for name in CACHE_NAMES:
            # As a plain dict: outputs look slowly, and warn of former names.
            if dict.get(output, name) is stand_in:
                output[name] = cache
    return output


def run(forward: Forward, call: Callable[[Forward], Any]) -> Any:
    """Run a call of the outermost model from begin to commit, or to abort."""
    try:
        forward.begin()
        output = call(forward)
        forward.commit()
    except BaseException:
        forward.abort()
        raise
    finally:
        forward.memo.clear()  # whose caches of parts know the forward: nothing is left for the garbage collector
    return returned(output, forward, forward.cache)
