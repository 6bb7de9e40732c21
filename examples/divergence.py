"""KL to the full cache, by position: how much of its predictions a bounded cache keeps.

All methods read the same text side by side, which must fit into the model's context, so that the full cache is a truth.

    python examples/divergence.py
    python examples/divergence.py --model smollm2 --windows 512 --text-files book1.txt book2.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from loading import Formatter, load, model_name
from measuring import (
    BLOCK_KEYS,
    Totals,
    add_measuring_arguments,
    beside,
    bin_name,
    bins,
    check_methods,
    context_length,
    divergence_rows,
    documents,
    label,
    legend_above,
    new_figure,
    open_records,
    positive,
    prepare,
    progress,
    save_figure,
    settings,
    style_of,
    texts,
    write_markdown,
)

import freqkv
from freqkv.evaluation import method, paired_bootstrap

REFERENCE = "full"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add_measuring_arguments(parser)
    parser.add_argument("--length", type=positive, default=8, help="tokens of a document, in windows")
    parser.add_argument("--documents", type=positive, default=4, help="stretches of each text, if it is long enough")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prepare(args)
    args.methods = {REFERENCE: method(REFERENCE)} | args.methods
    model, tokenizer = load(args)
    freqkv.patch(model)
    found = texts(args)
    context = context_length(model)
    sizes = sorted(args.windows or [context // args.length])
    if (longest := args.length * sizes[-1]) > context:
        raise SystemExit(
            f"{longest} tokens leave the model's context of {context}, where the full cache is no truth: take --windows up to "
            f"{context // args.length}, or a smaller --length"
        )
    check_methods(args, model, sizes)
    about = settings(args, model, found, length=args.length, documents=args.documents)
    records = open_records(args, "divergence", BLOCK_KEYS, ("tokens", "kl", "same_top", "nats"), about)
    units = [(w, d) for w in sizes for d in documents(found, tokenizer, args.length * w, args.documents)]
    for window, document in progress(records.share(units), "divergence"):
        last = [
            dict(zip(BLOCK_KEYS, (window, name, document.name, args.length - 1), strict=True)) for name in args.methods
        ]
        missing = {key["method"]: args.methods[key["method"]] for key in last if key not in records}
        if missing:
            chosen = {REFERENCE: args.methods[REFERENCE]} | missing
            records.add(divergence_rows(model, document, chosen, REFERENCE, window, window))
    rows = records.finish()
    if records.is_main:
        report(records.path, rows, sizes, args.length, model_name(args), list(args.methods))


def report(
    path: Path, rows: list[dict[str, str]], sizes: list[int], length: int, name: str, order: Sequence[str]
) -> None:
    tables = []
    for window in sizes:
        totals = Totals(rows, window, order)
        shown = []
        for each in totals.methods:
            cells = []
            for start, stop in bins(length):
                found = paired_bootstrap(
                    totals.blocks(each, "kl", start, stop), totals.blocks(each, "tokens", start, stop)
                )
                same = totals.ratio(each, "same_top", "tokens", start, stop)
                cells.append(f"{found.estimate:.4f} [{found.low:.4f}, {found.high:.4f}], {same:.1%}")
            shown.append([label(each), *cells])
        title = (
            f"**KL(full cache || method)** in nats per token with its 95 % interval, and how often both find the same "
            f"token the likeliest, {name}, N = {window}, {len(totals.documents)} documents of {length}N tokens"
        )
        tables.append((title, ["method", *(bin_name(*each) for each in bins(length))], shown))
    write_markdown(path.with_suffix(".md"), tables)
    figure, axes = new_figure(1, len(sizes), size=(4.8 * len(sizes) + 1.5, 4))
    for axis, window in zip([axes] if len(sizes) == 1 else axes, sizes, strict=True):
        totals = Totals(rows, window, order)
        for index, each in enumerate(totals.methods):
            if each != REFERENCE:
                values = [totals.ratio(each, "kl", "tokens", i, i + 1) for i in range(length)]
                places = [i + 0.5 + beside(index, len(totals.methods)) for i in range(length)]
                axis.plot(places, values, label=label(each), **style_of(each, totals.methods))
        axis.set_title(f"N = {window}, {len(totals.documents)} documents")
        axis.set_xlabel(f"position in the document, windows of {window} tokens")
        axis.set_ylabel("KL to the full cache, nats per token")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    legend_above(figure, axis, 3)
    save_figure(figure, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
