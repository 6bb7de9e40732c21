"""A tiny random model of every family in transformers' mapping of causal language models.

Of the 128 token ids, those of padding, begin and end of text are 0, 1 and 2, where the family has them, and those
that stand for an image or a sound are 100 and more.
"""

from __future__ import annotations

import re
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NOT_BUILT: dict[str, str] = {}
if missing := [package for package in ("timm", "PIL") if find_spec(package) is None]:
    NOT_BUILT["gemma3n"] = f"its vision tower needs {' and '.join(missing)}, not installed here"
try:
    getattr(CONFIG_MAPPING["gemma4_text"](num_kv_shared_layers=30), "kv_sharing_modes", None)
except ValueError:
    reason = "all its layers read the target model's keys, with which this version of transformers cannot build them"
    NOT_BUILT |= dict.fromkeys(["gemma4_assistant", "gemma4_unified_assistant"], reason)

# The one rule: what an attribute of these names becomes, in a config and in the configs inside it, wherever it is set
# and positive. A list with an entry for each layer is cut to the layers of _chosen_layers.
SIZES = {
    "hidden_size n_embd d_model embedding_dim lru_width emb_dim word_embed_proj_dim embedding_size "
    "input_embedding_size output_embedding_size pronunciation_embed_dim shape_embed_dim hidden_size_global "
    "attention_hidden_size backbone_hidden_size ple_embed_dim adapter_in_dim adapter_out_dim adapter_input_size "
    "mm_embed_dim audio_embed_dim output_proj_dims mm_posemb_size position_embedding_size nemo_conv_channels "
    "ext_pw_out_channel depthwise_separable_out_channel": 64,
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers num_decoder_layers "
    "num_blocks depth": 4,
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_attention_heads_per_layer swa_num_attention_heads "
    "linear_num_heads linear_num_value_heads": 4,
    "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads index_n_heads": 2,
    "head_dim kv_channels dim_head d_head d_kv attention_head_size swa_head_dim linear_head_dim linear_key_head_dim "
    "linear_value_head_dim index_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim": 16,
    "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim d_ff d_inner dff ffn_hidden_size mlp_dim dim_ff "
    "feed_forward_size dense_intermediate_size intermediate_size_mlp": 96,
    "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size": 32,
    "q_lora_rank kv_lora_rank o_lora_rank hc_lowrank laurel_rank router_hidden_size hidden_size_per_layer_input": 32,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k": 2,
    "n_group topk_group num_expert_group first_k_dense_replace": 1,
    "mamba_n_heads mamba_num_heads": 8,  # times 16: twice the hidden size
    "mamba_d_head mamba_head_dim mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size": 16,
    "mamba_dt_rank time_step_rank": 4,
    "n_groups": 2,
    "vocab_size decoder_vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size "
    "encoder_hash_byte_group_vocab": 128,
    "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions context_length "
    "model_max_length": 4096,
    "sliding_window sliding_window_size attention_window_size attention_chunk_size window_size": 11,
    "index_topk": 16,  # of the keys of a sparse attention
    "attention_multiplier": 0.25,  # one over the root of the head size
    "query_pre_attn_scalar": 16,
    "logit_scale logits_mup_width_multiplier": 1.0,
}
SIZE = {name: value for names, value in SIZES.items() for name in names.split()}

MUSICGEN = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}, "decoder": {}}
DEFAULTS: dict[str, dict[str, Any]] = {  # arguments without which the class has no config, or no towers
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}, "audio_config": {"model_type": "gemma4_audio"}},
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gemma4_unified": {
        "vision_config": {"model_type": "gemma4_unified_vision"},
        "audio_config": {"model_type": "gemma4_unified_audio"},
    },
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text"}},
    "musicgen": MUSICGEN,
    "musicgen_melody": MUSICGEN,
}

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
SHARED = {"layer_types": [SLIDING, FULL] * 3, "num_kv_shared_layers": 2}  # the last two layers own no keys
SPARSE = {"intermediate_size": 96, "activation_sparsity_pattern": [0.5] * 3 + [0.0] * 3}
WIDE = {"global_head_dim": 32}  # full layers have twice the head size of sliding ones, as by default
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
LATENT_SWA = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32}
LATENT_SWA |= {"head_dim": 32, "qk_nope_head_dim": 16, "v_head_dim": 16}
DOTS3 = {"head_dim": 32, **{f"swa_{name}": value for name, value in LATENT_SWA.items()}}
INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 16, "budget": 16, "compress_ratio": 4}
QWEN4 = {f"indexer_{name}": value for name, value in INDEXER.items()}

OVERRIDES: dict[str, dict[str, Any]] = {  # a dict of a sub-config is for that one
    "bamba": {"attn_layer_indices": [1, 3]},  # no attention by default
    "codegen": {"rotary_dim": 4},  # a quarter of the head, as by default
    "cohere_compass_text": {  # no RoPE parameters by default, with which it cannot be built
        "layer_types": [SLIDING, FULL] * 2,
        "rope_parameters": {SLIDING: MROPE, FULL: MROPE},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},  # its checkpoints have them, its class does not
    "deepseek_v2": {"num_experts_per_tok": 2},  # None by default
    "deepseek_v4": {  # its one key-value head is not a choice; an eighth of the head rotates, as by default
        "num_key_value_heads": 1,
        "head_dim": 32,
        "qk_rope_head_dim": 4,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"] * 2,
        "compress_rates": {"heavily_compressed_attention": 8, "compressed_sparse_attention": 4},
    },
    "dots1": {  # None by default
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note": {"text_config": DOTS3},  # the sliding layers have sizes of their own
    "dots3_note_text": DOTS3,
    "falcon_h1": {"mamba_d_ssm": 128},  # eight heads of 16
    "gemma3n": {"text_config": {**SHARED, **SPARSE}},
    "gemma3n_text": {**SHARED, **SPARSE},
    "gemma4": {"text_config": {**SHARED, **WIDE}},
    "gemma4_assistant": {"text_config": {**WIDE, "num_kv_shared_layers": 4}},  # all its layers
    "gemma4_text": {**SHARED, **WIDE},
    "gemma4_unified": {"text_config": WIDE},
    "gemma4_unified_assistant": {"text_config": {**WIDE, "num_kv_shared_layers": 4}},
    "gemma4_unified_text": WIDE,
    "got_ocr2": {"vision_config": {"output_channels": 8, "image_size": 64}},
    "gpt_bigcode": {"num_key_value_heads": 1},  # multi-query by default
    "gptj": {"rotary_dim": 4},  # a quarter of the head, as by default
    "granitemoehybrid": {"layer_types": [LINEAR, FULL] * 2},  # no attention by default
    "hrm_text": {"num_hidden_layers": 1, "L_cycles": 2},  # each of its two layers runs twice or four times
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},  # one expert by default
    "jamba": {"num_hidden_layers": 5, "attn_layer_period": 3, "attn_layer_offset": 1},  # attention in layers 1 and 4
    "lfm2": {"layer_types": ["conv", FULL] * 2},  # no convolutions by default
    "lfm2_moe": {"layer_types": ["conv", FULL] * 2, "num_dense_layers": 1},  # None by default
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},  # two attentions in each layer
    "mamba2": {"num_heads": 8},  # times 16: twice the hidden size
    "mimo_v2_flash": {"head_dim": 24},  # keys are longer than values by a half, as by default
    "minimax_m3_vl_text": {"rotary_dim": 8},  # half of the head, as by default
    "ministral": {"layer_types": [FULL, SLIDING, SLIDING, FULL]},  # the default, all sliding, is no checkpoint's
    "mistral": {"sliding_window": None},  # the default, all sliding, is only the first checkpoint's
    "moshi": {"sliding_window": 4096},  # None is refused, and its cache would slide where its mask does not
    "nemotron_h": {"layers_block_type": [LINEAR, "moe", FULL, "mlp", FULL]},  # one attention by default
    "qwen4_exp": {"text_config": QWEN4},  # None by default
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 6},  # two recurrent layers for each attention
    "reformer": {"axial_pos_embds_dim": (16, 48)},  # the hidden size
    "xmod": {"default_language": "en_XX"},  # None by default
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},  # twice the hidden size
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 8, "mamba_headdim": 16},
    "zaya": {"num_experts_per_tok": 1},  # no other number is allowed
}


def families() -> list[str]:
    """Every model type of the mapping."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _chosen_layers(lists: dict[str, list[Any]], count: int) -> list[int]:
    """The layers to keep so that each list keeps each of its values, with two full attentions and four at least."""
    chosen: list[int] = []
    for values in lists.values():
        for value in dict.fromkeys(values):
            if all(values[i] != value for i in chosen):
                chosen.append(values.index(value))
    kinds = lists.get("layer_types") or lists.get("layers_block_type") or []
    full = [i for i, kind in enumerate(kinds) if re.search("full|indexed|sparse_attention|hybrid$", kind)]
    chosen += [i for i in full if i not in chosen][: max(0, 2 - len({*full} & {*chosen}))]
    last = max(chosen, default=0)
    spare = [i for i in [*range(last, -1, -1), *range(last, count)] if i not in chosen]  # backwards: kinds alternate
    return sorted(chosen + spare[: max(0, 4 - len(chosen))])


def _shrunk(default: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    values = vars(default)
    new: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            new[name] = _shrunk(value, overrides.get(name, {}))
        elif name in SIZE and isinstance(value, (int, float)):
            new[name] = SIZE[name] if value > 0 else value
        elif name in ("head_dim", "num_key_value_heads") and value is None:
            new[name] = SIZE[name]
        elif re.search("dropout|pdrop|layerdrop|jitter", name) and isinstance(value, float):
            new[name] = 0.0
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id") and value is not None:
            new[name] = ("pad_token_id", "bos_token_id", "eos_token_id").index(name)
        elif re.search("_token_(id|index)$", name) and isinstance(value, int) and value >= 100:
            new[name] = 100 + sum(100 <= token < 128 for token in new.values() if type(token) is int)
        elif name == "is_decoder":
            new[name] = True
    count = next((values[name] for name in ("num_hidden_layers", "num_layers", "n_layer") if name in values), 0)
    per_layer = {name: list(value) for name, value in values.items() if isinstance(value, (list, tuple))}
    per_layer = {name: value for name, value in per_layer.items() if len(value) == count > len({*map(str, value)})}
    for i in _chosen_layers(per_layer, count) if per_layer else []:
        for name, entries in per_layer.items():
            new.setdefault(name, []).append(SIZE.get(name, entries[i]))
    if values.get("kv_lora_rank"):
        new["num_key_value_heads"] = new["num_attention_heads"]  # a latent attention has no groups
    new |= {name: value for name, value in overrides.items() if not isinstance(values.get(name), PreTrainedConfig)}
    if kinds := new.get("layer_types") or new.get("mlp_layer_types"):
        new["num_hidden_layers"] = len(kinds)
    return type(default)(**new)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The config class that AutoModelForCausalLM takes for that model type, shrunk."""
    arguments, overrides = (deepcopy(table.get(model_type, {})) for table in (DEFAULTS, OVERRIDES))
    return _shrunk(CONFIG_MAPPING[model_type](**arguments), overrides)


# what its family draws from a distribution of its own: decays, time steps, attention sinks
SPECIAL = re.compile(r"A_log|dt_bias|dt_proj\.bias|\bD$|time_|recurrent_param|sinks|correction_bias")
SHARP = re.compile(r"q_|k_|qkv|query|key|c_attn")  # queries and keys, for an attention that is far from uniform


@torch.no_grad()
def _reinitialise(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        owner = model.get_submodule(name.rpartition(".")[0])
        if SPECIAL.search(name):
            if not weight.any():
                weight.copy_(0.1 * noise)
        elif name.endswith("bias"):
            weight.copy_(0.1 * noise)
        elif weight.ndim < 2 or re.search(r"norm\w*\.weight$", name):  # from 0.5 to 1.5 around one, or around 1 + 0
            weight.add_(torch.rand(weight.shape, generator=generator) - 0.5)
        elif isinstance(owner, torch.nn.Embedding):
            weight.copy_(0.25 * noise)
        else:
            convolution = isinstance(owner, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d))
            inputs = weight[0].numel() if convolution else weight.shape[-1]
            weight.copy_((1.5 if SHARP.search(name) else 1.0) * noise / inputs**0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # the experts of each token id, zeros without a checkpoint
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer) % 4)


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The model of `tiny_config`, in float32 and in eval mode; the same weights for the same seed."""
    config = tiny_config(model_type)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # some classes take a part of the config: AutoModelForCausalLM takes it out if it is a text_config
    config = next((part for part in vars(config).values() if type(part) is model_class.config_class), config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config).float()
    _reinitialise(model, seed)
    return model.eval()
