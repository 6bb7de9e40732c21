"""Bits per byte by position, far beyond the window: FreqKV beside its rivals at equal memory.

Every arm reads the same held-out documents of 16 windows each. All arms but the plain model hold at most `window` entries
per layer and are compressed by the same schedule.

    python examples/evaluate.py                        # the shipped model on modules it was never trained on
    python examples/evaluate.py --model NAME_OR_PATH --text-files book1.txt book2.txt
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import platform
import subprocess
from pathlib import Path

import torch
import transformers
from corpus import TEST, held_out_documents
from loading import SHIPPED, add_model_arguments, load
from tqdm import tqdm

import freqkv
from freqkv import FreqKVCache, FreqKVConfig
from freqkv.evaluation import bits_per_byte, byte_lengths, token_losses

WINDOWS = 16


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--window", type=int, help="entries per layer; the model's context length by default")
    parser.add_argument(
        "--text-files", type=Path, nargs="+", help="documents; those shorter than 16 windows are left out"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "bits_per_byte.csv")
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
    write(args, model, rows, {"window": window, "documents": len(ids), "tokens": ids.numel()})
    plot(args.output.with_suffix(".png"), rows, window)

    print(f"\n| bits per byte, {len(ids)} documents of 16N tokens, N = {window} | up to N | N..2N | 2N..4N | 4N..16N |")
    print("|---|---|---|---|---|")
    for name in arms(window):
        values = [row["bits_per_byte"] for row in rows if row["arm"] == name and row["bin"] == "summary"]
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |")


def write(args: argparse.Namespace, model, rows: list[dict], about: dict) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "bits_per_byte": f"{row['bits_per_byte']:.4f}"} for row in rows)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    about = {
        "model": Path(args.model).name,
        **about,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": args.attn_implementation,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else platform.machine() + " CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
    }
    args.output.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


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
