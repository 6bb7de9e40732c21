"""FreqKV beside other caches on the same weights, texts and questions: time, memory, bits per byte and recall.

For each held-out document: a prompt is read in one call, then the tokens that follow it are fed one by one and their loss
taken. What is left out of a cache shows as bits, what it costs as milliseconds and bytes. Then texts with facts in them are
read in one call, and each fact is asked for from a copy of the cache.

    python examples/peers.py                # FreqKV, transformers' caches (quantized ones with optimum-quanto and hqq)
    python examples/peers.py --presses      # afterwards, where kvpress is installed, which needs transformers < 5.3

The second command reads the texts and questions that the first has left in --runs, and adds its rows to the tables. Presses
see a whole text before they choose what to keep of it; FreqKV never holds more than its window. DynamicCache is in
both, so that times can be compared: ratios are to the DynamicCache of the same run, document by document.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import importlib.util
import inspect
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

SHIPPED = Path(__file__).parent / "tiny_lm"
ANCHOR = "DynamicCache"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--presses", action="store_true", help="kvpress's methods, in an environment of its own")
    parser.add_argument("--model", default=str(SHIPPED), help="name or path")
    parser.add_argument("--window", type=int, default=512, help="entries of the caches that are bounded")
    parser.add_argument("--lengths", type=float, nargs="+", default=[0.5, 2, 8], help="of prompts, in windows")
    parser.add_argument("--tokens", type=int, default=128, help="scored behind each prompt")
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument(
        "--text-files", type=Path, nargs="+", help=".txt or .txt.xz; by default held-out modules of Python"
    )
    parser.add_argument(
        "--facts", type=int, default=7, help="texts of each length with 8 facts that are asked for; 0 for none"
    )
    parser.add_argument(
        "--wording", choices=["code", "prose"], default="code", help="of the facts; code for the shipped model"
    )
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/peers"), help="folder for the texts, as token ids")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "speed" / "peers.csv")
    return parser.parse_args(arguments)


@dataclass
class Arm:
    """How to make a cache for a prompt of some tokens, and what stays switched on around the model."""

    make: Callable[[int], Any]
    around: Callable[[nn.Module, int], AbstractContextManager] = lambda model, prompt: nullcontext()


# Texts


def texts(args: argparse.Namespace) -> list[str]:
    # Imported here: the environment of the presses has no FreqKV.
    from corpus import TEST, held_out_documents
    from measuring import read_text

    if args.text_files is not None:
        return [read_text(path, "utf-8") for path in args.text_files]
    return [text for _, text in held_out_documents(TEST)]


def write_documents(args: argparse.Namespace) -> None:
    """The beginnings of held-out documents, with the bytes that each token stands for."""
    from transformers import AutoTokenizer

    from freqkv.evaluation import byte_lengths

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    wanted = round(max(args.lengths) * args.window) + args.tokens
    rows = [tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0] for text in texts(args)]
    rows = [row[:wanted] for row in rows if len(row) >= wanted][: args.documents]
    if not rows:
        raise SystemExit(f"no held-out document has {wanted} tokens: ask for shorter --lengths")
    ids = torch.stack(rows)
    args.runs.mkdir(parents=True, exist_ok=True)
    torch.save({"ids": ids, "bytes": byte_lengths(tokenizer, ids)}, args.runs / "documents.pt")


def write_questions(args: argparse.Namespace) -> None:
    """Texts with eight facts each, and a question for each; prose with the tokenizer's chat template, if it has one."""
    from transformers import AutoTokenizer

    from freqkv.evaluation import CODE, PROSE, Haystack

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = "\n\n".join(texts(args))
    chat = args.wording == "prose" and tokenizer.chat_template is not None
    haystack = Haystack(tokenizer, text, CODE if args.wording == "code" else PROSE, chat)
    rows = []
    for length in args.lengths:
        for seed in range(args.facts):
            sample = haystack.sample("several_keys", round(length * args.window), seed)
            asked = [(question.ids, question.answers[0]) for question in sample.questions]
            rows.append({"length": length, "ids": sample.ids, "questions": asked})
    (args.runs / "questions.json").write_text(json.dumps(rows))


# Arms


def own_arms(args: argparse.Namespace, config: Any) -> dict[str, Arm]:
    from speed import reference_low_pass

    import freqkv
    from freqkv import FreqKVCache

    n = args.window

    def by_the_reference(keys: Tensor, values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        return reference_low_pass(keys, keep), reference_low_pass(values, keep)

    arms = {
        ANCHOR: Arm(lambda prompt: DynamicCache(config=config)),
        "StaticCache": Arm(lambda prompt: StaticCache(config=config, max_cache_len=prompt + args.tokens)),
        "FreqKV, R = 0": Arm(lambda prompt: FreqKVCache(config, window=n)),
        "FreqKV, R = N/8": Arm(lambda prompt: FreqKVCache(config, window=n, recent_tokens=n // 8)),
        "FreqKV, R = 0, reference's transform": Arm(
            lambda prompt: FreqKVCache(config, window=n, compressor=by_the_reference)
        ),
        "sinks + most recent": Arm(lambda prompt: FreqKVCache(config, window=n, compressor=freqkv.keep_recent)),
    }
    for preset in ("streaming", "recommended"):
        arms[f"preset {preset}"] = Arm(lambda prompt, preset=preset: FreqKVCache(config, window=n, preset=preset))
    for backend, package in (("quanto", "optimum.quanto"), ("hqq", "hqq")):
        if _is_installed(package):
            from transformers import QuantizedCache

            axis = {"quanto": 0, "hqq": 1}[backend]  # the one that each supports
            make = functools.partial(QuantizedCache, backend, config, nbits=4, axis_key=axis, axis_value=axis)
            arms[f"QuantizedCache, {backend}, 4 bits"] = Arm(lambda prompt, make=make: make())
        else:
            print(f"QuantizedCache with {backend} is left out: the package {package} is not installed")
    if torch.cuda.is_available():
        arms["DynamicCache, offloaded"] = Arm(lambda prompt: DynamicCache(config=config, offloading=True))
    return arms


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def press_arms(args: argparse.Namespace, config: Any) -> dict[str, Arm]:
    try:
        import kvpress
    except ImportError as error:
        raise SystemExit(
            f"--presses needs kvpress in an environment of its own: pip install kvpress ({error})"
        ) from None
    n = args.window

    def evicting(press_type: Callable[..., Any]) -> Callable[[nn.Module, int], AbstractContextManager]:
        """Of each prompt, N entries stay; those of shorter prompts all do."""
        return lambda model, prompt: press_type(compression_ratio=max(0.0, 1 - n / prompt))(model)

    def while_decoding(model: nn.Module, prompt: int) -> AbstractContextManager:
        base = kvpress.StreamingLLMPress()
        return kvpress.DecodingPress(base_press=base, compression_interval=n // 16, target_size=n)(model)

    plain = Arm(lambda prompt: DynamicCache(config=config))
    return {
        f"{ANCHOR} (beside kvpress)": plain,
        "kvpress StreamingLLM": Arm(plain.make, evicting(kvpress.StreamingLLMPress)),
        "kvpress SnapKV": Arm(plain.make, evicting(kvpress.SnapKVPress)),
        "kvpress Knorm": Arm(plain.make, evicting(kvpress.KnormPress)),
        "kvpress DecodingPress, StreamingLLM": Arm(plain.make, while_decoding),
    }


# Measuring


def cache_bytes(cache: Any) -> int:
    """Of all tensors that a cache holds, those inside quantized tensors included."""
    if hasattr(cache, "nbytes"):  # a FreqKVCache tells by itself
        return cache.nbytes

    def inner(value: Any) -> int:
        if isinstance(value, Tensor):
            if hasattr(value, "__tensor_flatten__"):
                return sum(inner(getattr(value, name)) for name in value.__tensor_flatten__()[0])
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(map(inner, value.values()))
        if isinstance(value, (tuple, list)):
            return sum(map(inner, value))
        return 0

    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return sum(inner(layer.__dict__.get(name)) for layer in cache.layers for name in names)


@torch.no_grad()
def measure(arm: Arm, model: nn.Module, ids: Tensor, prompt: int) -> dict[str, Any]:
    cache, losses = arm.make(prompt), []
    # Not freqkv's own constant: kvpress asks for a transformers that FreqKV does not serve.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    call = {name: cache}
    with arm.around(model, prompt):
        started = time.perf_counter()
        logits = model(ids[:, :prompt], **call, logits_to_keep=1).logits
        read = time.perf_counter()
        for position in range(prompt, ids.shape[1]):
            losses.append(nn.functional.cross_entropy(logits[:, -1].float(), ids[:, position]).item())
            token = ids[:, position : position + 1]
            # Positions are those of the text: caches that drop entries would count what is left.
            logits = model(token, **call, position_ids=torch.tensor([[position]])).logits
        done = time.perf_counter()
    return {
        "prefill_s": read - started,
        "ms_per_token": (done - read) / len(losses) * 1e3,
        "cache_bytes": cache_bytes(cache),
        "bits": sum(losses) / math.log(2),
    }


@torch.no_grad()
def found(arm: Arm, model: nn.Module, tokenizer: Any, ids: list[int], questions: list, limit: int = 16) -> int:
    """How many of the answers stand in the greedy replies to questions behind a text."""
    longest = len(ids) + max(len(asked) for asked, _ in questions) + limit
    text, cache, right = torch.tensor([ids]), arm.make(longest), 0
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    end = model.generation_config.eos_token_id
    with arm.around(model, len(ids)):
        model(text, **{name: cache}, logits_to_keep=1)
        for asked, answer in questions:
            branch, tokens, reply = copy.deepcopy(cache), torch.tensor([asked]), []
            for _ in range(limit):
                start = len(ids) + len(asked) + len(reply) - tokens.shape[1]
                positions = torch.arange(start, start + tokens.shape[1])[None]
                logits = model(tokens, **{name: branch}, position_ids=positions, logits_to_keep=1).logits
                tokens = logits[:, -1:].argmax(-1)
                if tokens.item() == end:
                    break
                reply.append(tokens.item())
            right += re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", tokenizer.decode(reply)) is not None
    return right


def recall(args: argparse.Namespace, model: nn.Module, arms: dict[str, Arm]) -> None:
    """The table of recall: share of the facts that are found, by the length of the text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = json.loads((args.runs / "questions.json").read_text())
    counts: dict[tuple[str, float], list[int]] = defaultdict(lambda: [0, 0])
    for row in tqdm(rows, unit="text", disable=None):
        for name, arm in arms.items():
            count = counts[name, row["length"]]
            count[0] += found(arm, model, tokenizer, row["ids"], row["questions"])
            count[1] += len(row["questions"])
    output = args.output.with_name(f"{args.output.stem}_recall.csv")
    columns = ("arm", "length", "found", "questions")
    told = [dict(zip(columns, (name, length, *got), strict=True)) for (name, length), got in counts.items()]
    if args.presses and output.exists():
        with output.open() as file:
            told = [row for row in csv.DictReader(file) if row["arm"] not in arms] + told
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(told)
    lengths = sorted({float(row["length"]) for row in told})
    print(
        f"\n| facts found | {' | '.join(f'text of {length:g}N' for length in lengths)} |\n|---|{'---|' * len(lengths)}"
    )
    for name in dict.fromkeys(row["arm"] for row in told):
        cells = {float(row["length"]): f"{row['found']} of {row['questions']}" for row in told if row["arm"] == name}
        print(f"| {name} | {' | '.join(cells.get(length, '') for length in lengths)} |")


def hardware() -> str:
    name = "GPU" if torch.cuda.is_available() else platform.machine()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa").eval()
    if args.presses:
        arms = press_arms(args, model.config)
        if not (args.runs / "documents.pt").exists():
            raise SystemExit(f"{args.runs} has no documents.pt: run this script without --presses first")
    else:
        import freqkv

        write_documents(args)
        if args.facts:
            write_questions(args)
        arms = own_arms(args, model.config)
        freqkv.patch(model)
    stored = torch.load(args.runs / "documents.pt")
    ids, lengths = stored["ids"], stored["bytes"]
    anchor = next(iter(arms))
    got: dict[tuple[str, int], list[dict]] = defaultdict(list)
    prompts = [round(length * args.window) for length in args.lengths]
    for name in arms:  # once, untimed
        measure(arms[name], model, ids[:1, : prompts[0] + 2], prompts[0])
    for document, prompt in tqdm(list(itertools.product(range(len(ids)), prompts)), unit="prompt"):
        row = ids[document : document + 1, : prompt + args.tokens]
        for name, arm in arms.items():
            got[name, prompt].append(measure(arm, model, row, prompt))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    about = {
        "window": args.window, "hardware": hardware(), "torch": torch.__version__,
        "transformers": transformers.__version__, "commit": commit,
    }  # fmt: skip
    rows = []
    for (name, prompt), results in got.items():
        pairs = zip(results, got[anchor, prompt], strict=True)
        medians = {key: statistics.median(result[key] for result in results) for key in ("prefill_s", "ms_per_token")}
        row = {
            "arm": name,
            "prompt": prompt,
            "scored_tokens": args.tokens * len(ids),
            "bits_per_byte": sum(r["bits"] for r in results) / int(lengths[:, prompt : prompt + args.tokens].sum()),
            **medians,
            "time_ratio": statistics.median(result["ms_per_token"] / other["ms_per_token"] for result, other in pairs),
            "cache_bytes": results[-1]["cache_bytes"],
        }
        rows.append({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} | about)
    if args.presses and args.output.exists():
        with args.output.open() as file:
            rows = [row for row in csv.DictReader(file) if row["arm"] not in arms] + rows
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    shown = ("bits_per_byte", "prefill_s", "ms_per_token", "time_ratio", "cache_bytes")
    print(f"| prompt | arm | {' | '.join(name.replace('_', ' ') for name in shown)} |\n|---|---|{'---|' * len(shown)}")
    for row in sorted(rows, key=lambda row: int(row["prompt"])):
        print(f"| {row['prompt']} | {row['arm']} | {' | '.join(str(row[name]) for name in shown)} |")
    if args.facts:
        recall(args, model, arms)


if __name__ == "__main__":
    main()
