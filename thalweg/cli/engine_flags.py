"""Engine options as flags, in the spellings that users of vLLM and SGLang type; shared by `serve` and `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from thalweg.config.options import EngineOptions, load_options, profile_names

_PANEL = "Engine"


def _option(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_PANEL, show_default=False)


Model = Annotated[str | None, typer.Argument(help="Model directory; the embedded default model if left out.")]
ConfigFile = Annotated[Path | None, _option("--config", help="TOML file with engine options.")]
Profile = Annotated[
    str | None,
    _option("--profile", help=f"Options for a shape of traffic: {', '.join(profile_names())}. Others go over them."),
]
ServedName = Annotated[str | None, _option("--served-model-name", help="Name that clients use.")]
Device = Annotated[str | None, _option("--device", help="auto, cpu or cuda.")]
Dtype = Annotated[str | None, _option("--dtype", help="auto, float32 or bfloat16.")]
KvDtype = Annotated[str | None, _option("--kv-cache-dtype", help="auto, float32, bfloat16 or fp8.")]
IndexDtype = Annotated[str | None, _option("--index-cache-dtype", help="auto, float32, bfloat16, fp8 or fp4.")]
Simulation = Annotated[
    bool | None, _option("--quantization-simulation", help="Round as FP8 KV and an FP4 index would.")
]
KernelBackend = Annotated[
    str | None, _option("--kernels", help="auto, reference, triton, plain, avx2 or avx512: what computes.")
]
Deterministic = Annotated[
    bool | None, _option("--deterministic", help="The same bits in any batch and from any cache.")
]
MaxLen = Annotated[int | None, _option("--max-model-len", "--context-length", help="Most tokens of prompt and output.")]
MaxSeqs = Annotated[
    int | None, _option("--max-num-seqs", "--max-running-requests", help="Most requests that run at once.")
]
StepTokens = Annotated[
    int | None, _option("--max-num-batched-tokens", "--chunked-prefill-size", help="Token budget of one step.")
]
CacheMemory = Annotated[
    str | None, _option("--kv-cache-memory", "--kv-cache-memory-bytes", help="Size of all cache pools, such as 8GiB.")
]
Utilization = Annotated[
    float | None,
    _option(
        "--gpu-memory-utilization",
        "--mem-fraction-static",
        "--memory-utilization",
        help="Without --kv-cache-memory: the share of the memory that weights and pools take.",
    ),
]
PrefixCaching = Annotated[
    bool | None,
    _option("--enable-prefix-caching/--no-enable-prefix-caching", help="Reuse computed prefixes (on by default)."),
]
Interval = Annotated[
    int | None,
    _option(
        "--checkpoint-interval", "--prefix-cache-retention-interval", help="Tokens between kept checkpoints; 0: none."
    ),
]
WindowPolicy = Annotated[
    str | None,
    _option("--window-policy", help="boundary, full, interval:K, exact-replay or bounded-replay (approximate)."),
]
HostMemory = Annotated[
    str | None,
    _option("--kv-host-memory", "--hicache-size", help="Size of the host tier, such as 16GiB; 0: none."),
]
HostRatio = Annotated[
    float | None,
    _option("--kv-host-ratio", "--hicache-ratio", help="The same as a share of the pools, 0.25 if neither is set."),
]
DiskDirectory = Annotated[str | None, _option("--kv-disk-dir", help="Directory of the disk tier.")]
DiskSpace = Annotated[str | None, _option("--kv-disk-space", help="Most bytes in it, such as 20GiB.")]
ShadowRate = Annotated[
    float | None, _option("--shadow-rate", help="Share of hits that is computed again cold in idle time and compared.")
]
Encoding = Annotated[
    str | None, _option("--chat-encoding", help="preview or later: the checkpoint's chat encoder revision.")
]
MaxWaiting = Annotated[int | None, _option("--max-waiting", help="Open requests before 429.")]
MaxQueueSeconds = Annotated[
    float | None, _option("--max-queue-seconds", help="Expected seconds to the first token before 429.")
]
Threads = Annotated[int | None, _option("--threads", help="CPU threads of one operation.")]


def options_from(given: Mapping[str, Any]) -> EngineOptions:
    """Engine options from a command's local variables: those with an option's name, `profile` and `config`."""
    flags = {name: given[name] for name in EngineOptions.__dataclass_fields__ if name in given}
    return load_options(flags, profile=given.get("profile"), file=given.get("config"))
