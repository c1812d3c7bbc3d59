"""What single architectures need beyond the one set of small sizes, and the architectures that are left out and why.

Keys are model types, or `kind/model type` where only one kind of model needs it. Data only.
"""

from __future__ import annotations

from typing import Any

DEFAULT = object()  # as an override: the default of the class after all

GEMMA4 = {
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": 100,
}
DOTS3 = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 20,
    "swa_kv_lora_rank": 28,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 12,
    "head_dim": 24,
    "index_head_dim": 24,
    "index_n_heads": 2,
    "index_topk": 4,
}
AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]}
SWIN = {"patch_size": 4, "window_size": 4, "depths": [2, 1], "num_heads": [2, 4], "embed_dim": 32}
STAGED = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
NECK = {"neck_hidden_sizes": [12, 24, 48, 48], "fusion_hidden_size": 24, "reassemble_hidden_size": 64}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 24,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 12,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "helium": {"head_dim": 16},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "xlnet": {"d_head": 16},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [4, 8],
        "axial_pos_embds_dim": [24, 40],
        "num_buckets": 4,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 0,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 112, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 12,
        "vocab_size_per_layer_input": 100,
        "intermediate_size": [112] * 4,
        "laurel_rank": 4,
    },
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "dots3_note_text": DOTS3,
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "blt": {
        "encoder_hash_byte_group_vocab": 90,
        "encoder_config": {"hidden_size_global": 96},
        "decoder_config": {"hidden_size_global": 96},
        "global_config": {"hidden_size": 96},
    },
    "esm": {"token_dropout": False},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "embedding_size": 40},
    "neomme": {"head_dim": 32},
    "squeezebert": {"embedding_size": 64},
    "swin": SWIN,
    "swinv2": SWIN,
    "donut-swin": SWIN,
    "maskformer-swin": SWIN,
    "bit": {"hidden_sizes": [32, 64, 96, 128], "embedding_size": 32, "num_groups": 8},
    "cvt": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "hgnet_v2": {"hidden_sizes": DEFAULT, "embedding_size": DEFAULT},
    "textnet": {"hidden_sizes": DEFAULT},
    "rt_detr_resnet": {"hidden_sizes": DEFAULT},
    "resnet": {"hidden_sizes": [16, 24, 32, 40], "embedding_size": 16, "depths": [1, 1, 2, 1]},
    "esmc": {"num_key_value_heads": 4, "head_dim": DEFAULT},
    "sapiens2": {"num_key_value_heads": 4, "num_key_value_heads_per_layer": [4, 2]},
    "flint": {"mlp_only_layers": [0]},
    "mobilevitv2": {"image_size": 64, "patch_size": 2},
    "lw_detr_vit": {"num_windows": 4},
    "siglip2_vision_model": {"num_patches": 16},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "is_hybrid": False},
    "depth_anything": {"backbone_config": STAGED, **NECK},
    "prompt_depth_anything": {"backbone_config": STAGED, **NECK},
    "chmv2": {"backbone_config": STAGED, **NECK},
    "tipsv2_dpt": {"backbone_config": STAGED, **NECK},
    "zoedepth": {
        "backbone_config": {"num_hidden_layers": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        "bottleneck_features": 24,
        **NECK,
    },
    "vitpose_backbone": {"num_experts": DEFAULT},
    "moonshine_streaming": {"num_key_value_heads": 4, "head_dim": 16},
    "pix2struct": {"text_config": {"d_kv": 16}},
    "instructblip": {"image_token_index": 99},
    "instructblipvideo": {"video_token_index": 99},
    "paddleocr_vl": {"text_config": {"rope_parameters": AXES}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [40, 24], "rope_parameters": AXES}},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "index_topk": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 99}},
    "emu3": {"vocabulary_map": {"<image>": 99}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "align_vision_model": {"hidden_dim": DEFAULT},
    "blip-2": {"qformer_config": {"use_qformer_text_input": True}},
    "shieldgemma2": {"yes_token_index": 97, "no_token_index": 96},
    "molmo2": {"vision_config": {"image_size": [32, 32]}, "adapter_config": {"vision_feature_layer": [-1, -2]}},
    "cosmos3_edge": {"text_config": {"rope_parameters": AXES}},
    "efficientnet": {"hidden_dim": DEFAULT},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp_text": QWEN4,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "roc_bert": {
        "pronunciation_embed_dim": 24,
        "pronunciation_vocab_size": 90,
        "shape_embed_dim": 28,
        "shape_vocab_size": 90,
    },
}

# In eval mode its reversible layers give no gradients.
NEEDS_TRAINING = {"reformer"}

UNSIZED = "not sized yet: at these sizes its widths do not fit one another"
SCIPY = "its loss imports scipy, which is not installed"
SKIPPED: dict[str, str] = {
    "gemma3n": "its vision tower is a timm model, and timm is not installed",
    "gemma4_assistant": "cannot be built: it shares every layer, which its own check of shared layers refuses",
    "gemma4_unified_assistant": "cannot be built, as gemma4_assistant",
    **dict.fromkeys(("timm_wrapper", "timm_backbone", "fast_vlm", "perception_lm"), "timm is not installed"),
    **dict.fromkeys(("eomt", "eomt_dinov3", "mask2former", "maskformer", "oneformer", "videomt"), SCIPY),
    "inkling_mm_model": "scipy is not installed",
    "dinat": "natten is not installed",
    **dict.fromkeys(("pp_ocrv5_server_det", "pp_ocrv6_medium_det", "granite4_vision"), "its default does not build"),
    "pp_doclayout_v2": "its default does not run: thresholds and an order of classes are missing from it",
    **dict.fromkeys(("pp_ocrv6_small_det", "pp_formulanet", "align", "kyutai_speech_to_text"), UNSIZED),
    **dict.fromkeys(("granite_speech5_ctc", "ernie4_5_vl_moe", "rf_detr", "lw_detr"), UNSIZED),
    "depth_pro": "not sized yet: its image and patch sizes are checked against those of its three encoders",
    "pi0": "no batch made yet: none of the candidates runs",
}
