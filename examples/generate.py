"""Continue a long prompt, or chat, inside one FreqKV cache of fixed size.

python examples/generate.py                        # the shipped model, on a module it was never trained on
python examples/generate.py --tuned                # and after fine-tuning with FreqKV
python examples/generate.py --model NAME_OR_PATH --prompt-file book.txt --max-new-tokens 20000
python examples/generate.py --model NAME_OR_PATH --chat
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from corpus import held_out_documents
from loading import SHIPPED, TUNED, Formatter, add_cache_arguments, add_model_arguments, cache_settings, load
from tqdm import tqdm
from transformers import PreTrainedModel, TextStreamer, set_seed

import freqkv
from freqkv import FreqKVCache
from freqkv.models.upstream import CACHE


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add_model_arguments(parser)
    parser.add_argument("--tuned", action="store_true", help=f"the shipped model fine-tuned with FreqKV, {TUNED.name}")
    add_cache_arguments(parser)
    parser.add_argument("--prompt-file", type=Path, help="text to continue; - reads standard input")
    parser.add_argument("--prompt-tokens", type=int, help="use only the first tokens of the prompt")
    parser.add_argument("--max-new-tokens", type=int, help="3 windows by default; per turn in a chat")
    parser.add_argument("--chat", action="store_true", help="read a conversation turn by turn, on one cache")
    parser.add_argument("--chat-template", type=Path, help="Jinja file, for a tokenizer without a chat template")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.tuned:
        if args.model != str(SHIPPED):
            parser.error("--tuned is a model of its own: leave --model out")
        args.model = str(TUNED)
    return args


class TimedStreamer(TextStreamer):
    """Prints the text as it comes and counts tokens and seconds since the first one."""

    tokens = 0
    seconds = 0.0

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            if self.tokens == 0:
                self.started = time.perf_counter()
            self.tokens += value.numel()
            self.seconds = time.perf_counter() - self.started
        super().put(value)


def prefill(model: PreTrainedModel, ids: torch.Tensor, cache: FreqKVCache) -> float:
    """Feed all but the last token in pieces, for the sake of the progress bar; returns tokens per second."""
    pieces = ids[:, cache.tokens_seen : -1].split(cache.config.window, dim=1)
    tokens = sum(piece.shape[1] for piece in pieces)
    started = time.perf_counter()
    with torch.no_grad(), tqdm(total=tokens, desc="prefill", unit="token", disable=len(pieces) < 2) as bar:
        for piece in pieces:
            if piece.shape[1]:
                model(piece, **{CACHE: cache}, logits_to_keep=1)
                bar.update(piece.shape[1])
    return tokens / (time.perf_counter() - started)


def read_prompt(args: argparse.Namespace, tokenizer, window: int) -> torch.Tensor:
    if args.prompt_file is None and args.model not in (str(SHIPPED), str(TUNED)):
        raise SystemExit("give the text to continue with --prompt-file (- for standard input), or --chat")
    if args.prompt_file is not None:
        text = sys.stdin.read() if str(args.prompt_file) == "-" else args.prompt_file.read_text()
        return tokenizer(text, return_tensors="pt")["input_ids"][:, : args.prompt_tokens]
    ((name, text),) = held_out_documents(("argparse",))
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if args.prompt_tokens is None:  # some windows, up to an empty line
        text = tokenizer.decode(ids[0, : 4 * window]).rpartition("\n\n")[0] + "\n\n"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    ids = ids[:, : args.prompt_tokens]
    end = "\n".join(tokenizer.decode(ids[0]).rstrip().splitlines()[-5:])
    print(
        f"The prompt: the first {ids.shape[1]} tokens of {name}.py, which the model was never trained on. It ends with\n\n"
        f"{end}\n\nA model of this size goes on with what looks like Python (and with the 'register' lines of its recall "
        "training),\nnot with what makes sense:\n"
    )
    return ids


def next_turn(tokenizer, messages: list[dict[str, str]], said: str) -> str:
    """The text that a user's message adds to the conversation. What is in the cache already is never rendered again."""
    before = tokenizer.apply_chat_template(messages, tokenize=False) if messages else ""
    messages.append({"role": "user", "content": said})
    after = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not after.startswith(before):
        raise SystemExit("this chat template rewrites earlier turns, so a conversation cannot go on in one cache")
    return after[len(before) :]


def report(cache: FreqKVCache, prefill_speed: float, streamer: TimedStreamer) -> None:
    plain = cache.nbytes // cache.config.window * cache.tokens_seen
    decode_speed = (streamer.tokens - 1) / streamer.seconds if streamer.seconds else float("nan")
    rows = [
        ("tokens seen", f"{cache.tokens_seen:,}"),
        ("entries held per layer", f"{cache.entries:,} of at most {cache.config.window:,}"),
        ("compressions", f"{cache.compressions:,}"),
        ("cache", f"{cache.nbytes / 1e6:,.2f} MB"),
        ("a plain cache would hold", f"{plain / 1e6:,.2f} MB ({plain / cache.nbytes:.1f} x)"),
        ("prefill", f"{prefill_speed:,.0f} tokens/s"),
        ("decoding", f"{decode_speed:,.0f} tokens/s"),
    ]
    print("\n" + "\n".join(f"{name:<25} {value}" for name, value in rows))


def main() -> None:
    args = parse_arguments()
    set_seed(args.seed)
    model, tokenizer = load(args)
    settings = cache_settings(args, model)
    config = settings.config
    freqkv.patch(model)
    cache = FreqKVCache(model.config, **settings.options)
    streamer = TimedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = (
        {"do_sample": False}
        if args.greedy
        else {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    )
    new_tokens = 3 * config.window if args.max_new_tokens is None else args.max_new_tokens

    def generate(ids: torch.Tensor, **options) -> torch.Tensor:
        mask = torch.ones_like(ids)
        return model.generate(
            ids, attention_mask=mask, **{CACHE: cache}, streamer=streamer, max_new_tokens=new_tokens,
            **sampling, **options,
        )  # fmt: skip

    if args.chat:
        if args.chat_template is not None:
            tokenizer.chat_template = args.chat_template.read_text()
        if tokenizer.chat_template is None:
            raise SystemExit(f"{args.model} has no chat template: give one with --chat-template, or leave --chat out")
        ids, messages, speed = torch.empty((1, 0), dtype=torch.long), [], float("nan")
        while True:
            try:
                said = input("you: ")
            except EOFError:
                break
            turn = tokenizer(next_turn(tokenizer, messages, said), add_special_tokens=False, return_tensors="pt")
            ids = torch.cat([ids, turn["input_ids"]], dim=1).to(model.device)
            speed = prefill(model, ids, cache)
            length = ids.shape[1]
            ids = generate(ids).cpu()
            messages.append(
                {"role": "assistant", "content": tokenizer.decode(ids[0, length:], skip_special_tokens=True)}
            )
        if not messages:
            return
    else:
        ids = read_prompt(args, tokenizer, config.window).to(model.device)
        speed = prefill(model, ids, cache)
        # The shipped model learnt to end a module: it is asked to go on, so that there is something to see.
        generate(ids, min_new_tokens=new_tokens if args.model == str(SHIPPED) else None)
    report(cache, speed, streamer)


if __name__ == "__main__":
    main()
