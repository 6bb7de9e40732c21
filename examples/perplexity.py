"""Bits per byte by position, far beyond the window: methods of caching side by side, at equal bytes.

Every method reads the same documents, in pieces of one window. Differences to "sinks + most recent" are paired: of the same
blocks of the same documents, with 95 % intervals from a bootstrap over documents and blocks.

    python examples/perplexity.py                                     # the shipped model on modules it was never trained on
    python examples/perplexity.py --model smollm2 --text-files book1.txt book2.txt
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loading import Formatter, load, model_name
from measuring import (
    BASELINE,
    BLOCK_KEYS,
    Document,
    Totals,
    add_measuring_arguments,
    beside,
    bin_name,
    bins,
    check_methods,
    context_length,
    documents,
    label,
    legend_above,
    minus,
    new_figure,
    open_records,
    positive,
    prepare,
    progress,
    remarks,
    save_figure,
    settings,
    style_of,
    texts,
    windows,
    write_markdown,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import freqkv
from freqkv.evaluation import Method, bits_per_byte, byte_lengths, cache_bytes, paired_bootstrap, token_losses

FEWEST_BLOCKS = 6  # for an interval: a bootstrap over fewer says nothing


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add_measuring_arguments(parser)
    parser.add_argument("--length", type=positive, default=8, help="tokens of a document, in windows")
    parser.add_argument("--documents", type=positive, default=4, help="stretches of each text, if it is long enough")
    return parser.parse_args(arguments)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, document: Document, method: Method, window: int
) -> list[dict[str, Any]]:
    """A row for each window of a document."""
    cache = method.make(model.config, window)
    started = time.perf_counter()
    losses = token_losses(model, document.ids[None], cache, chunk_size=window).cpu()
    seconds = time.perf_counter() - started
    lengths = byte_lengths(tokenizer, document.ids[None])
    parts = bits_per_byte(losses, lengths, range(0, len(document.ids) + 1, window))
    return [
        dict(zip(BLOCK_KEYS, (window, method.name, document.name, index), strict=True))
        | {
            "tokens": part.tokens,
            "bytes": part.bytes,
            "bits": part.bits_per_byte * part.bytes,
            "cache_bytes": cache_bytes(cache),
            "seconds": round(seconds, 2),
        }
        for index, part in enumerate(parts)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prepare(args)
    model, tokenizer = load(args)
    freqkv.patch(model)
    found = texts(args)
    sizes = windows(args, model)
    check_methods(args, model, sizes)
    about = settings(args, model, found, length=args.length, documents=args.documents)
    columns = ("tokens", "bytes", "bits", "cache_bytes", "seconds")
    records = open_records(args, "perplexity", BLOCK_KEYS, columns, about)
    cut = {window: documents(found, tokenizer, args.length * window, args.documents) for window in sizes}
    units = [(w, d, m) for w in sizes for d, m in itertools.product(cut[w], args.methods.values())]
    for window, document, method in progress(records.share(units), "perplexity"):
        key = dict(zip(BLOCK_KEYS, (window, method.name, document.name, args.length - 1), strict=True))
        if key not in records:
            records.add(measure(model, tokenizer, document, method, window))
    rows = records.finish()
    if records.is_main:
        report(
            records.path,
            rows,
            sizes,
            args.length,
            context_length(model),
            model_name(args),
            list(args.methods),
        )


def report(
    path: Path, rows: list[dict[str, str]], sizes: list[int], length: int, context: int, name: str, order: Sequence[str]
) -> None:
    tables = []
    for window in sizes:
        totals = Totals(rows, window, order)
        shows_difference = BASELINE in totals.methods and len(totals.methods) > 1
        shown = []
        for method in totals.methods:
            cells = []
            for start, stop in bins(length):
                cell = f"{totals.ratio(method, 'bits', 'bytes', start, stop):.4f}"
                if BASELINE in totals.methods and method != BASELINE and start:
                    cell += f" ({difference(totals, method, start, stop)})"
                cells.append(cell)
            held = max(b for row in totals.blocks(method, "cache_bytes", 0, 1) for b in row)
            shown.append([label(method), *cells, f"{held / 2**20:.1f}"])
        against = (
            f'. In brackets: the difference to "{label(BASELINE)}" in %, with its 95 % interval'
            if shows_difference
            else ""
        )
        title = (
            f"**Bits per byte**, {name}, N = {window}, {len(totals.documents)} documents of {length}N tokens"
            f"{remarks(totals.methods, window, length, context)}{against}."
        )
        tables.append((title, ["method", *(bin_name(*each) for each in bins(length)), "cache, MiB"], shown))
    write_markdown(path.with_suffix(".md"), tables)
    plot(path.with_suffix(".png"), rows, sizes, length, order)


def difference(totals: Totals, method: str, start: int, stop: int) -> str:
    """In percent of the baseline's bits per byte: the estimate and the ends of its interval."""
    base = totals.ratio(BASELINE, "bits", "bytes", start, stop)
    apart = minus(totals.blocks(method, "bits", start, stop), totals.blocks(BASELINE, "bits", start, stop))
    found = paired_bootstrap(apart, totals.blocks(BASELINE, "bytes", start, stop))
    if sum(map(len, apart)) < FEWEST_BLOCKS:
        return f"{found.estimate / base:+.2%}".replace("%", "")
    return f"{found.estimate / base:+.2%} [{found.low / base:+.2%}, {found.high / base:+.2%}]".replace("%", "")


def plot(path: Path, rows: list[dict[str, str]], sizes: list[int], length: int, order: Sequence[str]) -> None:
    figure, axes = new_figure(2, len(sizes), size=(4.6 * len(sizes) + 0.6, 7.2))
    for column, window in enumerate(sizes):
        totals = Totals(rows, window, order)
        upper, lower = axes[:, column] if len(sizes) > 1 else axes
        for index, method in enumerate(totals.methods):
            values = [totals.ratio(method, "bits", "bytes", i, i + 1) for i in range(length)]
            places = [i + 0.5 + beside(index, len(totals.methods)) for i in range(length)]
            look = style_of(method, totals.methods)
            upper.plot(places, values, label=label(method), **look)
            if BASELINE not in totals.methods:
                continue
            means, below, above = [], [], []
            for i in range(length):
                base = totals.blocks(BASELINE, "bits", i, i + 1)
                apart = minus(totals.blocks(method, "bits", i, i + 1), base)
                scale = (
                    100 / math.fsum(map(sum, base)) * math.fsum(map(sum, totals.blocks(BASELINE, "bytes", i, i + 1)))
                )
                found = paired_bootstrap(apart, totals.blocks(BASELINE, "bytes", i, i + 1), samples=2000)
                means.append(found.estimate * scale)
                below.append(found.low * scale)
                above.append(found.high * scale)
            lower.plot(places, means, **look)
            lower.fill_between(places, below, above, color=look["color"], alpha=0.15, linewidth=0)
        upper.set_title(f"N = {window}, {len(totals.documents)} documents")
        upper.set_ylabel("bits per byte")
        lower.set_ylabel("difference to sinks + most recent, %")
        lower.axhline(0, color="black", linewidth=0.6)
        if "full" in totals.methods and len(totals.methods) > 1:
            # A model past its context would press all others together.
            others = [m for m in totals.methods if m != "full"]
            highest = max(totals.ratio(m, "bits", "bytes", i, i + 1) for m in others for i in range(length))
            if max(totals.ratio("full", "bits", "bytes", i, i + 1) for i in range(length)) > 1.01 * highest:
                upper.set_ylim(top=1.02 * highest)
                lower.set_ylim(-8, 12)
                upper.set_title(
                    f"N = {window}, {len(totals.documents)} documents; the full cache leaves the picture", fontsize=9
                )
        for axis in (upper, lower):
            axis.set_xlabel(f"position in the document, windows of {window} tokens")
            axis.set_xticks(range(0, length + 1, max(1, length // 8)))
            axis.grid(alpha=0.3)
    legend_above(figure, axes.flat[0], 3)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
