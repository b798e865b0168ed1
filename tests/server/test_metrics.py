"""Tiers below the device, and kernels, in /metrics."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from thalweg.metrics.prometheus import EngineGauges, RequestMetrics, TierGauges


def samples(tiers: tuple[TierGauges, ...]) -> dict[tuple[str, ...], float]:
    text = RequestMetrics(lambda: EngineGauges(0, 0, (), {}, tiers)).exposition().decode()
    families = text_string_to_metric_families(text)
    return {
        (s.name, *(s.labels[name] for name in ("tier", "kind") if name in s.labels)): s.value
        for f in families
        for s in f.samples
        if "cache_tier" in s.name
    }


def test_every_tier_has_its_bytes_records_and_counters() -> None:
    host = TierGauges("host", 1000, 3, {"rows": 70, "checkpoint": 30}, {"hits": 5, "evicted": 1})
    disk = TierGauges("disk", 9000, 8, {"rows": 700}, {"hits": 2, "read_failures": 4})
    assert samples((host, disk)) == {
        ("thalweg_cache_tier_capacity_bytes", "host"): 1000,
        ("thalweg_cache_tier_capacity_bytes", "disk"): 9000,
        ("thalweg_cache_tier_records", "host"): 3,
        ("thalweg_cache_tier_records", "disk"): 8,
        ("thalweg_cache_tier_bytes", "host", "rows"): 70,
        ("thalweg_cache_tier_bytes", "host", "checkpoint"): 30,
        ("thalweg_cache_tier_bytes", "disk", "rows"): 700,
        ("thalweg_cache_tier_hits_total", "host"): 5,
        ("thalweg_cache_tier_hits_total", "disk"): 2,
        ("thalweg_cache_tier_evicted_total", "host"): 1,
        ("thalweg_cache_tier_read_failures_total", "disk"): 4,
    }


def test_without_tiers_there_is_nothing_to_show() -> None:
    assert samples(()) == {}


def test_the_backend_of_every_op_is_named() -> None:
    gauges = EngineGauges(0, 0, (), {}, kernels={"linear": "cpu-avx2", "rotate": "reference"})
    text = RequestMetrics(lambda: gauges).exposition().decode()
    assert 'thalweg_kernel_backend_info{backend="cpu-avx2",op="linear"} 1.0' in text
    assert text.count("thalweg_kernel_backend_info{") == 2


def test_what_rises_and_falls_is_no_counter() -> None:
    gauges = EngineGauges(0, 0, (), {"cached_units": 7, "evicted_units": 3})
    text = RequestMetrics(lambda: gauges).exposition().decode()
    types = {f.name: f.type for f in text_string_to_metric_families(text)}
    assert types["thalweg_engine_cached_units"] == "gauge" and types["thalweg_engine_evicted_units"] == "counter"
