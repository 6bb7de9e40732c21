"""A conversation: facts told in early turns, asked for many turns later, at equal bytes.

The user tells some facts, then shows paragraphs of a text, turn after turn, until the conversation is as long as asked for;
then asks for one of the facts. The tokenizer's chat template is in use, where it has one; otherwise turns are separated by
empty lines.

    python examples/conversation.py
    python examples/conversation.py --model smollm2 --windows 512 --text-files book.txt
"""

from __future__ import annotations

import argparse
import functools
import random
import re
from collections.abc import Sequence
from pathlib import Path

from loading import Formatter, is_shipped, load, model_name
from measuring import (
    add_measuring_arguments,
    beside,
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
from transformers import PreTrainedTokenizerBase

import freqkv
from freqkv.evaluation import CODE, PROSE, Question, Sample, Wording, ask, wilson_interval

KEYS = ("window", "method", "length", "sample", "question")
VALUES = ("turns", "distance", "score", "answers", "reply")
PARAGRAPH = 96  # tokens of text in a turn


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add_measuring_arguments(parser)
    group = parser.add_argument_group("conversation")
    group.add_argument(
        "--lengths", type=float, nargs="+", default=[0.9, 2, 4, 8], help="of the conversation, in windows"
    )
    group.add_argument("--samples", type=positive, default=7, help="conversations of each length")
    group.add_argument("--facts", type=positive, default=4, help="told in the first turns, all asked for")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--max-new-tokens", type=positive, default=32, help="of a reply")
    return parser.parse_args(arguments)


class Conversations:
    """Conversations over a text, with or without a chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, wording: Wording) -> None:
        self.tokenizer, self.wording = tokenizer, wording
        self.has_template = getattr(tokenizer, "chat_template", None) is not None
        self.sentences = [part for part in re.split(wording.boundary, text) if part.strip()]
        self.sizes = [
            len(ids) for ids in tokenizer(self.sentences, add_special_tokens=False, verbose=False)["input_ids"]
        ]

    def rendered(self, turns: Sequence[dict[str, str]], generate: bool) -> str:
        if self.has_template:
            return self.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=generate)
        return "\n\n".join(turn["content"] for turn in turns)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=not self.has_template, verbose=False)

    def turn(self, said: str, answer: str) -> list[dict[str, str]]:
        both = [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        return both if self.has_template else both[:1]

    def sample(self, length: int, facts: int, seed: str) -> tuple[Sample, int]:
        """A conversation of at most `length` tokens with a question for each fact; and how many turns it has."""
        rng = random.Random(f"{seed} {length}")
        words = self.wording
        pairs = words.pairs(rng, facts)
        turns: list[dict[str, str]] = []
        for key, value in pairs:
            turns += self.turn(words.fact.format(key=key, value=value).strip(), "Thank you, I will remember that.")
        told = len(self.encode(self.rendered(turns, False)))
        if told > length:
            raise SystemExit(f"--lengths: {length} tokens have no room for {facts} facts, which take {told}")
        at = rng.randrange(len(self.sentences))
        ids = self.encode(self.rendered(turns, False))
        while True:
            size, paragraph = 0, ""
            while size < PARAGRAPH:
                paragraph += self.sentences[at % len(self.sentences)]
                size += self.sizes[at % len(self.sentences)]
                at += 1
            longer = [
                *turns,
                *self.turn(paragraph.strip() if self.has_template else paragraph.strip("\n"), "I have read this part."),
            ]
            if not self.rendered(longer, False).startswith(self.rendered(turns, False)):
                raise SystemExit("this chat template rewrites earlier turns, so that a cache cannot go on from them")
            more = self.encode(self.rendered(longer, False))
            if len(more) > length:
                break
            turns, ids = longer, more
        questions = []
        for key, value in pairs:
            said = words.question.format(key=key) if self.has_template else words.question.format(key=key).strip("\n")
            whole = self.rendered([*turns, {"role": "user", "content": said}], True)
            before = self.rendered(turns, False)
            if not whole.startswith(before):
                raise SystemExit("this chat template rewrites earlier turns, so that a cache cannot go on from them")
            asked = self.tokenizer.encode(whole[len(before) :] + words.answer.format(key=key), add_special_tokens=False)
            questions.append(Question(tuple(asked), (value,), 0.0, len(ids) - told))
        return Sample("conversation", tuple(ids), tuple(questions)), len(turns) // (2 if self.has_template else 1)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prepare(args)
    model, tokenizer = load(args)
    freqkv.patch(model)
    found = texts(args)
    wording = CODE if is_shipped(args) else PROSE
    talks = Conversations(tokenizer, "\n\n".join(text for _, text in found), wording)
    sizes = windows(args, model)
    check_methods(args, model, sizes)
    for window in sizes:
        talks.sample(
            round(min(args.lengths) * window), args.facts, f"{args.seed} 0"
        )  # what has no room ends the script here
    about = settings(
        args,
        model,
        found,
        seed=args.seed,
        facts=args.facts,
        chat=talks.has_template,
        max_new_tokens=args.max_new_tokens,
    )
    records = open_records(args, "conversation", KEYS, VALUES, about)
    units = [
        (window, method, length, number)
        for window in sizes
        for length in args.lengths
        for number in range(args.samples)
        for method in args.methods.values()
    ]
    for window, method, length, number in progress(records.share(units), "conversation"):
        row = dict(zip(KEYS, (window, method.name, length, number, args.facts - 1), strict=True))
        if row in records:
            continue
        sample, turns = talks.sample(round(length * window), args.facts, f"{args.seed} {number}")
        make = functools.partial(method.make, model.config, window)
        (replies,) = ask(model, tokenizer, [sample], make, args.max_new_tokens, window)
        records.add(
            row | {
                "question": index,
                "turns": turns,
                "distance": question.distance,
                "score": reply.score,
                "answers": " ".join(question.answers),
                "reply": " ".join(reply.text.split()),
            }
            for index, (question, reply) in enumerate(zip(sample.questions, replies, strict=True))
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
    methods = list(order)
    rows = common(rows, methods, [key for key in KEYS if key != "method"])
    figure, axes = new_figure(1, len(sizes), size=(4.2 * len(sizes) + 2, 4))
    tables = []
    for axis, window in zip([axes] if len(sizes) == 1 else axes, sizes, strict=True):
        lengths = sorted({float(row["length"]) for row in rows if int(row["window"]) == window})
        shown = []
        for index, method in enumerate(methods):
            cells, points = [], []
            for length in lengths:
                got = [
                    float(row["score"])
                    for row in rows
                    if (row["method"], int(row["window"]), float(row["length"])) == (method, window, length)
                ]
                found = wilson_interval(sum(got), len(got))
                points.append(found)
                cells.append(f"{found.estimate:.0%} [{found.low:.0%}, {found.high:.0%}] {len(got)}".replace("%", ""))
            shown.append([label(method), *cells])
            # Side by side, so that no interval hides another.
            places = [i + beside(index, len(methods)) for i in range(len(lengths))]
            errors = [[p.estimate - p.low for p in points], [p.high - p.estimate for p in points]]
            axis.errorbar(
                places,
                [p.estimate for p in points],
                errors,
                label=label(method),
                capsize=2,
                **style_of(method, methods),
            )
        turns = {
            n: max(int(r["turns"]) for r in rows if int(r["window"]) == window and float(r["length"]) == n)
            for n in lengths
        }
        past = ", ".join(f"{n:g}N" for n in lengths if n * window > context)
        title = (
            f"**Facts of the first turns**, {name}, N = {window}: share of answers, its 95 % interval, questions"
            f"{f' (past the context of the model: {past})' if past else ''}"
        )
        tables.append((title, ["method", *(f"{n:g}N, {turns[n]} turns" for n in lengths)], shown))
        axis.set_xticks(range(len(lengths)), [f"{length:g}N" for length in lengths])
        axis.set_xlabel("length of the conversation")
        axis.set_ylabel("share of answers")
        axis.set_ylim(-0.03, 1.03)
        axis.set_title(f"N = {window}")
        axis.grid(alpha=0.3)
    legend_above(figure, axis, 3)
    write_markdown(path.with_suffix(".md"), tables)
    save_figure(figure, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
