"""Flags that people bring along from vLLM, SGLang and ds4 command lines, in our terms.

What has a counterpart becomes it. What cannot change anything here is taken out, with a line that says why. What
promises something that is not there is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from thalweg.errors import ConfigError

_ALWAYS = "always so here"
_ONE_DEVICE = "the model runs on one device"
_BLOCKS = "the sizes of cache blocks follow from the model's compression ratios"
_TIERS = "the host tier is on unless --kv-host-memory is 0; lower tiers are written behind"
_ORDER = "what is computed next goes by uncached work and age"
# Without a value. Those that take one stand in _IGNORED.
_SWITCHES = {
    "enable-auto-tool-choice": _ALWAYS,
    "enable-cache-report": "ask for it with return_cache_report",
    "enable-chunked-prefill": _ALWAYS,
    "enable-expert-parallel": _ONE_DEVICE,
    "enable-hierarchical-cache": _TIERS,
    "enable-metrics": _ALWAYS,
    "enable-prompt-tokens-details": _ALWAYS,
    "trust-remote-code": "no code of a checkpoint is ever run",
}
_IGNORED = {
    "block-size": _BLOCKS,
    "hicache-storage-backend": "--kv-disk-dir names a directory for the disk tier",
    "hicache-write-policy": _TIERS,
    "long-prefill-token-threshold": _ORDER,
    "page-size": _BLOCKS,
    "schedule-policy": _ORDER,
    "speculative-config": "speculative decoding is not there yet; answers are the same without it",
    "swa-full-tokens-ratio": "window blocks have a pool of their own, sized by --max-num-seqs",
}
_V4 = ("auto", "deepseek_v4", "deepseekv4", "deepseek-v4")
_ONLY: dict[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(
        (
            "tensor-parallel-size", "tp-size", "tp", "data-parallel-size", "dp-size", "dp", "ep-size", "ep",
            "pipeline-parallel-size",
        ),
        (("1",), _ONE_DEVICE),
    ),
    **dict.fromkeys(("reasoning-parser", "tokenizer-mode", "tool-call-parser"), (_V4, "V4's own is always used")),
}  # fmt: skip
_TRANSLATED: dict[str, Callable[[str], list[str]]] = {
    "kv-disk-space-mb": lambda value: ["--kv-disk-space", f"{value}MB"],
    "kv-offloading-size": lambda value: ["--kv-host-memory", f"{value}GiB"],
    "model": lambda value: [value],
    "model-path": lambda value: [value],
}
_RENAMED = {"disable-radix-cache": "--no-enable-prefix-caching"}


def own_arguments(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Arguments of `serve` as it knows them, and a line about each that has no effect.

    Raises ConfigError where a flag asks for what is not there, or lacks its value.
    """
    own: list[str] = []
    notes: list[str] = []
    left = iter(arguments)
    for argument in left:
        name, equals, value = argument[2:].partition("=") if argument.startswith("--") else ("", "", "")
        if name in _SWITCHES:
            notes.append(f"--{name} has no effect: {_SWITCHES[name]}")
            continue
        if name not in _IGNORED and name not in _ONLY and name not in _TRANSLATED:
            own.append(_RENAMED.get(name, argument))
            continue
        if not equals:
            value = next(left, "")
            if not value:
                raise ConfigError(f"--{name}: a value is missing", param=name)
        if name in _TRANSLATED:
            own += _TRANSLATED[name](value)
            continue
        if name in _ONLY and value not in _ONLY[name][0]:
            allowed, why = _ONLY[name]
            raise ConfigError(f"--{name}: {value!r} is not {' or '.join(allowed)}: {why}", param=name)
        notes.append(f"--{name} {value} has no effect: {_IGNORED.get(name) or _ONLY[name][1]}")
    return own, notes
