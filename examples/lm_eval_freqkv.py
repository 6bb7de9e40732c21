r"""Any task of EleutherAI's lm-evaluation-harness on a model that runs with FreqKV.

The script registers the model type `freqkv` and hands over to lm_eval's own command line, with all of its options and
subcommands (`pip install -e ".[eval]"`; lm-eval 0.4.10 is the first release that works with transformers 5):

    python examples/lm_eval_freqkv.py --model freqkv --tasks wikitext --limit 8 \
        --model_args pretrained=examples/tiny_lm,window=512,recent_tokens=64,dtype=float32
    python examples/lm_eval_freqkv.py --model freqkv --tasks hellaswag --num_fewshot 40 --batch_size 8 \
        --model_args pretrained=smollm2,window=512,sink_tokens=4,retain_ratio=0.5,recent_tokens=64,compressor=keep_recent
    accelerate launch examples/lm_eval_freqkv.py --model freqkv ...             # one copy of the model for each GPU

The plain `lm_eval` command of releases up to 0.4.13 finds no model types from outside. Its main branch (September 2026)
imports the modules that `--plugins` names; where yours has that option, this does the same (we have not run it):

    PYTHONPATH=examples lm_eval run --plugins lm_eval_freqkv --model freqkv --model_args ... --tasks ...

The model type is lm_eval's `hf` with one call of `freqkv.patch`. It takes all arguments of `hf` and these:

    window          entries that each layer holds at most; required, None stands for the model's own context length
    sink_tokens     first tokens, never compressed; 4
    retain_ratio    share of a compressed span that is kept; 0.5
    recent_tokens   last entries that wait one compression; 0, the paper's value. About window / 8 suits models that were
                    not fine-tuned with FreqKV
    compressor      low_pass_entries (FreqKV), keep_recent, mean_pool or keep_attended
    preset          paper, streaming or recommended: a compressor with its numbers, which those given beside it override
    pretrained      as of `hf`; smollm2 is SmolLM2-135M-Instruct, as in the other scripts
    max_length      tokens of a text that are read; what is longer loses its beginning. 1,048,576 by default, so that no
                    text is cut: with FreqKV the model's context does not limit it

Up to `window` tokens all figures are those of `hf`, bit for bit. The numbers in a freqkv.json beside the weights are not
read.

Two things depend on max_length:

- Rolling log-likelihoods (wikitext, and other perplexities by word or byte) cut a document into pieces of max_length
  tokens, each of which starts from nothing. By default a document is one piece, which is what a bounded cache is for;
  but the logits of the whole piece are in memory at once, tokens x vocabulary. To compare with `hf`, give both the same
  max_length: up to `window` they agree, and beyond the model's context `hf` reads positions that the model was not
  trained on.
- `--batch_size auto` tries texts of max_length tokens for rolling log-likelihoods and for generation, and so asks for
  one.

Give each setting a file of its own where you use lm_eval's `--use_cache FILE`: it stores answers by the text of a
request alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from loading import source
from torch import Tensor
from transformers import PreTrainedModel

import freqkv
from freqkv import PRESETS, FreqKVConfig
from freqkv.compressors import Compressor, compressor_name

COMPRESSORS = ("low_pass_entries", "keep_recent", "mean_pool", "keep_attended")
NO_LIMIT = 2**20  # tokens; a number, since lm_eval counts with it
MISSING = object()  # None is a window


@register_model("freqkv")
class FreqKVLM(HFLM):
    """lm_eval's model type `hf`, patched; see the top of this file for its arguments."""

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        window: int | str | object | None = MISSING,
        sink_tokens: int | str | None = None,
        retain_ratio: float | str | None = None,
        recent_tokens: int | str | None = None,
        compressor: str | None = None,
        preset: str | None = None,
        max_length: int | str | None = None,
        gguf_file: str | None = None,
        **options: Any,
    ) -> None:
        # All that can be wrong in the arguments is told before the model is loaded.
        _check_names(options)
        if window is MISSING:
            raise TypeError(
                "the model type freqkv needs window=, the entries that each layer holds at most; window=None stands for the "
                "model's own context length"
            )
        given = {
            "window": _whole("window", window),
            "sink_tokens": _whole("sink_tokens", sink_tokens),
            "retain_ratio": _number("retain_ratio", retain_ratio),
            "recent_tokens": _whole("recent_tokens", recent_tokens),
        }
        numbers: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        chosen = None if compressor is None else _compressor(compressor)
        if preset is None:
            numbers = {"config": FreqKVConfig(**numbers)}
        elif preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is none of {', '.join(PRESETS)}")
        length = _whole("max_length", max_length)
        if length is not None and length < 1:
            raise ValueError(f"max_length={length} must be 1 or more")
        self._length_given = length is not None
        if isinstance(pretrained, str):
            pretrained, files = source(argparse.Namespace(model=pretrained, gguf_file=gguf_file))
            options |= files
        else:
            _check_known(options)
        super().__init__(pretrained, max_length=length or NO_LIMIT, **options)
        self.patch = freqkv.patch(self.model, preset=preset, compressor=chosen, **numbers)
        self.preset = preset
        # Models that name a cache of transformers' own here (Gemma 2) would generate with that one.
        self.model.generation_config.cache_implementation = None

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits of whole texts: `hf` would have a cache made, filled and thrown away.

        As in `hf`, there is no attention mask: padding stands on the right, the loss at a token never depends on what
        comes after it, and when entries are folded depends on the number of tokens before it alone.
        """
        dtype = getattr(self, "mixed_precision_dtype", None)
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            logits: Tensor = self.model(inps, use_cache=False).logits
        return logits

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        if not requests and not self._length_given:
            raise ValueError(
                "batch_size=auto tries texts of max_length tokens for tasks of this kind: give max_length= the tokens of the "
                "longest text, or a number for batch_size"
            )
        return int(super()._detect_batch_size(requests, pos))

    def get_model_info(self) -> dict[str, Any]:
        """What results say about the model; the numbers are those that ran, whatever was left to defaults."""
        assert self.patch.config is not None
        assert self.patch.compressor is not None
        ran = {
            **dataclasses.asdict(self.patch.config),
            "compressor": compressor_name(self.patch.compressor),
            "preset": self.preset,
        }
        return {**super().get_model_info(), "freqkv": ran}


def _check_names(options: dict[str, Any]) -> None:
    """Raise TypeError where an argument is no doubt a misspelt one of ours.

    All others go on to `hf`, and from there to transformers, which refuses those that it does not know.
    """
    own = ("window", "sink_tokens", "retain_ratio", "recent_tokens", "compressor", "preset", "max_length")
    for name in options:
        meant = difflib.get_close_matches(name, own, n=1, cutoff=0.75)
        if meant:
            raise TypeError(f"the model type freqkv has no argument {name}; did you mean {meant[0]}?")


def _check_known(options: dict[str, Any]) -> None:
    """Raise TypeError for what `hf` would ignore: it loads no model, and so passes nothing on to transformers."""
    unknown = sorted(options.keys() - inspect.signature(HFLM.__init__).parameters.keys())
    if unknown:
        raise TypeError(f"with a model that is loaded already, these arguments have no effect: {', '.join(unknown)}")


def _compressor(name: str) -> Compressor:
    if name not in COMPRESSORS:
        raise ValueError(f"compressor={name!r} is none of {', '.join(COMPRESSORS)}")
    function: Compressor = getattr(freqkv, name)
    return function


def _number(name: str, value: Any) -> float | None:
    """A number from the command line, which may come as a string."""
    if value is None or value == "None":
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is a number, got {value!r}") from None


def _whole(name: str, value: Any) -> int | None:
    """The same of a number of tokens; lm_eval reads 1e3 and -1 as 1000.0 and -1.0."""
    number = _number(name, value)
    if number is None:
        return None
    if not number.is_integer():
        raise TypeError(f"{name} is a whole number of tokens, got {value!r}")
    return int(number)


if __name__ == "__main__":
    cli_evaluate()
