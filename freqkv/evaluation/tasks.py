"""Recall tasks: texts with facts in them and questions behind them, of any length, seeded.

A :class:`Haystack` puts facts into a text and asks for them at its end, in the kinds of RULER (arXiv 2404.06654): one needle,
several keys, several values of a key, several keys in one question, variables that were set from each other, frequent words,
and a list of key-value pairs. The text and the questions are apart, so that a text that was read once can be asked several
questions, each of which comes after the cache has compressed the text.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from freqkv.evaluation.wordings import PROSE, Wording

__all__ = ["TASKS", "Haystack", "Question", "Sample"]

TASKS = (
    "single_needle",
    "several_keys",
    "several_values",
    "several_queries",
    "variable_tracking",
    "frequent_words",
    "key_value_pairs",
)
"""The names that :meth:`Haystack.sample` takes."""

DRAWS = 100  # of a list of words, until it has no ties
_MARK = "\u2402text\u2403"  # stands for the text while a chat template is rendered


@dataclass(frozen=True)
class Question:
    """What is asked behind a text.

    Attributes
    ----------
    ids : tuple of int
        Token ids that follow the text's: the question, the end of the user's turn with a chat template, and the beginning of
        the answer.
    answers : tuple of str
        Words that the reply must hold, in any order.
    depth : float
        Where the first needed fact stands in the text, from 0 (start) to 1 (end).
    distance : int
        Tokens from the end of that fact to the end of the text.
    """

    ids: tuple[int, ...]
    answers: tuple[str, ...]
    depth: float
    distance: int


@dataclass(frozen=True)
class Sample:
    """A text, and questions each of which is asked by itself.

    Attributes
    ----------
    task : str
        One of `TASKS`.
    ids : tuple of int
        Token ids of the text, with what a chat template puts before it.
    questions : tuple of Question
    """

    task: str
    ids: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass
class _Asked:
    """A question before it is tokenized; `end` is where its fact ends in the text, None where the whole text is needed."""

    end: int | None
    question: str
    beginning: str
    answers: tuple[str, ...]


_Fact: TypeAlias = tuple[float, str]  # the depth that it wants, and its sentence


class Haystack:
    """Samples of all tasks over one text.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the model that is asked.
    text : str
        What the facts are hidden in; stretches of it are drawn, which go on from its start where it ends.
    wording : Wording
        How facts and questions are written; :data:`PROSE` by default, :data:`CODE` for models of program code.
    chat : bool
        Whether text and question are a user's turn of the tokenizer's chat template.

    Raises
    ------
    ValueError
        If `chat` is asked of a tokenizer without a chat template, or if its template does not show the text as it is.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text: str, wording: Wording = PROSE, chat: bool = False
    ) -> None:
        self._tokenizer, self._wording = tokenizer, wording
        self.tasks = tuple(task for task in TASKS if task in wording.tasks)
        pieces = [piece for piece in re.split(wording.boundary, text) if piece]
        if not pieces:
            raise ValueError("text is empty")
        self._pieces: list[list[int]] = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        self._head, self._tail = self._turn() if chat else ("", "")
        self._start = [] if chat else _start_ids(tokenizer)

    def _turn(self) -> tuple[str, str]:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise ValueError("chat=True needs a tokenizer with a chat template: pass chat=False, or set one")
        said = [{"role": "user", "content": _MARK}]
        rendered: Any = self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        head, mark, tail = rendered.partition(_MARK)
        if not mark or _MARK in tail:
            raise ValueError("this chat template does not show the user's text once, as it is: pass chat=False")
        return head, tail

    def sample(
        self, task: str, length: int, seed: int | str, depth: float | None = None, facts: int | None = None
    ) -> Sample:
        """A text of `length` tokens and its questions.

        Parameters
        ----------
        task : str
            One of :attr:`tasks`, those of `TASKS` that the wording has.
        length : int
            Tokens of the text, with all that stands before it: as many as asked for, or a few less where words end. Questions
            come on top.
        seed : int or str
            The same seed, task, length and text give the same sample, in every process.
        depth : float, optional
            Where the needle of ``single_needle`` stands, from 0 to 1; drawn by default.
        facts : int, optional
            How many keys, values or variables; by default 8 keys (``several_keys``), 4 values, 4 keys of which 2 are asked for
            (``several_queries``), chains of 4 variables, and as many pairs or words as the length
            holds (of pairs, as many as there are keys).

        Returns
        -------
        Sample
            ``several_keys`` and ``key_value_pairs`` have a question for each of up to 8 keys, the others one.

        Raises
        ------
        ValueError
            If there is no such task, if `depth` or `facts` do not belong to it, or if the facts do not fit into `length`.
        """
        if task not in self.tasks:
            raise ValueError(f"there is no task {task!r} in this wording: take one of {', '.join(self.tasks)}")
        if depth is not None and (task != "single_needle" or not 0 <= depth <= 1):
            raise ValueError(f"depth={depth} is from 0 to 1, and of single_needle only")
        if facts is not None and (facts < 1 or task == "single_needle"):
            raise ValueError(f"facts={facts} must be at least 1, and is not of single_needle")
        rng = random.Random(f"{seed} {task} {length}")
        words = self._wording
        instruction = words.instruction_list if task in ("frequent_words", "key_value_pairs") else words.instruction
        start = [*self._start, *self._encode(self._head + instruction)]
        write: Callable[[random.Random, int, Any], tuple[list[int], list[_Asked]]] = getattr(self, f"_{task}")
        body, asked = write(rng, length - len(start), depth if task == "single_needle" else facts)
        ids = (*start, *body)
        questions = []
        for each in asked:
            between = self._tail or (" " if each.beginning else "")
            after = self._encode(words.before_question + each.question + between + each.beginning)
            end = 0 if each.end is None else each.end
            questions.append(Question(tuple(after), each.answers, end / max(1, len(body)), len(body) - end))
        return Sample(task, ids, tuple(questions))

    # The tasks: the tokens of a text of at most `room` tokens, and what is asked

    def _single_needle(self, rng: random.Random, room: int, depth: float | None) -> tuple[list[int], list[_Asked]]:
        pairs = self._wording.pairs(rng, 1)
        return self._each_asked(rng, room, pairs, [rng.random() if depth is None else depth])

    def _several_keys(self, rng: random.Random, room: int, facts: int | None) -> tuple[list[int], list[_Asked]]:
        count = 8 if facts is None else facts
        return self._each_asked(rng, room, self._wording.pairs(rng, count), _spread(rng, count))

    def _each_asked(
        self, rng: random.Random, room: int, pairs: Sequence[tuple[str, str]], places: Sequence[float]
    ) -> tuple[list[int], list[_Asked]]:
        words = self._wording
        told = [(place, words.fact.format(key=k, value=v)) for place, (k, v) in zip(places, pairs, strict=True)]
        body, ends = self._hidden(rng, room, told)
        return body, [
            _Asked(end, words.question.format(key=key), words.answer.format(key=key), (value,))
            for end, (key, value) in zip(ends, pairs, strict=True)
        ]

    def _several_values(self, rng: random.Random, room: int, facts: int | None) -> tuple[list[int], list[_Asked]]:
        words, count = self._wording, 4 if facts is None else facts
        pairs = words.pairs(rng, count)
        key, values = pairs[0][0], tuple(value for _, value in pairs)
        told = [(at, words.one_of.format(key=key, value=v)) for at, v in zip(_spread(rng, count), values, strict=True)]
        body, ends = self._hidden(rng, room, told)
        question = words.question_all.format(key=key, count=count)
        return body, [_Asked(ends[0], question, words.answer_all.format(key=key), values)]

    def _several_queries(self, rng: random.Random, room: int, facts: int | None) -> tuple[list[int], list[_Asked]]:
        words, count = self._wording, 4 if facts is None else facts
        pairs = words.pairs(rng, count)
        told = [
            (place, words.fact.format(key=k, value=v)) for place, (k, v) in zip(_spread(rng, count), pairs, strict=True)
        ]
        body, ends = self._hidden(rng, room, told)
        chosen = sorted(rng.sample(range(count), min(2, count)))
        question = words.question_each.format(keys=" and ".join(f"the {pairs[i][0]}" for i in chosen))
        return body, [_Asked(ends[chosen[0]], question, words.answer_each, tuple(pairs[i][1] for i in chosen))]

    def _variable_tracking(self, rng: random.Random, room: int, facts: int | None) -> tuple[list[int], list[_Asked]]:
        words, count = self._wording, 4 if facts is None else facts
        names = words.names(rng, 2 * count)
        values = [value for _, value in words.pairs(rng, 2)]
        told: list[_Fact] = []
        for chain, value in zip((names[:count], names[count:]), values, strict=True):
            places = _spread(rng, count)
            told.append((places[0], words.set_value.format(name=chain[0], value=value)))
            for place, name, before in zip(places[1:], chain[1:], chain, strict=False):
                told.append((place, words.set_from.format(name=name, other=before)))
        body, ends = self._hidden(rng, room, told)
        question = words.question_names.format(value=values[0], count=count)
        return body, [_Asked(ends[0], question, words.answer_names.format(value=values[0]), tuple(names[:count]))]

    def _frequent_words(self, rng: random.Random, room: int, facts: int | None) -> tuple[list[int], list[_Asked]]:
        words, wanted = self._wording, 3 if facts is None else facts
        vocabulary = words.names(rng, 30 + wanted)
        # Those that are asked for come four times as often as each of the others. Lists that end in a tie are drawn again.
        weights = [4.0 if i < wanted else 1.0 for i in range(len(vocabulary))]
        for _ in range(DRAWS):
            drawn = rng.choices(vocabulary, weights, k=room)
            body, ends = self._listed([words.item.format(name=name) for name in drawn], room)
            counts = Counter(drawn[: len(ends)]).most_common(wanted + 1)
            if len(counts) > wanted and counts[wanted - 1][1] > counts[wanted][1]:
                break
        else:
            raise ValueError(f"{room} tokens are too few to tell which {wanted} words are the most frequent")
        answers = tuple(name for name, _ in counts[:wanted])
        return body, [_Asked(None, words.question_frequent.format(count=wanted), words.answer_frequent, answers)]

    def _key_value_pairs(self, rng: random.Random, room: int, facts: int | None) -> tuple[list[int], list[_Asked]]:
        words = self._wording
        pairs = words.pairs(rng, min(max(1, room // 8), words.most_pairs) if facts is None else facts)
        body, ends = self._listed([words.pair.format(key=key, value=value) for key, value in pairs], room)
        if not ends or (facts is not None and len(ends) < facts):
            raise ValueError(f"{room} tokens have no room for {facts or 1} pairs")
        return body, [
            _Asked(
                ends[i], words.question.format(key=pairs[i][0]), words.answer.format(key=pairs[i][0]), (pairs[i][1],)
            )
            for i in sorted(rng.sample(range(len(ends)), min(8, len(ends))))
        ]

    # Texts

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False) if text else []
        return ids

    def _hidden(self, rng: random.Random, room: int, facts: Sequence[_Fact]) -> tuple[list[int], list[int]]:
        """A stretch of the text, with facts between its pieces; and where each fact ends."""
        told = [self._encode(sentence) for _, sentence in facts]
        size = room - sum(map(len, told))
        if size < 0:
            raise ValueError(f"{room} tokens have no room for {len(facts)} facts: {-size} more are needed")
        waiting = sorted(range(len(facts)), key=lambda i: facts[i][0], reverse=True)
        body: list[int] = []
        ends = [0] * len(facts)
        read, at = 0, rng.randrange(len(self._pieces))
        while read < size or waiting:
            piece = self._pieces[at % len(self._pieces)][: size - read]
            if waiting and (facts[waiting[-1]][0] * size <= read + len(piece) / 2 or not piece):
                body += told[waiting[-1]]
                ends[waiting.pop()] = len(body)
                continue
            body += piece
            read += len(piece)
            at += 1
        return body, ends

    def _listed(self, lines: Sequence[str], room: int) -> tuple[list[int], list[int]]:
        """As many of the first lines as fit; and where each ends."""
        body: list[int] = []
        ends: list[int] = []
        for line in lines:
            ids = self._encode(line)
            if len(body) + len(ids) > room:
                break
            body += ids
            ends.append(len(body))
        return body, ends


def _spread(rng: random.Random, count: int) -> list[float]:
    """A random depth in each of `count` equal stretches of the text, so that all depths are asked for alike."""
    return [(i + rng.random()) / count for i in range(count)]


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text."""
    with_special: list[int] = tokenizer.encode("a", verbose=False)
    without: list[int] = tokenizer.encode("a", add_special_tokens=False)
    first = with_special.index(without[0]) if without and without[0] in with_special else 0
    return with_special[:first]
