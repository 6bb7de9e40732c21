"""Time and memory of FreqKV against the library's own caches, both sides in one run, interleaved.

    python examples/speed.py decode                              # the shipped model: time per token
    python examples/speed.py prefill --shape llama-3.2-1b --layers 4 --window 4096
    python examples/speed.py all --threads 1
    python examples/speed.py plot                                # time per token over 64 windows, from the last decode

Times are medians over rounds in each of which every arm runs once, or over tokens that enter one cache after the other; a
ratio is the median of the ratios of each round, or token. A `--shape` is a Llama with random weights and a vocabulary of
1,024 tokens, so that its layers are timed and not its output matrix. Tables go to examples/results/speed/, one file for each
command, model and machine.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import functools
import itertools
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import scipy.fft
import torch
from loading import SHIPPED, Formatter, about_run
from torch import Tensor
from torch.profiler import ProfilerActivity
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

import freqkv
from freqkv import FreqKVCache, FreqKVConfig
from freqkv.layer import FreqKVLayer
from freqkv.models.upstream import CACHE
from freqkv.patching.methods import replacements

RESULTS = Path(__file__).parent / "results" / "speed"
SHAPES = {
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    },
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "small": {  # for a look at whether everything runs
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    },
}  # fmt: skip
LENGTHS = (252, 508, 1020, 2044, 4092, 8188, 32764)
OPERATORS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "einsum"),
    "attention": (
        "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "_softmax", "softmax",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention", "_flash_attention_forward",
        "_scaled_dot_product_attention_math", "_efficient_attention_forward", "_scaled_dot_product_cudnn_attention",
    ),
    "copies": ("cat", "copy_", "clone", "contiguous", "index", "index_copy_", "_to_copy", "to", "repeat", "index_put_"),
    "views": (
        "slice", "view", "as_strided", "transpose", "t", "expand", "reshape", "unsqueeze", "select", "narrow", "permute",
        "_unsafe_view", "detach", "alias", "squeeze", "unflatten", "expand_as", "_reshape_alias",
    ),
}  # fmt: skip
DENSE_LIMIT = 8188  # a dense matrix for more is gigabytes

Arms = dict[str, Callable[[], float]]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("command", choices=[*COMMANDS, "all", "plot"])
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=str(SHIPPED), help="name or path")
    group.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of --model")
    group.add_argument("--layers", type=int, help="of --shape; its own number by default")
    group.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--attn-implementation", default="sdpa")
    group.add_argument("--window", type=int, help="512 for the shipped model, else 4096")
    group.add_argument("--threads", type=int, help="of torch; its own choice by default")
    group = parser.add_argument_group("what is measured")
    group.add_argument("--rounds", type=int, default=9)
    group.add_argument("--tokens", type=int, default=32, help="decoded in one timing")
    group.add_argument("--lengths", type=int, nargs="+", help="of decode, prefill, training and memory, in windows")
    group.add_argument("--plain-limit", type=int, default=16, help="windows up to which the plain model reads a prompt")
    group.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    group.add_argument("--transforms", type=int, nargs="+", default=LENGTHS, help="entries")
    group.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.window is None:
        args.window = 512 if args.shape is None and args.model == str(SHIPPED) else 4096
    return args


# Timing


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleaved(arms: Arms, rounds: int, title: str) -> dict[str, list[float]]:
    """Seconds that each arm tells of itself, round by round, in an order that turns; a first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for index in tqdm(range(-1, rounds), desc=title, leave=False, unit="round"):
        turn = max(index, 0) % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = arms[name]()
            if index >= 0:
                times[name].append(seconds)
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def timed(call: Callable[[], object], device: torch.device) -> float:
    started = clock(device)
    call()
    return clock(device) - started


# Models and caches


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    dtype = getattr(torch, args.dtype)
    if args.shape is None:
        from transformers import AutoModelForCausalLM

        options = {"dtype": dtype, "attn_implementation": args.attn_implementation}
        return AutoModelForCausalLM.from_pretrained(args.model, **options).to(args.device).eval()
    shape = dict(SHAPES[args.shape])
    shape["num_hidden_layers"] = args.layers or shape["num_hidden_layers"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, max_position_embeddings=64 * args.window, attn_implementation=args.attn_implementation,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=True, dtype=dtype, **shape,
    )  # fmt: skip
    with torch.device(args.device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def patched_model(args: argparse.Namespace) -> PreTrainedModel:
    model = make_model(args)
    freqkv.patch(model)
    return model


def makers(
    args: argparse.Namespace, model: PreTrainedModel, **options: Any
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Of empty caches: FreqKV's, and the library's."""
    return (
        functools.partial(FreqKVCache, model.config, window=args.window, **options),
        functools.partial(DynamicCache, config=model.config),
    )


def text(args: argparse.Namespace, tokens: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 1000, (batch, tokens), generator=generator).to(args.device)


def dynamic(args: argparse.Namespace, model: PreTrainedModel, entries: int, batch: int = 1) -> DynamicCache:
    """A plain cache that holds random entries."""
    config = model.config
    heads, size = config.num_key_value_heads, config.head_dim
    cache = DynamicCache(config=config)
    for index in range(config.num_hidden_layers):
        states = [torch.randn(batch, heads, entries, size, dtype=model.dtype, device=args.device) for _ in range(2)]
        cache.update(*states, index)
    return cache


@torch.no_grad()
def decode_tokens(model: PreTrainedModel, cache: Any, ids: Tensor, **inputs: Tensor) -> float:
    """Seconds for `ids`, one at a time."""
    started = clock(ids.device)
    for index in range(ids.shape[1]):
        model(ids[:, index : index + 1], **{CACHE: cache}, **inputs)
    return clock(ids.device) - started


@contextlib.contextmanager
def rewound(cache: Any, tokens: int) -> Iterator[None]:
    """Takes back the tokens that enter within; what a FreqKVCache compresses is gone."""
    held = [(layer.keys, layer.values) for layer in cache.layers]
    yield
    if isinstance(cache, FreqKVCache):
        cache.crop(-tokens)
    else:
        for layer, states in zip(cache.layers, held, strict=True):
            layer.keys, layer.values = states


def decode_and_rewind(model: PreTrainedModel, cache: Any, ids: Tensor) -> float:
    with rewound(cache, ids.shape[1]):
        return decode_tokens(model, cache, ids)


def in_turn(
    model: PreTrainedModel, caches: dict[str, Any], ids: Tensor, fewer: dict[str, int] | None = None
) -> dict[str, list[float]]:
    """Seconds of each token, which enters one cache after the other, so that a drift of the machine meets them alike.

    The order changes from token to token. `fewer` names caches that take the first tokens only.
    """
    times: dict[str, list[float]] = {name: [] for name in caches}
    for token in range(ids.shape[1]):
        for name in sorted(caches, reverse=bool(token % 2)):
            if token < (fewer or {}).get(name, ids.shape[1]):
                times[name].append(decode_tokens(model, caches[name], ids[:, token : token + 1]))
    return times


def again_and_again(
    model: PreTrainedModel, caches: dict[str, Any], ids: Tensor, rounds: int, title: str
) -> dict[str, list[float]]:
    """The same from the same entries in each round; a first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in caches}
    for index in tqdm(range(-1, rounds), desc=title, leave=False, unit="round"):
        with contextlib.ExitStack() as stack:
            for cache in caches.values():
                stack.enter_context(rewound(cache, ids.shape[1]))
            for name, seconds in in_turn(model, caches, ids).items():
                times[name] += seconds if index >= 0 else []
    return times


# Commands: each yields the rows of its table


def decode(args: argparse.Namespace) -> Iterator[dict]:
    """Time per token: equal entries, the wrapper's own share, and growth over many windows."""
    model, n, k = patched_model(args), args.window, args.tokens
    layers = model.config.num_hidden_layers
    ids = text(args, k)
    ours, plain = makers(args, model)
    with torch.no_grad():
        for what, entries in (("full window", n - k), ("nothing cached", 1)):
            caches = {"DynamicCache": plain(), "FreqKV": ours()}
            for each in caches.values():
                model(text(args, entries), **{CACHE: each}, logits_to_keep=1)
            times = again_and_again(model, caches, ids, args.rounds, what)
            for name, seconds in times.items():
                pairs = zip(seconds, times["DynamicCache"], strict=True)
                yield {
                    "what": what, "arm": name, "entries": f"{entries}..{entries + k}",
                    "ms_per_token": statistics.median(seconds) * 1e3,
                    "ratio": ratio(times, name, "DynamicCache"),
                    "more_us_per_layer": statistics.median(a - b for a, b in pairs) / layers * 1e6,
                }  # fmt: skip
        cycle = FreqKVConfig(n).resolve(model.config).schedule.step
        stream, first = ours(), ours()
        model(text(args, n), **{CACHE: first}, logits_to_keep=1)
        few = max(1, k // 4)
        for windows in args.lengths or (1, 2, 4, 8, 16, 32, 64):
            while stream.tokens_seen < windows * n:
                model(text(args, min(n, windows * n - stream.tokens_seen)), **{CACHE: stream}, logits_to_keep=1)
            grown = dynamic(args, model, windows * n)
            times, shares = {}, []
            for _ in tqdm(range(max(1, args.rounds // 3)), desc=f"{windows} windows", leave=False, unit="round"):
                # From one compression to the next, with the compression.
                caches = {"DynamicCache": grown, "FreqKV": stream, "FreqKV, 1N tokens before": copy.deepcopy(first)}
                with rewound(grown, few), counting_compressions(torch.device(args.device)) as spent:
                    found = in_turn(model, caches, text(args, cycle), {"DynamicCache": few})
                shares.append(sum(spent) / sum(map(sum, list(found.values())[1:])))
                for name, seconds in found.items():
                    times.setdefault(name, []).append(statistics.fmean(seconds))
            for name, entries in (("DynamicCache", windows * n), ("FreqKV", f"{ours().schedule.entries(n + 1)}..{n}")):
                row = {"what": f"{windows}N tokens before", "arm": name, "windows": windows, "entries": entries,
                       "ms_per_token": statistics.median(times[name]) * 1e3,
                       "ratio": ratio(times, name, "DynamicCache")}  # fmt: skip
                if name == "FreqKV":
                    row["to_first"] = ratio(times, name, "FreqKV, 1N tokens before")
                    row["compression_share"] = statistics.median(shares)
                yield row


@contextlib.contextmanager
def counting_compressions(device: torch.device) -> Iterator[list[float]]:
    """Seconds of each compression of each layer: un-rotate, squeeze, rotate, without the write."""
    spent: list[float] = []
    original = FreqKVLayer._folded

    def folded(self: FreqKVLayer, *args: Any) -> Any:
        started = clock(device)
        result = original(self, *args)
        spent.append(clock(device) - started)
        return result

    FreqKVLayer._folded = folded  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        FreqKVLayer._folded = original  # type: ignore[method-assign]


def prefill(args: argparse.Namespace) -> Iterator[dict]:
    """A prompt of T tokens, against full attention and T/N times the plain prefill of N tokens."""
    model, n = patched_model(args), args.window
    device = torch.device(args.device)

    @torch.no_grad()
    def read(tokens: int, make: Callable[[], Any], chunk: int | None = None) -> float:
        ids = text(args, tokens)

        def chunks() -> None:
            cache = make()
            for part in ids.split(chunk or tokens, dim=1):
                model(part, **{CACHE: cache}, logits_to_keep=1)

        return timed(chunks, device)

    ours, plain = makers(args, model)
    for windows in args.lengths or (2, 4, 8, 16):
        tokens = windows * n
        arms: Arms = {
            "plain, N tokens": functools.partial(read, n, plain),
            "FreqKV": functools.partial(read, tokens, ours),
        }
        if windows > 4:
            arms["FreqKV, in chunks of 4N"] = functools.partial(read, tokens, ours, 4 * n)
        if windows <= args.plain_limit:
            arms["plain, T tokens"] = functools.partial(read, tokens, plain)
        times = interleaved(arms, max(1, args.rounds // 3), f"{windows} windows")
        bound = [windows * t for t in times["plain, N tokens"]]
        for name, seconds in times.items():
            row = {"windows": windows, "tokens": tokens, "arm": name, "seconds": statistics.median(seconds)}
            if name != "plain, N tokens":
                row["to_bound"] = statistics.median(t / b for t, b in zip(seconds, bound, strict=True))
            if name == "FreqKV":
                with counting_compressions(device) as spent:
                    total = read(tokens, ours)
                row["compression_share"] = sum(spent) / total
                row["ms_per_compression_and_layer"] = statistics.median(spent) * 1e3
            yield row


def presets(args: argparse.Namespace) -> Iterator[dict]:
    """A token past the window, with its share of the folds, and a prompt, of each preset beside sinks + most recent."""
    model, n = patched_model(args), args.window
    device = torch.device(args.device)
    anchor = "sinks + most recent, gamma = 0.5"
    make = {"DynamicCache": functools.partial(DynamicCache, config=model.config)}
    make[anchor] = functools.partial(FreqKVCache, model.config, window=n, compressor=freqkv.keep_recent)
    for preset in freqkv.PRESETS:
        make[f"preset {preset}"] = functools.partial(FreqKVCache, model.config, window=n, preset=preset)
    rounds = max(1, args.rounds // 3)
    with torch.no_grad():
        for windows in args.lengths or (2, 8):
            prompt, caches = text(args, windows * n), {}

            def read(name: str, prompt: Tensor = prompt, caches: dict[str, Any] = caches) -> float:
                caches[name] = make[name]()
                return timed(lambda: model(prompt, **{CACHE: caches[name]}, logits_to_keep=1), device)

            times = interleaved({name: functools.partial(read, name) for name in make}, rounds, f"{windows} windows")
            tokens = {name: list[float]() for name in make}
            for _ in tqdm(range(rounds), desc="a window of tokens", leave=False, unit="round"):
                with rewound(caches["DynamicCache"], n):
                    for name, seconds in in_turn(model, caches, text(args, n)).items():
                        tokens[name].append(statistics.fmean(seconds))
            for what, found in (("prompt, s", times), ("token, ms", tokens)):
                scale = 1e3 if what == "token, ms" else 1
                for name, seconds in found.items():
                    yield {
                        "windows": windows, "what": what, "rounds": rounds, "arm": name,
                        "median": statistics.median(seconds) * scale,
                        "to_sinks_and_recent": ratio(found, name, anchor),
                        "to_streaming": ratio(found, name, "preset streaming"),
                    }  # fmt: skip


def reference_low_pass(x: Tensor, keep: int) -> Tensor:
    """By complex FFTs over transposed copies, as implementations in the wild do it."""

    def twiddle(n: int, sign: float) -> tuple[Tensor, Tensor]:
        angle = sign * torch.arange(n, device=x.device)[None] * torch.pi / (2 * n)
        return angle.cos(), angle.sin()

    def dct(rows: Tensor) -> Tensor:
        n = rows.shape[-1]
        cos, sin = twiddle(n, -1)
        spectrum = torch.fft.fft(torch.cat([rows[:, ::2], rows[:, 1::2].flip(1)], dim=1), dim=1)
        result = spectrum.real * cos - spectrum.imag * sin
        result[:, 0] /= n**0.5 * 2
        result[:, 1:] /= (n / 2) ** 0.5 * 2
        return 2 * result

    def idct(rows: Tensor) -> Tensor:
        n = rows.shape[-1]
        rows = rows / 2
        rows[:, 0] *= n**0.5 * 2
        rows[:, 1:] *= (n / 2) ** 0.5 * 2
        cos, sin = twiddle(n, 1)
        back = torch.cat([rows[:, :1] * 0, -rows.flip(1)[:, :-1]], dim=1)
        spectrum = torch.complex(rows * cos - back * sin, rows * sin + back * cos)
        folded = torch.fft.ifft(spectrum, dim=1).real
        result = torch.empty_like(rows)
        result[:, ::2] = folded[:, : n - n // 2]
        result[:, 1::2] = folded.flip(1)[:, : n // 2]
        return result

    n = x.shape[-2]
    rows = x.transpose(-1, -2).reshape(-1, n).contiguous()
    low = idct(dct(rows)[:, :keep]) * (keep / n) ** 0.5
    return low.view(*x.shape[:-2], x.shape[-1], keep).transpose(-1, -2).contiguous()


def transform(args: argparse.Namespace) -> Iterator[dict]:
    """`low_pass` of (8 heads, n, 128) to n / 2 entries, against other ways to compute it."""
    device = torch.device(args.device)
    for n in args.transforms:
        keep = n // 2
        x = torch.randn(8, n, 128, device=device)
        truth = torch.from_numpy(
            scipy.fft.idct(scipy.fft.dct(x.double().cpu().numpy(), axis=1, norm="ortho")[:, :keep], axis=1, norm="ortho")
        ).to(device) * (keep / n) ** 0.5  # fmt: skip
        with_gradient = x.clone().requires_grad_()

        def by_scipy(x: Tensor = x, keep: int = keep, n: int = n) -> Tensor:
            low = scipy.fft.dct(x.cpu().numpy(), axis=1, norm="ortho", workers=-1)[:, :keep]
            return (
                torch.from_numpy(scipy.fft.idct(low, axis=1, norm="ortho", workers=-1)).to(device) * (keep / n) ** 0.5
            )

        ways: dict[str, Callable[[], Tensor]] = {
            "freqkv.low_pass": functools.partial(freqkv.low_pass, x, keep),
            "freqkv.low_pass, differentiable": functools.partial(freqkv.low_pass, with_gradient, keep),
            "scipy.fft": by_scipy,
            "complex FFT (reference)": functools.partial(reference_low_pass, x, keep),
        }
        if n <= DENSE_LIMIT:
            matrix = freqkv.low_pass(torch.eye(n, device=device), keep)
            ways["dense matrix"] = functools.partial(torch.matmul, matrix, x)
        for name, way in ways.items():
            error = (way().detach().double() - truth).abs().max().item()
            if error > 1e-4:
                raise SystemExit(f"{name} is off by {error:.1e} for n = {n}")
        arms = {name: functools.partial(timed, way, device) for name, way in ways.items()}
        times = interleaved(arms, args.rounds, f"n = {n}")
        for name, seconds in times.items():
            yield {
                "n": n,
                "arm": name,
                "ms": statistics.median(seconds) * 1e3,
                "ratio": ratio(times, name, "scipy.fft"),
            }


def batch(args: argparse.Namespace) -> Iterator[dict]:
    """Tokens per second of batches with a full window."""
    model, n, k = patched_model(args), args.window, args.tokens
    for size in args.batches:
        ids = text(args, k, size)
        caches = {"DynamicCache": dynamic(args, model, n - k, size), "FreqKV": FreqKVCache(model.config, window=n)}
        with torch.no_grad():
            model(text(args, n - k, size), **{CACHE: caches["FreqKV"]}, logits_to_keep=1)
        times = again_and_again(model, caches, ids, args.rounds, f"batch {size}")
        for name, seconds in times.items():
            median = statistics.median(seconds)
            yield {"what": "full window", "batch": size, "arm": name, "ms_per_token": median * 1e3,
                   "tokens_per_s": size / median, "ratio": ratio(times, name, "DynamicCache")}  # fmt: skip


class Rows:
    """A batch of rows that have read prompts of some lengths, padded on the left, and go on together."""

    def __init__(
        self, args: argparse.Namespace, model: PreTrainedModel, make: Callable[[], Any], lengths: list[int]
    ) -> None:
        self.args, self.model, self.cache = args, model, make()
        longest = max(lengths)
        self.mask = torch.tensor([[0] * (longest - m) + [1] * m for m in lengths], device=args.device)
        ids = text(args, longest, len(lengths))
        model(ids, attention_mask=self.mask, **{CACHE: self.cache}, logits_to_keep=1)

    @torch.no_grad()
    def decode(self, tokens: int) -> float:
        """Seconds for as many tokens of each row."""
        new, seconds = text(self.args, tokens, len(self.mask)), 0.0
        for index in range(tokens):
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
            seconds += decode_tokens(self.model, self.cache, new[:, index : index + 1], attention_mask=self.mask)
        return seconds


def lengths_of(args: argparse.Namespace, size: int) -> dict[str, list[int]]:
    """Prompts of N/4 to 2.75N tokens, and as many tokens in rows of one length."""
    n = args.window
    spread = [n // 4 + (5 * n // 2) * row // max(size - 1, 1) for row in range(size)]
    return {"equal rows": [sum(spread) // size] * size, "rows of N/4 to 2.75N tokens": spread}


@torch.no_grad()
def ragged(args: argparse.Namespace) -> Iterator[dict]:
    """Rows of different length against equal ones, over all tokens from one compression of a row to its next."""
    model, n = patched_model(args), args.window
    cycle = FreqKVConfig(n).resolve(model.config).schedule.step
    for size in (size for size in args.batches if size > 1):
        for name, make in zip(("FreqKV", "DynamicCache"), makers(args, model), strict=True):
            lengths = lengths_of(args, size)
            times: dict[str, list[float]] = {rows: [] for rows in lengths}
            for _ in tqdm(range(max(1, args.rounds // 3)), desc=f"batch {size}", leave=False, unit="round"):
                arms = {rows: Rows(args, model, make, lengths[rows]) for rows in lengths}
                for arm in arms.values():
                    arm.decode(2)
                seconds = dict.fromkeys(arms, 0.0)
                for token in range(cycle):  # one side after the other, so that a drift of the machine meets them alike
                    for rows in sorted(arms, reverse=bool(token % 2)):
                        seconds[rows] += arms[rows].decode(1)
                for rows in arms:
                    times[rows].append(seconds[rows])
            for rows in lengths:
                median = statistics.median(times[rows])
                yield {"batch": size, "arm": f"{name}, {rows}", "ms_per_token": median / cycle * 1e3,
                       "tokens_per_s": size * cycle / median, "ratio": ratio(times, rows, "equal rows")}  # fmt: skip


# Memory is measured in processes of their own: a peak does not go down again.


def in_a_process(worker: Callable[..., dict], *args: Any) -> dict:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(worker, *args).result()


def peak(args: argparse.Namespace) -> int:
    """Bytes, at most, so far: of the device, or resident in the process."""
    if torch.device(args.device).type == "cuda":
        return torch.cuda.max_memory_allocated(args.device)
    status = Path("/proc/self/status")
    if status.exists():  # what `resource` tells begins, on Linux, with the peak of the process that started this one
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def cache_bytes(cache: Any) -> int:
    if isinstance(cache, FreqKVCache):
        return cache.nbytes  # allocated, not only in use
    return sum(
        tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in (layer.keys, layer.values)
    )


@torch.no_grad()
def read_prompt(args: argparse.Namespace, name: str, tokens: int) -> dict:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = patched_model(args)
    before = peak(args)
    cache = FreqKVCache(model.config, window=args.window) if name == "FreqKV" else DynamicCache(config=model.config)
    model.generate(
        text(args, tokens), attention_mask=torch.ones(1, tokens, dtype=torch.long, device=args.device),
        **{CACHE: cache}, prefill_chunk_size=args.window, max_new_tokens=2, do_sample=False,
    )  # fmt: skip
    return {
        "peak_mb": peak(args) / 1e6,
        "beyond_model_mb": (peak(args) - before) / 1e6,
        "cache_bytes": cache_bytes(cache),
    }


def memory(args: argparse.Namespace) -> Iterator[dict]:
    """Bytes of the caches, the peak of a process that reads a prompt in chunks, and how many conversations fit."""
    model = make_model(args)
    config, size = model.config, getattr(torch, args.dtype).itemsize
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    del model
    lengths = args.lengths or (2, 4, 16, 64)
    peaks: dict[str, float] = {}
    for name, windows in itertools.product(("FreqKV", "DynamicCache"), lengths):
        if name == "DynamicCache" and windows > args.plain_limit:
            continue
        row = in_a_process(read_prompt, args, name, windows * args.window)
        exact = per_token * (args.window if name == "FreqKV" else windows * args.window + 1)
        if row["cache_bytes"] != exact:
            raise SystemExit(f"{name} holds {row['cache_bytes']} bytes, {exact} were expected")
        ratio = row["peak_mb"] / peaks.setdefault(name, row["peak_mb"])
        yield {"what": "prompt read in chunks of N", "arm": name, "windows": windows, **row, "peak_to_first": ratio}
    budget = 16 * 2**30
    for windows in (1, 4, 16, 64):
        plain = budget // (per_token * args.window * windows)
        ours = budget // (per_token * args.window)
        for name, fits in (("FreqKV", ours), ("DynamicCache", plain)):
            yield {"what": "conversations in 16 GiB beside the model (computed)", "arm": name, "windows": windows,
                   "conversations": fits}  # fmt: skip


def train_step(args: argparse.Namespace, name: str, tokens: int) -> dict:
    """Seconds and peak of forward and backward: the median of several steps, of which the first does not count."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = make_model(args).train()
    if "FreqKV" in name:
        freqkv.patch(model, window=args.window)
    if "checkpointing" in name:
        # transformers 5.2x calls it by another name than those before
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    before, ids = peak(args), text(args, tokens)

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    step()
    times = [timed(step, torch.device(args.device)) for _ in range(max(1, args.rounds // 2))]
    return {
        "seconds": statistics.median(times),
        "peak_mb": peak(args) / 1e6,
        "beyond_model_mb": (peak(args) - before) / 1e6,
    }


def training(args: argparse.Namespace) -> Iterator[dict]:
    """One training step on a single sequence."""
    for windows in args.lengths or (2, 4, 8):
        first = None
        for name in ("full attention", "FreqKV", "full attention, checkpointing", "FreqKV, checkpointing"):
            row = in_a_process(train_step, args, name, windows * args.window)
            first = first or row
            yield {"windows": windows, "arm": name, **row, "time_ratio": row["seconds"] / first["seconds"],
                   "memory_ratio": row["peak_mb"] / first["peak_mb"]}  # fmt: skip


def outside_the_graph(model: PreTrainedModel, step: Callable[..., Any], cache: FreqKVCache, ids: Tensor) -> float:
    """Seconds of what is done before and after the graph of each token of `ids`, compressions not counted.

    It is done on a copy of the cache, between compiled tokens that enter the cache itself, so that the processor's caches are
    as they are in use.
    """
    other, spent = copy.deepcopy(cache), 0.0
    forward = next(method for module, method in replacements(model) if module is model and method.name == "forward")
    with counting_compressions(ids.device) as folding:
        for index in range(ids.shape[1]):
            inputs = {"input_ids": ids[:, index : index + 1], CACHE: other}
            started, before = clock(ids.device), len(folding)
            request = forward._begin_step(inputs, other)
            if request is None:
                raise RuntimeError("this token is not one for a graph")
            forward._end_step(other, request, ())
            spent += clock(ids.device) - started - sum(folding[before:])
            step(inputs["input_ids"], **{CACHE: cache})
    return spent


def compiled(args: argparse.Namespace) -> Iterator[dict]:
    """Single tokens in a compiled forward, against a StaticCache of N entries compiled the same way."""
    model, n, k = patched_model(args), args.window, args.tokens
    device = torch.device(args.device)
    graphs = torch._dynamo.utils.counters["stats"]
    step = torch.compile(model.forward, mode="reduce-overhead" if device.type == "cuda" else None)
    cycle = FreqKVConfig(n).resolve(model.config).schedule.step

    @torch.no_grad()
    def run(make: Callable[[], Any], call: Callable[..., Any], new: int) -> Callable[[], float]:
        state: dict[str, Any] = {}

        def arm() -> float:
            ids = text(args, new)
            with torch.no_grad():
                if not state or isinstance(state["cache"], DynamicCache):
                    state["cache"] = make()
                    model(text(args, n - new - 1), **{CACHE: state["cache"]}, logits_to_keep=1)
                elif isinstance(state["cache"], StaticCache):  # begin again, in the same buffers
                    state["cache"].reset()
                    model(text(args, n - new - 1), **{CACHE: state["cache"]}, logits_to_keep=1)
                started = clock(device)
                for index in range(new):
                    call(ids[:, index : index + 1], **{CACHE: state["cache"]})
                return clock(device) - started

        return arm

    ours = functools.partial(FreqKVCache, model.config, window=n)
    arms = {
        "StaticCache, compiled": run(lambda: StaticCache(config=model.config, max_cache_len=n), step, k),
        # goes on and on: over all rounds it is compressed many times
        "FreqKV, compiled": run(functools.partial(ours, static=True), step, k),
        "DynamicCache": run(lambda: DynamicCache(config=model.config), model, k),
        "FreqKV": run(ours, model, k),
    }
    for arm in arms.values():
        arm(), arm()
    before = graphs["unique_graphs"]
    rounds = max(args.rounds, 2 * cycle // k + 1)  # through two compressions, at least
    times = interleaved(arms, rounds, "compiled")
    made = graphs["unique_graphs"] - before
    cache = ours(static=True)
    with torch.no_grad():
        model(text(args, n - 1), **{CACHE: cache}, logits_to_keep=1)
        outside = outside_the_graph(model, step, cache, text(args, k))
    for name, seconds in times.items():
        row = {"arm": name, "entries": n, "ms_per_token": statistics.median(seconds) / k * 1e3,
               "mean_ms_per_token": statistics.fmean(seconds) / k * 1e3,
               "ratio": ratio(times, name, "StaticCache, compiled"), "graphs_compiled_while_timed": made}  # fmt: skip
        if name == "FreqKV, compiled":
            row["outside_the_graph_us"] = outside / k * 1e6
        yield row


def profile(args: argparse.Namespace) -> Iterator[dict]:
    """Where the time goes: operators of torch by their own time, and what lies between them (Python, dispatch).

    All figures are of profiled runs, which are slower: medians over rounds in which every arm runs once, each by itself, so
    that shares need not sum to one.
    """
    model, n, k = patched_model(args), args.window, args.tokens
    device = torch.device(args.device)
    ours, theirs = makers(args, model)
    ids, windows = text(args, k), (args.lengths or [4])[0]
    cycle = FreqKVConfig(n).resolve(model.config).schedule.step
    with torch.no_grad():
        for what, entries in (("a token, nothing cached", 1), ("a token, full window", n - k)):
            cache, plain = ours(), theirs()
            for each in (cache, plain):
                model(text(args, entries), **{CACHE: each}, logits_to_keep=1)
            decoding: dict[str, Callable[[], Any]] = {
                "DynamicCache": functools.partial(decode_and_rewind, model, plain, ids),
                "FreqKV": functools.partial(decode_and_rewind, model, cache, ids),
            }
            yield from where_time_goes(what, decoding, k, args.rounds, device)

        def prompts(make: Callable[[], Any], times: int, windows: int) -> None:
            for _ in range(times):
                model(text(args, windows * n), **{CACHE: make()}, logits_to_keep=1)

        reading: dict[str, Callable[[], Any]] = {
            f"DynamicCache, {windows} prompts of N": functools.partial(prompts, theirs, windows, 1),
            "FreqKV": functools.partial(prompts, ours, 1, windows),
        }
        yield from where_time_goes(f"a prompt of {windows} windows", reading, 1, args.rounds, device)
        size = args.batches[-1]
        if size == 1:  # nothing to be of another length
            return
        rows: dict[str, Callable[[], Any]] = {
            f"FreqKV, {name}": functools.partial(Rows(args, model, ours, lengths).decode, cycle)
            for name, lengths in lengths_of(args, size).items()
        }
        yield from where_time_goes(f"a token of {size} rows", rows, cycle, max(1, args.rounds // 9), device)


def where_time_goes(
    what: str, arms: dict[str, Callable[[], Any]], unit: int, rounds: int, device: torch.device
) -> Iterator[dict]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    kinds = [*OPERATORS, "elementwise and the rest", "between operators", "all"]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {(arm, kind): [] for arm in arms for kind in kinds}
    for index in tqdm(range(-1, rounds), desc=what, leave=False, unit="round"):
        for name, arm in arms.items():
            with torch.profiler.profile(activities=activities) as profiler:
                wall = timed(arm, device) / unit * 1e6
            if index < 0:
                continue
            spent = dict.fromkeys(kinds[:-2], (0.0, 0.0))
            for event in profiler.key_averages():
                if not event.key.startswith("aten::"):
                    continue
                operator = event.key.removeprefix("aten::")
                kind = next((kind for kind, names in OPERATORS.items() if operator in names), kinds[-3])
                us, calls = spent[kind]
                own = event.self_device_time_total or event.self_cpu_time_total
                spent[kind] = us + own / unit, calls + event.count / unit
            spent["between operators"] = wall - sum(us for us, _ in spent.values()), 0.0
            spent["all"] = wall, sum(calls for _, calls in spent.values())
            for kind, figures in spent.items():
                found[name, kind].append(figures)
    for (arm, kind), figures in found.items():
        us, calls = (statistics.median(each) for each in zip(*figures, strict=True))
        share = us / statistics.median(wall for wall, _ in found[arm, "all"])
        yield {"what": what, "arm": arm, "operators": kind, "us": us, "share": share, "calls": calls}


COMMANDS: dict[str, Callable[[argparse.Namespace], Iterator[dict]]] = {
    "decode": decode,
    "prefill": prefill,
    "presets": presets,
    "transform": transform,
    "batch": batch,
    "ragged": ragged,
    "memory": memory,
    "compile": compiled,
    "training": training,
    "profile": profile,
}


# Tables


def processor() -> str:
    """The CPU's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {name.strip(): value.strip() for name, value in fields.items()}
    flags = named.get("flags", "").split()
    best = next((flag for flag in ("amx_bf16", "avx512f", "avx2") if flag in flags), "")
    return " ".join(part for part in (named.get("model name", platform.machine()), best) if part)


def hardware(args: argparse.Namespace) -> str:
    if torch.device(args.device).type == "cuda":
        return torch.cuda.get_device_name(args.device)
    return f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def model_name(args: argparse.Namespace) -> str:
    if args.shape is None:
        return Path(args.model).name
    return f"{args.shape}, {args.layers or SHAPES[args.shape]['num_hidden_layers']} layers"


def slug(*parts: str) -> str:
    words = "-".join(parts).lower()
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in words).split())


def told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def run(command: str, args: argparse.Namespace) -> list[dict]:
    rows = list(COMMANDS[command](args))
    about = {"model": model_name(args), "dtype": args.dtype, "window": args.window, "hardware": hardware(args)}
    if command == "transform":
        about = {"hardware": hardware(args)}
    names = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n{command}: {', '.join(f'{name} {value}' for name, value in about.items())}\n")
    print(f"| {' | '.join(name.replace('_', ' ') for name in names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(told(row.get(name, '')) for name in names)} |", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    parts = [command] if command == "transform" else [command, model_name(args), f"n{args.window}", args.dtype]
    with (args.output / f"{slug(*parts, hardware(args))}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *about, *about_run()])
        writer.writeheader()
        for row in rows:
            rounded = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow(rounded | about | about_run())
    return rows


def plot(args: argparse.Namespace) -> None:
    """Time per token over the windows before it, from the table of `decode`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = ["decode", model_name(args), f"n{args.window}", args.dtype, hardware(args)]
    file = args.output / f"{slug(*parts)}.csv"
    if not file.exists():
        raise SystemExit(f"{file} does not exist: run `decode` with these arguments first")
    rows = [row for row in csv.DictReader(file.open()) if row["windows"]]
    figure, axes = pyplot.subplots(figsize=(7, 3.6), constrained_layout=True)
    for name in ("DynamicCache", "FreqKV"):
        points = [(int(row["windows"]), float(row["ms_per_token"])) for row in rows if row["arm"] == name]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks([int(row["windows"]) for row in rows], [f"{row['windows']}N" for row in rows])
    axes.set_xlabel(f"tokens before, N = {args.window}")
    axes.set_ylabel("ms per token")
    axes.set_title(f"{model_name(args)}, {args.dtype}, {rows[0]['hardware']}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file.with_suffix(".png"), dpi=110)
    print(file.with_suffix(".png"))


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.command == "plot":
        return plot(args)
    for command in COMMANDS if args.command == "all" else [args.command]:
        run(command, args)
    if args.command in ("decode", "all"):
        plot(args)


if __name__ == "__main__":
    main()
