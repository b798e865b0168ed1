"""The window policies' benchmark works, divides bytes evenly, repeats its counts, and finds exact policies exact."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import policies
from benchmarks.policy_prompts import QUICK, WORKLOADS, rotation
from thalweg.cache.geometry import Group
from thalweg.cache.policy import exact_replay_tokens
from thalweg.config.options import EngineOptions
from thalweg.engine.runtime import window_policy
from thalweg.memory.capacity import checkpoint_bytes


@pytest.fixture(scope="module")
def embedded() -> Iterator[policies.ModelShape]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield policies.embedded_shape()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_exact_policies_are_exact(embedded: policies.ModelShape, workload: Callable) -> None:
    case = policies.prepare(embedded, workload, QUICK)
    records = [policies.measure(case, policies.OFF)]
    records += [policies.measure(case, policy) for policy in policies.POLICIES]
    if workload is rotation:
        records += [policies.measure(case, policy, host=True) for policy in ("full", "boundary", "exact-replay")]
    for record in records:
        accounted_for(record)
        if record["policy"] != "bounded-replay":
            assert record["wrong_answers"] == 0, record["policy"]
            assert record["largest_logprob_change"] < 1e-3, record["policy"]
        assert record["computed_tokens"] <= records[0]["computed_tokens"]
    assert records[0]["computed_tokens"] == records[0]["prompt_tokens"]
    assert any(record["device_tokens"] + record["host_tokens"] for record in records)
    assert policies.tables(records).count("\n| ") >= len(records)


def accounted_for(record: dict[str, Any]) -> None:
    """Every prompt token came from somewhere; a record is a line of JSON."""
    names = ("device_tokens", "host_tokens", "disk_tokens", "replayed_tokens", "computed_tokens")
    assert sum(record[name] for name in names) == record["prompt_tokens"]
    assert json.loads(json.dumps(record)) == record
    assert record.get("peak_compressed_bytes", 0) + record.get("peak_checkpoint_bytes", 0) <= record.get(
        "budget_bytes", 0
    )


@pytest.mark.parametrize("workload", WORKLOADS)
def test_counts_repeat(workload: Callable) -> None:
    shape = policies.released_shape("flash")
    sizes = replace(QUICK, scale=4)
    first, second = (policies.prepare(shape, workload, sizes) for _ in range(2))
    for policy in policies.POLICIES:
        once, again = policies.measure(first, policy), policies.measure(second, policy)
        accounted_for(once)
        assert once == again


@pytest.mark.parametrize("policy", policies.POLICIES)
@pytest.mark.parametrize("name", ["flash", "pro"])
def test_every_policy_divides_the_same_bytes(name: str, policy: str) -> None:
    shape = policies.released_shape(name)
    rule = window_policy(EngineOptions(window_policy=policy), shape.config)
    spacing = rule.spacing_units
    budget = policies.budget_for(shape, 1000)
    plan = policies.divide(shape, budget, spacing, 20_000)
    assert budget - checkpoint_bytes(shape.groups, shape.layout) < plan.total_bytes <= budget
    assert plan.token_capacity >= 20_000
    if policy == "boundary":
        assert 1000 <= plan.pool_blocks[Group.CSA] < 1010  # what is left of a checkpoint's bytes holds rows


def test_the_byte_table_of_the_page() -> None:
    """Window rows of a checkpoint are 3.07 and 4.35 MiB; the compressors' tails come on top."""
    for name, window, replay in (("flash", 3.07, 5504), ("pro", 4.35, 7808)):
        shape = policies.released_shape(name)
        spec = next(s for s in shape.groups if s.group is Group.WINDOW)
        assert round(shape.layout.block_bytes(spec) / 2**20, 2) == window
        assert exact_replay_tokens(shape.config) == replay


def test_the_page_has_the_tables_of_the_data() -> None:
    root = Path(__file__).parent.parent.parent
    page = (root / "docs" / "window-policies.md").read_text()
    lines = (root / "benchmarks" / "results" / "policies.jsonl").read_text().splitlines()
    assert policies.bytes_table() in page
    assert policies.tables([json.loads(line) for line in lines]) in page
