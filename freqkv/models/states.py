"""What transformers' own cache layers hold, as tensors and plain numbers that can be stored and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional

__all__ = ["STORED", "StoredState", "load_state", "sizes", "state_of"]

SLIDING, WHOLE, STATES = "sliding", "whole", "states"
# What is stored of each kind of layer. Kinds that are not named here are refused: nothing must be left out unnoticed.
STORED: dict[str, tuple[str, ...]] = {
    "FreqKVLayer": (),  # which tells its own
    "FreqKVHybridLayer": (STATES,),
    "DynamicSlidingWindowLayer": (SLIDING,),
    "LinearAttentionLayer": (STATES,),
    "LinearAttentionAndSlidingWindowAttentionLayer": (SLIDING, STATES),
    "DynamicLayer": (WHOLE,),  # cross-attention: as long as what it was shown
    "DummyLayer": (),
}


@dataclass(frozen=True)
class StoredState:
    """What a layer holds.

    Attributes
    ----------
    tensors : dict of str to Tensor
    sliding : list of int or None
        Of a sliding layer, how many entries it holds, and how many tokens it has seen.
    has_previous : list of bool or None
        Of a layer with states, whether each one has been fed.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    sliding: list[int] | None = None
    has_previous: list[bool] | None = None


def sizes(layer: Any) -> dict[str, Any]:
    """Its kind, and the sizes that are no tensor's."""
    own = {name: vars(layer)[name] for name in ("sliding_window", "number_of_states") if name in vars(layer)}
    return {"kind": type(layer).__name__, **own}


def state_of(layer: Any) -> StoredState:
    """What a layer holds. Raises KeyError for a kind of which it is not known."""
    parts = STORED[type(layer).__name__]
    tensors: dict[str, Tensor] = {}
    sliding = None
    if SLIDING in parts and layer.is_initialized:
        longest = layer.sliding_window - 1
        held = {name: getattr(layer, name)[:, :, -longest:] for name in ("keys", "values")}  # more is kept to crop only
        sliding = [held["keys"].shape[2], layer.cumulative_length]
        tensors = {name: functional.pad(t, (0, 0, 0, longest - t.shape[2])) for name, t in held.items()}
    elif WHOLE in parts and layer.is_initialized:
        tensors = {"keys": layer.keys.clone(), "values": layer.values.clone()}
    has_previous = None
    if STATES in parts:
        has_previous = [layer.has_previous_state[i] for i in range(layer.number_of_states)]
        tensors |= {name: state.clone() for name, state in _states(layer)}
    return StoredState(tensors, sliding, has_previous)


def _states(layer: Any) -> Iterator[tuple[str, Tensor]]:
    """Convolution and recurrent states of a layer, as it has them when it does not record its past."""
    for index in range(layer.number_of_states):
        if layer.is_conv_states_initialized[index]:
            size, state = layer.conv_kernel_size[index], layer.conv_states[index]
            state = functional.pad(state[..., -size:], (max(0, size - state.shape[-1]), 0))
            yield f"conv_states.{index}", state
        if layer.is_recurrent_states_initialized[index]:
            yield f"recurrent_states.{index}", layer.recurrent_states[index]


def load_state(
    layer: Any, take: Callable[[str], Tensor | None], sliding: list[int] | None, has_previous: list[bool] | None
) -> None:
    """Put back what :func:`state_of` gave; `take(name)` hands over a tensor."""
    parts = STORED[type(layer).__name__]
    if SLIDING in parts or WHOLE in parts:
        keys, values = take("keys"), take("values")
        if keys is not None and values is not None:
            layer.lazy_initialization(keys, values)
            if SLIDING in parts:
                assert sliding is not None
                held, layer.cumulative_length = sliding
                keys, values = keys[:, :, :held], values[:, :, :held]
            layer.keys, layer.values = keys, values
    if STATES in parts:
        assert has_previous is not None
        for number, previous in enumerate(has_previous):
            layer.has_previous_state[number] = previous
            for name in ("conv_states", "recurrent_states"):
                state = take(f"{name}.{number}")
                if state is not None:
                    layer.lazy_initialization(**{name: state}, state_idx=number)
                    getattr(layer, name)[number].copy_(state)
