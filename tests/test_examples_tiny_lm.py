"""The shipped model and the scripts around it."""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from pathlib import Path

import corpus
import loading
import pytest
import torch
import train_tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

import freqkv
from freqkv import FreqKVCache, FreqKVConfig
from freqkv.evaluation import bits_per_byte, byte_lengths, token_losses

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def model(shipped):
    return AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(shipped):
    return AutoTokenizer.from_pretrained(shipped)


def document(tokenizer, name, length):
    ((_, text),) = corpus.held_out_documents((name,))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :length]
    assert ids.shape[1] == length
    return ids


def test_what_ships(shipped, model, tokenizer):
    assert sum(file.stat().st_size for file in shipped.iterdir()) <= 8_000_000
    assert {file.name for file in shipped.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert model.config.max_position_embeddings <= 512
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    for name in corpus.TEST:
        text = corpus.held_out_documents((name,))[0][1]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_held_out_modules_are_not_trained_on():
    training = corpus.training_documents()
    names = {name.removesuffix(".py") for name, _ in training}
    assert len(training) > 100
    assert not names & set(corpus.HELD_OUT)
    trained = {line.strip() for _, text in training for line in text.splitlines()}
    for name, text in corpus.held_out_documents():
        lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 60]
        assert sum(line in trained for line in lines) <= 0.1 * len(lines), name


@pytest.mark.slow
def test_two_hundred_windows(model, tokenizer):
    """A held-out text of 20 windows, ten times over: each tenth of the run reads the same kind of text.

    Entries never exceed N, bytes stay, the last tenth costs what the second one did, and less than it costs the plain
    model past its window.
    """
    window = model.config.max_position_embeddings
    ids = document(tokenizer, "argparse", 20 * window).repeat(1, 10)
    lengths = byte_lengths(tokenizer, ids)
    beyond = bits_per_byte(token_losses(model, ids[:, : 8 * window]), lengths[:, : 8 * window], [window, 8 * window])
    cache = FreqKVCache(model.config, FreqKVConfig(window, recent_tokens=window // 8))
    states = []
    hook = model.register_forward_hook(lambda *_: states.append((cache.entries, cache.nbytes)))
    with freqkv.patch(model):
        losses = token_losses(model, ids, cache, chunk_size=100)
    hook.remove()
    assert cache.tokens_seen == 200 * window - 1
    assert len(states) == 2 * window
    assert max(entries for entries, _ in states) <= window
    assert len({size for _, size in states[10:]}) == 1, "buffers grow up to the window, and no further"
    tenths = [part.bits_per_byte for part in bits_per_byte(losses, lengths, range(0, 200 * window + 1, 20 * window))]
    assert abs(tenths[9] / tenths[1] - 1) <= 0.05, tenths
    within = bits_per_byte(losses[:, : 8 * window - 1], lengths[:, : 8 * window], [window, 8 * window])
    assert within[0].bits_per_byte <= beyond[0].bits_per_byte


def test_decoding_token_by_token_equals_one_call(model, tokenizer):
    window = model.config.max_position_embeddings
    ids = document(tokenizer, "typing", 3 * window + 7)
    with freqkv.patch(model):
        caches = [FreqKVCache(model.config, recent_tokens=64) for _ in range(2)]
        whole = token_losses(model, ids, caches[0], chunk_size=ids.shape[1])
        single = token_losses(model, ids, caches[1], chunk_size=1)
    assert torch.allclose(whole, single, atol=1e-3)


def run(script, *arguments, **options):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        capture_output=True, text=True, timeout=600, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generate_script():
    output = run("generate.py", "--prompt-tokens", 1100, "--max-new-tokens", 60, "--attn-implementation", "eager")
    assert "first 1100 tokens of argparse.py" in output
    table = dict(line.split("  ", 1) for line in output.splitlines()[-7:])
    table = {name: value.strip() for name, value in table.items()}
    assert table["tokens seen"] == "1,159"
    assert table["entries held per layer"].endswith("of at most 512")
    assert "(2.3 x)" in table["a plain cache would hold"]


@pytest.mark.slow
def test_generate_script_on_a_file_and_in_a_chat(tmp_path, shipped):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("import os\n" * 40)
    output = run(
        "generate.py", "--prompt-file", prompt, "--window", 64, "--sink-tokens", 2, "--retain-ratio", 0.25,
        "--recent-tokens", 8, "--max-new-tokens", 40, "--greedy", "--dtype", "bfloat16",
    )  # fmt: skip
    assert "of at most 64" in output
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}# assistant: {% endif %}"
    )
    output = run(
        "generate.py", "--chat", "--chat-template", template, "--max-new-tokens", 300, "--greedy",
        input="write a class\nand another one\nthanks\n",
    )  # fmt: skip
    assert output.count("you: ") == 4
    assert "compressions" in output


def test_scripts_say_which_number_cannot_be(model):
    parser = argparse.ArgumentParser()
    loading.add_model_arguments(parser)
    loading.add_cache_arguments(parser)
    assert loading.cache_settings(parser.parse_args([]), model) == freqkv.Settings(FreqKVConfig(512, recent_tokens=64))
    for arguments, told in ((["--window", "5"], "window=5"), (["--retain-ratio", "2"], "retain_ratio")):
        with pytest.raises(SystemExit, match=told):
            loading.cache_settings(parser.parse_args(arguments), model)


def test_training_resumes_exactly(tmp_path, monkeypatch, tokenizer):
    """Interrupted and resumed, the script takes the steps of the run that was not, to the bit, and writes a card."""
    documents = corpus.training_documents()[:25]
    monkeypatch.setattr(train_tiny_lm, "training_documents", lambda: documents)
    monkeypatch.setattr(train_tiny_lm, "train_tokenizer", lambda *args: copy.deepcopy(tokenizer))
    monkeypatch.setattr(train_tiny_lm, "TEST", ("statistics",))
    monkeypatch.setattr(train_tiny_lm, "VALIDATION", ("ipaddress",))
    monkeypatch.setattr(train_tiny_lm, "RECALL_DISTANCES", (16,))
    small = [
        "--batch-size",
        "2",
        "--hidden",
        "32",
        "--intermediate",
        "32",
        "--layers",
        "1",
        "--heads",
        "2",
        "--kv-heads",
        "1",
    ]

    def train(name, *arguments):
        folders = ["--runs", str(tmp_path / name), "--output", str(tmp_path / name / "model")]
        monkeypatch.setattr(sys, "argv", ["train_tiny_lm.py", *small, *folders, *arguments])
        args = train_tiny_lm.parse_arguments()
        train_tiny_lm.train(args)
        return args

    optimizers, steps = [], []

    def new_optimizers(*args):
        optimizers[:] = original_optimizers(*args)
        return [*optimizers]

    def training_loss(model, ids, weights):
        state = copy.deepcopy((model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]))
        loss = original_loss(model, ids, weights)
        steps.append((ids, weights, state, loss.item()))
        return loss

    original_optimizers, original_loss = train_tiny_lm.new_optimizers, train_tiny_lm.training_loss
    monkeypatch.setattr(train_tiny_lm, "new_optimizers", new_optimizers)
    monkeypatch.setattr(train_tiny_lm, "training_loss", training_loss)
    # the plateau lasts to the end, so that the two runs have the same learning rates
    plateau = ["--decay", "0.0001", "--warmup", "0.0001"]
    train("whole", "--steps", "6", *plateau)
    train("halves", "--steps", "3", *plateau)
    saved = torch.load(tmp_path / "halves" / "checkpoint.pt", weights_only=False)
    args = train("halves", "--steps", "6", *plateau, "--resume")
    train_tiny_lm.export(args)
    assert len(steps) == 12
    for whole, halves in zip(steps[:6], steps[6:], strict=True):
        assert torch.equal(whole[0], halves[0])
        assert torch.equal(whole[1], halves[1])
        rates = [[[group["lr"] for group in each["param_groups"]] for each in step[2][1]] for step in (whole, halves)]
        assert rates[0] == rates[1]
        assert whole[3] == halves[3]
    assert [torch.equal(whole[0], steps[0][0]) for whole in steps[:6]] == [True] + [False] * 5
    resumed = steps[9][2]
    torch.testing.assert_close(resumed[0], saved["model"], rtol=0, atol=0)
    for now, before in zip(resumed[1], saved["optimizers"], strict=True):
        assert len(before["state"]) > 0
        torch.testing.assert_close(now["state"], before["state"], rtol=0, atol=0)
    whole, halves = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=False) for name in ("whole", "halves"))
    assert whole["step"] == halves["step"] == 6
    torch.testing.assert_close(halves["model"], whole["model"], rtol=0, atol=0)
    AutoModelForCausalLM.from_pretrained(tmp_path / "halves" / "model")
    assert "bits per byte" in (tmp_path / "halves" / "model" / "README.md").read_text()
