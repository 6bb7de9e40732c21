"""The text the examples train and measure on, and the recall task placed inside it.

Every machine with Python has this text: the sources of the standard library. A fixed set of its modules,
``HELD_OUT``, is never trained on.

The recall task writes facts such as ``# register K7Q4 holds 8231`` between lines of code and asks for one of them
later by repeating the line up to ``holds``. The answer, `` 8231``, can only come from the context.
"""

from __future__ import annotations

import random
import string
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from freqkv.evaluation import RecallQuestion

VALIDATION = ("difflib", "http/cookiejar", "ipaddress", "logging/__init__")
"""Held-out modules that training may look at to report its progress."""

TEST = (
    "argparse",
    "doctest",
    "inspect",
    "pickletools",
    "statistics",
    "subprocess",
    "tarfile",
    "turtle",
    "typing",
    "unittest/mock",
    "urllib/request",
    "xml/dom/minidom",
)
"""Held-out modules that only the final figures are measured on."""

HELD_OUT = VALIDATION + TEST

LIBRARY = Path(sysconfig.get_path("stdlib"))
MAX_DOCUMENT_CHARS = 120_000
MAX_TABLE_CHARS = 2_000
SHARED_RUN_LINES = 8  # a file with this many lines of code in a row from a held-out module is not trained on

FACT = "\n# register {key} holds {value}"
QUESTION = "\n# register {key} holds"
ANSWER = " {value}"


# Documents


def training_documents() -> list[tuple[str, str]]:
    """All sources of the standard library except the held-out modules and files that repeat long parts of them.

    Returns
    -------
    list of (name, text)
        Names are paths below the library's folder, and the order is always the same. Long files are cut to
        ``MAX_DOCUMENT_CHARS`` characters and generated code tables to ``MAX_TABLE_CHARS``, so that none dominates.
    """
    held_out_runs = {run for _, text in held_out_documents() for run in _code_runs(text)}
    documents = []
    for name, text in _library_sources():
        if name.removesuffix(".py") in HELD_OUT or not held_out_runs.isdisjoint(_code_runs(text)):
            continue
        is_table = name.startswith("encodings/") and "charmap" in text
        documents.append((name, text[: MAX_TABLE_CHARS if is_table else MAX_DOCUMENT_CHARS]))
    return documents


def held_out_documents(modules: Sequence[str] = HELD_OUT) -> list[tuple[str, str]]:
    """The sources of the held-out modules.

    Parameters
    ----------
    modules : sequence of str
        Names out of ``HELD_OUT``, such as ``"http/cookiejar"``.

    Returns
    -------
    list of (name, text)
        In the order of `modules`; a module this Python does not have is left out.

    Raises
    ------
    ValueError
        If a module is not one of ``HELD_OUT``.
    """
    if unknown := set(modules) - set(HELD_OUT):
        raise ValueError(f"not held out of the training text: {sorted(unknown)}")
    paths = [(module, LIBRARY / f"{module}.py") for module in modules]
    return [(module, path.read_text(encoding="utf-8")) for module, path in paths if path.exists()]


def _library_sources() -> Iterator[tuple[str, str]]:
    for path in sorted(LIBRARY.rglob("*.py")):
        name = path.relative_to(LIBRARY)
        if not {"site-packages", "dist-packages", "__pycache__"}.isdisjoint(name.parts):
            continue
        try:
            yield name.as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the library's own tests of other encodings


def _code_runs(text: str) -> Iterator[str]:
    """Every run of ``SHARED_RUN_LINES`` lines of code; comments are left out, as licences repeat everywhere."""
    lines = [line for line in (line.strip() for line in text.splitlines()) if len(line) > 3 and line[0] != "#"]
    for start in range(len(lines) - SHARED_RUN_LINES + 1):
        yield "\n".join(lines[start : start + SHARED_RUN_LINES])


# The recall task


def random_fact(rng: random.Random) -> tuple[str, str]:
    """A key such as ``K7Q4`` and a value such as ``8231``."""
    letters, digits = string.ascii_uppercase, string.digits
    key = rng.choice(letters) + rng.choice(digits) + rng.choice(letters) + rng.choice(digits)
    return key, "".join(rng.choices(digits, k=4))


def random_facts(rng: random.Random, count: int) -> dict[str, str]:
    """`count` facts with different keys."""
    facts: dict[str, str] = {}
    while len(facts) < count:
        key, value = random_fact(rng)
        facts[key] = value
    return facts


class RecallTask:
    """Places facts and questions inside tokenised code.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        A tokenizer that splits numbers into digits, so that every fact has the same number of tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._starts_line = ["\n" in tokenizer.decode([index]) for index in range(len(tokenizer))]
        self.answer_tokens = len(self._encode(ANSWER.format(value="8231")))
        self.question_tokens = len(self._encode(QUESTION.format(key="K7Q4")))
        self.fact_tokens = self.question_tokens + self.answer_tokens
        self._key_start = len(self._encode("\n# register"))
        self._key_tokens = len(self._encode(" K7Q4"))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def fact_ids(self, key: str, value: str) -> list[int]:
        """Token ids of a fact's line, with the line break in front of it."""
        return self._encode(QUESTION.format(key=key)) + self._encode(ANSWER.format(value=value))

    def _line_starts(self, code: Sequence[int]) -> list[int]:
        """Where a line can be put in: before a token that begins with the end of a line, and at the end."""
        starts = self._starts_line
        inner = [i for i in range(1, len(code)) if starts[code[i]] and not starts[code[i - 1]]]
        return [*inner, len(code)]

    def training_sequence(
        self, rng: random.Random, code: Sequence[int], max_facts: int = 6
    ) -> tuple[list[int], list[float]]:
        """One training window with facts and questions between its lines of code.

        Parameters
        ----------
        rng : random.Random
            Source of the facts and of their places.
        code : sequence of int, length T
            Token ids of a window of code; its end gives way to the facts and questions.
        max_facts : int
            Most facts in the window; one to three questions follow each.

        Returns
        -------
        ids : list of int, length T
            The window.
        kinds : list of float, length T
            1 for answers, -1 for the keys and values that nothing in the context tells, 0 for everything else.
        """
        facts = list(random_facts(rng, rng.randint(1, max_facts)).items())
        lines = []
        for fact in facts:
            # Facts lean to the start and questions to the end: few would be far apart otherwise.
            place = 0.95 * rng.random() ** 2
            lines.append((place, fact, False))
            for _ in range(rng.randint(1, 3)):
                lines.append((1 - (1 - place) * rng.random() ** 1.5, fact, True))
        lines.sort()
        code = code[: max(len(code) - len(lines) * self.fact_tokens, 0)]
        starts = self._line_starts(code)

        ids: list[int] = []
        kinds: list[float] = []
        done = 0
        for place, fact, is_question in lines:
            start = starts[min(int(place * len(starts)), len(starts) - 1)]
            ids += code[done:start]
            kinds += [0.0] * (start - done)
            done = start
            line = self.fact_ids(*fact)
            ids += line
            kinds += [0.0] * self._key_start + [-1.0] * self._key_tokens
            kinds += [0.0] * (self.question_tokens - self._key_start - self._key_tokens)
            kinds += [1.0 if is_question else -1.0] * self.answer_tokens
        ids += code[done:]
        kinds += [0.0] * (len(code) - done)
        return ids, kinds

    def question(
        self, rng: random.Random, code: Sequence[int], distance: int, length: int, distractors: int = 3
    ) -> RecallQuestion:
        """One question whose fact stands an exact number of tokens back.

        Parameters
        ----------
        rng : random.Random
            Source of the facts and of their places.
        code : sequence of int
            Token ids of at least `length` tokens of held-out code; a random stretch of it surrounds the facts.
        distance : int
            Tokens from the first token of the fact's value to the first token of the answer.
        length : int
            Tokens of the prompt.
        distractors : int
            Other facts in the prompt, none of which is asked for.

        Returns
        -------
        RecallQuestion
            The prompt, which ends with ``holds``, and the tokens of the answer.

        Raises
        ------
        ValueError
            If the fact does not fit between the question and the prompt's start, or if `code` is too short.
        """
        between = distance - self.fact_tokens
        before = length - distance - self.question_tokens
        if between < 0 or before < 0:
            raise ValueError(f"a fact {distance} tokens back does not fit in a prompt of {length} tokens")
        if len(code) < length:
            raise ValueError(f"{length} tokens of code are needed, there are {len(code)}")
        (key, value), *others = random_facts(rng, distractors + 1).items()
        first: list[list[int]] = []
        second: list[list[int]] = []
        for other in others:
            line = self.fact_ids(*other)
            room = [before - _size(first), between - _size(second)]
            if max(room) >= len(line):
                weights = [size if size >= len(line) else 0 for size in room]
                rng.choices([first, second], weights)[0].append(line)

        start = rng.randrange(len(code) - length + 1)
        stop = start + before - _size(first)
        head = self._mix(rng, code[start:stop], first)
        # Code goes on at the start of a line where the stretch has room for it.
        latest = start + length - between
        start = next((i for i in range(stop, latest) if self._starts_line[code[i]]), stop)
        stop = start + between - _size(second)
        middle = self._mix(rng, code[start:stop], second)
        prompt = head + self.fact_ids(key, value) + middle + self._encode(QUESTION.format(key=key))
        return RecallQuestion(tuple(prompt), tuple(self._encode(ANSWER.format(value=value))), distance)

    def _mix(self, rng: random.Random, code: Sequence[int], lines: Sequence[list[int]]) -> list[int]:
        """`code` with `lines` put in at random ends of lines."""
        starts = self._line_starts(code)
        places = sorted(rng.choices(starts, k=len(lines)))
        ids: list[int] = []
        done = 0
        for place, line in zip(places, lines, strict=True):
            ids += [*code[done:place], *line]
            done = place
        return ids + list(code[done:])


def _size(lines: Sequence[Sequence[int]]) -> int:
    return sum(map(len, lines))
