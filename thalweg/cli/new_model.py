"""`thalweg new-model`: small random checkpoints with the layer pattern of a released model, for tests and demos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from thalweg.config.model import ModelConfig
from thalweg.config.model_parse import PUBLISHED, default_model, parse_model_config, read_config_json
from thalweg.config.options import parse_bytes
from thalweg.errors import ConfigError, nearest

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_DTYPES = ("bfloat16", "float32")
_LAYOUTS = ("official", "transformers")


def new_model(
    directory: Annotated[Path, typer.Argument(help="Directory to write; must be new or empty.")],
    like: Annotated[str, typer.Option(help="flash or pro: whose layer pattern to follow.")] = "flash",
    scale: Annotated[float, typer.Option(help="Share of the released model's widths.")] = 0.02,
    layers: Annotated[int, typer.Option(help="The first so many layers of the pattern.")] = 8,
    layout: Annotated[str, typer.Option(help="official or transformers tensor names.")] = "official",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    quantize: Annotated[bool, typer.Option("--quantize", help="FP8 matrices and FP4 experts.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the weights.", min=0, max=2**63 - 1)] = 0,
    vocab_size: Annotated[int | None, typer.Option(help="Vocabulary; the tokenizer's if left out.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 500MB.")] = "2GB",
    tokenizer: Annotated[Path | None, typer.Option(help="Directory whose tokenizer files are copied.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A config field: --set index_topk=64; lists with commas.")
    ] = None,
) -> None:
    """Write a random checkpoint that every part of thalweg, and transformers, can load."""
    for name, value, allowed in (("like", like, PUBLISHED), ("layout", layout, _LAYOUTS), ("dtype", dtype, _DTYPES)):
        if value not in allowed:
            hint = nearest(value, allowed)
            raise ConfigError(f"--{name}: {value!r} is not one of {', '.join(allowed)}.{hint}", param=name)
    if quantize and layout != "official":
        raise ConfigError("--quantize: only the official layout has FP8 and FP4 weights", param="quantize")
    source = tokenizer or default_model()
    files = [source / name for name in _TOKENIZER_FILES if (source / name).exists()]
    fields = scaled_config(like, scale, layers)
    fields["vocab_size"] = _vocabulary(source) if vocab_size is None else vocab_size
    fields |= _overrides(set_ or [], fields)
    fields["torch_dtype"] = dtype
    if not quantize:
        fields = {k: v for k, v in fields.items() if k not in ("quantization_config", "expert_dtype")}
    _write(directory, fields, (layout, dtype, quantize, seed, parse_bytes(max_shard_size, "max_shard_size")), files)


def _write(directory: Path, fields: dict[str, Any], form: tuple[str, str, bool, int, int], files: list[Path]) -> None:
    import torch

    from thalweg.checkpoint.random_model import random_parameters
    from thalweg.checkpoint.reader import CheckpointLayout
    from thalweg.checkpoint.writer import WriteFormat, write_checkpoint

    layout, dtype, quantize, seed, shard_bytes = form
    config = parse_model_config(fields)
    if quantize:
        _check_quantizable(config)
    plain = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    write_format = WriteFormat(CheckpointLayout(layout), plain, quantize, shard_bytes)
    total = write_checkpoint(directory, fields, random_parameters(config, seed), write_format, files)
    kinds = " ".join(kind.value for kind in config.layer_kinds)
    print(f"{directory}: {total:,} bytes, {config.num_layers} layers ({kinds})")


def _check_quantizable(config: ModelConfig) -> None:
    """FP4 has one scale for 32 inputs, and expert weights have no other quantised form here."""
    for name, size in (("hidden_size", config.hidden_size), ("moe_intermediate_size", config.moe_intermediate_size)):
        if size % 32:
            raise ConfigError(f"--quantize: {name} is {size}; FP4 experts need a multiple of 32", param=name)
    if config.expert_dtype != "fp4":
        raise ConfigError("--quantize writes fp4 experts; leave expert_dtype as it is", param="expert_dtype")


def _vocabulary(source: Path) -> int:
    """Ids of a tokenizer.json, without loading it as a tokenizer."""
    try:
        fields = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        added = [token["id"] for token in fields["added_tokens"]]
        return max([*fields["model"]["vocab"].values(), *added]) + 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{source}/tokenizer.json: cannot be read: {error!r}", param="tokenizer") from error


def scaled_config(like: str, scale: float, layers: int) -> dict[str, Any]:
    """The published config with widths times `scale` and counts times its square root, in sizes the formats allow."""
    fields = read_config_json(like)
    most = fields["num_hidden_layers"]
    if not 0 < scale <= 1:
        raise ConfigError(f"--scale: {scale} is not in (0, 1]", param="scale")
    if not 1 <= layers <= most:
        raise ConfigError(f"--layers: {layers} is not in 1 to {most}", param="layers")
    root = scale**0.5
    groups = max(2, round(fields["o_groups"] * root))
    head_dim = _power_of_two(fields["head_dim"] * root, 32)
    rope = max(8, head_dim // 8)
    routed = max(4, round(fields["n_routed_experts"] * scale))
    return fields | {
        "num_hidden_layers": layers,
        "compress_ratios": [*fields["compress_ratios"][:layers], 0],
        "hidden_size": _multiple(fields["hidden_size"] * scale),
        "num_attention_heads": groups * max(1, round(fields["num_attention_heads"] * root / groups)),
        "o_groups": groups,
        "head_dim": head_dim,
        "qk_rope_head_dim": rope,
        "q_lora_rank": _multiple(fields["q_lora_rank"] * root),
        "o_lora_rank": _multiple(fields["o_lora_rank"] * scale),
        "index_n_heads": max(4, round(fields["index_n_heads"] * root)),
        "index_head_dim": max(_power_of_two(fields["index_head_dim"] * root, 32), _power_of_two(rope, 8)),
        "index_topk": max(16, round(fields["index_topk"] * root)),
        "n_routed_experts": routed,
        "num_experts_per_tok": min(routed, max(2, round(fields["num_experts_per_tok"] * root))),
        "moe_intermediate_size": _multiple(fields["moe_intermediate_size"] * scale),
    }


def _multiple(size: float) -> int:
    """The nearest multiple of 32, at least 64: what FP4 groups need."""
    return max(64, round(size / 32) * 32)


def _power_of_two(size: float, least: int) -> int:
    """The largest power of two up to `size`, at least `least`."""
    return max(least, 1 << (max(1, int(size)).bit_length() - 1))


def _overrides(settings: list[str], known: dict[str, Any]) -> dict[str, Any]:
    """`field=value` pairs; a value with commas is a list. Lists of layers get the zeros of MTP blocks."""
    result: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if name not in known:
            raise ConfigError(f"--set {setting}: {name!r} is no config field.{nearest(name, known)}", param="set")
        if not equals:
            raise ConfigError(f"--set {setting}: write --set {name}=VALUE", param="set")
        try:
            result[name] = json.loads(f"[{text}]" if isinstance(known[name], list) else text)
        except ValueError:
            result[name] = text
    ratios = result.get("compress_ratios")
    if isinstance(ratios, list):
        layers = result.setdefault("num_hidden_layers", len(ratios))
        mtp = result.get("num_nextn_predict_layers", known["num_nextn_predict_layers"])
        if layers == len(ratios) and isinstance(mtp, int):  # else the parser of configs has something to say
            result["compress_ratios"] = ratios + [0] * mtp
    return result
