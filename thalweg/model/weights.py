"""Parameters by name, as a layer sees them: a view of the whole under a prefix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from thalweg.checkpoint.parameters import SCALES, Parameter, Precision, parameters
from thalweg.config.model import ModelConfig
from thalweg.kernels.arguments import FP4_GROUP, FP8_BLOCK, Matrix, Quantised, Weight
from thalweg.kernels.ops import Pack

NONE: Mapping[str, torch.dtype] = MappingProxyType({})  # no parameter is kept in a form of the checkpoint


class Weights:
    """`weights["wq_a.weight"]` under the prefix `layers.0.attn.` is `layers.0.attn.wq_a.weight`."""

    def __init__(
        self, tensors: dict[str, Tensor], pack: Pack, prefix: str = "", made: list[Tensor] | None = None
    ) -> None:
        self._tensors = tensors
        self._pack = pack
        self._prefix = prefix
        self._made: list[Tensor] = [] if made is None else made

    def under(self, prefix: str) -> Weights:
        return Weights(self._tensors, self._pack, self._prefix + prefix, self._made)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def take(self, name: str) -> Tensor:
        """A tensor that is needed in another form only, and is never quantised."""
        return self._tensors.pop(self._prefix + name)

    def take_matrix(self, name: str) -> Matrix:
        """A matrix that is needed in another form only."""
        data, scales = self.take(name), self._tensors.pop(self._prefix + name + SCALES, None)
        return data if scales is None else Quantised(data, scales)

    def matrix(self, name: str, groups: int = 1) -> Weight:
        """Take a matrix out, in the form in which the backend multiplies by it: the plain tensor is let go."""
        matrix = self.take_matrix(name)
        return self.packed(matrix if groups == 1 else matrix.unflatten(0, (groups, -1)))

    def packed(self, matrix: Matrix) -> Weight:
        """A matrix made of parameters, in the form in which the backend multiplies by it."""
        weight = self._pack(matrix)
        self.kept(weight.data)
        if weight.scales is not None:
            self.kept(weight.scales)
        return weight

    def kept(self, tensor: Tensor) -> Tensor:
        """Something made of parameters, which stays as long as they do."""
        self._made.append(tensor)
        return tensor

    def memory(self) -> tuple[Tensor, ...]:
        """All that is kept of the whole model, whatever the prefix."""
        return (*self._tensors.values(), *self._made)


def dtype_of(parameter: Parameter, compute: torch.dtype, kept: Mapping[str, torch.dtype]) -> torch.dtype:
    """Matrices named in `kept` have the form given there, for kernels that widen them as they multiply."""
    if parameter.name in kept and _is_matrix(parameter):
        return kept[parameter.name]
    return {Precision.COMPUTE: compute, Precision.FLOAT32: torch.float32, Precision.INT64: torch.int64}[
        parameter.precision
    ]


def weight_bytes(config: ModelConfig, compute: torch.dtype, kept: Mapping[str, torch.dtype] = NONE) -> int:
    """What `allocate` takes."""
    return sum(prod(shape) * dtype.itemsize for _, shape, dtype in _tensors(config, compute, kept))


def allocate(
    config: ModelConfig, compute: torch.dtype, device: torch.device, kept: Mapping[str, torch.dtype] = NONE
) -> dict[str, Tensor]:
    """Uninitialised tensors for every parameter, for a loader to fill in place; `kept` is of loader.kept_forms."""
    made = _tensors(config, compute, kept)
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, shape, dtype in made}


def _tensors(
    config: ModelConfig, compute: torch.dtype, kept: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor; quantised parameters have two."""
    for parameter in parameters(config):
        form = dtype_of(parameter, compute, kept)
        name, shape = parameter.name, parameter.shape
        if form is torch.uint8:
            yield name, (*shape[:-1], shape[-1] // 2), form
            yield name + SCALES, (*shape[:-1], shape[-1] // FP4_GROUP), torch.uint8
            continue
        yield name, shape, form
        if form is torch.float8_e4m3fn:
            blocks = (-(-shape[-2] // FP8_BLOCK), -(-shape[-1] // FP8_BLOCK))
            yield name + SCALES, (*shape[:-2], *blocks), torch.uint8


def _is_matrix(parameter: Parameter) -> bool:
    """Whether rows of it are multiplied or looked up, and nothing else."""
    words = parameter.precision is Precision.INT64 or parameter.name.endswith(".ape")
    return len(parameter.shape) > 1 and not words
