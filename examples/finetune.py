"""Fine-tune a causal language model with compression in its forward, so that it learns to read its compressed past.

LoRA on the attention projections, embeddings and norms trained as a whole, sequences of two windows: the paper's recipe.
The numbers of the cache are written beside the adapter (freqkv.json), with a model card.

    python examples/finetune.py --steps 20 --sequences 4         # the shipped model, on Python's standard library
    python examples/finetune.py --model NAME_OR_PATH --text books/ --output runs/books --gradient-checkpointing
    python examples/finetune.py --model NAME_OR_PATH --dataset NAME --text-column text
    python examples/finetune.py --model NAME_OR_PATH --recipe sft --text LongAlpaca-12k.json
    python examples/finetune.py --model smollm2 --text book.txt --window 512 --lora-only --output runs/smollm2
    accelerate launch --config_file examples/configs/fsdp2.yaml examples/finetune.py --model NAME_OR_PATH --text books/
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import math
import os
import platform
import random
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import DistributedType
from corpus import VALIDATION, held_out_documents, training_documents
from loading import SHIPPED, SMOLLM2, SMOLLM2_HUB, Formatter, load_tokenizer, plain_weights, source
from measuring import read_text
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import freqkv
from freqkv import PRESETS, FreqKVCache, FreqKVConfig, Settings
from freqkv.compressors import compressor_name
from freqkv.evaluation import bits_per_byte, byte_lengths, kl_to_reference, token_losses

EXTRA = 'pip install "freqkv[train]"'
IGNORED = -100  # the label of a token that is not learnt
STEPS, SFT_EPOCHS = 1000, 5
COMPRESSORS = ("low_pass_entries", "keep_recent", "mean_pool", "keep_attended", "keep_novel")  # names in freqkv
LOGITS_AT_ONCE = 256  # tokens whose predictions are compared at a time: a large vocabulary takes much memory
SHARDS = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # set by accelerate launch
# Of Stanford Alpaca, for tokenizers without a chat template.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default=str(SHIPPED), help="name or path of a causal language model with RoPE; smollm2"
    )
    group.add_argument("--gguf-file", help="name of a GGUF file in the folder or repository of --model")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of frozen weights; what is trained is held in float32. auto is bfloat16 for LoRA on a GPU, else float32",
    )
    group.add_argument("--attn-implementation", default="sdpa", help="eager, sdpa, flex_attention, flash_attention_2")

    group = parser.add_argument_group("cache")
    group.add_argument("--window", type=int, help="entries per layer; the model's context length by default")
    group.add_argument(
        "--preset",
        choices=PRESETS,
        default="paper",
        help="a compressor with its numbers, which those given here override",
    )
    group.add_argument("--sink-tokens", type=int, help="first tokens, never compressed")
    group.add_argument("--retain-ratio", type=float, help="share of a compressed span that is kept")
    group.add_argument("--recent-tokens", type=int, help="last tokens that wait one compression; the paper: 0")
    group.add_argument("--compressor", choices=COMPRESSORS, help="what a span is compressed by")
    group.add_argument(
        "--plain",
        action="store_true",
        help="train with full attention, as a rival",
    )
    group.add_argument(
        "--teacher",
        action="store_true",
        help="learn to predict behind the window what the model predicts with full attention (KL), in place of the text",
    )

    group = parser.add_argument_group("data")
    group.add_argument("--recipe", choices=["lm", "sft"], default="lm", help="sft: loss on the answers only")
    group.add_argument(
        "--text",
        type=Path,
        nargs="+",
        help="files, and folders with files: text (also .xz); .json and .jsonl are records with --text-column, or, for sft, "
        "with instruction and output (LongAlpaca's format)",
    )
    group.add_argument("--dataset", nargs="+", metavar=("NAME", "CONFIG"), help="of the package datasets, streamed")
    group.add_argument("--split", default="train", help="of --dataset")
    group.add_argument("--text-column", default="text", help="of records, for --recipe lm")
    group.add_argument("--encoding", default="utf-8", help="of text files")
    group.add_argument("--eval-text", type=Path, nargs="+", help="held-out text; a part of the data by default")
    group.add_argument(
        "--eval-share", type=float, default=0.05, help="of the data that is held out without --eval-text"
    )
    group.add_argument(
        "--length", type=float, default=2, help="tokens of a sequence, in windows; sft leaves longer records out"
    )

    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, help=f"{STEPS} by default; for sft, --epochs")
    group.add_argument("--epochs", type=float, help=f"instead of --steps; {SFT_EPOCHS} by default for sft")
    group.add_argument("--sequences", type=int, default=64, help="per step, over all processes")
    group.add_argument("--batch-size", type=int, default=1, help="sequences in one forward of one process")
    group.add_argument("--learning-rate", type=float, default=2e-5)
    group.add_argument("--warmup-steps", type=int, default=20)
    group.add_argument(
        "--schedule", default="constant_with_warmup", help="any of transformers' learning rate schedules"
    )
    group.add_argument("--weight-decay", type=float, default=0.0)
    group.add_argument("--full", action="store_true", help="train all weights instead of LoRA, embeddings and norms")
    group.add_argument("--lora-only", action="store_true", help="a small adapter: embeddings and norms are not trained")
    group.add_argument("--lora-rank", type=int, default=8)
    group.add_argument("--lora-alpha", type=int, default=16)
    group.add_argument("--lora-dropout", type=float, default=0.0)
    group.add_argument(
        "--lora-targets", nargs="+", help="names of linear layers; all of the attention modules by default"
    )
    group.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="compute in bfloat16 (autocast); by default on a GPU"
    )
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    group.add_argument("--compile", action="store_true", help="torch.compile the training step")
    group.add_argument("--seed", type=int, default=0)

    group = parser.add_argument_group("run")
    group.add_argument(
        "--output", type=Path, default=Path("runs/finetune"), help="folder of checkpoints and the result"
    )
    group.add_argument("--log-every", type=int, default=10, help="steps")
    group.add_argument("--eval-every", type=int, default=100, help="steps; 0: before and after training only")
    group.add_argument(
        "--eval-lengths", type=float, nargs="+", default=[1, 2, 4], help="positions up to which is measured, in windows"
    )
    group.add_argument("--eval-sequences", type=int, default=8, help="of the last of --eval-lengths")
    group.add_argument("--save-every", type=int, default=100, help="steps; 0: after training only")
    group.add_argument("--save-limit", type=int, default=2, help="checkpoints that are kept")
    group.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="CHECKPOINT",
        help="go on from the last checkpoint, or from this one",
    )
    group.add_argument(
        "--report-to", nargs="+", default=["none"], help="tensorboard, wandb, ... (Trainer's integrations)"
    )
    args = parser.parse_args(arguments)
    if args.steps is not None and args.epochs is not None:
        parser.error("--steps and --epochs exclude each other")
    if args.text is not None and args.dataset is not None:
        parser.error("--text and --dataset exclude each other")
    if args.text is None and args.dataset is None and (args.model != str(SHIPPED) or args.recipe == "sft"):
        parser.error("give what to train on with --text or --dataset")
    if args.teacher and (args.plain or args.recipe == "sft"):
        parser.error("--teacher is for --recipe lm, and excludes --plain")
    if args.teacher and args.length <= 1:
        parser.error("--teacher learns from tokens behind the window: --length must be above 1")
    if sorted(set(args.eval_lengths)) != args.eval_lengths or args.eval_lengths[0] <= 0:
        parser.error("--eval-lengths must rise")
    return args


# Data


def files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            inside = [part for part in sorted(path.rglob("*")) if part.is_file()]
            # Hidden is what is hidden inside the folder; where the folder itself stands does not matter.
            shown = [part for part in inside if not any(name.startswith(".") for name in part.relative_to(path).parts)]
            if not shown:
                raise SystemExit(f"there is no file in {path}")
            yield from shown
        elif path.exists():
            yield path
        else:
            raise SystemExit(f"{path} does not exist; the name of a dataset goes to --dataset")


def read_records(path: Path) -> list[dict[str, Any]]:
    """A list of objects in JSON, or one object a line."""
    text = path.read_text(encoding="utf-8")
    records = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
    if not (isinstance(records, list) and all(isinstance(record, dict) for record in records)):
        raise SystemExit(f"{path} is no list of records")
    return records


def field(record: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(record.get(name), str):
        raise SystemExit(f"{where} has no text in {name!r}; it has {sorted(record)}")
    return record[name]


def read_texts(paths: Sequence[Path], column: str, encoding: str = "utf-8") -> list[str]:
    """Of files that were named, and of those in folders, where files that are no text in this encoding are left out."""
    texts = []
    for path in files(paths):
        if path.suffix in (".json", ".jsonl"):
            records = read_records(path)
            texts += [field(record, column, f"record {i} of {path}") for i, record in enumerate(records)]
        elif path in paths:
            texts.append(read_text(path, encoding))
        else:
            try:
                texts.append(read_text(path, encoding))
            except SystemExit:
                print(f"left out, no text in {encoding} (see --encoding): {path}")
    if not texts:
        raise SystemExit(f"there is no text in {', '.join(map(str, paths))}")
    return texts


def dataset_records(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit(f"--dataset needs the package datasets: {EXTRA}, or give files with --text") from None
    yield from load_dataset(*args.dataset, split=args.split, streaming=True)


def hold_out(items: list[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Two parts without overlap: items spread over the whole, or the end of a single text."""
    if not 0 < share < 1:
        raise SystemExit(f"--eval-share {share} must lie between 0 and 1")
    if len(items) == 1 and isinstance(items[0], str):
        cut = int(len(items[0]) * (1 - share))
        return [items[0][:cut]], [items[0][cut:]]
    if len(items) < 2:
        raise SystemExit("there is nothing to hold out for evaluation: give it with --eval-text")
    every = max(2, round(1 / share))
    held = set(range(every - 1, len(items), every)) or {len(items) - 1}
    return [item for i, item in enumerate(items) if i not in held], [items[i] for i in sorted(held)]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], enough: float, quiet: bool) -> Tensor:
    """Texts behind one another, each ended by the tokenizer's end token; stops once there are enough tokens."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows, count = [], 0
    with tqdm(desc="tokenize", unit="token", unit_scale=True, disable=quiet) as bar:
        for text in texts:
            ids = tokenizer(text, verbose=False)["input_ids"]
            rows.append(torch.tensor(ids if ids[-1:] == end else ids + end, dtype=torch.int32))
            count += len(rows[-1])
            bar.update(len(rows[-1]))
            if count >= enough:
                break
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int32)


def blocks(tokens: Tensor, length: int) -> Tensor:
    """`(blocks, length)`; what is left at the end is not used."""
    return tokens[: len(tokens) // length * length].view(-1, length)


def instruction_tokens(tokenizer: PreTrainedTokenizerBase, record: dict[str, Any], where: str) -> dict[str, list[int]]:
    """Tokens of one record, and labels that leave the prompt out.

    Prompt and answer are tokenized by themselves, so that no token is partly of both.
    """
    instruction, answer = field(record, "instruction", where), field(record, "output", where)
    if record.get("input"):
        instruction += f"\n\n{field(record, 'input', where)}"
    if tokenizer.chat_template is not None:
        said = [{"role": "user", "content": instruction}]
        prompt = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*said, {"role": "assistant", "content": answer}], tokenize=False)
        if not whole.startswith(prompt):
            raise SystemExit(
                "this chat template changes the prompt once there is an answer: what to learn cannot be told"
            )
        prompt_ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        answer_ids = tokenizer(whole[len(prompt) :], add_special_tokens=False, verbose=False)["input_ids"]
    else:
        if tokenizer.eos_token_id is None:
            raise SystemExit("--recipe sft needs a tokenizer with an end token, or with a chat template")
        prompt_ids = tokenizer(PROMPT.format(instruction=instruction), verbose=False)["input_ids"]
        if prompt_ids[-1:] == [tokenizer.eos_token_id]:  # some tokenizers end every text
            prompt_ids = prompt_ids[:-1]
        answer_ids = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        answer_ids = [*answer_ids, tokenizer.eos_token_id]
    return {"input_ids": prompt_ids + answer_ids, "labels": [IGNORED] * len(prompt_ids) + answer_ids}


class Blocks(torch.utils.data.Dataset):
    """Rows of equal length, all tokens learnt."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index].long()
        return {"input_ids": row, "labels": row}


class PadRight:
    """Collates rows of different length. `pad_id` is hidden by the mask; any token does."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for row in rows:
            tokens = len(row["input_ids"])
            padding = longest - tokens
            batch["input_ids"].append([*row["input_ids"], *[self.pad_id] * padding])
            batch["labels"].append([*row["labels"], *[IGNORED] * padding])
            batch["attention_mask"].append([1] * tokens + [0] * padding)
        return {name: torch.tensor(values) for name, values in batch.items()}


def language_data(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, window: int, enough: float, quiet: bool
) -> tuple[Tensor, Tensor]:
    """Training sequences `(n, length)` and held-out ones `(m, longest evaluated)`."""
    training: Iterable[str]
    held: list[str] = []
    if args.eval_text is not None:
        held = read_texts(args.eval_text, args.text_column, args.encoding)
    if args.dataset is not None:
        records = (field(record, args.text_column, "a record of --dataset") for record in dataset_records(args))
        if args.eval_text is None:  # of a stream of unknown length, the beginning
            wanted, characters = args.eval_sequences * max(args.eval_lengths) * window, 0
            for text in records:
                held.append(text)
                characters += len(text)
                if characters >= 8 * wanted:
                    break
        training = records
    elif args.text is not None:
        training = read_texts(args.text, args.text_column, args.encoding)
        if not held:
            training, held = hold_out(training, args.eval_share)
    else:
        training = [text for _, text in training_documents()]
        held = held or [text for _, text in held_out_documents(VALIDATION)]
    if isinstance(training, list):  # in the order of their names, the first texts may be of one kind
        random.Random(args.seed).shuffle(training)
    length, longest = round(args.length * window), round(max(args.eval_lengths) * window)
    evaluated = blocks(tokenize(tokenizer, held, math.inf, quiet=True), longest)[: args.eval_sequences]
    if not len(evaluated):
        raise SystemExit(
            f"the held-out text has less than {longest} tokens, the last of --eval-lengths: give more with --eval-text, or "
            "measure shorter ones"
        )
    rows = blocks(tokenize(tokenizer, training, enough, quiet), length)
    if not len(rows):
        raise SystemExit(f"the text has less than the {length} tokens of one sequence (--length {args.length:g})")
    return rows, evaluated


def instruction_data(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, window: int, quiet: bool
) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    """Training and held-out records."""
    length = round(args.length * window)

    def read(records: Iterable[tuple[str, dict[str, Any]]]) -> list[dict[str, list[int]]]:
        bar = tqdm(records, desc="tokenize", unit="record", disable=quiet)
        return [instruction_tokens(tokenizer, record, where) for where, record in bar]

    def of_files(paths: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
        for path in files(paths):
            yield from ((f"record {i} of {path}", record) for i, record in enumerate(read_records(path)))

    if args.dataset is not None:
        rows = read((f"record {i} of --dataset", record) for i, record in enumerate(dataset_records(args)))
    else:
        rows = read(of_files(args.text))
    held = read(of_files(args.eval_text)) if args.eval_text is not None else None
    if held is None:
        rows, held = hold_out(rows, args.eval_share)
    kept = [[row for row in part if len(row["input_ids"]) <= length] for part in (rows, held)]
    left_out = len(rows) + len(held) - len(kept[0]) - len(kept[1])
    if left_out and not quiet:
        print(f"left out, longer than {length} tokens (--length {args.length:g}): {left_out} records")
    if not (kept[0] and kept[1]):
        raise SystemExit(f"no record has at most {length} tokens: raise --length")
    return kept[0], kept[1]


# Model


def lora(model: PreTrainedModel, args: argparse.Namespace) -> nn.Module:
    """LoRA on the linear layers of attention modules; embeddings and norms as a whole."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise SystemExit(f"LoRA needs the package peft: {EXTRA}, or train all weights with --full") from None
    support = freqkv.supported(model)
    assert support.analysis is not None
    linear = {
        name.rpartition(".")[2]
        for layer in support.analysis.layers
        for name, module in layer.module.named_modules()
        if any(_dimensions(weight) == 2 for weight in module.parameters(recurse=False))
    }
    embeddings = model.get_input_embeddings()
    whole = {
        name.rpartition(".")[2] for name, module in model.named_modules() if module is embeddings or _is_norm(module)
    }
    text_config = model.config.get_text_config(decoder=True)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=sorted(linear) if args.lora_targets is None else args.lora_targets,
        modules_to_save=None if args.lora_only else sorted(whole),
        # What is one weight in the model stays one: else the trained embeddings would part from the output layer.
        ensure_weight_tying=bool(getattr(text_config, "tie_word_embeddings", False)) and not args.lora_only,
    )
    tuned = get_peft_model(model, config)
    tuned.peft_config["default"].base_model_name_or_path = base_name(args)
    for weight in tuned.parameters():
        if weight.requires_grad:  # steps of 2e-5 are lost in bfloat16
            weight.data = weight.data.float()
    return tuned


def base_name(args: argparse.Namespace) -> str:
    """How others find the model that was trained further: not by the place of a file on this machine."""
    return SMOLLM2_HUB if args.model == SMOLLM2 else str(args.model)


def _is_norm(module: nn.Module) -> bool:
    """Whether it has weights for each channel and nothing else."""
    dimensions = [_dimensions(weight) for weight in module.parameters()]
    return not list(module.children()) and set(dimensions) == {1}


def _dimensions(weight: Tensor) -> int:
    # DeepSpeed's third stage leaves an empty tensor behind, with the true shape beside it.
    return len(getattr(weight, "ds_shape", weight.shape))


# Training


class FreqKVTrainer(Trainer):
    """A Trainer that evaluates by streaming held-out text through a cache, position by position."""

    measure: Measure | None = None
    teacher: Teacher | None = None

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self.teacher(model, inputs["input_ids"])
        return (loss, {}) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        if self.measure is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        with self.compute_loss_context_manager():
            metrics = self.measure(self.model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Teacher:
    """The divergence of a model that runs through FreqKV from itself with full attention and before its training.

    Parameters
    ----------
    window : int
        What is predicted from the token at this place on is compared: before it, both see the same.
    other : PreTrainedModel, optional
        A copy of the untrained model; by default its adapters are switched off.
    """

    def __init__(self, window: int, other: nn.Module | None = None) -> None:
        self.window, self.other = window, other

    def __call__(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Mean KL(teacher || model) in nats per token, of `(batch, tokens)` ids."""
        with torch.no_grad():
            wanted = self._logits(model, ids)
        own = model(input_ids=ids, use_cache=False).logits[:, self.window :]
        parts = zip(own.split(LOGITS_AT_ONCE, dim=1), wanted.split(LOGITS_AT_ONCE, dim=1), strict=True)
        total = sum(kl_to_reference(x, y).sum() for x, y in parts)
        return total / own[..., 0].numel()

    def _logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        if self.other is not None:
            return self.other(input_ids=ids, use_cache=False).logits[:, self.window :]
        adapted = next(module for module in model.modules() if hasattr(module, "disable_adapter"))
        model.eval()  # no dropout
        try:
            with freqkv.patch(model), adapted.disable_adapter():  # without numbers: full attention
                return model(input_ids=ids, use_cache=False).logits[:, self.window :]
        finally:
            model.train()


class Measure:
    """Perplexity and bits per byte of held-out sequences between each two lengths, at the memory of one cache.

    Every process measures all sequences, so that sharded weights are gathered by all of them alike.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ids: Tensor,
        settings: Settings,
        lengths: Sequence[float],
        quiet: bool,
    ) -> None:
        self.ids, self.settings = ids.long(), settings
        self.edges = [0, *(round(length * settings.config.window) for length in lengths)]
        self.names = [f"{a:g}N_to_{b:g}N" for a, b in itertools.pairwise([0, *lengths])]
        try:
            self.lengths = byte_lengths(tokenizer, self.ids)
        except ValueError as error:
            self.lengths = None
            if not quiet:
                print(f"perplexity is measured, bits per byte are not: {error}")

    def __call__(self, model: nn.Module) -> dict[str, float]:
        parts = []
        for row in self.ids:
            cache = FreqKVCache(model.config, **self.settings.options)
            parts.append(token_losses(model, row[None], cache, chunk_size=self.settings.config.window))
        losses = torch.cat(parts).cpu()
        metrics = {"loss": losses.mean().item()}
        for name, (start, stop) in zip(self.names, itertools.pairwise(self.edges), strict=True):
            metrics[f"perplexity_{name}"] = losses[:, max(start, 1) - 1 : stop - 1].mean().exp().item()
        if self.lengths is not None:
            bins = bits_per_byte(losses, self.lengths, self.edges)
            metrics |= {
                f"bits_per_byte_{name}": part.bits_per_byte for name, part in zip(self.names, bins, strict=True)
            }
        return metrics


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulated, rest = divmod(args.sequences, args.batch_size * processes)
    if rest or not accumulated:
        raise SystemExit(
            f"--sequences {args.sequences} is no multiple of --batch-size {args.batch_size} x {processes} processes"
        )
    # transformers 5.2x calls it by another name than those before.
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    checkpointing = {name: True, f"{name}_kwargs": {"use_reentrant": False}} if args.gradient_checkpointing else {}
    epochs = args.epochs if args.epochs is not None or args.recipe == "lm" or args.steps else SFT_EPOCHS
    return TrainingArguments(
        output_dir=str(args.output),
        max_steps=-1 if epochs is not None else args.steps or STEPS,
        num_train_epochs=epochs or 1,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=accumulated,
        learning_rate=args.learning_rate,
        warmup_steps=args.warmup_steps,
        lr_scheduler_type=args.schedule,
        weight_decay=args.weight_decay,
        adam_beta2=0.95,
        bf16=torch.cuda.is_available() if args.bf16 is None else args.bf16,
        torch_compile=args.compile,
        use_cpu=not torch.accelerator.is_available(),  # also tells several processes that they are on CPUs
        dataloader_pin_memory=torch.accelerator.is_available(),
        logging_steps=args.log_every,
        eval_strategy="steps" if args.eval_every else "no",
        eval_steps=args.eval_every or None,
        eval_on_start=True,
        save_strategy="steps" if args.save_every else "no",
        save_steps=args.save_every or 500,
        save_total_limit=args.save_limit,
        report_to=args.report_to,
        seed=args.seed,
        remove_unused_columns=False,
        prediction_loss_only=True,
        label_names=["labels"],
        **checkpointing,
    )


def load(args: argparse.Namespace) -> nn.Module:
    """The model, patched and with what is trained."""
    # FSDP keeps the weights of a layer as one piece, of one dtype.
    lower = not args.full and torch.cuda.is_available() and not SHARDS
    auto = torch.bfloat16 if lower else torch.float32
    if args.full and args.dtype not in ("auto", "float32"):
        raise SystemExit(f"--dtype {args.dtype} is for frozen weights; with --full, all weights are trained in float32")
    dtype = auto if args.dtype == "auto" else getattr(torch, args.dtype)
    name, options = source(args)
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, attn_implementation=args.attn_implementation, **options
    )
    if options:
        plain_weights(model)
    if args.plain:
        freqkv.patch(model)  # only for the cache that it is measured through
    else:
        freqkv.patch(model, **cache_settings(args, model.config).options)
    return model if args.full else lora(model, args)


def check_unused(folder: Path) -> None:
    """That a run does not write over what an earlier one left."""
    results = ("model*.safetensors", "adapter_model.safetensors", "checkpoint-*")
    left = sorted(file.name for pattern in results for file in folder.glob(pattern))
    if left:
        raise SystemExit(f"{folder} holds {left[0]} of an earlier run: --resume it, or name another --output")


def cache_settings(args: argparse.Namespace, model_config: Any) -> Settings:
    """Those of the command line; ends the script where they contradict."""
    names = ("window", "sink_tokens", "retain_ratio", "recent_tokens")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    try:
        settings = PRESETS[args.preset].settings(model_config, **given)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if args.compressor is None:
        return settings
    return dataclasses.replace(settings, compressor=getattr(freqkv, args.compressor))


def check_teacher(args: argparse.Namespace, config: FreqKVConfig, model: nn.Module) -> None:
    """That the model can teach: full attention knows no more than its context."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if args.teacher and context and args.length * config.window > context:
        raise SystemExit(
            f"--teacher: sequences of {args.length:g} windows, {round(args.length * config.window)} tokens, leave the model's "
            f"context of {context}, where full attention teaches nothing: take a smaller --window or --length"
        )
    if args.teacher and SHARDS:
        raise SystemExit("--teacher does not run on sharded weights (FSDP): launch without this config")


def untrained(model: nn.Module) -> nn.Module:
    """A copy of a model that is trained as a whole, to learn from."""
    copied = copy.deepcopy(model)
    freqkv.unpatch(copied)
    return copied.eval().requires_grad_(False)


def main(arguments: Sequence[str] | None = None) -> Trainer:
    args = parse_arguments(arguments)
    if args.resume is None and int(os.environ.get("RANK", "0")) == 0:
        check_unused(args.output)
    training = training_arguments(args)  # before the model: DeepSpeed's third stage shards it as it is loaded
    set_seed(args.seed)
    quiet = not training.should_log
    tokenizer = load_tokenizer(args)
    model = load(args)
    settings = cache_settings(args, model.config)
    config = settings.config
    check_teacher(args, config, model)
    options: dict[str, Any] = {}
    if args.recipe == "sft":
        rows, held = instruction_data(args, tokenizer, config.window, quiet)
        options = {"train_dataset": rows, "eval_dataset": held[: args.eval_sequences]}
        options["data_collator"] = PadRight(tokenizer.eos_token_id or 0)
    else:
        # One process tokenizes, and the others map what it wrote.
        folder = args.output / "tokens"
        length = round(args.length * config.window)
        enough = math.inf if training.max_steps < 0 else training.max_steps * args.sequences * length
        with training.main_process_first(local=False, desc="tokenize"):
            if training.process_index == 0:
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(language_data(args, tokenizer, config.window, enough, quiet), folder / "sequences.pt")
            rows, held = torch.load(folder / "sequences.pt", mmap=True)
        options = {"train_dataset": Blocks(rows), "eval_dataset": Blocks(held), "data_collator": default_data_collator}
    if not quiet:
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        print(f"{len(rows):,} sequences; {trained / 1e6:,.2f} million weights are trained; {config}")
    trainer = FreqKVTrainer(model=model, args=training, processing_class=tokenizer, **options)
    if SHARDS and trainer.accelerator.distributed_type != DistributedType.FSDP:
        raise SystemExit("accelerate shards (FSDP) on several accelerators only: launch on CPUs without this config")
    if args.teacher:
        trainer.teacher = Teacher(config.window, untrained(model) if args.full else None)
        trainer.model_accepts_loss_kwargs = False  # means of equal batches, which the Trainer averages
    if args.recipe == "lm":
        trainer.measure = Measure(tokenizer, held, settings, args.eval_lengths, quiet)
    trainer.train(resume_from_checkpoint={None: None, "last": True}.get(args.resume, args.resume))
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if not evaluated or evaluated[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    save(args, trainer, settings, len(rows))
    return trainer


def save(args: argparse.Namespace, trainer: Trainer, settings: Settings, sequences: int) -> None:
    """The adapter, or all weights, with tokenizer, numbers of the cache, and model card."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(args.output))
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(args.output / "trainer_state.json"))
        settings.save(args.output)
        (args.output / "README.md").write_text(card(args, trainer, settings, sequences))
        print(f"written to {args.output}")


def card(args: argparse.Namespace, trainer: Trainer, settings: Settings, sequences: int) -> str:
    config = settings.config
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    names = [name for name in evaluated[-1] if name.startswith("eval_") and not name.endswith(("runtime", "second"))]
    table = "\n".join(
        f"| {name.removeprefix('eval_').replace('_', ' ')} | {evaluated[0][name]:.4f} | {evaluated[-1][name]:.4f} |"
        for name in names
    )
    data = "Python's standard library" if args.text is None and args.dataset is None else args.dataset or args.text
    data = data if isinstance(data, str) else ", ".join(part.name if isinstance(part, Path) else part for part in data)
    how = "all weights" if args.full else (
        f"LoRA (r = {args.lora_rank}, alpha = {args.lora_alpha}) on {', '.join(sorted(_targets(trainer.model)))}"
        f"{'' if args.lora_only else '; embeddings and norms as a whole'}"
    )  # fmt: skip
    if args.plain:
        how += "; with full attention over the sequences, not through the cache"
    if args.teacher:
        how += "; to predict behind the window what the untrained model predicts with full attention (KL)"
    base = "model" if args.full else "adapter"
    loading = (
        f'model = AutoModelForCausalLM.from_pretrained("{args.output}")'
        if args.full
        # what was trained in float32 would be cast to the checkpoint's own dtype
        else f'base = AutoModelForCausalLM.from_pretrained("{base_name(args)}", dtype="float32")\n'
        f'model = PeftModel.from_pretrained(base, "{args.output}")'
    )
    imports = "" if args.full else "from peft import PeftModel\n"
    measured = "text, streamed through a cache of N entries, by position"
    if args.recipe == "sft":
        measured = "records, loss on the answers"
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return f"""---
base_model: {base_name(args)}
library_name: {"transformers" if args.full else "peft"}
tags: [freqkv, long-context]
---

# {Path(args.model).name}, fine-tuned with FreqKV

This {base} was trained with [FreqKV](https://arxiv.org/abs/2505.00570) in its forward: it has learnt to read a cache of bounded
size. Use it with the same settings, which stand in `freqkv.json`: {config}, {compressor_name(settings.compressor)}.

```python
from transformers import AutoModelForCausalLM
{imports}import freqkv

{loading}
freqkv.patch(model, **freqkv.Settings.load("{args.output}").options)
```

## Training

- Data: {data}; {sequences:,} sequences{"" if args.recipe == "sft" else f" of {round(args.length * config.window):,} tokens"}\
{", loss on the answers only" if args.recipe == "sft" else ""}.
- Trained: {how}.
- {trainer.state.global_step:,} steps of {args.sequences} sequences, learning rate {args.learning_rate:g} \
({args.schedule}, {args.warmup_steps} steps of warmup), AdamW (0.9, 0.95), weight decay {args.weight_decay:g}, \
seed {args.seed}.
- {training_precision(trainer)}, on {trainer.args.world_size} process(es), {hardware}; torch {torch.__version__}, \
transformers {transformers.__version__}.
- Command: `{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`

## Evaluation

Held-out {measured} \
(N = {config.window}).

| | before | after |
|---|---|---|
{table}
"""


def training_precision(trainer: Trainer) -> str:
    dtypes = {weight.dtype for weight in trainer.model.parameters() if not weight.requires_grad} - {torch.float32}
    frozen = "".join(f"; frozen weights in {str(dtype).removeprefix('torch.')}" for dtype in dtypes)
    return ("bfloat16 (autocast), what is trained in float32" if trainer.args.bf16 else "float32") + frozen


def _targets(model: nn.Module) -> set[str]:
    return set(model.peft_config["default"].target_modules)


if __name__ == "__main__":
    main()
