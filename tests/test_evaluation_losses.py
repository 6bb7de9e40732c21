"""Losses, divergence and bytes against hand-made arithmetic, transformers' own loss, and torch.distributions."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from corpus import held_out_documents
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_llama, tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

import freqkv
from freqkv import FreqKVCache
from freqkv.evaluation import bits_per_byte, byte_lengths, divergence, token_losses
from freqkv.evaluation.losses import SLICE
from freqkv.models.upstream import CACHE

N = 31
UGLY = [2, N - 1, N, N + 1, 2 * N + 3, 97]


@pytest.fixture(scope="module")
def tokenizer(shipped):
    return AutoTokenizer.from_pretrained(shipped)


@functools.cache
def small(**config):
    model = tiny_llama(attention="sdpa", **config)
    freqkv.patch(model)
    return model


@functools.cache
def uniform():
    """A model that finds all tokens alike."""
    model = tiny_llama(attention="sdpa")
    torch.nn.init.zeros_(model.lm_head.weight)
    freqkv.patch(model)
    return model


def full(model):
    return DynamicCache(config=model.config)


def bounded(model, window=N, **numbers):
    return FreqKVCache(model.config, window=window, **numbers)


@torch.no_grad()
def logits_of(model, ids, cache, chunk):
    """A loop that keeps all logits, in float64."""
    parts = [model(ids[:, i : i + chunk], use_cache=True, **{CACHE: cache}).logits.double()
             for i in range(0, ids.shape[1] - 1, chunk)]  # fmt: skip
    return torch.cat(parts, 1)[:, : ids.shape[1] - 1]


# Bytes


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


@given(st.text(min_size=1, max_size=40))
def test_bytes_of_any_text_add_up(tokenizer, text):
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)
    assert int(byte_lengths(tokenizer, ids).sum()) == len(text.encode())


@pytest.mark.parametrize("text", ["a", "ab ba", " a  b ", "größe 🙂 ab", "▁"])
def test_bytes_of_the_sentencepiece_kind(text):
    """Spaces are written as a mark, one stands before a text, and what has no token is spelled in bytes."""
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
    model = models.BPE({token: i for i, token in enumerate(vocabulary)}, [("a", "b"), ("▁", "ab")], unk_token="<unk>")
    model.byte_fallback = True
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    own = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    ids = torch.tensor(own.encode(text, add_special_tokens=False))
    lengths = byte_lengths(own, ids)
    assert lengths.sum() == len(own.decode(ids).encode())
    if text[0] not in " ▁":  # those are taken for the one before a text
        assert own.decode(ids) == text
    assert lengths.min() >= 0


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens_have_no_bytes(tokenizer, shape):
    assert byte_lengths(tokenizer, torch.empty(shape, dtype=torch.long)).shape == shape


def test_a_batch_has_the_bytes_of_its_rows(tokenizer):
    ids = torch.randint(0, 2000, (3, 17), generator=torch.Generator().manual_seed(3))
    lengths = byte_lengths(tokenizer, ids)
    assert lengths.dtype == torch.int64
    assert lengths.tolist() == [byte_lengths(tokenizer, row).tolist() for row in ids]


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


@given(st.integers(1, 3), st.integers(3, 40), st.data())
def test_bins_are_sums_over_their_positions(batch, length, data):
    """Against a loop over tokens; bins beside each other add up to the bin that holds them all."""
    generator = torch.Generator().manual_seed(length)
    losses = torch.rand(batch, length - 1, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 9, (batch, length), generator=generator)
    inner = data.draw(st.sets(st.integers(2, length - 1), max_size=4))
    edges = [0, *sorted(inner), length]
    bins = bits_per_byte(losses, lengths, edges)
    for each, start, stop in zip(bins, edges, edges[1:], strict=False):
        places = [(b, t) for b in range(batch) for t in range(start, stop) if t]
        size = sum(int(lengths[b, t]) for b, t in places)
        bits = sum(float(losses[b, t - 1]) for b, t in places) / math.log(2)
        assert (each.start, each.stop, each.tokens, each.bytes) == (start, stop, len(places), size)
        assert each.bits_per_byte == pytest.approx(bits / size)
    (whole,) = bits_per_byte(losses, lengths, [0, length])
    assert sum(b.bytes for b in bins) == whole.bytes
    assert sum(b.bytes * b.bits_per_byte for b in bins) == pytest.approx(whole.bytes * whole.bits_per_byte)


# Losses


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


@pytest.mark.parametrize("length", UGLY)
@pytest.mark.parametrize("batch", [1, 3])
def test_their_mean_is_the_loss_of_transformers(length, batch):
    model, ids = small(), tokens(length, batch)
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert token_losses(model, ids).shape == (batch, length - 1)
    assert token_losses(model, ids).mean().item() == pytest.approx(expected, rel=1e-5)
    assert token_losses(model, ids, full(model), 7).mean().item() == pytest.approx(expected, rel=1e-5)


def test_a_text_longer_than_a_slice_of_logits():
    model, ids = small(context=2 * SLICE + 40), tokens(2 * SLICE + 4)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none").double()
    assert torch.allclose(token_losses(model, ids)[0], expected, atol=1e-5)
    for name, measured in divergence(model, ids, {"a": full(model), "b": full(model)}, "a", 2 * SLICE + 4).items():
        assert torch.allclose(measured.losses[0], expected, atol=1e-5), name
        assert measured.kl.max() == 0


@pytest.mark.parametrize("length", UGLY)
def test_nothing_is_learned_from_a_uniform_model(length):
    """Every loss is the logarithm of the vocabulary, and all caches agree."""
    model, ids = uniform(), tokens(length, batch=2)
    caches = {"full": full(model), "small": bounded(model, 8)}
    for losses in (
        token_losses(model, ids),
        token_losses(model, ids, full(model), 5),
        token_losses(model, ids, bounded(model, 8), 5),
    ):
        assert torch.allclose(losses, torch.full_like(losses, math.log(101)), rtol=1e-6)
    for each in divergence(model, ids, caches, "full", 5).values():
        assert torch.allclose(each.losses, torch.full_like(each.losses, math.log(101)), rtol=1e-6)
        assert each.kl.abs().max() == 0
        assert each.same_top.all()


def test_a_copy_is_foreseen(shipped, tokenizer):
    """The shipped model loses little on the second copy of a text, unless its cache has forgotten the first."""
    model = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)
    freqkv.patch(model)
    (_, text), *_ = held_out_documents()
    once = torch.tensor(tokenizer.encode(text)[1000:1400]).reshape(4, 100)
    ids = torch.cat([once, once], 1)
    second = slice(104, None)  # by then it can see that it is a copy
    measured = divergence(model, ids, {"full": full(model), "small": bounded(model, 32)}, "full", 64)
    remembered, forgotten = (measured[name].losses for name in ("full", "small"))
    assert remembered[:, second].mean() < 0.5 * remembered[:, :99].mean()
    assert forgotten[:, second].mean() > 2 * remembered[:, second].mean()
    assert forgotten[:, second].mean() > 0.9 * forgotten[:, :99].mean()
    kl = measured["small"].kl
    assert kl[:, second].mean() > 2 * kl[:, :99].mean(), "what diverges is what needs the first copy"


@pytest.mark.parametrize("cache", [full, bounded])
@pytest.mark.parametrize("length", [N, 2 * N + 3, 97])
def test_chunks_do_not_matter(cache, length):
    model, ids = small(), tokens(length, batch=2)
    expected = token_losses(model, ids, cache(model), 512)
    for chunk in (1, 7, length - 2, length - 1, length):
        assert torch.allclose(token_losses(model, ids, cache(model), chunk), expected, atol=1e-4)


@pytest.mark.parametrize("cache", [full, bounded])
def test_rows_of_a_batch_are_rows_alone(cache):
    model, ids = small(), tokens(2 * N + 3, batch=3)
    both = divergence(model, ids, {"full": full(model), "own": cache(model)}, "full", 7)["own"]
    losses = token_losses(model, ids, cache(model), 7)
    for row in range(3):
        alone = token_losses(model, ids[row : row + 1], cache(model), 7)
        assert torch.allclose(losses[row], alone[0], atol=1e-4)
        one = divergence(model, ids[row : row + 1], {"full": full(model), "own": cache(model)}, "full", 7)["own"]
        assert torch.allclose(both.losses[row], one.losses[0], atol=1e-4)
        assert torch.allclose(both.kl[row], one.kl[0], atol=1e-4)


def test_dtypes_of_models():
    """float64 models are measured in float64, the others in float32 of what they say."""
    ids = tokens(40, batch=2)
    exact = tiny_llama(attention="eager").double()
    with torch.no_grad():
        expected = -exact(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(token_losses(exact, ids), expected, rtol=1e-12, atol=1e-12)
    rounded = tiny_llama(attention="eager", dtype=torch.bfloat16)
    with torch.no_grad():
        said = -rounded(ids).logits.double()[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(token_losses(rounded, ids), said, atol=1e-5)


def test_ids_of_any_integer_dtype():
    model, ids = small(), tokens(20)
    expected = token_losses(model, ids)
    ours = divergence(model, ids.int(), {"full": full(model)}, "full")["full"].losses
    assert torch.allclose(ours, expected, atol=1e-5)
    assert torch.allclose(token_losses(model, ids.int()), expected, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_before(training):
    """Its mode comes back, also when a call breaks off, and nothing has a gradient."""
    model = tiny_llama(attention="sdpa").train(training)
    ids = tokens(9)
    assert not token_losses(model, ids).requires_grad
    assert not divergence(model, ids, {"full": full(model)}, "full")["full"].kl.requires_grad
    assert model.training is training
    with pytest.raises(IndexError):
        token_losses(model, torch.full((1, 9), 101))
    assert model.training is training


# Divergence


@pytest.mark.parametrize("length", UGLY)
def test_divergence_is_float64_arithmetic(length):
    model, ids = small(), tokens(length, batch=2)
    measured = divergence(
        model, ids, {"small": bounded(model, 13), "full": full(model), "N": bounded(model)}, "full", 7
    )
    assert list(measured) == ["small", "full", "N"]
    wanted = logits_of(model, ids, full(model), 7).log_softmax(-1)
    for name, window in (("small", 13), ("N", N)):
        own = logits_of(model, ids, bounded(model, window), 7).log_softmax(-1)
        p, q = (torch.distributions.Categorical(logits=x) for x in (wanted, own))
        each = measured[name]
        assert each.kl.dtype == each.losses.dtype == torch.float64
        assert each.same_top.dtype == torch.bool
        assert each.kl.shape == each.losses.shape == each.same_top.shape == (2, length - 1)
        assert torch.allclose(each.kl, torch.distributions.kl_divergence(p, q), atol=1e-5, rtol=1e-4)
        assert torch.allclose(each.kl, (wanted.exp() * (wanted - own)).sum(-1), atol=1e-5, rtol=1e-4)
        assert torch.allclose(each.losses, -own.gather(-1, ids[:, 1:, None])[..., 0], atol=1e-5, rtol=1e-5)
        assert torch.equal(each.same_top, own.argmax(-1) == wanted.argmax(-1))
        assert each.kl.min() >= 0
        assert torch.allclose(each.losses, token_losses(model, ids, bounded(model, window), 7), atol=1e-5)
        # as long as the window has forgotten nothing, they agree; and not any more soon after
        assert each.kl[:, : window - 1].max() <= 1e-6
        if length > 2 * window:
            assert each.kl[:, window + 1 :].mean() > 1e-2
    assert measured["full"].kl.abs().max() == 0
    assert measured["full"].same_top.all()


@pytest.mark.parametrize("length", UGLY)
@pytest.mark.parametrize("chunk", [7, 512])
def test_a_cache_that_forgets_nothing_is_the_full_cache(length, chunk):
    """Bit for bit: KL is 0, losses are the same."""
    model, ids = small(), tokens(length, batch=2)
    measured = divergence(model, ids, {"full": full(model), "large": bounded(model, 128)}, "full", chunk)
    assert measured["large"].kl.abs().max() == 0
    assert torch.equal(measured["large"].losses, measured["full"].losses)
    assert measured["large"].same_top.all()
    assert torch.equal(
        token_losses(model, ids, bounded(model, 128), chunk), token_losses(model, ids, full(model), chunk)
    )


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_chunks_do_not_matter_for_divergence(chunk):
    model, ids = small(), tokens(97, batch=2)
    one = divergence(model, ids, {"full": full(model), "small": bounded(model)}, "full", 512)["small"]
    other = divergence(model, ids, {"full": full(model), "small": bounded(model)}, "full", chunk)["small"]
    assert torch.allclose(one.kl, other.kl, atol=1e-4)
    assert torch.allclose(one.losses, other.losses, atol=1e-4)
    assert (one.same_top == other.same_top).float().mean() > 0.99  # near ties may turn by rounding


def test_any_cache_may_be_the_reference():
    """KL is not symmetric, and each direction is that of its own reference."""
    model, ids = small(), tokens(97)
    logits = {"full": logits_of(model, ids, full(model), 97), "small": logits_of(model, ids, bounded(model), 97)}
    for name, other in (("full", "small"), ("small", "full")):
        measured = divergence(model, ids, {"full": full(model), "small": bounded(model)}, name)
        p, q = (torch.distributions.Categorical(logits=logits[n]) for n in (name, other))
        assert torch.allclose(measured[other].kl, torch.distributions.kl_divergence(p, q), atol=1e-5, rtol=1e-4)
        assert measured[name].kl.abs().max() == 0


def test_divergence_reads_the_reference_once():
    model, ids = tiny_llama(attention="sdpa"), tokens(30)
    freqkv.patch(model)
    calls = []
    model.register_forward_hook(lambda module, args, kwargs, out: calls.append(out.logits.shape[1]), with_kwargs=True)
    divergence(model, ids, {"a": full(model), "b": bounded(model), "c": bounded(model, 8)}, "b", 10)
    assert calls == [10] * 6 + [9] * 3


def test_tokens_that_are_ruled_out():
    model, ids = tiny_llama(attention="sdpa"), tokens(60) % 90
    freqkv.patch(model)

    def rule_out(module, args, out):
        out = out.clone()
        out[..., 95:] = -torch.inf
        return out

    model.lm_head.register_forward_hook(rule_out)
    measured = divergence(model, ids, {"full": full(model), "small": bounded(model)}, "full")["small"]
    p, q = (
        torch.distributions.Categorical(logits=logits_of(model, ids, cache, 60)[..., :95])
        for cache in (full(model), bounded(model))
    )
    assert torch.allclose(measured.losses, token_losses(model, ids, bounded(model)), atol=1e-5)
    assert torch.allclose(measured.kl, torch.distributions.kl_divergence(p, q), atol=1e-5, rtol=1e-4)


def test_errors_of_divergence():
    model, ids = small(), tokens(9)
    caches = {"full": full(model), "small": bounded(model)}
    with pytest.raises(ValueError, match="'else' is none of the caches: full, small"):
        divergence(model, ids, caches, "else")
    with pytest.raises(ValueError, match="none of the caches"):
        divergence(model, ids, {}, "full")
    for wrong in (ids[0], ids[:, :1], ids[None]):
        with pytest.raises(ValueError, match=r"\(batch, T\) with T >= 2"):
            divergence(model, wrong, caches, "full")
    with pytest.raises(ValueError, match="chunk_size must be positive, got 0"):
        divergence(model, ids, caches, "full", 0)
    assert caches["full"].get_seq_length() == 0, "nothing was read"
