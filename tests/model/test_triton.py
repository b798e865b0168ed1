"""A model in bfloat16 on Triton's kernels, interpreted: as far from exact numbers as torch in bfloat16 is, padded steps
with the bits of the steps themselves, and nothing that a GPU would be waited for."""

from __future__ import annotations

import pytest
import torch
from triton.runtime import interpreter

from tests.model.fields import FLASH_LIKE
from tests.model.geometries import config_of, engine_weights
from tests.model.paging import PagedSequences
from tests.model.test_no_waits import Watched, aside, unwatched
from tests.model.test_padding import words
from thalweg.checkpoint.parameters import Precision, parameters
from thalweg.config.model import ModelConfig
from thalweg.kernels.ops import Kernels
from thalweg.kernels.registry import reference_kernels
from thalweg.kernels.triton.backend import triton_kernels
from thalweg.memory.layout import CacheLayout, RowFormat
from thalweg.model.graphs import GraphedModel, StepLimits
from thalweg.model.numerics import Numerics
from thalweg.model.transformer import Model

# One layer of each kind, and few programs in each kernel: the interpreter takes them one by one.
SMALL = {
    **FLASH_LIKE, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "hidden_size": 32, "hc_mult": 2,
    "num_attention_heads": 2, "index_n_heads": 4, "n_routed_experts": 4, "sliding_window": 32,
}  # fmt: skip
LENGTHS = (127, 6, 20)  # the next token completes an entry of each kind, none, none; then none, one of 4, none
ROWS = {torch.float32: RowFormat.FLOAT32, torch.bfloat16: RowFormat.BFLOAT16}


def model_of(config: ModelConfig, kernels: Kernels, compute: torch.dtype) -> Model:
    """Its values are those of bfloat16 in either dtype."""
    kept = {p.name: p.precision for p in parameters(config)}
    weights = {
        name: tensor.bfloat16().to(compute) if kept[name] is Precision.COMPUTE else tensor
        for name, tensor in engine_weights(config).items()
    }
    return Model(config, weights, Numerics.serving(compute, ROWS[compute], ROWS[compute]), kernels)


def filled(config: ModelConfig, compute: torch.dtype) -> PagedSequences:
    """The rows of prompts; those of both dtypes are computed in their own."""
    cache = PagedSequences(config, len(LENGTHS), 256, CacheLayout(ROWS[compute], ROWS[compute], config.rope_dim))
    model = model_of(config, reference_kernels(), compute)
    for i, length in enumerate(LENGTHS):
        model.forward(cache.inputs([(i, 0, words(length, i))], []), cache)
    return cache


def decodes(cache: PagedSequences) -> list:
    pieces = [[(i, length + step, words(1, 3 * step + i)) for i, length in enumerate(LENGTHS)] for step in range(2)]
    return [cache.inputs(of_step) for of_step in pieces]


@pytest.mark.skipif(triton_kernels().attention is reference_kernels().attention, reason="kernels that read lengths")
def test_decoding_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter computes with torch: of a kernel, only what leads to its launch is looked at.
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", aside(interpreter.GridExecutor.__call__))
    config = config_of(SMALL)
    exact, plain, ours = (filled(config, dtype) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16))
    wide, narrow = (model_of(config, reference_kernels(), dtype) for dtype in (torch.float32, torch.bfloat16))
    expected = torch.cat([wide.forward(step, exact) for step in decodes(exact)])
    usual = torch.cat([narrow.forward(step, plain) for step in decodes(plain)])
    model = model_of(config, unwatched(triton_kernels()), torch.bfloat16)
    steps = GraphedModel(model, ours, torch.device("cpu"), StepLimits(4, 256), Watched())
    found = torch.cat([steps.forward(step).clone() for step in decodes(ours)])
    assert found.dtype is torch.float32 and steps.captured == 2
    error, theirs = (found - expected).abs().mean(), (usual - expected).abs().mean()
    assert 0 < error < 1.5 * theirs < 0.1 * expected.std()
