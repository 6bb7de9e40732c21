"""`examples/finetune.py` on the shipped model, in one process and in two."""

from __future__ import annotations

import importlib.util
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import freqkv
from freqkv import FreqKVCache, FreqKVConfig
from freqkv.evaluation import token_losses

pytest.importorskip("peft")

import finetune
from peft import PeftModel

EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK = [
    "--window", "64", "--sequences", "4", "--batch-size", "2", "--warmup-steps", "1", "--learning-rate", "3e-3",
    "--lora-rank", "4", "--eval-every", "4", "--eval-sequences", "2", "--save-every", "4", "--log-every", "1",
]  # fmt: skip
NUMBERS = FreqKVConfig(window=64)


def curve(folder):
    """Loss and gradient norm of each step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def tokenizer(shipped):
    return AutoTokenizer.from_pretrained(shipped)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 8 steps, and its trainer."""
    folder = tmp_path_factory.mktemp("run")
    return folder, finetune.main([*QUICK, "--steps", "8", "--output", str(folder)])


def base(shipped):
    return AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)


def test_it_is_evaluated_before_while_and_after(run):
    folder, trainer = run
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [0, 4, 8]
    for metric in ("perplexity", "bits_per_byte"):
        for where in ("0N_to_1N", "1N_to_2N", "2N_to_4N"):
            assert len({entry[f"eval_{metric}_{where}"] for entry in evaluated}) == 3, "it changes as weights do"
    assert len(curve(folder)) == 8


def test_the_adapter_loads(run, shipped):
    """With the numbers beside it, and gives the figures that the run ended with: computed here by one forward."""
    folder, trainer = run
    numbers = freqkv.Settings.load(folder).config
    assert numbers == NUMBERS
    model = PeftModel.from_pretrained(base(shipped), folder)
    freqkv.patch(model, numbers)
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    _, held = torch.load(folder / "tokens" / "sequences.pt")
    assert held.shape == (2, 256)
    losses = token_losses(model, held.long())
    assert losses.mean().item() == pytest.approx(last["eval_loss"], abs=1e-4)
    assert losses[:, 127:].mean().exp().item() == pytest.approx(last["eval_perplexity_2N_to_4N"], rel=1e-4)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight, "tied, as in the shipped model"
    assert not torch.equal(merged.model.embed_tokens.weight, base(shipped).model.embed_tokens.weight)
    assert (token_losses(merged, held.long()) - losses).abs().max() <= 1e-3


def test_what_is_trained(run):
    _, trainer = run
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    lora = {name.split(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name}
    assert lora == {"q_proj", "k_proj", "v_proj", "o_proj"}
    whole = {name.split(".modules_to_save")[0].rpartition(".")[2] for name in trained if "modules_to_save" in name}
    assert {"embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"} <= whole
    assert all(".lora_" in name or "modules_to_save" in name or "embed_tokens" in name for name in trained)
    assert all(w.dtype == torch.float32 for w in trainer.model.parameters() if w.requires_grad)


def test_the_defaults_are_the_paper_s():
    args = finetune.parse_arguments([])
    assert (args.lora_rank, args.lora_alpha, args.learning_rate, args.length) == (8, 16, 2e-5, 2)
    config = base(EXAMPLES / "tiny_lm").config
    settings = finetune.cache_settings(args, config)
    assert settings == freqkv.Settings(FreqKVConfig(512, 4, 0.5, 0), freqkv.low_pass_entries)
    training = finetune.training_arguments(args)
    assert training.max_steps == 1000
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 64


@pytest.mark.parametrize("full", [False, True])
def test_a_teacher_is_the_untrained_model_with_full_attention(full, tmp_path, shipped, monkeypatch):
    """The loss is the KL of what two models of transformers' own say; training lowers it, and leaves the numbers beside it."""
    losses = []
    compute = finetune.Teacher.__call__

    def checked(teacher, model, ids):
        loss = compute(teacher, model, ids)
        if len(losses) in (0, 5):
            with torch.no_grad():
                wanted = base(shipped).eval()(input_ids=ids).logits[:, 64:].double().log_softmax(-1)
                was_training, own = model.training, model.eval()(input_ids=ids, use_cache=False).logits[:, 64:].double()
                model.train(was_training)
            expected = (wanted.exp() * (wanted - own.log_softmax(-1))).sum(-1).mean()
            assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(finetune.Teacher, "__call__", checked)
    text = tmp_path / "text.py"
    text.write_text("\n".join(f"def area_{i}(width, height):\n    return {i} * width + height\n" for i in range(40)))
    arguments = [
        *QUICK, "--epochs", "10", "--teacher", "--preset", "recommended", "--eval-every", "0", "--text", str(text),
        "--eval-text", str(text), "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    trainer = finetune.main([*arguments, *(["--full", "--learning-rate", "1e-4"] if full else [])])
    batches = len(losses) // 10
    assert len(losses) == 10 * batches, "none of them in evaluation"
    assert sum(losses[-batches:]) < 0.8 * sum(losses[:batches]), "the same text, ten times"
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(sum(losses[:2]) / 2, abs=2e-4), "the mean over batches"
    settings = freqkv.Settings.load(tmp_path / "run")
    assert settings.compressor == freqkv.KeepNovel(layer=1, per_head=0.4)
    assert settings.config == FreqKVCache(trainer.model.config, preset="recommended", window=64).config


def test_what_a_teacher_cannot_do_is_refused(tmp_path, capsys):
    for arguments, message in (
        (["--plain"], "excludes --plain"),
        (["--length", "1"], "--length must be above 1"),
        (["--recipe", "sft", "--text", "x.json"], "--teacher is for --recipe lm"),
    ):
        with pytest.raises(SystemExit):
            finetune.main([*QUICK, "--teacher", "--output", str(tmp_path), *arguments])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="leave the model's context of 512"):
        finetune.main([*QUICK, "--teacher", "--length", "9", "--output", str(tmp_path)])


def test_the_model_card_tells_how(run):
    folder, _ = run
    card = (folder / "README.md").read_text()
    for told in (
        "8 steps of 4 sequences", "LoRA (r = 4, alpha = 16) on k_proj, o_proj, q_proj, v_proj", "window=64",
        "sequences of 128 tokens", "Python's standard library", "| bits per byte 2N to 4N |", "learning rate 0.003",
    ):  # fmt: skip
        assert told in card, told
    code = card.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(code, scope)  # what the card says to do
    assert freqkv.unpatch(scope["model"]) is None, "it is patched"


@pytest.mark.slow
def test_resume_gives_the_uninterrupted_curve(run, tmp_path):
    folder, trainer = run
    again = finetune.main([*QUICK, "--steps", "8", "--output", str(tmp_path), "--resume", str(folder / "checkpoint-4")])
    assert curve(tmp_path) == curve(folder)
    for (name, one), other in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_an_earlier_run_is_not_written_over(run):
    folder, _ = run
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    with pytest.raises(SystemExit, match=r"holds adapter_model.safetensors of an earlier run: --resume it"):
        finetune.main([*QUICK, "--output", str(folder)])
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def launch(tmp_path, script, *arguments, config=None, **environment):
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path]), "OMP_NUM_THREADS": "1", **environment
    }  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / "configs" / config)]
    command += ["--num_processes", "2", "--mixed_precision", "no", str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path)


SHARDED = """
import sys
import accelerate.state
import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

torch.set_num_threads(1)
begin = accelerate.state.PartialState.__init__


def as_on_accelerators(self, cpu=False, **kwargs):
    # accelerate's FSDP asks for accelerators; all that follows works with gloo
    begin(self, cpu, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        assert self.backend == "gloo"
        self.distributed_type = DistributedType.MULTI_XPU


accelerate.state.PartialState.__init__ = as_on_accelerators
import finetune

trainer = finetune.main(sys.argv[1:])
assert trainer.accelerator.distributed_type == DistributedType.FSDP
assert trainer.accelerator.is_fsdp2
weights = dict(trainer.model.named_parameters())
assert all(isinstance(weight, DTensor) for weight in weights.values())
assert sum(w.to_local().numel() for w in weights.values()) < 0.6 * sum(w.numel() for w in weights.values())
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("trained", ["adapter", "full"])
def test_two_processes_with_fsdp2_give_the_curve_of_one(run, trained, tmp_path, shipped):
    """Through `accelerate launch` and the shipped config; what is saved is whole."""
    folder, _ = run
    arguments = [*QUICK, "--steps", "4"]
    if trained == "full":
        arguments += ["--full", "--learning-rate", "3e-4", "--gradient-checkpointing"]
        folder = tmp_path / "one"
        finetune.main([*arguments, "--output", str(folder)])
    (tmp_path / "worker.py").write_text(SHARDED)
    arguments += ["--batch-size", "1", "--output", str(tmp_path / "two")]
    done = launch(tmp_path, tmp_path / "worker.py", *arguments, config="fsdp2.yaml")
    assert done.returncode == 0, done.stderr[-4000:]
    expected = curve(folder)[:4]
    got = curve(tmp_path / "two")
    assert len(got) == 4
    for (loss, norm), (other, other_norm) in zip(got, expected, strict=True):
        assert loss == pytest.approx(other, rel=1e-3)
        assert norm == pytest.approx(other_norm, rel=2e-2)
    if trained == "full":
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float32)
    else:
        saved = PeftModel.from_pretrained(base(shipped), tmp_path / "two")
    _, held = torch.load(tmp_path / "two" / "tokens" / "sequences.pt")
    freqkv.patch(saved, NUMBERS)
    history = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"]
    last = [entry for entry in history if "eval_loss" in entry][-1]
    assert token_losses(saved, held.long()).mean().item() == pytest.approx(last["eval_loss"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_sharding_that_would_not_take_place_is_refused(tmp_path):
    done = launch(tmp_path, EXAMPLES / "finetune.py", *QUICK, "--steps", "1", config="fsdp2.yaml")
    assert done.returncode != 0
    assert "accelerate shards (FSDP) on several accelerators only" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_with_deepspeed_give_the_curve_of_one(run, stage, tmp_path):
    folder, _ = run
    arguments = [*QUICK, "--steps", "4", "--batch-size", "1", "--output", str(tmp_path / "two")]
    done = launch(tmp_path, EXAMPLES / "finetune.py", *arguments, config=f"deepspeed_zero{stage}.yaml")
    assert done.returncode == 0, done.stderr[-4000:]
    for (loss, norm), (other, other_norm) in zip(curve(tmp_path / "two"), curve(folder)[:4], strict=True):
        assert loss == pytest.approx(other, rel=1e-3)
        assert norm == pytest.approx(other_norm, rel=2e-2)


# Supervised fine-tuning


RECORDS = [
    {"instruction": f"Write the function number_{i}.", "output": f"def number_{i}():\n    return {i}\n"}
    for i in range(24)
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_only_answers_are_learnt(template, shipped):
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    tokenizer.chat_template = template
    record = {**RECORDS[3], "input": "In Python."}
    row = finetune.instruction_tokens(tokenizer, record, "it")
    ids, labels = row["input_ids"], row["labels"]
    learnt = [label for label in labels if label != -100]
    assert labels == [-100] * (len(ids) - len(learnt)) + ids[len(ids) - len(learnt) :], (
        "a prompt, then all of the answer"
    )
    prompt, answer = tokenizer.decode(ids[: -len(learnt)]), tokenizer.decode(learnt)
    if template is None:
        assert learnt[-1] == tokenizer.eos_token_id
        assert prompt.endswith("### Instruction:\nWrite the function number_3.\n\nIn Python.\n\n### Response:\n")
        assert answer == RECORDS[3]["output"] + tokenizer.eos_token
    else:
        assert prompt == "<user>Write the function number_3.\n\nIn Python.</user><assistant>"
        assert answer == RECORDS[3]["output"] + "</assistant>"


def test_rows_of_different_length_are_padded_right():
    batch = finetune.PadRight(7)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.slow
def test_supervised_fine_tuning(tmp_path, capsys):
    records = [*RECORDS, {"instruction": "Too long.", "output": "x = 1\n" * 400}]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    trainer = finetune.main(
        [
            *QUICK, "--recipe", "sft", "--text", str(tmp_path / "chat.json"), "--epochs", "3", "--window", "48",
            "--length", "3", "--eval-share", "0.2", "--output", str(tmp_path / "run"),
        ]
    )  # fmt: skip
    assert "left out, longer than 144 tokens (--length 3): 1 records" in capsys.readouterr().out
    assert len(trainer.train_dataset) == 20, "every fifth record is held out"
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated[-1]["eval_loss"] < 0.7 * evaluated[0]["eval_loss"]
    assert "loss on the answers only" in (tmp_path / "run" / "README.md").read_text()
    longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
    assert longest > 48, "the prompts alone are longer than the window"


# Data, and what is refused


def test_texts_of_files_folders_and_records(tmp_path, capsys):
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "notes" / "deep" / "b.py").write_text("two")
    (tmp_path / "notes" / "a.md").write_text("one")
    (tmp_path / "notes" / ".hidden").write_text("not this")
    (tmp_path / "notes" / "image.png").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "lines.jsonl").write_text('{"body": "three"}\n{"body": "four"}\n')
    texts = finetune.read_texts([tmp_path / "notes", tmp_path / "lines.jsonl"], "body")
    assert texts == ["one", "two", "three", "four"]
    assert "left out, no text in utf-8 (see --encoding)" in capsys.readouterr().out
    (tmp_path / "latin.txt").write_bytes("Gr\u00f6\u00dfe".encode("cp1252"))
    with pytest.raises(SystemExit, match="give its --encoding"):
        finetune.read_texts([tmp_path / "latin.txt"], "body")
    assert finetune.read_texts([tmp_path / "latin.txt"], "body", "cp1252") == ["Gr\u00f6\u00dfe"]
    (tmp_path / "packed.txt.xz").write_bytes(lzma.compress(b"five"))
    assert finetune.read_texts([tmp_path / "packed.txt.xz"], "body") == ["five"]
    (tmp_path / ".cache" / "books").mkdir(parents=True)
    (tmp_path / ".cache" / "books" / "c.txt").write_text("six")
    assert finetune.read_texts([tmp_path / ".cache" / "books"], "body") == ["six"], (
        "only what is hidden in the folder is left out"
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"there is no file in .*empty"):
        finetune.read_texts([tmp_path / "empty"], "body")
    with pytest.raises(SystemExit, match=r"record 0 of .*lines.jsonl has no text in 'text'; it has \['body'\]"):
        finetune.read_texts([tmp_path / "lines.jsonl"], "text")
    with pytest.raises(SystemExit, match="does not exist; the name of a dataset goes to --dataset"):
        finetune.read_texts([tmp_path / "missing"], "text")


def test_held_out_text_is_not_trained_on(tokenizer):
    texts = [f"document {i}" for i in range(40)]
    training, held = finetune.hold_out(texts, 0.05)
    assert sorted(training + held) == sorted(texts)
    assert len(held) == 2
    (start,), (end,) = finetune.hold_out(["abcdefghij" * 10], 0.2)
    assert (len(start), len(end)) == (80, 20)
    ids = finetune.tokenize(tokenizer, ["a b", "c"], enough=1e9, quiet=True)
    assert tokenizer.decode(ids) == "a b<|endoftext|>c<|endoftext|>"
    assert finetune.blocks(torch.arange(10), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_a_run_on_ones_own_text(tmp_path, shipped):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line {i} of a book that counts its lines\n" for i in range(400)))
    arguments = ["--steps", "2", "--full", "--text", str(book), "--eval-share", "0.2"]
    trainer = finetune.main([*QUICK, *arguments, "--output", str(tmp_path / "run")])
    assert all(weight.requires_grad for weight in trainer.model.parameters())
    before, after = (e for e in trainer.state.log_history if "eval_loss" in e and e["step"] in (0, 2))
    for name in ("eval_loss", "eval_bits_per_byte_0N_to_1N", "eval_perplexity_2N_to_4N"):
        assert after[name] < 0.8 * before[name], name
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    assert torch.equal(saved.model.embed_tokens.weight, trainer.model.model.embed_tokens.weight)
    assert not torch.equal(saved.model.embed_tokens.weight, base(shipped).model.embed_tokens.weight)
    assert "all weights" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sequences", "3", "--batch-size", "2"], "--sequences 3 is no multiple of --batch-size 2 x 1 processes"),
        (["--full", "--dtype", "bfloat16"], "--dtype bfloat16 is for frozen weights"),
        (["--text", str(EXAMPLES / "batch.py"), "--window", "4096"], "held-out text has less than 16384 tokens"),
    ],
)
def test_what_is_refused(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        finetune.main([*arguments, "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "sft"], "give what to train on with --text or --dataset"),
        (["--model", "other/model"], "give what to train on with --text or --dataset"),
        (["--steps", "1", "--epochs", "1"], "--steps and --epochs exclude each other"),
        (["--text", "a", "--dataset", "b"], "--text and --dataset exclude each other"),
        (["--eval-lengths", "2", "1"], "--eval-lengths must rise"),
    ],
)
def test_arguments_that_contradict_each_other(arguments, message, capsys):
    with pytest.raises(SystemExit):
        finetune.parse_arguments(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("datasets", ["--dataset", "some/text"], r"--dataset needs the package datasets: pip install .freqkv\[train\]"),
        ("peft", [], r"LoRA needs the package peft: pip install .freqkv\[train\].*--full"),
    ],
)
def test_packages_that_are_missing_are_named(module, arguments, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=message):
        finetune.main([*arguments, "--output", str(tmp_path)])


def test_a_dataset_is_streamed(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{"body": f"value_{i:02} = {i}\n" * 60} for i in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []
    load = datasets.load_dataset

    def of_a_file(*name, **options):
        asked.append((name, options))
        return load("json", data_files=str(tmp_path / "data.jsonl"), **options)

    monkeypatch.setattr(datasets, "load_dataset", of_a_file)
    args = finetune.parse_arguments(
        ["--dataset", "owner/name", "config", "--text-column", "body", "--eval-sequences", "2", "--window", "64"]
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    training, held = finetune.language_data(args, tokenizer, 64, 2000, quiet=True)
    assert asked == [(("owner/name", "config"), {"split": "train", "streaming": True})]
    assert held.shape == (2, 256)
    assert training.shape[1] == 128
    trained, kept = (set(re.findall(r"value_\d\d", tokenizer.decode(part.flatten()))) for part in (training, held))
    assert trained
    assert kept
    assert not trained & kept, "what is held out is not trained on"


def test_evaluation_restores_training_and_streams(shipped, tokenizer):
    """Bins are those of one forward over the whole text, at the same numbers."""
    model = base(shipped).train()
    freqkv.patch(model, NUMBERS)
    ids = tokenizer("\n".join(f"x_{i} = {i}" for i in range(200)), return_tensors="pt")["input_ids"][:, :256]
    measure = finetune.Measure(tokenizer, ids, freqkv.Settings(NUMBERS), [1, 2, 4], quiet=True)
    metrics = measure(model)
    assert model.training
    losses = token_losses(model, ids)[0]
    assert metrics["perplexity_1N_to_2N"] == pytest.approx(losses[63:127].mean().exp().item(), rel=1e-4)
    nbytes = len(tokenizer.decode(ids[0, 128:]).encode())
    expected = losses[127:].sum().item() / torch.log(torch.tensor(2.0)).item() / nbytes
    assert metrics["bits_per_byte_2N_to_4N"] == pytest.approx(expected, rel=1e-4)
    streamed = token_losses(model, ids, FreqKVCache(model.config, NUMBERS), chunk_size=50)
    assert metrics["loss"] == pytest.approx(streamed.mean().item(), rel=1e-4)
