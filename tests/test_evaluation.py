"""The measures against hand-made arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from models import tiny_llama, tokens
from transformers import AutoTokenizer, DynamicCache

import freqkv
from freqkv import FreqKVCache
from freqkv.evaluation import RecallQuestion, bits_per_byte, byte_lengths, recall_accuracy, token_losses
from freqkv.models.upstream import CACHE


@pytest.fixture(scope="module")
def tokenizer(shipped):
    return AutoTokenizer.from_pretrained(shipped)


def test_bytes_of_tokens_add_up_to_the_text(tokenizer):
    text = "def f(x):\n        return 'größe 中文 🙂'  # \t done\r\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    lengths = byte_lengths(tokenizer, ids)
    assert lengths.shape == ids.shape
    assert lengths.sum() == len(text.encode())
    with_special = torch.cat([torch.tensor([tokenizer.eos_token_id]), ids[0]])
    assert byte_lengths(tokenizer, with_special).tolist() == [0, *lengths[0].tolist()]
    with pytest.raises(ValueError, match="input_ids must have shape"):
        byte_lengths(tokenizer, ids[None])


def test_token_losses():
    model = tiny_llama(attention="sdpa").train()
    ids = tokens(50, batch=2)
    with torch.no_grad():
        logits = model.eval()(ids).logits.double()
    expected = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    model.train()
    losses = token_losses(model, ids)
    assert losses.dtype == torch.float64
    assert model.training
    assert torch.allclose(losses, expected, atol=1e-5)
    assert torch.allclose(token_losses(model, ids, DynamicCache(config=model.config), 7), expected, atol=1e-5)
    freqkv.patch(model, window=16)
    streamed = token_losses(model, ids, FreqKVCache(model.config, window=16), chunk_size=7)
    assert torch.allclose(token_losses(model, ids), streamed, atol=1e-4)
    for wrong in ({"input_ids": ids[0]}, {"input_ids": ids[:, :1]}, {"input_ids": ids, "chunk_size": 0}):
        with pytest.raises(ValueError, match="must"):
            token_losses(model, **wrong)


def test_bits_per_byte():
    losses = math.log(2) * torch.tensor([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]])
    lengths = torch.tensor([[9, 1, 2, 3], [9, 2, 2, 0]])
    first, second = bits_per_byte(losses, lengths, [0, 2, 4])
    assert (first.start, first.stop, first.tokens, first.bytes, first.bits_per_byte) == (0, 2, 2, 3, pytest.approx(2))
    assert (second.tokens, second.bytes, second.bits_per_byte) == (4, 7, pytest.approx(18 / 7))
    for edges in ([0], [2, 1], [-1, 2], [0, 5]):
        with pytest.raises(ValueError, match="edges"):
            bits_per_byte(losses, lengths, edges)
    with pytest.raises(ValueError, match="shape"):
        bits_per_byte(losses, lengths[:, 1:], [0, 2])
    with pytest.raises(ValueError, match="no bytes"):
        bits_per_byte(losses, torch.zeros_like(lengths), [0, 4])


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
