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


def most_attended(keys, values, keep, queries, first_query, first, rotate, scaling, pool):
    """The entries that the queries attend to most: `(kv_heads, n, dim)` and queries `(m, heads, dim)`, all unrotated."""
    kv_heads, n, _ = keys.shape
    kept_keys, kept_values = [], []
    for head in range(kv_heads):
        total, count = np.zeros(n), 0
        for m in range(len(queries)):
            slot, groups = first_query + m, len(queries[m]) // kv_heads
            for query in queries[m][head * groups : (head + 1) * groups]:
                seen = min(n, slot - first + 1)
                count += 1
                if seen < 1:
                    continue
                turned = rotate(query[None], slot)[0]
                scores = np.array([rotate(keys[head, None, i], first + i)[0] @ turned for i in range(seen)]) * scaling
                weights = np.exp(scores - scores.max())
                total[:seen] += weights / weights.sum()
        mean = total / count
        half = pool // 2
        pooled = np.array([mean[max(0, i - half) : i + half + 1].mean() for i in range(n)])
        chosen = np.sort(np.argsort(-pooled)[:keep])
        kept_keys.append(keys[head, chosen])
        kept_values.append(values[head, chosen])
    return np.stack(kept_keys), np.stack(kept_values)


def most_novel(keys, following, keep, pool, lead):
    """Places of the entries whose keys `(kv_heads, n, dim)` are the least like all, those that follow too, by leverage."""
    kv_heads, n, dim = keys.shape
    scores = np.zeros(n)
    for head in range(kv_heads):
        every = [*keys[head], *following[head]]
        mean = sum(every) / len(every)
        moments = sum(np.outer(key - mean, key - mean) for key in every)
        inverse = np.linalg.inv(moments + 2 * np.trace(moments) / dim * np.eye(dim))
        scores = np.maximum(scores, [(key - mean) @ inverse @ (key - mean) for key in keys[head]])
    half = pool // 2
    pooled = np.array([scores[max(0, i - half) : i + half + 1].mean() for i in range(n)])
    worth = np.array([pooled[i : i + lead + 1].max() for i in range(n)])
    worth[n - min(lead + half, keep // 2) :] = np.inf  # what they lead to is not there yet
    return np.sort(sorted(range(n), key=lambda i: (-worth[i], -i))[:keep])


def most_apart(keys, following, keep, taken):
    """Places of the entries, none of those in `taken`, whose keys `(n, dim)` have the least cosine with the mean unit key.

    Of those that are alike, the later ones.
    """
    units = [key / np.linalg.norm(key) for key in [*keys, *following]]
    mean = sum(units) / len(units)
    free = [i for i in range(len(keys)) if i not in taken]
    mean, later = mean / np.linalg.norm(mean), 1e-3 / max(1, len(keys) - 1)
    return sorted(sorted(free, key=lambda i: units[i] @ mean - later * i)[:keep])


def llama_logits(
    model, tokens, window, sinks, ratio, recents, squeeze=low_pass, attended=None, schedule=None, novel=None
) -> np.ndarray:
    """Logits `(tokens, vocabulary)` of one sequence.

    `attended=(queries, pool)` selects by attention in place of `squeeze`; `schedule(token, entries)` gives the folds
    `(start, stop, keep)` before a token in place of the paper's; `novel=(pool, lead, layer, per_head)` selects by novelty.
    """
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
    queries = [[] for _ in range(config.num_hidden_layers)]  # since the last fold
    logits = []

    def rotate_at(x, slot):
        return _rotate(x, cos[slot], sin[slot])

    def folds_before(token, entries):
        if schedule is not None:
            return schedule(token, entries)
        span = window - sinks - recents
        return [(sinks, window - recents, int(span * ratio))] if entries == window else []

    for number, token in enumerate(tokens):
        chosen = {}  # places that layers keep before this token
        x = weights["model.embed_tokens.weight"][int(token)]
        for layer in range(config.num_hidden_layers):
            w = layers[layer]
            h = _rms_norm(x, w["input_layernorm.weight"], config.rms_norm_eps)
            q = (w["self_attn.q_proj.weight"] @ h).reshape(heads, dim)
            k = (w["self_attn.k_proj.weight"] @ h).reshape(kv_heads, dim)
            v = (w["self_attn.v_proj.weight"] @ h).reshape(kv_heads, dim)
            folds = folds_before(number, keys[layer].shape[1])
            for place, (start, stop, keep) in enumerate(folds):
                entries = keys[layer].shape[1]
                spans = [held[:, start:stop] for held in (keys[layer], values[layer])]
                if novel is not None:
                    pool, lead, first, share = novel
                    own = int(share * keep)
                    leader = layer if first is None or layer < first else first
                    following = keys[layer][:, stop:]
                    if first is not None and layer < first:
                        chosen[layer, place] = np.arange(stop - start - keep + own, stop - start)
                    elif leader == layer:
                        begin = own if number > window else 0
                        picked = most_novel(spans[0][:, begin:], following, keep - own, pool, lead)
                        chosen[layer, place] = begin + picked
                    places = [
                        [*most_apart(mine, others, own, chosen[leader, place]), *chosen[leader, place]]
                        for mine, others in zip(spans[0], following, strict=True)
                    ]
                    kept = [np.stack([each[at] for each, at in zip(held, places, strict=True)]) for held in spans]
                elif attended is None:
                    kept = [squeeze(span, keep) for span in spans]
                else:
                    last = queries[layer][-attended[0] :][-entries:]
                    first_query = entries - len(last)
                    kept = most_attended(*spans, keep, last, first_query, start, rotate_at, dim**-0.5, attended[1])
                keys[layer], values[layer] = (
                    np.concatenate([held[:, :start], low, held[:, stop:]], 1)
                    for held, low in zip((keys[layer], values[layer]), kept, strict=True)
                )
            if folds:
                queries[layer] = []
            queries[layer].append(q)
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
