"""Repeated calls: what is noted, refused and kept. Bits of whole steps: tests/engine/test_repeat.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.threads import threads
from thalweg.kernels.arguments import AttentionContext, Ints, PastRows, Segments, plain_rows
from thalweg.kernels.cpu import calls as module
from thalweg.kernels.cpu.calls import Calls
from thalweg.kernels.cpu.library import Library, LibraryMissing, load_library
from thalweg.kernels.ops import Kernels
from thalweg.kernels.registry import cpu_kernels

__all__ = ["threads"]


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        return load_library()
    except LibraryMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def kernels(library: Library) -> Kernels:
    return cpu_kernels(library)


def three_times(repeat: Calls, compute: Callable[[Tensor, Tensor], Tensor], seed: int = 0) -> bool:
    """Whether compute(x [3, 8], ids [2]) has its own result in three runs, each with inputs of its own."""
    generator = torch.Generator().manual_seed(seed)
    same = True
    for _ in range(3):
        x, ids = torch.randn(3, 8, generator=generator), torch.randint(0, 3, (2,), generator=generator)
        with torch.inference_mode():
            expected = compute(x, ids)
            found = repeat.run("shape", [x, ids], [], lambda x=x, ids=ids: compute(x, ids))
        same = same and torch.equal(found, expected) and found.dtype is expected.dtype
    return same


TABLE = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
GLUE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rows": lambda x, ids: x[ids] + TABLE[ids],
    "rows of several axes": lambda x, ids: x.view(3, 2, 4)[ids],
    "times a number": lambda x, ids: x[ids] * 0.37,
    "half of a row": lambda x, ids: x.chunk(2, -1)[1].contiguous(),
    "joined": lambda x, ids: torch.cat([x, TABLE[ids]]),
    "bfloat16 and back": lambda x, ids: (x.to(torch.bfloat16).to(torch.float32) + x)[ids],
    "half of a row, narrow": lambda x, ids: x.chunk(2, -1)[0].to(torch.bfloat16),
    "longer by ones": lambda x, ids: torch.nn.functional.pad(x, (0, 2), value=1.0),
    "longer by a number": lambda x, ids: torch.nn.functional.pad(ids.view(1, 2), (0, 1), value=7),
}


@pytest.mark.parametrize("name", GLUE)
def test_operations_of_torch_between_kernels(library: Library, name: str) -> None:
    repeat = Calls(library, [TABLE])
    assert three_times(repeat, GLUE[name])
    assert repeat.repeated == 1


def test_rows_written_to_a_pool(library: Library, kernels: Kernels) -> None:
    pool, plain = torch.zeros(6, 12)[:, :4], torch.zeros(6, 4)
    repeat = Calls(library, [pool])

    def store(x: Tensor, ids: Tensor) -> Tensor:
        kernels.store_rows(plain_rows(pool), ids, x.chunk(2, -1)[1])
        return pool

    for i in range(4):
        x, ids = torch.full((2, 8), float(i)) + torch.arange(8), torch.tensor([i, i + 2])
        with torch.inference_mode():
            repeat.run(0, [x, ids], [], lambda x=x, ids=ids: store(x, ids))
        plain.index_copy_(0, ids, x[:, 4:])
        assert torch.equal(pool, plain)
    assert repeat.repeated == 2


def test_kernels_with_numbers_from_the_host(library: Library, kernels: Kernels, threads: int) -> None:
    """A product, a norm, a rotation; the number of threads is part of the shape."""
    weight, scale = kernels.pack(torch.randn(40, 8)), torch.randn(40)
    repeat = Calls(library, [weight.data, scale])

    def compute(x: Tensor, ids: Tensor) -> Tensor:
        y = kernels.rms_norm(kernels.linear(x, weight), scale, 1e-6)
        return kernels.rotate(y, x[:, :4].contiguous(), x[:, 4:].contiguous())

    assert three_times(repeat, compute, seed=threads)
    assert repeat.repeated == 1
    torch.set_num_threads(threads + 1)
    assert three_times(repeat, compute)
    assert repeat.repeated == 2


def test_what_cannot_be_repeated_is_computed_and_said(library: Library, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = torch.randn(5, 8)  # neither an input nor kept
    caplog.set_level("WARNING", logger="thalweg.kernels")
    for compute, said in (
        (lambda x, ids: x.exp(), "aten.exp"),
        (lambda x, ids: elsewhere[ids], "an argument of gather_rows"),
        (lambda x, ids: x + x[0], "aten.add"),
    ):
        repeat = Calls(library, [])
        assert three_times(repeat, compute)
        assert repeat.repeated == 0
        assert said in caplog.records[-1].getMessage()
        said_so_far = len(caplog.records)
        assert three_times(repeat, compute) and len(caplog.records) == said_so_far, "once"


def test_more_than_the_room_is_not_repeated(
    library: Library, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROOM", 256)

    def norms(x: Tensor) -> Tensor:
        return kernels.rms_norm(x, None, 1e-6)

    repeat = Calls(library, [])
    assert three_times(repeat, lambda x, ids: norms(norms(x)))
    assert repeat.repeated == 1, "twice 128 bytes"
    repeat = Calls(library, [])
    assert three_times(repeat, lambda x, ids: norms(norms(norms(x))))
    assert repeat.repeated == 0


def test_an_error_while_it_is_noted_leaves_the_kernels_as_they_were(library: Library, kernels: Kernels) -> None:
    repeat, before = Calls(library, []), library.rms_norm

    def failing() -> Tensor:
        kernels.rms_norm(torch.ones(1, 8), None, 1e-6)
        raise ValueError("on purpose")

    for _ in range(3):
        with pytest.raises(ValueError, match="on purpose"), torch.inference_mode():
            repeat.run(0, [], [], failing)
    assert library.rms_norm is before and repeat.repeated == 0
    assert three_times(repeat, lambda x, ids: x[ids]) and repeat.repeated == 1


def test_the_least_recently_used_shapes_are_forgotten(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SHAPES", 2)
    repeat, x = Calls(library, []), torch.ones(2, 4)

    def run(shape: int) -> int:
        before = repeat.repeated
        with torch.inference_mode():
            repeat.run(shape, [x], [], lambda: x + x)
        return repeat.repeated - before

    assert [run(0), run(0), run(0), run(1), run(1), run(1)] == [0, 0, 1, 0, 0, 1]
    assert run(0) == 1 and run(2) == 0, "2 takes the place of 1"
    assert run(0) == 1 and run(1) == 0


def test_numbers_that_kernels_read_follow_the_input(library: Library, kernels: Kernels) -> None:
    """Starts and offsets: where a sequence begins is data, not shape."""
    pool, sinks = torch.randn(64, 8), torch.zeros(2)
    repeat = Calls(library, [pool, sinks])
    for length in (3, 9, 30, 5):
        query, new, slots = torch.randn(1, 2, 8), torch.randn(1, 8), torch.randperm(64)[:length]
        segments, past = Segments((0, 1), (length,)), Ints((0, length))

        def compute(query: Tensor = query, new: Tensor = new, slots: Tensor = slots) -> Tensor:
            context = AttentionContext(segments, segments, PastRows(plain_rows(pool), slots, past), None, 1, 32)  # noqa: B023
            return kernels.attention(query, new, context, sinks, None)

        with torch.inference_mode():
            expected = compute()
            found = repeat.run(0, [query, new, slots], [segments.offsets, segments.starts, past], compute)
        assert torch.equal(found, expected)
    assert repeat.repeated == 2


def test_the_kernel_under_way_is_seen_from_another_thread(library: Library, kernels: Kernels) -> None:
    weight, x = kernels.pack(torch.randn(2048, 2048)), torch.randn(1024, 2048)
    repeat, seen, stopped = Calls(library, [weight.data]), set(), threading.Event()

    def look() -> None:
        while not stopped.is_set():
            seen.add(repeat.kernel_under_way())
            time.sleep(0.001)

    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(3):
        with torch.inference_mode():
            repeat.run(0, [x], [], lambda: kernels.linear(x, weight))
    stopped.set()
    watcher.join()
    assert seen == {None, "linear"} and repeat.kernel_under_way() is None
