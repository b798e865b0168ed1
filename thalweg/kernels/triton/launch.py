"""How a Triton kernel is launched at a model's true shapes: what the offline compiler and its table are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel as a served model launches it.

    `types` gives Triton's name of the type of every argument that is no constexpr ("*bf16", "*fp32", "*u8", "i64"), in
    the order of the function; `constants` all constexprs. Pointers and, of the integers, those in `aligned` are
    multiples of 16. `options` are num_warps and num_stages. `matrix`: the kernel multiplies on tensor cores, and the
    compiled code must show it.
    """

    op: str  # of spec.py
    what: str  # what tells it from other launches of the op: shape, dtype, pass
    kernel: Any  # the function under @triton.jit
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    matrix: bool = False
    aligned: tuple[str, ...] = ()
