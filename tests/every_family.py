"""What every family is checked with, and where transformers itself leaves nothing to be equal to."""

from __future__ import annotations

import inspect

import torch
import transformers

from freqkv.models.upstream import CACHE

__all__ = [
    "ATTENTION",
    "CHUNKS",
    "FLOOR",
    "LENGTH",
    "LOOSE",
    "N",
    "OTHER_KERNEL",
    "OWN_SPLITS_DIFFER",
    "REASON",
    "RECENT",
    "REFUSED",
    "SEES_AHEAD",
    "SINKS",
    "STEP",
    "TRANSFORMERS",
    "feed",
]

N, SINKS, RECENT = 23, 4, 3  # (23 - 4 - 3) / 2 = 8 entries kept: a floor of 15, then a compression every 8 tokens
FLOOR, STEP = 15, 8
LENGTH = 2 * N + 9
CHUNKS = [N + 1, 1, 2, 17]
ATTENTION = ("eager", "sdpa")

REFUSED = {
    "has no rotary position embeddings|has no attention layers with rotary": (
        "bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom camembert cpmant ctrl "
        "data2vec-text electra ernie git gpt-sw3 gpt2 gpt_bigcode gpt_neo inkling2_loop_text inkling2_text inkling_text "
        "musicgen musicgen_melody marian mbart megatron-bert mpt mvp openai-gpt opt "
        "pegasus plbart prophetnet reformer rembert roberta "
        "roberta-prelayernorm roc_bert roformer rwkv trocr whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm xmod"
    ),
    "keeps a DynamicIndexedLayer": "axk2 deepseek_v32 dots3_note dots3_note_text glm_moe_dsa hy_v4 qwen4_exp qwen4_exp_text",
    "has no attention layers with rotary|has no full attention layer": "falcon_mamba mamba mamba2",  # the latter from 5.24 on
    "has no full attention layer": "gemma4_assistant gemma4_unified_assistant moshi recurrent_gemma",
    "is not supported: its layers": "blt deepseek_v4",
    "is not supported: its decoder adds layers to the cache": "dory",
}
REASON = {family: reason for reason, families in REFUSED.items() for family in families.split()}

# Where transformers itself is not consistent, there is nothing to be equal to.
OWN_SPLITS_DIFFER = {
    "jamba": "continues its state-space layers token by token only",
    "zamba": "continues its state-space layers token by token only",
}
# Off by this much with DynamicCache too (relative): their state-space layers sum in another order in each split.
LOOSE = {"nemotron_h": 2e-2, "zamba2": 2e-2}
# Makes a mask where sdpa would do without and takes another kernel for it; computes other angles alone than in a row.
TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])
OTHER_KERNEL = {"gemma4_unified"} | ({"deepseek_v2"} if TRANSFORMERS < (5, 20) else set())
SEES_AHEAD = {("doge", "sdpa")} if TRANSFORMERS < (5, 20) else set()  # no causal mask in its prefill


def feed(model, ids, cache, splits):
    """Logits of `ids` fed in calls of these lengths, then token by token, with positions as `generate` passes them."""
    outputs, start = [], 0
    counts = "position_ids" in inspect.signature(model.forward).parameters
    for length in [*splits, *[1] * (ids.shape[1] - sum(splits))]:
        positions = {"position_ids": torch.arange(start, start + length)[None]} if counts else {}
        call = ids[:, start : start + length]
        outputs.append(model(input_ids=call, **{CACHE: cache}, use_cache=True, **positions).logits)
        start += length
    return torch.cat(outputs, 1)
