"""Benchmark clients: `python -m benchmarks.clients OUT.jsonl --aiperf PROGRAM --guidellm PROGRAM`, on the real server.

aiperf (every API and both ways to count tokens) and guidellm run as their users run them, each in an environment of its
own: `pip install aiperf==0.13.0`, `pip install guidellm==0.8.1`. One JSON line per run: the tool's main figures, which
of its figures stayed empty, and what it complained of. A healthy server leaves both lists empty, but for Responses:
aiperf does not read the usage of answers that their limit cut, which end with response.incomplete as at OpenAI's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.commit import commit_name
from thalweg.cli.demo import machine_facts, running_server
from thalweg.config.model_parse import default_model
from thalweg.evaluation.exam import model_name

REQUESTS, CONCURRENCY, PREFIX_TOKENS, PROMPT_TOKENS, OUTPUT_TOKENS = 32, 4, 256, 512, 48
RUN_SECONDS = 600
# Figures of aiperf by their names in its JSON file.
_AIPERF = (
    "time_to_first_token", "time_to_second_token", "inter_token_latency", "request_latency", "input_sequence_length",
    "output_sequence_length", "output_token_throughput", "output_token_throughput_per_user", "total_token_throughput",
    "request_throughput", "effective_prefill_throughput", "effective_concurrency",
)  # fmt: skip
_AIPERF_USAGE = (
    "usage_prompt_tokens", "usage_completion_tokens", "usage_prompt_cache_read_tokens",
    "overall_usage_prompt_cache_read_pct",
)  # fmt: skip
# What aiperf keeps of /metrics: gauges, counters and histograms by vLLM's names.
_SERVER = (
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits", "vllm:generation_tokens", "vllm:prompt_tokens", "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds", "vllm:e2e_request_latency_seconds", "vllm:request_success",
)  # fmt: skip
_GUIDELLM = (
    "request_latency", "time_to_first_token_ms", "time_per_output_token_ms", "inter_token_latency_ms",
    "prompt_token_count", "output_token_count", "requests_per_second", "request_concurrency",
    "output_tokens_per_second", "tokens_per_second",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Variant:
    """One run of aiperf. `exact`: the API can be told to write so many tokens and no fewer."""

    name: str
    endpoint: str
    flags: tuple[str, ...] = ()
    exact: bool = True

    def expects(self, line: str) -> bool:
        """Whether a complaint is not about the server: of the client's own speed, or of what its API cannot ask for."""
        return "EventLoopMonitor" in line or (not self.exact and bool(re.search("OSL mismatch|--osl", line)))

    @property
    def counted_by_server(self) -> bool:
        return "--use-server-token-count" in self.flags


_COMPLAINT = re.compile(r" - (WARNING|ERROR|CRITICAL) - ")
_COUNTED = ("--use-server-token-count",)
_VARIANTS = (
    Variant("chat", "chat", (*_COUNTED, "--per-chunk-usage", "--reset-kv-cache", "--server-profiler")),
    Variant("chat, tokens counted by the client", "chat"),
    Variant("completions", "completions", _COUNTED),
    Variant("messages", "messages", _COUNTED, exact=False),
    Variant("responses", "responses", _COUNTED, exact=False),
)


def aiperf(program: str, url: str, model: str, variant: Variant) -> dict[str, Any]:
    """One run against a server."""
    with tempfile.TemporaryDirectory() as folder:
        exact = ("--extra-inputs", "ignore_eos:true", "--extra-inputs", f"min_tokens:{OUTPUT_TOKENS}")
        _run(
            program, "profile", "--model", model, "--url", url, "--endpoint-type", variant.endpoint, "--streaming",
            "--tokenizer", default_model(), "--concurrency", CONCURRENCY, "--request-count", REQUESTS,
            "--prompt-prefix-pool-size", 1, "--prompt-prefix-length", PREFIX_TOKENS,
            "--prompt-input-tokens-mean", PROMPT_TOKENS, "--prompt-input-tokens-stddev", 0,
            "--prompt-output-tokens-mean", OUTPUT_TOKENS, "--random-seed", 1, "--no-gpu-telemetry",
            "--output-artifact-dir", folder, *variant.flags, *(exact if variant.exact else ()),
        )  # fmt: skip
        told = json.loads(Path(folder, "profile_export_aiperf.json").read_text())
        scraped = json.loads(Path(folder, "server_metrics_export.json").read_text())["metrics"]
        log = Path(folder, "logs", "aiperf.log").read_text()
    wanted = _AIPERF + (_AIPERF_USAGE if variant.counted_by_server else ())
    found = {name: told[name]["avg"] for name in wanted if told.get(name)}
    complaints = [line for line in log.splitlines() if _COMPLAINT.search(line) and not variant.expects(line)]
    complaints += [f"error: {error}" for error in told["error_summary"]]
    if told["request_count"]["avg"] != REQUESTS or not told["is_complete"]:
        complaints.append(f"{told['request_count']['avg']} of {REQUESTS} requests were completed")
    if variant.exact and variant.counted_by_server and told["osl_mismatch_count"]["avg"]:
        complaints.append(f"{told['osl_mismatch_count']['avg']} answers of another length than asked for")
    return {
        "tool": "aiperf",
        "version": told["aiperf_version"],
        "variant": variant.name,
        "figures": found,
        "server_metrics": len(scraped),
        "empty": [*_empty(wanted, found), *_empty(_SERVER, scraped)],
        "complaints": complaints,
    }


def guidellm(program: str, url: str, model: str) -> dict[str, Any]:
    """One run of the concurrent profile against a server."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        _run(
            program, "run", "--backend", f"kind=openai_http,target={url},model={model}",
            "--profile", f"kind=concurrent,streams={CONCURRENCY}",
            "--constraint", f"kind=max_requests,count={REQUESTS}",
            "--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}",
            "--tokenizer", f"kind=huggingface_auto,model={default_model()}", "--output", f"kind=json,path={out}",
            "--disable-console",
        )  # fmt: skip
        told = json.loads(out.read_text())
    (benchmark,) = told["benchmarks"]
    metrics = {name: (benchmark["metrics"].get(name) or {}).get("successful") or {} for name in _GUIDELLM}
    found = {name: figure["mean"] for name, figure in metrics.items() if figure.get("mean")}
    made = benchmark["scheduler_metrics"]["requests_made"]
    complaints = [*benchmark["warnings"]]
    if made["successful"] != REQUESTS:
        complaints.append(f"requests: {made}")
    if found.get("output_token_count") != OUTPUT_TOKENS:
        complaints.append(f"{found.get('output_token_count')} output tokens, not {OUTPUT_TOKENS}")
    return {
        "tool": "guidellm",
        "version": told["metadata"]["guidellm_version"],
        "variant": "chat",
        "figures": found,
        "empty": _empty(_GUIDELLM, found),
        "complaints": complaints,
    }


def _empty(wanted: Iterable[str], found: Mapping[str, Any]) -> list[str]:
    return [name for name in wanted if not found.get(name)]


def _run(*words: object) -> None:
    """A client, which takes a directory as a tokenizer only if it believes that it may ask the hub."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    command = list(map(str, words))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--aiperf", default="aiperf", help="the program")
    parser.add_argument("--guidellm", default="guidellm", help="the program")
    options = parser.parse_args()
    common = {"requests": REQUESTS, "concurrency": CONCURRENCY, "output_tokens": OUTPUT_TOKENS}
    with running_server("default", "--threads", "1") as (client, _), options.out.open("a") as file:
        model = model_name(client)
        runs = (
            *((lambda v=variant: aiperf(options.aiperf, client.url, model, v)) for variant in _VARIANTS),
            lambda: guidellm(options.guidellm, client.url, model),
        )
        for run in runs:
            facts = {"commit": commit_name(), **run(), **common, **machine_facts()}
            file.write(json.dumps(facts) + "\n")
            file.flush()
            print(json.dumps({name: facts[name] for name in ("tool", "variant", "figures", "empty", "complaints")}))


if __name__ == "__main__":
    main()
