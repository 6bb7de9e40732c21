"""Where the energy of keys and values lies along the sequence: what FreqKV stands on (the paper's first figure).

Keys before and after RoPE and values of every layer go through the DCT along the sequence. Written down are the share of the
energy at each frequency, and how many of the lowest frequencies hold 90, 95 and 99 % of it: of all, and without the mean over
the sequence, which is the first coefficient and carries no change from token to token.

    python examples/spectrum.py
    python examples/spectrum.py --model smollm2 --length 1024 --text-files book1.txt book2.txt
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from loading import Formatter, load, model_name
from measuring import (
    add_measuring_arguments,
    context_length,
    documents,
    new_figure,
    open_records,
    positive,
    prepare,
    progress,
    save_figure,
    settings,
    style,
    texts,
    write_markdown,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import freqkv
from freqkv import FreqKVCache, Span, dct, keep_recent
from freqkv.layer import FreqKVLayer
from freqkv.models.upstream import CACHE

KEYS = ("document", "layer", "kind")
KINDS = ("keys before RoPE", "keys after RoPE", "values")
SHARES = (90, 95, 99)
BINS = 64  # of frequencies, for the figure


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add_measuring_arguments(parser, methods=[])
    parser.add_argument(
        "--length", type=positive, help="tokens of a document; the model's context, at most 1024, by default"
    )
    parser.add_argument("--documents", type=positive, default=2, help="stretches of each text, if it is long enough")
    parser.add_argument("--sink-tokens", type=int, default=4, help="first tokens, left out as FreqKV does")
    return parser.parse_args(arguments)


@torch.no_grad()
def states(model: PreTrainedModel, ids: Tensor, sinks: int) -> Iterator[tuple[int, str, Tensor]]:
    """Layer, kind, and keys or values `(1, heads, tokens - sinks, head_dim)` of all layers that FreqKV compresses.

    Keys before RoPE are what a compressor sees, so that the token behind a full window lets one look at them.
    """
    spans: dict[int, tuple[Tensor, Tensor]] = {}

    def look(span: Span) -> tuple[Tensor, Tensor]:
        spans[span.layer_idx] = span.keys.clone(), span.values.clone()  # the cache writes over them
        return keep_recent(span.keys, span.values, span.keep)

    window = len(ids) - 1
    cache = FreqKVCache(model.config, window=window, sink_tokens=sinks, compressor=look)
    plain = DynamicCache(config=model.config)
    model(input_ids=ids[None].to(model.device), **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    model(input_ids=ids[None, :-1].to(model.device), **{CACHE: plain}, use_cache=True, logits_to_keep=1)
    after = [layer[0] for layer in plain]
    for layer, (keys, values) in sorted(spans.items()):
        yield layer, "keys before RoPE", keys
        yield layer, "keys after RoPE", after[layer][:, :, sinks:]
        yield layer, "values", values


def energy(x: Tensor) -> Tensor:
    """Of each frequency, over all heads and channels: `(tokens,)`, float64."""
    return dct(x.double(), dim=-2).square().sum(dim=(0, 1, 3))


def coefficients(spectrum: Tensor, percent: float) -> int:
    """How many of the first coefficients hold `percent` of the energy."""
    held = spectrum.cumsum(0) / spectrum.sum()
    return int((held < percent / 100 - 1e-12).sum()) + 1


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prepare(args)
    model, tokenizer = load(args)
    freqkv.patch(model)
    length = args.length or min(context_length(model), 1024)
    found = texts(args)
    columns = [f"{name}{share}" for name in ("all_", "changes_") for share in SHARES] + [f"bin{i}" for i in range(BINS)]
    about = settings(args, model, found, length=length, documents=args.documents, sink_tokens=args.sink_tokens)
    records = open_records(args, "spectrum", KEYS, columns, about)
    last = max(
        i for i, layer in enumerate(FreqKVCache(model.config, window=64).layers) if isinstance(layer, FreqKVLayer)
    )
    for document in progress(records.share(documents(found, tokenizer, length, args.documents)), "spectrum"):
        if {"document": document.name, "layer": last, "kind": KINDS[-1]} in records:
            continue
        rows = []
        for layer, kind, x in states(model, document.ids, args.sink_tokens):
            spectrum = energy(x)
            share = spectrum / spectrum.sum()
            row = dict(zip(KEYS, (document.name, layer, kind), strict=True))
            row |= {f"all_{p}": coefficients(spectrum, p) for p in SHARES}
            row |= {f"changes_{p}": coefficients(spectrum[1:], p) for p in SHARES}
            row |= {f"bin{i}": f"{part.sum().item():.6g}" for i, part in enumerate(share.tensor_split(BINS))}
            rows.append(row)
        records.add(rows)
    rows = records.finish()
    if records.is_main:
        report(records.path, rows, length - 1 - args.sink_tokens, model_name(args))


def report(path: Path, rows: list[dict[str, str]], tokens: int, name: str) -> None:
    layers = sorted({int(row["layer"]) for row in rows})

    def mean(kind: str, column: str, layer: int | None = None) -> float:
        return statistics.fmean(
            float(row[column]) for row in rows if row["kind"] == kind and layer in (None, int(row["layer"]))
        )

    shown = []
    for kind in KINDS:
        cells = []
        for prefix in ("all_", "changes_"):
            for share in SHARES:
                by_layer = [mean(kind, f"{prefix}{share}", layer) / tokens for layer in layers]
                cells.append(f"{statistics.fmean(by_layer):.0%} ({min(by_layer):.0%} to {max(by_layer):.0%})")
        shown.append([kind, *cells])
    title = (
        f"**Share of the lowest frequencies that hold 90, 95 and 99 % of the energy**, {name}, {tokens} tokens, mean over "
        "layers (least and most of a layer); of all, and of all but the mean over the sequence"
    )
    head = ["", *(f"{share} % of {what}" for what in ("all", "changes") for share in SHARES)]
    write_markdown(path.with_suffix(".md"), [(title, head, shown)])

    figure, axes = new_figure(1, 4, size=(14, 4.2))
    drawn = None
    for axis, kind in zip(axes, KINDS, strict=False):
        table = torch.tensor([[mean(kind, f"bin{i}", layer) for i in range(BINS)] for layer in layers])
        extent = (0, 1, layers[-1] + 0.5, layers[0] - 0.5)
        drawn = axis.imshow(
            table.clamp_min(1e-6).log10().numpy(), aspect="auto", cmap="cividis", vmin=-4, vmax=0, extent=extent
        )
        axis.set_title(kind)
        axis.set_xlabel("frequency, share of the highest")
        axis.set_ylabel("layer")
    figure.colorbar(drawn, ax=list(axes[:3]), label=f"log10 of the share of energy, in each of {BINS} bands")
    for index, kind in enumerate(KINDS):
        values = [mean(kind, "changes_90", layer) / tokens for layer in layers]
        axes[3].plot(layers, values, label=kind, **style(index))
    axes[3].axhline(0.9, color="black", linestyle=":", linewidth=0.8, label="white noise")
    axes[3].axhline(0.5, color="black", linestyle="--", linewidth=0.8, label="what FreqKV keeps")
    axes[3].set_title("hold 90 % of all but the mean")
    axes[3].set_xlabel("layer")
    axes[3].set_ylabel("share of all frequencies")
    axes[3].set_ylim(0, 1)
    axes[3].grid(alpha=0.3)
    axes[3].legend(fontsize=7)
    save_figure(figure, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
