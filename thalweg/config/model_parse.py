"""config.json -> ModelConfig. Three spellings are read: the published one, transformers' and DeepSeek's inference one.

What would change the computation and is not implemented is refused by name; fields that do not are ignored.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from thalweg.config.model import UNIT_TOKENS, LayerKind, ModelConfig, YarnScaling
from thalweg.errors import ConfigError, nearest

PUBLISHED = ("flash", "pro")
_RATIOS = {0: LayerKind.WINDOW, 4: LayerKind.CSA, 128: LayerKind.HCA}
_LAYER_TYPES = {
    "sliding_attention": LayerKind.WINDOW,
    "compressed_sparse_attention": LayerKind.CSA,
    "heavily_compressed_attention": LayerKind.HCA,
}
_INFERENCE_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "moe_inter_dim": "moe_intermediate_size",
    "n_hash_layers": "num_hash_layers",
    "n_activated_experts": "num_experts_per_tok",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "rope_head_dim": "qk_rope_head_dim",
    "window_size": "sliding_window",
    "norm_eps": "rms_norm_eps",
    "n_mtp_layers": "num_nextn_predict_layers",
    "max_seq_len": "max_position_embeddings",
}
# What the engine implements of fields that name a variant; any other value is refused.
_ONLY = {
    "model_type": ("deepseek_v4",),
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "hidden_act": ("silu",),
    "num_key_value_heads": (1,),
    "n_shared_experts": (1,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "norm_topk_prob": (True,),
    "compress_rate_csa": (4,),
    "compress_rate_hca": (128,),
}


def load_model_config(model: str | Path) -> ModelConfig:
    """The config of a model directory, of a config.json, or of a published model by name (`flash`, `pro`)."""
    return parse_model_config(read_config_json(model))


def read_config_json(model: str | Path) -> dict[str, Any]:
    """The raw fields of what `load_model_config` takes."""
    if str(model) in PUBLISHED:
        return json.loads(resources.files("thalweg").joinpath(f"data/configs/{model}.json").read_text())
    path = default_model() if str(model) == "default" else Path(model)
    try:
        path = path / "config.json" if path.is_dir() else path
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        near = nearest(str(model), ("default", *PUBLISHED))
        raise ConfigError(f"{path}: no such model directory or config.json.{near}", param="model") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}", param="model") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: not a JSON object", param="model")
    return fields


def default_model() -> Path:
    """The directory of the embedded default model."""
    return Path(str(resources.files("thalweg").joinpath("data/default")))


def parse_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Build a ModelConfig. Raises ConfigError naming the field that is missing, of wrong type or not supported."""
    fields = {_INFERENCE_NAMES.get(name, name): value for name, value in raw.items()}
    _refuse_other_architectures(fields)
    reader = _Reader(fields)
    kinds, csa_ratio, hca_ratio = _layers(reader)
    head_dim = reader.integer("head_dim", 512)
    config = ModelConfig(
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        layer_kinds=kinds,
        num_hash_layers=_hash_layers(reader, len(kinds)),
        num_attention_heads=reader.integer("num_attention_heads"),
        head_dim=head_dim,
        rope_dim=_rope_dim(reader, head_dim),
        q_lora_rank=reader.integer("q_lora_rank"),
        o_groups=reader.integer("o_groups"),
        o_lora_rank=reader.integer("o_lora_rank"),
        window=reader.integer("sliding_window", 128),
        csa_ratio=csa_ratio,
        hca_ratio=hca_ratio,
        index_heads=reader.integer("index_n_heads"),
        index_head_dim=reader.integer("index_head_dim"),
        index_topk=reader.integer("index_topk"),
        num_experts=reader.integer("n_routed_experts"),
        experts_per_token=reader.integer("num_experts_per_tok"),
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        routed_scaling_factor=reader.number("routed_scaling_factor", 1.0),
        swiglu_limit=reader.number("swiglu_limit", 10.0),
        hc_streams=reader.integer("hc_mult", 4),
        hc_sinkhorn_iters=reader.integer("hc_sinkhorn_iters", 20),
        hc_eps=reader.number("hc_eps", 1e-6),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope_theta=_theta(reader, "main", "rope_theta", 10000.0),
        compress_rope_theta=_theta(reader, "compress", "compress_rope_theta", 160000.0),
        yarn=_yarn(reader),
        max_position_embeddings=reader.integer("max_position_embeddings", 1 << 20),
        num_mtp_layers=reader.integer("num_nextn_predict_layers", 0, least=0),
        bos_token_id=reader.integer("bos_token_id", 0, least=0),
        eos_token_ids=_eos(reader),
        expert_dtype=_expert_dtype(reader),
        weight_dtype="fp8" if _is_quantized(reader) else _plain_dtype(reader),
    )
    _check_dims(config)
    return config


class _Reader:
    """Typed access to config fields."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.fields.get(name)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"config.json: the field {name} is missing", param=name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"config.json: {name} must be a whole number >= {least}, not {value!r}", param=name)
        return value

    def number(self, name: str, default: float) -> float:
        value = self.fields.get(name)
        value = default if value is None else value
        if not _is_positive(value):
            raise ConfigError(f"config.json: {name} must be a positive number, not {value!r}", param=name)
        return float(value)

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"config.json: {name} must be an object, not {value!r}", param=name)
        return value or {}


def _is_positive(value: Any) -> bool:
    """A number that a float holds, above zero; JSON also has booleans, NaN, Infinity and integers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _refuse_other_architectures(fields: Mapping[str, Any]) -> None:
    if fields.get("model_type") in ("deepseek_v4_1", "deepseek_v41") or "kv_share_layers" in fields:
        raise ConfigError("DeepSeek-V4.1 is a different architecture and not supported", param="model_type")
    for name, allowed in _ONLY.items():
        if fields.get(name, allowed[0]) not in allowed:
            wanted = " or ".join(repr(a) for a in allowed)
            raise ConfigError(f"config.json: {name} is {fields[name]!r}; only {wanted} is supported", param=name)


def _layers(reader: _Reader) -> tuple[tuple[LayerKind, ...], int, int]:
    """Layer kinds with the ratios of CSA and HCA layers, from `compress_ratios` or `layer_types`."""
    count = reader.integer("num_hidden_layers")
    types, ratios = reader.fields.get("layer_types"), reader.fields.get("compress_ratios")
    if types is None and ratios is None:
        raise ConfigError("config.json: neither compress_ratios nor layer_types is given", param="compress_ratios")
    name, given, known = ("compress_ratios", ratios, _RATIOS) if types is None else ("layer_types", types, _LAYER_TYPES)
    mtp = reader.integer("num_nextn_predict_layers", 0, least=0)
    lengths = (count, count + mtp) if name == "compress_ratios" else (count,)
    if not isinstance(given, list) or len(given) not in lengths:
        raise ConfigError(f"config.json: {name} must list {lengths[-1]} layers", param=name)
    unknown = [entry for entry in given if not isinstance(entry, int | str) or entry not in known]
    if unknown:
        other = " (ratios 1 and 2 are DeepSeek-V4.1's, a different architecture)" if unknown[0] in (1, 2) else ""
        raise ConfigError(f"config.json: {name} has {unknown[0]!r}; known are {list(known)}{other}", param=name)
    if any(known[entry] is not LayerKind.WINDOW for entry in given[count:]):
        raise ConfigError("config.json: compress_ratios of MTP blocks must be 0", param="compress_ratios")
    rates = reader.mapping("compress_rates") if types is not None else {}
    csa, hca = (_rate(rates, kind, ratio) for kind, ratio in ((LayerKind.CSA, 4), (LayerKind.HCA, 128)))
    return tuple(known[entry] for entry in given[:count]), csa, hca


def _rate(rates: Mapping[str, Any], kind: LayerKind, default: int) -> int:
    name = next(name for name, known in _LAYER_TYPES.items() if known is kind)
    rate = rates.get(name, default)
    if isinstance(rate, bool) or not isinstance(rate, int) or rate < 2 or UNIT_TOKENS % rate:
        raise ConfigError(
            f"config.json: compress_rates: {name} is {rate!r}; it must be above 1 and divide {UNIT_TOKENS}",
            param="compress_rates",
        )
    return rate


def _hash_layers(reader: _Reader, layers: int) -> int:
    types = reader.fields.get("mlp_layer_types")
    if types is None:
        return min(reader.integer("num_hash_layers", 0, least=0), layers)
    given = types[:layers] if isinstance(types, list) else []
    hashed = [t == "hash_moe" for t in given if t in ("hash_moe", "moe")]
    if hashed != sorted(hashed, reverse=True) or len(hashed) != layers:
        raise ConfigError("config.json: mlp_layer_types must be hash_moe, then moe", param="mlp_layer_types")
    return sum(hashed)


def _rope_dim(reader: _Reader, head_dim: int) -> int:
    if reader.fields.get("qk_rope_head_dim") is not None:
        return reader.integer("qk_rope_head_dim")
    return int(head_dim * reader.number("partial_rotary_factor", 64 / 512))


def _theta(reader: _Reader, label: str, name: str, default: float) -> float:
    nested = _rope_parameters(reader, label)
    if "rope_theta" in nested:
        return _Reader(nested).number("rope_theta", default)
    return reader.number(name, default)


def _rope_parameters(reader: _Reader, label: str) -> Mapping[str, Any]:
    return _Reader(reader.mapping("rope_parameters")).mapping(label)


def _yarn(reader: _Reader) -> YarnScaling | None:
    scaling = reader.mapping("rope_scaling")
    if not scaling:
        scaling = _rope_parameters(reader, "compress") or reader.mapping("rope_parameters")
    if not scaling and "rope_factor" in reader.fields:  # the inference config's flat form
        scaling = {"type": "yarn", "factor": reader.fields["rope_factor"]}
        scaling["original_max_position_embeddings"] = reader.fields.get("original_seq_len")
        scaling |= {k: reader.fields[k] for k in ("beta_fast", "beta_slow") if k in reader.fields}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"config.json: rope_scaling type {kind!r}; only yarn is supported", param="rope_scaling")
    return _yarn_of({"beta_fast": 32, "beta_slow": 1, **scaling})


def _yarn_of(scaling: Mapping[str, Any]) -> YarnScaling:
    names = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
    wrong = [name for name in names if not _is_positive(scaling.get(name))]
    if wrong:
        raise ConfigError(
            f"config.json: rope_scaling is incomplete: {wrong[0]} is {scaling.get(wrong[0])!r}, not a positive number",
            param="rope_scaling",
        )
    if scaling.get("attention_factor") not in (None, 1):  # V4 scales neither cos and sin nor the softmax
        raise ConfigError("config.json: rope_scaling: only attention_factor 1 is supported", param="rope_scaling")
    factor, original, fast, slow = (float(scaling[name]) for name in names)
    return YarnScaling(factor, int(original), fast, slow)


def _eos(reader: _Reader) -> tuple[int, ...]:
    value = reader.fields.get("eos_token_id", 1)
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"config.json: eos_token_id must be token ids, not {value!r}", param="eos_token_id")
    return tuple(ids)


def _expert_dtype(reader: _Reader) -> str:
    quantization = reader.mapping("quantization_config")
    declared = reader.fields.get("expert_dtype") or quantization.get("expert_dtype")
    if declared not in (None, "fp4", "fp8", "bf16", "bfloat16"):
        raise ConfigError(f"config.json: expert_dtype {declared!r}; known are fp4, fp8, bf16", param="expert_dtype")
    if not _is_quantized(reader):
        return _plain_dtype(reader)
    return {"fp4": "fp4", "fp8": "fp8"}.get(declared or "fp8", "bf16")


def _is_quantized(reader: _Reader) -> bool:
    """The inference config has no quantization_config; its `dtype` says fp8."""
    return bool(reader.mapping("quantization_config")) or reader.fields.get("dtype") == "fp8"


def _plain_dtype(reader: _Reader) -> str:
    return "fp32" if "float32" in (reader.fields.get("dtype"), reader.fields.get("torch_dtype")) else "bf16"


def _check_dims(config: ModelConfig) -> None:
    rules = (
        ("o_groups", config.num_attention_heads % config.o_groups == 0, "must divide num_attention_heads"),
        (
            "qk_rope_head_dim",
            config.rope_dim % 2 == 0 and config.rope_dim < config.head_dim,
            "must be even, < head_dim",
        ),
        ("index_head_dim", config.index_head_dim >= config.rope_dim, "must be at least qk_rope_head_dim"),
        ("num_experts_per_tok", config.experts_per_token <= config.num_experts, "must be at most n_routed_experts"),
        ("hc_mult", config.hc_streams <= 16, "must be at most 16"),
    )
    for name, holds, rule in rules:
        if not holds:
            raise ConfigError(f"config.json: {name} {rule}", param=name)
