"""Triton's interpreter, repaired: kernels run on a CPU with the arithmetic that a GPU would do.

As it comes (3.6 to 3.9) it adds and multiplies the bit patterns of bfloat16, cuts fp32 to bfloat16 instead of rounding
and loses carries in casts to fp8; it also prepares the language anew in every call of one function by another, which
takes most of the time of small kernels. Programs run one after another: it proves arithmetic and indexing, never races.
"""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_BITS = {8: (torch.int8, np.uint8), 16: (torch.int16, np.uint16), 32: (torch.int32, np.uint32)}
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
_STOCK_CONVERT = interpreter._convert_float
_STOCK_PREPARE = interpreter._patch_lang


def repair() -> None:
    """Put the repaired casts and products in the place of the interpreter's own. Again is harmless."""
    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter._patch_lang = _prepare
    for name, operation in (("create_fadd", np.add), ("create_fsub", np.subtract), ("create_fmul", np.multiply)):
        setattr(interpreter.InterpreterBuilder, name, partialmethod(_element_by_element, operation=operation))


def _prepare(function: Any) -> Any:
    """The language as the interpreter wants it, for a function; nothing to be done if it is so already."""
    modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    if modules and not any(tl.core.is_builtin(module.load) for module in modules):
        return interpreter._LangPatchScope()
    return _STOCK_PREPARE(function)


def _convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Bits of `values` (an array of `source`) as `target`: to nearest, ties to even, fp8 saturating as a GPU does."""
    toward_zero = getattr(rounding, "name", "RTNE") == "RTZ"
    if source not in _TORCH or target not in _TORCH or toward_zero:
        return _STOCK_CONVERT(values, source, target, rounding)
    wide = _as_torch(values, source).float()
    if target in _LARGEST:
        wide = torch.where(wide.isnan(), wide, wide.clamp(-_LARGEST[target], _LARGEST[target]))
    signed, unsigned = _BITS[target.primitive_bitwidth]
    return wide.to(_TORCH[target]).view(signed).numpy().view(unsigned).reshape(np.shape(values))


def _as_torch(values: Any, dtype: Any) -> torch.Tensor:
    signed, unsigned = _BITS[dtype.primitive_bitwidth]
    bits = torch.from_numpy(np.array(values, order="C").view(unsigned).view(f"i{dtype.primitive_bitwidth // 8}"))
    return bits.view(signed).view(_TORCH[dtype])


def _wide(handle: Any) -> Any:
    """The values of an operand, in fp32 where they are narrower."""
    scalar = handle.dtype.scalar
    if scalar not in _TORCH or scalar is tl.float32:
        return handle.data
    return _as_torch(handle.data, scalar).float().numpy().reshape(handle.data.shape)


def _element_by_element(self: Any, a: Any, b: Any, *, operation: Any) -> Any:
    scalar = a.dtype.scalar
    if scalar is not tl.bfloat16:
        return self.binary_op(a, b, operation)
    values = operation(_wide(a), _wide(b))
    return interpreter.TensorHandle(_convert(values, tl.float32, scalar, None), scalar)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    product = np.matmul(_wide(a), _wide(b)).astype(d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)
