"""Which families of transformers' causal language models FreqKV serves, checked on a tiny random model of each.

A family that `freqkv.supported` serves must equal `DynamicCache` below the window, and give past it the same in one pass
and in chunks, with each attention implementation that it has. The table goes to a CSV file and into results/README.md,
between two comments; one that another version of transformers left there is completed.

    python examples/families.py
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import textwrap
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import torch
import transformers
from loading import Formatter
from tqdm import tqdm
from transformers import DynamicCache

import freqkv
from freqkv import FreqKVCache
from freqkv.models.rules import rule_for
from freqkv.models.upstream import TESTED

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
sys.path.append(str(ROOT / "tests"))

import every_family as every  # noqa: E402 - what the tests of all families do, and where they make exceptions
import zoo  # noqa: E402
from running import close  # noqa: E402

VERSION = ".".join(transformers.__version__.split(".")[:2])
COLUMNS = ["family", "status", "layers", "rotation", "attention", "reason", "transformers"]
SERVED, REFUSED, NOT_BUILT = "served", "refused", "not built"
REASONS = {  # what an error says, and in short
    "has no rotary position embeddings": "no rotary module (most have learned, ALiBi or relative positions)",
    "has no attention layers with rotary": "no attention layers with rotary embeddings and a key-value cache",
    "keeps a DynamicIndexedLayer": "sparse attention picks single tokens, which no longer exist once they are compressed",
    "has no full attention layer": "no full attention layer, so that nothing grows",
    r"is not supported: ([^.]*)": r"\1",
    "vision tower needs": "needs the package timm, which was not installed",
    "read the target model's keys": "all layers read the keys of another model, without which this version does not build it",
}
BEGIN, END = "<!-- families -->", "<!-- /families -->"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--csv", type=Path, default=RESULTS / "families.csv")
    parser.add_argument("--readme", type=Path, default=RESULTS / "README.md", help="the file with the two comments")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    transformers.logging.set_verbosity_error()  # tiny vocabularies, which token ids of the defaults exceed
    torch.set_num_threads(1)
    found = []
    for family in (bar := tqdm(zoo.families(), unit="family")):
        bar.set_description(f"{family:<24.24}")
        found.append(looked_at(family))
    rows = merged(read(args.csv) if args.csv.exists() else [], found)
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    args.readme.write_text(updated(args.readme.read_text(), rows))
    print(count(rows))


def looked_at(family: str) -> dict[str, str]:
    """The row of a family."""
    row = dict.fromkeys(COLUMNS, "") | {"family": family, "transformers": VERSION}
    if family in zoo.NOT_BUILT:
        return row | {"status": NOT_BUILT, "reason": in_short(zoo.NOT_BUILT[family])}
    model = zoo.tiny_model(family)
    support = freqkv.supported(model)
    if not support:
        return row | {"status": REFUSED, "reason": in_short(support.reason)}
    checked = {}
    for attention in every.ATTENTION:
        try:
            model.set_attn_implementation(attention)
        except ValueError:
            continue  # transformers has none for this family
        try:
            checked[attention] = check(family, attention, model)
        except AssertionError as error:
            raise RuntimeError(f"{family} with {attention} attention does not give what it should: {error}") from error
    rotation = rotation_in_words(support.analysis, checked["eager"])
    layers = layers_in_words(model, support.analysis)
    return row | {"status": SERVED, "layers": layers, "rotation": rotation, "attention": " ".join(checked)}


@torch.no_grad()
def check(family: str, attention: str, model) -> FreqKVCache:
    """Below the window what DynamicCache gives, past it the same in one pass and in chunks. Returns the cache."""
    ids = torch.randint(3, 100, (2, every.LENGTH), generator=torch.Generator().manual_seed(1))
    window = every.N
    own_cache = rule_for(model.config.get_text_config(decoder=True)).cache_class is not None
    uneven = family in every.OWN_SPLITS_DIFFER
    splits = [window] if uneven or own_cache else [9, 1, 5]
    plain_cache = None if own_cache else DynamicCache(config=model.config)  # it takes only one that it made itself
    plain = every.feed(model, ids[:, :window], plain_cache, splits)

    def cache() -> FreqKVCache:
        return FreqKVCache(model.config, window=window, sink_tokens=every.SINKS, recent_tokens=every.RECENT)

    with freqkv.patch(model):
        if (family, attention) not in every.SEES_AHEAD:
            logits = every.feed(model, ids[:, :window], cache(), splits)
            equal = close(logits, plain, 1e-6) if family in every.OTHER_KERNEL else torch.equal(logits, plain)
            assert equal, "below the window"
        whole = every.feed(model, ids, last := cache(), [every.LENGTH])
        chunks = every.feed(model, ids, cache(), [window] if uneven else every.CHUNKS)
        assert close(chunks, whole, every.LOOSE.get(family, 3e-4)), "past the window"
    return last


def layers_in_words(model, analysis: freqkv.models.layers.Analysis) -> str:
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    left = set()
    for index, kind in analysis.others.items():
        own = types[index] if index < len(types) else ""
        if kind == "DynamicSlidingWindowLayer":
            left.add("chunked" if own.startswith("chunked") else "sliding")
        elif kind == "LinearAttentionLayer":
            left.add("convolution" if own == "conv" else "linear")
        elif kind == "DynamicLayer":
            left.add("cross-attention")
        elif kind != "DummyLayer":  # which keeps nothing
            left.add(kind)
    compressed = "full attention" if left else "all"
    if any(layer.reads_shared for layer in analysis.layers):
        compressed += ", read by later layers too"
    states = ["states beside attention"] if any(layer.hybrid for layer in analysis.layers) else []
    kinds = " and ".join([*sorted(left), *states])
    return f"{compressed}; {kinds} left to transformers" if kinds else compressed


def rotation_in_words(analysis: freqkv.models.layers.Analysis, cache: FreqKVCache) -> str:
    words = set()
    for layer in analysis.layers:
        how = layer.rotation
        if layer.reads_shared or how is None:
            continue
        channels = getattr(cache.layers[layer.layer_idx], how.stream).shape[-1]
        of = [] if how.dims == channels else [f"first {Fraction(how.dims, channels)} of the channels"]
        of += ["second tensor (MLA)"] if how.stream == "values" else []
        of += ["reversed"] if how.reverse else []
        words.add(", ".join([how.pairing, *of]))
    if any(layer.rotation is None and not layer.reads_shared for layer in analysis.layers):
        words.add("none in some layers" if words else "none")
    return "; ".join(sorted(words))


def in_short(reason: str) -> str:
    for pattern, short in REASONS.items():
        if match := re.search(pattern, reason):
            return match.expand(short)
    return reason


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def by_number(versions) -> list[str]:
    return sorted(versions, key=lambda version: [int(part) for part in version.split(".")])


def merged(rows: list[dict[str, str]], found: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of the other tested version and those found with this one; versions that say the same share a row."""
    versions = defaultdict(set)
    for row in rows:
        versions[tuple(row[name] for name in COLUMNS[:-1])] |= set(row["transformers"].split()) & set(TESTED) - {
            VERSION
        }
    for row in found:
        versions[tuple(row[name] for name in COLUMNS[:-1])].add(VERSION)
    known = ((key, " ".join(by_number(on))) for key, on in sorted(versions.items()) if on)
    return [dict(zip(COLUMNS, [*key, on], strict=True)) for key, on in known]


def count(rows: list[dict[str, str]]) -> str:
    """The sentence before the table."""
    counts = defaultdict(lambda: dict.fromkeys([SERVED, REFUSED, NOT_BUILT], 0))
    for row in rows:
        for version in row["transformers"].split():
            counts[version][row["status"]] += 1
    newest, *others = reversed(by_number(counts))
    also = "; ".join(f"{version}: {counts[version][SERVED]} of {sum(counts[version].values())}" for version in others)
    return (
        f"Of the {sum(counts[newest].values())} model types that transformers {newest} maps to causal language models, FreqKV "
        f"serves **{counts[newest][SERVED]}** and refuses {counts[newest][REFUSED]} by name; {counts[newest][NOT_BUILT]} could "
        f"not be built for the check" + (f" ({also})." if also else ".")
    )


def block(rows: list[dict[str, str]]) -> str:
    """What stands in results/README.md between the comments."""
    newest = by_number({version for row in rows for version in row["transformers"].split()})[-1]
    served, others = defaultdict(list), {REFUSED: defaultdict(list), NOT_BUILT: defaultdict(list)}
    for row in rows:
        if row["status"] == SERVED:
            versions = ", ".join(row["transformers"].split())
            served[row["layers"], row["rotation"], row["attention"].replace(" ", ", "), versions].append(row["family"])
        else:
            only = "" if newest in row["transformers"].split() else f" ({', '.join(row['transformers'].split())})"
            others[row["status"]][row["reason"]].append(row["family"] + only)
    lines = [BEGIN, *textwrap.wrap(count(rows), 120), "", "<details>", "<summary>All families</summary>", ""]
    lines += ["| families | compressed layers | rotation of keys | attention checked | transformers |"]
    lines += ["|---|---|---|---|---|"]
    for cells, families in sorted(served.items(), key=lambda item: (-len(item[1]), item)):
        lines.append(f"| {', '.join(families)} | {' | '.join(cells)} |")
    for status, reasons in others.items():
        lines += ["", f"{status.capitalize()}:", ""]
        for reason, families in sorted(reasons.items(), key=lambda item: (-len(item[1]), item)):
            lines.append(f"- {reason}: {', '.join(families)}")
    return "\n".join([*lines, "", "</details>", END])


def updated(readme: str, rows: list[dict[str, str]]) -> str:
    before, rest = readme.split(BEGIN)
    return before + block(rows) + rest.split(END)[1]


if __name__ == "__main__":
    main()
