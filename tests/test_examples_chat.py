"""The chat script, in a terminal of its own, and what it feeds."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import time
from pathlib import Path

import chat
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import freqkv
from freqkv import FreqKVCache, FreqKVConfig
from freqkv.models.upstream import CACHE

pty = pytest.importorskip("pty")

SCRIPT = Path(__file__).parent.parent / "examples" / "chat.py"
CONFIG = FreqKVConfig(window=64, recent_tokens=8)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def model(shipped):
    model = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)
    freqkv.patch(model)
    return model


class Terminal:
    """A process in a pseudo-terminal, in which Ctrl-C is a key."""

    def __init__(self, *arguments):
        self.text = ""
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.environ.update(OMP_NUM_THREADS="1", TERM="dumb")
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which jobs in the background of a shell ignore
            os.execv(sys.executable, [sys.executable, str(SCRIPT), *map(str, arguments)])

    def send(self, keys):
        os.write(self.terminal, keys.encode())

    def until(self, pattern, timeout=100):
        """What comes until the pattern does; all that comes if there is none."""
        start, end = len(self.text), time.monotonic() + timeout
        while pattern is None or not re.search(pattern, self.text[start:]):
            ready, _, _ = select.select([self.terminal], [], [], max(0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no {pattern} in {self.text[start:]!r}")
            try:
                data = os.read(self.terminal, 1 << 16)
            except OSError:  # the other end is closed
                data = b""
            assert data or pattern is None, f"ended before {pattern} came: {self.text}"
            if not data:
                break
            self.text += data.decode(errors="replace").replace("\r\n", "\n")
        return self.text[start:]

    def interrupted_until(self, pattern, tries=20):
        """Ctrl-C until it is heard: input() of Python may miss it in the moment in which it shows its prompt."""
        start = len(self.text)
        for _ in range(tries):
            self.send("\x03")
            with contextlib.suppress(TimeoutError):
                self.until(pattern, timeout=2)
                return self.text[start:]
        raise AssertionError(f"no {pattern} in {self.text[start:]!r}")

    def says(self, line):
        self.send(line + "\n")
        return self.until("you: $")

    def close(self):
        """The exit status, once all output is read."""
        self.until(None)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.terminal)
        self.pid = 0
        return status

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self.terminal)


def tokens_in(text):
    return int(re.search(r"([\d,]+) tokens", text)[1].replace(",", ""))


def test_a_conversation_over_two_sittings(tmp_path, model):
    history, other = tmp_path / "talk.safetensors", tmp_path / "other.safetensors"
    arguments = ("--history", history, "--window", 64, "--recent-tokens", 8, "--max-new-tokens")
    with Terminal(*arguments, 100_000) as terminal:
        assert "no instruction model" in terminal.until("you: $")
        for message in ("write a class", "and a function"):
            terminal.send(f"{message}\n")
            terminal.until(message + r"\n[\s\S]{20}")
            terminal.send("\x03\x03")  # in mid-answer, and once more by the impatient
            assert terminal.until("you: $").endswith("[stopped]\nyou: ")
        terminal.interrupted_until(r"/quit ends the chat\]\nyou: $")
        memory = terminal.says("/memory")
        seen = tokens_in(memory)
        assert re.search(r"\d+ of 64 entries.* 393,216 bytes of keys and values, process \d+ MB", memory)
        assert tokens_in(terminal.says(f"/save {other}")) == seen
        assert "/quit; Ctrl-C" in terminal.says("/what")
        terminal.send("/quit\n")
        assert terminal.close() == 0
    assert FreqKVCache.load(history, model).tokens_seen == seen
    assert history.read_bytes() == other.read_bytes()

    with Terminal(*arguments, 30, "--greedy") as terminal:
        assert tokens_in(terminal.until("you: $").rpartition("going on from")[2]) == seen
        terminal.says("now a long one: " + "x = 1; " * 100)
        assert tokens_in(terminal.says("/memory")) > seen + 200
        assert "[forgotten]" in terminal.says("/reset")
        assert tokens_in(terminal.says("/memory")) == 0
        assert "cut off, changed" in terminal.says(f"/load {SCRIPT}")
        assert tokens_in(terminal.says("/load")) == seen
        terminal.says("go on")
        terminal.send("\x04")  # Ctrl-D
        assert terminal.close() == 0
    assert FreqKVCache.load(history, model).tokens_seen > seen
    assert history.stat().st_size == other.stat().st_size


@pytest.mark.slow
def test_a_history_that_is_none(tmp_path):
    history = tmp_path / "talk.safetensors"
    history.write_text("a diary")
    with Terminal("--history", history) as terminal:
        assert terminal.close() == 1
    assert "no safetensors file" in terminal.text
    assert history.read_text() == "a diary"


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_what_is_fed(template, shipped, model, capsys):
    """Turn by turn, each token of the conversation once, as the template writes it."""
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    tokenizer.chat_template = template
    talk = chat.Chat(model, tokenizer, freqkv.Settings(CONFIG), {"max_new_tokens": 20, "do_sample": False})
    fed, answers = [], []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True
    )
    said = ["hello", "word " * 700, "and?"]
    for message in said:
        talk.say(message)
        answers.append(capsys.readouterr().out.removesuffix("\n"))
    hook.remove()
    fed = torch.cat(fed, 1)
    assert fed.shape[1] == talk.cache.tokens_seen > 700
    if template is None:
        pairs = zip(said, answers, strict=True)
        expected = "\n".join(f"User: {message}\nAssistant:{answer}" for message, answer in pairs)
    else:
        messages = []
        for message, answer in zip(said, answers, strict=True):
            messages += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
        # the mark behind the last answer comes with the next turn
        expected = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix(f"{tokenizer.eos_token}\n")
    assert tokenizer.decode(fed[0]) == expected


def test_a_model_that_begins_the_next_turn_itself(shipped, model):
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    talk = chat.Chat(model, tokenizer, freqkv.Settings(CONFIG), {"max_new_tokens": 20, "do_sample": False})
    ids = tokenizer("User: hello\nAssistant: yes\nUser:", return_tensors="pt")["input_ids"]
    assert [bool(talk.stop(ids[:, :n], None)) for n in range(1, ids.shape[1] + 1)] == [False] * (ids.shape[1] - 1) + [
        True
    ]
    with torch.no_grad():
        model(ids, **{CACHE: talk.cache})
    assert tokenizer.decode(talk._turn("and?")[0]) == " and?\nAssistant:"
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(SystemExit, match="does not show earlier answers"):
        talk._turn("and?")
