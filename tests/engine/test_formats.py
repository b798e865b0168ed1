"""Hit = cold in every byte format, and packed rows give the bits of wide rows rounded to the same values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.assembly import Models, Shape, answer, engine_of
from tests.model.fields import GEOMETRIES
from tests.model.geometries import config_of, engine_weights
from tests.model.paging import PagedSequences
from thalweg.engine.engine import Engine
from thalweg.kernels.registry import reference_kernels
from thalweg.memory.layout import CacheLayout, RowFormat
from thalweg.model.numerics import Numerics, Rounding
from thalweg.model.transformer import Model
from thalweg.model.weights import allocate

FLOAT32, BFLOAT16, FP8, FP4 = RowFormat.FLOAT32, RowFormat.BFLOAT16, RowFormat.FP8, RowFormat.FP4
FORMATS = [(FP8, FP4), (FP8, FP8), (BFLOAT16, BFLOAT16), (FLOAT32, FP8), (BFLOAT16, FP4), (FP8, FLOAT32)]
MODELS = Models()
TOKENS = 270


def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, 97, length).tolist()


@pytest.fixture(params=sorted(GEOMETRIES))
def fields(request: pytest.FixtureRequest) -> dict:
    return GEOMETRIES[request.param]


def make(fields: dict, shape: Shape) -> Engine:
    runner, plan = MODELS.runner(fields, shape)
    return engine_of(fields, runner, plan, shape)


@pytest.mark.parametrize(("kv", "index"), FORMATS)
def test_the_same_tokens_cold_chunked_and_cached(fields: dict, kv: RowFormat, index: RowFormat) -> None:
    prompts = [prompt_of(i, length) for i, length in enumerate((5, 129, 260, 390))]
    engine = make(fields, Shape(max_step_tokens=1024, prefix_caching=False, kv=kv, index=index))
    expected = [answer(engine, str(i), prompt).tokens for i, prompt in enumerate(prompts)]
    engine.close()
    engine = make(fields, Shape(max_step_tokens=100, kv=kv, index=index))
    for turn in range(2):
        hits = (0, 128, 256, 384) if turn else (0, 0, 0, 0)
        outcomes = [answer(engine, f"{turn} {i}", prompt) for i, prompt in enumerate(prompts)]
        assert [o.tokens for o in outcomes] == expected
        assert [o.last.usage.cached_tokens for o in outcomes] == list(hits)
    engine.close()


def logits_of(fields: dict, numerics: Numerics, chunk: int) -> torch.Tensor:
    """Logits of every token of a prompt that is read in chunks; unwritten rows read as NaN."""
    config = config_of(fields)
    dtypes = {name: t.dtype for name, t in allocate(config, numerics.compute, torch.device("cpu")).items()}
    weights = {name: tensor.to(dtypes[name]) for name, tensor in engine_weights(config).items()}
    cache = PagedSequences(config, 1, TOKENS, CacheLayout(numerics.kv, numerics.index, config.rope_dim))
    model = Model(config, weights, numerics, reference_kernels())
    tokens = prompt_of(4, TOKENS)
    with torch.inference_mode():
        steps = [(start, tokens[start : start + chunk]) for start in range(0, TOKENS, chunk)]
        return torch.cat([model.forward(cache.inputs([(0, *step)]), cache) for step in steps])


@pytest.mark.parametrize(
    ("compute", "chunk"), [(torch.float32, TOKENS), (torch.float32, 37), (torch.bfloat16, 60), (torch.bfloat16, TOKENS)]
)
def test_simulation_has_the_bits_of_packed_rows(fields: dict, compute: torch.dtype, chunk: int) -> None:
    """Whatever holds the rounded rows: float32, bfloat16, or FP8 and FP4 bytes."""
    wide, narrower, packed = (
        logits_of(fields, Numerics.serving(compute, kv, index, simulate=True), chunk)
        for kv, index in ((FLOAT32, FLOAT32), (BFLOAT16, BFLOAT16), (FP8, FP4))
    )
    assert torch.equal(wide, packed) and torch.equal(wide, narrower) and not wide.isnan().any()
    assert torch.equal(packed, logits_of(fields, Numerics.serving(compute, FP8, FP4), chunk))
    assert not torch.equal(packed, logits_of(fields, Numerics.serving(compute, FLOAT32, FLOAT32), chunk))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_an_fp8_index_has_the_bits_of_wide_keys_rounded_alike(fields: dict, compute: torch.dtype) -> None:
    packed = logits_of(fields, Numerics.serving(compute, FP8, FP8), 60)
    wide = logits_of(fields, Numerics(compute, FLOAT32, FLOAT32, Rounding.FP8, Rounding.FP8), 60)
    assert torch.equal(packed, wide) and not packed.isnan().any()
    assert not torch.equal(packed, logits_of(fields, Numerics.serving(compute, FP8, FP4), 60))
