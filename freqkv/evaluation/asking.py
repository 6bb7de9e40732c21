"""Asking a model questions about a text that a cache has read."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from freqkv.evaluation.losses import evaluating
from freqkv.evaluation.tasks import Question, Sample
from freqkv.models.upstream import CACHE

__all__ = ["RecallQuestion", "Reply", "ask", "recall_accuracy"]


@dataclass(frozen=True)
class Reply:
    """What a model said to a question.

    Attributes
    ----------
    text : str
        Greedily decoded, up to the end token or the limit.
    found : tuple of bool
        For each of the question's answers, whether it stands in the reply as a word of its own.
    """

    text: str
    found: tuple[bool, ...]

    @property
    def score(self) -> float:
        """The share of the answers that were found, from 0 to 1."""
        return sum(self.found) / len(self.found)


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    make_cache: Callable[[], Cache],
    max_new_tokens: int = 24,
    chunk_size: int = 512,
    stop: str = "\n",
) -> list[list[Reply]]:
    """Let a model read texts through a cache, and answer each question from a copy of it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model, patched where the cache asks for it; it runs in evaluation mode and without gradients.
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the model.
    samples : sequence of Sample
        Those whose texts have the same number of tokens, and as many questions, are read in one batch.
    make_cache : callable
        Returns an empty cache.
    max_new_tokens : int
        Longest reply.
    chunk_size : int
        Tokens per forward pass of the texts.
    stop : str
        A reply ends before this, if it is not empty.

    Returns
    -------
    list (samples) of lists (questions) of Reply

    Raises
    ------
    ValueError
        If a number is not positive.
    """
    if chunk_size < 1 or max_new_tokens < 1:
        raise ValueError(f"chunk_size={chunk_size} and max_new_tokens={max_new_tokens} must be positive")
    batches: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        batches[len(sample.ids), len(sample.questions)].append(place)
    replies: dict[int, list[Reply]] = {}
    with evaluating(model):
        for places in batches.values():
            batch = [samples[place] for place in places]
            answered = _asked(model, tokenizer, batch, make_cache(), max_new_tokens, chunk_size, stop)
            replies.update(zip(places, answered, strict=True))
    return [replies[place] for place in range(len(samples))]


def _asked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    cache: Cache,
    max_new_tokens: int,
    chunk_size: int,
    stop: str,
) -> list[list[Reply]]:
    """The replies to samples of the same length."""
    texts = torch.tensor([sample.ids for sample in samples], device=model.device)
    replies: list[list[Reply]] = [[] for _ in samples]
    for chunk in texts.split(chunk_size, dim=1):
        model(input_ids=chunk, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    asked = list(zip(*(sample.questions for sample in samples), strict=True))
    for index, questions in enumerate(asked):
        branch = cache if index == len(asked) - 1 else copy.deepcopy(cache)
        made = _continue(
            model, branch, texts.shape[1], [question.ids for question in questions], max_new_tokens, _ends(model)
        )
        for row, question, ids in zip(replies, questions, made, strict=True):
            row.append(_reply(tokenizer, question, ids, stop))
    return replies


def _ends(model: PreTrainedModel) -> set[int]:
    end = getattr(model.generation_config, "eos_token_id", None)
    if end is None:
        return set()
    return {end} if isinstance(end, int) else set(end)


def _reply(tokenizer: PreTrainedTokenizerBase, question: Question, ids: list[int], stop: str) -> Reply:
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    if stop:
        while text.startswith(stop):  # what stands before the reply
            text = text.removeprefix(stop)
        text = text.partition(stop)[0]
    found = tuple(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None for answer in question.answers)
    return Reply(text.strip(), found)


def _continue(
    model: PreTrainedModel, cache: Cache, read: int, prompts: Sequence[Sequence[int]], limit: int, ends: set[int]
) -> list[list[int]]:
    """Greedy continuations of rows that a cache has read `read` tokens of, each behind its own prompt."""
    longest = max(map(len, prompts))
    rows = [
        [0] * (longest - len(prompt)) + list(prompt) for prompt in prompts
    ]  # padded on the left, hidden by the mask
    hidden = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device
    )
    mask = torch.cat([hidden.new_ones(len(prompts), read), hidden], dim=1)
    ids = torch.tensor(rows, device=model.device)
    ragged = bool((hidden == 0).any())
    made: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for _ in range(limit):
        extra: dict[str, Tensor] = {}
        if ragged:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            extra = {"attention_mask": mask, "position_ids": positions}
        logits = model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1, **extra).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        for row, token in enumerate(ids[:, 0].tolist()):
            running[row] = running[row] and token not in ends
            if running[row]:
                made[row].append(token)
        if not any(running):
            break
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return made


@dataclass(frozen=True)
class RecallQuestion:
    """A prompt that ends where the answer begins.

    Attributes
    ----------
    prompt_ids : tuple of int
        Token ids of the prompt.
    answer_ids : tuple of int
        Token ids that must follow it.
    distance : int
        Tokens from the fact to the answer.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    distance: int


def recall_accuracy(
    model: PreTrainedModel,
    questions: Sequence[RecallQuestion],
    make_cache: Callable[[], Cache] | None = None,
    chunk_size: int = 512,
    batch_size: int = 16,
) -> dict[int, float]:
    """Share of the questions that greedy decoding answers exactly, for each distance.

    For prompts of one's own, whose answers are tokens. :func:`ask` lets a model reply freely, and asks several questions of a
    text that was read once.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model; it runs in evaluation mode and without gradients.
    questions : sequence of RecallQuestion
        Questions of the same lengths are asked in one batch.
    make_cache : callable, optional
        Returns an empty cache for one batch. The prompt streams through it `chunk_size` tokens at a time and the
        answer token by token. Without it, one forward pass sees each whole prompt.
    chunk_size : int
        Tokens per forward pass of the prompt.
    batch_size : int
        Most questions in one batch.

    Returns
    -------
    dict of int to float
        Accuracy from 0 to 1 for each distance, in rising order.

    Raises
    ------
    ValueError
        If a prompt or an answer is empty, or if `chunk_size` or `batch_size` is not positive.
    """
    if chunk_size < 1 or batch_size < 1:
        raise ValueError(f"chunk_size and batch_size must be positive, got {chunk_size} and {batch_size}")
    groups: dict[tuple[int, int], list[RecallQuestion]] = defaultdict(list)
    for question in questions:
        if not question.prompt_ids or not question.answer_ids:
            raise ValueError("a question needs a prompt and an answer of at least one token")
        groups[len(question.prompt_ids), len(question.answer_ids)].append(question)
    correct: dict[int, list[bool]] = defaultdict(list)
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            batch = group[first : first + batch_size]
            cache = None if make_cache is None else make_cache()
            for question, answered in zip(batch, _answered(model, batch, cache, chunk_size), strict=True):
                correct[question.distance].append(answered)
    return {distance: sum(correct[distance]) / len(correct[distance]) for distance in sorted(correct)}


def _answered(
    model: PreTrainedModel, questions: Sequence[RecallQuestion], cache: Cache | None, chunk_size: int
) -> list[bool]:
    """Whether each question is answered; prompts have one length and answers too."""
    prompts = torch.tensor([question.prompt_ids for question in questions], device=model.device)
    answers = torch.tensor([question.answer_ids for question in questions], device=model.device)
    # The right answer is fed in even after a wrong token: such a question has failed already.
    with evaluating(model):
        if cache is None:
            inputs = torch.cat([prompts, answers[:, :-1]], dim=1)
            logits = model(input_ids=inputs, use_cache=False).logits[:, prompts.shape[1] - 1 :]
        else:
            parts = [*torch.split(prompts, chunk_size, 1), *torch.split(answers, 1, 1)[:-1]]
            outputs = [model(input_ids=p, **{CACHE: cache}, use_cache=True).logits[:, -1:] for p in parts if p.numel()]
            logits = torch.cat(outputs[-answers.shape[1] :], dim=1)
    answered: list[bool] = (logits.argmax(-1) == answers).all(dim=1).tolist()
    return answered
