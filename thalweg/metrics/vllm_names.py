"""Our figures under the names and labels that vLLM gives them: dashboards, routers and benchmark clients look there.

They are renamed at each scrape, so that both names always have the same value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_OWN, _THEIRS = "thalweg_", "vllm:"
_SAME = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "num_preemptions",
    "prompt_tokens",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_time_per_output_token_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
)
# Of our name without its prefix, theirs: the ones above, and earlier names that older dashboards still ask for.
_NAMES: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in _SAME},
    "kv_cache_usage_perc": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    "inter_token_latency_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "requests_finished": ("request_success",),
}
_FINISHED = {"cancelled": "abort"}


@dataclass(frozen=True, slots=True)
class ModelLabels:
    """What vLLM says of a model beside the figures. `block_tokens` * `blocks` is the capacity of the cache."""

    model_name: str = ""
    block_tokens: int = 0
    blocks: int = 0
    cache_dtype: str = ""
    prefix_caching: bool = True


class VllmNames(Collector):
    """Collects from another registry, and renames."""

    def __init__(self, own: CollectorRegistry, model: ModelLabels) -> None:
        self._own = own
        self._model = model
        self._labels = {"model_name": model.model_name, "engine": "0"}

    def collect(self) -> Iterable[Metric]:
        families = {family.name.removeprefix(_OWN): family for family in self._own.collect()}
        for name, theirs in _NAMES.items():
            for their_name in theirs:
                yield self._renamed(families[name], their_name)
        yield self._cache_config()

    def _renamed(self, family: Metric, name: str) -> Metric:
        renamed = Metric(f"{_THEIRS}{name}", family.documentation, family.type)
        for sample in family.samples:
            labels = {_label(key): _FINISHED.get(value, value) for key, value in sample.labels.items()}
            ending = sample.name.removeprefix(family.name)
            renamed.add_sample(f"{renamed.name}{ending}", {**labels, **self._labels}, sample.value)
        return renamed

    def _cache_config(self) -> Metric:
        model = self._model
        described = {
            "block_size": str(model.block_tokens),
            "num_gpu_blocks": str(model.blocks),
            "cache_dtype": model.cache_dtype,
            "enable_prefix_caching": str(model.prefix_caching),
            "engine": "0",
            "model_name": model.model_name,
        }
        family = GaugeMetricFamily(f"{_THEIRS}cache_config_info", "Capacity of the cache.", labels=list(described))
        family.add_metric(list(described.values()), 1)
        return family


def _label(name: str) -> str:
    return "finished_reason" if name == "reason" else name
