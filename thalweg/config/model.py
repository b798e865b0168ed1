"""The frozen description of one V4 model, read from the checkpoint's own config.json.

Accepts the published form (`compress_ratios`, `rope_scaling`), the form that transformers writes (`layer_types`,
`rope_parameters`) and the inference form (`dim`, `n_layers`). Spec: model-spec section 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

UNIT_TOKENS = 128  # lcm(4, 128): the smallest step at which every V4 compressor is at rest


class LayerKind(StrEnum):
    """What a layer attends to beside its window: nothing, selected CSA entries, or all HCA entries."""

    WINDOW = "window"
    CSA = "csa"
    HCA = "hca"


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN frequency scaling of the compressed layers' rotation (model-spec section 3.4)."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and constants of one model. Counts are per model, dims in elements."""

    vocab_size: int
    hidden_size: int
    layer_kinds: tuple[LayerKind, ...]
    num_hash_layers: int
    num_attention_heads: int
    head_dim: int
    rope_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    window: int
    csa_ratio: int
    hca_ratio: int
    index_heads: int
    index_head_dim: int
    index_topk: int
    num_experts: int
    experts_per_token: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_streams: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: YarnScaling | None
    max_position_embeddings: int
    num_mtp_layers: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    expert_dtype: str  # "fp4", "fp8", "bf16" or "fp32": how routed experts are stored in the checkpoint
    weight_dtype: str  # "fp8", "bf16" or "fp32": how the other quantisable matrices are stored

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def unit_tokens(self) -> int:
        """Tokens after which every compressor is at rest; 128 for V4's ratios."""
        return math.lcm(UNIT_TOKENS, self.csa_ratio, self.hca_ratio)

    def layers_of(self, kind: LayerKind) -> tuple[int, ...]:
        """Indices of the layers of one kind, ascending."""
        return tuple(i for i, k in enumerate(self.layer_kinds) if k is kind)

    def ratio_of(self, layer: int) -> int:
        """Tokens per compressed entry of a layer; 0 for a window layer."""
        return {LayerKind.WINDOW: 0, LayerKind.CSA: self.csa_ratio, LayerKind.HCA: self.hca_ratio}[
            self.layer_kinds[layer]
        ]
