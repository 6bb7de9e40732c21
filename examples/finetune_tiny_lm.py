"""Fine-tune the shipped model with FreqKV, and its rivals at equal tokens; measure all of them far beyond the window.

Every arm starts from the shipped weights and sees the same number of tokens of the same training text, in sequences of 1, 2
or 4 windows of N = 512 tokens. Arms with a cache are trained through it (`freqkv.patch(model, window=512, ...)`, no cache
object), so that gradients pass through compressed entries::

    python examples/finetune_tiny_lm.py                     # all arms, one seed; a few minutes each on one CPU core
    python examples/finetune_tiny_lm.py --seeds 0 1 2 --only "FreqKV, R = 0, 2N"
    python examples/finetune_tiny_lm.py --report            # the table and the plot of what is there
    python examples/finetune_tiny_lm.py --export "FreqKV, R = N/8, 4N"

A run that was broken off goes on with the arms that are not finished.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import math
import random
import statistics
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from corpus import TEST, VALIDATION, RecallTask, held_out_documents, training_documents
from loading import SHIPPED, TUNED, Formatter, about_run
from torch.nn import functional
from tqdm import tqdm
from train_tiny_lm import WINDOW, hardware, save_checkpoint, tokenize
from transformers import AutoTokenizer, Cache, DynamicCache, LlamaForCausalLM, PreTrainedTokenizerBase

import freqkv
from freqkv import FreqKVCache, FreqKVConfig
from freqkv.evaluation import bits_per_byte, byte_lengths, recall_accuracy, token_losses

RECENT = WINDOW // 8
SUMMARY = (0, WINDOW, 2 * WINDOW, 4 * WINDOW, 16 * WINDOW)
# Tokens from the fact to the answer, by the place of the answer relative to the window.
DISTANCES = {
    "inside the window": (WINDOW // 4, WINDOW // 2, 3 * WINDOW // 4),
    "1-2N back": (5 * WINDOW // 4, 7 * WINDOW // 4),
    "2-4N back": (5 * WINDOW // 2, 7 * WINDOW // 2),
    "4-16N back": (5 * WINDOW, 9 * WINDOW),
}


@dataclass(frozen=True)
class Arm:
    """One way to train: the length of sequences in windows, and what the attention sees."""

    name: str
    windows: int
    kind: str  # "plain", "full", "cache"; "base" is not trained
    recent_tokens: int = 0
    compressor: freqkv.Compressor = freqkv.low_pass_entries

    @property
    def config(self) -> FreqKVConfig:
        return FreqKVConfig(WINDOW, recent_tokens=self.recent_tokens)


def _arms() -> list[Arm]:
    cached = [
        ("sinks + most recent", 0, freqkv.keep_recent),
        ("FreqKV, R = 0", 0, freqkv.low_pass_entries),
        ("FreqKV, R = N/8", RECENT, freqkv.low_pass_entries),
    ]
    arms = [Arm("not trained further", 0, "base"), Arm("plain, N", 1, "plain")]
    for windows in (2, 4):
        arms += [Arm(f"{name}, {windows}N", windows, "cache", recent, how) for name, recent, how in cached]
        arms.append(Arm(f"full attention, positions interpolated, {windows}N", windows, "full"))
    return arms


ARMS = {arm.name: arm for arm in _arms()}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--windows-per-step", type=int, default=12, help="a multiple of 4; N tokens each")
    parser.add_argument(
        "--learning-rate", type=float, default=5e-4, help="of AdamW, at its peak; runs stand side by side"
    )
    parser.add_argument("--recall-share", type=float, default=0.4, help="share of sequences with facts and questions")
    parser.add_argument("--answer-weight", type=float, default=10.0, help="weight of an answer's tokens in the loss")
    parser.add_argument("--questions", type=int, default=16, help="per distance")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=ARMS, metavar="ARM", help=f"some of: {'; '.join(ARMS)}")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/finetune_tiny_lm"), help="folder of checkpoints")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the table")
    parser.add_argument("--report", action="store_true", help="write the table of what is there, and stop")
    parser.add_argument("--export", metavar="ARM", choices=ARMS, help=f"write this arm's first seed to {TUNED.name}/")
    return parser.parse_args()


# Training


class Sequences:
    """The n-th sequence of a length for any n. All lengths are cut from the same stretches of 4 windows."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, documents: list[str], seed: int, args: argparse.Namespace
    ) -> None:
        encoded = tokenize(tokenizer, documents)
        rng = np.random.default_rng(seed)
        self._stream = np.concatenate([encoded[i] for i in rng.permutation(len(encoded))])
        self.stretches = (len(self._stream) - 1) // (4 * WINDOW)
        self._order = rng.permutation(self.stretches)
        self._task, self._seed, self._args = RecallTask(tokenizer), seed, args

    def sequence(self, index: int, windows: int) -> tuple[list[int], list[float]]:
        """Ids of `windows * WINDOW + 1` tokens and the weight of each in the loss."""
        stretch, part = divmod(index, 4 // windows)
        start = int(self._order[stretch % self.stretches]) * 4 * WINDOW + part * windows * WINDOW
        ids = self._stream[start : start + windows * WINDOW + 1].tolist()
        rng = random.Random(f"{self._seed} {stretch} {part}")
        if rng.random() >= self._args.recall_share:
            return ids, [1.0] * len(ids)
        if rng.random() < 0.5:  # facts of the whole sequence
            ids, kinds = self._task.training_sequence(rng, ids, max_facts=6 * windows)
        else:  # facts of each window
            pieces = [ids[i : i + WINDOW] for i in range(0, windows * WINDOW, WINDOW)]
            pieces[-1].append(ids[-1])
            filled = [self._task.training_sequence(rng, piece) for piece in pieces]
            ids, kinds = ([x for part in parts for x in part] for parts in zip(*filled, strict=True))
        weights = {0.0: 1.0, 1.0: self._args.answer_weight, -1.0: 0.0}
        return ids, [weights[kind] for kind in kinds]

    def batch(self, step: int, windows: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = self._args.windows_per_step // windows
        ids, weights = zip(*[self.sequence(i, windows) for i in range(step * size, (step + 1) * size)], strict=True)
        return torch.tensor(ids), torch.tensor(weights)


def weighted_losses(
    model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the weighted losses and of the weights of a batch, in one forward without a cache."""
    ids, weights = ids.to(model.device), weights[:, 1:].flatten().to(model.device)
    # Without autocast: few CPUs are faster in bfloat16, and some are slower by an order of magnitude.
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1)
    losses = functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    return (losses * weights).sum(), weights.sum()


def new_model(arm: Arm) -> LlamaForCausalLM:
    config = {}
    if arm.kind == "full":
        rope = {"rope_type": "linear", "factor": float(arm.windows), "rope_theta": 10000.0}
        config = {"rope_parameters": rope, "max_position_embeddings": arm.windows * WINDOW}
    return LlamaForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32, attn_implementation="sdpa", **config)


def train(arm: Arm, seed: int, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict:
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = new_model(arm).to(device).train()
    if arm.kind == "cache":
        freqkv.patch(model, arm.config, compressor=arm.compressor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    sequences = Sequences(tokenizer, [text for _, text in training_documents()], seed, args)
    started, losses = time.monotonic(), []
    for step in tqdm(range(args.steps), desc=f"{arm.name}, seed {seed}", unit="step", mininterval=5):
        factor = min(1.0, (step + 1) / (0.1 * args.steps), (args.steps - step) / (0.9 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * factor
        total, weight = weighted_losses(model, *sequences.batch(step, arm.windows))
        loss = total / weight
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"{arm.name}: the loss is {losses[-1]} at step {step}")
    return {
        "model": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
        "tokens": args.steps * args.windows_per_step * WINDOW,
        "minutes": (time.monotonic() - started) / 60,
        "last_loss": statistics.fmean(losses[-10:]),
        "arguments": {name: value for name, value in vars(args).items() if isinstance(value, (int, float))},
    }


# Measuring


def measured_as(arm: Arm) -> dict[str, Arm]:
    """With which caches an arm is measured: the one that it was trained for, or all if it was trained for none."""
    if arm.kind == "full":
        return {"full attention": arm}
    kinds = {
        "sinks + most recent": Arm("", 4, "cache", 0, freqkv.keep_recent),
        "FreqKV, R = 0": Arm("", 4, "cache"),
        "FreqKV, R = N/8": Arm("", 4, "cache", RECENT),
    }
    if arm.kind != "cache":
        return kinds
    method = (arm.recent_tokens, arm.compressor)
    return {name: each for name, each in kinds.items() if (each.recent_tokens, each.compressor) == method}


def new_cache(arm: Arm, model: LlamaForCausalLM) -> Cache:
    if arm.kind == "full":
        return DynamicCache(config=model.config)
    return FreqKVCache(model.config, arm.config, compressor=arm.compressor)


@torch.no_grad()
def validation_loss(
    arm: Arm, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> float:
    """The loss of training on the validation modules, by which learning rates and the weights that ship are chosen.

    In sequences of 4 windows, whatever the arm was trained on, so that arms with the same cache can be compared; full
    attention in those of its own length.
    """
    sequences = Sequences(tokenizer, [text for _, text in held_out_documents(VALIDATION)], 0, args)
    with freqkv.patch(model, arm.config, compressor=arm.compressor) if arm.kind == "cache" else nullcontext():
        batches = [
            weighted_losses(model, *sequences.batch(step, arm.windows))
            for step in range(4 * sequences.stretches // args.windows_per_step)
        ]
    return sum(total.item() for total, _ in batches) / sum(weight.item() for _, weight in batches)


def measure(
    arm: Arm, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> list[dict]:
    model.eval()
    texts = [tokenizer(text, return_tensors="pt")["input_ids"][0] for _, text in held_out_documents(TEST)]
    ids = torch.stack([text[: 16 * WINDOW] for text in texts if len(text) >= 16 * WINDOW])
    lengths = byte_lengths(tokenizer, ids)
    task, rng = RecallTask(tokenizer), random.Random(0)
    code = torch.cat(texts).tolist()
    step = FreqKVConfig(WINDOW).schedule.step
    asked = [
        task.question(rng, code, distance, max(distance + WINDOW, 3 * WINDOW) + (index % 8) * step // 8)
        for distances in DISTANCES.values()
        for distance in distances
        for index in range(args.questions)
    ]
    rows = []
    for cache, measured in measured_as(arm).items():
        value = validation_loss(measured, model, tokenizer, args)
        rows.append({"cache": cache, "metric": "validation loss", "bin": "all", "value": value})
    if arm.kind != "full":
        freqkv.patch(model)
    for cache, measured in measured_as(arm).items():
        make = functools.partial(new_cache, measured, model)
        losses = torch.cat([token_losses(model, row[None], make(), chunk_size=WINDOW) for row in ids])
        for metric, edges in (
            ("bits per byte", SUMMARY),
            ("bits per byte by window", range(0, 16 * WINDOW + 1, WINDOW)),
        ):
            for part in bits_per_byte(losses, lengths, edges):
                where = f"{part.start // WINDOW}-{part.stop // WINDOW}N"
                rows.append({"cache": cache, "metric": metric, "bin": where, "value": part.bits_per_byte})
        answered = recall_accuracy(model, asked, make, batch_size=8)
        for where, distances in DISTANCES.items():
            value = statistics.fmean(answered[distance] for distance in distances)
            rows.append({"cache": cache, "metric": "recall", "bin": where, "value": value})
    return rows


# Report


def results(args: argparse.Namespace) -> list[dict]:
    """Rows of all arms that are finished, in the order of the arms."""
    rows = []
    for name in ARMS:
        files = args.runs.glob(f"{slug(name)}.lr*.seed*.json")
        contents = sorted(
            (json.loads(file.read_text()) for file in files), key=lambda content: content["about"]["seed"]
        )
        contents.sort(key=lambda content: content["about"]["learning_rate"] != args.learning_rate)
        rows += [{**content["about"], **row} for content in contents for row in content["rows"]]
    return rows


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def run_file(args: argparse.Namespace, arm: Arm, seed: int) -> Path:
    """Where a run's results go; its weights lie beside them."""
    rate = 0.0 if arm.kind == "base" else args.learning_rate
    return args.runs / f"{slug(arm.name)}.lr{rate:g}.seed{seed}.json"


def report(args: argparse.Namespace) -> None:
    rows = results(args)
    if not rows:
        raise SystemExit(f"nothing is finished in {args.runs}")
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "finetuning.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    arguments = {k: v for k, v in vars(args).items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    write_about = {**about_run(), "window": WINDOW, "hardware": hardware(torch.device("cpu")), **arguments}
    (args.output / "finetuning.json").write_text(json.dumps(write_about, indent=1) + "\n")
    values = defaultdict(list)
    for row in rows:
        if row["learning_rate"] not in (0.0, args.learning_rate):
            row["arm"] += f", learning rate {row['learning_rate']:g}"
        values[row["arm"], row["cache"], row["metric"], row["bin"]].append(row["value"])
    arms = list(dict.fromkeys((row["arm"], row["cache"]) for row in rows))
    for metric, bins, digits in (
        ("bits per byte", ["0-1N", "1-2N", "2-4N", "4-16N"], 3),
        ("recall", list(DISTANCES), 2),
        ("validation loss", ["all"], 4),
    ):
        print(f"\n| {metric} | measured with | {' | '.join(bins)} | seeds |\n|---|---|{'---|' * len(bins)}---|")
        for arm, cache in arms:
            cells = [values[arm, cache, metric, where] for where in bins]
            told = [
                f"{statistics.fmean(cell):.{digits}f}"
                + (f" ± {statistics.stdev(cell):.{digits}f}" if len(cell) > 1 else "")
                for cell in cells
            ]
            print(f"| {arm} | {cache} | {' | '.join(told)} | {len(cells[0])} |")
    plot(args.output / "finetuning.png", values, [(arm, cache) for arm, cache in arms if arm in ARMS])


def plot(path: Path, values: dict, arms: list[tuple[str, str]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), constrained_layout=True)
    for arm, cache in arms:
        points = [statistics.fmean(values[arm, cache, "bits per byte by window", f"{i}-{i + 1}N"]) for i in range(16)]
        label = arm if ARMS[arm].kind in ("cache", "full") else f"{arm}: {cache}"
        style = {"full": ":", "cache": "-"}.get(ARMS[arm].kind, "--")
        axes.plot(range(1, 17), points, style, marker=".", label=label, linewidth=1)
    axes.set_ylim(0.8, 1.8)  # full attention leaves the picture behind the length it was trained on
    axes.set_xlabel(f"position in the document, windows of N = {WINDOW} tokens")
    axes.set_ylabel("bits per byte")
    axes.set_xticks(range(1, 17))
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def export(args: argparse.Namespace) -> None:
    """The arm's weights in bfloat16, with the numbers that they were trained with beside them."""
    arm = ARMS[args.export]
    checkpoint = torch.load(run_file(args, arm, 0).with_suffix(".pt"), weights_only=False)
    model = new_model(arm)
    model.load_state_dict(checkpoint["model"])
    model.to(torch.bfloat16).save_pretrained(TUNED)
    (TUNED / "freqkv.json").write_text(json.dumps(asdict(arm.config), indent=2) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    tokenizer.save_pretrained(TUNED)
    exported = LlamaForCausalLM.from_pretrained(TUNED, dtype=torch.float32)
    rows = measure(arm, exported, tokenizer, args)

    def line(metric: str, digits: int) -> str:
        told = [(row["bin"], row["value"]) for row in rows if row["metric"] == metric]
        header = f"| {metric} | {' | '.join(where for where, _ in told)} |\n|---|{'---|' * len(told)}"
        return f"{header}\n| | {' | '.join(f'{value:.{digits}f}' for _, value in told)} |"

    (TUNED / "README.md").write_text(
        f"""---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
library_name: transformers
pipeline_tag: text-generation
---

# tiny_lm_tuned

`examples/tiny_lm` (see its card), fine-tuned with FreqKV: {arm.name}. All weights, bfloat16.

- FreqKV: window {WINDOW}, {arm.config.sink_tokens} sink tokens, retain ratio {arm.config.retain_ratio}, {arm.recent_tokens}
  recent tokens; also in `freqkv.json`.
- Data: the text of the base model, in sequences of {arm.windows * WINDOW} tokens, with facts and questions in
  {args.recall_share:.0%} of them; {checkpoint["tokens"]:,} tokens in {checkpoint["minutes"]:.0f} minutes on a CPU.
- Optimizer: AdamW, learning rate {args.learning_rate:g}; warmup, linear decay to zero.
- Script: `examples/finetune_tiny_lm.py`; the rivals are in `examples/results/finetuning.csv`.

Measured on these bfloat16 weights, computed in float32, through the cache that they were trained with, on the twelve test
modules (16 windows each) and {args.questions} questions per distance:

{line("bits per byte", 4)}

{line("recall", 2)}
""",
        encoding="utf-8",
    )
    print(f"{TUNED}: {sum(file.stat().st_size for file in TUNED.iterdir()):,} bytes")


def main() -> None:
    args = parse_arguments()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.report:
        return report(args)
    if args.export is not None:
        return export(args)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    for seed in args.seeds:
        for name in args.only or ARMS:
            arm = ARMS[name]
            file = run_file(args, arm, seed)
            if file.exists() or (arm.kind == "base" and seed != args.seeds[0]):
                continue
            model = new_model(arm)
            trained = {"tokens": 0}
            if arm.kind != "base":
                checkpoint = file.with_suffix(".pt")
                if not checkpoint.exists():
                    save_checkpoint(checkpoint, train(arm, seed, args, tokenizer))
                trained = torch.load(checkpoint, weights_only=False)
                model.load_state_dict(trained["model"])
            rows = measure(arm, model, tokenizer, args)
            about = {"arm": name, "trained_length": arm.windows * WINDOW, "tokens": trained["tokens"], "seed": seed}
            about["learning_rate"] = 0.0 if arm.kind == "base" else args.learning_rate
            partial = file.with_suffix(".partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"about": about, "rows": rows}))
            partial.replace(file)
    report(args)


if __name__ == "__main__":
    main()
