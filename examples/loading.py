"""Command-line arguments that all example scripts share: which model, where, and the cache's four numbers."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from freqkv import FreqKVConfig

SHIPPED = Path(__file__).parent / "tiny_lm"
TUNED = Path(__file__).parent / "tiny_lm_tuned"


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and descriptions as they are written."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=str(SHIPPED), help="name or path of a causal language model with RoPE")
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
    group.add_argument("--window", type=int, help="entries per layer; the model's context length by default")
    group.add_argument("--sink-tokens", type=int, help="first tokens, never compressed; 4 by default")
    group.add_argument("--retain-ratio", type=float, help="share of a compressed span that is kept; 0.5 by default")
    group.add_argument(
        "--recent-tokens", type=int, help="window / 8 by default, as suits models that were not fine-tuned for FreqKV"
    )


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.dtype == "auto" and args.device == "cpu" and args.device_map is None:
        dtype = torch.float32
    options = {"dtype": dtype, "attn_implementation": args.attn_implementation}
    if args.load_in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True)
    if args.device_map is not None or args.load_in_4bit:
        options["device_map"] = args.device_map or args.device
        model = AutoModelForCausalLM.from_pretrained(args.model, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, **options).to(args.device)
    return model.eval(), AutoTokenizer.from_pretrained(args.model)


def cache_config(args: argparse.Namespace, model: PreTrainedModel) -> FreqKVConfig:
    """The numbers of the command line, with defaults from beside the model; ends the script where they contradict."""
    try:
        return _cache_config(args, model)
    except (TypeError, ValueError) as error:
        raise SystemExit(str(error)) from None


def _cache_config(args: argparse.Namespace, model: PreTrainedModel) -> FreqKVConfig:
    names = [field.name for field in dataclasses.fields(FreqKVConfig)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    beside = cached_file(args.model, "freqkv.json", _raise_exceptions_for_missing_entries=False)
    if beside is not None:
        return FreqKVConfig(**json.loads(Path(beside).read_text()) | given).resolve(model.config)
    window = FreqKVConfig(args.window).resolve(model.config).window
    assert window is not None
    return FreqKVConfig(**{"recent_tokens": window // 8} | given | {"window": window})
