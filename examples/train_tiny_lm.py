"""Train a small language model on Python's standard library and export it as ``examples/tiny_lm/``.

The model is a Llama with a 512-token window, small enough to train on a CPU in an hour or two and to ship with the
examples. It learns to continue Python code and to recall facts placed in it (see ``corpus.py``)::

    python examples/train_tiny_lm.py --minutes 95

Needs PyTorch 2.9 or newer for its Muon optimizer.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from corpus import (
    MAX_DOCUMENT_CHARS,
    TEST,
    VALIDATION,
    RecallTask,
    held_out_documents,
    random_fact,
    training_documents,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from freqkv.evaluation import PositionBin, RecallQuestion, bits_per_byte, byte_lengths, recall_accuracy, token_losses

WINDOW = 512
END = "<|endoftext|>"
# A line break takes the next line's indentation with it, so that both are one token; digits stand alone.
SPLIT = r"\s*[\r\n][ \t]*| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
RECALL_DISTANCES = (16, 32, 64, 128, 192, 256, 320, 384, 448, 480)
PROMPT_LENGTH = 504
TEST_QUESTIONS = 64
LIBRARY_REPEATS = 2  # the library's own tests are more than half of the text, and less like what is held out


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="budget in optimizer steps")
    parser.add_argument("--minutes", type=float, default=95.0, help="budget in minutes; the first one used up ends it")
    parser.add_argument("--batch-size", type=int, default=12, help="sequences per step")
    parser.add_argument("--recall-share", type=float, default=0.4, help="share of sequences with facts and questions")
    parser.add_argument("--answer-weight", type=float, default=10.0, help="weight of an answer's tokens in the loss")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="for the matrices inside the layers")
    parser.add_argument("--adamw-lr", type=float, default=4e-3, help="for the embedding and the norms")
    parser.add_argument("--warmup", type=float, default=0.01, help="share of the budget")
    parser.add_argument("--decay", type=float, default=0.3, help="share of the budget, at its end")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=448)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate-minutes", type=float, default=5.0, help="time between validations and checkpoints")
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny_lm"), help="folder of the checkpoint")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny_lm", help="the exported model")
    parser.add_argument("--resume", action="store_true", help="continue the checkpoint's run")
    parser.add_argument("--export-only", action="store_true", help="export the checkpoint and stop")
    return parser.parse_args()


# Tokens


def train_tokenizer(documents: list[tuple[str, str]], vocabulary: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text round-trips, and a recall key or value is always cut the same way."""
    rng = random.Random(seed)
    facts = ["\n# register {} holds {}".format(*random_fact(rng)) for _ in range(200_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for _, text in documents] + facts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False
    )


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[npt.NDArray[np.int32]]:
    """Each document with the end-of-text token in front of it."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [np.array([tokenizer.bos_token_id, *ids], dtype=np.int32) for ids in encoded]


def windows(stream: npt.NDArray[np.int32]) -> Tensor:
    """The stream in windows that each predict ``WINDOW`` tokens, every token but the first one exactly once."""
    count = (len(stream) - 1) // WINDOW
    return torch.stack([torch.from_numpy(stream[i * WINDOW : (i + 1) * WINDOW + 1]).long() for i in range(count)])


class TrainingWindows:
    """The n-th training sequence for any n, so that a resumed run goes on exactly where it stopped."""

    def __init__(
        self, documents: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
    ) -> None:
        encoded = tokenize(tokenizer, [text for _, text in documents])
        self._documents = []
        for (name, _), ids in zip(documents, encoded, strict=True):
            self._documents += [ids] * (1 if "test/" in name else LIBRARY_REPEATS)
        self.tokens = sum(map(len, encoded))
        # An epoch skips up to a window in front, so that its cuts differ from those of the epoch before.
        self.per_epoch = (sum(map(len, self._documents)) - 1) // WINDOW - 1
        self._epoch = -1
        self._task = RecallTask(tokenizer)
        self._args = args

    def _start_epoch(self, epoch: int) -> None:
        rng = np.random.default_rng([self._args.seed, epoch])
        stream = np.concatenate([self._documents[i] for i in rng.permutation(len(self._documents))])
        self._stream = stream[rng.integers(WINDOW) :]
        self._order = rng.permutation(self.per_epoch)
        self._epoch = epoch

    def __getitem__(self, index: int) -> tuple[list[int], list[float]]:
        """Ids of ``WINDOW + 1`` tokens and the weight of each in the loss."""
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._start_epoch(epoch)
        start = int(self._order[place]) * WINDOW
        ids = self._stream[start : start + WINDOW + 1].tolist()
        rng = random.Random(f"{self._args.seed} {index}")
        if rng.random() >= self._args.recall_share:
            return ids, [1.0] * len(ids)
        ids, kinds = self._task.training_sequence(rng, ids)
        weights = {0.0: 1.0, 1.0: self._args.answer_weight, -1.0: 0.0}
        return ids, [weights[kind] for kind in kinds]

    def batch(self, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        size = self._args.batch_size
        ids, weights = zip(*[self[index] for index in range(step * size, (step + 1) * size)], strict=True)
        return torch.tensor(ids, device=device), torch.tensor(weights, device=device)


# Training


@dataclass
class Report:
    """One validation."""

    step: int
    minutes: float
    training_loss: float
    bits_per_byte: float
    recall: dict[int, float]
    recall_share: float


class Validation:
    """Bits per byte on held-out modules, and recall inside the window between lines of their code."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, modules: tuple[str, ...], questions: int, limit: int | None = None
    ) -> None:
        stream = np.concatenate(tokenize(tokenizer, [text for _, text in held_out_documents(modules)]))
        self._ids = windows(stream)
        if limit is not None:
            self._ids = self._ids[:: max(len(self._ids) // limit, 1)]
        self._lengths = byte_lengths(tokenizer, self._ids)
        task, rng, code = RecallTask(tokenizer), random.Random(1), stream.tolist()
        self._questions: list[RecallQuestion] = [
            task.question(rng, code, distance, PROMPT_LENGTH) for distance in RECALL_DISTANCES for _ in range(questions)
        ]

    def bins(self, model: LlamaForCausalLM, edges: tuple[int, ...] = ()) -> list[PositionBin]:
        """One bin for all positions, then those between the edges."""
        losses = torch.cat([token_losses(model, part).cpu() for part in self._ids.split(16)])
        whole = bits_per_byte(losses, self._lengths, (0, WINDOW + 1))
        return whole + bits_per_byte(losses, self._lengths, edges) if edges else whole

    def recall(self, model: LlamaForCausalLM) -> dict[int, float]:
        return recall_accuracy(model, self._questions)


def new_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)  # every layer starts as the identity
    return model


def new_optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=args.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(share: float, args: argparse.Namespace) -> float:
    """Warmup, plateau and linear decay to zero over the share of the budget used so far."""
    return max(min(1.0, (share + 1e-4) / args.warmup, (1.0 - share) / args.decay), 0.0)


def training_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    documents = training_documents()
    checkpoint_file = args.runs / "checkpoint.pt"
    if args.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.runs / "tokenizer")
        checkpoint = torch.load(checkpoint_file, map_location=device, weights_only=False)
        vars(args).update(checkpoint["arguments"])
    else:
        tokenizer = train_tokenizer(documents, args.vocabulary, args.seed)
        tokenizer.save_pretrained(args.runs / "tokenizer")
        checkpoint = None
    model = new_model(args, tokenizer).to(device).train()
    optimizers = new_optimizers(model, args)
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    step, earlier_seconds, reports = 0, 0.0, []
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, earlier_seconds, reports = checkpoint["step"], checkpoint["seconds"], checkpoint["reports"]

    data = TrainingWindows(documents, tokenizer, args)
    validation = Validation(tokenizer, VALIDATION, questions=4, limit=48)
    parameters = sum(p.numel() for p in model.parameters())
    text_bytes = sum(len(text.encode()) for _, text in documents)
    print(f"{parameters:,} parameters, {len(documents):,} documents, {text_bytes:,} bytes, {data.tokens:,} tokens")

    started = time.monotonic()
    validated = started
    recent_losses: list[float] = []
    used = 100 * earlier_seconds / (60 * args.minutes)
    bar_format = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=100.0, initial=used, mininterval=10, bar_format=bar_format) as bar:
        while True:
            seconds = earlier_seconds + time.monotonic() - started
            share = max(step / args.steps, seconds / (60 * args.minutes))
            bar.update(min(share * 100, 100.0) - bar.n)
            if share >= 1 or time.monotonic() - validated > 60 * args.validate_minutes:
                bits, recall = validation.bins(model)[0].bits_per_byte, validation.recall(model)
                loss = float(np.mean(recent_losses)) if recent_losses else math.nan
                report = Report(step, seconds / 60, loss, bits, recall, args.recall_share)
                reports.append(asdict(report))
                recent_losses.clear()
                tqdm.write(describe(report))
                save_checkpoint(
                    checkpoint_file,
                    {
                        "arguments": {k: v for k, v in vars(args).items() if k not in RUN_ARGUMENTS},
                        "model": model.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                        "step": step,
                        "seconds": earlier_seconds + time.monotonic() - started,
                        "reports": reports,
                        "training_bytes": text_bytes,
                        "training_tokens": data.tokens,
                        "hardware": hardware(device),
                    },
                )
                validated = time.monotonic()
            if share >= 1:
                break
            factor = learning_rate_factor(share, args)
            for optimizer, rates in zip(optimizers, base_rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            loss_tensor = training_loss(model, *data.batch(step, device))
            loss_tensor.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            recent_losses.append(loss_tensor.item())
            step += 1
            bar.set_postfix(step=step, loss=f"{recent_losses[-1]:.3f}", refresh=False)


RUN_ARGUMENTS = (
    "runs",
    "output",
    "resume",
    "export_only",
    "minutes",
    "steps",
    "validate_minutes",
    "recall_share",
    "answer_weight",
)
"""Arguments a resumed run takes from its own command line; all others come from the checkpoint."""


def describe(report: Report) -> str:
    recall = " ".join(f"{distance}:{accuracy:.2f}" for distance, accuracy in report.recall.items())
    return (
        f"step {report.step:,}, {report.minutes:.1f} min: training loss {report.training_loss:.3f}, "
        f"validation {report.bits_per_byte:.4f} bits per byte, recall {recall}"
    )


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of one {platform.machine()} CPU"


def save_checkpoint(path: Path, content: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


# Export


def export(args: argparse.Namespace) -> None:
    """Write the newest checkpoint as a Hugging Face model of bfloat16 weights, with a card that states its figures."""
    checkpoint = torch.load(args.runs / "checkpoint.pt", map_location="cpu", weights_only=False)
    vars(args).update(checkpoint["arguments"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.runs / "tokenizer")
    model = new_model(args, tokenizer)
    model.load_state_dict(checkpoint["model"])
    model = model.to(torch.bfloat16).eval()
    shutil.rmtree(args.output, ignore_errors=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)

    exported = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    test = Validation(tokenizer, TEST, questions=TEST_QUESTIONS)
    figures = {
        "parameters": sum(p.numel() for p in exported.parameters()),
        "bins": [asdict(part) for part in test.bins(exported, edges=(0, 65, 129, 257, WINDOW + 1))],
        "recall": test.recall(exported),
    }
    (args.output / "README.md").write_text(model_card(args, checkpoint, figures), encoding="utf-8")
    size = sum(file.stat().st_size for file in args.output.iterdir())
    whole = figures["bins"][0]["bits_per_byte"]
    print(f"{args.output}: {size:,} bytes, {whole:.4f} bits per byte on the test modules")
    print("recall by distance:", json.dumps(figures["recall"]))


def model_card(args: argparse.Namespace, checkpoint: dict, figures: dict) -> str:
    whole = figures["bins"][0]
    positions = "\n".join(
        f"| {max(part['start'], 1)} to {part['stop'] - 1} | {part['bits_per_byte']:.4f} |"
        for part in figures["bins"][1:]
    )
    recall = "\n".join(f"| {distance} | {100 * accuracy:.1f} % |" for distance, accuracy in figures["recall"].items())
    last = checkpoint["reports"][-1]
    shares = sorted({f"{100 * report['recall_share']:.0f}" for report in checkpoint["reports"]}, key=int)
    recall_share = " to ".join([shares[0], shares[-1]] if len(shares) > 1 else shares)
    seen = checkpoint["step"] * args.batch_size * WINDOW
    return f"""---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
library_name: transformers
pipeline_tag: text-generation
---

# tiny_lm

A language model of {figures["parameters"]:,} parameters that continues Python code, with a window of {WINDOW} tokens.
It exists to try FreqKV and to measure it on a machine without a GPU or a network; it is of no use as an assistant.

- Architecture: Llama, {args.layers} layers of width {args.hidden}, {args.heads} query heads and {args.kv_heads}
  key-value heads of {args.hidden // args.heads} dimensions, MLP of {args.intermediate}, embeddings tied.
- Tokenizer: byte-level BPE of {args.vocabulary:,} tokens trained on the same text. Every text round-trips.
  A line break and the indentation after it are one token; digits stand alone.
- Weights: bfloat16.

## Training

- Data: the sources of Python {platform.python_version()}'s standard library, under the PSF License Agreement,
  {checkpoint["training_bytes"] / 1e6:.1f} MB or {checkpoint["training_tokens"] / 1e6:.1f} million tokens.
  Files are cut to {MAX_DOCUMENT_CHARS:,} characters; an epoch has the library's own tests once and the rest
  {LIBRARY_REPEATS} times.
- Left out: the validation and test modules below, and files that share long runs of code with them.
- Recall: {recall_share} % of the sequences carry lines such as `# register K7Q4 holds 8231`,
  repeated later, between their lines of code.
- Budget: {checkpoint["step"]:,} steps of {args.batch_size} sequences, {seen / 1e6:.1f} million tokens in
  {checkpoint["seconds"] / 60:.0f} minutes on {checkpoint["hardware"]}.
- Optimizer: Muon for the matrices inside the layers, AdamW for the rest; warmup, plateau, linear decay to zero.
- Script: `examples/train_tiny_lm.py`.

## Results

Measured on these bfloat16 weights, computed in float32, with the plain model.

**{whole["bits_per_byte"]:.4f} bits per byte** on the test modules,
{whole["bytes"]:,} bytes or {whole["tokens"]:,} tokens, in windows of {WINDOW} tokens that each start from nothing:

| position in the window | bits per byte |
| ---: | ---: |
{positions}

Test modules: {", ".join(f"`{name}`" for name in TEST)}.
Validation modules, with {last["bits_per_byte"]:.4f} bits per byte at the last check in training:
{", ".join(f"`{name}`" for name in VALIDATION)}.

Recall: the share of questions answered exactly (all four digits, greedy) among lines of the test modules and three
other facts, by the distance in tokens from the fact's value to the answer; {TEST_QUESTIONS} questions each.

| distance | answered |
| ---: | ---: |
{recall}
"""


def main() -> None:
    args = parse_arguments()
    if not args.export_only:
        train(args)
    export(args)


if __name__ == "__main__":
    main()
