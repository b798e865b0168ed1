"""Small V4 models with the layer patterns that matter, and transformers' model of the same weights as an oracle."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from tests.model.fields import GEOMETRIES
from thalweg.checkpoint.parameters import Precision, parameters
from thalweg.checkpoint.random_model import random_parameters
from thalweg.config.model import ModelConfig
from thalweg.config.model_parse import parse_model_config

__all__ = ["GEOMETRIES", "config_of", "engine_weights", "oracle"]


def config_of(fields: dict[str, Any]) -> ModelConfig:
    return parse_model_config(fields)


def engine_weights(config: ModelConfig, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random parameters under engine names, fp32."""
    return {parameter.name: values for parameter, values in random_parameters(config, seed)}


def oracle(fields: dict[str, Any], weights: dict[str, torch.Tensor]) -> DeepseekV4ForCausalLM:
    """transformers' model with the same weights, fp32, eager attention."""
    config = parse_model_config(fields)
    rope = dict(fields["rope_scaling"])
    rope["rope_type"] = rope.pop("type")
    theirs = {
        k: v for k, v in fields.items() if k not in ("rope_scaling", "compress_ratios", "num_nextn_predict_layers")
    }
    ratios = fields["compress_ratios"][: fields["num_hidden_layers"]]
    model = DeepseekV4ForCausalLM(
        DeepseekV4Config(**theirs, compress_ratios=ratios, rope_parameters=rope, attn_implementation="eager")
    )
    state = {
        parameter.transformers[0].name: weights[parameter.name]
        for parameter in parameters(config)
        if parameter.transformers
    }
    assert all(p.precision is Precision.COMPUTE or p.name in weights for p in parameters(config))
    model.load_state_dict(state, strict=True)
    return model.eval()
