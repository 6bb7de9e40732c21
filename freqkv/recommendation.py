"""`freqkv.recommend`: measure on a text which settings keep most of a model's predictions, and facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from freqkv.cache import FreqKVCache
from freqkv.compressors import Pair, Span, compress, compressor_name, low_pass_entries, queries_wanted
from freqkv.evaluation.losses import divergence, evaluating
from freqkv.evaluation.tasks import Haystack, Sample
from freqkv.evaluation.wordings import PROSE, Wording
from freqkv.models.support import find_model
from freqkv.models.upstream import CACHE
from freqkv.patching.handle import patch
from freqkv.presets import PRESETS, choosing_layer
from freqkv.schedule import FreqKVSchedule
from freqkv.selection import KeepNovel
from freqkv.settings import Settings

__all__ = ["Candidate", "Recommendation", "bytes_per_entry", "facts_kept", "recommend"]

ENOUGH = 0.8  # of the facts that the best candidate keeps: those that keep as many count as keeping facts
RECENT = (1 / 2, 2 / 3)  # shares of the window
LENGTH, FACTS, STRETCHES = 4, 4, 2  # windows of a text; texts with a fact; stretches whose predictions are compared
LEAST = 32  # entries


@dataclass(frozen=True)
class Candidate:
    """Settings, and what was measured with them.

    Attributes
    ----------
    name : str
    settings : Settings
    kl : float
        KL to the full cache behind the first window, nats per token.
    facts : float
        The share of the tokens of facts, two windows back and more, that is still held, over the layers from the one that
        chooses on; 0 for the low-pass, which holds no single tokens.
    """

    name: str
    settings: Settings
    kl: float
    facts: float


@dataclass(frozen=True)
class Recommendation:
    """What :func:`recommend` found; printed, a table.

    Attributes
    ----------
    settings : Settings
        The recommended ones: `FreqKVCache(model.config, **found.settings.options)`, `found.settings.save(folder)`.
    candidates : tuple of Candidate
        All that were measured.
    facts_by_layer : dict of int to float
        For each compressed layer, the share of the tokens of facts that it keeps where each layer chooses for itself.
    """

    settings: Settings
    candidates: tuple[Candidate, ...]
    facts_by_layer: dict[int, float]

    def __str__(self) -> str:
        lines = ["| settings | KL to the full cache | facts kept |", "|---|---|---|"]
        for each in self.candidates:
            chosen = " (recommended)" if each.settings == self.settings else ""
            lines.append(f"| {each.name}{chosen} | {each.kl:.4f} | {each.facts:.0%} |")
        return "\n".join([*lines, "", f"{self.settings.config}, {compressor_name(self.settings.compressor)}"])


def recommend(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    memory: int | None = None,
    window: int | None = None,
    wording: Wording = PROSE,
) -> Recommendation:
    """Measure settings on a text, and recommend those with the least divergence among those that keep facts.

    Facts are hidden in stretches of the text, to see which layer tells them from the rest: it will choose for the layers behind
    it (:class:`KeepNovel`). Then stretches are read through each candidate beside the full cache. In all, some 100 windows of
    text are read.

    Parameters
    ----------
    model : PreTrainedModel
        A model that FreqKV serves, patched or not; it is left as it was.
    tokenizer : PreTrainedTokenizerBase
        Of the model.
    text : str
        Of the kind that the cache is for, four windows or more.
    memory : int, optional
        Bytes that the entries of one sequence may take, in the model's dtype.
    window : int, optional
        Entries per layer, in place of `memory`.
    wording : Wording
        How facts are written: `freqkv.evaluation.PROSE` or `CODE`.

    Returns
    -------
    Recommendation

    Raises
    ------
    UnsupportedModelError
        If FreqKV does not serve the model.
    ValueError
        If not exactly one of `memory` and `window` is given, if it comes to fewer than 32 entries, or if four windows leave the
        text or the model's context.
    """
    inner = find_model(model)
    if (memory is None) == (window is None):
        raise ValueError("give either memory= in bytes or window= in entries per layer")
    with patch(inner), evaluating(inner):
        size = window if window is not None else (memory or 0) // bytes_per_entry(inner)
        if size < LEAST:
            raise ValueError(
                f"{f'memory={memory}' if window is None else 'window'} holds {size} entries, less than {LEAST}"
            )
        stretches = _stretches(inner, tokenizer, text, size)
        haystack = Haystack(tokenizer, text, wording)
        samples = [
            haystack.sample("single_needle", LENGTH * size, f"recommend {n}", (n + 0.5) / (2 * FACTS))
            for n in range(FACTS)  # all in the first half
        ]
        alone = replace(PRESETS["recommended"].settings(inner.config, window=size), compressor=KeepNovel())
        by_layer = facts_kept(inner, tokenizer, samples, alone)
        usual = choosing_layer(inner.config)
        layer = max(by_layer, key=lambda index: (by_layer[index], index == usual, -index))
        candidates = {name: PRESETS[name].settings(inner.config, window=size) for name in ("paper", "streaming")}
        for share in RECENT:
            chosen = PRESETS["recommended"].settings(inner.config, window=size, recent_tokens=int(share * size))
            assert isinstance(chosen.compressor, KeepNovel)
            led = replace(chosen, compressor=replace(chosen.compressor, layer=layer))
            candidates[f"novel passages, R = {share:.2g}N"] = led
        kl = _divergences(inner, stretches, candidates)
        measured = []
        for name, settings in candidates.items():
            kept = {} if settings.compressor is low_pass_entries else facts_kept(inner, tokenizer, samples, settings)
            looking = [share for index, share in kept.items() if index >= layer]
            measured.append(Candidate(name, settings, kl[name], sum(looking) / max(1, len(looking))))
    return Recommendation(best_of(measured).settings, tuple(measured), by_layer)


def best_of(candidates: Sequence[Candidate]) -> Candidate:
    """The one with the least divergence among those that keep nearly as many facts as any."""
    most = max(each.facts for each in candidates)
    return min((each for each in candidates if each.facts >= ENOUGH * most), key=lambda each: each.kl)


def bytes_per_entry(model: PreTrainedModel) -> int:
    """Bytes of one entry of one sequence in all layers that FreqKV compresses, of a patched model."""
    cache = FreqKVCache(model.config, window=LEAST)
    with torch.no_grad():
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), **{CACHE: cache}, use_cache=True)
    held = (
        tensor for index in cache.compressed_layers for tensor in (cache.layers[index].keys, cache.layers[index].values)
    )
    return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)


def facts_kept(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], settings: Settings
) -> dict[int, float]:
    """For each compressed layer, the share of the tokens of answers that it still holds at the end of the texts.

    Parameters
    ----------
    model : PreTrainedModel
        Patched.
    tokenizer : PreTrainedTokenizerBase
    samples : sequence of Sample
        Texts with one question each.
    settings : Settings
        With a compressor that keeps single entries.
    """
    shares: dict[int, list[float]] = {}
    for sample in samples:
        question = sample.questions[0]
        answer = tokenizer(question.answers[0], add_special_tokens=False, verbose=False)["input_ids"]
        end = len(sample.ids) - question.distance
        places = _Places(settings)
        cache = FreqKVCache(model.config, settings.config, compressor=places)
        ids = torch.tensor([sample.ids], device=model.device)
        with torch.no_grad():
            for chunk in ids.split(cache.config.window or 1, dim=1):
                model(input_ids=chunk, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        wanted = torch.arange(end - len(answer), end)
        for layer, held in places.held.items():
            found = (held[..., None] == wanted).any(dim=-2)  # (kv_heads, tokens of the answer)
            shares.setdefault(layer, []).append(found.float().mean().item())
    return {layer: sum(found) / len(found) for layer, found in sorted(shares.items())}


class _Places:
    """A compressor that does what another one does, and notes which tokens are held; of one row, one schedule."""

    def __init__(self, settings: Settings) -> None:
        self.compressor = settings.compressor
        self.queries = queries_wanted(settings.compressor)
        self.schedule: FreqKVSchedule = settings.config.schedule
        self.held: dict[int, Tensor] = {}  # (kv_heads, entries) token numbers, by layer

    def __call__(self, span: Span) -> Pair:
        _, kv_heads, n, _ = span.keys.shape
        held = self.held.get(span.layer_idx)
        if held is None:
            held = torch.arange(self.schedule.window).expand(kv_heads, -1)
        folded = slice(span.start, span.start + n)
        numbers = held[:, folded].to(span.keys.device, span.keys.dtype)
        kept = (
            compress(self.compressor, replace(span, values=numbers[None, ..., None]))[1][0, ..., 0].round().long().cpu()
        )
        seen = int(held[0, -1]) + 1
        entering = torch.arange(seen, seen + self.schedule.step).expand(kv_heads, -1)
        self.held[span.layer_idx] = torch.cat([held[:, : span.start], kept, held[:, folded.stop :], entering], dim=1)
        return compress(self.compressor, span)


def _stretches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, window: int) -> list[Tensor]:
    """`(1, tokens)` each, spread over the text."""
    length = LENGTH * window
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context and length > context:
        raise ValueError(
            f"texts of {LENGTH} windows, {length} tokens, leave the model's context of {context}, where the full cache is no "
            f"truth: give a window of at most {context // LENGTH}, or as much less memory"
        )
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    if ids.shape[1] < length:
        raise ValueError(
            f"text has {ids.shape[1]} tokens, and {LENGTH} windows of {window} are {length}: give more text"
        )
    last = ids.shape[1] - length
    starts = sorted({round(last * (n + 0.5) / STRETCHES) for n in range(STRETCHES)})
    return [ids[:, start : start + length] for start in starts]


def _divergences(
    model: PreTrainedModel, stretches: Sequence[Tensor], candidates: dict[str, Settings]
) -> dict[str, float]:
    """Mean KL to the full cache behind the first window."""
    total = dict.fromkeys(candidates, 0.0)
    for ids in stretches:
        caches = {name: FreqKVCache(model.config, **settings.options) for name, settings in candidates.items()}
        window = ids.shape[1] // LENGTH
        found = divergence(model, ids, {"": DynamicCache(config=model.config), **caches}, "", chunk_size=window)
        for name in candidates:
            total[name] += found[name].kl[:, window:].mean().item() / len(stretches)
    return total
