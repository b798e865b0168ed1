"""Engine options: one frozen value from a file, the environment (THALWEG_*) and flags, in that order of precedence."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any

from thalweg.errors import ConfigError, nearest

_BYTE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_BYTES = ("kv_cache_memory", "kv_host_memory", "kv_disk_space")
_POLICIES = ("boundary", "full", "exact-replay", "bounded-replay")
_BYTE_UNITS |= {"K": 2**10, "M": 2**20, "G": 2**30, "TIB": 2**40, "TB": 10**12, "T": 2**40}
_SAME_FORMAT = {"fp8_e4m3": "fp8", "bf16": "bfloat16"}  # what users of other engines type

_PROFILES = resources.files("thalweg") / "data" / "profiles"
_OF_SERVERS = frozenset({"THALWEG_API_KEY"})  # variables that are no engine options


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a user may set. None means: chosen at start-up, with the reason shown."""

    model: str = "default"  # a directory, or `default` for the embedded model
    served_model_name: str | None = None
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = "auto"  # auto, float32, bfloat16: weights and activations
    kv_cache_dtype: str = "auto"  # auto, float32, bfloat16, fp8: window, CSA and HCA rows
    index_cache_dtype: str = "auto"  # auto, float32, bfloat16, fp8, fp4: index keys
    quantization_simulation: bool = False  # round KV to FP8 and the index to FP4 as the released model was trained
    kernels: str = "auto"  # auto, reference, triton, plain, avx2, avx512: what computes
    deterministic: bool = False  # logits bit-equal in any batch, chunking and after any cache hit
    max_model_len: int | None = None  # tokens of prompt and output
    max_num_seqs: int = 16  # running requests
    max_num_batched_tokens: int = 1024  # tokens of one step
    kv_cache_memory: int | None = None  # bytes of all pools
    memory_utilization: float | None = None  # where that is not set: weights and pools, as a share of the memory
    enable_prefix_caching: bool = True
    window_policy: str = "boundary"  # boundary, full, interval:K, exact-replay, bounded-replay (approximate)
    checkpoint_interval: int = 4096  # boundary policy: tokens between checkpoints kept of a long prompt; 0: none
    kv_host_memory: int | None = None  # bytes of the host tier and of requests that gave way; 0: none
    kv_host_ratio: float = 0.25  # the same as a share of the pools, where kv_host_memory is not set
    kv_disk_dir: str | None = None  # directory of the disk tier; None: none
    kv_disk_space: int = 20 * 2**30  # bytes that the disk tier never exceeds
    shadow_rate: float = 0.0  # share of hits that is computed again cold in idle time and compared
    chat_encoding: str = "preview"  # preview or later: the revision of the chat encoder the checkpoint was trained with
    max_waiting: int = 1024  # requests queued before 429
    max_queue_seconds: float | None = None  # expected seconds to the first token before 429; None: any
    threads: int | None = None  # intra-op threads


def parse_bytes(value: int | str, name: str) -> int:
    """A byte count such as 4294967296, "4GiB" or "500 MB". Raises ConfigError naming the option."""
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*", str(value), re.ASCII)
    unit = _BYTE_UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"{name}: {value!r} is not a number of bytes; write for example 4GiB or 500MB", param=name)
    return int(Fraction(match.group(1)) * unit)


def _typed(name: str, value: Any) -> Any:
    """Bring a value from a file, a variable or a flag to the option's type."""
    declared = str(EngineOptions.__dataclass_fields__[name].type)
    if name in _BYTES and value is not None:
        return parse_bytes(value, name)
    if declared.startswith("bool"):
        word = str(value).strip().lower()
        if word not in {"true", "false", "1", "0", "yes", "no", "on", "off"}:
            raise ConfigError(f"{name}: {value!r} is not a boolean; write true or false", param=name)
        return word in {"true", "1", "yes", "on"}
    if declared.startswith("int") and value is not None:
        try:
            return int(str(value))  # by its text: 3.5 and true are no whole numbers
        except ValueError:
            raise ConfigError(f"{name}: {value!r} is not a whole number", param=name) from None
    if declared.startswith("float") and value is not None:
        try:
            return float(str(value))
        except ValueError:
            raise ConfigError(f"{name}: {value!r} is not a number", param=name) from None
    if isinstance(value, dict | list):
        raise ConfigError(f"{name}: {value!r} is not a text", param=name)
    if name in ("kv_cache_dtype", "index_cache_dtype"):
        return _SAME_FORMAT.get(str(value), str(value))
    return value if value is None else str(value)


def _check(options: EngineOptions) -> None:
    positive = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory", "threads", "max_waiting")
    for name in positive:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}: {value} is below the least allowed value 1", param=name)
    if options.max_num_batched_tokens <= options.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens: {options.max_num_batched_tokens} must be above max_num_seqs, "
            f"{options.max_num_seqs}: each decoding request takes one token of a step, and prompts need some too",
            param="max_num_batched_tokens",
        )
    if options.checkpoint_interval < 0:
        raise ConfigError(f"checkpoint_interval: {options.checkpoint_interval} is below 0", param="checkpoint_interval")
    if options.kv_disk_dir == "":
        raise ConfigError("kv_disk_dir: an empty name; leave the option out for no disk tier", param="kv_disk_dir")
    if options.max_queue_seconds is not None and not options.max_queue_seconds > 0:
        raise ConfigError(f"max_queue_seconds: {options.max_queue_seconds} is not above 0", param="max_queue_seconds")
    if options.memory_utilization is not None and not 0 < options.memory_utilization <= 1:
        raise ConfigError(
            f"memory_utilization: {options.memory_utilization} is not above 0 and at most 1", param="memory_utilization"
        )
    if not 0 <= options.kv_host_ratio < float("inf"):
        raise ConfigError(f"kv_host_ratio: {options.kv_host_ratio} is below 0 or not finite", param="kv_host_ratio")
    if not 0 <= options.shadow_rate <= 1:
        raise ConfigError(f"shadow_rate: {options.shadow_rate} is not between 0 and 1", param="shadow_rate")
    split_window_policy(options.window_policy)
    choices = {
        "device": ("auto", "cpu", "cuda"),
        "dtype": ("auto", "float32", "bfloat16"),
        "kv_cache_dtype": ("auto", "float32", "bfloat16", "fp8"),
        "index_cache_dtype": ("auto", "float32", "bfloat16", "fp8", "fp4"),
        "kernels": ("auto", "reference", "triton", "plain", "avx2", "avx512"),
        "chat_encoding": ("preview", "later"),
    }
    for name, allowed in choices.items():
        if getattr(options, name) not in allowed:
            raise ConfigError(f"{name}: {getattr(options, name)!r} is not one of {', '.join(allowed)}", param=name)


def split_window_policy(value: str) -> tuple[str, int | None]:
    """`interval:K` as its name and K; other policies with None. Raises ConfigError."""
    name, _, tokens = value.partition(":")
    if name == "interval" and tokens.isascii() and tokens.isdigit() and int(tokens) > 0:
        return name, int(tokens)
    if value not in _POLICIES:
        raise ConfigError(
            f"window_policy: {value!r} is not one of {', '.join(_POLICIES)}, interval:K (K in tokens)."
            f"{nearest(value, _POLICIES)}",
            param="window_policy",
        )
    return value, None


def profile_names() -> list[str]:
    """The endpoint profiles that come with thalweg: one for each shape of traffic, a file of options each."""
    return sorted(path.name.removesuffix(".toml") for path in _PROFILES.iterdir() if path.name.endswith(".toml"))


def profile_text(name: str) -> str:
    """The file of an endpoint profile. Raises ConfigError with the nearest name."""
    known = profile_names()
    if name not in known:
        raise ConfigError(f"profile: {name!r} is not one of {', '.join(known)}.{nearest(name, known)}", param="profile")
    return (_PROFILES / f"{name}.toml").read_text()


def load_options(
    flags: Mapping[str, Any],
    *,
    profile: str | None = None,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> EngineOptions:
    """Merge an endpoint profile, a TOML file, THALWEG_* variables and flags (flags that are None were not given).

    Raises ConfigError for unknown names, with the nearest known one, and for values out of range.
    """
    known = [f.name for f in fields(EngineOptions)]
    merged: dict[str, Any] = {} if profile is None else _of_toml(profile_text(profile))
    if file is not None:
        try:
            merged |= _of_toml(file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"--config {file}: {error}", param="config") from error
    source = os.environ if environment is None else environment
    prefix = "THALWEG_"
    merged |= {k[len(prefix) :].lower(): v for k, v in source.items() if k.startswith(prefix) and k not in _OF_SERVERS}
    merged |= {k: v for k, v in flags.items() if v is not None}
    for name in merged:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}.{nearest(name, known)}", param=name)
    options = EngineOptions(**{name: _typed(name, value) for name, value in merged.items()})
    _check(options)
    return options


def _of_toml(text: str) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in tomllib.loads(text).items()}
