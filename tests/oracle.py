"""The method as a plain loop: numpy float64, scipy's transforms, one token at a time, unrotated keys in lists.

Shares no code with the package. Only `cos` and `sin` are read off the model's own rotary module, whose float32 rounding
is part of the model.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
import torch


def low_pass(x: np.ndarray, keep: int) -> np.ndarray:  # (heads, n, dim) -> (heads, keep, dim)
    n = x.shape[1]
    coefficients = scipy.fft.dct(x, type=2, norm="ortho", axis=1)[:, :keep]
    return scipy.fft.idct(coefficients, type=2, norm="ortho", axis=1) * np.sqrt(keep / n)


def _rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def _rotate(x, cos, sin):  # (heads, ..., dim), (..., dim)
    half = x.shape[-1] // 2
    return x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin


def llama_logits(model, tokens, window, sinks, ratio, recents, squeeze=low_pass) -> np.ndarray:
    """Logits `(tokens, vocabulary)` of one sequence."""
    config = model.config
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    positions = torch.arange(window)[None]
    cos, sin = (t[0].double().numpy() for t in model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions))
    keys = [np.zeros((kv_heads, 0, dim)) for _ in range(config.num_hidden_layers)]
    values = [np.zeros((kv_heads, 0, dim)) for _ in range(config.num_hidden_layers)]
    layers = [
        {name.split(f"layers.{layer}.")[1]: value for name, value in weights.items() if f"layers.{layer}." in name}
        for layer in range(config.num_hidden_layers)
    ]
    logits = []
    for token in tokens:
        x = weights["model.embed_tokens.weight"][int(token)]
        for layer in range(config.num_hidden_layers):
            w = layers[layer]
            h = _rms_norm(x, w["input_layernorm.weight"], config.rms_norm_eps)
            q = (w["self_attn.q_proj.weight"] @ h).reshape(heads, dim)
            k = (w["self_attn.k_proj.weight"] @ h).reshape(kv_heads, dim)
            v = (w["self_attn.v_proj.weight"] @ h).reshape(kv_heads, dim)
            if keys[layer].shape[1] == window:
                squeezed = []
                for held in (keys[layer], values[layer]):
                    span = held[:, sinks : window - recents]
                    low = squeeze(span, int(span.shape[1] * ratio))
                    squeezed.append(np.concatenate([held[:, :sinks], low, held[:, window - recents :]], 1))
                keys[layer], values[layer] = squeezed
            keys[layer] = np.concatenate([keys[layer], k[:, None]], 1)
            values[layer] = np.concatenate([values[layer], v[:, None]], 1)
            held = keys[layer].shape[1]
            q = _rotate(q, cos[held - 1], sin[held - 1])
            rotated = _rotate(keys[layer], cos[:held], sin[:held])
            out = []
            for head in range(heads):
                group = head // (heads // kv_heads)
                scores = rotated[group] @ q[head] / np.sqrt(dim)
                scores = np.exp(scores - scores.max())
                out.append(scores / scores.sum() @ values[layer][group])
            x = x + w["self_attn.o_proj.weight"] @ np.concatenate(out)
            h = _rms_norm(x, w["post_attention_layernorm.weight"], config.rms_norm_eps)
            gate = w["mlp.gate_proj.weight"] @ h
            x = x + w["mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * (w["mlp.up_proj.weight"] @ h))
        x = _rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
        logits.append(weights["lm_head.weight"] @ x)
    return np.stack(logits)
