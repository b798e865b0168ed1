"""Checks backends against the reference in float64, and that their rows keep their bits in any company.

Where spec.py's tolerance is 0 the reference's own result, in fp32, is the measure: bit for bit, any NaN being one. With
bfloat16 inputs a result may be off by what rounding to bfloat16 does (NARROW_TOLERANCE), and what is exact stays exact.
Everything is made on torch's default device, so that a GPU's kernels are checked under `with torch.device("cuda")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from thalweg.kernels.backends import DETERMINISTIC, Backend
from thalweg.kernels.cases.case import Bind, Bound, Case, Source
from thalweg.kernels.reference.backend import reference_kernels
from thalweg.kernels.spec import OPS, spec_of

THREADS = (2, 3)  # beside one
NARROW_TOLERANCE = (
    2.0**-7
)  # of the largest magnitude: bfloat16 has 8 bits, and sums of rounded values are rounded again
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Double(TorchFunctionMode):
    """The reference's equations in float64: what would be fp32 is wider, but for bits that are read as fp32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        if func is Tensor.view:
            return func(*args, **(kwargs or {}))
        given = [torch.float64 if value is torch.float32 else value for value in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*given, **named)


@contextmanager
def _in_double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double():
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(slots=True)
class Verdict:
    """What came of one op of one backend: the largest error of all cases, and everything that was wrong."""

    op: str
    backend: str
    rows_checked: bool
    dtype: torch.dtype = torch.float32
    cases: int = 0
    error: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def tolerance(self) -> float:
        """Of the largest magnitude where inputs are bfloat16."""
        exact = spec_of(self.op).tolerance
        return exact if self.dtype is torch.float32 or exact == 0 else NARROW_TOLERANCE


def verdicts(
    backends: tuple[Backend, ...],
    cases: list[Case],
    seed: int,
    done: Callable[[], None],
    dtype: torch.dtype = torch.float32,
) -> list[Verdict]:
    """One for each op that each backend has of its own, with inputs of one dtype; `done` is called after every case."""
    with _threads(1):
        return _verdicts(backends, cases, seed, done, dtype)


def _verdicts(
    backends: tuple[Backend, ...], cases: list[Case], seed: int, done: Callable[[], None], dtype: torch.dtype
) -> list[Verdict]:
    found: dict[tuple[str, str], Verdict] = {}
    able = [(backend, backend.kernels) for backend in backends if backend.kernels is not None]
    for number, case in enumerate(cases):
        bind = case.inputs(Source(seed + number, narrow=dtype is torch.bfloat16))
        expected = _expected(case, bind, dtype)
        for backend, kernels in able:
            if case.op not in _ops(backend):
                continue
            verdict = found.setdefault((case.op, backend.name), Verdict(case.op, backend.name, backend.exact, dtype))
            verdict.cases += 1
            try:
                _check(case, bind(kernels, dtype), expected, backend, verdict)
            except Exception as error:  # a kernel that raises has failed this case, not the report
                verdict.failures.append(f"{case.shape}: {type(error).__name__}: {error}")
        done()
    return list(found.values())


def _ops(backend: Backend) -> tuple[str, ...]:
    """Its own ones; of the deterministic backend all, for its promise covers what it takes from the reference."""
    everything = tuple(spec.name for spec in OPS)
    own = backend.own_ops()
    return everything if backend.name == DETERMINISTIC else tuple(op for op in everything if op in own)


def _expected(case: Case, bind: Bind, dtype: torch.dtype) -> tuple[Tensor, ...]:
    if spec_of(case.op).tolerance == 0:
        return case.comparable(bind(reference_kernels(), dtype)(None)())
    with _in_double():
        return case.comparable(bind(reference_kernels(), torch.float64)(None)())


def _check(case: Case, bound: Bound, expected: tuple[Tensor, ...], backend: Backend, verdict: Verdict) -> None:
    result = case.comparable(bound(None)())
    tolerance = verdict.tolerance
    for ours, exact in zip(result, expected, strict=True):
        if ours.shape != exact.shape:
            verdict.failures.append(f"{case.shape}: the shape is {tuple(ours.shape)}, not {tuple(exact.shape)}")
            return
        error = _error(ours, exact, verdict.dtype) if tolerance else float(not same_bits(ours, exact))
        verdict.error = max(verdict.error, error)
        if error > tolerance:
            what = f"an error of {error:.2g}, allowed {tolerance:g}" if tolerance else "not the exact result"
            verdict.failures.append(f"{case.shape}: {what}")
    if backend.exact:
        wrong = _company(case, bound, backend.any_threads)
        verdict.failures += [f"{case.shape}: {wrong}"] if wrong else []


def _error(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """The largest difference, with bfloat16 inputs in parts of the largest magnitude; NaN and infinity are none of the
    reference's results."""
    if ours.numel() == 0:
        return 0.0
    difference = (ours.double() - exact).abs()
    error = float(difference.nan_to_num(nan=float("inf")).max())
    return error if dtype is torch.float32 else error / max(1.0, float(exact.abs().max()))


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Equal bits, any NaN being one."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    if not ours.is_floating_point():
        return torch.equal(ours, theirs)
    nan = ours.isnan()
    if not torch.equal(nan, theirs.isnan()):
        return False
    form = _INTEGERS[ours.element_size()]
    return torch.equal(ours[~nan].contiguous().view(form), theirs[~nan].contiguous().view(form))


def _company(case: Case, bound: Bound, any_threads: bool) -> str:
    """How a row's bits depend on other rows or on threads; empty if they do not. One thread to begin with: with more a
    busy machine takes ten times as long over the references, which promise their bits for a given number alone."""
    one = case.comparable(bound(None)())
    wrong = _other_company(case, bound, one, _companies(case.rows))
    for count in THREADS if any_threads else ():
        with _threads(count):
            whole = case.comparable(bound(None)())
            if not _equal(whole, one):
                return f"other bits with {count} threads"
            wrong = wrong or _other_company(case, bound, whole, _companies(case.rows)[:1])
    return wrong


def _other_company(case: Case, bound: Bound, whole: tuple[Tensor, ...], companies: list[tuple[str, Tensor]]) -> str:
    for name, rows in companies:
        if not _equal(case.comparable(bound(rows)()), tuple(x[rows] for x in whole)):
            return f"other bits {name}, {torch.get_num_threads()} threads"
    return ""


def _companies(rows: int) -> list[tuple[str, Tensor]]:
    """Some rows of the whole, in an order."""
    every = torch.arange(rows)
    alone = [("alone", every[row : row + 1]) for row in sorted({rows // 2, 0, rows - 1})]
    if rows <= 3:
        return [("in another order", every.flip(0)), *alone]
    return [
        ("in another order and without some", torch.cat([every[1::2], every[:1]])),
        *alone,
        ("without the rows before", every[rows // 3 :]),
        ("without the rows behind", every[: rows - rows // 3]),
    ]


def _equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))
