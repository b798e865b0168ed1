"""The named inputs: complete, sized as spec.py wants them, and small where they stand for large contexts."""

from __future__ import annotations

import pytest
import torch

from thalweg.kernels.arguments import PagedRows
from thalweg.kernels.cases import caches, stored
from thalweg.kernels.cases.caches import Heads, Span
from thalweg.kernels.cases.case import Source
from thalweg.kernels.cases.checks import check_cases
from thalweg.kernels.cases.workloads import MODELS, model_config, workloads
from thalweg.kernels.cpu.ceilings import READ_BYTES, Ceilings, measured_ceilings
from thalweg.kernels.cpu.library import LibraryMissing, load_library
from thalweg.kernels.registry import reference_kernels
from thalweg.kernels.spec import OPS, spec_of


@pytest.mark.parametrize("name", ["checks", *MODELS])
def test_every_op_has_cases_of_its_own_names_and_sizes(name: str) -> None:
    cases = list(check_cases()) if name == "checks" else workloads(model_config(name))
    assert {case.op for case in cases} == {spec.name for spec in OPS}
    assert len({(case.op, case.shape) for case in cases}) == len(cases)
    for case in cases:
        spec = spec_of(case.op)
        assert set(case.sizes) == set(spec.sizes), case.shape
        assert spec.flops(case.sizes) >= 0 and spec.bytes(case.sizes) > 0


def test_the_race_model() -> None:
    race = model_config("race")
    assert (race.hidden_size, race.num_attention_heads, race.head_dim, race.rope_dim) == (512, 8, 512, 64)
    assert (race.q_lora_rank, race.index_heads, race.index_head_dim, race.index_topk) == (256, 8, 128, 512)
    assert (race.window, race.num_experts, race.experts_per_token, race.vocab_size) == (128, 16, 2, 4096)


def test_a_million_tokens_take_little_memory() -> None:
    """Two sequences of a million tokens with rows of 2 KiB would take a GiB; what is beyond the pool is there twice."""
    seen: list[PagedRows] = []
    kernels = reference_kernels()
    spans, heads = (Span((1 << 20) - 1), Span((1 << 20) - 1)), Heads(1, 512, 64, 4, 4, 32)
    bind = caches.attention("two long ones", spans, heads, stored.WIDE, "selected", 8).inputs(Source(0))

    def attention(query: torch.Tensor, rows: torch.Tensor, context: object, *rest: object) -> torch.Tensor:
        seen.append(context.entries)
        return query

    bind(type(kernels)(**{**_fields(kernels), "attention": attention}), torch.float32)(None)()
    entries = seen[0]
    assert entries.offsets == (0, 1 << 13, 1 << 14)
    assert entries.rows.data.numel() * 4 < 200 << 20
    assert not entries.rows.data[entries.blocks.unique()[:, None] * 32 + torch.arange(32)].isnan().any()


def _fields(kernels: object) -> dict[str, object]:
    return {name: getattr(kernels, name) for name in kernels.__dataclass_fields__}


def test_limits_take_the_rate_of_the_cache_that_holds_the_bytes() -> None:
    ceilings = Ceilings(1e9, (8e9, 4e9, 2e9), 1, "thought")
    assert [ceilings.read(size) for size in (1, *READ_BYTES, 1 << 40)] == [8e9, 8e9, 4e9, 2e9, 2e9]
    assert ceilings.limit_seconds(1e9, 100) == 1.0
    assert ceilings.limit_seconds(1, 2e9) == 1.0


def test_ceilings_are_measured_with_a_library_and_without() -> None:
    plain = measured_ceilings(None, 1)
    assert plain.how == "torch" and plain.flops > 1e8 and min(plain.reads) > 1e8
    try:
        library = load_library()
    except LibraryMissing as missing:
        pytest.skip(str(missing))
    ours = measured_ceilings(library, 1)
    assert ours.how == library.level.value and ours.flops > 1e8 and min(ours.reads) > 1e8
