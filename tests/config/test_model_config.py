"""config.json in its three spellings, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV4Config

from tests.model.fields import FLASH_LIKE
from thalweg.config.model import LayerKind, ModelConfig
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


RENAMED = {
    "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "moe_intermediate_size": "moe_inter_dim", "num_hash_layers": "n_hash_layers",
    "num_experts_per_tok": "n_activated_experts", "scoring_func": "score_func",
    "routed_scaling_factor": "route_scale", "qk_rope_head_dim": "rope_head_dim", "sliding_window": "window_size",
    "rms_norm_eps": "norm_eps", "num_nextn_predict_layers": "n_mtp_layers",
}  # fmt: skip


def inference_spelling(published: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek's inference config: other names, YaRN flat, no quantization_config."""
    fields = {RENAMED.get(k, k): v for k, v in published.items() if k not in ("rope_scaling", "quantization_config")}
    fields |= {"rope_factor": 16, "original_seq_len": 65536, "beta_fast": 32, "beta_slow": 1}
    return fields | ({"dtype": "fp8", "scale_fmt": "ue8m0"} if "quantization_config" in published else {})


def transformers_spelling(published: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a published config: layer_types, mlp_layer_types, compress_rates, rope_parameters."""
    saved = json.loads(DeepseekV4Config(**published).to_json_string(use_diff=False))
    assert "compress_ratios" not in saved and "num_hash_layers" not in saved
    assert set(saved["rope_parameters"]) == {"main", "compress"} and "layer_types" in saved
    return saved


PUBLISHED = {"flash": read_config_json("flash"), "pro": read_config_json("pro"), "small": FLASH_LIKE}
SPELLINGS = {
    "published": dict(FLASH_LIKE),
    "inference": inference_spelling(FLASH_LIKE),
    "transformers": transformers_spelling(FLASH_LIKE),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_inference_spelling_gives_the_same(name: str) -> None:
    assert parse_model_config(inference_spelling(PUBLISHED[name])) == parse_model_config(PUBLISHED[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_spelling_gives_the_same(name: str, tmp_path: Path) -> None:
    wanted = parse_model_config(PUBLISHED[name])
    assert parse_model_config(transformers_spelling(PUBLISHED[name])) == wanted
    DeepseekV4Config(**PUBLISHED[name]).save_pretrained(tmp_path)
    assert load_model_config(tmp_path) == wanted


def test_rotation_of_the_transformers_spelling() -> None:
    saved = transformers_spelling({**FLASH_LIKE, "rope_theta": 5000, "compress_rope_theta": 70000})
    config = parse_model_config(saved)
    assert (config.rope_theta, config.compress_rope_theta) == (5000, 70000)
    for side, theta in (("main", 1234), ("compress", 5678)):  # the nested values are the ones that count
        saved["rope_parameters"][side]["rope_theta"] = theta
    config = parse_model_config(saved)
    assert (config.rope_theta, config.compress_rope_theta) == (1234, 5678)
    assert config.yarn is not None and (config.yarn.beta_fast, config.yarn.beta_slow) == (32, 1)
    plain = {k: v for k, v in FLASH_LIKE.items() if k != "rope_scaling"}
    assert parse_model_config(transformers_spelling(plain)).yarn is parse_model_config(plain).yarn is None


def test_rotated_part_of_a_head() -> None:
    fields = {k: v for k, v in FLASH_LIKE.items() if k != "qk_rope_head_dim"}
    assert parse_model_config({**fields, "head_dim": 128}).rope_dim == 16
    assert parse_model_config({**fields, "partial_rotary_factor": 0.5}).rope_dim == 16


def test_stored_types() -> None:
    stored = {"quantization_config": {"quant_method": "fp8"}, "torch_dtype": "bfloat16"}
    for change, experts, others in (
        ({}, "fp32", "fp32"),
        ({"torch_dtype": "bfloat16"}, "bf16", "bf16"),
        (stored, "fp8", "fp8"),
        ({**stored, "expert_dtype": "fp4"}, "fp4", "fp8"),
        ({"quantization_config": {"quant_method": "fp8", "expert_dtype": "fp4"}}, "fp4", "fp8"),
        ({**stored, "expert_dtype": "bf16"}, "bf16", "fp8"),
    ):
        config = parse_model_config({**FLASH_LIKE, **change})
        assert (config.expert_dtype, config.weight_dtype) == (experts, others), change


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
        ({"rope_scaling": {"type": "yarn", "factor": "x"}}, "rope_scaling", "factor is 'x'"),
        ({"rope_scaling": {**FLASH_LIKE["rope_scaling"], "factor": math.nan}}, "rope_scaling", "factor is nan"),
        ({"rope_scaling": {**FLASH_LIKE["rope_scaling"], "beta_slow": 0}}, "rope_scaling", "beta_slow is 0"),
        ({"rope_scaling": {**FLASH_LIKE["rope_scaling"], "attention_factor": 1.3}}, "rope_scaling", "factor 1 is"),
        ({"rope_scaling": [4]}, "rope_scaling", "an object"),
        ({"rope_parameters": {"main": 3}}, "main", "an object"),
        ({"rope_parameters": {"main": {"rope_theta": "big"}}}, "rope_theta", "positive number"),
        ({"compress_rate_csa": 8}, "compress_rate_csa", "only 4"),
        ({"compress_ratios": [[0], 0, 4, 128, 4, 0]}, "compress_ratios", "known are"),
        ({"compress_ratios": [0, 0, 4.0, 128, 4, 0]}, "compress_ratios", "4.0"),
        ({"num_hash_layers": -1}, "num_hash_layers", ">= 0"),
        ({"num_attention_heads": True}, "num_attention_heads", "not True"),
        ({"routed_scaling_factor": math.nan}, "routed_scaling_factor", "not nan"),
        ({"rope_theta": math.inf}, "rope_theta", "not inf"),
        ({"rope_theta": 10**400}, "rope_theta", "positive number"),
        ({"mlp_layer_types": ["dense", "moe", "moe", "moe", "moe"]}, "mlp_layer_types", "hash_moe, then moe"),
        ({"mlp_layer_types": ["moe"]}, "mlp_layer_types", "hash_moe, then moe"),
        ({"mlp_layer_types": 5}, "mlp_layer_types", "hash_moe, then moe"),
        ({"model_type": ["deepseek_v4"]}, "model_type", "only 'deepseek_v4'"),
        ({"kv_share_layers": 2}, "model_type", "different architecture"),
        ({"topk_method": "greedy"}, "topk_method", "noaux_tc"),
        ({"norm_topk_prob": False}, "norm_topk_prob", "True"),
        ({"mlp_bias": True}, "mlp_bias", "False"),
        ({"hc_mult": 17}, "hc_mult", "at most 16"),
        ({"quantization_config": "fp8"}, "quantization_config", "an object"),
        ({"bos_token_id": -1}, "bos_token_id", ">= 0"),
        ({"eos_token_id": "x"}, "eos_token_id", "token ids"),
        ({"eos_token_id": [1, -2]}, "eos_token_id", "token ids"),
        ({"expert_dtype": "int3"}, "expert_dtype", "fp4, fp8, bf16"),
    ],
)
def test_refusals_name_the_field(change: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_model_config({**FLASH_LIKE, **change})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"layer_types": ["full_attention"] * 5}, "layer_types", "full_attention"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types", "5 layers"),
        ({"compress_rates": {"compressed_sparse_attention": 5}}, "compress_rates", "is 5; .* divide 128"),
        ({"compress_rates": {"heavily_compressed_attention": 1}}, "compress_rates", "above 1"),
        ({"compress_rates": {"heavily_compressed_attention": 0}}, "compress_rates", "above 1"),
        ({"compress_rates": {"heavily_compressed_attention": "128"}}, "compress_rates", "'128'"),
        ({"compress_rates": 4}, "compress_rates", "an object"),
        ({"rope_parameters": {"main": {}, "compress": {"rope_type": "linear"}}}, "rope_scaling", "yarn"),
    ],
)
def test_refusals_of_the_transformers_spelling(change: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_model_config({**SPELLINGS["transformers"], **change})
    assert caught.value.param == param


@pytest.mark.parametrize(("field", "spelled"), [("hidden_size", "dim"), ("num_hidden_layers", "n_layers")])
def test_a_missing_field_is_named(field: str, spelled: str) -> None:
    for spelling, name in (("published", field), ("inference", spelled)):
        fields = {k: v for k, v in SPELLINGS[spelling].items() if k != name}
        with pytest.raises(ConfigError, match=f"{field} is missing"):
            parse_model_config(fields)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("spelling", SPELLINGS)
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_value_of_any_field_is_read_or_refused(spelling: str, data: st.DataObject) -> None:
    fields = dict(SPELLINGS[spelling])
    name = data.draw(st.sampled_from(sorted(fields)))
    inner = sorted(fields[name]) if isinstance(fields[name], dict) else []
    value = data.draw(JSON)
    if inner and data.draw(st.booleans()):
        value = {**fields[name], data.draw(st.sampled_from(inner)): value}
    try:
        assert isinstance(parse_model_config({**fields, name: value}), ModelConfig)
    except ConfigError as error:
        assert error.param


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]", "not a JSON object"),
        (b"{", "config.json: Expecting"),
        (b"", "config.json: Expecting"),
        (b"\xff\xfe", "config.json: 'utf-8' codec"),
    ],
)
def test_files_that_are_no_json_object(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_model_config(tmp_path)


def test_where_configs_are_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FLASH_LIKE))
    assert load_model_config(tmp_path) == load_model_config(tmp_path / "config.json") == parse_model_config(FLASH_LIKE)
    assert load_model_config("default").max_position_embeddings == 1048576
    with pytest.raises(ConfigError, match=r"flsh.*Did you mean 'flash'"):
        load_model_config("flsh")
    with pytest.raises(ConfigError, match=r"Did you mean 'default'"):
        load_model_config("defualt")
    with pytest.raises(ConfigError, match=r"nothing/config\.json: no such|nothing: no such"):
        load_model_config(tmp_path / "nothing")
    for wrong in ("x" * 5000, "a\0b"):
        with pytest.raises(ConfigError):
            load_model_config(wrong)


def test_the_embedded_model_has_every_layer_kind_and_the_released_ratios() -> None:
    config = load_model_config("default")
    assert set(config.layer_kinds) == set(LayerKind)
    assert (config.window, config.csa_ratio, config.hca_ratio) == (128, 4, 128)
    assert config.yarn is not None and config.num_hash_layers >= 1
