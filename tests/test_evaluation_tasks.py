"""Recall tasks against parsers of their own text, and replies against `generate`."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from corpus import held_out_documents
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_llama, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import freqkv
from freqkv import FreqKVCache
from freqkv.evaluation import (
    CODE,
    PROSE,
    TASKS,
    Haystack,
    Question,
    RecallQuestion,
    Reply,
    Sample,
    ask,
    recall_accuracy,
)
from freqkv.models.upstream import CACHE

SHIPPED = Path(__file__).parent.parent / "examples" / "tiny_lm"
WINDOW = 128
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# What a fact, a question and the beginning of an answer look like, apart from the library's own templates
FACTS = {
    "prose": r" The access code of the ([a-z]+ [a-z]+) is (\d{5})\.",
    "code": r"\n# register ([A-Z]\d[A-Z]\d) holds (\d{4})",
}
ASKED = {
    "prose": r"\n\nWhat is the access code of the ([a-z]+ [a-z]+)\?\s*The access code of the \1 is",
    "code": r"\n# register ([A-Z]\d[A-Z]\d) holds",
}
WORDINGS = {"prose": PROSE, "code": CODE}


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


@functools.cache
def text():
    """Program code, and English sentences between it."""
    (_, code), *_ = held_out_documents()
    rng = random.Random(0)
    sentences = [
        f"It was {rng.choice(['late', 'cold', 'dark'])} when {rng.choice(['Ann', 'Bob'])} came, 4821 days on."
        for _ in range(300)
    ]
    return code[:9000], " ".join(sentences)


@functools.cache
def haystack(wording="prose"):
    code, prose = text()
    return Haystack(tokenizer(), prose if wording == "prose" else code, WORDINGS[wording])


@functools.cache
def shipped_model():
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    freqkv.patch(model)
    return model


def decoded(ids):
    return tokenizer().decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def full(model=None):
    return DynamicCache(config=(model or shipped_model()).config)


def bounded(window=WINDOW):
    return FreqKVCache(shipped_model().config, window=window)


CASES = [("prose", task) for task in TASKS] + [
    ("code", t) for t in ("single_needle", "several_keys", "key_value_pairs")
]
cases = pytest.mark.parametrize(("wording", "task"), CASES)


# Wordings


@given(st.integers(1, 300), st.integers(0, 5))
@pytest.mark.parametrize("wording", WORDINGS)
def test_pairs_and_names_differ(wording, count, seed):
    words = WORDINGS[wording]
    pairs = words.pairs(random.Random(seed), count)
    assert len({key for key, _ in pairs}) == len(pairs) == count
    facts = "".join(words.fact.format(key=key, value=value) for key, value in pairs)
    assert re.findall(FACTS[wording], facts) == pairs
    assert pairs == words.pairs(random.Random(seed), count)
    names = words.names(random.Random(seed), count)
    assert len(set(names)) == len(names) == count
    assert all(re.fullmatch("[A-Z][a-z]{5}", name) for name in names)


@pytest.mark.parametrize("draw", [CODE.pairs, PROSE.pairs, PROSE.names], ids=["registers", "places", "names"])
def test_more_than_there_are(draw):
    with pytest.raises(ValueError, match=r"10000000 different .* are not to be had"):
        draw(random.Random(0), 10_000_000)


def test_sentences_of_all_tasks():
    assert PROSE.tasks == set(TASKS)
    assert haystack("prose").tasks == TASKS
    assert haystack("code").tasks == ("single_needle", "several_keys", "key_value_pairs")


# Tasks


@cases
@pytest.mark.parametrize("length", [257, 300, 509, 1021])
def test_length_is_what_was_asked_for(wording, task, length):
    if task == "frequent_words":
        length *= 8
    for seed in range(4):
        sample = haystack(wording).sample(task, length, seed)
        assert isinstance(sample, Sample)
        assert sample.task == task
        listed = task in ("frequent_words", "key_value_pairs")
        assert length - (24 if listed else 0) <= len(sample.ids) <= length
        expected = 8 if task in ("several_keys", "key_value_pairs") else 1
        assert len(sample.questions) == expected
        assert all(question.ids and question.answers for question in sample.questions)
        assert all(0 <= question.depth <= 1 for question in sample.questions)
        instruction = {"code": "", "prose": "Read this list," if listed else "Read this text,"}[wording]
        assert decoded(sample.ids).startswith(instruction)


@cases
def test_the_seed_decides(wording, task):
    one = haystack(wording).sample(task, 2500, 5)
    assert one == haystack(wording).sample(task, 2500, 5)
    assert one == haystack(wording).sample(task, 2500, "5"), "strings will do"
    others = [
        haystack(wording).sample(task, 2500, 6),
        haystack(wording).sample(task, 2499, 5),
        haystack(wording).sample(task, 2500, "5 0"),
    ]
    assert len({sample.ids for sample in [one, *others]}) == 4
    assert len({sample.questions for sample in [one, *others]}) == 4


def test_every_process_draws_the_same():
    """Also where strings hash otherwise."""
    program = """
import json, sys
from transformers import AutoTokenizer
from freqkv.evaluation import PROSE, CODE, Haystack
shipped, text = sys.argv[1], sys.stdin.read()
tokenizer = AutoTokenizer.from_pretrained(shipped)
stacks = Haystack(tokenizer, text), Haystack(tokenizer, text, CODE)
samples = [h.sample(task, 2500, 7) for h in stacks for task in h.tasks]
print(json.dumps([[s.ids, [[q.ids, q.answers, q.depth, q.distance] for q in s.questions]] for s in samples]))
"""
    prose = text()[1]
    mine = [
        [list(s.ids), [[list(q.ids), list(q.answers), q.depth, q.distance] for q in s.questions]]
        for h in (Haystack(tokenizer(), prose), Haystack(tokenizer(), prose, CODE))
        for s in (h.sample(task, 2500, 7) for task in h.tasks)
    ]
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "4711",
        "PYTHONPATH": str(SHIPPED.parent.parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", program, str(SHIPPED)], input=prose, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == mine


def facts_of(wording, sample):
    return re.findall(FACTS[wording], decoded(sample.ids))


def told_before(wording, sample, question):
    """The fact that the text ends with, `distance` tokens before its end."""
    read = decoded(sample.ids[: len(sample.ids) - question.distance])
    found = re.search(FACTS[wording] + r"\n?\Z", read)
    assert found is not None, read[-80:]
    return found.groups()


@pytest.mark.parametrize(
    ("wording", "task"), [(w, t) for w in WORDINGS for t in ("single_needle", "several_keys", "key_value_pairs")]
)
@given(st.integers(250, 700), st.integers(0, 1000))
def test_each_fact_stands_once_where_its_question_says(wording, task, length, seed):
    sample = haystack(wording).sample(task, length, seed)
    pattern = FACTS[wording] if task != "key_value_pairs" else FACTS[wording].removeprefix(" ")
    facts = re.findall(pattern, decoded(sample.ids))
    assert len(dict(facts)) == len(facts)
    if task != "key_value_pairs":
        assert len(facts) == len(sample.questions)
    places = []
    for question in sample.questions:
        (key,) = re.fullmatch(ASKED[wording], decoded(question.ids)).groups()
        assert question.answers == (dict(facts)[key],)
        before = decoded(sample.ids[: len(sample.ids) - question.distance])
        assert re.search(pattern + r"\n?\Z", before).groups() == (key, *question.answers)
        places.append(len(sample.ids) - question.distance)
    assert places == sorted(places), "questions come in the order of their facts"
    # Depth is the share of the text, without the instruction, that stands before the end of the fact.
    bodies = [q.distance / (1 - q.depth) for q in sample.questions if q.depth < 1]
    instruction = len(tokenizer().encode(getattr(WORDINGS[wording], instruction_of(task)), add_special_tokens=False))
    assert all(body == pytest.approx(len(sample.ids) - instruction) for body in bodies)


def instruction_of(task):
    return "instruction_list" if task in ("frequent_words", "key_value_pairs") else "instruction"


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("depth", [0, 0.1, 0.5, 0.77, 1])
def test_a_needle_stands_at_the_depth_that_was_asked_for(wording, depth):
    """Up to half of the sentence that it must not cut."""
    for seed in range(5):
        sample = haystack(wording).sample("single_needle", 601, seed, depth=depth)
        (question,) = sample.questions
        told_before(wording, sample, question)
        fact = len(tokenizer().encode(WORDINGS[wording].fact.format(key="quiet inn", value="48215")))
        assert abs(question.distance - (1 - depth) * 601) <= 40 + fact
        if depth == 1:
            assert question.distance == 0
            assert question.depth == 1


@pytest.mark.parametrize("wording", WORDINGS)
def test_needles_and_keys_stand_everywhere(wording):
    """Drawn depths fill all tenths of the text alike."""
    needles = [haystack(wording).sample("single_needle", 600, seed).questions[0].depth for seed in range(200)]
    counts = Counter(min(int(10 * depth), 9) for depth in needles)
    assert all(8 <= counts[tenth] <= 36 for tenth in range(10)), counts
    keys = [q.depth for seed in range(40) for q in haystack(wording).sample("several_keys", 600, seed).questions]
    counts = Counter(min(int(10 * depth), 9) for depth in keys)
    assert all(12 <= counts[tenth] <= 56 for tenth in range(10)), counts


def test_facts_stand_between_sentences_and_the_text_is_left_as_it_is():
    """Without its facts, a sample is a stretch of the text, which begins anew where it ends."""
    for wording in WORDINGS:
        own = text()[wording == "prose"]
        for task in ("single_needle", "several_keys"):
            for seed in range(5):
                body = decoded(haystack(wording).sample(task, 400, seed).ids)
                body = body.removeprefix(WORDINGS[wording].instruction)
                without = re.sub(FACTS[wording], "", body)
                assert without in own + own
                parts = re.split(FACTS[wording], body)[::3]
                for before, after in itertools.pairwise(parts):
                    if after:  # the end of the text is cut, as the length asks for
                        assert before == "" or wording == "code" or before[-1] in ".!?"
                        assert after[0] == (" " if wording == "prose" else "\n")


def test_a_text_shorter_than_a_sample_goes_round():
    short = Haystack(tokenizer(), "One. Two! Three?")
    sample = short.sample("several_keys", 400, 0)
    assert len(sample.ids) == 400
    without = re.sub(FACTS["prose"], "", decoded(sample.ids).removeprefix(PROSE.instruction))
    assert without in "One. Two! Three?" * 200
    assert len(Haystack(tokenizer(), "x").sample("single_needle", 100, 0).ids) == 100, "no boundary at all"


@pytest.mark.parametrize("facts", [1, 2, 5])
def test_several_values(facts):
    for seed in range(5):
        sample = haystack().sample("several_values", 400, seed, facts=facts)
        (question,) = sample.questions
        found = re.findall(r" One of the access codes of the ([a-z]+ [a-z]+) is (\d{5})\.", decoded(sample.ids))
        assert len({key for key, _ in found}) == 1
        assert sorted(value for _, value in found) == sorted(question.answers)
        assert len(set(question.answers)) == facts
        assert found[0][0] in decoded(question.ids)
        assert f" {facts} access codes" in decoded(question.ids)
        before = decoded(sample.ids[: len(sample.ids) - question.distance])
        assert before.endswith(f" is {found[0][1]}."), "the first of them"


@pytest.mark.parametrize("facts", [None, 1, 2, 6])
def test_several_queries(facts):
    for seed in range(5):
        sample = haystack().sample("several_queries", 400, seed, facts=facts)
        (question,) = sample.questions
        told = facts_of("prose", sample)
        assert len(told) == (facts or 4)
        asked = re.findall(r"the ([a-z]+ [a-z]+)(?: and|\?)", decoded(question.ids).partition("codes of ")[2])
        assert len(asked) == min(2, facts or 4)
        assert asked == [key for key, _ in told if key in asked], "in the order of the text"
        assert question.answers == tuple(dict(told)[key] for key in asked)
        assert told_before("prose", sample, question) == (asked[0], question.answers[0])


@pytest.mark.parametrize("facts", [None, 1, 2, 7])
def test_variables_are_followed_through_the_text(facts):
    for seed in range(5):
        sample = haystack().sample("variable_tracking", 600, seed, facts=facts)
        (question,) = sample.questions
        holds = {}
        sentence = r" The box (\w+) holds (?:the number (\d+)|the same number as the box (\w+))\."
        for name, value, other in re.findall(sentence, decoded(sample.ids)):
            assert name not in holds
            holds[name] = value or holds[other]  # KeyError if it came later
        assert len(holds) == 2 * (facts or 4)
        count, value = re.search(r"Which (\d+) boxes hold the number (\d+)\?", decoded(question.ids)).groups()
        wanted = {name for name, held in holds.items() if held == value}
        assert set(question.answers) == wanted
        assert len(question.answers) == int(count) == (facts or 4)
        before = decoded(sample.ids[: len(sample.ids) - question.distance])
        assert before.endswith(f" The box {question.answers[0]} holds the number {value}.")


@pytest.mark.parametrize("length", [300, 600, 1021])
def test_frequent_words_of_every_seed(length):
    for seed in range(40):
        sample = haystack().sample("frequent_words", length, seed)
        words = decoded(sample.ids).removeprefix(PROSE.instruction_list).split("\n")[:-1]
        counts = Counter(words).most_common(4)
        assert {word for word, _ in counts[:3]} == set(sample.questions[0].answers)
        assert len(counts) == 3 or counts[2][1] > counts[3][1]


@pytest.mark.parametrize(("facts", "length"), [(None, 2500), (1, 1500), (2, 2100)])
def test_frequent_words_are_counted(facts, length):
    for seed in range(5):
        sample = haystack().sample("frequent_words", length, seed, facts=facts)
        (question,) = sample.questions
        words = decoded(sample.ids).removeprefix(PROSE.instruction_list).split("\n")[:-1]
        counts = Counter(words).most_common()
        wanted = facts or 3
        assert set(question.answers) == {word for word, _ in counts[:wanted]}
        assert counts[wanted - 1][1] > counts[wanted][1], "no ties"
        assert f"Which {wanted} words" in decoded(question.ids)
        assert question.depth == 0, "the whole list is needed"
        assert question.distance == len(sample.ids) - len(tokenizer().encode(PROSE.instruction_list))


@pytest.mark.parametrize("wording", WORDINGS)
def test_pairs_fill_the_list(wording):
    instruction = len(tokenizer().encode(WORDINGS[wording].instruction_list))
    for length in (300, 1000):
        sample = haystack(wording).sample("key_value_pairs", length, 0)
        pairs = re.findall(FACTS[wording].removeprefix(" "), decoded(sample.ids))
        each = (len(sample.ids) - instruction) / len(pairs)
        assert length - 2 * each < len(sample.ids) <= length
    sample = haystack(wording).sample("key_value_pairs", 1000, 0, facts=5)
    assert len(re.findall(FACTS[wording].removeprefix(" "), decoded(sample.ids))) == len(sample.questions) == 5


@pytest.mark.slow
def test_a_long_list_of_pairs():
    sample = haystack().sample("key_value_pairs", 65536, 0)
    assert len(sample.ids) > 65000


@pytest.mark.parametrize("facts", [1, 3, 20])
def test_number_of_keys(facts):
    sample = haystack().sample("several_keys", 800, 0, facts=facts)
    assert len(facts_of("prose", sample)) == len(sample.questions) == facts


def test_the_answer_begins_behind_a_space():
    for task in TASKS:
        for question in haystack().sample(task, 2500, 0).questions:
            assert re.search(r"\?\s+The ", decoded(question.ids)), decoded(question.ids)


@cases
def test_room_that_is_too_small(wording, task):
    for length in (-5, 0, 1, 8):
        with pytest.raises(ValueError, match="tokens"):
            haystack(wording).sample(task, length, 0)


def test_as_small_as_facts_allow():
    """The text may be nothing but facts, and not one token less."""
    instruction = len(tokenizer().encode(PROSE.instruction))
    for seed in range(50):
        try:
            sample = haystack().sample("several_keys", 160, seed)
        except ValueError as error:
            missing = int(re.search(r"(\d+) more are needed", str(error)).group(1))
            assert 0 < missing < 160
        else:
            facts = sum(
                len(tokenizer().encode(PROSE.fact.format(key=k, value=v))) for k, v in facts_of("prose", sample)
            )
            assert facts <= 160 - instruction


def test_errors_of_samples():
    for name in ("haystack", "", "sample", "each_asked"):
        with pytest.raises(
            ValueError, match=f"no task '{name}' in this wording: take one of single_needle, several_keys"
        ):
            haystack().sample(name, 300, 0)
    with pytest.raises(ValueError, match=r"no task 'several_values' .* single_needle, several_keys, key_value_pairs"):
        haystack("code").sample("several_values", 300, 0)
    for depth in (-0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=f"depth={depth} is from 0 to 1"):
            haystack().sample("single_needle", 300, 0, depth=depth)
    with pytest.raises(ValueError, match="of single_needle only"):
        haystack().sample("several_keys", 300, 0, depth=0.5)
    for facts in (0, -1):
        with pytest.raises(ValueError, match=f"facts={facts} must be at least 1"):
            haystack().sample("several_keys", 300, 0, facts=facts)
    with pytest.raises(ValueError, match="not of single_needle"):
        haystack().sample("single_needle", 300, 0, facts=2)
    with pytest.raises(ValueError, match="no room for 50 pairs"):
        haystack().sample("key_value_pairs", 300, 0, facts=50)
    with pytest.raises(ValueError, match=r"30 facts: \d+ more are needed"):
        haystack().sample("several_keys", 300, 0, facts=30)


def test_an_empty_text():
    with pytest.raises(ValueError, match="text is empty"):
        Haystack(tokenizer(), "")


# Chats


@pytest.fixture
def chatting():
    own = AutoTokenizer.from_pretrained(SHIPPED)
    own.chat_template = TEMPLATE
    return own


@cases
def test_a_chat_is_the_rendered_message(chatting, wording, task):
    """Text and question are what the template makes of the whole message, then comes the answer's beginning."""
    own = Haystack(chatting, text()[1], WORDINGS[wording], chat=True)
    sample = own.sample(task, 400, 3)
    assert 376 <= len(sample.ids) <= 400
    for question in sample.questions:
        said = decoded(sample.ids + question.ids)
        assert said.startswith("<|user|>\n")
        content, end, beginning = said.removeprefix("<|user|>\n").partition("<|endoftext|>\n<|assistant|>\n")
        assert end
        rendered = chatting.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        assert said == rendered + beginning
        assert chatting.eos_token_id in question.ids, "special tokens are not spelled"
        assert beginning.startswith("The ") or wording == "code"
        assert content.startswith(getattr(WORDINGS[wording], instruction_of(task)))
        plain = Haystack(chatting, text()[1], WORDINGS[wording]).sample(task, 400, 3).questions[0]
        if wording == "prose":
            assert content.endswith("?")
            assert (decoded(plain.ids)[-3:] == beginning[-3:]) or len(sample.questions) > 1


def test_depth_and_distance_in_a_chat(chatting):
    sample = Haystack(chatting, text()[1], chat=True).sample("several_keys", 400, 3)
    for question in sample.questions:
        _, value = told_before("prose", sample, question)
        assert question.answers == (value,)


def test_chat_templates_that_do_not_serve(chatting):
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        Haystack(tokenizer(), "One. Two.", chat=True)
    for template in ("{{ 'hello' }}", "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}"):
        chatting.chat_template = template
        with pytest.raises(ValueError, match="does not show the user's text once"):
            Haystack(chatting, "One. Two.", chat=True)


def test_what_a_tokenizer_puts_before_a_text():
    """Stands before the sample, and counts."""
    from tokenizers.processors import TemplateProcessing

    own = AutoTokenizer.from_pretrained(SHIPPED)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", own.eos_token_id)]
    )
    assert own.encode("a")[0] == own.encode("a")[-1] == own.eos_token_id
    sample = Haystack(own, text()[1]).sample("several_keys", 400, 0)
    assert len(sample.ids) == 400
    assert sample.ids.count(own.eos_token_id) == 1
    assert sample.ids[0] == own.eos_token_id
    assert all(own.eos_token_id not in question.ids for question in sample.questions)
    assert haystack().sample("several_keys", 400, 0).ids.count(own.eos_token_id) == 0


# Asking


def mean_score(replies):
    scores = [reply.score for row in replies for reply in row]
    return sum(scores) / len(scores)


def test_the_shipped_model_answers_from_what_it_keeps():
    samples = [haystack("code").sample("several_keys", 300, seed) for seed in range(4)]
    model = shipped_model()
    remembered = ask(model, tokenizer(), samples, full, max_new_tokens=6)
    assert mean_score(remembered) > 0.9
    assert [len(row) for row in remembered] == [8] * 4
    forgotten = ask(model, tokenizer(), samples, lambda: bounded(32), max_new_tokens=6)
    assert mean_score(forgotten) < 0.3


@functools.cache
def in_prose():
    return [haystack().sample("several_keys", 300, seed) for seed in range(4)]


@pytest.mark.parametrize("cache", [full, bounded], ids=["full", "bounded"])
def test_replies_of_a_batch_are_those_of_each_alone(cache):
    """Questions of different length."""
    samples, model = in_prose(), shipped_model()
    assert any(
        len({len(q.ids) for q in questions}) > 1 for questions in zip(*(s.questions for s in samples), strict=True)
    )
    together = ask(model, tokenizer(), samples, cache, max_new_tokens=10, stop="")
    for sample, replies in zip(samples, together, strict=True):
        assert ask(model, tokenizer(), [sample], cache, max_new_tokens=10, stop="") == [replies]


@pytest.mark.parametrize("cache", [full, bounded], ids=["full", "bounded"])
def test_a_reply_is_what_generate_says(cache):
    """With the text and a question read at once, or the question after the text."""
    model = shipped_model()
    for sample in in_prose()[:2]:
        (replies,) = ask(model, tokenizer(), [sample], cache, max_new_tokens=12, stop="")
        for question, reply in list(zip(sample.questions, replies, strict=True))[::3]:
            ids = torch.tensor([sample.ids + question.ids])
            own = cache()
            if cache is bounded:
                with torch.no_grad():
                    model(torch.tensor([sample.ids]), **{CACHE: own})
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **{CACHE: own},
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
            )
            assert reply.text == tokenizer().decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("chunk", [1, 7, 299, 300, 301])
def test_chunks_do_not_matter(chunk):
    samples, model = in_prose()[:2], shipped_model()
    for cache in (full, bounded):
        expected = ask(model, tokenizer(), samples, cache, max_new_tokens=6)
        assert ask(model, tokenizer(), samples, cache, max_new_tokens=6, chunk_size=chunk) == expected


def test_the_text_is_read_once():
    """And each question is answered from a copy, whatever is asked besides."""
    model, (sample, *_) = shipped_model(), in_prose()
    read = []
    handle = model.register_forward_hook(
        lambda module, args, kwargs, out: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        replies = ask(model, tokenizer(), [sample], bounded, max_new_tokens=3, chunk_size=150, stop="")
    finally:
        handle.remove()
    lengths = {len(question.ids) for question in sample.questions}
    assert read[:2] == [150, 150]
    assert read.count(150) == 2
    assert len(read) == 2 + 8 * 3
    assert set(read) == {150, 1} | lengths
    for question, reply in zip(sample.questions, replies[0], strict=True):
        alone = replace(sample, questions=(question,))
        assert ask(model, tokenizer(), [alone], bounded, max_new_tokens=3, chunk_size=150, stop="") == [[reply]]


class Saying(torch.nn.Module):
    """Says the same ids in each row, whatever it is asked."""

    def __init__(self, *rows):
        super().__init__()
        self.rows, self.said, self.device = rows, 0, torch.device("cpu")
        self.generation_config = type("Config", (), {"eos_token_id": [0]})()

    def forward(self, input_ids, logits_to_keep, use_cache, attention_mask=None, position_ids=None, **cache):
        logits = torch.zeros(len(self.rows), 1, 2048)
        if input_ids.shape[1] < 50:  # it was asked
            for row, ids in enumerate(self.rows):
                logits[row, 0, ids[self.said] if self.said < len(ids) else 0] = 1
            self.said += 1
        return type("Output", (), {"logits": logits})()


def replies_to(said, answers, limit=24, **options):
    """Of a model that says this."""
    rows = [tokenizer().encode(each) for each in ([said] if isinstance(said, str) else said)]
    question = Question((5, 6), answers, 0.5, 3)
    samples = [Sample("single_needle", tuple(range(1, 61)), (question,))] * len(rows)
    made = ask(Saying(*rows), tokenizer(), samples, lambda: None, limit, **options)
    return [row[0] for row in made]


@pytest.mark.parametrize(
    ("said", "answers", "expected"),
    [
        (" 1234.", ("1234",), Reply("1234.", (True,))),
        ("01234", ("1234",), Reply("01234", (False,))),
        ("12345", ("1234",), Reply("12345", (False,))),
        ("x1234", ("1234",), Reply("x1234", (False,))),
        ("(1234)", ("1234",), Reply("(1234)", (True,))),
        ("2, 1 and 3", ("1", "2", "4"), Reply("2, 1 and 3", (True, True, False))),
        ("\n\n 12\n34", ("12", "34"), Reply("12", (True, False))),
        ("12<|endoftext|>34", ("12", "34"), Reply("12", (True, False))),
        ("a.c abc", ("a.c", "abd"), Reply("a.c abc", (True, False))),
        ("aXc", ("a.c",), Reply("aXc", (False,))),
        ("", ("1",), Reply("", (False,))),
    ],
)
def test_what_counts_as_found(said, answers, expected):
    (reply,) = replies_to(said, answers)
    assert reply == expected
    assert reply.score == pytest.approx(sum(expected.found) / len(answers))


def test_a_reply_ends_before_stop_or_at_the_limit():
    assert replies_to("12\n34", ("34",), stop="") == [Reply("12\n34", (True,))]
    assert replies_to("12;34", ("12",), stop=";") == [Reply("12", (True,))]
    assert replies_to("1 2 3", ("1",), limit=1) == [Reply("1", (True,))]
    first, second = replies_to(["12<|endoftext|>99999", "34 56 78"], ("12", "78"))
    assert (first, second) == (Reply("12", (True, False)), Reply("34 56 78", (False, True)))


def test_a_stop_of_several_characters():
    assert replies_to("post 12 stop 34", ("post", "12", "34"), stop="stop") == [Reply("post 12", (True, True, False))]


def test_the_mode_of_the_model_comes_back():
    model = shipped_model()
    for training in (True, False):
        model.train(training)
        ask(model, tokenizer(), in_prose()[:1], bounded, max_new_tokens=1)
        assert model.training is training


def test_samples_of_any_length_are_asked_together():
    """In batches of those that are alike, in their order."""
    model, samples = shipped_model(), in_prose()[:3]
    first, second, third = samples
    mixed = [first, replace(second, ids=second.ids[1:]), replace(third, questions=third.questions[1:])]
    together = ask(model, tokenizer(), mixed, full)
    assert together == [ask(model, tokenizer(), [each], full)[0] for each in mixed]
    assert [len(replies) for replies in together] == [len(each.questions) for each in mixed]
    assert ask(model, tokenizer(), [], full) == []


def test_errors_of_asking():
    model, (one, *_) = shipped_model(), in_prose()
    for wrong in ({"chunk_size": 0}, {"max_new_tokens": 0}, {"max_new_tokens": -3}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name}={wrong[name]}"):
            ask(model, tokenizer(), [one], full, **wrong)


# Prompts that end where the answer begins


def test_recall_accuracy():
    """The greedy continuation of a prompt is the answer that counts, through any cache."""
    model = tiny_llama(attention="sdpa")
    freqkv.patch(model)
    prompts = tokens(40, batch=3)
    caches = {None: lambda: None, "freqkv": lambda: FreqKVCache(model.config, window=16)}
    for kind, make in caches.items():
        cache = make()
        answers = model.generate(prompts, **{CACHE: cache}, max_new_tokens=3, do_sample=False)[:, 40:]
        questions = [
            RecallQuestion(tuple(prompt), tuple(answer), distance)
            for prompt, answer, distance in zip(prompts.tolist(), answers.tolist(), (8, 8, 30), strict=True)
        ]
        wrong = RecallQuestion(questions[0].prompt_ids, (*questions[0].answer_ids[:2], 0), 8)
        for batch_size, chunk in ((16, 7), (1, 40), (2, 512)):
            accuracy = recall_accuracy(
                model,
                [*questions, wrong, wrong],
                None if kind is None else make,
                chunk_size=chunk,
                batch_size=batch_size,
            )
            assert accuracy == {8: 0.5, 30: 1.0}
    with pytest.raises(ValueError, match="prompt and an answer"):
        recall_accuracy(model, [RecallQuestion((1,), (), 1)])


def test_errors_of_recall_accuracy():
    model = shipped_model()
    assert recall_accuracy(model, []) == {}
    for numbers in ({"chunk_size": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            recall_accuracy(model, [], **numbers)
    with pytest.raises(ValueError, match="prompt and an answer"):
        recall_accuracy(model, [RecallQuestion((), (1,), 1)])
