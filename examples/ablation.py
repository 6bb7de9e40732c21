"""Which numbers and which parts of the method matter: one thing changed at a time, judged by KL to the full cache.

From the setting S = 4, gamma = 0.5, R = N/8, low-pass of keys and values in all layers. Changed are gamma (the share that is
kept), S (sink tokens), R (recent tokens), N (the window, with its bytes), what is low-passed (keys, values, both), which
frequencies are kept, and in which layers; beside them sinks + most recent and every other entry (no filter at all). Then,
folded eight times while a window enters, how many of the entries are low frequencies, the others being the most recent tokens.
The text must fit into the model's context.

    python examples/ablation.py
    python examples/ablation.py --model smollm2 --windows 512 --text-files book1.txt book2.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from loading import Formatter, load, model_name
from measuring import (
    BLOCK_KEYS,
    Totals,
    add_measuring_arguments,
    context_length,
    divergence_rows,
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
from transformers import DynamicCache, PreTrainedConfig

import freqkv
from freqkv import FreqKVCache, Span, dct, idct, keep_recent, low_pass, low_pass_entries
from freqkv.evaluation import Method, paired_bootstrap

REFERENCE, BASE = "full", "base: S = 4, gamma = 0.5, R = N/8, low-pass"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add_measuring_arguments(parser, methods=[])
    parser.add_argument("--length", type=positive, default=8, help="tokens of a document, in windows")
    parser.add_argument("--documents", type=positive, default=2, help="stretches of each text, if it is long enough")
    return parser.parse_args(arguments)


# What a span is compressed to


def every_other(x: Tensor, keep: int) -> Tensor:
    """`keep` of the entries, evenly spread."""
    n = x.shape[-2]
    return x[..., (torch.arange(keep, device=x.device) * n + n // 2) // keep, :]


def high_pass(x: Tensor, keep: int) -> Tensor:
    """The `keep` highest frequencies in place of the lowest, and the mean."""
    coefficients = dct(x, dim=-2)
    kept = torch.cat([coefficients[..., :1, :], coefficients[..., 1 - keep :, :]], dim=-2)
    return idct(kept, dim=-2) * (keep / x.shape[-2]) ** 0.5


def only_mean(x: Tensor, keep: int) -> Tensor:
    return x.mean(dim=-2, keepdim=True).expand(*x.shape[:-2], keep, x.shape[-1])


def of_both(keys: Callable, values: Callable) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    return lambda k, v, keep: (keys(k, keep), values(v, keep))


def low(x: Tensor, keep: int) -> Tensor:
    return low_pass(x, keep, dim=-2)


def in_layers(start: float, stop: float, layers: int) -> Callable[[Span], tuple[Tensor, Tensor]]:
    """The low-pass in some layers, the most recent in the others."""

    def compressor(span: Span) -> tuple[Tensor, Tensor]:
        own = start * layers <= span.layer_idx < stop * layers
        return (low_pass_entries if own else keep_recent)(span.keys, span.values, span.keep)

    return compressor


def older_low_passed(share: float, layers: int, start: float = 0, stop: float = 1) -> freqkv.Compressor:
    """Of what is kept, a share of low frequencies in some layers, and the most recent entries as they are."""

    def compressor(span: Span) -> tuple[Tensor, Tensor]:
        own = start * layers <= span.layer_idx < stop * layers
        low_passed = round(share * span.keep) if own else 0
        if not low_passed:
            return keep_recent(span.keys, span.values, span.keep)
        exact = span.keep - low_passed
        older = span.keys.shape[-2] - exact

        def squeezed(x: Tensor) -> Tensor:
            return torch.cat([low(x[..., :older, :], low_passed), x[..., older:, :]], dim=-2)

        return squeezed(span.keys), squeezed(span.values)

    return compressor


def changes(layers: int) -> dict[str, tuple[str, Method]]:
    """Name of each setting: which number or part it changes, and the method."""

    def with_numbers(
        name: str, compressor: freqkv.Compressor = low_pass_entries, larger: float = 1, **changed: float
    ) -> Method:
        def make(config: PreTrainedConfig, window: int) -> FreqKVCache:
            size = int(window * larger)
            numbers = {"sink_tokens": 4, "retain_ratio": 0.5, "recent_tokens": 1 / 8} | changed
            for tokens in ("sink_tokens", "recent_tokens"):  # below 1: a share of the window
                numbers[tokens] = int(numbers[tokens] * (size if numbers[tokens] < 1 else 1))
            return FreqKVCache(config, window=size, compressor=compressor, **numbers)  # type: ignore[arg-type]

        return Method(name, make)

    made: dict[str, tuple[str, Method]] = {}

    def add(group: str, name: str, **more) -> None:
        made[name] = group, with_numbers(name, **more)

    add("base", BASE)
    add("gamma", "gamma = 0.25", retain_ratio=0.25)
    add("gamma", "gamma = 0.75", retain_ratio=0.75)
    for sinks, told in ((0, "0"), (1, "1"), (16, "16"), (1 / 8, "N/8")):
        add("S", f"S = {told}", sink_tokens=sinks)
    add("R", "R = 0 (paper)", recent_tokens=0)
    add("R", "R = N/4", recent_tokens=1 / 4)
    add("R", "R = 7N/16", recent_tokens=7 / 16)
    add("N", "N/2", larger=1 / 2)
    add("N", "2N", larger=2)
    add("keys, values", "low-pass of keys, every other value", compressor=of_both(low, every_other))
    add("keys, values", "every other key, low-pass of values", compressor=of_both(every_other, low))
    add("keys, values", "every other entry", compressor=of_both(every_other, every_other))
    add("frequencies", "mean and highest frequencies", compressor=of_both(high_pass, high_pass))
    add("frequencies", "mean only", compressor=of_both(only_mean, only_mean))
    for third, (start, stop) in enumerate(((0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1))):
        name = ("first", "middle", "last")[third]
        add("layers", f"low-pass in the {name} third of the layers", compressor=in_layers(start, stop, layers))
    add("layers", "sinks + most recent in all layers", compressor=keep_recent)
    add("layers", "sinks + most recent in all layers, R = 0", compressor=keep_recent, recent_tokens=0)
    often = {"retain_ratio": 7 / 8, "recent_tokens": 0}
    for share, told in ((0, "none"), (1 / 8, "1/8"), (1 / 4, "1/4"), (1 / 2, "1/2"), (1, "all")):
        add("share", f"low-passed of what is kept: {told}", compressor=older_low_passed(share, layers), **often)
    for third, (start, stop) in enumerate(((0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1))):
        name = f"low-passed: 1/4, in the {('first', 'middle', 'last')[third]} third of the layers"
        add("share", name, compressor=older_low_passed(1 / 4, layers, start, stop), **often)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prepare(args)
    model, tokenizer = load(args)
    freqkv.patch(model)
    found = texts(args)
    context = context_length(model)
    window = (args.windows or [context // args.length])[0]
    if args.length * window > context:
        raise SystemExit(
            f"{args.length * window} tokens leave the model's context of {context}: take a smaller --windows or --length"
        )
    made = changes(model.config.get_text_config(decoder=True).num_hidden_layers)
    about = settings(args, model, found, length=args.length, documents=args.documents)
    records = open_records(args, "ablation", BLOCK_KEYS, ("tokens", "kl", "same_top", "nats"), about)
    full = Method(REFERENCE, lambda config, size: DynamicCache(config=config), bounded=False)
    for document in progress(
        records.share(documents(found, tokenizer, args.length * window, args.documents)), "ablation"
    ):
        last = [dict(zip(BLOCK_KEYS, (window, name, document.name, args.length - 1), strict=True)) for name in made]
        missing = {key["method"]: made[key["method"]][1] for key in last if key not in records}
        if missing:
            rows = divergence_rows(model, document, {REFERENCE: full} | missing, REFERENCE, window, window)
            records.add(row for row in rows)
    rows = records.finish()
    if records.is_main:
        report(records.path, rows, window, args.length, model_name(args), made)


def report(
    path: Path, rows: list[dict[str, str]], window: int, length: int, name: str, made: dict[str, tuple[str, Method]]
) -> None:
    totals = Totals(rows, window, made)
    shown, bars = [], []
    for method, (group, _) in made.items():
        cells = []
        for start, stop in ((1, 2), (2, length)):
            found = paired_bootstrap(
                totals.blocks(method, "kl", start, stop), totals.blocks(method, "tokens", start, stop)
            )
            cells.append(f"{found.estimate:.4f} [{found.low:.4f}, {found.high:.4f}]")
        bars.append((group, method, found))
        shown.append([group, method, *cells, f"{totals.ratio(method, 'same_top', 'tokens', 1, length):.1%}"])
    title = (
        f"**KL(full cache || setting)** in nats per token with its 95 % interval, and how often both find the same token the "
        f"likeliest beyond N, {name}, N = {window}, {len(totals.documents)} documents of {length}N tokens. One thing is "
        "changed at a time"
    )
    head = ["changed", "setting", "N..2N", f"2N..{length}N", "same token"]
    write_markdown(path.with_suffix(".md"), [(title, head, shown)])

    figure, axis = new_figure(size=(8.5, 0.27 * len(bars) + 1.2))
    groups = list(dict.fromkeys(group for group, _, _ in bars))
    for place, (group, _, found) in enumerate(bars):
        error = [[found.estimate - found.low], [found.high - found.estimate]]
        axis.barh(place, found.estimate, color=style(groups.index(group) + 1)["color"])
        axis.errorbar(found.estimate, place, xerr=error, color="black", linewidth=0.8, capsize=2)
    axis.axvline(bars[0][2].estimate, color="black", linestyle=":", linewidth=0.8)
    axis.set_yticks(range(len(bars)), [method for _, method, _ in bars], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"KL to the full cache at 2N..{length}N, nats per token (less is better)")
    axis.set_title(f"{name}, N = {window}; dotted: the base setting", fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    save_figure(figure, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
