"""What `thalweg simulate` was asked for, as one value, and the simulation it comes to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from thalweg.config.accelerators import accelerator
from thalweg.config.model import ModelConfig
from thalweg.config.model_parse import load_model_config
from thalweg.errors import ConfigError
from thalweg.planner.accuracy_steps import step_rows
from thalweg.planner.cost import StepCost
from thalweg.planner.layout import Deployment, ParallelLayout, Speculation
from thalweg.planner.linear_cost import LinearCost
from thalweg.planner.memory_model import plan_memory
from thalweg.planner.routing import Routing
from thalweg.planner.sim_tiers import TierSpec
from thalweg.planner.simulator import Simulation
from thalweg.planner.spec import ReplicaOptions, replica_spec
from thalweg.planner.speculation import Acceptance
from thalweg.planner.step_cost import ModelStepCost
from thalweg.planner.tables import read_file, read_rows
from thalweg.planner.trace import Session, read_trace
from thalweg.planner.workload import workload_sessions

HOST_RATE = 25e9  # bytes per second, where no hardware says what its link to the host does
_DISK_READ_RATE, _DISK_WRITE_RATE = 6e9, 3e9  # of one good NVMe drive
_DISK_LATENCY = 1e-4
STEP_COLUMNS = ("chunks", "decodes", "decode_tokens", "decode_context", "longest_context", "sampled", "seconds")


@dataclass(frozen=True, slots=True)
class Scenario:
    """Bytes, seconds and tokens. One of `trace` and `workload`, one of `hardware` and `cost`. `replicas` counts engines
    of the layout; each of its data parallel ranks serves on its own. Memory is that of one rank."""

    model: str
    trace: Path | None = None
    workload: str | None = None
    requests: int = 1000
    rate: float | None = None
    seed: int = 0
    hardware: str | None = None
    layout: str = "tp1"
    framework: str = "sglang"
    quant: str = "mxfp4"
    cost: str | None = None
    replicas: int = 1
    routing: str = Routing.STICKY
    pool_memory: int | None = None
    host_memory: int = 0
    disk_space: int = 0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 8192
    window_policy: str = "boundary"
    checkpoint_interval: int = 4096
    enable_prefix_caching: bool = True
    max_waiting: int = 1 << 20
    max_queue_seconds: float | None = None
    drafts: int = 0
    accepted: float = 1.0


def parse_layout(text: str) -> ParallelLayout:
    """A layout such as `tp8`, `dp8-ep8` or `tp4-dp2-ep8`. Raises ConfigError."""
    sizes: dict[str, int] = {}
    for part in text.lower().split("-"):
        match = re.fullmatch(r"(tp|dp|cp|ep)(\d{1,5})", part)
        if match is None or match.group(1) in sizes:
            raise ConfigError(f"layout: {text!r} is not like tp8, dp8-ep8 or tp4-dp2-ep8", param="layout")
        sizes[match.group(1)] = int(match.group(2))
    experts = sizes.pop("ep", 0)
    tp, dp, cp = (sizes.get(name, 1) for name in ("tp", "dp", "cp"))
    layout = ParallelLayout(tp, dp, cp, expert_parallel=experts > 0)
    if experts not in (0, layout.gpus):
        raise ConfigError(
            f"layout: {text!r}: experts are spread over all {layout.gpus} GPUs or none, not {experts}", param="layout"
        )
    return layout


def sessions_of(scenario: Scenario) -> Iterator[Session]:
    """The traffic."""
    if (scenario.trace is None) == (scenario.workload is None):
        raise ConfigError("trace: give a trace file or --workload, one of them", param="trace")
    if scenario.trace is not None:
        return read_trace(scenario.trace)
    assert scenario.workload is not None, "checked above"
    return workload_sessions(scenario.workload, scenario.requests, scenario.seed, scenario.rate)


def simulation_of(scenario: Scenario) -> Simulation:
    """The deployment. Raises ConfigError naming the option."""
    if scenario.replicas < 1:
        raise ConfigError(f"replicas: {scenario.replicas} is below 1", param="replicas")
    config = load_model_config(scenario.model)
    speculation = Speculation(scenario.drafts, scenario.accepted) if scenario.drafts else None
    layout = parse_layout(scenario.layout)
    cost, pool, link = _hardware(scenario, config, layout, speculation)
    options = ReplicaOptions(
        pool_memory=pool,
        max_num_seqs=scenario.max_num_seqs,
        max_num_batched_tokens=scenario.max_num_batched_tokens,
        window_policy=scenario.window_policy,
        checkpoint_interval=scenario.checkpoint_interval,
        enable_prefix_caching=scenario.enable_prefix_caching,
        max_waiting=scenario.max_waiting,
        max_queue_seconds=scenario.max_queue_seconds,
        tiers=tiers_of(scenario.host_memory, scenario.disk_space, link),
        acceptance=Acceptance(speculation, scenario.seed) if speculation else None,
    )
    try:
        routing = Routing(scenario.routing)
    except ValueError:
        known = ", ".join(Routing)
        raise ConfigError(f"routing: {scenario.routing!r} is not one of {known}", param="routing") from None
    ranks = scenario.replicas * layout.dp
    return Simulation(replica_spec(options, config), cost, replicas=ranks, routing=routing)


def load_cost(source: str) -> LinearCost:
    """From a file of coefficients (.json) or of measured steps (.csv), or `engine`: our CPU engine's own steps with the
    embedded model, one thread. Raises ConfigError."""
    if source == "engine":
        return LinearCost.fitted(step_rows(read_rows("engine_steps.csv")))
    if not source.endswith(".csv"):
        return LinearCost.load(source)
    try:
        return LinearCost.fitted(step_rows(read_file(Path(source), STEP_COLUMNS)))
    except ValueError as error:
        raise ConfigError(f"cost: {source}: {error}", param="cost") from error


def _hardware(
    scenario: Scenario, config: ModelConfig, layout: ParallelLayout, speculation: Speculation | None
) -> tuple[StepCost, int, float]:
    """The cost of a step, the bytes of a rank's pools, and of the link to its host."""
    if (scenario.hardware is None) == (scenario.cost is None):
        raise ConfigError("hardware: give --hardware or --cost, one of them", param="hardware")
    if scenario.cost is not None:
        if scenario.pool_memory is None:
            raise ConfigError("pool_memory: needed with --cost, which does not say how much there is")
        return load_cost(scenario.cost), scenario.pool_memory, HOST_RATE
    assert scenario.hardware is not None, "checked above"
    device = accelerator(scenario.hardware)
    deployment = Deployment(
        scenario.framework, device.name, layout, scenario.quant, scenario.max_num_batched_tokens, speculation
    )
    pool = scenario.pool_memory
    if pool is None:
        pool = plan_memory(config, _ours(deployment)).pool_bytes
    return ModelStepCost(config, deployment), pool, device.host_link


def _ours(deployment: Deployment) -> Deployment:
    """The same GPUs with our geometry of the cache, which is the one that is simulated."""
    return Deployment(
        "thalweg", deployment.device, deployment.layout, deployment.quant, deployment.chunk_tokens,
        deployment.speculation,
    )  # fmt: skip


def tiers_of(host_memory: int, disk_space: int, link: float) -> tuple[TierSpec, ...]:
    """The lower tiers of one replica, in bytes; 0: none. `link` is bytes per second to the host."""
    tiers = []
    if host_memory:
        tiers.append(TierSpec("host", host_memory, link, link))
    if disk_space:
        tiers.append(TierSpec("disk", disk_space, _DISK_READ_RATE, _DISK_WRITE_RATE, _DISK_LATENCY))
    return tuple(tiers)
