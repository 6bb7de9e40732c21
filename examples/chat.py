"""A chat in the terminal that never runs out of context, on one FreqKV cache, and kept in one file of fixed size.

python examples/chat.py                                            # the shipped model, which only knows Python code
python examples/chat.py --model NAME_OR_PATH --window 4096 --history talk.safetensors

Ctrl-C ends an answer, and the conversation goes on. Commands: /save [FILE], /load [FILE], /reset, /memory, /quit.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from loading import SHIPPED, Formatter, add_cache_arguments, add_model_arguments, cache_settings, load
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, TextStreamer, set_seed

import freqkv
from freqkv import CacheFileError, FreqKVCache, Settings
from freqkv.models.upstream import CACHE

COMMANDS = "/save [FILE], /load [FILE], /reset, /memory, /quit; Ctrl-C ends an answer"
ABOUT_SHIPPED = (
    "The shipped model (3.8M parameters) has read Python code and nothing else. It is no instruction model and answers no\n"
    "questions: it goes on in what looks like code. For answers, give an instruction model with --model."
)
PIECE = 512  # tokens of a long message that are read at a time: Ctrl-C is heard in between
USER = "\nUser:"  # begins a turn where there is no chat template
ANSWER = "<<answer>>"  # stands for an earlier answer where a chat template is asked what follows one


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add_model_arguments(parser)
    add_cache_arguments(parser)
    parser.add_argument("--history", type=Path, help="go on from this file if it is there, and save to it at the end")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--top-k", type=int, default=0, help="0 for all")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class StopOnInterrupt(StoppingCriteria):
    """While it is entered, Ctrl-C asks to stop after the present token: a forward that breaks off would cost the cache.

    It also stops where a model that knows no turns begins the next one by itself.
    """

    asked = begun = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __enter__(self) -> StopOnInterrupt:
        self.asked = self.begun = False
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *exc_info: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _ask(self, *args: object) -> None:
        self.asked = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.tokenizer.chat_template is None:
            self.begun = self.tokenizer.decode(input_ids[0, -len(USER) :]).endswith(USER)
        return torch.full((input_ids.shape[0],), self.asked or self.begun, device=input_ids.device)


class Chat:
    """A conversation: a model, its tokenizer, and the cache, which is all that is kept of earlier turns."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, sampling: dict[str, Any]
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.cache = FreqKVCache(model.config, **settings.options)
        self.stop = StopOnInterrupt(tokenizer)
        ends = model.generation_config.eos_token_id
        self.ends = [] if ends is None else ends if isinstance(ends, list) else [ends]

    def _turn(self, said: str) -> torch.Tensor:
        """`(1, tokens)`: what a message adds to the conversation, up to where the answer begins."""
        first, user = self.cache.tokens_seen == 0, {"role": "user", "content": said}
        if self.tokenizer.chat_template is None:
            text = f"{'' if self.stop.begun else USER.lstrip() if first else USER} {said}\nAssistant:"
            encoded = self.tokenizer(text, add_special_tokens=first, return_tensors="pt")
        else:
            earlier = [] if first else [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
            text = self.tokenizer.apply_chat_template([*earlier, user], tokenize=False, add_generation_prompt=True)
            if not first:
                # What stands behind an answer. Earlier turns are in the cache, and their text is not needed again.
                _, found, text = text.partition(ANSWER)
                if not found:
                    raise SystemExit(
                        "this chat template does not show earlier answers as they are: no chat is possible"
                    )
            encoded = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        return encoded["input_ids"].to(self.model.device)

    @torch.no_grad()
    def say(self, said: str) -> None:
        """Read a message and write the answer, unless Ctrl-C ends either."""
        *pieces, last = self._turn(said).split(PIECE, dim=1)
        with self.stop:
            for piece in pieces:
                self.model(piece, **{CACHE: self.cache}, logits_to_keep=1)
                if self.stop.asked:
                    print("[stopped before the end of the message]")
                    return
            before = self.cache.tokens_seen
            # Only new tokens, and a mask as long as the conversation, which tells generate so.
            tokens = self.model.generate(
                last,
                attention_mask=last.new_ones(1, before + last.shape[1]),
                **{CACHE: self.cache},
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                stopping_criteria=[self.stop],
                **self.sampling,
            )
            # The last token was written and not read. The next turn brings its own mark for the end of an answer.
            unread = tokens[:, self.cache.tokens_seen - before :]
            if unread[0, -1].item() in self.ends:
                unread = unread[:, :-1]
            if unread.shape[1]:
                self.model(unread, **{CACHE: self.cache}, logits_to_keep=1)
            if self.stop.asked:
                print("[stopped]")

    def save(self, file: Path) -> None:
        self.cache.save(file, self.model)
        print(f"[saved {self.cache.tokens_seen:,} tokens in {file}, {file.stat().st_size:,} bytes]")

    def load(self, file: Path) -> None:
        self.cache = FreqKVCache.load(file, self.model)
        self.stop.begun = False
        print(f"[going on from {file}: {self.cache.tokens_seen:,} tokens seen, window {self.cache.config.window:,}]")

    def memory(self) -> None:
        cache = self.cache
        print(
            f"[{cache.tokens_seen:,} tokens seen, {cache.entries:,} of {cache.config.window:,} entries in each compressed "
            f"layer, {cache.nbytes:,} bytes of keys and values, process {psutil.Process().memory_info().rss / 1e6:,.0f} MB]"
        )

    def command(self, line: str, history: Path) -> bool:
        """Run a command; false for the one that ends the chat."""
        name, _, argument = line.partition(" ")
        file = Path(argument.strip()).expanduser() if argument.strip() else history
        try:
            if name == "/save":
                self.save(file)
            elif name == "/load":
                self.load(file)
            elif name == "/reset":
                self.cache.reset()
                self.stop.begun = False
                print("[forgotten]")
            elif name == "/memory":
                self.memory()
            elif name != "/quit":
                print(f"[{COMMANDS}]")
        except (CacheFileError, OSError) as error:
            print(f"[{error}]")
        return name != "/quit"


def main() -> None:
    args = parse_arguments()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() then has a line editor
    # Among other things, that the text is longer than the model's context, which is as it should be here.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    set_seed(args.seed)
    model, tokenizer = load(args)
    freqkv.patch(model)
    sampling: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": not args.greedy}
    if not args.greedy:
        sampling |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    chat = Chat(model, tokenizer, cache_settings(args, model), sampling)
    if args.model == str(SHIPPED):
        print(ABOUT_SHIPPED)
    elif tokenizer.chat_template is None:
        print(
            f"{args.model} has no chat template, so it may be no instruction model: turns begin with User: and Assistant:"
        )
    print(f"[{COMMANDS}]")
    if args.history is not None and args.history.exists():
        try:
            chat.load(args.history)
        except (CacheFileError, OSError) as error:
            raise SystemExit(str(error)) from None
    history = args.history or Path("chat.safetensors")
    try:
        while True:
            try:
                line = input("you: ").strip()
                if line.startswith("/"):
                    if not chat.command(line, history):
                        break
                elif line:
                    chat.say(line)
            except EOFError:
                print()
                break
            except KeyboardInterrupt:
                print("\n[/quit ends the chat]")
    finally:
        if args.history is not None and not chat.cache.is_spent:
            chat.save(args.history)


if __name__ == "__main__":
    main()
