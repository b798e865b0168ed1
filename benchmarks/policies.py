"""Window policies compared: `python -m benchmarks.policies OUT.jsonl [--quick]`: a line per policy, workload and tiers.

Three workloads, every prompt through the chat encoder with its hints, one request at a time:

    agents      agents that share a system prompt and tools take turns; each turn appends a tool result and a question
    repository  one long document; most questions come at its end, some after a quarter, half and three quarters of it
    rotation    documents A B C D A B C D, of which the rows that the pools hold are about 60%; also with a host tier

Each runs on two shapes. `embedded`: the embedded model, real answers and times, compared with a run without a cache.
`flash`: the geometry of DeepSeek-V4-Flash in its served formats, texts four times as long, and no model: the engine
decides and counts as ever, and a rule takes the place of the tokens. All policies divide the same bytes; `divide` says
how. Counts repeat exactly; times do not. `--table OUT.jsonl` prints the tables of docs/window-policies.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.policy_prompts import QUICK, SEED, WORKLOADS, Asked, Reply, Sizes, Texts, rotation
from thalweg.cache.coordinator import Coordinator
from thalweg.cache.geometry import CacheGroupSpec, Group, cache_groups
from thalweg.cache.policy import exact_replay_tokens
from thalweg.cache.prefix_index import Namespace, PrefixIndex
from thalweg.checkpoint.loader import load_parameters
from thalweg.checkpoint.reader import open_checkpoint
from thalweg.cli.demo import machine_facts
from thalweg.config.model import ModelConfig
from thalweg.config.model_parse import default_model, parse_model_config
from thalweg.config.options import EngineOptions
from thalweg.engine.batch import BatchBuilder
from thalweg.engine.engine import Engine
from thalweg.engine.limits import EngineLimits
from thalweg.engine.plan import StepPlan, StepResult
from thalweg.engine.runner import ModelRunner, Runner
from thalweg.engine.runtime import window_policy
from thalweg.engine.sampler import Sampler
from thalweg.engine.scheduler import Scheduler, SchedulerLimits
from thalweg.engine.tiering import HOST, Tiering
from thalweg.kernels.registry import select_kernels
from thalweg.memory.arena import CacheArena
from thalweg.memory.capacity import (
    CHECKPOINT_SPACING_UNITS,
    CachePlan,
    checkpoint_blocks,
    checkpoint_bytes,
    live_blocks,
    plan_cache,
    request_bytes,
    unit_bytes,
)
from thalweg.memory.host import HostTier
from thalweg.memory.layout import CacheLayout, RowFormat
from thalweg.memory.packing import BlockPacker
from thalweg.memory.transfers import Transfers
from thalweg.model.numerics import Numerics
from thalweg.model.repeat import RepeatedModel
from thalweg.model.transformer import Model
from thalweg.model.weights import allocate
from thalweg.text.tokenizer import Tokenizer
from thalweg.types import Event, GenerateRequest, SampledToken, SamplingParams, TokenEvent, Usage

OFF = "off"
POLICIES = ("full", "interval:1024", "interval:4096", "boundary", "exact-replay", "bounded-replay")
EVERYBODY = Namespace(b"everybody")
STEP_TOKENS, UNIT_TOKENS = 1024, 128
# Units that the default policy's pools hold, as a share of those that the prompts have.
SHARES = {"agents": 1.0, "repository": 1.25, "rotation": 0.6}
CONFIGS = Path(__file__).parent.parent / "thalweg" / "data" / "configs"


# -- engines ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    """What an engine serves: a geometry, and a model of it or None."""

    name: str
    config: ModelConfig
    layout: CacheLayout
    model: Model | None = None

    @property
    def groups(self) -> tuple[CacheGroupSpec, ...]:
        return cache_groups(self.config)


class NoModel:
    """A runner that computes nothing: a token follows from its position."""

    def run(self, plan: StepPlan) -> StepResult:
        sampling = [item for item in plan.sequences if item.samples]
        return StepResult({i.request_id: SampledToken(300 + 7 * i.end % 1500) for i in sampling})


def embedded_shape() -> ModelShape:
    """The embedded model in fp32, as it is served on a CPU."""
    checkpoint = open_checkpoint(default_model())
    device, wide = torch.device("cpu"), RowFormat.FLOAT32
    weights = allocate(checkpoint.config, torch.float32, device)
    load_parameters(checkpoint, weights)
    numerics = Numerics.serving(torch.float32, wide, wide, simulate=False)
    model = Model(checkpoint.config, weights, numerics, select_kernels(device).kernels)
    return ModelShape("embedded", checkpoint.config, CacheLayout(wide, wide, checkpoint.config.rope_dim), model)


def released_shape(name: str) -> ModelShape:
    """`flash` or `pro` with FP8 rows and FP4 index keys, without a model."""
    config = parse_model_config(json.loads((CONFIGS / f"{name}.json").read_text()))
    return ModelShape(name, config, CacheLayout(RowFormat.FP8, RowFormat.FP4, config.rope_dim))


def divide(shape: ModelShape, budget_bytes: int, spacing_units: int, longest_tokens: int) -> CachePlan:
    """Pools of one running request, divided as for serving; but rows for the longest prompt come first.

    Where a checkpoint per few units leaves less room for rows than that, there are fewer checkpoints: no policy refuses
    a prompt that others serve.
    """
    groups, layout = shape.groups, shape.layout
    plan = plan_cache(groups, layout, budget_bytes=budget_bytes, max_running=1, spacing_units=spacing_units)
    if plan.token_capacity >= longest_tokens:
        return plan
    units = -(-longest_tokens // UNIT_TOKENS)
    left = budget_bytes - request_bytes(groups, layout) - units * unit_bytes(groups, layout)
    assert left >= 0, "the budget does not hold the longest prompt"
    kept = left // checkpoint_bytes(groups, layout)
    blocks = {s.group: units if s.compressed else live_blocks(s) + kept * checkpoint_blocks(s) for s in groups}
    return CachePlan(groups, layout, blocks, 1)


def budget_for(shape: ModelShape, units: int) -> int:
    """Bytes with which the default policy's pools hold so many units of compressed rows."""
    checkpoints = max(2, -(-units // CHECKPOINT_SPACING_UNITS))
    kept = checkpoints * checkpoint_bytes(shape.groups, shape.layout)
    return request_bytes(shape.groups, shape.layout) + units * unit_bytes(shape.groups, shape.layout) + kept


@dataclass
class Heard:
    """What became of one request."""

    begin: float
    first: float = 0.0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    usage: Usage | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        if not isinstance(event, TokenEvent):
            return
        self.first = self.first or time.perf_counter()
        self.tokens += [t.token for t in event.tokens]
        self.logprobs += [t.logprob or 0.0 for t in event.tokens]
        if event.finish is not None:
            self.usage = None if event.error else event.usage
            self.done.set()


class Bench:
    """One engine under one policy, with what it held at most."""

    def __init__(self, shape: ModelShape, policy: str, plan: CachePlan, host_bytes: int = 0) -> None:
        self.plan = plan
        caching = policy != OFF
        rule = window_policy(EngineOptions(window_policy=policy if caching else "boundary"), shape.config)
        self.coordinator = Coordinator(plan.groups, plan.pool_blocks, rule, prefix_caching=caching)
        tick = itertools.count()
        tiers = {HOST: HostTier(host_bytes, lambda: float(next(tick)))} if host_bytes else {}
        runner: Runner = NoModel()
        mover = None
        if shape.model is not None:
            arena = CacheArena(plan, torch.device("cpu"))
            builder, sampler = BatchBuilder(shape.config, plan.groups), Sampler(tuple(shape.config.eos_token_ids))
            runner = ModelRunner(RepeatedModel(shape.model, arena, None), arena, builder, sampler)
            mover = Transfers(BlockPacker(arena), tiers) if tiers else None
        self.tiering = Tiering(self.coordinator, tiers, mover)
        scheduler = Scheduler(self.tiering, SchedulerLimits(1, STEP_TOKENS), lambda _: EVERYBODY)
        eos = tuple(shape.config.eos_token_ids)
        limits = EngineLimits(1 << 20, plan.token_capacity, shape.config.vocab_size, 8, eos)
        self.engine = Engine(lambda: scheduler, runner, limits)
        self.engine.start()
        self.peak: dict[str, int] = {}
        self._serial = 0

    def ask(self, asked: Asked, answer_tokens: int) -> Heard:
        """One request from its submission to its end, and to the end of the copies that it began."""
        self._serial += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=answer_tokens, logprobs=1)
        prompt = np.array(asked.prompt, np.int32)
        heard = Heard(time.perf_counter())
        self.engine.submit(GenerateRequest(f"{self._serial}", prompt, sampling, cache_hints=asked.hints), heard)
        heard.done.wait()
        assert heard.usage is not None, "a request failed"
        while self.tiering.busy:
            time.sleep(0.001)
        held = self._held()
        if sum(held.values()) > sum(self.peak.values()):
            self.peak = held
        return heard

    def _held(self) -> dict[str, int]:
        """Bytes that the prefix index holds, by group."""
        size = {spec.group.value: self.plan.layout.block_bytes(spec) for spec in self.plan.groups}
        return {u.group: u.cached_blocks * size[u.group] for u in self.engine.status().groups}


# -- measuring --------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One workload on one shape: its prompts with the answers of a run without a cache."""

    shape: ModelShape
    name: str
    answer_tokens: int
    asked: list[Asked] = field(default_factory=list)
    cold: list[Heard] = field(default_factory=list)
    distinct_units: int = 0  # that all prompts together have

    @property
    def longest_tokens(self) -> int:
        return max(len(a.prompt) for a in self.asked) + self.answer_tokens

    def budget_bytes(self) -> int:
        return budget_for(self.shape, int(SHARES[self.name] * self.distinct_units))


def prepare(shape: ModelShape, workload: Callable[[Texts, Sizes, Reply], list[Asked]], sizes: Sizes) -> Case:
    """Make the prompts and answer each of them cold."""
    case = Case(shape, workload.__name__, sizes.answer)
    tokenizer = Tokenizer.load(default_model())
    most = 2 * max(sizes.document, sizes.rotated, sizes.head + sizes.turns * (sizes.result + 200)) * sizes.scale
    bench = Bench(shape, OFF, divide(shape, budget_for(shape, 2 + most // UNIT_TOKENS), 0, 0))
    answers: dict[tuple[int, ...], Heard] = {}

    def reply(asked: Asked) -> str:
        answers[asked.prompt] = answers.get(asked.prompt) or bench.ask(asked, sizes.answer)
        return tokenizer.decode(answers[asked.prompt].tokens, skip_special=True)

    case.asked = workload(Texts(tokenizer, SEED), sizes, reply)
    for asked in case.asked:
        reply(asked)
    index = PrefixIndex(UNIT_TOKENS)
    prompts = [np.array(asked.prompt, np.int32) for asked in case.asked]
    units = {digest for p in prompts for digest in index.digests(EVERYBODY, p, len(p) // UNIT_TOKENS)}
    case.distinct_units = len(units)
    case.cold = [answers[asked.prompt] for asked in case.asked]
    bench.engine.close()
    return case


def measure(case: Case, policy: str, host: bool = False) -> dict[str, Any]:
    """All prompts of a workload under one policy."""
    shape, budget = case.shape, case.budget_bytes()
    if policy == OFF:
        return _figures(case, policy, case.cold) | {"tiers": "device"}
    rule = window_policy(EngineOptions(window_policy=policy), shape.config)
    plan = divide(shape, budget, rule.spacing_units, case.longest_tokens)
    host_bytes = 2 * case.distinct_units * unit_bytes(shape.groups, shape.layout) if host else 0
    bench = Bench(shape, policy, plan, host_bytes)
    heard = [bench.ask(asked, case.answer_tokens) for asked in case.asked]
    coordinator = bench.coordinator
    bench.engine.close()
    compressed = {s.group.value for s in plan.groups if s.compressed}
    return _figures(case, policy, heard) | {
        "tiers": "device+host" if host else "device",
        "budget_bytes": budget,
        "host_bytes": host_bytes,
        "pool_blocks": {group.value: count for group, count in plan.pool_blocks.items()},
        "peak_bytes": bench.peak,
        "peak_compressed_bytes": sum(b for g, b in bench.peak.items() if g in compressed),
        "peak_checkpoint_bytes": sum(b for g, b in bench.peak.items() if g not in compressed),
        "evicted_units": coordinator.evicted_units,
        "evicted_checkpoints": coordinator.evicted_checkpoints,
        "checkpoints_made": {reason.value: n for reason, n in sorted(coordinator.checkpoints_made.items())},
    }


def _figures(case: Case, policy: str, heard: list[Heard]) -> dict[str, Any]:
    usages = [h.usage for h in heard if h.usage is not None]
    reports = [usage.cache for usage in usages]
    figures: dict[str, Any] = {
        "workload": case.name,
        "shape": case.shape.name,
        "policy": policy,
        "requests": len(heard),
        "prompt_tokens": sum(u.prompt_tokens for u in usages),
        "device_tokens": sum(r.device_tokens for r in reports),
        "host_tokens": sum(r.host_tokens for r in reports),
        "disk_tokens": sum(r.disk_tokens for r in reports),
        "replayed_tokens": sum(r.replayed_tokens for r in reports),
        "computed_tokens": sum(u.computed_tokens for u in usages),
        "reasons": dict(sorted(Counter(r.reason.value for r in reports).items())),
        "distinct_tokens": case.distinct_units * UNIT_TOKENS,
        "longest_tokens": case.longest_tokens,
    }
    if case.shape.model is None:
        return figures
    decode = Tokenizer.load(default_model()).decode
    right = [decode(h.tokens, skip_special=True) == a.expected for h, a in zip(heard, case.asked, strict=True)]
    return figures | {
        "wrong_answers": sum(h.tokens != c.tokens for h, c in zip(heard, case.cold, strict=True)),
        "largest_logprob_change": max(map(_logprob_change, heard, case.cold)),
        "right_facts": sum(right),
        "ttft_seconds": [round(h.first - h.begin, 5) for h in heard],
    }


def _logprob_change(heard: Heard, cold: Heard) -> float:
    """The largest difference between the log-probabilities of an answer's tokens, as far as they are the same."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(heard.tokens, cold.tokens, strict=False))
    pairs = zip(heard.logprobs, cold.logprobs, same, strict=False)
    return max((abs(own - other) for own, other, _ in pairs), default=0.0)


def measured(sizes: Sizes, say: Callable[[dict[str, Any]], None]) -> None:
    """Every case under every policy. The host tier copies real blocks, so that it needs the model's shape."""
    embedded = embedded_shape()
    for shape, own in ((embedded, sizes), (released_shape("flash"), replace(sizes, scale=4))):
        for workload in WORKLOADS:
            case = prepare(shape, workload, own)
            for policy in (OFF, *POLICIES):
                say(measure(case, policy))
            for policy in POLICIES if workload is rotation and shape.model is not None else ():
                say(measure(case, policy, host=True))


# -- tables -----------------------------------------------------------------------------------------------------


def tables(records: list[Mapping[str, Any]]) -> str:
    """Markdown: one table per shape, workload and tiers."""
    parts = []
    for key, group in itertools.groupby(records, lambda r: (r["shape"], r["workload"], r["tiers"])):
        rows = list(group)
        if rows[0]["policy"] == OFF and len(rows) == 1:
            continue
        parts.append(_table(key, rows))
    return "\n\n".join(parts)


def _table(key: tuple[str, str, str], rows: list[Mapping[str, Any]]) -> str:
    timed = "ttft_seconds" in rows[0]
    names = ["policy", "kept: rows + checkpoints", "from the cache", *(["of it host"] if "host" in key[2] else [])]
    names += ["replayed", "computed in all", "evicted units / checkpoints", "made"]
    names += ["first token: median / worst", "differ"] if timed else []
    lines = [f"**{key[0]}, {key[1]}, {key[2]}**", "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        hits = row["device_tokens"] + row["host_tokens"] + row["disk_tokens"]
        kept, gone = "-", "-"
        if "peak_bytes" in row:
            kept = f"{row['peak_compressed_bytes'] / 2**20:,.1f} + {row['peak_checkpoint_bytes'] / 2**20:,.1f} MiB"
            gone = f"{row['evicted_units']:,} / {row['evicted_checkpoints']:,}"
        cells = [row["policy"], kept, f"{hits:,}", *([f"{row['host_tokens']:,}"] if "host" in key[2] else [])]
        cells += [f"{row['replayed_tokens']:,}", f"{row['replayed_tokens'] + row['computed_tokens']:,}", gone]
        cells.append(str(sum(row.get("checkpoints_made", {}).values())))
        if timed:
            times = row["ttft_seconds"]
            cells += [f"{median(times) * 1000:,.0f} / {max(times) * 1000:,.0f} ms", str(row["wrong_answers"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bytes_table() -> str:
    """Markdown: what a checkpoint and a replay cost on the released models."""
    lines = [
        "| | rows of a unit | a checkpoint: window + tails | in units of rows | exact replay |",
        "|---|---|---|---|---|",
    ]
    for name in ("flash", "pro"):
        shape = released_shape(name)
        unit, kept = unit_bytes(shape.groups, shape.layout), checkpoint_bytes(shape.groups, shape.layout)
        replay = exact_replay_tokens(shape.config)
        window = sum(shape.layout.block_bytes(s) for s in shape.groups if s.group is Group.WINDOW)
        parts = f"{window / 2**20:.2f} + {(kept - window) / 2**20:.2f} MiB"
        sizes = f"{unit / 1024:,.0f} KiB | {parts} | {kept / unit:.1f}"
        lines.append(f"| {name.capitalize()} | {sizes} | {replay:,} tokens |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--quick", action="store_true", help="short texts: seconds, to see that it works")
    parser.add_argument("--table", action="store_true", help="print the tables of a file")
    options = parser.parse_args()
    if options.table:
        print(bytes_table(), tables([json.loads(line) for line in options.file.read_text().splitlines()]), sep="\n\n")
        return
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    facts = {"commit": commit.stdout.strip(), "seed": SEED, "threads": 1, **machine_facts()}
    with options.file.open("w") as file:

        def say(record: dict[str, Any]) -> None:
            load = {"load_average": round(os.getloadavg()[0], 2)}
            file.write(json.dumps(record | facts | load) + "\n")
            file.flush()
            print(record["shape"], record["workload"], record["tiers"], record["policy"], flush=True)

        measured(QUICK if options.quick else Sizes(), say)


if __name__ == "__main__":
    main()
