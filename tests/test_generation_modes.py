"""Every way of `generate`: up to the window that of a DynamicCache, beyond it what each row gives alone."""

from __future__ import annotations

import asyncio
import copy
import threading

import pytest
import torch
import zoo
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from models import tiny_llama, tokens
from running import padded, rows_of
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AsyncTextIteratorStreamer,
    AutoTokenizer,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation.utils import GENERATION_MODES_MAPPING

import freqkv
from freqkv import FreqKVCache, FreqKVConfig
from freqkv.models.upstream import CACHE

N = 23
CONFIG = FreqKVConfig(window=N, sink_tokens=3, recent_tokens=2)
LENGTHS = [3, N + 1, 3 * N + 5]


def own_model(**config):
    model = tiny_llama(**{"attention": "sdpa", **config})
    model.generation_config.suppress_tokens = [0]  # which is padding, and stands for text nowhere
    return model


PLAIN, MODEL = own_model(), own_model()
freqkv.patch(MODEL)


def new_cache(config=CONFIG):
    return FreqKVCache(MODEL.config, config)


def ones(ids, *more):
    """The attention mask of rows without padding, so that none is guessed."""
    return torch.ones(ids.shape[0], ids.shape[1] + sum(more), dtype=torch.long)


def longer(mask, columns):
    return torch.cat([mask, torch.ones(len(mask), columns, dtype=torch.long)], 1)


@torch.no_grad()
def logits_alone(row, ids):
    """Logits of the tokens `ids` behind a row, which is alone and goes in at once."""
    text = torch.cat([row, ids])
    return MODEL(text[None, :-1], **{CACHE: new_cache()}).logits[0, len(row) - 1 :]


def written(output, ids):
    return output[:, ids.shape[1] :]


# Up to the window

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 30},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "min_p": {"do_sample": True, "min_p": 0.1},
    "beams": {"do_sample": False, "num_beams": 3},
    "several beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.3},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "group beams": {"do_sample": False, "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "contrastive search": {"do_sample": False, "penalty_alpha": 0.6, "top_k": 4},
    "guidance": {"do_sample": False, "guidance_scale": 1.5},
    "processors": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 9},
}
FROM_THE_HUB = {
    mode
    for mode, known in {"group beams": "group_beam_search", "contrastive search": "contrastive_search"}.items()
    if "/" in {str(key.value): value for key, value in GENERATION_MODES_MAPPING.items()}.get(known, "/")
}
MODES = {mode: options for mode, options in MODES.items() if mode not in FROM_THE_HUB}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [[13, 13], [4, 13]])
def test_up_to_the_window_every_mode_is_that_of_a_dynamic_cache(mode, lengths):
    ids, mask = padded(rows_of(lengths))
    if mode == "guidance":
        ids, mask = ids[1:], mask[1:]  # it runs the last token alone through the model, without the mask
    options = {"max_new_tokens": N - 13, "return_dict_in_generate": True, "output_scores": True, **MODES[mode]}
    outputs = []
    for model, cache in ((PLAIN, DynamicCache(config=PLAIN.config)), (MODEL, new_cache())):
        torch.manual_seed(5)
        outputs.append(model.generate(ids, attention_mask=mask, **{CACHE: cache}, **options))
    expected, output = outputs
    assert torch.equal(output.sequences, expected.sequences)
    for one, two in zip(output.scores, expected.scores, strict=True):
        assert torch.allclose(one, two, atol=2e-5)
    if lengths[0] == lengths[1] and mode != "guidance":
        assert all(torch.equal(one, two) for one, two in zip(output.scores, expected.scores, strict=True))


# Beams and samples


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3}, {"length_penalty": -1.0, "early_stopping": True}])
def test_beams_of_a_padded_batch_are_those_of_each_row_alone(options):
    rows = rows_of(LENGTHS)
    ids, mask = padded(rows)
    settings = {"max_new_tokens": 2 * N, "num_beams": 3, "do_sample": False, "return_dict_in_generate": True}
    settings |= {"output_scores": True, "eos_token_id": [7, 8, 9], "pad_token_id": 0, **options}
    together = MODEL.generate(ids, attention_mask=mask, **{CACHE: new_cache()}, **settings)
    per_row = options.get("num_return_sequences", 1)
    sequences = written(together.sequences, ids).split(per_row)
    scores = together.sequences_scores.split(per_row)
    for row, got, score in zip(rows, sequences, scores, strict=True):
        alone = MODEL.generate(row[None], **{CACHE: new_cache()}, **settings)
        expected = alone.sequences[:, len(row) :]
        assert torch.equal(got[:, : expected.shape[1]], expected)
        assert {*got[:, expected.shape[1] :].flatten().tolist()} <= {0, 7}
        assert torch.allclose(score, alone.sequences_scores, atol=1e-4)


def test_the_score_of_a_beam_is_that_of_its_text():
    """Though its entries were taken over from other beams, before compressions and after."""
    ids = tokens(N + 4, 2)
    output = MODEL.generate(
        ids,
        **{CACHE: new_cache()},
        max_new_tokens=2 * N,
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert len({*map(tuple, output.sequences.tolist())}) == 8
    for i, sequence in enumerate(written(output.sequences, ids)):
        score = logits_alone(ids[i // 4], sequence).log_softmax(-1).gather(1, sequence[:, None]).sum()
        assert torch.allclose(output.sequences_scores[i], score, atol=1e-3)
    assert not torch.equal(output.beam_indices % 4, output.beam_indices.new_tensor([[0], [1], [2], [3]] * 2))


@pytest.mark.parametrize("options", [{"num_return_sequences": 3}, {"min_p": 0.05, "temperature": 1.5}])
def test_samples_are_drawn_from_what_each_row_gives_alone(options):
    rows = rows_of(LENGTHS)
    ids, mask = padded(rows)
    settings = {"max_new_tokens": 2 * N, "do_sample": True, "return_dict_in_generate": True, **options}
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        cache = new_cache()
        outputs.append(
            MODEL.generate(
                ids, attention_mask=mask, **{CACHE: cache}, output_logits=True, output_scores=True, **settings
            )
        )
    output = outputs[0]
    assert torch.equal(output.sequences, outputs[1].sequences)
    assert not torch.equal(output.sequences, outputs[2].sequences)
    copies = options.get("num_return_sequences", 1)
    logits, scores = torch.stack(output.logits, 1), torch.stack(output.scores, 1)
    for i, sequence in enumerate(written(output.sequences, ids)):
        assert torch.allclose(logits[i], logits_alone(rows[i // copies], sequence), atol=2e-4)
        assert scores[i].gather(1, sequence[:, None]).isfinite().all()
    if copies > 1:
        assert len({*map(tuple, output.sequences.tolist())}) == 9


# The rows of a cache


def choose(operation, texts, draw, keeps_longest):
    """One operation on the rows of a batch, and which rows it leaves."""
    batch = len(texts)
    if operation == "repeat":
        repeats = draw(st.integers(1, 3))
        return lambda cache: cache.batch_repeat_interleave(repeats), [i for i in range(batch) for _ in range(repeats)]
    sizes = {"min_size": batch, "max_size": batch} if operation == "reorder" else {"min_size": 1, "max_size": 4}
    picked = draw(st.lists(st.integers(0, batch - 1), **sizes))
    if keeps_longest:
        picked[-1] = max(range(batch), key=lambda i: len(texts[i]))
    name = {"reorder": "reorder_cache", "select": "batch_select_indices"}[operation]
    return lambda cache: getattr(cache, name)(torch.tensor(picked)), picked


@pytest.mark.parametrize(
    "keeps_longest",
    [
        True,
        False,
    ],
)
@settings(max_examples=30, phases=[Phase.generate])
@given(
    first=st.lists(st.integers(1, 3 * N), min_size=2, max_size=3),
    operations=st.lists(st.sampled_from(["reorder", "repeat", "select"]), min_size=1, max_size=3),
    draw=st.data(),
)
@torch.no_grad()
def test_rows_go_on_as_alone_however_they_were_reordered_repeated_and_selected(keeps_longest, first, operations, draw):
    texts = rows_of(first)
    ids, mask = padded(texts)
    cache = new_cache()
    MODEL(ids, attention_mask=mask, **{CACHE: cache})
    for turn, operation in enumerate(operations):
        apply, left = choose(operation, texts, draw.draw, keeps_longest)
        if len(left) > 6:
            continue
        apply(cache)
        texts, mask = [texts[i] for i in left], mask[left]
        assert (cache.row_tokens or [cache.tokens_seen] * len(texts)) == [len(text) for text in texts]
        brings = draw.draw(st.lists(st.integers(0, N), min_size=len(texts), max_size=len(texts)).filter(any))
        side = draw.draw(st.sampled_from(["left", "right"]))
        more = rows_of(brings, seed=100 * turn + 50)
        ids, new = padded(more, side)
        mask = torch.cat([mask, new], 1)
        logits = MODEL(ids, attention_mask=mask, **{CACHE: cache}).logits
        for i, row in enumerate(more):
            texts[i] = torch.cat([texts[i], row])
            alone = MODEL(texts[i][None], **{CACHE: new_cache()}).logits[0, len(texts[i]) - len(row) :]
            assert torch.allclose(logits[i][new[i].bool()], alone, atol=3e-4)


@pytest.mark.parametrize("operation", ["reorder", "repeat", "select"])
@torch.no_grad()
def test_rows_taken_between_a_call_and_its_crop(operation):
    """What was padding in the last call is taken along."""
    rows, more = rows_of([4, 9, 6]), rows_of([2, 5, 3], seed=7)
    (ids, mask), (new_ids, new) = padded(rows), padded(more)
    cache = new_cache()
    MODEL(ids, attention_mask=mask, **{CACHE: cache})
    MODEL(new_ids, attention_mask=torch.cat([mask, new], 1), **{CACHE: cache})
    index = torch.tensor([2, 0, 0])
    if operation == "repeat":
        cache.batch_repeat_interleave(2)
        index = torch.tensor([0, 0, 1, 1, 2, 2])
    elif operation == "select":
        cache.batch_select_indices(index)
    else:
        cache.reorder_cache(index)
    cache.crop(-2)
    texts = [torch.cat([row, new[: max(0, len(new) - 2)]]) for row, new in zip(rows, more, strict=True)]
    assert cache.row_tokens == [len(texts[i]) for i in index]
    follow = tokens(N, len(index), seed=5)
    logits = MODEL(follow, **{CACHE: cache}).logits
    for i, row, got in zip(index.tolist(), follow, logits, strict=True):
        alone = MODEL(torch.cat([texts[i], row])[None], **{CACHE: new_cache()}).logits[0, -N:]
        assert torch.allclose(got, alone, atol=2e-4)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next", "falcon_h1"])
def test_beams_where_layers_are_transformers_own(family):
    model = zoo.tiny_model(family)
    model.set_attn_implementation("eager")
    freqkv.patch(model)
    ids = tokens(N + 4, 2).clamp(3, 99)
    options = {"max_new_tokens": N, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(ids, **{CACHE: FreqKVCache(model.config, CONFIG)}, **options)
    for row, got in zip(ids, together, strict=True):
        alone = model.generate(row[None], **{CACHE: FreqKVCache(model.config, CONFIG)}, **options)
        assert torch.equal(got, alone[0])


# What goes in and what comes out


@pytest.mark.parametrize("lengths", [[2 * N, 2 * N], LENGTHS])
def test_embeddings_and_chunks_as_input(lengths):
    ids, mask = padded(rows_of(lengths))
    options = {"attention_mask": mask, "max_new_tokens": N, "do_sample": False}
    expected = MODEL.generate(ids, **{CACHE: new_cache()}, **options)
    embedded = MODEL.get_input_embeddings()(ids)
    output = MODEL.generate(inputs_embeds=embedded, **{CACHE: new_cache()}, **options)
    assert torch.equal(output, written(expected, ids))
    for chunk in (1, 9, N, 10 * N):
        config = GenerationConfig(
            prefill_chunk_size=chunk, max_new_tokens=N, do_sample=False, pad_token_id=0, suppress_tokens=[0]
        )
        output = MODEL.generate(ids, attention_mask=mask, **{CACHE: new_cache()}, generation_config=config)
        assert torch.equal(output, expected)


def test_embeddings_of_a_whole_conversation():
    rows = rows_of([3, N + 1])
    ids, mask = padded(rows)
    cache, options = new_cache(), {"max_new_tokens": N, "do_sample": False}
    embed = MODEL.get_input_embeddings()
    answer = MODEL.generate(inputs_embeds=embed(ids), attention_mask=mask, **{CACHE: cache}, **options)
    turn = torch.cat([ids, answer, tokens(5, 2)], 1)
    mask = longer(mask, N + 5)
    output = MODEL.generate(inputs_embeds=embed(turn), attention_mask=mask, **{CACHE: cache}, **options)
    expected = MODEL.generate(turn, attention_mask=mask, **{CACHE: new_cache()}, **options)
    assert torch.equal(output, written(expected, turn))


@pytest.mark.parametrize("keep", [1, 5, 2 * N, torch.tensor([0, 3, 2 * N])])
@torch.no_grad()
def test_logits_to_keep(keep):
    ids, mask = padded(rows_of(LENGTHS))
    whole = MODEL(ids, attention_mask=mask, **{CACHE: new_cache()}).logits
    some = MODEL(ids, attention_mask=mask, **{CACHE: new_cache()}, logits_to_keep=keep).logits
    where = slice(-keep, None) if isinstance(keep, int) else keep
    real = mask[:, where].bool()
    assert some.shape == whole[:, where].shape
    assert torch.allclose(some[real], whole[:, where][real], atol=1e-5)


def test_hidden_states_and_scores_of_each_step():
    rows = rows_of(LENGTHS)
    ids, mask = padded(rows)
    output = MODEL.generate(
        ids,
        attention_mask=mask,
        **{CACHE: new_cache()},
        max_new_tokens=N,
        do_sample=False,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_scores=True,
        output_logits=True,
    )
    assert isinstance(output[CACHE], FreqKVCache)
    states = [torch.cat([step[layer] for step in output.hidden_states], 1) for layer in range(3)]
    mask = longer(mask, N - 1).bool()
    for i, row in enumerate(rows):
        text = torch.cat([row, output.sequences[i, -N:-1]])
        with torch.no_grad():
            alone = MODEL(text[None], **{CACHE: new_cache()}, output_hidden_states=True)
        for got, expected in zip(states, alone.hidden_states, strict=True):
            assert torch.allclose(got[i][mask[i]], expected[0], atol=3e-4)
        scores = torch.stack(output.scores, 1)[i]
        assert torch.allclose(torch.stack(output.logits, 1)[i], alone.logits[0, -N:], atol=3e-4)
        assert scores[:, 0].isneginf().all()
        assert torch.equal(scores[:, 1:], torch.stack(output.logits, 1)[i][:, 1:])


def test_attention_weights():
    """Those of a DynamicCache up to the window, beyond it over the entries held; refused where they form no matrix."""
    plain, model = own_model(attention="eager"), own_model(attention="eager")
    freqkv.patch(model)
    ids = tokens(12, 2)
    options = {"do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    expected = plain.generate(ids, max_new_tokens=N - 12, **options).attentions
    output = model.generate(ids, **{CACHE: new_cache()}, max_new_tokens=N - 12, **options).attentions
    for step, truth in zip(output, expected, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(step, truth, strict=True))
    cache = new_cache()
    steps = model.generate(ids, **{CACHE: cache}, max_new_tokens=2 * N, **options).attentions
    held = [CONFIG.schedule.entries(12 + i) for i in range(2 * N)]
    assert [step[1].shape for step in steps] == [(2, 4, 12 if i == 0 else 1, n) for i, n in enumerate(held)]
    assert all(torch.allclose(layer.sum(-1), torch.ones(())) for step in steps for layer in step)
    for wrong, message in (
        (tokens(N + 1, 2), "Feed at most"),
        (padded(rows_of([3, N + 1]))[0], "weights of padded rows"),
    ):
        cache = new_cache()
        with pytest.raises(ValueError, match=message):
            model.generate(wrong, attention_mask=(wrong != 0).long(), **{CACHE: cache}, max_new_tokens=4, **options)
        assert cache.tokens_seen == 0


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [[3, 9, 6], [5, 5, 5]])
@torch.no_grad()
def test_attention_weights_of_padded_rows(lengths, side, cached):
    """As with a DynamicCache, in columns of the call, as long as nothing is compressed; zeros where padding is."""
    plain, model = own_model(attention="eager"), own_model(attention="eager")
    freqkv.patch(model, CONFIG)
    ids, mask = padded(rows_of(lengths))
    if len(set(lengths)) == 1:  # padding there is all the same
        ids, mask = (torch.cat([torch.zeros(3, 4, dtype=torch.long), each], 1) for each in (ids, mask))
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    more = torch.ones(3, 2, dtype=torch.long)
    if len(set(lengths)) > 1:
        more[1, 0] = 0  # padding in a later turn
    second = torch.cat([mask, more], 1)
    third = torch.cat([second, torch.ones(3, 1, dtype=torch.long)], 1)
    turns = [(ids, mask), (tokens(2, 3), second), (tokens(1, 3), third)]
    caches = [DynamicCache(config=plain.config), new_cache()]
    for new, all_columns in turns if cached else turns[:1]:
        given = [{CACHE: cache} if cached else {"use_cache": False} for cache in caches]
        positions = (all_columns.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        call = {"attention_mask": all_columns, "position_ids": positions, "output_attentions": True}
        truth, output = (each(new, **call, **how) for each, how in zip((plain, model), given, strict=True))
        real = all_columns[:, -new.shape[1] :].bool()
        assert len(output.attentions) == len(truth.attentions) == 2
        for ours, theirs in zip(output.attentions, truth.attentions, strict=True):
            assert ours.shape == theirs.shape
            ours, theirs = ours.transpose(1, 2), theirs.transpose(1, 2)
            assert torch.allclose(ours[real], theirs[real], atol=1e-5)
            assert not cached or not ours[~real].any()
        assert torch.allclose(output.logits[real], truth.logits[real], atol=1e-4)


@torch.no_grad()
def test_attention_weights_are_refused_where_the_columns_are_not_known():
    """Padding of long ago is forgotten, and not stored in files; without a cache, longer calls are cut."""
    model = own_model(attention="eager")
    freqkv.patch(model, CONFIG)
    more, cache = tokens(2, 2), new_cache()
    mask = torch.ones(2, N + 3, dtype=torch.long)
    mask[0, 3:12] = 0
    mask[1, 4:12] = 0
    model(tokens(N + 3, 2), attention_mask=mask, **{CACHE: cache})
    for _ in range(2):
        model(tokens(1, 2), **{CACHE: cache})
    cache.crop(-5)
    seen = cache.tokens_seen
    with pytest.raises(ValueError, match="weights of padded rows"):
        model(more, **{CACHE: cache}, output_attentions=True)
    assert (cache.tokens_seen, cache.is_spent) == (seen, False)
    with pytest.raises(ValueError, match="weights of padded rows"):
        model(tokens(N + 3, 2), attention_mask=mask, use_cache=False, output_attentions=True)
    nothing = torch.zeros(2, 2, dtype=torch.long)
    cache = new_cache()
    model(more, attention_mask=nothing, **{CACHE: cache}, output_attentions=True)
    assert cache.row_tokens == [0, 0]


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("where", ["model", "call"])
def test_a_cache_that_the_generation_config_names(implementation, where, caplog):
    """It is what the file or the call says, beside the numbers, and that is told."""
    freqkv.patching.generation._warn_implementation.cache_clear()
    model, named = own_model(), {"cache_implementation": implementation}
    freqkv.patch(model, window=N)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "disable_compile": True}
    if where == "model":
        model.generation_config.cache_implementation = implementation
        named = {}
    output = model.generate(tokens(5), **named, **options)
    assert not isinstance(output[CACHE], FreqKVCache)
    assert f"cache_implementation='{implementation}'" in caplog.text
    assert "run without FreqKV" in caplog.text


@pytest.mark.parametrize("numbers", [{}, {"window": N}])
def test_continuous_batching_is_left_alone(numbers, caplog):
    """It owns its pages, which come as a cache that is none of transformers' own classes."""
    freqkv.patching.decoder._warn_other.cache_clear()
    config = GenerationConfig(max_new_tokens=N, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [tokens(n, seed=n)[0].tolist() for n in (5, N + 3)]
    expected, model = own_model(), own_model()
    freqkv.patch(model, **numbers)
    pages = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)  # by default they take most of the memory
    truth, output = (m.generate_batch(prompts, config, pages) for m in (expected, model))
    answers = [[each.generated_tokens for each in batch.values()] for batch in (truth, output)]
    assert answers[0] == answers[1]
    assert [len(answer) for answer in answers[1]] == [N, N]
    assert ("such calls run without FreqKV" in caplog.text) == bool(numbers)


# Where it stops


def words():
    vocabulary = {"<pad>": 0, **{f"w{i}": i for i in range(1, 101)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")


TOKENIZER = words()


def test_rows_stop_where_they_stop_alone():
    rows = rows_of(LENGTHS)
    ids, mask = padded(rows)
    options = {"max_new_tokens": 2 * N, "do_sample": False}
    full = written(MODEL.generate(ids, attention_mask=mask, **{CACHE: new_cache()}, **options), ids)
    options |= {"eos_token_id": [full[0, 5].item(), full[1, N + 4].item()], "pad_token_id": 0}
    together = written(MODEL.generate(ids, attention_mask=mask, **{CACHE: new_cache()}, **options), ids)
    lengths = set()
    for row, got in zip(rows, together, strict=True):
        alone = MODEL.generate(row[None], **{CACHE: new_cache()}, **options)[0, len(row) :]
        assert torch.equal(got[: len(alone)], alone)
        assert not got[len(alone) :].any()
        lengths.add(len(alone))
    assert len(lengths) > 1


class AfterTokens(StoppingCriteria):
    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.tokens)


@pytest.mark.parametrize("way", ["criteria", "length", "time"])
@pytest.mark.parametrize("lengths", [[2 * N, 2 * N], [3, N + 1]])
def test_stopping_in_the_middle_and_going_on_changes_nothing(way, lengths):
    ids, mask = padded(rows_of(lengths))
    options = {"do_sample": False, "pad_token_id": 0}
    new = 2 * N + 5
    expected = MODEL.generate(ids, attention_mask=mask, **{CACHE: new_cache()}, max_new_tokens=new, **options)
    cache, history, turns = new_cache(), ids, 0
    while history.shape[1] < expected.shape[1]:
        length = min(history.shape[1] + 17, expected.shape[1])
        stop = {
            "criteria": {"stopping_criteria": StoppingCriteriaList([AfterTokens(length)]), "max_length": 1000},
            "length": {"max_length": length},
            "time": {"max_time": 0.0, "max_length": 1000},
        }[way]
        so_far = longer(mask, history.shape[1] - ids.shape[1])
        history = MODEL.generate(history, attention_mask=so_far, **{CACHE: cache}, **stop, **options)
        turns += 1
    assert torch.equal(history, expected)
    assert turns == (new if way == "time" else 3)
    assert cache.tokens_seen == history.shape[1] - 1


def test_a_string_stops_and_the_text_goes_on_behind_it(shipped):
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    ids = tokens(2 * N)
    options = {"max_new_tokens": 2 * N, "do_sample": False}
    expected = MODEL.generate(ids, attention_mask=ones(ids), **{CACHE: new_cache()}, **options)
    strings = [tokenizer.decode([token]) for token in expected[0].tolist()]
    at = max(i for i in range(2 * N, 4 * N) if strings[i].isalnum() and not any(strings[i] in s for s in strings[:i]))
    assert at > 2 * N + 5
    cache = new_cache()
    output = MODEL.generate(
        ids,
        attention_mask=ones(ids),
        **{CACHE: cache},
        stop_strings=[strings[at]],
        tokenizer=tokenizer,
        **options,
    )
    assert torch.equal(output, expected[:, : at + 1])
    options["max_new_tokens"] = 4 * N - output.shape[1]
    assert torch.equal(MODEL.generate(output, attention_mask=ones(output), **{CACHE: cache}, **options), expected)


# Streams


@pytest.mark.parametrize("kind", ["print", "thread", "async"])
def test_streamers(kind, capsys):
    ids = tokens(2 * N)
    options = {"attention_mask": ones(ids), "max_new_tokens": 2 * N, "do_sample": False}
    expected = TOKENIZER.decode(MODEL.generate(ids, **{CACHE: new_cache()}, **options)[0, 2 * N :])

    def thread(streamer):
        options.update(inputs=ids, **{CACHE: new_cache()}, streamer=streamer)
        running = threading.Thread(target=MODEL.generate, kwargs=options)
        running.start()
        return running

    if kind == "print":
        MODEL.generate(ids, **{CACHE: new_cache()}, streamer=TextStreamer(TOKENIZER, skip_prompt=True), **options)
        text = capsys.readouterr().out.rstrip("\n")
    elif kind == "thread":
        streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=60)
        running = thread(streamer)
        pieces = list(streamer)
        running.join()
        assert len(pieces) > N
        text = "".join(pieces)
    else:

        async def read():
            streamer = AsyncTextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=60)
            running = thread(streamer)
            pieces = [piece async for piece in streamer]
            running.join()
            return "".join(pieces)

        text = asyncio.run(read())
    assert text == expected


# Conversations


@settings(max_examples=10)
@given(
    first=st.lists(st.integers(1, 2 * N), min_size=2, max_size=2),
    turns=st.lists(st.tuples(st.integers(1, N), st.integers(1, N)), min_size=1, max_size=4),
    only_new=st.booleans(),
)
def test_a_conversation_over_many_calls(first, turns, only_new):
    """With the whole history as input, or with what the cache has not seen and a mask over all."""
    texts = rows_of(first)
    ids, mask = padded(texts)
    cache, history = new_cache(), ids
    for turn, (brings, new) in enumerate(turns):
        options = {"max_new_tokens": new, "do_sample": False}
        unseen = history[:, cache.tokens_seen :] if only_new else history
        output = MODEL.generate(unseen, attention_mask=mask, **{CACHE: cache}, **options)
        history = torch.cat([history, written(output, unseen), tokens(brings, 2, seed=turn)], 1)
        for i, text in enumerate(texts):
            alone = MODEL.generate(text[None], **{CACHE: new_cache()}, **options)
            assert torch.equal(output[i, -new:], alone[0, -new:])
            texts[i] = torch.cat([alone[0], history[i, -brings:]])
        mask = longer(mask, brings + new)
    assert cache.tokens_seen == history.shape[1] - turns[-1][0] - 1


@pytest.mark.parametrize("lengths", [[2 * N + 5, 2 * N + 5], [9, 2 * N + 5]])
def test_one_context_answers_many_questions(lengths):
    """Each on a copy, in any order; the context is read once."""
    rows = rows_of(lengths)
    ids, mask = padded(rows)
    context = new_cache()
    with torch.no_grad():
        MODEL(ids, attention_mask=mask, **{CACHE: context})
    options = {"max_new_tokens": N, "do_sample": False}
    questions = [tokens(n, 2, seed=n) for n in (1, 7, N + 3)]
    answers = []
    for question in [*questions, *questions[::-1]]:
        text, whole = torch.cat([ids, question], 1), longer(mask, question.shape[1])
        branch = copy.deepcopy(context)
        answers.append(MODEL.generate(text, attention_mask=whole, **{CACHE: branch}, **options)[:, -N:])
        for row, asked, answer in zip(rows, question, answers[-1], strict=True):
            alone = MODEL.generate(torch.cat([row, asked])[None], **{CACHE: new_cache()}, **options)
            assert torch.equal(answer, alone[0, -N:])
    assert all(torch.equal(one, two) for one, two in zip(answers, answers[::-1], strict=True))
    assert context.tokens_seen == ids.shape[1]


def test_a_branch_and_its_origin_do_not_touch_each_other():
    ids, options = tokens(2 * N), {"max_new_tokens": 2 * N, "do_sample": False}
    origin = new_cache()
    first = MODEL.generate(ids, attention_mask=ones(ids), **{CACHE: origin}, **options)
    branch = copy.deepcopy(origin)
    turns = [torch.cat([first, tokens(n, seed=n)], 1) for n in (5, 11)]
    outputs = [
        MODEL.generate(turn, attention_mask=ones(turn), **{CACHE: cache}, **options)
        for turn, cache in zip(turns, (origin, branch), strict=True)
    ]
    for turn, output in zip(turns, outputs, strict=True):
        expected = MODEL.generate(turn, attention_mask=ones(turn), **{CACHE: new_cache()}, **options)
        assert torch.equal(output, expected)


@pytest.mark.parametrize("first", [[N + 9, N + 9], [3, 2 * N]])
@pytest.mark.parametrize("second", [[5, 5], [2 * N, 8]])
def test_after_a_reset_a_cache_is_as_new(first, second):
    cache = new_cache()
    size = None
    for lengths in (first, second, first):
        ids, mask = padded(rows_of(lengths))
        options = {"attention_mask": mask, "max_new_tokens": N, "do_sample": False}
        output = MODEL.generate(ids, **{CACHE: cache}, **options)
        assert torch.equal(output, MODEL.generate(ids, **{CACHE: new_cache()}, **options))
        size = size or cache.nbytes
        assert cache.nbytes == size
        cache.reset()
        assert (cache.tokens_seen, cache.entries, cache.row_tokens) == (0, 0, None)


@pytest.mark.parametrize("lengths", [[N + 9, N + 9], [3, 2 * N]])
def test_what_was_done_in_inference_mode_can_be_gone_on_with_outside_of_it(lengths):
    """Rows taken, a past recorded, copies: none of it leaves a cache that cannot be written to."""
    ids, mask = padded(rows_of(lengths))
    follow = tokens(N, 2, seed=9)

    def through(cache, copied):
        cache.activate_past_recording()
        MODEL(ids, attention_mask=mask, **{CACHE: cache})
        cache.reorder_cache(torch.tensor([1, 0]))
        MODEL(follow[:, :5], **{CACHE: cache})
        return copy.deepcopy(cache) if copied else cache

    def after(cache):
        with torch.no_grad():
            cache.crop(-5)
            first = MODEL(follow, **{CACHE: cache}).logits
            cache.reset()
            return first, MODEL(ids, attention_mask=mask, **{CACHE: cache}).logits

    with torch.no_grad():
        expected = after(through(new_cache(), False))
    for copied in (False, True):
        with torch.inference_mode():
            cache = through(new_cache(), copied)
        for one, two in zip(after(cache), expected, strict=True):
            assert torch.equal(one, two)


# A model that was patched with numbers


def test_generate_without_a_cache_on_a_model_patched_with_numbers():
    rows = rows_of(LENGTHS)
    ids, mask = padded(rows)
    options = {"max_new_tokens": 2 * N, "do_sample": False}
    alone = [MODEL.generate(row[None], **{CACHE: new_cache()}, **options)[0, -2 * N :] for row in rows]
    beams = {**options, "num_beams": 3, "num_return_sequences": 2}
    expected = MODEL.generate(ids, attention_mask=mask, **{CACHE: new_cache()}, **beams)
    with freqkv.patch(MODEL, CONFIG):
        output = MODEL.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
        assert isinstance(output[CACHE], FreqKVCache)
        assert torch.equal(output.sequences[:, -2 * N :], torch.stack(alone))
        assert torch.equal(MODEL.generate(ids, attention_mask=mask, **beams), expected)
        assert torch.equal(MODEL.generate(ids, attention_mask=mask, prefill_chunk_size=9, **options), output.sequences)
        short = {**options, "max_new_tokens": 7}
        assert torch.equal(
            MODEL.generate(ids, attention_mask=mask, use_cache=False, **short),
            output.sequences[:, : ids.shape[1] + 7],
        )
        plain = PLAIN.generate(ids, attention_mask=mask, **options)
        for cache in (DynamicCache(config=MODEL.config), None):
            kind = {CACHE: cache} if cache is not None else {"cache_implementation": "static"}
            assert torch.equal(MODEL.generate(ids, attention_mask=mask, **kind, **options), plain)
    assert torch.equal(MODEL.generate(ids, attention_mask=mask, **options), plain)


def test_a_pipeline():
    rows = rows_of(LENGTHS)
    texts = TOKENIZER.batch_decode(rows)
    expected = [
        TOKENIZER.decode(
            MODEL.generate(row[None], **{CACHE: new_cache()}, max_new_tokens=2 * N, do_sample=False)[0, len(row) :]
        )
        for row in rows
    ]
    config = GenerationConfig(max_new_tokens=2 * N, do_sample=False, pad_token_id=0, suppress_tokens=[0])
    with freqkv.patch(MODEL, CONFIG):
        write = pipeline("text-generation", model=MODEL, tokenizer=TOKENIZER)
        for batch in (1, 3):
            outputs = write(texts, batch_size=batch, return_full_text=False, generation_config=config)
            assert [output[0]["generated_text"] for output in outputs] == expected


# Compiled


@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")
def test_a_compiled_model():
    """Its graphs break where lengths and masks are looked at; what it writes stays the same."""
    model = own_model(layers=1)
    freqkv.patch(model)
    ids = tokens(N + 1)
    options = {"attention_mask": ones(ids), "do_sample": False, "max_new_tokens": 3}
    expected = model.generate(ids, **{CACHE: FreqKVCache(model.config, CONFIG)}, **options)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager")
    output = model.generate(ids, **{CACHE: FreqKVCache(model.config, CONFIG)}, **options)
    torch.compiler.reset()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [2 * N, 3 * N + 1, 3 * N + 8])
def test_an_input_that_is_no_continuation_is_refused_and_the_cache_unharmed(length, masked):
    """`generate` cuts its input by lengths alone: one that is not longer than what was seen would enter in part, again."""
    model = own_model()
    freqkv.patch(model)
    whole = tokens(3 * N + 9)
    cache = FreqKVCache(model.config, window=N)
    first = model.generate(whole, **{CACHE: cache}, max_new_tokens=3, do_sample=False)
    shorter = whole[:, :length]
    mask = {"attention_mask": ones(shorter)} if masked else {}
    with pytest.raises(ValueError, match="some would be left out, or enter twice"):
        model.generate(shorter, **{CACHE: cache}, max_new_tokens=3, do_sample=False, **mask)
    going_on = model.generate(first, **{CACHE: cache}, max_new_tokens=5, do_sample=False)
    fresh = FreqKVCache(model.config, window=N)
    assert torch.equal(going_on, model.generate(first, **{CACHE: fresh}, max_new_tokens=5, do_sample=False))


def test_drafts_need_an_empty_cache():
    """transformers feeds the whole text to assisted decoding, whatever the cache has seen."""
    model = own_model()
    freqkv.patch(model)
    cache = FreqKVCache(model.config, window=N)
    lookup = {CACHE: cache, "max_new_tokens": 5, "do_sample": False, "prompt_lookup_num_tokens": 2}
    first = model.generate(tokens(N + 3), **lookup)
    seen = cache.tokens_seen
    with pytest.raises(ValueError, match="prompt lookup begin with an empty cache"):
        model.generate(torch.cat([first, tokens(4, seed=5)], dim=1), **lookup)
    assert cache.tokens_seen == seen
