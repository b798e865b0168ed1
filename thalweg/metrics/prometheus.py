"""Counters and histograms of one server, in Prometheus text form.

Every figure has a `thalweg_` name; vllm_names.py gives those that clients of other engines look for under theirs too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from thalweg.metrics.finished import FinishedRequest
from thalweg.metrics.vllm_names import ModelLabels, VllmNames

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_NOW = frozenset({"cached_units"})  # figures of the engine that rise and fall
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_TOKENS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))
_Figure = Callable[[FinishedRequest], float | None]
_ANSWERED = frozenset({"stop", "length"})
_REQUEST_HISTOGRAMS: Mapping[str, tuple[str, tuple[float, ...], _Figure]] = {
    "e2e_request_latency_seconds": ("Arrival to end.", _SECONDS, lambda r: r.seconds),
    "request_queue_time_seconds": (
        "Arrival to first step, loading included.", _SECONDS, lambda r: r.queue_seconds + r.load_seconds,
    ),
    "request_load_time_seconds": ("Loading of lower tiers' rows.", _SECONDS, lambda r: r.load_seconds),
    "request_prefill_time_seconds": (
        "First step to first token.", _SECONDS, lambda r: r.prefill_seconds,
    ),
    "request_decode_time_seconds": ("First token to end.", _SECONDS, lambda r: r.decode_seconds),
    "request_inference_time_seconds": (
        "First step to end.", _SECONDS, lambda r: r.prefill_seconds + r.decode_seconds,
    ),
    "request_time_per_output_token_seconds": (
        "Mean time of a token after the first.", _STEP_SECONDS, lambda r: r.token_seconds,
    ),
    "request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS, lambda r: r.prompt_tokens),
    "request_generation_tokens": ("Output tokens of a request.", _TOKENS, lambda r: r.output_tokens),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PoolGauges:
    """One cache pool as /metrics shows it."""

    group: str
    total_blocks: int
    used_blocks: int
    cached_blocks: int
    block_bytes: int
    block_rows: int

    @property
    def cached_bytes(self) -> int:
        return self.cached_blocks * self.block_bytes

    @property
    def cached_rows(self) -> int:
        return self.cached_blocks * self.block_rows


@dataclass(frozen=True, slots=True)
class TierGauges:
    """A tier below the device. `used_bytes` by kind (rows, checkpoint); `counters` such as hits or write_bytes."""

    name: str
    capacity_bytes: int
    records: int
    used_bytes: Mapping[str, int]
    counters: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class EngineGauges:
    """What the engine says of itself at the moment of a scrape. `kernels` is the backend of each op; `compilations` are
    those that requests had to wait for."""

    running: int
    waiting: int
    pools: tuple[PoolGauges, ...]
    counters: Mapping[str, float]
    tiers: tuple[TierGauges, ...] = ()
    kernels: Mapping[str, str] = field(default_factory=dict)
    loading: int = 0
    compilations: int = 0


class EngineCollector(Collector):
    """Asks for EngineGauges at every scrape."""

    def __init__(self, gauges: Callable[[], EngineGauges]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        now = self._gauges()
        for state, text, count in (
            ("running", "Requests that hold cache blocks.", now.running),
            ("waiting", "Requests in the queue.", now.waiting),
            ("loading", "Requests whose rows of lower tiers are on their way.", now.loading),
        ):
            yield GaugeMetricFamily(f"thalweg_num_requests_{state}", text, value=count)
        yield GaugeMetricFamily("thalweg_kv_cache_usage_perc", "Fullest pool, 0 to 1.", value=_fullest(now.pools))
        preemptions = now.counters.get("preemptions", 0)
        yield CounterMetricFamily("thalweg_num_preemptions", "Requests that gave way.", value=preemptions)
        for name in ("total_blocks", "used_blocks", "cached_blocks", "block_bytes", "cached_bytes", "cached_rows"):
            family = GaugeMetricFamily(f"thalweg_cache_{name}", f"{name} of a cache group.", labels=["group"])
            for pool in now.pools:
                family.add_metric([pool.group], getattr(pool, name))
            yield family
        yield from _tier_metrics(now.tiers)
        backends = GaugeMetricFamily(
            "thalweg_kernel_backend_info", "1 for the backend that computes an op.", labels=["op", "backend"]
        )
        for labels in now.kernels.items():
            backends.add_metric(labels, 1)
        yield backends
        yield CounterMetricFamily(
            "thalweg_compile_in_serving",
            "Kernels compiled and graphs captured after the server was ready.",
            value=now.compilations,
        )
        for name, value in now.counters.items():
            if name in _NOW:
                yield GaugeMetricFamily(f"thalweg_engine_{name}", f"Engine gauge {name}.", value=value)
            elif name != "preemptions":
                yield CounterMetricFamily(f"thalweg_engine_{name}", f"Engine counter {name}.", value=value)


def _tier_metrics(tiers: tuple[TierGauges, ...]) -> Iterable[Metric]:
    used = GaugeMetricFamily("thalweg_cache_tier_bytes", "Bytes in use of a tier.", labels=["tier", "kind"])
    capacity = GaugeMetricFamily("thalweg_cache_tier_capacity_bytes", "Byte limit of a tier.", labels=["tier"])
    records = GaugeMetricFamily("thalweg_cache_tier_records", "Records in a tier.", labels=["tier"])
    counters: dict[str, CounterMetricFamily] = {}
    for tier in tiers:
        capacity.add_metric([tier.name], tier.capacity_bytes)
        records.add_metric([tier.name], tier.records)
        for kind, size in tier.used_bytes.items():
            used.add_metric([tier.name, kind], size)
        for name, value in tier.counters.items():
            family = CounterMetricFamily(f"thalweg_cache_tier_{name}", f"{name} of a tier.", labels=["tier"])
            counters.setdefault(name, family).add_metric([tier.name], value)
    yield from (used, capacity, records, *counters.values())


def _fullest(pools: tuple[PoolGauges, ...]) -> float:
    return max((p.used_blocks / p.total_blocks for p in pools if p.total_blocks), default=0.0)


class RequestMetrics:
    """Counters of requests, fed by the server as requests proceed."""

    def __init__(self, gauges: Callable[[], EngineGauges], model: ModelLabels | None = None) -> None:
        """`model` labels the figures under `vllm:`."""
        own = CollectorRegistry()
        self._registry = own
        self._renamed = CollectorRegistry()
        own.register(EngineCollector(gauges))
        self._renamed.register(VllmNames(own, model or ModelLabels()))
        self._prompt = Counter("thalweg_prompt_tokens", "Prompt tokens of requests with output.", registry=own)
        self._output = Counter("thalweg_generation_tokens", "Output tokens.", registry=own)
        self._queries = Counter("thalweg_prefix_cache_queries", "Prompt tokens looked up in the cache.", registry=own)
        self._hits = Counter("thalweg_prefix_cache_hits", "Prompt tokens served from the cache.", registry=own)
        self._finished = Counter("thalweg_requests_finished", "Requests by how they ended.", ["reason"], registry=own)
        self._misses = Counter(
            "thalweg_prefix_cache_requests", "Requests by why no more was cached.", ["reason"], registry=own
        )
        self._sources = Counter(
            "thalweg_prompt_tokens_by_source", "Prompt tokens by where they came from.", ["source"], registry=own
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _SECONDS)
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens.", _STEP_SECONDS)
        self._of_request = {
            name: self._histogram(name, text, buckets) for name, (text, buckets, _) in _REQUEST_HISTOGRAMS.items()
        }

    def first_token(self, seconds: float, prompt_sources: Mapping[str, int], miss_reason: str) -> None:
        """A request's first output, `seconds` after its arrival: its whole prompt is in the cache now."""
        self._ttft.observe(seconds)
        self._misses.labels(miss_reason).inc()
        for source, tokens in prompt_sources.items():
            self._sources.labels(source).inc(tokens)
        prompt_tokens = sum(prompt_sources.values())
        self._prompt.inc(prompt_tokens)
        self._queries.inc(prompt_tokens)
        self._hits.inc(sum(prompt_sources.get(tier, 0) for tier in ("device", "host", "disk")))

    def output(self, tokens: int) -> None:
        """Output tokens, as they come."""
        self._output.inc(tokens)

    def next_token(self, seconds: float) -> None:
        self._between.observe(seconds)

    def finished(self, request: FinishedRequest) -> None:
        """Its end. Spans and lengths are those of answered requests: cancelled ones would blur them."""
        self._finished.labels(request.reason).inc()
        if request.reason not in _ANSWERED:
            return
        for name, (_, _, figure) in _REQUEST_HISTOGRAMS.items():
            value = figure(request)
            if value is not None:
                self._of_request[name].observe(value)

    def exposition(self) -> bytes:
        """The text of /metrics: every figure under its own name, then those that other engines have under theirs."""
        return generate_latest(self._registry) + generate_latest(self._renamed)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"thalweg_{name}", text, buckets=buckets, registry=self._registry)
