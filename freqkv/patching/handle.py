"""`freqkv.patch`: methods of one model instance are replaced, and given back."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from freqkv.compressors import Compressor, check_compressor, low_pass_entries
from freqkv.config import FreqKVConfig, with_schedule
from freqkv.models.analysis import analyse
from freqkv.models.kinds import layer_kinds
from freqkv.models.support import find_model
from freqkv.models.upstream import GenerationMixin
from freqkv.patching.attention import AttentionForward
from freqkv.patching.decoder import DecoderForward, ModelForward
from freqkv.patching.generation import PrepareCache, PrepareInputs
from freqkv.patching.methods import replace_method, replacements, restore_methods
from freqkv.patching.state import PatchState, Settings, Wrapper
from freqkv.presets import preset_or_numbers
from freqkv.schedule import Schedules, check_layers

__all__ = ["Patch", "find_state", "patch", "unpatch"]


def patch(
    model: nn.Module,
    config: FreqKVConfig | None = None,
    *,
    window: int | None = None,
    sink_tokens: int | None = None,
    retain_ratio: float | None = None,
    recent_tokens: int | None = None,
    compressor: Compressor | None = None,
    schedule: Schedules | None = None,
    preset: str | None = None,
) -> Patch:
    """Make this model instance work with :class:`FreqKVCache`.

    Without a config, only calls that bring a `FreqKVCache` are touched. With a config, given whole or by its numbers, or with a
    compressor, a schedule or a preset, calls that bring no cache at all run the method too: over the whole input without a
    cache (`use_cache=False`, differentiable), or with a `FreqKVCache` made for the call. A call that brings another cache is
    never touched.

    Patching again gives the model the numbers of the last call.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder-only model with rotary position embeddings, or one of PEFT, DDP or `torch.compile` around it.
    config, window, sink_tokens, retain_ratio, recent_tokens, compressor, schedule, preset
        See :class:`FreqKVConfig` and :class:`FreqKVCache`; `FreqKVConfig()` stands for the defaults.

    Returns
    -------
    Patch
        A handle. As a context manager it restores what was there before; printed, it tells how each layer caches.

    Raises
    ------
    UnsupportedModelError
        If the model is no decoder with RoPE, or has no full attention layer, or cannot give what the compressor asks for. See
        :func:`freqkv.supported`.
    TypeError, ValueError
        If the numbers cannot work together.
    """
    model = find_model(model)
    chosen, compressor = preset_or_numbers(
        preset,
        model.config,
        config,
        compressor,
        schedule,
        window=window,
        sink_tokens=sink_tokens,
        retain_ratio=retain_ratio,
        recent_tokens=recent_tokens,
    )
    chosen = with_schedule(chosen, schedule)
    if chosen is None and compressor is not None:
        chosen = FreqKVConfig()
    if chosen is None:
        return Patch(model, None)
    compressor = low_pass_entries if compressor is None else check_compressor(compressor)
    return Patch(model, Settings(chosen.resolve(model.config), compressor, schedule))


def unpatch(model: nn.Module) -> None:
    """Give the model its own forwards back.

    Raises
    ------
    ValueError
        If the model is not patched.
    """
    state = find_state(model)
    if state is None:
        raise ValueError("this model is not patched")
    state.settings = None
    for module in {module for module, _ in replacements(model)}:
        restore_methods(module)


class Patch:
    """Handle of a patched model."""

    def __init__(self, model: PreTrainedModel, settings: Settings | None) -> None:
        self.model = model
        self._settings = settings
        self._apply()

    def _apply(self) -> None:
        state = find_state(self.model)
        self._previous = None if state is None else (state.settings,)
        self._state = PatchState(self.model, analyse(self.model)) if state is None else state
        if self._settings is not None:
            kinds = layer_kinds(self.model.config)
            check_layers(self._settings.schedule, [index for index, kind in enumerate(kinds) if kind.compressed])
            self._state.check_method(self._settings.compressor, self._state.schedules_of(self._settings))
        _wrap(self.model, self._state)
        self._state.settings = self._settings
        self._applied = True

    @property
    def config(self) -> FreqKVConfig | None:
        """The numbers with which calls without a cache run; None if such calls are left alone."""
        return None if self._state.settings is None else self._state.settings.config

    @property
    def compressor(self) -> Compressor | None:
        """What they fold with; None if such calls are left alone."""
        return None if self._state.settings is None else self._state.settings.compressor

    def unpatch(self) -> None:
        """Same as `freqkv.unpatch(model)`."""
        unpatch(self.model)

    def __enter__(self) -> Patch:
        if not self._applied:
            self._apply()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._applied = False
        if find_state(self.model) is None:
            return  # unpatched inside
        if self._previous is None:
            self.unpatch()
        else:
            (self._state.settings,) = self._previous

    def __repr__(self) -> str:
        settings = self._state.settings
        numbers = "calls with a FreqKVCache" if settings is None else str(settings)
        lines = [f"freqkv.Patch({type(self.model).__name__}, {numbers})"]
        analysis = self._state.analysis
        told = {layer.layer_idx: str(layer) for layer in analysis.layers}
        told |= {index: f"{kind}, left to transformers" for index, kind in analysis.others.items() if index not in told}
        lines += [f"  layer {index}: {told[index]}" for index in sorted(told)]
        return "\n".join(lines)


def find_state(model: nn.Module) -> PatchState | None:
    """What the replaced methods of a model share; None if it is not patched."""
    return next((wrapper.state for _, wrapper in replacements(model) if isinstance(wrapper, Wrapper)), None)


def _wrap(model: nn.Module, state: PatchState) -> None:
    """Replace whatever is not replaced yet: a part of the model may have been patched, or unpatched, by itself."""
    wrapped = {(module, replacement.name) for module, replacement in replacements(model)}
    inside = set(model.modules())
    analysis = state.analysis
    wanted: list[tuple[Any, type[Wrapper], Any]] = [
        *((layer.module, AttentionForward, layer) for layer in analysis.layers),
        (analysis.decoder, DecoderForward, analysis.decoder),
        *((module, ModelForward, module) for module in analysis.around),
    ]
    for module in inside:
        if isinstance(module, GenerationMixin):
            wanted += [(module, PrepareCache, module), (module, PrepareInputs, module)]
    lacking = [each for each in wanted if each[0] in inside and (each[0], each[1].name) not in wrapped]
    made = [(module, wrapper(about, state)) for module, wrapper, about in lacking]
    for module, replacement in made:
        replace_method(module, replacement)
