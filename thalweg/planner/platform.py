"""What serves: accelerators priced by the package's tables, or an endpoint that was measured. Both give a step's cost
and the memory of a rank; the search over configurations asks no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from thalweg.config.accelerators import accelerator
from thalweg.config.model import ModelConfig
from thalweg.errors import ConfigError
from thalweg.planner.accuracy import Score
from thalweg.planner.cost import Origin, StepCost, StepWork
from thalweg.planner.layout import Deployment, ParallelLayout, Speculation
from thalweg.planner.memory_model import GIB, plan_memory
from thalweg.planner.op_times import WEIGHT_BYTES
from thalweg.planner.scenario import HOST_RATE
from thalweg.planner.step_cost import ModelStepCost, Tables, shipped_tables


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of one rank's memory: `usable` = weights + workspace + pool."""

    usable: int
    weights: int
    workspace: int
    pool: int


class Platform(Protocol):
    """See the module. `gpus` is what an engine may be spread over; `formats` are those of rows and index keys;
    `request_seconds` is what a first token takes outside of steps."""

    name: str
    gpus: int
    model: ModelConfig
    link: float
    formats: tuple[str, str]
    request_seconds: float

    def layouts(self) -> list[ParallelLayout]:
        """All that its GPUs can be one engine of."""
        ...

    def chunks(self) -> tuple[int, ...]:
        """Budgets of a step worth a try, the usual one first."""
        ...

    def room(self, layout: ParallelLayout, chunk_tokens: int, speculation: Speculation | None) -> Room:
        """Raises ConfigError naming the budget that fails, and by how much."""
        ...

    def cost(self, layout: ParallelLayout, chunk_tokens: int, speculation: Speculation | None) -> StepCost: ...


class Accelerators:
    """GPUs of one kind."""

    formats = ("fp8", "fp8")
    request_seconds = 0.0

    def __init__(
        self, model: ModelConfig, name: str, gpus: int, framework: str = "sglang", quant: str = "mxfp4"
    ) -> None:
        if gpus < 1:
            raise ConfigError(f"gpus: {gpus} is below 1", param="gpus")
        if quant not in WEIGHT_BYTES:
            raise ConfigError(f"quant: {quant!r} is not one of {', '.join(WEIGHT_BYTES)}", param="quant")
        self.device = accelerator(name)
        self.model, self.gpus, self.framework, self.quant = model, gpus, framework, quant
        self.name, self.link = f"{gpus} x {self.device.name}", self.device.host_link
        self._costs: dict[tuple[ParallelLayout, int, Speculation | None], ModelStepCost] = {}

    @cached_property
    def _tables(self) -> Tables:
        return shipped_tables()

    def layouts(self) -> list[ParallelLayout]:
        found, size = [], 1
        while size <= self.gpus:
            found += _layouts_of(size)
            size *= 2
        return found

    def chunks(self) -> tuple[int, ...]:
        return (8192, 2048, 16384)

    def room(self, layout: ParallelLayout, chunk_tokens: int, speculation: Speculation | None) -> Room:
        layout.check(self.model)
        plan = plan_memory(self.model, self._deployment(layout, chunk_tokens, speculation, "thalweg"))
        return Room(plan.usable_bytes, plan.weights_bytes, plan.workspace_bytes, plan.pool_bytes)

    def cost(self, layout: ParallelLayout, chunk_tokens: int, speculation: Speculation | None) -> ModelStepCost:
        key = (layout, chunk_tokens, speculation)
        if key not in self._costs:
            deployment = self._deployment(layout, chunk_tokens, speculation, self.framework)
            self._costs[key] = ModelStepCost(self.model, deployment, self._tables)
        return self._costs[key]

    def _deployment(
        self, layout: ParallelLayout, chunk_tokens: int, speculation: Speculation | None, framework: str
    ) -> Deployment:
        return Deployment(framework, self.device.name, layout, self.quant, chunk_tokens, speculation)


def _layouts_of(size: int) -> list[ParallelLayout]:
    """One engine of that many GPUs. Data parallel attention spreads whole experts; context parallelism is tried alone
    and with tensor parallelism, sizes up to 8 within a node's link."""
    if size == 1:
        return [ParallelLayout()]
    found = [ParallelLayout(tp=size), ParallelLayout(dp=size, expert_parallel=True)]
    if size >= 4:
        found += [ParallelLayout(tp=2, dp=size // 2, expert_parallel=True), ParallelLayout(tp=2, cp=size // 2)]
    found.append(ParallelLayout(cp=size, expert_parallel=True))
    return found


class MeasuredEndpoint:
    """An endpoint as its own timings describe it: one replica of it, or several."""

    def __init__(
        self,
        model: ModelConfig,
        name: str,
        cost: StepCost,
        pool_bytes: int,
        formats: tuple[str, str],
        gpus: int = 1,
        *,
        request_seconds: float = 0.0,
        scores: tuple[Score, ...] = (),
    ) -> None:
        if pool_bytes < 1:
            raise ConfigError(f"pool_memory: {pool_bytes} is below 1", param="pool_memory")
        self.model, self.name, self.gpus, self.formats = model, name, gpus, formats
        self.link = HOST_RATE
        self.request_seconds, self.scores = request_seconds, scores
        self._cost, self.pool_bytes = cost, pool_bytes

    def layouts(self) -> list[ParallelLayout]:
        return [ParallelLayout()]

    def chunks(self) -> tuple[int, ...]:
        return (1024, 512, 4096)

    def room(self, layout: ParallelLayout, chunk_tokens: int, speculation: Speculation | None) -> Room:
        return Room(self.pool_bytes, 0, 0, self.pool_bytes)

    def cost(self, layout: ParallelLayout, chunk_tokens: int, speculation: Speculation | None) -> StepCost:
        if speculation is not None:
            raise ConfigError("drafts: no speculation was measured at this endpoint", param="drafts")
        return self._cost


def origin_shares(cost: StepCost, works: Mapping[StepWork, float]) -> dict[Origin, float]:
    """Shares of the time of some weighted steps by how far their prices are from measurements."""
    sums = dict.fromkeys(Origin, 0.0)
    for work, weight in works.items():
        parts = cost.parts(work).values() if isinstance(cost, ModelStepCost) else (cost.estimate(work),)
        for part in parts:
            sums[part.origin] += weight * part.seconds
    whole = sum(sums.values()) or 1.0
    return {origin: seconds / whole for origin, seconds in sums.items()}


def gib(size: float) -> str:
    """Bytes for a reader; small ones in MiB."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 8 else f"{size / 2**20:,.1f} MiB"
