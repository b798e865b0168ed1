"""The recommended configuration as a file of options that `thalweg serve --config FILE` runs."""

from __future__ import annotations

from thalweg.planner.advice import Advice, Verdict
from thalweg.planner.platform import Accelerators


def config_text(advice: Advice, verdict: Verdict) -> str:
    """TOML of one rank's options. What no option says (the layout, a disk's directory) is in its comments."""
    chosen = verdict.candidate
    head = [
        f"{advice.demand.name} on {advice.platform.name}: {chosen}",
        f"Options of one rank of {chosen.ranks}. `thalweg serve` runs layout tp1, one rank a process; others need an "
        "engine that has them.",
        f"Nearest shipped profile: {advice.demand.profile}. Objectives: " + ("; ".join(verdict.missed) or "met"),
    ]
    kv, index = advice.platform.formats
    values: dict[str, str | int] = {
        "max-num-batched-tokens": chosen.chunk_tokens,
        "max-num-seqs": chosen.max_num_seqs,
        "window-policy": chosen.window_policy,
        "checkpoint-interval": chosen.checkpoint_interval,
        "kv-cache-memory": verdict.pool_bytes,
        "kv-cache-dtype": kv,
        "index-cache-dtype": index,
        "kv-host-memory": chosen.host_memory,
        "device": "cuda" if isinstance(advice.platform, Accelerators) else "cpu",
    }
    if chosen.disk_space:
        values["kv-disk-space"] = chosen.disk_space
        head.append("A disk tier is recommended: add kv-disk-dir with a directory on a fast drive.")
    lines = [f"# {line}" for line in head]
    lines += [f"{name} = {_toml(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def _toml(value: str | int) -> str:
    return str(value) if isinstance(value, int) else f'"{value}"'
