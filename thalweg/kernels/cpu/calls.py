"""A step of few tokens as one call: what it asked of the kernels is noted once and made again.

Such a step makes some two hundred calls from Python with microseconds of work each. Steps of one shape make the same
ones: only the addresses of their inputs differ. So one of them is computed as always and noted: kernels by name with
their arguments, and the little that the model says in torch between two kernels as kernels that give the same bits
(native/glue.cpp). Later ones are a single call of the library, which puts the addresses of their inputs in.

Nothing stale can be read. Every address that is noted lies in an input, in memory that outlives the steps (weights,
cache pools) or in the recording's own. A step with any other address, or with an operation of torch that is no kernel
here, is not repeated.
"""

from __future__ import annotations

import logging
import struct
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from thalweg.kernels.arguments import Ints
from thalweg.kernels.cpu.library import Library, address

MOST_SHAPES = 64  # of steps that are remembered, the latest used; about 100 KB each
ROOM = 64 << 20  # bytes for what lies between the kernels of a step: the shapes share it, as steps follow each other
_ALIGNMENT = 64
_INT_BYTES = 8
_log = logging.getLogger("thalweg.kernels")
Place = tuple[int, int]  # address and bytes
_aten = torch.ops.aten


def place(tensor: Tensor) -> Place:
    """From its first element to its last, whatever lies between."""
    if not tensor.numel():
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def place_of_ints(ints: Ints) -> Place:
    return ints.address, len(ints) * _INT_BYTES


@dataclass(frozen=True, slots=True)
class _Noted:
    """The calls of one shape of step, as thalweg_repeat takes them, and where the result lies."""

    kernels: array[int]
    arguments: array[int]
    patches: array[int]
    result: Tensor


class Calls:
    """Remembers steps by shape (ops.Repeat). For one thread; `constant` is what the steps read and write besides their
    inputs, and which stays where it is."""

    def __init__(self, library: Library, constant: Iterable[Tensor]) -> None:
        self._library = library
        self._constant = tuple(constant)
        self._lengths = array("q", (len(types) for _, types in library.kernels))
        self._noted: OrderedDict[Hashable, _Noted | None] = OrderedDict()  # None: seen once, or not to be repeated
        self._refused: set[Hashable] = set()
        self._reasons: set[str] = set()
        self._room: Tensor | None = None
        self._now = array("q", (-1,))
        self._under_way: _Noted | None = None
        self.repeated = 0

    def run(
        self, shape: Hashable, tensors: Sequence[Tensor], ints: Sequence[Ints], compute: Callable[[], Tensor]
    ) -> Tensor:
        """The second step of a shape is noted: most shapes of a prompt's end come only once."""
        shape = (shape, self._library.threads)
        noted = self._noted.get(shape)
        if noted is not None:
            self._noted.move_to_end(shape)
            return self._repeat(noted, tensors, ints)
        if shape in self._refused or shape not in self._noted:
            self._remember(shape, None)
            return compute()
        return self._note(shape, [*map(place, tensors), *map(place_of_ints, ints)], compute)

    def kernel_under_way(self) -> str | None:
        """The kernel that a repeated step is in, seen from another thread."""
        now, noted = self._now[0], self._under_way
        return None if now < 0 or noted is None else self._library.kernels[noted.kernels[now]][0]

    def _repeat(self, noted: _Noted, tensors: Sequence[Tensor], ints: Sequence[Ints]) -> Tensor:
        addresses = array("q", [x.data_ptr() for x in tensors])
        addresses.extend([x.address for x in ints])
        self._under_way = noted
        self._library.repeat(
            noted.kernels.buffer_info()[0], len(noted.kernels), noted.arguments.buffer_info()[0],
            noted.patches.buffer_info()[0], len(noted.patches) // 3, addresses.buffer_info()[0],
            self._lengths.buffer_info()[0], self._now.buffer_info()[0],
        )  # fmt: skip
        self.repeated += 1
        return noted.result.clone()

    def _note(self, shape: Hashable, inputs: Sequence[Place], compute: Callable[[], Tensor]) -> Tensor:
        if self._room is None:
            self._room = torch.empty(ROOM, dtype=torch.uint8)  # address space: what no step touches takes no memory
        recording = _Recording(self._library, self._room, inputs, map(place, self._constant))
        with recording:
            result = compute()
        noted = recording.noted(result)
        if noted is None:
            if recording.foreign not in self._reasons:  # once each: the log says what is slower than it could be
                self._reasons.add(recording.foreign)
                _log.warning("some small steps are computed call by call: %s", recording.foreign)
            self._refused.add(shape)
        else:
            self._remember(shape, noted)
        return result.clone()

    def _remember(self, shape: Hashable, noted: _Noted | None) -> None:
        self._noted[shape] = noted
        self._noted.move_to_end(shape)
        if len(self._noted) > MOST_SHAPES:
            self._refused.discard(self._noted.popitem(last=False)[0])


class _Recording(TorchDispatchMode):
    """While it is entered, kernels of the library and operations of torch are computed and noted. `foreign` is what
    could not be."""

    def __init__(self, library: Library, room: Tensor, inputs: Sequence[Place], constant: Iterable[Place]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._library = library
        self._room, self._used = room, 0
        own = [(begin, size, i) for i, (begin, size) in enumerate(inputs) if size]
        kept = [(begin, size, None) for begin, size in (*constant, place(room)) if size]
        self._places = sorted((*own, *kept), key=lambda known: known[0])
        self._begins = [begin for begin, _, _ in self._places]
        self._kernels, self._arguments, self._patches = array("q"), array("q"), array("q")
        self.foreign = ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to be skipped by torch's compiler, which is not used here, would load all of it, two seconds of work."""
        return False

    def noted(self, result: Tensor) -> _Noted | None:
        if self.foreign:
            return None
        return _Noted(self._kernels, self._arguments, self._patches, result)

    def __enter__(self) -> _Recording:
        for number, (name, types) in enumerate(self._library.kernels):
            setattr(self._library, name, self._noting(number, types, getattr(self._library, name)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for name, _ in self._library.kernels:
            setattr(self._library, name, getattr(self._library, name).kernel)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _EMPTY:
            return self._empty(torch.Size(args[0]), kwargs.get("dtype") or torch.get_default_dtype())
        glue = _GLUE.get(function)
        if glue is not None:
            made = glue(self, *args, **kwargs)
            if made is not None:
                return made
        result = function(*args, **kwargs)
        if function.is_view:
            if _same_storage(result, args[0]):
                return result
            made = self._copied(args[0], result.dtype)
            if made is not None:
                return made
        self.foreign = self.foreign or str(function)
        return result

    def _noting(self, number: int, types: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def noting(*arguments: Any) -> None:
            kernel(*arguments)
            self._kernels.append(number)
            for letter, argument in zip(types, arguments, strict=True):
                self._note_argument(letter, argument)

        noting.kernel = kernel  # type: ignore[attr-defined]
        return noting

    def _note_argument(self, letter: str, argument: Any) -> None:
        if letter == "f":
            self._arguments.append(struct.unpack("<I", struct.pack("<f", argument))[0])
            return
        if letter == "p" and argument:
            found = bisect_right(self._begins, argument) - 1
            begin, size, number = self._places[found] if found >= 0 else (0, 0, None)
            if not begin <= argument < begin + size:
                self.foreign = self.foreign or f"an argument of {self._library.kernels[self._kernels[-1]][0]}"
            elif number is not None:
                self._patches.extend((len(self._arguments), number, argument - begin))
        self._arguments.append(int(argument))

    def _empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        size = shape.numel() * dtype.itemsize
        begin, self._used = self._used, self._used + -(-size // _ALIGNMENT) * _ALIGNMENT
        if self._used > ROOM:
            self.foreign = self.foreign or f"more than {ROOM >> 20} MiB between the kernels"
            return torch.empty(shape, dtype=dtype)
        return self._room[begin : begin + size].view(dtype).view(shape)

    # -- operations of torch, as kernels that give the same bits; None: not in this form ------------------------------

    def _copied(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Contiguous and in another dtype."""
        if not x.is_contiguous():
            whole = self._empty(x.shape, x.dtype)
            if not self._copy(x, whole):
                return None
            x = whole
        if x.dtype is dtype:
            return x
        out = self._empty(x.shape, dtype)
        match x.dtype, dtype:
            case torch.float32, torch.bfloat16:
                self._library.narrow(address(x), x.numel(), address(out))
            case torch.bfloat16, torch.float32:
                self._library.widen(address(x), x.numel(), address(out))
            case _:
                return None
        return out

    def _copy(self, x: Tensor, out: Tensor) -> bool:
        """Rows of x to those of out, which has its shape and dtype."""
        if x.dtype is not out.dtype or not (_is_rows(x) and _is_rows(out)):
            return False
        self._library.copy_rows(x.data_ptr(), _stride(x), len(x), _row_bytes(x), out.data_ptr(), _stride(out))
        return True

    def _add(self, a: Tensor, b: Tensor) -> Tensor | None:
        if a.shape != b.shape or not (_is_plain(a) and _is_plain(b)):
            return None
        out = self._empty(a.shape, a.dtype)
        self._library.add(address(a), address(b), a.numel(), address(out))
        return out

    def _multiply(self, x: Tensor, factor: Any) -> Tensor | None:
        if isinstance(factor, Tensor) or not _is_plain(x):
            return None
        out = self._empty(x.shape, x.dtype)
        self._library.multiply(address(x), factor, x.numel(), address(out))
        return out

    def _index(self, x: Tensor, indices: list[Tensor | None]) -> Tensor | None:
        """x[rows]."""
        if len(indices) != 1 or indices[0] is None or indices[0].dim() != 1 or not _is_rows(x):
            return None
        rows = indices[0]
        out = self._empty(torch.Size((len(rows), *x.shape[1:])), x.dtype)
        if len(rows):
            self._library.gather_rows(x.data_ptr(), _stride(x), address(rows), len(rows), _row_bytes(x), address(out))
        return out

    def _cat(self, parts: list[Tensor], dim: int = 0) -> Tensor | None:
        if dim != 0 or not all(_is_rows(part) and part.dtype is parts[0].dtype for part in parts):
            return None
        out = self._empty(torch.Size((sum(map(len, parts)), *parts[0].shape[1:])), parts[0].dtype)
        begin = 0
        for part in parts:
            if len(part):
                self._copy(part, out[begin : begin + len(part)])
            begin += len(part)
        return out

    def _pad(self, x: Tensor, sides: list[int], mode: str = "constant", value: float | None = None) -> Tensor | None:
        """The last axis made longer at its end."""
        if mode != "constant" or len(sides) != 2 or sides[0] or sides[1] < 0 or x.dim() != 2 or not _is_rows(x):
            return None
        size, count = x.element_size(), x.shape[1]
        out = self._empty(torch.Size((len(x), count + sides[1])), x.dtype)
        self._copy(x, out[:, :count])
        filling = torch.tensor([value or 0], dtype=x.dtype).view({4: torch.int32, 8: torch.int64}[size]).item()
        self._library.fill_rows(filling, size, len(x), sides[1], out[:, count:].data_ptr(), _stride(out))
        return out


def _same_storage(result: Any, source: Tensor) -> bool:
    first = result[0] if isinstance(result, (tuple, list)) else result
    return first.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()


def _is_rows(x: Tensor) -> bool:
    """Whether every x[i] is contiguous."""
    return x.dim() > 0 and (len(x) == 0 or x[0].is_contiguous())


def _stride(x: Tensor) -> int:
    """Bytes from row to row."""
    return x.stride(0) * x.element_size()


def _row_bytes(x: Tensor) -> int:
    return x[0].numel() * x.element_size() if len(x) else 0


def _is_plain(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.is_contiguous()


_EMPTY = frozenset((_aten.empty.memory_format,))
_GLUE: dict[Any, Callable[..., Tensor | None]] = {
    _aten.add.Tensor: _Recording._add,
    _aten.mul.Tensor: _Recording._multiply,
    _aten.index.Tensor: _Recording._index,
    _aten.cat.default: _Recording._cat,
    _aten.pad.default: _Recording._pad,
    _aten.constant_pad_nd.default: lambda own, x, sides, value=0: own._pad(x, sides, "constant", value),
}
