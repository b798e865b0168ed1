"""Hit = cold in every byte format, and packed rows give the bits of wide rows rounded to the same values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.assembly import Shape, answer, model_engine, prompt_of
from tests.model.fields import GEOMETRIES
from tests.model.geometries import config_of, engine_weights
from tests.model.paging import PagedSequences
from thalweg.cache.policy import CheckpointPolicy
from thalweg.checkpoint.reader import open_checkpoint
from thalweg.config.model_parse import default_model
from thalweg.config.options import EngineOptions
from thalweg.engine.request import Sequence
from thalweg.engine.runtime import build_runtime, namespaces
from thalweg.errors import ConfigError
from thalweg.kernels.registry import reference_kernels, select_kernels
from thalweg.memory.layout import CacheLayout, RowFormat
from thalweg.model.numerics import Numerics, Rounding
from thalweg.model.transformer import Model
from thalweg.model.weights import allocate
from thalweg.types import GenerateRequest

FLOAT32, BFLOAT16, FP8, FP4 = RowFormat.FLOAT32, RowFormat.BFLOAT16, RowFormat.FP8, RowFormat.FP4
FORMATS = [(FP8, FP4), (FP8, FP8), (BFLOAT16, BFLOAT16), (FLOAT32, FP4)]
TOKENS = 270


@pytest.mark.parametrize(("kv", "index"), FORMATS)
def test_the_same_tokens_cold_chunked_and_cached(fields: dict, kv: RowFormat, index: RowFormat) -> None:
    prompts = [prompt_of(i, length) for i, length in enumerate((129, 390))]
    engine = model_engine(fields, Shape(max_step_tokens=1024, prefix_caching=False, kv=kv, index=index))
    expected = [answer(engine, str(i), prompt, max_tokens=5).tokens for i, prompt in enumerate(prompts)]
    engine.close()
    engine = model_engine(fields, Shape(max_step_tokens=100, kv=kv, index=index))
    for turn in range(2):
        hits = (128, 384) if turn else (0, 0)
        outcomes = [answer(engine, f"{turn} {i}", prompt, max_tokens=5) for i, prompt in enumerate(prompts)]
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


def test_cached_rows_of_two_formats_never_mix() -> None:
    """Same model, same tokens, another format: another namespace of the prefix index."""
    checkpoint = open_checkpoint(default_model())
    sequence = Sequence(GenerateRequest("r", np.array([1, 2], np.int32)), lambda event: None, 1, 0.0)
    numerics = [
        Numerics.serving(compute, kv, index, simulate=simulate)
        for compute in (torch.float32, torch.bfloat16)
        for kv, index, simulate in (
            *((kv, index, False) for kv in (FLOAT32, BFLOAT16, FP8) for index in RowFormat),
            *((kv, index, True) for kv in (FLOAT32, BFLOAT16, FP8) for index in (FLOAT32, BFLOAT16, FP4)),
        )
    ]
    policy, kernels = CheckpointPolicy(128, 0), select_kernels(torch.device("cpu"))
    names = {namespaces(checkpoint, one, policy, kernels)(sequence).own for one in numerics}
    assert len(names) == len(set(numerics)) == 2 * (12 + 8)  # fp8 with fp4 is the same with and without simulation


def test_rows_of_another_byte_layout_are_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, numerics = open_checkpoint(default_model()), Numerics.serving(torch.float32, FLOAT32, FLOAT32)
    sequence = Sequence(GenerateRequest("r", np.array([1, 2], np.int32)), lambda event: None, 1, 0.0)
    policy, kernels, names = CheckpointPolicy(128, 0), select_kernels(torch.device("cpu")), set()
    for version in (1, 2):
        monkeypatch.setattr("thalweg.engine.runtime.LAYOUT_VERSION", version)
        names.add(namespaces(checkpoint, numerics, policy, kernels)(sequence).own)
    assert len(names) == 2


def test_the_length_alone_does_not_change_the_pools() -> None:
    plans = []
    for length in (None, 1000, 200_000):
        for kv, index in (("fp8", "auto"), ("fp8", "fp4"), ("bfloat16", "auto")):
            options = EngineOptions(
                kv_cache_dtype=kv, index_cache_dtype=index, max_model_len=length, kv_cache_memory=2**28, device="cpu"
            )
            runtime = build_runtime(options)
            plans.append((kv, index, tuple(sorted(runtime.cache_plan.pool_blocks.items()))))
            formats = {c.what: (c.value, c.reason) for c in runtime.choices if c.what.endswith("cache dtype")}
            assert formats == STATED[kv, index]
    assert len(set(plans)) == 3


STATED = {
    ("fp8", "auto"): {
        "kv cache dtype": ("fp8", "88 bytes per row, 7 of them padding; rounding: fp8"),
        "index cache dtype": ("fp8", "68 bytes per row, 0 of them padding; rounding: fp8"),
    },
    ("fp8", "fp4"): {
        "kv cache dtype": ("fp8", "88 bytes per row, 7 of them padding; rounding: fp8"),
        "index cache dtype": ("fp4", "34 bytes per row, 0 of them padding; rounding: fp4"),
    },
    ("bfloat16", "auto"): {
        "kv cache dtype": ("bfloat16", "128 bytes per row, 0 of them padding; rounding: none"),
        "index cache dtype": ("bfloat16", "128 bytes per row, 0 of them padding; rounding: none"),
    },
}


@pytest.mark.parametrize(
    ("kv", "index", "simulate", "formats"),
    [
        ("auto", "auto", False, (FLOAT32, FLOAT32)),
        ("auto", "auto", True, (FLOAT32, FLOAT32)),
        ("bfloat16", "auto", True, (BFLOAT16, BFLOAT16)),
        ("fp8", "auto", False, (FP8, FP8)),
        ("fp8", "auto", True, (FP8, FP4)),
        ("auto", "fp4", False, (FLOAT32, FP4)),
        ("fp8", "float32", False, (FP8, FLOAT32)),
    ],
)
def test_formats_that_are_not_stated_follow(kv: str, index: str, simulate: bool, formats: tuple) -> None:
    options = EngineOptions(
        dtype="float32", kv_cache_dtype=kv, index_cache_dtype=index, quantization_simulation=simulate, device="cpu",
        kv_cache_memory=2**27,
    )  # fmt: skip
    layout = build_runtime(options).cache_plan.layout
    assert (layout.kv, layout.index) == formats


def test_formats_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="keep them as fp4, bfloat16 or float32") as caught:
        Numerics.serving(torch.float32, FP8, FP8, simulate=True)
    assert caught.value.param == "index_cache_dtype"
    odd = config_of({**GEOMETRIES["narrow"], "index_head_dim": 48})
    for kv, index, simulate, param in (
        (FLOAT32, FLOAT32, True, "quantization_simulation"),
        (FP8, FP4, False, "index_cache_dtype"),
    ):
        with pytest.raises(ConfigError, match="power of two, not 48") as caught:
            Numerics.serving(torch.float32, kv, index, simulate=simulate).check(odd)
        assert caught.value.param == param
    Numerics.serving(torch.float32, FP8, FP8).check(odd)
