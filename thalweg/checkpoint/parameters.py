"""Parameter names and shapes as data: the single truth for the model, the loader, the writer and `inspect`.

An engine parameter has the official name, except that the routed experts of a layer are stacked into two tensors. Each
is filled from one or more checkpoint tensors (`Piece`s) in either the official or the transformers naming
(model-spec section 6).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from thalweg.config.model import LayerKind, ModelConfig

SCALES = ".scales"  # after a parameter's name: its scales, where the engine keeps it quantised


class Precision(StrEnum):
    """What the engine computes with: its compute dtype, fp32 always, or integers."""

    COMPUTE = "compute"
    FLOAT32 = "float32"
    INT64 = "int64"


class Storage(StrEnum):
    """How the official layout may store a tensor."""

    BF16 = "bf16"
    FP32 = "fp32"
    INT64 = "int64"
    MATRIX = "matrix"  # FP8 with 128x128 scales when the checkpoint is quantised, else bf16
    EXPERT = "expert"  # FP4 or FP8 when the checkpoint is quantised, else bf16


@dataclass(frozen=True, slots=True)
class Piece:
    """One checkpoint tensor and where it goes: row range [first, first + shape[-2]) of expert `expert`, or all."""

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class Parameter:
    """One engine parameter. `transformers` is empty where that layout has no such tensor (MTP). Its rows are multiplied
    in `groups` equal parts: blocks of FP8 scales that lie across two of them cannot be kept."""

    name: str
    shape: tuple[int, ...]
    precision: Precision
    storage: Storage
    official: tuple[Piece, ...]
    transformers: tuple[Piece, ...]
    groups: int = 1

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


_LAYER_RENAMES = (
    ("attn.indexer.compressor.wkv.weight", "self_attn.compressor.indexer.kv_proj.weight"),
    ("attn.indexer.compressor.wgate.weight", "self_attn.compressor.indexer.gate_proj.weight"),
    ("attn.indexer.compressor.ape", "self_attn.compressor.indexer.position_bias"),
    ("attn.indexer.compressor.norm.weight", "self_attn.compressor.indexer.kv_norm.weight"),
    ("attn.indexer.wq_b.weight", "self_attn.compressor.indexer.q_b_proj.weight"),
    ("attn.indexer.weights_proj.weight", "self_attn.compressor.indexer.scorer.weights_proj.weight"),
    ("attn.compressor.wkv.weight", "self_attn.compressor.kv_proj.weight"),
    ("attn.compressor.wgate.weight", "self_attn.compressor.gate_proj.weight"),
    ("attn.compressor.ape", "self_attn.compressor.position_bias"),
    ("attn.compressor.norm.weight", "self_attn.compressor.kv_norm.weight"),
    ("attn.wq_a.weight", "self_attn.q_a_proj.weight"),
    ("attn.q_norm.weight", "self_attn.q_a_norm.weight"),
    ("attn.wq_b.weight", "self_attn.q_b_proj.weight"),
    ("attn.wkv.weight", "self_attn.kv_proj.weight"),
    ("attn.kv_norm.weight", "self_attn.kv_norm.weight"),
    ("attn.attn_sink", "self_attn.sinks"),
    ("attn.wo_a.weight", "self_attn.o_a_proj.weight"),
    ("attn.wo_b.weight", "self_attn.o_b_proj.weight"),
    ("attn_norm.weight", "input_layernorm.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("hc_attn_", "attn_hc."),
    ("hc_ffn_", "ffn_hc."),
    ("ffn.gate.weight", "mlp.gate.weight"),
    ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    ("ffn.gate.tid2eid", "mlp.gate.tid2eid"),
    ("ffn.shared_experts.w1.weight", "mlp.shared_experts.gate_proj.weight"),
    ("ffn.shared_experts.w3.weight", "mlp.shared_experts.up_proj.weight"),
    ("ffn.shared_experts.w2.weight", "mlp.shared_experts.down_proj.weight"),
    ("ffn.experts.gate_up", "mlp.experts.gate_up_proj"),
    ("ffn.experts.down", "mlp.experts.down_proj"),
)
_TOP_RENAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}


def transformers_name(name: str) -> str | None:
    """The name that transformers gives an engine parameter; None for MTP parameters, which it drops."""
    if name in _TOP_RENAMES:
        return _TOP_RENAMES[name]
    if not name.startswith("layers."):
        return None
    _, layer, rest = name.split(".", 2)
    for ours, theirs in _LAYER_RENAMES:
        if rest == ours or (ours.endswith("_") and rest.startswith(ours)):
            return f"model.layers.{layer}.{theirs}{rest[len(ours) :]}"
    raise AssertionError(f"no transformers name for {name}")


def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every parameter of a model, trunk first, then MTP blocks."""
    return tuple(_all(config))


def _all(config: ModelConfig) -> Iterator[Parameter]:
    hidden = config.hidden_size
    yield _plain("embed.weight", (config.vocab_size, hidden))
    for layer, kind in enumerate(config.layer_kinds):
        yield from _block(f"layers.{layer}.", config, kind, hashed=layer < config.num_hash_layers)
    yield _plain("norm.weight", (hidden,))
    yield _plain("head.weight", (config.vocab_size, hidden), Precision.FLOAT32, Storage.BF16)
    yield from _head_mix("", config)
    for layer in range(config.num_mtp_layers):
        prefix = f"mtp.{layer}."
        yield from _block(prefix, config, LayerKind.WINDOW, hashed=False)
        yield _plain(prefix + "e_proj.weight", (hidden, hidden), storage=Storage.MATRIX)
        yield _plain(prefix + "h_proj.weight", (hidden, hidden), storage=Storage.MATRIX)
        for norm in ("enorm", "hnorm", "norm"):
            yield _plain(f"{prefix}{norm}.weight", (hidden,))
        yield from _head_mix(prefix, config)


def _plain(
    name: str,
    shape: tuple[int, ...],
    precision: Precision = Precision.COMPUTE,
    storage: Storage = Storage.BF16,
) -> Parameter:
    theirs = transformers_name(name)
    pieces = () if theirs is None else (Piece(theirs, shape),)
    return Parameter(name, shape, precision, storage, (Piece(name, shape),), pieces)


def _float32(name: str, shape: tuple[int, ...]) -> Parameter:
    return _plain(name, shape, Precision.FLOAT32, Storage.FP32)


def _head_mix(prefix: str, config: ModelConfig) -> Iterator[Parameter]:
    n = config.hc_streams
    yield _float32(prefix + "hc_head_fn", (n, n * config.hidden_size))
    yield _float32(prefix + "hc_head_base", (n,))
    yield _float32(prefix + "hc_head_scale", (1,))


def _block(prefix: str, config: ModelConfig, kind: LayerKind, *, hashed: bool) -> Iterator[Parameter]:
    n, hidden = config.hc_streams, config.hidden_size
    for part in ("attn", "ffn"):
        yield _float32(f"{prefix}hc_{part}_fn", ((2 + n) * n, n * hidden))
        yield _float32(f"{prefix}hc_{part}_base", ((2 + n) * n,))
        yield _float32(f"{prefix}hc_{part}_scale", (3,))
        yield _plain(f"{prefix}{part}_norm.weight", (hidden,))
    yield from _attention(prefix + "attn.", config, kind)
    yield from _ffn(prefix + "ffn.", config, hashed=hashed)


def _attention(prefix: str, config: ModelConfig, kind: LayerKind) -> Iterator[Parameter]:
    hidden, heads, dim = config.hidden_size, config.num_attention_heads, config.head_dim
    matrix = Storage.MATRIX
    yield _plain(prefix + "wq_a.weight", (config.q_lora_rank, hidden), storage=matrix)
    yield _plain(prefix + "q_norm.weight", (config.q_lora_rank,))
    yield _plain(prefix + "wq_b.weight", (heads * dim, config.q_lora_rank), storage=matrix)
    yield _plain(prefix + "wkv.weight", (dim, hidden), storage=matrix)
    yield _plain(prefix + "kv_norm.weight", (dim,))
    yield _float32(prefix + "attn_sink", (heads,))
    low = config.o_groups * config.o_lora_rank
    wo_a = _plain(prefix + "wo_a.weight", (low, heads * dim // config.o_groups), storage=matrix)
    yield replace(wo_a, groups=config.o_groups)
    yield _plain(prefix + "wo_b.weight", (hidden, low), storage=matrix)
    if kind is LayerKind.HCA:
        yield from _compressor(prefix + "compressor.", hidden, dim, dim, config.hca_ratio)
    if kind is LayerKind.CSA:
        yield from _compressor(prefix + "compressor.", hidden, dim, 2 * dim, config.csa_ratio)
        n, width = config.index_heads, config.index_head_dim
        yield _plain(prefix + "indexer.wq_b.weight", (n * width, config.q_lora_rank), storage=matrix)
        yield _plain(prefix + "indexer.weights_proj.weight", (n, hidden))
        yield from _compressor(prefix + "indexer.compressor.", hidden, width, 2 * width, config.csa_ratio)


def _compressor(prefix: str, hidden: int, dim: int, channels: int, ratio: int) -> Iterator[Parameter]:
    yield _plain(prefix + "wkv.weight", (channels, hidden), Precision.FLOAT32)
    yield _plain(prefix + "wgate.weight", (channels, hidden), Precision.FLOAT32)
    yield _float32(prefix + "ape", (ratio, channels))
    yield _plain(prefix + "norm.weight", (dim,))


def _ffn(prefix: str, config: ModelConfig, *, hashed: bool) -> Iterator[Parameter]:
    hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    yield _plain(prefix + "gate.weight", (experts, hidden), Precision.FLOAT32)
    if hashed:
        shape = (config.vocab_size, config.experts_per_token)
        yield _plain(prefix + "gate.tid2eid", shape, Precision.INT64, Storage.INT64)
    else:
        yield _float32(prefix + "gate.bias", (experts,))
    for name, shape in (("w1", (inner, hidden)), ("w3", (inner, hidden)), ("w2", (hidden, inner))):
        yield _plain(f"{prefix}shared_experts.{name}.weight", shape, storage=Storage.MATRIX)
    up = [(f"{prefix}experts.{e}.{w}.weight", e, i * inner) for e in range(experts) for i, w in enumerate(("w1", "w3"))]
    down = [(f"{prefix}experts.{e}.w2.weight", e, 0) for e in range(experts)]
    yield replace(_stacked(prefix + "experts.gate_up", (experts, 2 * inner, hidden), (inner, hidden), up), groups=2)
    yield _stacked(prefix + "experts.down", (experts, hidden, inner), (hidden, inner), down)


def _stacked(
    name: str, shape: tuple[int, ...], piece: tuple[int, int], sources: list[tuple[str, int, int]]
) -> Parameter:
    official = tuple(Piece(source, piece, expert, first) for source, expert, first in sources)
    theirs = transformers_name(name)
    stacked = () if theirs is None else (Piece(theirs, shape),)
    return Parameter(name, shape, Precision.COMPUTE, Storage.EXPERT, official, stacked)
