"""Recall by depth, length and task: facts in a text, asked for after a cache has read it all, at equal bytes.

Scores are shares of answers found word by word in the reply, with Wilson's 95 % intervals. The heat maps show single facts by
depth and length of the text.

    python examples/recall.py                                   # the shipped model, facts between lines of code
    python examples/recall.py --model smollm2 --text-files book.txt --tasks single_needle several_keys --samples 56
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from loading import Formatter, is_shipped, load, model_name
from measuring import (
    add_measuring_arguments,
    check_methods,
    common,
    context_length,
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
    windows,
    write_markdown,
)

import freqkv
from freqkv.evaluation import CODE, PROSE, TASKS, Haystack, Sample, ask, wilson_interval

KEYS = ("window", "method", "task", "length", "sample", "question")
VALUES = ("depth", "distance", "score", "answers", "reply")
DEPTHS = 8  # rows of the heat map
SINGLE = ("single_needle", "several_keys")  # one fact answers a question


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add_measuring_arguments(parser)
    group = parser.add_argument_group("questions")
    group.add_argument("--tasks", nargs="+", choices=TASKS, help="all that the wording has, by default")
    group.add_argument("--lengths", type=float, nargs="+", default=[1, 2, 4, 8], help="of the texts, in windows")
    group.add_argument(
        "--samples", type=positive, default=8, help="texts of each task and length; some have 8 questions"
    )
    group.add_argument("--batch-size", type=positive, default=4, help="texts that are read at once")
    group.add_argument(
        "--wording", choices=["prose", "code"], help="code for the shipped models, else prose, by default"
    )
    group.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="use the chat template; if there is one, by default"
    )
    group.add_argument("--seed", type=int, default=0, help="of the facts, their places and the stretches of text")
    group.add_argument("--max-new-tokens", type=positive, default=32, help="of a reply")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prepare(args)
    model, tokenizer = load(args)
    freqkv.patch(model)
    found = texts(args)
    of_code = args.wording == "code" or (args.wording is None and is_shipped(args))
    chat = getattr(tokenizer, "chat_template", None) is not None if args.chat is None else args.chat
    haystack = Haystack(tokenizer, "\n\n".join(text for _, text in found), CODE if of_code else PROSE, chat)
    tasks = args.tasks or list(haystack.tasks)
    if missing := set(tasks) - set(haystack.tasks):
        raise SystemExit(f"--wording code has no {', '.join(sorted(missing))}: it has {', '.join(haystack.tasks)}")
    sizes = windows(args, model)
    check_methods(args, model, sizes)

    def sample(window: int, task: str, length: float, number: int) -> Sample:
        depth = (number % DEPTHS + 0.5) / DEPTHS if task == "single_needle" else None  # all depths alike
        try:
            return haystack.sample(task, round(length * window), f"{args.seed} {number}", depth)
        except ValueError as error:
            raise SystemExit(f"--lengths {length:g}, task {task}, window {window}: {error}") from None

    for window, task, length in itertools.product(sizes, tasks, args.lengths):
        sample(window, task, length, 0)  # what has no room ends the script before anything is measured
    about = settings(
        args,
        model,
        found,
        wording="code" if of_code else "prose",
        chat=chat,
        seed=args.seed,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
    )
    records = open_records(args, "recall", KEYS, VALUES, about)
    units = [
        (window, method, task, length, first)
        for window in sizes
        for task in tasks
        for length in args.lengths
        for first in range(0, args.samples, args.batch_size)
        for method in args.methods.values()
    ]
    for window, method, task, length, first in progress(records.share(units), "recall"):
        numbers = range(first, min(first + args.batch_size, args.samples))
        samples = [sample(window, task, length, number) for number in numbers]
        rows = [
            [
                dict(zip(KEYS, (window, method.name, task, length, number, index), strict=True))
                for index in range(len(each.questions))
            ]
            for number, each in zip(numbers, samples, strict=True)
        ]
        if all(row in records for row in itertools.chain(*rows)):
            continue
        make = functools.partial(method.make, model.config, window)
        replies = ask(model, tokenizer, samples, make, args.max_new_tokens, window)
        answered = zip(
            itertools.chain(*rows),
            itertools.chain(*(each.questions for each in samples)),
            itertools.chain(*replies),
            strict=True,
        )
        records.add(
            row | {
                "depth": round(question.depth, 4),
                "distance": question.distance,
                "score": reply.score,
                "answers": " ".join(question.answers),
                "reply": " ".join(reply.text.split()),
            }
            for row, question, reply in answered
        )  # fmt: skip
    rows = records.finish()
    if records.is_main:
        report(
            records.path,
            rows,
            sizes,
            list(args.methods),
            context_length(model),
            model_name(args),
        )


def report(
    path: Path, rows: list[dict[str, str]], sizes: Sequence[int], order: Sequence[str], context: int, name: str
) -> None:
    tables = []
    methods = list(order)
    rows = common(rows, methods, [key for key in KEYS if key != "method"])
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    for window in sizes:
        own = [row for row in rows if int(row["window"]) == window]
        lengths = sorted({float(row["length"]) for row in own})
        for task in tasks:
            asked = [row for row in own if row["task"] == task]
            shown = [[label(m), *(cell(scores(asked, m, length)) for length in lengths)] for m in methods]
            past = ", ".join(f"{length:g}N" for length in lengths if length * window > context)
            title = (
                f"**{task.replace('_', ' ')}**, {name}, N = {window}: share of answers, its 95 % interval, questions"
                f"{f' (past the context of the model: {past})' if past else ''}"
            )
            tables.append((title, ["method", *(f"text of {length:g}N" for length in lengths)], shown))
        single = [row for row in own if row["task"] in SINGLE]
        if single:
            edges = [0.0, 0.5, 1.0, 2.0, 4.0, max(8.0, *lengths)]
            parts = list(itertools.pairwise(edges))
            shown = []
            for m in methods:
                cells = []
                for start, stop in parts:
                    got = [
                        float(row["score"]) for row in single
                        if row["method"] == m and start <= int(row["distance"]) / window < stop
                    ]  # fmt: skip
                    cells.append(cell(got))
                shown.append([label(m), *cells])
            title = (
                f"**single facts by their distance to the end of the text** ({' and '.join(SINGLE).replace('_', ' ')}), "
                f"{name}, N = {window}"
            )
            tables.append((title, ["method", *(f"{a:g}N to {b:g}N" for a, b in parts)], shown))
    write_markdown(path.with_suffix(".md"), tables)
    bars(path.with_suffix(".png"), rows, sizes, methods, tasks)
    if any(row["task"] in SINGLE for row in rows):
        heat_maps(path.with_name("recall_by_depth.png"), rows, sizes, methods)


def scores(rows: Iterable[dict[str, str]], method: str, length: float) -> list[float]:
    return [float(row["score"]) for row in rows if row["method"] == method and float(row["length"]) == length]


def cell(got: Sequence[float]) -> str:
    if not got:
        return ""
    found = wilson_interval(sum(got), len(got))
    return f"{found.estimate:.0%} [{found.low:.0%}, {found.high:.0%}] {len(got)}".replace("%", "")


def bars(
    path: Path, rows: list[dict[str, str]], sizes: Sequence[int], methods: Sequence[str], tasks: Sequence[str]
) -> None:
    """By task, texts of two windows and more together."""
    figure, axes = new_figure(len(sizes), 1, size=(1.5 * len(tasks) + 3, 3.2 * len(sizes)))
    for axis, window in zip([axes] if len(sizes) == 1 else axes, sizes, strict=True):
        width = 0.8 / len(methods)
        for index, method in enumerate(methods):
            named = False
            for place, task in enumerate(tasks):
                got = [
                    float(row["score"]) for row in rows
                    if (row["method"], row["task"], int(row["window"])) == (method, task, window) and float(row["length"]) >= 2
                ]  # fmt: skip
                if not got:
                    continue
                found = wilson_interval(sum(got), len(got))
                error = [[found.estimate - found.low], [found.high - found.estimate]]
                x = place + (index - (len(methods) - 1) / 2) * width
                axis.bar(
                    x,
                    found.estimate,
                    width * 0.9,
                    color=style_of(method, methods)["color"],
                    label=None if named else label(method),
                )
                named = True
                axis.errorbar(x, found.estimate, error, color="black", linewidth=0.8, capsize=1.5)
        axis.set_xticks(range(len(tasks)), [task.replace("_", "\n") for task in tasks])
        axis.set_ylim(0, 1)
        axis.set_ylabel("share of answers")
        axis.set_title(f"texts of 2N and more, N = {window}")
        axis.grid(axis="y", alpha=0.3)
    legend_above(figure, ([axes] if len(sizes) == 1 else axes)[0], 3)
    save_figure(figure, path)


def heat_maps(path: Path, rows: list[dict[str, str]], sizes: Sequence[int], methods: Sequence[str]) -> None:
    """Single facts by depth and length, a panel for each method and window."""
    figure, axes = new_figure(len(sizes), len(methods), size=(2.1 * len(methods) + 1.2, 2.6 * len(sizes)))
    drawn = None
    for row_index, window in enumerate(sizes):
        own = [row for row in rows if int(row["window"]) == window and row["task"] in SINGLE]
        lengths = sorted({float(row["length"]) for row in own})
        for column, method in enumerate(methods):
            axis = (
                axes[row_index, column]
                if len(sizes) > 1 and len(methods) > 1
                else axes
                if len(sizes) == len(methods) == 1
                else axes[max(row_index, column)]
            )
            shares = [
                [
                    statistics.fmean(got) if (got := [
                        float(row["score"]) for row in own
                        if row["method"] == method and float(row["length"]) == length
                        and min(int(float(row["depth"]) * DEPTHS), DEPTHS - 1) == depth
                    ]) else float("nan")
                    for length in lengths
                ]
                for depth in range(DEPTHS)
            ]  # fmt: skip
            axis.set_facecolor("lightgrey")  # no question there
            drawn = axis.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
            axis.set_xticks(range(len(lengths)), [f"{length:g}N" for length in lengths])
            axis.set_yticks([-0.5, DEPTHS / 2 - 0.5, DEPTHS - 0.5], ["0", "0.5", "1"])
            axis.set_title(label(method), fontsize=8)
            if column == 0:
                axis.set_ylabel(f"N = {window}\ndepth of the fact")
            if row_index == len(sizes) - 1:
                axis.set_xlabel("length of the text")
    figure.colorbar(drawn, ax=axes, label="share of answers (grey: no question)")
    save_figure(figure, path)


if __name__ == "__main__":
    main()
