"""How the facts and questions of the recall tasks are written: in English sentences, or in lines of code."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["CODE", "PROSE", "Wording"]


def _words(text: str) -> list[str]:
    return text.split()


_ADJECTIVES = _words("""
amber ancient autumn bitter black blue brave bright broken bronze calm cedar clever coastal copper crimson crystal
distant dusty eastern elder empty fading famous fearless frozen gentle golden grand green hidden hollow honest humble
iron ivory jade lonely lucky marble mellow misty narrow noble northern olive opal orange pale pearl polar proud purple
quiet rapid restless royal rusty sacred scarlet secret silent silver simple sleepy solemn southern stony sunny swift
tender violet western white wild winter wooden yellow young
""")
_NOUNS = _words("""
anchor arch bakery barn basin beacon bell bridge cabin canal castle cellar chapel cottage dairy dock falcon ferry fort
fountain gallery garden gate grove harbour inn island kettle lantern library lighthouse lodge market meadow mill mine
monastery museum oak orchard otter palace parlour pier pond quarry raven river school shed ship spring stable station
studio tavern temple theatre tower tunnel valley villa vineyard warehouse wharf workshop
""")
_SYLLABLES = _words("""
ba be bo da de do fa fe fo ga ge go ka ke ko la le lo ma me mo na ne no pa pe po ra re ro sa se so ta te to va ve vo
za ze zo
""")


def _places(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Keys such as `silent harbour`, values of five digits."""
    if count > len(_ADJECTIVES) * len(_NOUNS):
        raise ValueError(f"{count} different keys are not to be had, {len(_ADJECTIVES) * len(_NOUNS)} are")
    keys = rng.sample(range(len(_ADJECTIVES) * len(_NOUNS)), count)
    values = rng.sample(range(10_000, 100_000), count)
    named = (divmod(key, len(_NOUNS)) for key in keys)
    return [(f"{_ADJECTIVES[a]} {_NOUNS[n]}", str(value)) for (a, n), value in zip(named, values, strict=True)]


def _registers(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Keys such as `K7Q4`, values of four digits, as in `examples/corpus.py`."""
    if count > 26 * 26 * 100:
        raise ValueError(f"{count} different keys are not to be had, {26 * 26 * 100} are")
    facts: dict[str, str] = {}
    while len(facts) < count:
        letters, digits = rng.choices(string.ascii_uppercase, k=2), rng.choices(string.digits, k=2)
        facts[f"{letters[0]}{digits[0]}{letters[1]}{digits[1]}"] = "".join(rng.choices(string.digits, k=4))
    return list(facts.items())


def _made_up(rng: random.Random, count: int) -> list[str]:
    """Words such as `Kolave`, all different."""
    if count > len(_SYLLABLES) ** 3 // 2:
        raise ValueError(f"{count} different names are not to be had, {len(_SYLLABLES) ** 3 // 2} are")
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(_SYLLABLES, k=3)).capitalize()] = None
    return list(names)


@dataclass(frozen=True)
class Wording:
    """The sentences of all tasks, with names in braces for what is put in.

    Attributes
    ----------
    tasks : frozenset of str
        Those that the wording has sentences for.
    boundary : str
        A regular expression: where a text may be cut to put a fact in.
    pairs : callable
        ``(rng, count)``: keys and values, keys all different.
    most_pairs : int
        How many different keys there are.
    names : callable
        ``(rng, count)``: single words, all different.
    fact, question, answer : str
        ``{key}`` and ``{value}``. `answer` begins the reply.
    before_question, instruction, instruction_list : str
        What stands before a question, before a text, and before a list.
    one_of, question_all, answer_all, question_each, answer_each : str
        Several values of a key; several keys in one question (``{keys}``).
    set_value, set_from, question_names, answer_names : str
        Variables: ``{name}``, ``{other}``, ``{count}``.
    item, question_frequent, answer_frequent, pair : str
        Lines of lists, and what is asked of a list of words.
    """

    tasks: frozenset[str]
    boundary: str
    pairs: Callable[[random.Random, int], list[tuple[str, str]]]
    fact: str
    question: str
    answer: str
    most_pairs: int
    names: Callable[[random.Random, int], list[str]] = _made_up
    before_question: str = ""
    instruction: str = ""
    instruction_list: str = ""
    one_of: str = ""
    question_all: str = ""
    answer_all: str = ""
    question_each: str = ""
    answer_each: str = ""
    set_value: str = ""
    set_from: str = ""
    question_names: str = ""
    answer_names: str = ""
    item: str = ""
    question_frequent: str = ""
    answer_frequent: str = ""
    pair: str = ""


PROSE = Wording(
    tasks=frozenset(
        _words(
            "single_needle several_keys several_values several_queries variable_tracking frequent_words key_value_pairs"
        )
    ),
    boundary="(?<=[.!?])(?=\\s)|(?<=[.!?][\"'\u201d\u2019])(?=\\s)",
    pairs=_places,
    most_pairs=len(_ADJECTIVES) * len(_NOUNS),
    fact=" The access code of the {key} is {value}.",
    question="What is the access code of the {key}?",
    answer="The access code of the {key} is",
    before_question="\n\n",
    instruction="Read this text, then answer a question about it.\n\n",
    instruction_list="Read this list, then answer a question about it.\n\n",
    one_of=" One of the access codes of the {key} is {value}.",
    question_all="What are the {count} access codes of the {key}?",
    answer_all="The access codes of the {key} are",
    question_each="What are the access codes of {keys}?",
    answer_each="The access codes are",
    set_value=" The box {name} holds the number {value}.",
    set_from=" The box {name} holds the same number as the box {other}.",
    question_names="Which {count} boxes hold the number {value}?",
    answer_names="The boxes that hold the number {value} are",
    item="{name}\n",
    question_frequent="Which {count} words come most often in the list?",
    answer_frequent="The words that come most often are",
    pair="The access code of the {key} is {value}.\n",
)
"""English sentences about access codes, boxes and made-up words."""

CODE = Wording(
    tasks=frozenset(("single_needle", "several_keys", "key_value_pairs")),
    boundary=r"(?=\n(?!\n))",
    pairs=_registers,
    most_pairs=26 * 26 * 100,
    fact="\n# register {key} holds {value}",
    question="\n# register {key} holds",
    answer="",
    pair="\n# register {key} holds {value}",
)
"""Comments about registers, which the models in `examples` were trained to look up."""
