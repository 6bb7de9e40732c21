"""Measures of a causal language model: bits per byte by position, and recall of a fact by its distance.

Any cache that the model accepts can be measured, or none at all.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from freqkv.models.upstream import CACHE


@dataclass(frozen=True)
class PositionBin:
    """Bits per byte of the tokens at the positions ``start <= position < stop``.

    Attributes
    ----------
    start, stop : int
        Positions of the predicted tokens in their sequences.
    tokens : int
        Predicted tokens, over the whole batch.
    bytes : int
        UTF-8 bytes that these tokens stand for.
    bits_per_byte : float
        Their total loss in bits, divided by `bytes`.
    """

    start: int
    stop: int
    tokens: int
    bytes: int
    bits_per_byte: float


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


def byte_lengths(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor) -> LongTensor:
    """Count the UTF-8 bytes that each token stands for.

    Special tokens stand for no text and count 0 bytes. A character may span several tokens; each of them then
    counts its own bytes.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        A byte-level BPE tokenizer, or one of the SentencePiece kind with byte fallback.
    input_ids : Tensor, shape (T,) or (batch, T), integer
        Token ids.

    Returns
    -------
    LongTensor, shape of `input_ids`, on its device
        Bytes per token.

    Raises
    ------
    ValueError
        If `input_ids` has another number of dimensions, or if the tokens' bytes are not the text that the tokenizer
        decodes, so that the counts would be wrong.
    """
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids must have shape (T,) or (batch, T), got {tuple(input_ids.shape)}")
    rows = [_row_byte_lengths(tokenizer, row.tolist()) for row in input_ids.reshape(-1, input_ids.shape[-1])]
    lengths = torch.tensor(rows, dtype=torch.int64, device=input_ids.device).reshape(input_ids.shape)
    return lengths  # type: ignore[return-value]


def _row_byte_lengths(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    expected = _without_replacements(text)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    special, added = set(tokenizer.all_special_ids), set(tokenizer.get_added_vocab().values())
    for token_bytes in (_byte_level_bytes, _sentencepiece_bytes):
        try:
            pieces = [
                b"" if index in special else token.encode() if index in added else token_bytes(token)
                for index, token in zip(ids, tokens, strict=True)
            ]
        except KeyError:
            continue
        lengths = [len(piece) for piece in pieces]
        joined = _without_replacements(b"".join(pieces).decode(errors="replace"))
        if joined == expected:
            return lengths
        if joined == " " + expected:
            # SentencePiece puts a space in front of a text and takes it off again when it decodes.
            first = next(i for i, length in enumerate(lengths) if length)
            lengths[first] -= 1
            return lengths
    raise ValueError("the bytes of the tokens do not add up to the text that the tokenizer decodes")


def _without_replacements(text: str) -> str:
    # A text cut inside a character decodes to replacement marks, whose number is up to the decoder.
    return text.replace("\ufffd", "")


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, as GPT-2 defined it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTE_LEVEL = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    return bytes(_BYTE_LEVEL[character] for character in token)


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def token_losses(
    model: PreTrainedModel, input_ids: Tensor, past_key_values: Cache | None = None, chunk_size: int = 512
) -> Tensor:
    """Loss of every token given the tokens before it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model; it runs in evaluation mode and without gradients.
    input_ids : Tensor, shape (batch, T), integer
        Sequences of one length T >= 2, without padding.
    past_key_values : transformers.Cache, optional
        An empty cache, through which the sequences stream `chunk_size` tokens at a time. It is changed in place.
        Without a cache, one forward pass sees whole sequences.
    chunk_size : int
        Tokens per forward pass through the cache.

    Returns
    -------
    Tensor, shape (batch, T - 1), float64, on the model's device
        Natural-log losses; entry ``[b, i]`` is that of token ``input_ids[b, i + 1]``.

    Raises
    ------
    ValueError
        If `input_ids` does not have the shape above or if `chunk_size` is not positive.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must have shape (batch, T) with T >= 2, got {tuple(input_ids.shape)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}")
    input_ids = input_ids.to(model.device)
    inputs, targets = input_ids[:, :-1], input_ids[:, 1:]
    losses = []
    with _evaluating(model):
        if past_key_values is None:
            logits = model(input_ids=inputs, use_cache=False).logits
            losses.append(_cross_entropy(logits, targets))
        else:
            for start in range(0, inputs.shape[1], chunk_size):
                chunk = slice(start, start + chunk_size)
                logits = model(input_ids=inputs[:, chunk], **{CACHE: past_key_values}, use_cache=True).logits
                losses.append(_cross_entropy(logits, targets[:, chunk]))
    return torch.cat(losses, dim=1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    # One sequence at a time: in float64 the logits of a whole batch can be too large for the memory.
    rows = zip(logits, targets, strict=True)
    return torch.stack([torch.nn.functional.cross_entropy(x.double(), y, reduction="none") for x, y in rows])


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def bits_per_byte(losses: Tensor, lengths: Tensor, edges: Sequence[int]) -> list[PositionBin]:
    """Bits per byte of the tokens between each two neighbouring edges.

    Parameters
    ----------
    losses : Tensor, shape (batch, T - 1), floating
        Natural-log losses from `token_losses`.
    lengths : Tensor, shape (batch, T), integer
        Bytes of all T tokens from `byte_lengths`.
    edges : sequence of int, length n + 1
        Rising positions between 0 and T. The token at position 0 is never predicted and never counted.

    Returns
    -------
    list of PositionBin, length n
        One bin for each ``edges[i] <= position < edges[i + 1]``.

    Raises
    ------
    ValueError
        If the shapes do not match, if the edges do not rise or leave the sequence, or if a bin holds no bytes.
    """
    if losses.dim() != 2 or lengths.dim() != 2 or losses.shape != lengths[:, 1:].shape:
        raise ValueError(
            "losses must have shape (batch, T - 1) and lengths (batch, T), "
            f"got {tuple(losses.shape)} and {tuple(lengths.shape)}"
        )
    length = lengths.shape[1]
    rising = all(start < stop for start, stop in itertools.pairwise(edges))
    if len(edges) < 2 or not rising or edges[0] < 0 or edges[-1] > length:
        raise ValueError(f"edges must be at least two rising positions from 0 to {length}, got {list(edges)}")
    bins = []
    for start, stop in itertools.pairwise(edges):
        part = losses[:, max(start, 1) - 1 : stop - 1]
        nats = part.double().sum().item()
        size = int(lengths[:, max(start, 1) : stop].sum().item())
        if size == 0:
            raise ValueError(f"no bytes are predicted at the positions {start} to {stop}")
        bins.append(PositionBin(start, stop, part.numel(), size, nats / math.log(2) / size))
    return bins


def recall_accuracy(
    model: PreTrainedModel,
    questions: Sequence[RecallQuestion],
    make_cache: Callable[[], Cache] | None = None,
    chunk_size: int = 512,
    batch_size: int = 16,
) -> dict[int, float]:
    """Share of the questions that greedy decoding answers exactly, for each distance.

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
    with _evaluating(model):
        if cache is None:
            inputs = torch.cat([prompts, answers[:, :-1]], dim=1)
            logits = model(input_ids=inputs, use_cache=False).logits[:, prompts.shape[1] - 1 :]
        else:
            parts = [*torch.split(prompts, chunk_size, 1), *torch.split(answers, 1, 1)[:-1]]
            outputs = [model(input_ids=p, **{CACHE: cache}, use_cache=True).logits[:, -1:] for p in parts if p.numel()]
            logits = torch.cat(outputs[-answers.shape[1] :], dim=1)
    answered: list[bool] = (logits.argmax(-1) == answers).all(dim=1).tolist()
    return answered
