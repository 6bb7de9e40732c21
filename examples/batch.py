"""A ragged batch of eight texts past the window: each row gives what it gives alone.

python examples/batch.py                        # the shipped model, on modules it was never trained on
python examples/batch.py --model NAME_OR_PATH --window 4096 --max-new-tokens 2000

Rows of very different length are left-padded, as `generate` wants them, and continued greedily in one batch, then one by
one. In half precision two tokens may be equally likely to rounding, and rows then part: it says where.
"""

from __future__ import annotations

import argparse
import time

import torch
from corpus import held_out_documents
from loading import Formatter, add_cache_arguments, add_model_arguments, cache_settings, load
from tqdm import tqdm

import freqkv
from freqkv import FreqKVCache
from freqkv.models.upstream import CACHE

# Of the window: rows of one token beside rows of ten windows.
LENGTHS = (0.0, 0.1, 0.5, 0.99, 1.0, 1.5, 3.0, 10.0)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add_model_arguments(parser)
    add_cache_arguments(parser)
    parser.set_defaults(window=128)
    parser.add_argument("--max-new-tokens", type=int, default=150)
    args = parser.parse_args()
    model, tokenizer = load(args)
    settings = cache_settings(args, model)
    config = settings.config
    freqkv.patch(model)

    ids = tokenizer("\n".join(text for _, text in held_out_documents()), return_tensors="pt")["input_ids"][0]
    lengths = [max(1, int(share * config.window)) for share in LENGTHS]
    starts = [row * len(ids) // len(lengths) for row in range(len(lengths))]
    rows = [ids[start : start + length].to(model.device) for start, length in zip(starts, lengths, strict=True)]
    longest = max(len(row) for row in rows)
    batch = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(longest, device=row.device) >= longest - len(row)).long() for row in rows])
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    started = time.perf_counter()
    cache = FreqKVCache(model.config, **settings.options)
    together = model.generate(batch, attention_mask=mask, **{CACHE: cache}, **options)[:, longest:]
    seconds = time.perf_counter() - started
    print(cache)

    started = time.perf_counter()
    alone = []
    for row in tqdm(rows, "alone", unit="row"):
        one = model.generate(row[None], **{CACHE: FreqKVCache(model.config, **settings.options)}, **options)
        alone.append(one[0, len(row) :])
    one_by_one = time.perf_counter() - started

    print(f"\n{'prompt':>8} {'compressions':>13}  continued like the row alone")
    for row, got, truth in zip(rows, together, alone, strict=True):
        same = int((got == truth).long().cumprod(0).sum())
        seen = len(row) + args.max_new_tokens - 1
        verdict = "all tokens" if same == len(truth) else f"{same} of {len(truth)} tokens"
        print(f"{len(row):>8} {config.schedule.compressions(seen):>13}  {verdict}")
    print(f"\ntogether {seconds:.1f} s, one by one {one_by_one:.1f} s")


if __name__ == "__main__":
    main()
