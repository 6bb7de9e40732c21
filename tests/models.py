"""Small random models on which the method is checked."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROPE_TYPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5],
        "long_factor": [1.0, 1.3, 1.7, 2.2, 3.0, 4.0, 5.0, 7.0],
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def tiny_llama(
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 2,
    head_dim: int = 16,
    attention: str = "eager",
    rope: str = "default",
    context: int = 256,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config,
) -> LlamaForCausalLM:
    """A random Llama with logits of order 1 and norm weights that are not ones."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **ROPE_TYPES[rope]}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=context,
            rope_parameters=parameters,
            attn_implementation=attention,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            **config,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.3 * noise)
            elif "embed" in name:
                weight.copy_(noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[1] ** 0.5)
    return model.to(dtype).eval()


def tokens(length: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 101, (batch, length), generator=torch.Generator().manual_seed(seed))
