"""Kernels compiled ahead of time, without a GPU: what each costs in registers and memory, and whether it fits.

Triton raises no error when a kernel takes more shared or tensor memory than a multiprocessor has, and may then leave an
empty stub. So everything is read from the compiled code itself, and tensor-core instructions must be seen in it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thalweg.config.model import ModelConfig
from thalweg.errors import ConfigError, nearest
from thalweg.kernels.triton.backend import op_modules
from thalweg.kernels.triton.launch import Launch

ARCHITECTURES = {"sm_90a": 90, "sm_100a": 100, "sm_103a": 103}  # H100 and H200; B200 and GB200; B300 and GB300
MOST_SHARED_BYTES = 227 * 1024  # of one block, on all of them (CUDA programming guide, compute capabilities)
MOST_TENSOR_COLUMNS = 512  # of tensor memory, on Blackwell
_WARP, _REGISTERS, _WARPS, _BLOCKS, _SHARED_BYTES, _RESERVED = 32, 65_536, 64, 32, 228 * 1024, 1024
_MATRIX = ("HMMA", "QMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA")
_COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")  # asynchronous copies into shared memory
_LOCAL = ("STL", "LDL")  # registers written to memory, and read back


@dataclass(frozen=True, slots=True)
class Compiled:
    """One launch for one architecture. `matrix` and `copies` count instructions; `faults` says why it must not ship."""

    op: str
    what: str
    kernel: str
    arch: str
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_columns: int
    blocks_per_multiprocessor: int
    matrix: Mapping[str, int]
    copies: Mapping[str, int]
    seconds: float
    faults: tuple[str, ...] = field(default=())


def every_launch(config: ModelConfig) -> list[Launch]:
    """What serving this model launches, all kernel files, in the order of their names."""
    files = [sys.modules[name] for name in sorted(set(op_modules().values()))]
    return [launch for file in files for launch in file.launches(config)]


def architecture(name: str) -> str:
    """The name itself if it can be compiled for. Raises ConfigError with the nearest one."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"arch: {name!r} is not one of {known}.{nearest(name, ARCHITECTURES)}", param="arch")
    return name


def compile_all(
    config: ModelConfig,
    architectures: Iterable[str],
    *,
    ops: frozenset[str] | None = None,
    workers: int = 1,
    done: Callable[[int, int], None] = lambda done, total: None,
) -> list[Compiled]:
    """Every launch of these ops (None: all) for every architecture, in that order; done(compiled, total) as they come.

    Several workers are processes of their own: the compiler holds the interpreter's lock.
    """
    chosen = [n for n, launch in enumerate(every_launch(config)) if ops is None or launch.op in ops]
    work = [(number, arch) for number in chosen for arch in architectures]
    found: dict[tuple[int, str], Compiled] = {}
    for key, compiled in _results(config, work, workers):
        found[key] = compiled
        done(len(found), len(work))
    return [found[key] for key in work]


def _results(
    config: ModelConfig, work: list[tuple[int, str]], workers: int
) -> Iterator[tuple[tuple[int, str], Compiled]]:
    if workers == 1:
        yield from ((key, _compile_numbered(config, *key)) for key in work)
        return
    with ProcessPoolExecutor(workers) as pool:
        pending = {pool.submit(_compile_numbered, config, *key): key for key in work}
        for future in as_completed(pending):
            yield pending[future], future.result()


def _compile_numbered(config: ModelConfig, number: int, arch: str) -> Compiled:
    """Kernels are not sent between processes: each finds its own by number."""
    return compile_launch(every_launch(config)[number], arch)


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile one launch. What the compiler refuses is a fault of the kernel, in the result."""
    import triton
    from triton.backends.compiler import GPUTarget

    begin = time.perf_counter()
    try:
        made = triton.compile(
            _source(launch), target=GPUTarget("cuda", ARCHITECTURES[arch], _WARP), options=dict(launch.options)
        )
    except Exception as error:  # of any kind: each pass of the compiler has its own
        return _refused(launch, arch, time.perf_counter() - begin, error)
    seconds = time.perf_counter() - begin
    usage, code = _inspected(made.asm["cubin"])
    return _judged(launch, arch, made.metadata, usage, code, seconds)


def _source(launch: Launch) -> Any:
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    assert set(names) == {*launch.types, *launch.constants}, f"{launch.op}, {launch.what}: not all arguments are named"
    signature = {name: launch.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    aligned = [n for n in names if signature[n].startswith("*") or n in launch.aligned]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(launch.kernel, signature, constants, attributes)


def _inspected(binary: bytes) -> tuple[dict[str, int], str]:
    """Resources and instructions of compiled code, by the tools that come with Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    return {name: int(count) for name, count in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}, code


def _output(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _counts(code: str, instructions: Iterable[str]) -> dict[str, int]:
    found = {name: len(re.findall(rf"\b{name}\b", code)) for name in instructions}
    return {name: count for name, count in found.items() if count}


def _judged(launch: Launch, arch: str, metadata: Any, usage: dict[str, int], code: str, seconds: float) -> Compiled:
    shared, columns = int(metadata.shared), int(getattr(metadata, "tmem_size", 0) or 0)
    spill = usage.get("STACK", 0) if _counts(code, _LOCAL) else 0
    matrix, warps = _counts(code, _MATRIX), int(metadata.num_warps)
    checks = (
        (spill > 0, f"spills {spill} bytes of registers"),
        (shared > MOST_SHARED_BYTES, f"takes {shared:,} bytes of shared memory, {MOST_SHARED_BYTES:,} at most"),
        (columns > MOST_TENSOR_COLUMNS, f"takes {columns} columns of tensor memory, {MOST_TENSOR_COLUMNS} at most"),
        (launch.matrix and not matrix, "multiplies without tensor cores"),
    )
    registers = usage.get("REG", 0)
    return Compiled(
        op=launch.op,
        what=launch.what,
        kernel=launch.kernel.__name__,
        arch=arch,
        warps=warps,
        registers=registers,
        spill_bytes=spill,
        shared_bytes=shared,
        tensor_columns=columns,
        blocks_per_multiprocessor=_occupancy(registers, warps, shared, columns),
        matrix=matrix,
        copies=_counts(code, _COPIES),
        seconds=seconds,
        faults=tuple(text for wrong, text in checks if wrong),
    )


def _occupancy(registers: int, warps: int, shared: int, columns: int) -> int:
    """Blocks that one multiprocessor holds at once."""
    limits = [
        _BLOCKS,
        _WARPS // warps,
        _REGISTERS // max(1, registers * _WARP * warps),
        _SHARED_BYTES // (shared + _RESERVED),
    ]
    return min(limits + ([MOST_TENSOR_COLUMNS // columns] if columns else []))


def _refused(launch: Launch, arch: str, seconds: float, error: Exception) -> Compiled:
    fault = f"does not compile: {type(error).__name__}: {str(error).strip()[:300]}"
    name, warps = launch.kernel.__name__, launch.options.get("num_warps", 4)
    return Compiled(launch.op, launch.what, name, arch, warps, 0, 0, 0, 0, 0, {}, {}, seconds, (fault,))


def triton_version() -> str:
    """Registers and spills differ between versions: what was compiled holds for this one."""
    import triton

    return str(triton.__version__)
