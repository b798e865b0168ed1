"""`thalweg serve`: the HTTP server."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from thalweg.cli import engine_flags as flags
from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.engine.runtime import Runtime
    from thalweg.server.access import ApiKeys

_GRACE_SECONDS = 3  # a step under way ends first, then every open request is told
_LENGTHS = (8 * 1024, 64 * 1024, 256 * 1024, 1024 * 1024)

LogRequests = Annotated[
    bool,
    typer.Option(
        "--enable-log-requests/--no-enable-log-requests",
        "--log-requests/--disable-log-requests",
        help="One JSON line per finished request on stderr.",
    ),
]
ShutdownTimeout = Annotated[
    float, typer.Option(min=0, help="Seconds that SIGTERM leaves open requests to end; new ones get a 503.")
]


def serve(
    model: flags.Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(show_default=False, help="Key that clients must send; better in THALWEG_API_KEY.")
    ] = None,
    api_keys_file: Annotated[
        Path | None, typer.Option(show_default=False, help="TOML file with API keys by name, and their limits.")
    ] = None,
    enable_log_requests: LogRequests = True,
    shutdown_timeout: ShutdownTimeout = 30,
    profile: flags.Profile = None,
    config: flags.ConfigFile = None,
    served_model_name: flags.ServedName = None,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    kv_cache_dtype: flags.KvDtype = None,
    index_cache_dtype: flags.IndexDtype = None,
    quantization_simulation: flags.Simulation = None,
    kernels: flags.KernelBackend = None,
    deterministic: flags.Deterministic = None,
    max_model_len: flags.MaxLen = None,
    max_num_seqs: flags.MaxSeqs = None,
    max_num_batched_tokens: flags.StepTokens = None,
    kv_cache_memory: flags.CacheMemory = None,
    memory_utilization: flags.Utilization = None,
    enable_prefix_caching: flags.PrefixCaching = None,
    window_policy: flags.WindowPolicy = None,
    checkpoint_interval: flags.Interval = None,
    kv_host_memory: flags.HostMemory = None,
    kv_host_ratio: flags.HostRatio = None,
    kv_disk_dir: flags.DiskDirectory = None,
    kv_disk_space: flags.DiskSpace = None,
    shadow_rate: flags.ShadowRate = None,
    chat_encoding: flags.Encoding = None,
    max_waiting: flags.MaxWaiting = None,
    max_queue_seconds: flags.MaxQueueSeconds = None,
    threads: flags.Threads = None,
) -> None:
    """Serve a model over HTTP: OpenAI chat completions and completions, /health, /metrics."""
    options = flags.options_from(locals())
    from thalweg.server.access import load_keys
    from thalweg.server.request_log import write_request_log

    keys = load_keys(api_key, api_keys_file)
    listener = _listen(host, port)
    from thalweg.cli.progress import start_progress
    from thalweg.engine.runtime import build_runtime

    with start_progress() as progress:
        runtime = build_runtime(options, progress)
    _print_report(runtime)
    if enable_log_requests:
        write_request_log(sys.stderr.fileno())
    print(f"API keys of: {', '.join(keys.names)}" if keys.names else "no API key is needed")
    _run(runtime, keys, listener, shutdown_timeout)


def _run(runtime: Runtime, keys: ApiKeys, listener: socket.socket, drain_seconds: float) -> None:
    """Answer requests until a signal comes."""
    import uvicorn

    from thalweg.server.app import create_app
    from thalweg.server.service import Service

    app = create_app(Service(runtime), keys)

    class Server(uvicorn.Server):
        """SIGTERM drains; another signal, or SIGINT, ends the engine as soon as the step under way is over. Then open
        streams end with an error instead of being cut."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if sig == signal.SIGTERM and not runtime.engine.draining:
                threading.Thread(target=self._drain, args=(sig, frame)).start()
            else:
                threading.Thread(target=runtime.engine.close).start()
                super().handle_exit(sig, frame)

        def _drain(self, sig: int, frame: FrameType | None) -> None:
            runtime.engine.drain(drain_seconds)
            super().handle_exit(sig, frame)

    server = Server(
        uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE_SECONDS, timeout_keep_alive=75)
    )
    address, bound = listener.getsockname()[:2]
    print(f"ready on http://{f'[{address}]' if ':' in address else address}:{bound}/v1", flush=True)
    server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Bind before the model is loaded: a taken port should not cost a load."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # Connections inherit it; asyncio sets it only for sockets that name their protocol. Without it an answer on a
        # kept connection waits 40 ms for the client's acknowledgement of its headers.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", param="port") from error


def _print_report(runtime: Runtime) -> None:
    """What was chosen and why, what fits, and which kernels run. Plain text where the output is piped."""
    from rich.table import Table

    from thalweg.cli.progress import output

    console = output()
    choices = Table("setting", "value", "why", title="thalweg", title_justify="left")
    for choice in runtime.choices:
        choices.add_row(choice.what, choice.value, choice.reason)
    plan = runtime.cache_plan
    pools = Table("cache group", "blocks", "bytes per block", "MiB", title="pools", title_justify="left")
    for spec in plan.groups:
        blocks, size = plan.pool_blocks[spec.group], plan.layout.block_bytes(spec)
        pools.add_row(spec.group.value, f"{blocks:,}", f"{size:,}", f"{blocks * size / 2**20:,.1f}")
    fits = "; ".join(f"{plan.sequences_of(n)} of {n:,}" for n in _LENGTHS if n <= runtime.max_model_len)
    kernels: dict[tuple[str, str], list[str]] = {}
    for kernel in runtime.kernel_set.choices:
        kernels.setdefault((kernel.backend, kernel.reason), []).append(kernel.op)
    console.print(choices)
    console.print(pools)
    console.print(
        f"cache holds {plan.token_capacity:,} tokens; sequences of tokens that fit at once: {fits}", soft_wrap=True
    )
    if runtime.kernel_set.missing:
        console.print(f"no compiled kernels: {runtime.kernel_set.missing}; torch computes, slower", soft_wrap=True)
    for (backend, reason), ops in kernels.items():
        console.print(f"kernels: {backend} ({reason}): {', '.join(ops)}", soft_wrap=True)
