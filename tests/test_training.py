"""Training: the patched forward without a cache, its gradients, and what trainers, PEFT and several processes do with it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_llama, tokens
from oracle import llama_logits
from running import in_float64, padded, rows_of
from torch import nn
from transformers import DataCollatorWithFlattening, HunYuanDenseV1Config, HunYuanDenseV1ForCausalLM, Trainer
from transformers import TrainingArguments as Arguments

import freqkv
from freqkv import FreqKVCache, FreqKVConfig
from freqkv.models.upstream import CACHE

N = 23
CONFIG = FreqKVConfig(window=N, sink_tokens=3, recent_tokens=2)
LENGTHS = [3, N - 1, N, N + 1, 2 * N + 3]
IGNORED = -100


def patched(config=CONFIG, train=True, **settings):
    model = tiny_llama(**settings).train(train)
    freqkv.patch(model, config)
    return model


def gradients(model, forward):
    """Of all weights that are trained, after the loss that `forward` returns."""
    model.zero_grad()
    forward().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def assert_close(some, others, rounding=1e-4):
    assert some.keys() == others.keys()
    for name, grad in some.items():
        assert grad.any(), name
        assert torch.allclose(grad, others[name], rtol=0, atol=rounding * others[name].abs().max()), name


def labelled(rows, side):
    """A padded batch, and labels that hide its padding and, of each row, the first third (a prompt)."""
    ids, mask = padded(rows, side)
    labels = ids.masked_fill(mask == 0, IGNORED)
    for label, row, where in zip(labels, rows, mask.bool(), strict=True):
        label[where.nonzero()[: len(row) // 3, 0]] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# One forward over the whole input


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_one_forward_is_streaming_and_the_float64_loop(attention, side):
    model = patched(train=False, attention=attention)
    rows = rows_of(LENGTHS)
    ids, mask = padded(rows, side)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    model.train()
    training = model(ids, attention_mask=mask).logits
    model.eval()
    streamed = model(ids, attention_mask=mask, **{CACHE: FreqKVCache(model.config, CONFIG)}).logits
    for row, where, *logits in zip(rows, mask.bool(), whole, training, streamed, strict=True):
        truth = torch.from_numpy(llama_logits(model, row, N, 3, 0.5, 2))
        for got in logits:
            assert (got[where] - truth).abs().max() <= 2e-4


@torch.no_grad()
def test_flex_attention():
    """Its forward; torch has no backward for it on CPUs. Each shape is compiled, so there are few."""
    model = patched(train=False, layers=1)
    ids = tokens(N + 5)
    expected = model(ids, use_cache=False).logits
    model.config._attn_implementation = "flex_attention"
    assert torch.allclose(model(ids, use_cache=False).logits, expected, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(attention, side):
    model = patched(attention=attention)
    rows = rows_of([N - 1, N + 1, 3 * N + 5])
    batch = labelled(rows, side)

    def alone():
        losses = []
        for row in rows:
            logits = model(row[None], use_cache=False).logits[0]
            learnt = slice(max(len(row) // 3, 1), None)
            losses.append(nn.functional.cross_entropy(logits[:-1], row[1:], reduction="none")[learnt.start - 1 :])
        return torch.cat(losses).mean()

    own = gradients(model, lambda: model(**batch, use_cache=False).loss)
    assert torch.allclose(model(**batch).loss, alone(), atol=1e-5)
    assert_close(own, gradients(model, alone))
    # And the logits that the loss is made of are those of the float64 loop.
    for row in rows:
        truth = torch.from_numpy(llama_logits(model, row, N, 3, 0.5, 2))
        assert (model(row[None], use_cache=False).logits[0] - truth).abs().max() <= 2e-4


def test_dropout_of_attention_is_drawn_anew_and_from_the_seed():
    plain, model = patched(), patched(attention_dropout=0.3)
    ids = tokens(2 * N + 3, batch=2)

    def draw(seed):
        torch.manual_seed(seed)
        return model(ids, labels=ids)

    expected = plain(ids, labels=ids)
    one, same, other = draw(1), draw(1), draw(2)
    assert torch.equal(one.logits, same.logits)
    assert not torch.allclose(one.logits, other.logits, atol=0.1)
    assert not torch.allclose(one.logits, expected.logits, atol=0.1)
    model.eval()
    assert torch.equal(model(ids, use_cache=False).logits, expected.logits), "none in evaluation"
    # Over many draws it is the plain loss, up to what is not linear in it.
    losses = torch.stack([draw(seed).loss.detach() for seed in range(3)])
    assert (losses - expected.loss).abs().max() < 0.5 * expected.loss


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_bfloat16_gradients_lose_what_rounding_costs(way):
    """Not more than twice what the same model without compression loses, plus a grain."""
    ids = tokens(2 * N + 3, batch=2)

    def errors(patch):
        model = tiny_llama(attention="sdpa").train()
        if patch:
            freqkv.patch(model, CONFIG)
        truth = gradients(model, lambda: model(ids, labels=ids, use_cache=False).loss)
        if way == "weights":
            model.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            half = gradients(model, lambda: model(ids, labels=ids, use_cache=False).loss)
        wanted = torch.bfloat16 if way == "weights" else torch.float32
        assert all(grad.dtype == wanted and grad.isfinite().all() for grad in half.values())
        return {
            name: (grad.float() - truth[name]).norm() / truth[name].norm() for name, grad in half.items()
        }  # fmt: skip

    plain, compressed = errors(False), errors(True)
    for name, error in compressed.items():
        assert 0 < error <= 2 * plain[name] + 0.02, name


# Causality


def losses_by_token(logits, ids):
    return nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")


def assert_causal(model, config, length, seed=1):
    """The loss at t does not depend on embeddings after t: their gradients are exactly zero, and others are not."""
    ids = tokens(length, seed=seed)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with freqkv.patch(model, config):
        losses = losses_by_token(model(inputs_embeds=embedded, use_cache=False).logits, ids)
        for position in range(length - 1):
            (grad,) = torch.autograd.grad(losses[position], embedded, retain_graph=True)
            reached = grad[0].abs().amax(-1)
            assert not reached[position + 1 :].any(), f"position {position} of {length}, {config}"
            assert reached[position] > 0


@pytest.mark.parametrize("recents", [0, 3])
@pytest.mark.parametrize("window", [N, 16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_loss_depends_on_later_tokens(window, recents, attention):
    model = tiny_llama(attention=attention).train()
    for length in (window - 1, window, window + 1, 2 * window + 3):
        assert_causal(model, FreqKVConfig(window, recent_tokens=recents), length)


@st.composite
def numbers(draw):
    window = draw(st.integers(4, 19))
    sinks = draw(st.integers(0, window - 2))
    recents = draw(st.integers(0, window - 2 - sinks))
    span = window - sinks - recents
    keep = draw(st.integers(1, span - 1))
    return FreqKVConfig(window, sinks, (keep + 0.5) / span, recents)


@settings(max_examples=10)
@given(numbers(), st.integers(2, 39))
def test_no_loss_depends_on_later_tokens_whatever_the_numbers(config, length):
    assert_causal(tiny_llama(attention="sdpa").train(), config, length)


@pytest.mark.parametrize("stream", ["k_proj", "v_proj"])
def test_no_loss_depends_on_later_keys_or_values(stream):
    """Each stream by itself: what its projection puts out for later tokens has no gradient, what it did for earlier has."""
    model = tiny_llama(attention="sdpa").train()
    freqkv.patch(model, CONFIG)
    length = 2 * N + 3
    ids = tokens(length)
    entered = {}

    def leaf(module, args, output):
        # Segments come one after another: a graph of its own for each token that enters.
        entered.setdefault(module, []).append(output := output.detach().requires_grad_())
        return output

    for layer in model.model.layers:
        getattr(layer.self_attn, stream).register_forward_hook(leaf)
    losses = losses_by_token(model(ids, use_cache=False).logits, ids)
    for parts in entered.values():
        assert sum(part.shape[1] for part in parts) == length
        for position in range(length - 1):
            grads = torch.autograd.grad(losses[position], parts, retain_graph=True, allow_unused=True)
            each = [
                torch.zeros(part.shape[1]) if grad is None else grad[0].abs().amax(-1)
                for part, grad in zip(parts, grads, strict=True)
            ]
            reached = torch.cat(each)
            assert not reached[position + 1 :].any(), position
            assert reached[: position + 1].any(), position
    # A token that was compressed away many steps ago still gets gradients: the past is learnt through the transform.
    first = next(iter(entered.values()))
    (grad,) = torch.autograd.grad(losses[-1], first[0], retain_graph=True)
    assert grad[0, CONFIG.sink_tokens : N - CONFIG.recent_tokens].abs().amax(-1).all()


# What saves memory or time


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_gradient_checkpointing_of_padded_and_dropped_out_batches(reentrant, side):
    """The same gradients as without it, dropout included. (Plain rows and caches: test_handle.py.)"""
    model = patched(attention="sdpa", attention_dropout=0.2)
    ids = tokens(2 * N + 3, batch=3)
    batch = {"input_ids": ids, "labels": ids} if side is None else labelled(rows_of([N - 1, N, 2 * N + 3]), side)

    def loss():
        torch.manual_seed(0)
        return model(**batch).loss

    expected = gradients(model, loss)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    layer = model.model.layers[0].self_attn.q_proj
    calls = []
    layer.register_forward_hook(lambda *args: calls.append(1))
    plain_calls = len(calls)
    assert_close(gradients(model, loss), expected, 1e-5)
    assert len(calls) - plain_calls > 2, "the layer ran twice for each segment"


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model = patched(attention="sdpa")
    batch = labelled(rows_of([N - 1, N + 1, 2 * N + 3, 3 * N]), "right")
    learnt = int((batch["labels"][:, 1:] != IGNORED).sum())
    expected = gradients(model, lambda: model(**batch).loss)
    model.zero_grad()
    for start in range(4):
        part = {name: value[start : start + 1] for name, value in batch.items()}
        model(**part, num_items_in_batch=torch.tensor(learnt)).loss.backward()
    assert_close({name: weight.grad for name, weight in model.named_parameters()}, expected)


@pytest.mark.slow
@pytest.mark.parametrize("padding", [False, True])
def test_a_compiled_training_step(padding):
    model = patched(attention="sdpa", layers=1)
    ids = tokens(N + 5, batch=2)
    batch = labelled(rows_of([7, N + 5]), "left") if padding else {"input_ids": ids, "labels": ids}
    expected = gradients(model, lambda: model(**batch, use_cache=False).loss)
    torch._dynamo.reset()
    step = torch.compile(lambda **call: model(**call).loss, backend="aot_eager")
    assert_close(gradients(model, lambda: step(**batch, use_cache=False)), expected)
    assert_close(gradients(model, lambda: step(**batch, use_cache=False)), expected)
    model.compile(backend="aot_eager")  # as Trainer's torch_compile does it
    assert_close(gradients(model, lambda: model(**batch, use_cache=False).loss), expected)


def test_gradcheck_of_a_small_stack():
    """Analytic against numeric derivatives of the loss, for embeddings and for the weights that make keys and values."""
    model = in_float64(tiny_llama(layers=2))
    model.set_attn_implementation("sdpa")  # eager computes its softmax in float32
    freqkv.patch(model.train(), window=7, sink_tokens=1, recent_tokens=1)
    length = 2 * 7 + 3
    ids = tokens(length)
    generator = torch.Generator().manual_seed(0)
    embedded = torch.randn(1, length, 48, dtype=torch.float64, generator=generator)
    directions = {
        name: torch.randn(weight.shape, dtype=torch.float64, generator=generator)
        for name, weight in model.named_parameters()
        if "k_proj" in name or "v_proj" in name
    }

    def loss(scale, steps):
        moved = {
            name: weight + step * directions[name]
            for (name, weight), step in zip(
                ((n, w) for n, w in model.named_parameters() if n in directions), steps, strict=True
            )
        }
        call = {"inputs_embeds": embedded * scale, "use_cache": False}
        logits = torch.func.functional_call(model, moved, kwargs=call).logits
        return losses_by_token(logits, ids).mean()  # the model's own loss is float32

    scale = torch.ones(1, length, 1, dtype=torch.float64, requires_grad=True)
    steps = torch.zeros(len(directions), dtype=torch.float64, requires_grad=True)
    assert len(directions) == 4
    assert torch.autograd.gradcheck(loss, (scale, steps), eps=1e-6, atol=1e-6)


# PEFT


WHOLE = ["embed_tokens", "norm"]  # PEFT takes names by their end: all norms


def tuned(model, tied=False, targets=("q_proj", "k_proj", "v_proj", "o_proj")):
    """The paper's recipe, with random adapters and embeddings and norms that have moved."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=list(targets), modules_to_save=WHOLE,
        init_lora_weights=False, ensure_weight_tying=tied,
    )  # fmt: skip
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora" not in name:
                weight.mul_(1 + 0.1 * torch.randn(weight.shape))
    return model


@torch.no_grad()
def answers(model):
    """Logits of one forward, of streaming, and what `generate` writes, for ragged rows."""
    model.eval()
    ids, mask = padded(rows_of([N - 1, 2 * N + 3]), "left")
    return [
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()],
        model(
            input_ids=ids, attention_mask=mask, **{CACHE: FreqKVCache(model.config, CONFIG)}
        ).logits[mask.bool()],
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=N, do_sample=False),
    ]  # fmt: skip


def assert_same_answers(some, others, rounding=2e-4):
    for one, other in zip(some[:2], others[:2], strict=True):
        assert (one - other).abs().max() <= rounding
    assert torch.equal(some[2], others[2])


@pytest.mark.parametrize("tied", [False, True])
def test_lora_in_every_order(tied, tmp_path):
    """Patched before or after, inside or outside, saved and loaded, merged: the outputs are the same."""
    peft = pytest.importorskip("peft")

    def base():
        return tiny_llama(attention="sdpa", tie_word_embeddings=tied)

    after = tuned(base(), tied)
    plain = answers_unpatched = after.eval()(tokens(2 * N)).logits
    handle = freqkv.patch(after, CONFIG)
    expected = answers(after)
    assert expected[0].isfinite().all()
    assert "self_attn, keys rotated in 16 channels" in str(handle)
    assert not torch.allclose(after(tokens(2 * N), use_cache=False).logits, plain, atol=1e-2)

    before = base()
    freqkv.patch(before, CONFIG)
    before = tuned(before, tied)
    assert_same_answers(answers(before), expected)
    inside = tuned(base(), tied)
    freqkv.patch(inside.get_base_model(), CONFIG)
    assert_same_answers(answers(inside), expected)

    after.save_pretrained(tmp_path)
    for first in ("patch", "adapter"):
        model = base()
        if first == "patch":
            freqkv.patch(model, CONFIG)
        model = peft.PeftModel.from_pretrained(model, tmp_path)
        if first == "adapter":
            freqkv.patch(model, CONFIG)
        assert_same_answers(answers(model), expected)
        merged = model.merge_and_unload()
        assert_same_answers(answers(merged), expected)
        if tied:
            assert merged.lm_head.weight is merged.model.embed_tokens.weight
        merged.save_pretrained(tmp_path / first)
        loaded = type(merged).from_pretrained(tmp_path / first, dtype=torch.float32, attn_implementation="sdpa")
        freqkv.patch(loaded, CONFIG)
        assert_same_answers(answers(loaded), expected)

    freqkv.unpatch(after)
    assert torch.equal(after(tokens(2 * N)).logits, answers_unpatched)
    with pytest.raises(ValueError, match="not patched"):
        freqkv.unpatch(after)


def test_adapters_that_are_switched_off_or_exchanged():
    model = tiny_llama(attention="sdpa")
    freqkv.patch(model, CONFIG)
    expected = answers(model)
    model = tuned(model)
    adapted = answers(model)
    assert not torch.equal(adapted[2], expected[2])
    with model.disable_adapter():
        assert_same_answers(answers(model), expected, 0)
    assert_same_answers(answers(model), adapted, 0)


@pytest.mark.parametrize("order", ["patch first", "adapter first"])
def test_lora_learns_with_the_paper_s_recipe(order):
    """Gradients reach what is trained and nothing else, and equal those of the merged weights' own; the loss falls."""
    model = tiny_llama(attention="sdpa")
    if order == "patch first":
        freqkv.patch(model, CONFIG)
    model = tuned(model)
    if order == "adapter first":
        freqkv.patch(model, CONFIG)
    model.train()
    ids = tokens(2 * N + 3, batch=2)
    frozen = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert sum("lora_" in name for name in trained) == 2 * 4 * 2
    assert sum("modules_to_save" in name for name in trained) == 1 + 2 * 2 + 1
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(weight.grad.any() for weight in model.parameters() if weight.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(weight, frozen[name]) for name, weight in model.named_parameters() if name in frozen)


def test_norms_of_keys_may_be_trained():
    """HunYuan norms keys after RoPE: what FreqKV reads of the norm is the trained copy, not the original."""
    config = HunYuanDenseV1Config(
        vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
        pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(1)
    model = tuned(HunYuanDenseV1ForCausalLM(config).float().eval())
    assert any("key_layernorm.modules_to_save" in name for name, _ in model.named_parameters())
    freqkv.patch(model, CONFIG)
    expected = answers(model)
    merged = model.merge_and_unload()
    assert not any("modules_to_save" in name for name, _ in merged.named_parameters())
    assert_same_answers(answers(merged), expected)
    freqkv.unpatch(merged)
    freqkv.patch(merged, CONFIG)
    assert_same_answers(answers(merged), expected)


def test_a_conversation_with_an_adapter_is_saved(tmp_path):
    """And belongs to the adapter that wrote it."""
    model = tuned(tiny_llama(attention="sdpa")).eval()
    freqkv.patch(model, CONFIG)
    cache = FreqKVCache(model.config, CONFIG)
    with torch.no_grad():
        model(tokens(2 * N), **{CACHE: cache})
        cache.save(tmp_path / "talk.safetensors", model)
        again = FreqKVCache.load(tmp_path / "talk.safetensors", model)
        more = tokens(N, seed=5)
        assert torch.equal(model(more, **{CACHE: again}).logits, model(more, **{CACHE: cache}).logits)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.mul_(1.1)
    with pytest.raises(freqkv.CacheFileError):
        FreqKVCache.load(tmp_path / "talk.safetensors", model)


class Holder(nn.Module):
    def __init__(self, *models):
        super().__init__()
        self.models = nn.ModuleList(models)


def test_models_inside_others():
    model = tuned(tiny_llama())
    assert str(freqkv.supported(model)) == "yes: 2 attention modules compressed"
    with freqkv.patch(Holder(model), CONFIG):
        inner = answers(model)
    with freqkv.patch(model, CONFIG):
        assert_same_answers(answers(model), inner, 0)
    for wrong, told in (
        (nn.Linear(2, 2), "; a Linear has none of them inside"),
        (Holder(tiny_llama(), tiny_llama()), "; a Holder has 2 of them inside"),
        ("model", ", not a str"),
    ):
        with pytest.raises(TypeError, match=f"pass a transformers model{told}"):
            freqkv.patch(wrong)
    with pytest.raises(TypeError, match="has none of them inside"):
        freqkv.supported(nn.Linear(2, 2))


# Packed sequences


@pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens_q", "seq_idx"])
def test_packed_sequences_are_refused_by_name(told):
    """By whatever tells that there are several sequences in a row; nothing is trained on the wrong thing."""
    model = patched(attention="sdpa")
    collate = DataCollatorWithFlattening(
        return_position_ids=told == "position_ids",
        return_flash_attn_kwargs=told == "cu_seq_lens_q",
        return_seq_idx=told == "seq_idx",
    )
    rows = [{"input_ids": row.tolist()} for row in rows_of([N - 1, 2 * N])]
    with pytest.raises(ValueError, match=rf"packed sequences|{told}.*packed"):
        model(**collate(rows))
    single = collate(rows[:1])
    if told == "position_ids":  # nothing is packed in one
        assert model(**single).loss.isfinite()
    with pytest.raises(ValueError, match="packed"):
        Trainer(
            model,
            Arguments("unused", use_cpu=True, max_steps=1, per_device_train_batch_size=2, report_to="none"),
            data_collator=collate,
            train_dataset=rows,
        ).train()


# Trainer


class Rows(torch.utils.data.Dataset):
    """Sequences that repeat themselves, so that there is something to learn."""

    def __init__(self, count=32, length=2 * N + 3):
        self.rows = tokens(7, batch=count).repeat(1, length // 7 + 1)[:, :length]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trained(output, steps=6, resume=None, adapter=False, **options):
    """A patched model after some steps of Trainer, with the losses and gradient norms of all steps."""
    model = patched(attention="sdpa", attention_dropout=0.1)
    model = tuned(model) if adapter else model
    arguments = Arguments(
        str(output), use_cpu=True, max_steps=steps, learning_rate=3e-3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, logging_steps=1, save_steps=3, report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(3))
    trainer.train(resume_from_checkpoint=resume)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return trainer, [(entry["loss"], entry["grad_norm"]) for entry in logs]


@pytest.mark.parametrize("adapter", [False, True])
def test_resuming_gives_the_uninterrupted_curve(adapter, tmp_path):
    """Trainer, with dropout and accumulation: bit for bit, weights included."""
    whole, curve = trained(tmp_path / "whole", adapter=adapter)
    assert len(set(curve)) == 6
    resumed, again = trained(tmp_path / "whole", adapter=adapter, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert again == curve
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_trainer_evaluates_what_streaming_gives(tmp_path):
    trainer, _ = trained(tmp_path, steps=1, save_strategy="no")
    loss = trainer.evaluate()["eval_loss"]
    model = trainer.model.eval()
    rows = Rows(3).rows
    with torch.no_grad():
        logits = model(rows, **{CACHE: FreqKVCache(model.config, CONFIG)}).logits
    assert loss == pytest.approx(
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item(), abs=1e-4
    )
    truth = torch.from_numpy(llama_logits(model, rows[0], N, 3, 0.5, 2))
    assert (logits[0] - truth).abs().max() <= 2e-4
