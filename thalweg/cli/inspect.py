"""`thalweg inspect`: what a model needs in memory, from its config alone. No weights are read and no tensor is made."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any

import typer

from thalweg.cache.geometry import CacheGroupSpec, Group, RowKind, StreamSpec, cache_groups
from thalweg.checkpoint.parameters import Parameter, Storage, parameters
from thalweg.config.model import ModelConfig
from thalweg.config.model_parse import load_model_config
from thalweg.config.options import parse_bytes
from thalweg.memory.capacity import (
    checkpoint_blocks,
    checkpoint_bytes,
    live_bytes,
    request_bytes,
    sequences_that_fit,
    unit_bytes,
)
from thalweg.memory.layout import CacheLayout, RowFormat

LENGTHS = (8 * 1024, 64 * 1024, 256 * 1024, 1024 * 1024)
FORMATS = {
    "fp8, fp4 index": (RowFormat.FP8, RowFormat.FP4),
    "fp8, fp8 index": (RowFormat.FP8, RowFormat.FP8),
    "bfloat16": (RowFormat.BFLOAT16, RowFormat.BFLOAT16),
    "float32": (RowFormat.FLOAT32, RowFormat.FLOAT32),
}
_STORED_BYTES = {"fp8": 1 + 1 / 128**2, "fp4": 0.5 + 1 / 32, "bf16": 2.0, "fp32": 4.0}  # of an element, with scales


def inspect(
    model: Annotated[
        str, typer.Argument(help="Model directory, config.json, `default`, `flash` or `pro`.")
    ] = "default",
    memory: Annotated[str, typer.Option(help="Memory for the cache, such as 80GiB.")] = "16GiB",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Print layers, parameters, cache bytes by group and how many sequences fit a memory."""
    facts = model_facts(load_model_config(model), parse_bytes(memory, "memory"))
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _print(model, facts)


def model_facts(config: ModelConfig, memory_bytes: int) -> dict[str, Any]:
    """Everything that `inspect` shows, in plain values; bytes unless the name says otherwise."""
    table = parameters(config)
    trunk = [p for p in table if not p.name.startswith("mtp.")]
    return {
        "layers": config.num_layers,
        "layer_kinds": [kind.value for kind in config.layer_kinds],
        "parameters": sum(p.elements for p in trunk),
        "mtp_parameters": sum(p.elements for p in table) - sum(p.elements for p in trunk),
        "active_parameters": round(sum(_active(p, config) for p in trunk)),
        "weight_bytes": round(sum(_stored_bytes(p, config) for p in table)),
        "max_position_embeddings": config.max_position_embeddings,
        "exact_replay_tokens": config.window * config.num_layers,
        "memory_bytes": memory_bytes,
        "formats": {name: _format_facts(config, form, memory_bytes) for name, form in FORMATS.items()},
    }


def _active(parameter: Parameter, config: ModelConfig) -> float:
    """Parameters that one token's forward pass uses."""
    share = config.experts_per_token / config.num_experts if parameter.storage is Storage.EXPERT else 1.0
    return parameter.elements * share


def _stored_bytes(parameter: Parameter, config: ModelConfig) -> float:
    """Bytes in the checkpoint, scales included."""
    if parameter.storage is Storage.FP32:
        return 4.0 * parameter.elements
    if parameter.storage is Storage.INT64:
        return 8.0 * parameter.elements
    if parameter.storage is Storage.BF16:
        return (4.0 if config.weight_dtype == "fp32" else 2.0) * parameter.elements
    form = config.expert_dtype if parameter.storage is Storage.EXPERT else config.weight_dtype
    return _STORED_BYTES[form] * parameter.elements


def _format_facts(config: ModelConfig, form: tuple[RowFormat, RowFormat], memory_bytes: int) -> dict[str, Any]:
    groups = cache_groups(config)
    layout = CacheLayout(form[0], form[1], config.rope_dim)
    fixed, unit = request_bytes(groups, layout), unit_bytes(groups, layout)
    return {
        "row_bytes": {kind: layout.row_bytes(stream) for kind, stream in _rows(groups).items()},
        "row_padding_bytes": {kind: layout.padding_bytes(stream) for kind, stream in _rows(groups).items()},
        "bytes_per_token": {s.group.value: layout.bytes_per_token(s) for s in groups if s.compressed},
        "bytes_per_token_total": unit / config.unit_tokens,
        "bytes_at_1m_tokens": unit * (2**20 // config.unit_tokens),
        "block_bytes": {s.group.value: layout.block_bytes(s) for s in groups},
        "checkpoint_bytes": {s.group.value: _checkpoint_bytes(s, layout) for s in groups if checkpoint_blocks(s)},
        "checkpoint_bytes_total": checkpoint_bytes(groups, layout),
        "window_bytes_if_stored_per_token": _window_row(groups, layout),
        "fixed_bytes_per_request": {s.group.value: live_bytes(s, layout) for s in groups if not s.compressed},
        "fixed_bytes_per_request_total": fixed,
        "sequences_that_fit": {
            str(n): sequences_that_fit(groups, layout, budget_bytes=memory_bytes, tokens=n) for n in LENGTHS
        },
        "sequences_that_fit_without_prefix_caching": {
            str(n): sequences_that_fit(groups, layout, budget_bytes=memory_bytes, tokens=n, prefix_caching=False)
            for n in LENGTHS
        },
    }


def _rows(groups: tuple[CacheGroupSpec, ...]) -> dict[str, StreamSpec]:
    """A stream of each kind of row whose format can be chosen."""
    return {s.kind.value: s for spec in groups for s in spec.streams if s.kind is not RowKind.STATE}


def _checkpoint_bytes(spec: CacheGroupSpec, layout: CacheLayout) -> int:
    return checkpoint_blocks(spec) * layout.block_bytes(spec)


def _window_row(groups: tuple[CacheGroupSpec, ...], layout: CacheLayout) -> int:
    window = next(s for s in groups if s.group is Group.WINDOW)
    return layout.block_bytes(window) // window.tokens_per_block


def _print(model: str, facts: dict[str, Any]) -> None:
    from rich.table import Table

    from thalweg.cli.progress import output

    console = output()
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(facts["layer_kinds"]).items())
    console.print(f"{model}: {facts['layers']} layers ({kinds})")
    console.print(f"order: {_runs(facts['layer_kinds'])}")
    console.print(
        f"parameters: {facts['parameters']:,} ({facts['active_parameters']:,} active per token), "
        f"MTP {facts['mtp_parameters']:,}; {facts['weight_bytes'] / 2**30:,.3f} GiB of weights as stored"
    )
    console.print(f"exact replay of a lost checkpoint: {facts['exact_replay_tokens']:,} tokens")
    formats = facts["formats"]
    table = Table("cache, bytes", *formats, title_justify="left")
    for kind in next(iter(formats.values()))["row_bytes"]:
        table.add_row(f"{kind} row", *(f"{f['row_bytes'][kind]:,}" for f in formats.values()))
        table.add_row(f"  padding in a {kind} row", *(f"{f['row_padding_bytes'][kind]}" for f in formats.values()))
    for group in next(iter(formats.values()))["bytes_per_token"]:
        table.add_row(f"{group} per token", *(f"{f['bytes_per_token'][group]:,.1f}" for f in formats.values()))
    rows = (
        ("growing per token", "bytes_per_token_total", 1, ",.1f", ""),
        ("growing at 1M tokens", "bytes_at_1m_tokens", 2**30, ",.2f", " GiB"),
        ("window if stored per token", "window_bytes_if_stored_per_token", 1, ",", ""),
        ("one checkpoint (window + tail)", "checkpoint_bytes_total", 2**20, ",.2f", " MiB"),
        ("fixed per running request", "fixed_bytes_per_request_total", 2**20, ",.2f", " MiB"),
    )
    for title, key, divisor, form, unit in rows:
        cells = (f[key] if divisor == 1 else f[key] / divisor for f in formats.values())
        table.add_row(title, *(f"{cell:{form}}{unit}" for cell in cells))
    for title, key in (("of a checkpoint", "checkpoint_bytes"), ("of a request", "fixed_bytes_per_request")):
        for group in next(iter(formats.values()))[key]:
            cells = (f[key][group] / 2**20 for f in formats.values())
            table.add_row(f"  {title}: {group}", *(f"{cell:,.2f} MiB" for cell in cells))
    for key, remark in (("", ""), ("_without_prefix_caching", ", no prefix caching")):
        for length in LENGTHS:
            title = f"sequences of {length // 1024}K in {facts['memory_bytes'] / 2**30:,.4g} GiB{remark}"
            table.add_row(title, *(f"{f['sequences_that_fit' + key][str(length)]:,}" for f in formats.values()))
    console.print(table)


def _runs(kinds: list[str]) -> str:
    """`2 x window, 20 x (csa hca), csa`: the order of layers with repeats folded."""
    parts: list[str] = []
    i = 0
    while i < len(kinds):
        pair = kinds[i : i + 2]
        pairs = 1
        while len(pair) == 2 and pair[0] != pair[1] and kinds[i + 2 * pairs : i + 2 * pairs + 2] == pair:
            pairs += 1
        if pairs > 1:
            parts.append(f"{pairs} x ({' '.join(pair)})")
            i += 2 * pairs
            continue
        same = 1
        while i + same < len(kinds) and kinds[i + same] == kinds[i]:
            same += 1
        parts.append(kinds[i] if same == 1 else f"{same} x {kinds[i]}")
        i += same
    return ", ".join(parts)
