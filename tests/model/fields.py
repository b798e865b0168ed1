"""config.json fields of small V4 models with the layer patterns that matter."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": 97, "hidden_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "qk_rope_head_dim": 8, "q_lora_rank": 24,
    "o_groups": 2, "o_lora_rank": 16, "sliding_window": 128, "index_n_heads": 16, "index_head_dim": 16,
    "index_topk": 24, "n_routed_experts": 5, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "num_hash_layers": 1, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc",
    "norm_topk_prob": True, "routed_scaling_factor": 1.5, "swiglu_limit": 1.0, "hidden_act": "silu", "hc_mult": 4,
    "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "rope_theta": 10000, "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1,
    },
    "max_position_embeddings": 1048576, "num_nextn_predict_layers": 1, "bos_token_id": 0, "eos_token_id": 1,
    "tie_word_embeddings": False, "attention_bias": False, "torch_dtype": "float32",
}  # fmt: skip

FLASH_LIKE = {**_COMMON, "num_hidden_layers": 5, "compress_ratios": [0, 0, 4, 128, 4, 0]}
PRO_LIKE = {
    **_COMMON, "num_hidden_layers": 5, "compress_ratios": [128, 128, 4, 128, 4, 0], "hc_mult": 2,
    "num_attention_heads": 6, "o_groups": 3, "num_hash_layers": 3,
}  # fmt: skip
NARROW = {
    **_COMMON, "num_hidden_layers": 4, "compress_ratios": [4, 0, 4, 128, 0], "index_topk": 8, "sliding_window": 32,
    "head_dim": 48, "qk_rope_head_dim": 16, "num_hash_layers": 0, "hc_sinkhorn_iters": 3,
}  # fmt: skip

GEOMETRIES = {"flash-like": FLASH_LIKE, "pro-like": PRO_LIKE, "narrow": NARROW}
