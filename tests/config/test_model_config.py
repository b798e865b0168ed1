"""config.json in its three spellings, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV4Config

from tests.model.fields import FLASH_LIKE
from thalweg.config.model import LayerKind
from thalweg.config.model_parse import load_model_config, parse_model_config, read_config_json
from thalweg.errors import ConfigError


def test_published_configs() -> None:
    """model-spec section 1."""
    flash, pro = load_model_config("flash"), load_model_config("pro")
    assert [len(flash.layers_of(kind)) for kind in LayerKind] == [2, 21, 20]
    assert [len(pro.layers_of(kind)) for kind in LayerKind] == [0, 30, 31]
    assert flash.layer_kinds[:4] == ("window", "window", "csa", "hca") and flash.layer_kinds[42] == "csa"
    assert pro.layer_kinds[:3] == ("hca", "hca", "csa") and pro.layer_kinds[60] == "csa"
    assert (flash.hidden_size, pro.hidden_size) == (4096, 7168)
    assert (flash.index_topk, pro.index_topk) == (512, 1024)
    assert (flash.routed_scaling_factor, pro.routed_scaling_factor) == (1.5, 2.5)
    assert flash.num_mtp_layers == pro.num_mtp_layers == 1
    assert flash.yarn is not None and (flash.yarn.factor, flash.yarn.original_max_position) == (16, 65536)
    assert (flash.expert_dtype, flash.weight_dtype, flash.unit_tokens) == ("fp4", "fp8", 128)


def test_inference_spelling_gives_the_same() -> None:
    renamed = {
        "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
        "moe_intermediate_size": "moe_inter_dim", "num_hash_layers": "n_hash_layers",
        "num_experts_per_tok": "n_activated_experts", "scoring_func": "score_func",
        "routed_scaling_factor": "route_scale", "qk_rope_head_dim": "rope_head_dim", "sliding_window": "window_size",
        "rms_norm_eps": "norm_eps", "num_nextn_predict_layers": "n_mtp_layers",
    }  # fmt: skip
    published = read_config_json("flash")
    fields = {renamed.get(k, k): v for k, v in published.items() if k != "rope_scaling"}
    fields |= {"rope_factor": 16, "original_seq_len": 65536, "beta_fast": 32, "beta_slow": 1}
    assert parse_model_config(fields) == parse_model_config(published)


def test_transformers_spelling_gives_the_same() -> None:
    fields = {k: v for k, v in FLASH_LIKE.items() if k not in ("rope_scaling", "num_nextn_predict_layers")}
    rope = {
        "rope_type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    theirs = DeepseekV4Config(**fields, rope_parameters=rope, num_nextn_predict_layers=1)
    saved = json.loads(theirs.to_json_string(use_diff=False))
    assert "compress_ratios" not in saved
    assert parse_model_config(saved) == parse_model_config(FLASH_LIKE)


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"model_type": "llama"}, "model_type", "deepseek_v4"),
        ({"model_type": "deepseek_v4_1"}, "model_type", "different architecture"),
        ({"scoring_func": "softmax"}, "scoring_func", "sqrtsoftplus"),
        ({"num_key_value_heads": 2}, "num_key_value_heads", "only 1"),
        ({"n_shared_experts": 2}, "n_shared_experts", "only 1"),
        ({"hidden_act": "gelu"}, "hidden_act", "silu"),
        ({"attention_bias": True}, "attention_bias", "False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings", "False"),
        ({"hidden_size": None}, "hidden_size", "missing"),
        ({"hidden_size": "48"}, "hidden_size", "whole number"),
        ({"vocab_size": 0}, "vocab_size", ">= 1"),
        ({"rms_norm_eps": -1}, "rms_norm_eps", "positive"),
        ({"compress_ratios": [0, 0, 4]}, "compress_ratios", "6 layers"),
        ({"compress_ratios": [0, 0, 4, 2, 4, 0]}, "compress_ratios", "DeepSeek-V4.1"),
        ({"compress_ratios": [0, 0, 4, 128, 4, 4]}, "compress_ratios", "MTP"),
        ({"compress_ratios": None}, "compress_ratios", "neither"),
        ({"o_groups": 3}, "o_groups", "divide"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim", "even"),
        ({"index_head_dim": 4}, "index_head_dim", "at least"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok", "at most"),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe", "moe", "moe"]}, "mlp_layer_types", "hash_moe, then moe"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling", "yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling", "incomplete"),
        ({"eos_token_id": "x"}, "eos_token_id", "token ids"),
        ({"expert_dtype": "int3"}, "expert_dtype", "fp4, fp8, bf16"),
    ],
)
def test_refusals_name_the_field(change: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_model_config({**FLASH_LIKE, **change})
    assert caught.value.param == param


def test_where_configs_are_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FLASH_LIKE))
    assert load_model_config(tmp_path) == load_model_config(tmp_path / "config.json") == parse_model_config(FLASH_LIKE)
    assert load_model_config("default").max_position_embeddings == 1048576
    with pytest.raises(ConfigError, match=r"flsh.*Did you mean 'flash'"):
        load_model_config("flsh")


def test_the_embedded_model_has_every_layer_kind_and_the_released_ratios() -> None:
    config = load_model_config("default")
    assert set(config.layer_kinds) == set(LayerKind)
    assert (config.window, config.csa_ratio, config.hca_ratio) == (128, 4, 128)
    assert config.yarn is not None and config.num_hash_layers >= 1
