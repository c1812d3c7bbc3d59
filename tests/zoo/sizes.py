"""One set of small sizes for every configuration of transformers: a table of field names, and how it is applied.

What only one architecture needs stands in tests/zoo/overrides.py; nothing here knows a model by its name.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.zoo.overrides import DEFAULT, OVERRIDES

VOCAB = 100
LAYERS = 2
MAX_LAYERS = 4  # where the layers are of several kinds

# Field name (a regular expression over the whole of it) -> value; the first match counts. Rectangular on purpose:
# heads * head_dim != hidden, key/value heads fewer than heads, no feed-forward width equal to another size.
SIZES: list[tuple[str, Any]] = [
    (r"vocab_size|text_vocab_size|decoder_vocab_size|unpadded_vocab_size", VOCAB),
    (r"hidden_size|d_model|n_embd|emb_dim|dim|embed_dim|embedding_dim|word_embed_proj_dim|lru_width|output_dim", 64),
    (r"hidden_dim|projection_dim|attention_hidden_size|entity_emb_size|(backbone|out|text|audio)_hidden_size", 64),
    (r"intermediate_size|ffn_dim|encoder_ffn_dim|decoder_ffn_dim|n_inner|ffn_hidden_size|dim_ff|d_ff|dff|d_inner", 112),
    (r"dense_intermediate_size|intermediate_size_mlp|prefix_dense_intermediate_size|mlp_dim|feed_forward_size", 112),
    (r"(moe|expert|shared|shared_expert|shared_experts|moe_shared_expert)_(ffn_)?(intermediate|hidden)_size", 40),
    (r"num_(hidden_|encoder_|decoder_)?layers|n_layers?|(encoder|decoder)_layers", LAYERS),
    (r"num_attention_heads|num_heads|n_heads?|attention_heads|num_(en|de)coder_attention_heads", 4),
    (r"(encoder|decoder)_attention_heads|swa_num_attention_heads", 4),
    (r"(swa_)?num_key_value_heads|num_kv_heads|n_kv_heads|kv_n_heads", 2),
    (r"(swa_)?head_dim|d_head|kv_channels|attention_head_dim|dim_head", 24),
    (r"d_kv|attention_head_size", 24),
    (r"q_lora_rank", 20),
    (r"kv_lora_rank", 28),
    (r"qk_rope_head_dim", 8),
    (r"qk_nope_head_dim", 16),
    (r"v_head_dim", 12),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_expert", 4),
    (r"(num_experts_per_tok|moe_k|moe_topk|top_k_experts|num_experts_per_token)", 2),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"n_group|topk_group|num_expert_group|n_shared_experts", 1),
    (r"linear_num_(key_)?heads|index_n_heads|indexer_n_heads|num_(self|cross)_attention_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"linear_(key_)?head_dim|index_head_dim", 16),
    (r"linear_value_head_dim", 20),
    (r"index_topk", 4),
    (r"mamba_d_state|ssm_state_size|state_size|(mamba_)?chunk_size|mamba_chunk_size", 16),
    (r"mamba_num_heads|mamba_n_heads", 8),
    (r"mamba_head_dim", 16),
    (r"n_groups|mamba_n_groups|mamba_ngroups", 2),
    (r"depth|num_self_attends_per_block|aligner_num_add_layers|resampler_depth|speech_encoder_layers", LAYERS),
    (r"speech_encoder_intermediate_size|t2u_(en|de)coder_ffn_dim", 112),
    (r"speech_encoder_attention_heads|t2u_(en|de)coder_attention_heads", 4),
    (r"t2u_(en|de)coder_layers", LAYERS),
    (r"d_latents", 48),
    (r"context_size", 8),
    (r"cross_hidden_size", 64),
    (r"cross_num_attention_heads", 4),
    (r"cross_num_key_value_heads", 2),
    (r"cross_head_dim", 24),
    (r"num_filters", 4),
    (r"downsample_hidden_size", 24),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_source_positions|max_target_positions", 64),
    (r"context_length|original_max_position_embeddings", 64),
    (r"sliding_window|sliding_window_size|attention_window_size|local_attention", 8),
    (r"image_size|img_size|input_size|crop_size", 32),
    (r"patch_size", 8),
    (r"mm_tokens_per_image", 4),
    (r"image_seq_length", 16),
    (r"num_mel_bins|input_feat_per_channel", 32),
    (r"num_queries|num_object_queries", 10),
    (r"num_latents", 10),
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
    (r"(decoder_start|sep|cls|mask)_token_id", 1),
    (r".*(dropout|dropout_prob|_pdrop|layerdrop|drop_path_rate|drop_rate|jitter_noise|dropout_p)", 0.0),
]

# For fields that hold a number per stage.
STAGES: list[tuple[str, Callable[[int], float]]] = [
    (r"image_size|img_size", lambda size: 32),
    (r"depths?|num_layers|num_blocks|num_encoder_blocks", lambda depth: min(depth, 2)),
    (r"num(_attention)?_heads", lambda heads: 2),
    (r"hidden_sizes?|embed_dims?|neck_hidden_sizes|embed_dim|dims?|key_dim", lambda width: max(8, width // 32 * 8)),
    (r".*(dropout|drop_rate|path_rate)", lambda rate: 0.0),
]
LATENT = {"num_key_value_heads": 4, "head_dim": 8}


def fields(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields that a configuration class itself declares, with their defaults."""
    common = {each.name for each in dataclasses.fields(PreTrainedConfig)}
    return {
        each.name: None if each.default is dataclasses.MISSING else each.default
        for each in dataclasses.fields(cls)
        if each.name not in common
    }


def size_of(name: str) -> Any:
    return next((value for pattern, value in SIZES if re.fullmatch(pattern, name)), None)


def small(name: str, default: Any) -> Any:
    """The small value of a field, in the type of its default; None leaves the default."""
    if isinstance(default, list | tuple):
        staged = next((change for pattern, change in STAGES if re.fullmatch(pattern, name)), None)
        return None if staged is None else [staged(each) for each in default]
    value = size_of(name)
    if isinstance(default, bool) or value is None:
        return None
    return type(default)(value) if isinstance(default, int) and isinstance(value, float) else value


def special_tokens(declared: dict[str, Any]) -> dict[str, int]:
    """Ids at the end of the vocabulary for placeholders of images, sounds and the like; text never holds those."""
    names = [
        name
        for name, default in declared.items()
        if re.search(r"token_(id|index)$", name) and isinstance(default, int) and default >= VOCAB - 10
    ]
    return {name: VOCAB - 1 - rank for rank, name in enumerate(names) if size_of(name) is None}


def read(config: PreTrainedConfig, name: str) -> Any:
    """A field, or None where a configuration refuses to name one value for layers that differ."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def sized(cls: type[PreTrainedConfig], overrides: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A small configuration of the class; `overrides` win, and hold dictionaries for sub-configurations.

    `sized(CONFIG_MAPPING["llama"], {"num_hidden_layers": 3})`; the table of overrides holds inside others too.
    """
    overrides = OVERRIDES.get(cls.model_type, {}) | (overrides or {})
    nested = cls.sub_configs_defaults
    inner = {name: overrides.pop(name) for name in nested if isinstance(overrides.get(name), dict)}
    values = {name: sub_config(spec, inner.get(name)) for name, spec in nested.items() if name not in overrides}
    values = {name: value for name, value in values.items() if value is not None}
    declared = fields(cls)
    for name, default in declared.items():
        if name not in values and (value := small(name, default)) is not None:
            values[name] = value
    values |= special_tokens(declared)
    if "qk_rope_head_dim" in declared:  # latent attention: one key head per query head, rotary on a part of the head
        values |= {name: value for name, value in LATENT.items() if name in declared}
    values |= per_layer(cls, values)
    values |= overrides
    values = {name: value for name, value in values.items() if value is not DEFAULT}
    return scaled(cls(**copy.deepcopy(values)))


def sub_config(spec: Any, overrides: dict[str, Any] | None) -> PreTrainedConfig | None:
    if spec.optional and overrides is None:
        return None
    overrides = dict(overrides or {})
    model_type = overrides.pop("model_type", spec.model_type)
    cls = spec.config_class if dataclasses.is_dataclass(spec.config_class) else CONFIG_MAPPING[model_type]
    return sized(cls, {**{k: v for k, v in spec.init_kwargs.items() if size_of(k) is None}, **overrides})


def per_layer(cls: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    """The lists with an entry for every layer, cut to the first layer of each kind (at most `MAX_LAYERS` layers)."""
    depth_name = next((name for name in values if name in DEPTHS), None)
    if depth_name is None:
        return {}
    reference = cls()
    depth = getattr(reference, depth_name)
    lists = {
        name: list(each)
        for name in fields(cls)
        if isinstance(each := read(reference, name), list | tuple) and len(each) == depth and depth > 3
    }
    if not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=True))
    first = sorted({str(kind): index for index, kind in reversed(list(enumerate(kinds)))}.values())[:MAX_LAYERS]
    kept = first if len(first) >= LAYERS else [first[0], first[0] + 1]
    return {name: [each[index] for index in kept] for name, each in lists.items()} | {depth_name: len(kept)}


DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def scaled(config: PreTrainedConfig) -> PreTrainedConfig:
    """Multi-axis rotary sections, shared out over the small head; some models hold them outside the configuration."""
    rope = getattr(config, "rope_parameters", None)
    multiple = "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ())
    if isinstance(rope, dict) and "rope_type" in rope and (multiple or "mrope_section" in rope):
        head = read(config, "head_dim") or config.hidden_size // config.num_attention_heads
        half = int(head * (rope.get("partial_rotary_factor") or 1.0)) // 2
        parts = len(rope.get("mrope_section") or (0, 0, 0))
        rope["mrope_section"] = [half - (parts - 1) * (half // parts)] + [half // parts] * (parts - 1)
    return config
