"""Calls that break off: the cache goes on as if they had not been made, or says that it cannot, until it is reset."""

from __future__ import annotations

import contextvars
import copy
import functools
import os
import sys

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_llama, tokens
from running import padded, rows_of
from transformers import LogitsProcessor, LogitsProcessorList

import freqkv
from freqkv import FreqKVCache, FreqKVConfig
from freqkv.models.upstream import CACHE

N = 23
CONFIG = FreqKVConfig(window=N, sink_tokens=3, recent_tokens=2)
SPENT = r"interrupted half-way .* Call cache.reset\(\)"
FAMILIES = ["llama", "gemma3_text", "qwen3_next"]
CALLS = {  # what rows of two have entered before, and bring in the call that breaks off
    "uniform, below": ([5, 5], [4, 4]),
    "uniform, beyond": ([N - 2, N - 2], [5, 5]),
    "uniform, prompt": ([0, 0], [2 * N, 2 * N]),
    "ragged, below": ([3, 7], [4, 2]),
    "ragged, beyond": ([3, N - 1], [2, 4]),
    "ragged, prompt": ([0, 0], [5, 2 * N]),
}


@functools.cache
def patched(family, layers=2):
    model = tiny_llama(layers=layers) if family == "llama" else zoo.tiny_model(family)
    model.set_attn_implementation("eager")
    freqkv.patch(model)
    return model


class Case:
    """A cache before the call that breaks off, that call, and what follows."""

    def __init__(self, model, call):
        self.model = model
        self.before, self.brings = CALLS[call]
        self.cache = FreqKVCache(model.config, CONFIG)
        self.prepare(self.cache)
        self.truths = [self.follow(copy.deepcopy(self.cache))]
        done = copy.deepcopy(self.cache)
        self.call(done)
        self.truths.append(self.follow(done))
        assert not torch.equal(*self.truths)

    @torch.no_grad()
    def _feed(self, cache, lengths, seed, before=()):
        if any(lengths):
            ids, mask = padded([row.clamp(3, 99) for row in rows_of(lengths, seed)], pad=5)
            mask = None if len({*lengths}) == 1 and not before else torch.cat([*before, mask], 1)
            self.model(ids, attention_mask=mask, **{CACHE: cache})

    def prepare(self, cache):
        self._feed(cache, self.before, seed=1)

    def call(self, cache):
        ragged = len({*self.before}) > 1
        before = [padded(rows_of(self.before))[1]] if ragged else []
        self._feed(cache, self.brings, seed=11, before=before)

    @torch.no_grad()
    def follow(self, cache):
        """With another call's worth of tokens, that compress too."""
        return self.model(tokens(N, 2, seed=3).clamp(3, 99), **{CACHE: cache}).logits

    def outcome(self, cache):
        """Whether the call that broke off was as not made, or made, or spent the cache, which a reset mends."""
        if "spent: call reset()" in repr(cache):
            with pytest.raises(RuntimeError, match=SPENT):
                self.follow(cache)
            cache.reset()
            self.prepare(cache)
            assert torch.equal(self.follow(cache), self.truths[0])
            return "spent"
        logits = self.follow(cache)
        equal = [torch.equal(logits, truth) for truth in self.truths]
        assert any(equal), "it goes on from something that never was"
        return ("not made", "made")[equal.index(True)]


class Break(BaseException):
    """What nobody catches."""


class Breaker:
    """Raises at the n-th event."""

    def __init__(self, at=None, error=Break):
        self.at, self.error, self.events = at, error, []

    def __call__(self, event):
        self.events.append(event)
        if len(self.events) - 1 == self.at:
            raise self.error(f"at {event}")


def break_in_modules(model, breaker):
    """An event before and behind each call of each module."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: breaker(f"before {name}")))
        handles.append(module.register_forward_hook(lambda *_, name=name: breaker(f"behind {name}")))
    return handles


def run_broken(case, cache, breaker, in_modules=True):
    handles = break_in_modules(case.model, breaker) if in_modules else []
    try:
        case.call(cache)
    except breaker.error:
        return True
    finally:
        for handle in handles:
            handle.remove()
    return False


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_that_breaks_off_at_any_module(family, call):
    case = Case(patched(family), call)
    count = Breaker()
    assert not run_broken(case, copy.deepcopy(case.cache), count)
    # All of them for Llama, a tenth where there are many; first and last ones always.
    stride = 1 if family == "llama" else 11
    places = sorted({*range(0, len(count.events), stride), *range(4), *range(len(count.events) - 6, len(count.events))})
    outcomes = {}
    for place in places:
        cache, breaker = copy.deepcopy(case.cache), Breaker(place)
        assert run_broken(case, cache, breaker)
        outcomes[breaker.events[-1]] = case.outcome(cache)
    head = {event for event in outcomes if event.endswith(("lm_head", "before ", "behind "))}
    assert outcomes["before "] == "not made"
    assert {outcomes[event] for event in outcomes.keys() - head} == {"not made", "spent"}
    assert outcomes["behind "] == "made", "the whole model has returned"
    assert {outcomes[event] for event in head - {"before ", "behind "}} <= {"spent"}, "the head runs within the forward"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, ValueError, GeneratorExit])
@pytest.mark.parametrize("call", CALLS)
def test_whatever_breaks_it_off(call, error):
    case = Case(patched("llama"), call)
    outcomes = []
    for place in range(0, 60, 7):
        cache = copy.deepcopy(case.cache)
        assert run_broken(case, cache, Breaker(place, error))
        outcomes.append(case.outcome(cache))
    assert {*outcomes} == {"not made", "spent"}


@pytest.mark.parametrize("call", [call for call in CALLS if "below" not in call])
def test_a_compressor_that_fails(call):
    """In the first layer nothing has entered when it does, unless the call is a long one."""
    case = Case(patched("llama"), call)
    count = Breaker()

    def failing(breaker):
        def compressor(keys, values, keep):
            breaker("compressor")
            return freqkv.low_pass_entries(keys, values, keep)

        return compressor

    def with_compressor(breaker):
        cache = copy.deepcopy(case.cache)
        for layer in cache.layers:
            layer.compressor = failing(breaker)
        return cache

    assert not run_broken(case, with_compressor(count), count, in_modules=False)
    assert len(count.events) >= 2
    for place in range(len(count.events)):
        cache = with_compressor(Breaker(place, torch.OutOfMemoryError))
        with pytest.raises(torch.OutOfMemoryError):
            case.call(cache)
        for layer in cache.layers:
            layer.compressor = freqkv.low_pass_entries
        case.outcome(cache)


# Between any two lines


class Tracer:
    """Raises before the n-th line that is run in one of the library's functions."""

    def __init__(self, wanted, at=None):
        self.wanted, self.breaker = wanted, Breaker(at)

    def __call__(self, frame, event, arg):
        file, name = os.path.split(frame.f_code.co_filename)
        return self.line if file.endswith("freqkv") and self.wanted(name, frame.f_code.co_name) else None

    def line(self, frame, event, arg):
        if event == "line":
            self.breaker(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}")
        return self.line

    def run(self, function, *args):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            function(*args)
        except Break:
            return True
        finally:
            sys.settrace(before)
            restore_autocast()
        return False


def restore_autocast():
    """What a break between the body of `with torch.autocast` and its end leaves would give later tests stale weights."""
    torch.autocast_increment_nesting()
    while torch.autocast_decrement_nesting() > 0:
        pass
    torch.clear_autocast_cache()


def break_at_lines(case, wanted, most):
    """What becomes of the call, line by line."""
    count = Tracer(wanted)
    assert not count.run(case.call, copy.deepcopy(case.cache))
    total = len(count.breaker.events)
    outcomes = {}
    for place in sorted({*range(0, total, max(1, total // most))}):
        cache, tracer = copy.deepcopy(case.cache), Tracer(wanted, place)
        assert contextvars.copy_context().run(tracer.run, case.call, cache)
        outcomes[place, tracer.breaker.events[-1]] = case.outcome(cache)
    return outcomes


def updates(file, function):
    return file in ("cache.py", "layer.py") and function in ("update", "_update_ragged", "end_forward", "begin_forward")


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_breaks_off_at_any_line_that_changes_the_cache(call):
    outcomes = break_at_lines(Case(patched("llama"), call), updates, most=40)
    assert {"not made", "spent"} <= {*outcomes.values()}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_breaks_off_at_lines_of_the_whole_library(call):
    outcomes = break_at_lines(Case(patched("llama"), call), lambda *_: True, most=30)
    assert {"not made", "spent"} <= {*outcomes.values()}


@pytest.mark.parametrize("call", ["uniform, beyond", "uniform, prompt", "ragged, beyond"])
def test_the_same_with_a_single_layer(call):
    break_at_lines(Case(patched("llama", layers=1), call), updates, most=120)


def test_an_interrupt_in_the_wrapper_of_the_model_harms_no_later_call():
    model = patched("llama")
    case = Case(model, "uniform, below")

    def wrapper(file, function):
        return file == "attention.py" and function == "__call__"

    count = Tracer(wrapper)
    assert not count.run(case.call, copy.deepcopy(case.cache))
    ids, mask = tokens(5), torch.ones(1, 9)
    for place in range(len(count.breaker.events)):
        cache, tracer = copy.deepcopy(case.cache), Tracer(wrapper, place)

        def broken_then_another(cache=cache, tracer=tracer):
            assert tracer.run(case.call, cache)
            with torch.no_grad(), pytest.raises(ValueError, match="attention_mask has shape"):
                model(ids, attention_mask=mask, **{CACHE: FreqKVCache(model.config, CONFIG)})

        try:
            contextvars.copy_context().run(broken_then_another)
        except pytest.fail.Exception:
            raise AssertionError(f"no longer refused: {tracer.breaker.events[-1]}") from None


# A cache that is spent


@pytest.mark.parametrize(
    "way",
    [
        "forward",
        "forward without a mask",
        "generate",
        "generate the same again",
    ],
)
@pytest.mark.parametrize("lengths", [[9, 9], [5, 9]])
@torch.no_grad()
def test_a_spent_cache_says_so_in_every_call(way, lengths):
    model = patched("llama")
    cache = FreqKVCache(model.config, CONFIG)
    ids, mask = padded(rows_of(lengths))
    model(ids, attention_mask=mask, **{CACHE: cache})
    more = torch.cat([ids, tokens(4, 2)], 1)
    longer = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1)
    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(more, attention_mask=longer, **{CACHE: cache}, max_new_tokens=4)
    hook.remove()
    calls = {
        "forward": lambda: model(more[:, 9:], attention_mask=longer, **{CACHE: cache}),
        "forward without a mask": lambda: model(more[:, 9:], **{CACHE: cache}),
        "generate": lambda: model.generate(
            torch.cat([more, ids], 1),
            attention_mask=torch.cat([longer, torch.ones_like(mask)], 1),
            **{CACHE: cache},
            max_new_tokens=4,
        ),
        "generate the same again": lambda: model.generate(
            more, attention_mask=longer, **{CACHE: cache}, max_new_tokens=4
        ),
    }
    with pytest.raises(RuntimeError, match=SPENT):
        calls[way]()


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@torch.no_grad()
def test_a_reset_forgets_what_sliding_layers_hold():
    model = patched("gemma3_text")
    cache, ids = FreqKVCache(model.config, CONFIG), tokens(9, 2).clamp(3, 99)
    expected = model(ids, **{CACHE: cache}).logits
    cache.reset()
    assert torch.equal(model(ids, **{CACHE: cache}).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_spent_cache_stays_spent_through_everything_but_a_reset(family):
    model = patched(family)
    cache = FreqKVCache(model.config, CONFIG)
    ids = tokens(9, 2).clamp(3, 99)
    model(ids, **{CACHE: cache})
    hook = model.get_output_embeddings().register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids, **{CACHE: cache})
    hook.remove()
    changed = copy.deepcopy(cache), copy.deepcopy(cache)
    changed[1].reorder_cache(torch.tensor([1, 0]))
    for each in changed:
        assert "spent: call reset()" in repr(each)
        with pytest.raises(RuntimeError, match=SPENT):
            model(ids, **{CACHE: each})
        each.reset()
        assert "spent" not in repr(each)
        assert torch.equal(
            model(ids, **{CACHE: each}).logits,
            model(ids, **{CACHE: FreqKVCache(model.config, CONFIG)}).logits,
        )


# generate


class BreakingProcessor(LogitsProcessor):
    def __init__(self, breaker):
        self.breaker = breaker

    def __call__(self, input_ids, scores):
        self.breaker("logits processor")
        return scores


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[9, 9], [2, 2 * N]])
@pytest.mark.parametrize("at", [0, 1, N - 5])
def test_generate_stopped_between_two_forwards_goes_on_where_it_was(family, lengths, at):
    """The cache holds all tokens but the last one that was chosen."""
    model = patched(family)
    ids, mask = padded([row.clamp(3, 99) for row in rows_of(lengths)], pad=5)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    new = 2 * N
    expected = model.generate(
        ids, attention_mask=mask, **{CACHE: FreqKVCache(model.config, CONFIG)}, max_new_tokens=new, **options
    )
    cache, written = FreqKVCache(model.config, CONFIG), [ids]

    class Chosen(LogitsProcessor):
        def __call__(self, input_ids, scores):
            written[0] = input_ids
            return scores

    processors = LogitsProcessorList([Chosen(), BreakingProcessor(Breaker(at, KeyboardInterrupt))])
    with pytest.raises(KeyboardInterrupt):
        model.generate(
            ids,
            attention_mask=mask,
            **{CACHE: cache},
            max_new_tokens=new,
            logits_processor=processors,
            **options,
        )
    assert not cache.is_spent
    assert cache.tokens_seen == ids.shape[1] + at == written[0].shape[1]
    history = torch.cat([written[0], expected[:, written[0].shape[1] : written[0].shape[1] + 1]], 1)
    longer = torch.cat([mask, torch.ones(2, history.shape[1] - ids.shape[1], dtype=torch.long)], 1)
    rest = model.generate(
        history,
        attention_mask=longer,
        **{CACHE: cache},
        max_new_tokens=expected.shape[1] - history.shape[1],
        **options,
    )
    assert torch.equal(rest, expected)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("chunk", [None, N])
def test_a_prompt_that_was_too_long_for_the_memory(error, chunk):
    """After a reset the cache serves what fits; what was allocated is not in the way."""
    model = patched("llama")
    cache = FreqKVCache(model.config, CONFIG)
    ids, options = tokens(3 * N, 2), {"max_new_tokens": N, "do_sample": False}
    expected = model.generate(ids, **{CACHE: FreqKVCache(model.config, CONFIG)}, **options)
    breaker = Breaker(5, error)
    handles = break_in_modules(model.model.layers[1].mlp, breaker)
    with pytest.raises(error):
        model.generate(ids, **{CACHE: cache}, prefill_chunk_size=chunk, **options)
    for handle in handles:
        handle.remove()
    with pytest.raises(RuntimeError, match=SPENT), torch.no_grad():
        model(ids[:, :1], **{CACHE: cache})
    cache.reset()
    assert torch.equal(model.generate(ids, **{CACHE: cache}, **options), expected)


# NaN


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 2 * N), min_size=3, max_size=3),
    turns=st.lists(st.integers(1, N), min_size=1, max_size=3),
    spoiled=st.tuples(st.integers(0, 2), st.integers(0, 10**6)),
    value=st.sampled_from([float("nan"), float("inf")]),
    attention=st.sampled_from(["eager", "sdpa"]),
)
@torch.no_grad()
def test_what_is_no_number_stays_in_its_row(lengths, turns, spoiled, value, attention):
    """Other rows give the same bits, in uniform and in ragged batches, over compressions of either."""
    model = patched("llama")
    model.set_attn_implementation(attention)
    ids, mask = padded(rows_of(lengths))
    total = ids.shape[1] + sum(turns)
    row, column = spoiled[0], mask[spoiled[0]].argmax().item()
    column += spoiled[1] % (total - column)
    embedded = model.get_input_embeddings()(torch.cat([ids, *(tokens(n, 3, seed=i) for i, n in enumerate(turns))], 1))
    mask = torch.cat([mask, torch.ones(3, sum(turns), dtype=torch.long)], 1)

    def run(embedded):
        cache, outputs, start = FreqKVCache(model.config, CONFIG), [], 0
        for stop in [ids.shape[1] + sum(turns[:i]) for i in range(len(turns) + 1)]:
            part = embedded[:, start:stop]
            outputs.append(model(inputs_embeds=part, attention_mask=mask[:, :stop], **{CACHE: cache}).logits)
            start = stop
        return torch.cat(outputs, 1)

    clean = run(embedded)
    embedded = embedded.clone()
    embedded[row, column] = value
    dirty = run(embedded)
    model.set_attn_implementation("eager")
    real = mask.bool()
    others = [i for i in range(3) if i != row]
    assert torch.equal(dirty[others][real[others]], clean[others][real[others]])
    assert not dirty[row, column:].isfinite().any()
