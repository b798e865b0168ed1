"""Counters and histograms of one server, in Prometheus text form.

Every figure has a `thalweg_` name; those that clients of other engines look for are there under `vllm:` too, where the
meaning is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_NOW = frozenset({"cached_units"})  # figures of the engine that rise and fall
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


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
    """What the engine says of itself at the moment of a scrape. `kernels` is the backend of each op."""

    running: int
    waiting: int
    pools: tuple[PoolGauges, ...]
    counters: Mapping[str, float]
    tiers: tuple[TierGauges, ...] = ()
    kernels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """What a request came to. `seconds` from arrival to end; `prompt_sources` adds up to prompt_tokens."""

    reason: str
    miss_reason: str
    prompt_tokens: int
    output_tokens: int
    prompt_sources: Mapping[str, int]
    cached_tokens: int
    seconds: float


class EngineCollector(Collector):
    """Asks for EngineGauges at every scrape."""

    def __init__(self, gauges: Callable[[], EngineGauges]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        now = self._gauges()
        for prefix in ("thalweg_", "vllm:"):
            yield GaugeMetricFamily(
                f"{prefix}num_requests_running", "Requests that hold cache blocks.", value=now.running
            )
            yield GaugeMetricFamily(f"{prefix}num_requests_waiting", "Requests in the queue.", value=now.waiting)
            yield GaugeMetricFamily(f"{prefix}kv_cache_usage_perc", "Fullest pool, 0 to 1.", value=_fullest(now.pools))
            value = now.counters.get("preemptions", 0)
            yield CounterMetricFamily(f"{prefix}num_preemptions", "Requests that gave way.", value=value)
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

    def __init__(self, gauges: Callable[[], EngineGauges]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(gauges))
        self._prompt = self._counters("prompt_tokens", "Prompt tokens of finished requests.")
        self._output = self._counters("generation_tokens", "Output tokens of finished requests.")
        self._queries = self._counters("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = self._counters("prefix_cache_hits", "Prompt tokens served from the prefix cache.")
        self._ttft = self._histograms("time_to_first_token_seconds", "Arrival to first token.", _SECONDS)
        self._between = self._histograms("inter_token_latency_seconds", "Between two tokens.", _STEP_SECONDS)
        self._whole = self._histograms("e2e_request_latency_seconds", "Arrival to last token.", _SECONDS)
        self._finished = Counter(
            "thalweg_requests_finished", "Requests by how they ended.", ["reason"], registry=self._registry
        )
        self._misses = Counter(
            "thalweg_prefix_cache_requests", "Requests by why no more was cached.", ["reason"], registry=self._registry
        )

        self._sources = Counter(
            "thalweg_prompt_tokens_by_source", "Prompt tokens by where they came from.", ["source"],
            registry=self._registry,
        )  # fmt: skip

    def first_token(self, seconds: float) -> None:
        for histogram in self._ttft:
            histogram.observe(seconds)

    def next_token(self, seconds: float) -> None:
        for histogram in self._between:
            histogram.observe(seconds)

    def finished(self, request: FinishedRequest) -> None:
        self._finished.labels(request.reason).inc()
        self._misses.labels(request.miss_reason).inc()
        for source, tokens in request.prompt_sources.items():
            self._sources.labels(source).inc(tokens)
        for counters, value in (
            (self._prompt, request.prompt_tokens),
            (self._output, request.output_tokens),
            (self._queries, request.prompt_tokens),
            (self._hits, request.cached_tokens),
        ):
            for counter in counters:
                counter.inc(value)
        for histogram in self._whole:
            histogram.observe(request.seconds)

    def abandoned(self) -> None:
        """A client left before its request ended."""
        self._finished.labels("cancelled").inc()

    def exposition(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self._registry)

    def _counters(self, name: str, text: str) -> tuple[Counter, Counter]:
        return (
            Counter(f"thalweg_{name}", text, registry=self._registry),
            Counter(f"vllm:{name}", text, registry=self._registry),
        )

    def _histograms(self, name: str, text: str, buckets: tuple[float, ...]) -> tuple[Histogram, Histogram]:
        return (
            Histogram(f"thalweg_{name}", text, buckets=buckets, registry=self._registry),
            Histogram(f"vllm:{name}", text, buckets=buckets, registry=self._registry),
        )
