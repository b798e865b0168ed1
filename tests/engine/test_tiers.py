"""Host and disk tiers under a real engine: what comes back from them answers like a cold run, and trouble is a miss."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import pytest
import torch

from tests.engine.assembly import (
    Outcome,
    RecordingSampler,
    Shape,
    answer,
    cold_answers,
    model_engine,
    prompt_of,
    submit,
)
from tests.model.fields import GEOMETRIES
from thalweg.cache.policy import WindowPolicy, exact_replay_tokens
from thalweg.config.model_parse import parse_model_config
from thalweg.engine.engine import Engine
from thalweg.engine.shadow import Shadow
from thalweg.memory.disk import DiskTier
from thalweg.memory.host import HostTier
from thalweg.memory.layout import RowFormat
from thalweg.memory.record import Bytes, Record
from thalweg.memory.tier import Found, Piece, Tier
from thalweg.types import CacheReport, MissReason

UNIT = 128
SPACE = 64 << 20


def report_of(outcome: Outcome) -> CacheReport:
    return outcome.last.usage.cache


def settle(engine: Engine, done: Callable[[Mapping[str, float]], bool]) -> None:
    """Wait until the engine's counters say so: copies go on after answers."""
    deadline = time.monotonic() + 30
    while not done(engine.status().counters):
        assert time.monotonic() < deadline, dict(engine.status().counters)
        time.sleep(0.02)


def settled(engine: Engine) -> None:
    tiering = engine._scheduler.tiering
    settle(engine, lambda _: not (tiering.busy or tiering._backlog or tiering._in_flight_bytes))


def check(engine: Engine) -> None:
    """Conservation of blocks, once nothing moves any more."""
    settled(engine)
    engine._scheduler.coordinator.check()


def test_rotation_larger_than_the_pools_comes_from_host_memory(fields: dict) -> None:
    prompts = [prompt_of(seed, 6 * UNIT + 40) for seed in range(3)]
    expected = cold_answers(fields, prompts)
    host = HostTier(SPACE)
    engine = model_engine(fields, Shape(max_running=2), units=9, tiers={"host": host})
    for rotation in range(3):
        for i, prompt in enumerate(prompts):
            outcome = answer(engine, f"{rotation} {i}", prompt)
            settled(engine)
            assert outcome.tokens == expected[i]
            report = report_of(outcome)
            if rotation:
                assert report.cached_tokens == 6 * UNIT, report
                assert report.host_tokens > 0 and report.disk_tokens == 0
    check(engine)
    engine.close()


@pytest.mark.parametrize("formats", [(RowFormat.FLOAT32, RowFormat.FLOAT32), (RowFormat.FP8, RowFormat.FP4)])
def test_a_restart_hits_from_disk(fields: dict, tmp_path: Path, formats: tuple[RowFormat, RowFormat]) -> None:
    """The same prompt, a longer one and one that branches off, after a restart: tokens as without any cache."""
    base = prompt_of(1, 11 * UNIT + 60)
    prompts = [base, [*base, *prompt_of(2, 150)], [*base[: 8 * UNIT + 3], *prompt_of(3, 90)]]
    shape = Shape(kv=formats[0], index=formats[1], checkpoint_interval=0)
    cold = model_engine(fields, Shape(kv=formats[0], index=formats[1], prefix_caching=False, max_step_tokens=1024))
    expected = [answer(cold, str(i), prompt).tokens for i, prompt in enumerate(prompts)]
    cold.close()
    replay = exact_replay_tokens(parse_model_config(fields))
    first = model_engine(fields, shape, tiers={"disk": DiskTier(tmp_path, SPACE)})
    answer(first, "base", base)
    first.close()
    reports = []
    for prompt, tokens in zip(prompts, expected, strict=True):
        engine = model_engine(fields, shape, tiers={"disk": DiskTier(tmp_path, SPACE)})
        outcome = answer(engine, "again", prompt)
        check(engine)
        engine.close()
        assert outcome.tokens == tokens
        reports.append(report_of(outcome))
    assert [r.disk_tokens for r in reports] == [11 * UNIT, 11 * UNIT, 8 * UNIT - replay]
    assert [r.replayed_tokens for r in reports] == [0, 0, replay]
    assert all(r.device_tokens == r.host_tokens == 0 for r in reports)


def test_restored_rows_have_the_bits_of_a_cold_run(fields: dict, tmp_path: Path) -> None:
    """Deterministic mode: from disk, by a checkpoint and by a replay, the logits are those of a run without a cache."""
    base = prompt_of(1, 9 * UNIT + 60)
    prompts = [base, [*base[: 7 * UNIT + 3], *prompt_of(3, 90)]]
    shape = Shape(deterministic=True, checkpoint_interval=0, max_step_tokens=300)
    reference = RecordingSampler()
    cold = model_engine(
        fields, Shape(deterministic=True, prefix_caching=False, max_step_tokens=2048), sampler=reference
    )
    for i, prompt in enumerate(prompts):
        answer(cold, str(i), prompt)
    cold.close()
    first = model_engine(fields, shape, tiers={"disk": DiskTier(tmp_path, SPACE)})
    answer(first, "base", base)
    first.close()
    warm = RecordingSampler()
    engine = model_engine(fields, shape, tiers={"disk": DiskTier(tmp_path, SPACE)}, sampler=warm)
    reports = [report_of(answer(engine, str(i), prompt)) for i, prompt in enumerate(prompts)]
    engine.close()
    assert reports[0].disk_tokens == 9 * UNIT and reports[1].replayed_tokens > 0
    for name, rows in reference.rows.items():
        for position, row in rows.items():
            assert torch.equal(row, warm.rows[name][position])


def test_a_damaged_record_is_a_miss_with_its_reason(fields: dict, tmp_path: Path) -> None:
    prompt = prompt_of(1, 8 * UNIT + 60)
    (expected,) = cold_answers(fields, [prompt])
    first = model_engine(fields, Shape(), tiers={"disk": DiskTier(tmp_path, SPACE)})
    answer(first, "first", prompt)
    first.close()
    for path in tmp_path.rglob("r-*.kv"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    disk = DiskTier(tmp_path, SPACE)
    engine = model_engine(fields, Shape(), tiers={"disk": disk})
    outcome = answer(engine, "damaged", prompt)
    assert outcome.tokens == expected
    assert (report_of(outcome).reason, report_of(outcome).cached_tokens) == (MissReason.LOAD_FAILED, 0)
    assert disk.usage().read_failures > 0
    settled(engine)
    again = answer(engine, "again", prompt)
    check(engine)
    engine.close()
    assert again.tokens == expected and report_of(again).cached_tokens == 8 * UNIT


def test_salts_and_weights_never_mix_in_a_tier(tmp_path: Path) -> None:
    fields, other = GEOMETRIES["flash-like"], GEOMETRIES["pro-like"]
    prompt = prompt_of(1, 5 * UNIT + 60)
    first = model_engine(fields, Shape(), tiers={"disk": DiskTier(tmp_path, SPACE)})
    for salt in ("a", "b"):
        assert report_of(answer(first, salt, prompt, cache_salt=salt)).cached_tokens == 0
    first.close()
    second = model_engine(fields, Shape(), tiers={"disk": DiskTier(tmp_path, SPACE)})
    reports = {s: report_of(answer(second, s, prompt, cache_salt=s)) for s in ("a", "b", "c")}
    second.close()
    assert [reports[s].disk_tokens for s in "abc"] == [5 * UNIT, 5 * UNIT, 0]
    third = model_engine(other, Shape(), tiers={"disk": DiskTier(tmp_path, SPACE)})
    report = report_of(answer(third, "x", prompt, cache_salt="other model a"))
    third.close()
    assert report.cached_tokens == 0


def test_what_the_device_keeps_is_stored_anew_after_a_reset(tmp_path: Path) -> None:
    fields, prompt = GEOMETRIES["flash-like"], prompt_of(1, 5 * UNIT + 60)
    tiers: dict[str, Tier] = {"host": HostTier(SPACE), "disk": DiskTier(tmp_path, SPACE)}
    engine = model_engine(fields, Shape(), tiers=tiers)
    answer(engine, "first", prompt)
    settled(engine)
    engine.reset_prefix_cache(frozenset({"disk"}))
    assert tiers["disk"].usage().rows_records == 0
    outcome = answer(engine, "again", prompt)
    settled(engine)
    usages = [tier.usage() for tier in tiers.values()]
    engine.close()
    assert report_of(outcome).device_tokens == 5 * UNIT
    assert all(usage.rows_records and usage.checkpoint_records for usage in usages)


class Gated(HostTier):
    """A host tier whose writes wait while its gate is closed."""

    def __init__(self) -> None:
        super().__init__(SPACE)
        self.gate = threading.Event()
        self.gate.set()

    def write(self, record: Record) -> bool:
        assert self.gate.wait(60)
        return super().write(record)


def test_nobody_waits_for_writes_to_be_admitted() -> None:
    """Blocks that a slow tier has not written yet, but that are copied, are no reason to wait."""
    fields, host = GEOMETRIES["flash-like"], Gated()
    prompts = [prompt_of(seed, 6 * UNIT + 40) for seed in range(3)]
    expected = cold_answers(fields, prompts)
    engine = model_engine(fields, Shape(max_running=2), units=8, tiers={"host": host})
    host.gate.clear()
    outcomes = [answer(engine, str(i), prompt) for i, prompt in enumerate(prompts)]
    host.gate.set()
    check(engine)
    engine.close()
    assert [outcome.tokens for outcome in outcomes] == expected


def test_a_load_takes_blocks_that_are_only_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    fields, host = GEOMETRIES["flash-like"], Gated()
    prompt = prompt_of(1, 6 * UNIT + 40)
    engine = model_engine(fields, Shape(max_running=2), tiers={"host": host})
    answer(engine, "first", prompt)
    settled(engine)
    engine.reset_prefix_cache(frozenset({"device"}))
    host.gate.clear()
    answer(engine, "other", prompt_of(2, 6 * UNIT + 40))
    tiering = engine._scheduler.tiering
    begin_load = tiering.coordinator.begin_load
    monkeypatch.setattr(
        tiering.coordinator, "begin_load", lambda *a, **k: None if tiering._storing else begin_load(*a, **k)
    )
    outcome = answer(engine, "again", prompt)
    host.gate.set()
    check(engine)
    engine.close()
    assert report_of(outcome).host_tokens == 6 * UNIT


class Trouble(HostTier):
    """A host tier that fails in one way."""

    def __init__(self, what: str) -> None:
        super().__init__(SPACE)
        self.what = what
        self.calls = 0

    def _maybe(self, what: str) -> None:
        if what == self.what:
            self.calls += 1
            raise RuntimeError(f"{what} failed")

    def find(self, digests: SequenceOf[bytes]) -> Found:
        self._maybe("find")
        return super().find(digests)

    def read_rows(self, piece: Piece, skip: int = 0) -> Bytes | None:
        self._maybe("read_rows")
        return super().read_rows(piece, skip)

    def read_checkpoint(self, digest: bytes) -> Bytes | None:
        self._maybe("read_checkpoint")
        return super().read_checkpoint(digest)

    def write(self, record: Record) -> bool:
        self._maybe("write")
        return super().write(record)

    def touch(self, found: Found) -> None:
        self._maybe("touch")
        super().touch(found)

    def reserve(self, size_bytes: int) -> bool:
        self._maybe("reserve")
        return super().reserve(size_bytes)


@pytest.mark.parametrize("what", ["find", "read_rows", "read_checkpoint", "write", "touch"])
def test_a_tier_in_trouble_costs_no_answer(what: str) -> None:
    fields = GEOMETRIES["flash-like"]
    prompts = [prompt_of(seed, 6 * UNIT + 40) for seed in range(2)]
    expected = cold_answers(fields, prompts)
    tier = Trouble(what)
    engine = model_engine(fields, Shape(max_running=2), units=8, tiers={"host": tier})
    for rotation in range(2):
        for i, prompt in enumerate(prompts):
            outcome = answer(engine, f"{rotation} {i}", prompt)
            settled(engine)
            assert outcome.tokens == expected[i]
    assert tier.calls > 0 and engine.status().counters.get("failed_steps", 0) == 0
    check(engine)
    engine.close()


def test_requests_that_give_way_come_back_without_computing_again(fields: dict) -> None:
    """Three requests that grow until only one fits: nothing is computed twice, and the outputs stay the same."""
    prompts = [prompt_of(i, 200) for i in range(3)]
    expected = cold_answers(fields, prompts, max_tokens=70)
    host = HostTier(SPACE)
    engine = model_engine(fields, Shape(max_running=3, prefix_caching=True), units=6, tiers={"host": host})
    outcomes = [submit(engine, str(i), prompt, max_tokens=70) for i, prompt in enumerate(prompts)]
    assert all(o.done.wait(120) for o in outcomes)
    settled(engine)
    counters, usage = engine.status().counters, host.usage()
    check(engine)
    engine.close()
    assert [o.tokens for o in outcomes] == expected
    assert counters["swapped_out"] > 0 and counters["swapped_out"] == counters["swapped_in"]
    assert counters["step_tokens"] == 3 * (200 + 69)
    assert usage.bytes == usage.rows_bytes + usage.checkpoint_bytes


def test_without_room_in_host_memory_they_compute_again() -> None:
    fields = GEOMETRIES["narrow"]
    prompts = [prompt_of(i, 200) for i in range(3)]
    expected = cold_answers(fields, prompts, max_tokens=70)
    engine = model_engine(fields, Shape(max_running=3), units=6, tiers={"host": HostTier(1000)})
    outcomes = [submit(engine, str(i), prompt, max_tokens=70) for i, prompt in enumerate(prompts)]
    assert all(o.done.wait(120) for o in outcomes)
    counters = engine.status().counters
    engine.close()
    assert [o.tokens for o in outcomes] == expected
    assert counters["swaps_without_room"] > 0


def test_a_request_cancelled_while_its_rows_are_loaded() -> None:
    fields = GEOMETRIES["flash-like"]
    prompts = [prompt_of(seed, 6 * UNIT + 40) for seed in range(2)]
    expected = cold_answers(fields, prompts)

    class Slow(HostTier):
        def read_rows(self, piece: Piece, skip: int = 0) -> Bytes | None:
            time.sleep(0.3)
            return super().read_rows(piece, skip)

    engine = model_engine(fields, Shape(max_running=2), units=8, tiers={"host": Slow(SPACE)})
    for i, prompt in enumerate(prompts):
        answer(engine, f"first {i}", prompt)
        settled(engine)
    doomed = submit(engine, "doomed", prompts[0])
    time.sleep(0.1)
    engine.cancel("doomed")
    assert doomed.done.wait(30) and doomed.last.finish == "cancelled"
    settled(engine)
    outcome = answer(engine, "again", prompts[0])
    assert outcome.tokens == expected[0] and report_of(outcome).cached_tokens == 6 * UNIT
    check(engine)
    engine.close()


@pytest.mark.parametrize("policy", list(WindowPolicy))
def test_every_policy_over_two_tiers(policy: WindowPolicy, tmp_path: Path) -> None:
    """Documents in rotation with branches, under pools too small: every exact policy answers as without a cache."""
    fields = GEOMETRIES["narrow"]
    documents = [prompt_of(seed, 7 * UNIT + 20) for seed in range(3)]
    prompts = [[*d[: cut * UNIT + 9], *prompt_of(cut, 30)] for cut in (7, 4) for d in documents for _ in range(2)]
    expected = cold_answers(fields, prompts)
    tiers: dict[str, Tier] = {"host": HostTier(300_000), "disk": DiskTier(tmp_path, SPACE)}
    shape = Shape(max_running=2, policy=policy, checkpoint_interval=256)
    engine = model_engine(fields, shape, units=10, tiers=tiers)
    outcomes = [answer(engine, str(i), prompt) for i, prompt in enumerate(prompts)]
    check(engine)
    engine.close()
    cached = sum(report_of(o).cached_tokens for o in outcomes)
    assert cached > 0
    if policy is not WindowPolicy.BOUNDED_REPLAY:
        assert [o.tokens for o in outcomes] == expected


def test_shadow_runs_agree_and_notice_a_wrong_row() -> None:
    fields = GEOMETRIES["flash-like"]
    prompt = prompt_of(1, 5 * UNIT + 60)
    engine = model_engine(fields, Shape(), shadow=Shadow(1.0, lambda: 0.0))
    answer(engine, "cold", prompt)
    answer(engine, "hit", prompt, temperature=1.0)
    settle(engine, lambda counters: counters.get("shadow_runs", 0) == 1)
    assert engine.status().counters.get("shadow_mismatches", 0) == 0
    runner = engine._runner
    for layer in range(5):
        runner.arena.rows("window", layer).add_(3.0)  # type: ignore[attr-defined]
    answer(engine, "wrong", prompt, max_tokens=20)
    settle(engine, lambda counters: counters.get("shadow_runs", 0) == 2)
    assert engine.status().counters["shadow_mismatches"] == 1
    answer(engine, "miss", prompt_of(2, 400))
    assert engine.status().counters["shadow_runs"] == 2
    engine.close()
