"""The training forward is V4's: equal to transformers in fp32, in one pass, for some rows, and continued."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from thalweg.checkpoint.loader import load_parameters
from thalweg.checkpoint.parameters import Parameter
from thalweg.checkpoint.random_model import random_parameters
from thalweg.checkpoint.reader import CheckpointLayout, open_checkpoint
from thalweg.checkpoint.writer import WriteFormat, write_checkpoint
from thalweg.config.model import LayerKind, ModelConfig
from thalweg.config.model_parse import default_model, parse_model_config, read_config_json
from training.attention import Compressed, _banded
from training.export import export
from training.initial import initial_weights
from training.network import Request, Weights, forward

LENGTH = 300
TOLERANCE = 1e-4

Values = list[tuple[Parameter, Tensor]]
Made = tuple[ModelConfig, Values, dict[str, object]]


@pytest.fixture(scope="module")
def model() -> Made:
    """The default's shape with a small vocabulary, one CSA layer more, and more entries chosen than exist."""
    fields = read_config_json(default_model()) | {
        "compress_ratios": [0, 4, 128, 4],
        "index_topk": 256,
        "vocab_size": 128,
        "moe_intermediate_size": 32,
    }
    config = parse_model_config(fields)
    return config, list(random_parameters(config, 3)), fields


@pytest.fixture(scope="module")
def weights(model: Made) -> Weights:
    return {parameter.name: value for parameter, value in model[1]}


@pytest.fixture(scope="module")
def expected(model: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor]:
    """ids [1, S] and the logits that transformers gives."""
    directory = tmp_path_factory.mktemp("oracle") / "model"
    form = WriteFormat(layout=CheckpointLayout.TRANSFORMERS, plain=torch.float32)
    write_checkpoint(directory, {**model[2], "torch_dtype": "float32"}, model[1], form)
    oracle = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(0, 128, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return ids, oracle(ids, use_cache=False).logits


def positions(begin: int, end: int) -> Tensor:
    return torch.arange(begin, end)[None]


def test_one_pass(model: Made, weights: Weights, expected: tuple[Tensor, Tensor]) -> None:
    ids, logits = expected
    assert logits.std() > 1
    with torch.no_grad():
        ours = forward(model[0], weights, Request(ids, positions(0, LENGTH))).logits
    torch.testing.assert_close(ours, logits, atol=TOLERANCE, rtol=0)


def test_some_rows(model: Made, weights: Weights, expected: tuple[Tensor, Tensor]) -> None:
    ids, logits = expected
    rows = torch.tensor([[0, 127, 128, 250, LENGTH - 1]])
    with torch.no_grad():
        ours = forward(model[0], weights, Request(ids, positions(0, LENGTH), rows)).logits
    torch.testing.assert_close(ours, logits[:, rows[0]], atol=TOLERANCE, rtol=0)


def test_a_batch_is_its_sequences(model: Made, weights: Weights) -> None:
    ids = torch.randint(0, 128, (2, 140), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        both = forward(model[0], weights, Request(ids, positions(0, 140).expand(2, -1))).logits
        single = forward(model[0], weights, Request(ids[1:], positions(0, 140))).logits
    torch.testing.assert_close(both[1:], single, atol=TOLERANCE, rtol=0)


def test_the_indexer_learns_from_its_own_loss_alone(model: Made, weights: Weights) -> None:
    config, ids = model[0], torch.randint(0, 128, (1, 64), generator=torch.Generator().manual_seed(2))
    own = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in weights.items()}
    result = forward(config, own, Request(ids, positions(0, 64), top_k=8))
    indexer = [own[name] for name in own if ".indexer." in name]
    others = [own[name] for name in own if ".indexer." not in name and own[name].requires_grad]
    of_logits = torch.autograd.grad(result.logits.square().sum(), indexer, retain_graph=True, allow_unused=True)
    assert all(g is None for g in of_logits)
    of_loss = torch.autograd.grad(result.index_losses[0], indexer + others, allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in of_loss[: len(indexer)])
    assert all(g is None or not g.any() for g in of_loss[len(indexer) :])


def test_an_export_is_the_model(tmp_path: Path) -> None:
    fields = read_config_json(default_model())
    config = parse_model_config(fields)
    sample = torch.randint(0, 2048, (2, 64), generator=torch.Generator().manual_seed(4))
    made = initial_weights(config, 0, sample)
    (tmp_path / "config.json").write_text((default_model() / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"the old one")
    assert export(made, tmp_path) < 5_000_000
    read = {name: torch.empty_like(value) for name, value in made.items()}
    load_parameters(open_checkpoint(tmp_path), read)
    for name, value in made.items():
        torch.testing.assert_close(read[name], value, atol=1e-6, rtol=2**-8)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_crowd_is_entries_that_count_more_than_once(model: Made, weights: Weights) -> None:
    config = model[0]
    hca = config.layers_of(LayerKind.HCA)[0]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, LENGTH, config.num_attention_heads, config.head_dim, generator=generator)
    kv, entries = (torch.randn(2, n, config.head_dim, generator=generator) for n in (LENGTH, LENGTH // 128))
    seen = torch.arange(entries.shape[1]) < ((torch.arange(LENGTH) + 1) // 128).unsqueeze(-1)
    layer = Compressed(config, weights, hca, config.window, config.index_topk)
    three = _banded(replace(layer, crowd=3.0), q, kv, entries, seen.expand(2, -1, -1))
    copied = _banded(layer, q, kv, entries.repeat_interleave(3, 1), seen.repeat_interleave(3, 1).expand(2, -1, -1))
    assert torch.allclose(three, copied, atol=1e-5)
    assert not torch.allclose(three, _banded(layer, q, kv, entries, seen.expand(2, -1, -1)), atol=1e-3)
