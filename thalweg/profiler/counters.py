"""What /metrics adds, where it is there: in the names of vLLM (ours has them too), SGLang and llama.cpp's server."""

from __future__ import annotations

import re

_CAPACITY = re.compile(r"^\w+:cache_config_info\{(.*)\} 1(?:\.0)?$", re.MULTILINE)
_CAPACITY_GAUGE = ("max_total_num_tokens",)
_HITS = ("prefix_cache_hits_total", "gpu_prefix_cache_hits_total")
_RUNNING = ("num_requests_running", "num_running_reqs", "requests_processing")


def stated_capacity(metrics: str) -> int | None:
    """Tokens of the cache."""
    found = _CAPACITY.search(metrics)
    if found:
        labels = dict(re.findall(r'(\w+)="([^"]*)"', found.group(1)))
        size, blocks = labels.get("block_size", ""), labels.get("num_gpu_blocks", "")
        return int(size) * int(blocks) if size.isdigit() and blocks.isdigit() else None
    return _whole(_sum(metrics, _CAPACITY_GAUGE))


def hit_tokens(metrics: str) -> int | None:
    """Prompt tokens served from the cache since the server began."""
    return _whole(_sum(metrics, _HITS))


def running_requests(metrics: str) -> int | None:
    """Requests that are computed now."""
    return _whole(_sum(metrics, _RUNNING))


def _sum(metrics: str, names: tuple[str, ...]) -> float | None:
    """Over all label sets of the first of these names that is there."""
    for name in names:
        found = re.findall(rf"^\w+:{name}(?:\{{.*\}})? (\S+)$", metrics, re.MULTILINE)
        if found:
            return sum(map(float, found))
    return None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
