"""Bits per byte by position and recall by distance, far beyond the window: FreqKV beside its rivals at equal memory.

Every arm reads the same held-out documents of 16 windows each, and, with the shipped model, answers the same questions
about facts up to 4 windows back. All arms but the plain model hold at most `window` entries per layer and are compressed
by the same schedule.

    python examples/evaluate.py                        # the shipped model on modules it was never trained on
    python examples/evaluate.py --model NAME_OR_PATH --text-files book1.txt book2.txt
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import json
import platform
import random
import subprocess
from pathlib import Path

import torch
import transformers
from corpus import TEST, RecallTask, held_out_documents
from loading import SHIPPED, Formatter, add_model_arguments, load
from tqdm import tqdm

import freqkv
from freqkv import FreqKVCache, FreqKVConfig
from freqkv.evaluation import RecallQuestion, bits_per_byte, byte_lengths, recall_accuracy, token_losses

WINDOWS = 16
RECALL_PROMPT_WINDOWS = 6


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add_model_arguments(parser)
    parser.add_argument("--window", type=int, help="entries per layer; the model's context length by default")
    parser.add_argument(
        "--text-files", type=Path, nargs="+", help="documents; those shorter than 16 windows are left out"
    )
    parser.add_argument("--questions", type=int, default=32, help="per distance, a multiple of 8")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the tables")
    return parser.parse_args()


def arms(window: int) -> dict[str, tuple[FreqKVConfig, freqkv.Compressor] | None]:
    plain, recent = FreqKVConfig(window), FreqKVConfig(window, recent_tokens=window // 8)
    return {
        "plain model past its window": None,
        "sinks + most recent": (plain, freqkv.keep_recent),
        "FreqKV, R = 0": (plain, freqkv.low_pass_entries),
        "FreqKV, R = N/8": (recent, freqkv.low_pass_entries),
        "sinks + most recent, R = N/8": (recent, freqkv.keep_recent),
        "mean pooling, R = N/8": (recent, freqkv.mean_pool),
    }


def documents(args: argparse.Namespace, tokenizer, length: int) -> torch.Tensor:
    """`(documents, length)` token ids: the start of each document that is long enough."""
    if args.text_files is None and args.model != str(SHIPPED):
        raise SystemExit("give the documents with --text-files")
    texts = held_out_documents(TEST) if args.text_files is None else [(f.name, f.read_text()) for f in args.text_files]
    rows = []
    for name, text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
        if len(ids) >= length:
            rows.append(ids[:length])
        else:
            print(f"left out, shorter than {length} tokens: {name} ({len(ids)})")
    if not rows:
        raise SystemExit(f"no document has {length} tokens")
    return torch.stack(rows)


def main() -> None:
    args = parse_arguments()
    model, tokenizer = load(args)
    window = FreqKVConfig(args.window).resolve(model.config).window
    ids = documents(args, tokenizer, WINDOWS * window)
    lengths = byte_lengths(tokenizer, ids)
    by_window = range(0, WINDOWS * window + 1, window)
    summary = [0, window, 2 * window, 4 * window, WINDOWS * window]
    freqkv.patch(model)

    rows = []
    for name, arm in arms(window).items():
        parts = []
        for row in tqdm(ids, desc=name, unit="document"):
            cache = None if arm is None else FreqKVCache(model.config, arm[0], compressor=arm[1])
            parts.append(token_losses(model, row[None], cache, chunk_size=window).cpu())
        losses = torch.cat(parts)
        for kind, edges in (("window", by_window), ("summary", summary)):
            for part in bits_per_byte(losses, lengths, edges):
                rows.append({"arm": name, "bin": kind, **dataclasses.asdict(part)})
    about = {"window": window, "documents": len(ids), "tokens": ids.numel()}
    write(args, model, "bits_per_byte", rows, about)
    plot(args.output / "bits_per_byte.png", rows, window)

    print(f"\n| bits per byte, {len(ids)} documents of 16N tokens, N = {window} | up to N | N..2N | 2N..4N | 4N..16N |")
    print("|---|---|---|---|---|")
    for name in arms(window):
        values = [row["bits_per_byte"] for row in rows if row["arm"] == name and row["bin"] == "summary"]
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |")

    if args.model != str(SHIPPED):
        return
    asked = questions(tokenizer, window, args.questions)
    rows = []
    for name, arm in tqdm(arms(window).items(), desc="recall", unit="arm"):
        make = None if arm is None else functools.partial(FreqKVCache, model.config, arm[0], compressor=arm[1])
        for distance, accuracy in recall_accuracy(model, asked, make, batch_size=8).items():
            rows.append({"arm": name, "distance": distance, "questions": args.questions, "accuracy": accuracy})
    write(args, model, "recall", rows, {"window": window, "prompt_windows": RECALL_PROMPT_WINDOWS})
    distances = sorted({row["distance"] for row in rows})
    print(f"\n| recall by distance | {' | '.join(f'{distance / window:g} N' for distance in distances)} |")
    print("|---|" + "---|" * len(distances))
    for name in arms(window):
        values = [row["accuracy"] for row in rows if row["arm"] == name]
        print(f"| {name} | {' | '.join(f'{value:.0%}' for value in values)} |")


def questions(tokenizer, window: int, per_distance: int) -> list[RecallQuestion]:
    """Questions behind long prompts, whose lengths are spread over the time between two compressions."""
    task, rng = RecallTask(tokenizer), random.Random(0)
    code = [token for _, text in held_out_documents(TEST) for token in tokenizer(text)["input_ids"]]
    step = FreqKVConfig(window).schedule.step
    asked = []
    for share in (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 2, 4):
        for index in range(per_distance):
            length = RECALL_PROMPT_WINDOWS * window + (index % 8) * step // 8
            asked.append(task.question(rng, code, int(share * window), length))
    return asked


def write(args: argparse.Namespace, model, name: str, rows: list[dict], about: dict) -> None:
    """The table, and beside it what it was made with."""
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    about = {
        "model": Path(args.model).name,
        **about,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": args.attn_implementation,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else platform.machine() + " CPU",
        **about_run(),
    }
    (args.output / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")


def about_run() -> dict[str, str]:
    """Versions, and the commit."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
    }


def plot(path: Path, rows: list[dict], window: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.2), constrained_layout=True)
    for name in arms(window):
        points = [
            (row["stop"] / window, row["bits_per_byte"])
            for row in rows
            if row["arm"] == name and row["bin"] == "window"
        ]
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    flat = [row["bits_per_byte"] for row in rows if row["arm"] != "plain model past its window"]
    axes.set_ylim(min(flat) * 0.95, max(flat) * 1.35)  # the plain model leaves the picture
    axes.set_xlabel(f"position in the document, windows of N = {window} tokens")
    axes.set_ylabel("bits per byte")
    axes.set_xticks(range(1, WINDOWS + 1))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
