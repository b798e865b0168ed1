"""Filling engine parameters from a checkpoint: every one exactly once, nothing left over, one shard at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from thalweg.checkpoint.formats import FP4_GROUP, FP8_BLOCK, dequantize_fp4, dequantize_fp8
from thalweg.checkpoint.parameters import SCALES, Parameter, Piece, Storage, parameters
from thalweg.checkpoint.reader import Checkpoint, CheckpointLayout, TensorEntry
from thalweg.errors import CheckpointError, nearest

_NAMED_AT_ONCE = 10
_PLAIN = {"BF16", "F32", "F16"}
_FP8, _PACKED_FP4, _SCALE = "F8_E4M3", {"I8", "U8"}, {"F8_E8M0", "U8"}


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was read. `skipped` are duplicates of shared tensors inside MTP blocks."""

    tensors: int
    parameters: int
    bytes_read: int
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """One weight tensor of the checkpoint, the parameter it fills and its scale tensor if it is quantised."""

    parameter: Parameter
    piece: Piece
    entry: TensorEntry
    scale: str | None


def load_parameters(
    checkpoint: Checkpoint,
    destination: Mapping[str, Tensor],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> LoadReport:
    """Fill `destination` (engine name -> tensor of the parameter's shape) in place. What is kept in its own bytes has
    its scales there too, under its name and SCALES.

    progress(done, total) counts weight tensors. Raises CheckpointError naming missing, surplus or misshapen tensors
    before anything is read, and expert ids (tid2eid) out of range when they are.
    """
    sources, skipped = _resolve(checkpoint)
    shards: dict[str, list[_Source]] = {}
    for source in sources.values():
        shards.setdefault(str(source.entry.shard), []).append(source)
    done, read = 0, 0
    for shard in sorted(shards):
        for count in _load_shard(checkpoint, shard, shards[shard], destination):
            read += count
            done += 1
            if progress is not None:
                progress(done, len(sources))
    return LoadReport(done, len(parameters(checkpoint.config)), read, skipped)


def kept_forms(checkpoint: Checkpoint, forms: frozenset[torch.dtype]) -> dict[str, torch.dtype]:
    """Which of `forms` a parameter can be kept in, by its name: its own, or bfloat16, which holds FP8 and FP4 under
    power-of-two scales exactly. float8_e4m3fn stands for FP8 with scales, uint8 for pairs of FP4 with scales."""
    stored: dict[str, set[torch.dtype | None]] = {}
    for source in _resolve(checkpoint)[0].values():
        stored.setdefault(source.parameter.name, set()).add(_stored_form(source))
    narrow = {name: own for name, own in stored.items() if None not in own}
    return {
        name: form
        for name, own in narrow.items()
        if (form := own.pop() if len(own) == 1 and own <= forms else torch.bfloat16) in forms and form is not None
    }


def _stored_form(source: _Source) -> torch.dtype | None:
    """The form that has this tensor's bytes, bfloat16 if its blocks do not fit the parameter; None: wider ones."""
    if source.scale is None:
        return torch.bfloat16 if source.entry.dtype == "BF16" else None
    parameter = source.parameter
    if len(source.piece.shape) > 2:
        return torch.bfloat16
    if source.entry.dtype != _FP8:
        return torch.uint8
    whole = parameter.groups == 1 or parameter.shape[-2] // parameter.groups % FP8_BLOCK == 0
    return torch.float8_e4m3fn if whole else torch.bfloat16


def _load_shard(
    checkpoint: Checkpoint, shard: str, sources: list[_Source], destination: Mapping[str, Tensor]
) -> Iterator[int]:
    """Fill what one file holds; yields the bytes of each weight. The file is mapped only while this runs."""
    with _open(shard) as file:
        for source in sources:
            weight = _tensor(file, source.entry.stored_name)
            if source.parameter.storage is Storage.INT64:
                _check_expert_ids(source.piece.name, weight, checkpoint.config.num_experts)
            scale = None if source.scale is None else _scale(checkpoint, source.scale, shard, file)
            _fill(destination, source, weight, scale)
            yield weight.numel() * weight.element_size()


def _resolve(checkpoint: Checkpoint) -> tuple[dict[str, _Source], tuple[str, ...]]:
    """Match the table of parameters with the tensors that are there; every mismatch is an error."""
    official = checkpoint.layout is CheckpointLayout.OFFICIAL
    sources: dict[str, _Source] = {}
    missing, wrong = [], []
    for parameter in parameters(checkpoint.config):
        for piece in parameter.official if official else parameter.transformers:
            entry = checkpoint.tensors.get(piece.name)
            if entry is None:
                missing.append(piece.name)
                continue
            scale, problem = _form(checkpoint, parameter, piece, entry)
            if problem:
                wrong.append(problem)
            sources[piece.name] = _Source(parameter, piece, entry, scale)
    if missing:
        _fail("missing", missing, checkpoint.tensors)
    if wrong:
        raise CheckpointError("; ".join(wrong[:_NAMED_AT_ONCE]), param=wrong[0].split(" ")[1])
    used = set(sources) | {s.scale for s in sources.values() if s.scale}
    left = sorted(set(checkpoint.tensors) - used)
    skipped = tuple(name for name in left if _is_mtp_duplicate(name))
    surplus = [name for name in left if name not in skipped]
    if surplus:
        _fail("not a tensor of this model", surplus, sources)
    return sources, skipped


def _fail(what: str, names: list[str], known: Iterable[str]) -> None:
    listed = ", ".join(names[:_NAMED_AT_ONCE]) + (f" and {len(names) - _NAMED_AT_ONCE} more" * (len(names) > 10))
    raise CheckpointError(f"{len(names)} tensors {what}: {listed}.{nearest(names[0], known)}", param=names[0])


def _is_mtp_duplicate(name: str) -> bool:
    """Embedding and head are shared with the trunk; some checkpoints carry them again in the MTP block."""
    parts = name.split(".")
    return parts[0] == "mtp" and len(parts) > 2 and (parts[2].startswith("emb") or parts[2] == "head")


def _form(
    checkpoint: Checkpoint, parameter: Parameter, piece: Piece, entry: TensorEntry
) -> tuple[str | None, str | None]:
    """The scale tensor that a weight needs, and what is wrong with its shape or dtype."""
    name, shape = piece.name, piece.shape
    if parameter.storage is Storage.INT64:
        return None, _mismatch(name, entry, shape, {"I64", "I32"})
    if entry.dtype in _PLAIN:
        return None, _mismatch(name, entry, shape, _PLAIN)
    quantizable = parameter.storage in (Storage.MATRIX, Storage.EXPERT)
    scale_name = name.removesuffix(".weight") + ".scale"
    rows, columns = shape[-2:] if len(shape) > 1 else (shape[0], 1)
    if quantizable and entry.dtype == _FP8:
        wanted, scale_shape = shape, (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    elif parameter.storage is Storage.EXPERT and entry.dtype in _PACKED_FP4:
        wanted, scale_shape = (rows, columns // 2), (rows, columns // FP4_GROUP)
    else:
        return None, f"tensor {name} has dtype {entry.dtype}, which is not supported for it"
    problem = _mismatch(name, entry, wanted, {entry.dtype})
    scale = checkpoint.tensors.get(scale_name)
    if scale is None:
        return None, problem or f"tensor {scale_name} is missing: {name} is stored as {entry.dtype}"
    return scale_name, problem or _mismatch(scale_name, scale, scale_shape, _SCALE)


def _mismatch(name: str, entry: TensorEntry, shape: tuple[int, ...], dtypes: set[str]) -> str | None:
    if entry.shape != shape:
        return f"tensor {name} has shape {list(entry.shape)}, expected {list(shape)}"
    if entry.dtype not in dtypes:
        return f"tensor {name} has dtype {entry.dtype}, expected {' or '.join(sorted(dtypes))}"
    return None


def _open(shard: str) -> safe_open:
    try:
        return safe_open(shard, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard}: not a readable safetensors file: {error}", param=shard) from error


def _tensor(file: safe_open, name: str) -> Tensor:
    try:
        return cast(Tensor, file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"tensor {name} cannot be read: {error}", param=name) from error


def _check_expert_ids(name: str, table: Tensor, experts: int) -> None:
    if int(table.min()) < 0 or int(table.max()) >= experts:
        raise CheckpointError(f"tensor {name} has expert ids outside 0 to {experts - 1}", param=name)


def _scale(checkpoint: Checkpoint, name: str, shard: str, file: safe_open) -> Tensor:
    """From the open shard where the scale is in it: parsing a header anew for every weight would take minutes."""
    other = str(checkpoint.tensors[name].shard)
    if other == shard:
        return _tensor(file, name)
    with _open(other) as elsewhere:
        return _tensor(elsewhere, name)


def _fill(destination: Mapping[str, Tensor], source: _Source, weight: Tensor, scale: Tensor | None) -> None:
    """Copy into the parameter, or into its part for one expert; dequantised unless it is kept in its own bytes."""
    name, piece = source.parameter.name, source.piece
    target = destination[name]
    if scale is None:
        _part(target, piece).copy_(weight)
        return
    fp8 = weight.dtype == torch.float8_e4m3fn
    if target.dtype is (torch.float8_e4m3fn if fp8 else torch.uint8):
        _part(target, piece).copy_(weight.view(target.dtype))
        _part(destination[name + SCALES], piece, FP8_BLOCK if fp8 else 1).copy_(scale.view(torch.uint8))
        return
    _part(target, piece).copy_(dequantize_fp8(weight, scale) if fp8 else dequantize_fp4(weight, scale))


def _part(target: Tensor, piece: Piece, rows: int = 1) -> Tensor:
    """Where a piece goes, in a tensor that has one row for every so many of the parameter's."""
    if piece.expert is None:
        return target
    return target[piece.expert, piece.first_row // rows : -(-(piece.first_row + piece.shape[0]) // rows)]
