"""What the measuring scripts share: arguments, texts, documents, methods, tables and figures.

Each script writes four files of one name into ``--output``/<model>: a CSV file with all rows, a JSON file with settings, text
digests, versions, hardware and commit, a Markdown table and a PNG figure. A run that was killed goes on where it was, and a
finished one only draws its table and figure again. ``accelerate launch`` shares the work among processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import lzma
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import TEST, held_out_documents
from loading import add_model_arguments, is_shipped, model_name
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from freqkv.evaluation import METHODS as REGISTERED
from freqkv.evaluation import Method, Records, divergence, method, text_digest
from freqkv.models.fingerprint import fingerprint

REPOSITORY = Path(__file__).parent
BASELINE = "recent"  # sinks + most recent: what others are compared with
METHODS = ("full", "recent", "freqkv", "freqkv-r8", "mean-r8", "attended-r8")
LABELS = {
    "full": "full cache",
    "recent": "sinks + most recent",
    "recent-r8": "sinks + most recent, R = N/8",
    "freqkv": "FreqKV, R = 0 (paper)",
    "freqkv-r8": "FreqKV, R = N/8",
    "mean-r8": "mean pooling, R = N/8",
    "attended-r8": "keep attended, R = N/8",
    "streaming": "preset streaming",
    "recommended": "preset recommended",
}
# Okabe and Ito's colours, which colour-blind readers can tell apart, and a marker for each.
STYLES = (
    ("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^"), ("#E69F00", "v"), ("#56B4E9", "D"), ("#009E73", "P"),
    ("#CC79A7", "X"), ("#8C8C8C", "*"),
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A stretch of a text, `(length,)` token ids; its name tells the text and where it begins."""

    name: str
    ids: Tensor


def add_measuring_arguments(parser: argparse.ArgumentParser, methods: Sequence[str] = METHODS) -> None:
    add_model_arguments(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--windows", type=positive, nargs="+", help="entries per layer; several for several sizes of memory"
    )
    group.add_argument(
        "--methods",
        nargs="+",
        default=list(methods),
        help="names, or for example freqkv:recent_tokens=64,retain_ratio=0.25; see freqkv.evaluation.method",
    )
    group.add_argument(
        "--methods-file", type=Path, help="a Python file that calls freqkv.evaluation.register(name, make)"
    )
    group.add_argument(
        "--text-files",
        type=Path,
        nargs="+",
        help=".txt or .txt.xz; by default held-out modules of Python for the shipped model, Python's language reference for "
        "others",
    )
    group.add_argument("--encoding", default="utf-8", help="of the text files")
    group.add_argument(
        "--output", type=Path, default=Path("runs/results"), help="a folder named after the model goes in there"
    )
    group.add_argument("--threads", type=positive, help="of torch in each process; its own choice by default")


def positive(text: str) -> int:
    """The type of arguments that count something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def prepare(args: argparse.Namespace) -> None:
    """Threads and methods of the command line; ends the script where they are wrong."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    own = {} if args.methods_file is None else methods_of(args.methods_file)
    try:
        methods = [own.get(name) or method(name) for name in args.methods]
    except ValueError as error:
        raise SystemExit(f"--methods: {error}") from None
    args.methods = {each.name: each for each in methods}


def methods_of(path: Path) -> dict[str, Method]:
    """What a file of the user registers. Rows carry a digest of the file: a method that was changed is another."""
    before = dict(REGISTERED)
    spec = importlib.util.spec_from_file_location("methods_of_the_user", path)
    if spec is None or spec.loader is None or not path.exists():
        raise SystemExit(f"--methods-file {path} is no Python file")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    made = {name: each for name, each in REGISTERED.items() if before.get(name) is not each}
    if taken := sorted(set(made) & set(before)):
        REGISTERED.update(before)
        raise SystemExit(
            f"--methods-file {path} registers {', '.join(taken)}, which is there already: take another name"
        )
    if not made:
        raise SystemExit(f"--methods-file {path} registers nothing: call freqkv.evaluation.register(name, make)")
    for name in made:
        del REGISTERED[name]
    digest = text_digest(path.read_text(encoding="utf-8"))[:6]
    return {name: dataclasses.replace(each, name=f"{name}@{digest}") for name, each in made.items()}


def check_methods(args: argparse.Namespace, model: PreTrainedModel, sizes: Iterable[int]) -> None:
    """Make each cache once, so that what cannot work ends the script before anything is measured."""
    for name, each in args.methods.items():
        for size in sizes:
            try:
                cache = each.make(model.config, size)
            except (TypeError, ValueError) as error:
                raise SystemExit(f"--methods {name}, window {size}: {error}") from None
            if not isinstance(cache, Cache):
                raise SystemExit(f"--methods {name} makes a {type(cache).__name__}, not a transformers Cache")


def open_records(
    args: argparse.Namespace, name: str, keys: Sequence[str], values: Sequence[str], about: Any
) -> Records:
    try:
        return Records(args.output / model_name(args) / f"{name}.csv", keys, values, about, REPOSITORY)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def texts(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Name and text of each document of the command line, or of the default."""
    if args.text_files is not None:
        return [(path.name.split(".")[0], read_text(path, args.encoding)) for path in args.text_files]
    if is_shipped(args):
        return held_out_documents(TEST)
    from pydoc_data.topics import topics  # Python's language reference, as prose

    return [("language_reference", "\n\n".join(topics[name] for name in sorted(topics)))]


def read_text(path: Path, encoding: str) -> str:
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        return data.decode(encoding).replace("\r\n", "\n")
    except OSError as error:
        raise SystemExit(f"--text-files: {error}") from None
    except UnicodeDecodeError as error:
        raise SystemExit(f"--text-files {path}: {error}; give its --encoding, such as cp1252") from None


def digests(found: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {name: text_digest(text) for name, text in found}


def documents(
    found: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, length: int, per_text: int
) -> list[Document]:
    """`per_text` stretches of `length` tokens of each text, evenly spread over it, or as many as do not overlap."""
    made = []
    for name, text in found:
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        count = min(per_text, len(ids) // length)
        if count == 0:
            print(f"left out, shorter than {length} tokens: {name} ({len(ids)})")
        for part in range(count):
            start = part * (len(ids) - length) // max(1, count - 1) if count > 1 else 0
            made.append(Document(f"{name}@{start}", ids[start : start + length]))
    if not made:
        raise SystemExit(f"no text has {length} tokens: give longer --text-files, or smaller --windows or --length")
    return made


def context_length(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).max_position_embeddings)


def windows(args: argparse.Namespace, model: PreTrainedModel) -> list[int]:
    """Of the command line; by default the context of a small model, else three sizes from 256 on."""
    if args.windows is not None:
        return sorted(args.windows)
    context = context_length(model)
    return [context] if context <= 1024 else [256, 512, 1024]


def progress(units: Sequence[Any], what: str) -> Iterable[Any]:
    """A bar, where there is a terminal to show it."""
    return tqdm(units, desc=what, disable=None)


def label(name: str) -> str:
    return LABELS.get(name, name.partition("@")[0])


def common(rows: Sequence[dict[str, str]], methods: Iterable[str], keys: Sequence[str]) -> list[dict[str, str]]:
    """Rows of these methods, of what all of them were measured on; `keys` tell what that is."""
    methods = list(methods)
    measured: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        measured.setdefault(tuple(row[key] for key in keys), set()).add(row["method"])
    shared = {key for key, found in measured.items() if found >= set(methods)}
    return [row for row in rows if row["method"] in methods and tuple(row[key] for key in keys) in shared]


def remarks(methods: Iterable[str], window: int, length: float, context: int) -> str:
    """What a caption has to tell of its methods."""
    methods = list(methods)
    told = ""
    if "full" in methods and length * window > context:
        told += f"; the full cache leaves the model's context of {context} tokens"
    if any(name.startswith("attended") for name in methods):
        told += "; what keeps queries has a smaller window, so that all take the same bytes"
    return told


def settings(
    args: argparse.Namespace, model: PreTrainedModel, found: Sequence[tuple[str, str]], **more: Any
) -> dict[str, Any]:
    """What figures depend on and no column tells."""
    return {
        "model": model_name(args),
        "weights": fingerprint(model).weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": args.attn_implementation,
        "texts": digests(found),
        **more,
    }


# Tables and figures


def write_markdown(path: Path, tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]]) -> None:
    """Tables of a title, a head and rows; printed as well."""
    parts = []
    for title, head, rows in tables:
        lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
        parts.append(f"{title}\n\n" + "\n".join(lines) + "\n")
    text = "\n".join(parts)
    path.write_text(text, encoding="utf-8")
    print(f"\n{text}")


def updated(text: str, folder: Path) -> str:
    """A page with the tables of the folders beside it: between ``<!-- FOLDER/FILE.md NUMBER -->`` and ``<!-- end -->``."""

    def table(found: re.Match[str]) -> str:
        parts = (folder / found["file"]).read_text(encoding="utf-8").strip().split("\n\n")
        return f"{found['begin']}\n{parts[2 * int(found['number']) + 1]}\n<!-- end -->"

    return re.sub(
        r"(?P<begin><!-- (?P<file>\S+\.md) (?P<number>\d+) -->)\n.*?<!-- end -->", table, text, flags=re.DOTALL
    )


def new_figure(*shape: int, size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*(shape or (1, 1)), figsize=size, constrained_layout=True)


def style_of(method: str, order: Sequence[str]) -> dict[str, Any]:
    """The same colour for a method in all figures; methods of the user's own take what is left."""
    own = [name for name in order if name not in METHODS]
    return style(METHODS.index(method) if method in METHODS else len(METHODS) + own.index(method))


def beside(index: int, count: int, width: float = 0.3) -> float:
    """How far to shift the points of one line of several, so that none hides another."""
    return (index - (count - 1) / 2) * width / max(1, count - 1)


def legend_above(figure: Any, axis: Any, columns: int) -> None:
    handles, names = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside upper center", ncols=columns, fontsize=8)


def style(index: int) -> dict[str, Any]:
    colour, marker = STYLES[index % len(STYLES)]
    return {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4}


def save_figure(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def bins(length: int) -> list[tuple[int, int]]:
    """0..1, 1..2, 2..4, ... in windows, up to `length`."""
    edges = [0, 1]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    return list(itertools.pairwise(edges))


def bin_name(start: int, stop: int) -> str:
    return "up to N" if start == 0 else f"{'' if start == 1 else start}N..{stop}N"


# What perplexity, divergence and ablation have in common: totals of blocks of one window each

BLOCK_KEYS = ("window", "method", "document", "block")


def divergence_rows(
    model: PreTrainedModel, document: Document, chosen: dict[str, Method], reference: str, window: int, block: int
) -> list[dict[str, Any]]:
    """Totals of each block of `block` tokens: KL to the reference in nats, equal likeliest tokens, losses in nats."""
    caches = {name: each.make(model.config, window) for name, each in chosen.items()}
    measured = divergence(model, document.ids[None], caches, reference, chunk_size=window)
    rows = []
    for name, found in measured.items():
        for index, start in enumerate(range(0, len(document.ids), block)):
            part = slice(max(start, 1) - 1, start + block - 1)
            row = dict(zip(BLOCK_KEYS, (window, name, document.name, index), strict=True))
            rows.append(row | {
                "tokens": found.losses[0, part].numel(),
                "kl": found.kl[0, part].sum().item(),
                "same_top": int(found.same_top[0, part].sum()),
                "nats": found.losses[0, part].sum().item(),
            })  # fmt: skip
    return rows


class Totals:
    """Sums of blocks of the rows of one window, by method, document and block; of the documents that all methods have read."""

    def __init__(self, rows: Sequence[dict[str, str]], window: int, order: Iterable[str]) -> None:
        self._rows: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
        for row in rows:
            if int(row["window"]) == window:
                self._rows.setdefault((row["method"], row["document"]), {})[int(row["block"])] = row
        there = {name for name, _ in self._rows}
        self.methods = [name for name in order if name in there]
        measured = {document for _, document in self._rows}
        self.documents = sorted(d for d in measured if all((name, d) in self._rows for name in self.methods))

    def blocks(self, name: str, column: str, start: int, stop: int) -> list[list[float]]:
        """Documents of blocks `start` to `stop`."""
        return [
            [float(self._rows[name, document][i][column]) for i in range(start, stop)] for document in self.documents
        ]

    def ratio(self, name: str, over: str, under: str, start: int, stop: int) -> float:
        return _sum(self.blocks(name, over, start, stop)) / _sum(self.blocks(name, under, start, stop))


def _sum(table: Sequence[Sequence[float]]) -> float:
    return sum(map(sum, table))


def minus(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)]


def main() -> None:
    """Put the tables into results/*.md, after scripts ran with ``--output examples/results``."""
    for page in (REPOSITORY / "results").glob("*.md"):
        page.write_text(updated(page.read_text(encoding="utf-8"), page.parent), encoding="utf-8")


if __name__ == "__main__":
    main()
