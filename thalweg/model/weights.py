"""Parameters by name, as a layer sees them: a view of the whole under a prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.checkpoint.parameters import Parameter, Precision, parameters
from thalweg.config.model import ModelConfig
from thalweg.kernels.arguments import Weight
from thalweg.kernels.ops import Pack


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
        """A tensor that is needed in another form only."""
        return self._tensors.pop(self._prefix + name)

    def matrix(self, name: str, groups: int = 1) -> Weight:
        """Take a matrix out, in the form in which the backend multiplies by it: the plain tensor is let go."""
        tensor = self.take(name)
        return self.packed(tensor if groups == 1 else tensor.unflatten(0, (groups, -1)))

    def packed(self, tensor: Tensor) -> Weight:
        """A matrix made of parameters, in the form in which the backend multiplies by it."""
        weight = self._pack(tensor)
        self.kept(weight.data)
        return weight

    def kept(self, tensor: Tensor) -> Tensor:
        """Something made of parameters, which stays as long as they do."""
        self._made.append(tensor)
        return tensor

    def memory(self) -> tuple[Tensor, ...]:
        """All that is kept of the whole model, whatever the prefix."""
        return (*self._tensors.values(), *self._made)


def dtype_of(parameter: Parameter, compute: torch.dtype, narrow: frozenset[str]) -> torch.dtype:
    """Matrices named in `narrow` are kept in bfloat16, for kernels that widen them as they multiply."""
    if parameter.name in narrow and _is_matrix(parameter):
        return torch.bfloat16
    return {Precision.COMPUTE: compute, Precision.FLOAT32: torch.float32, Precision.INT64: torch.int64}[
        parameter.precision
    ]


def weight_bytes(config: ModelConfig, compute: torch.dtype, narrow: frozenset[str] = frozenset()) -> int:
    """What `allocate` takes."""
    return sum(p.elements * dtype_of(p, compute, narrow).itemsize for p in parameters(config))


def allocate(
    config: ModelConfig, compute: torch.dtype, device: torch.device, narrow: frozenset[str] = frozenset()
) -> dict[str, Tensor]:
    """Uninitialised tensors for every parameter, for a loader to fill in place."""
    return {p.name: torch.empty(p.shape, dtype=dtype_of(p, compute, narrow), device=device) for p in parameters(config)}


def _is_matrix(parameter: Parameter) -> bool:
    """Whether rows of it are multiplied or looked up, and nothing else."""
    words = parameter.precision is Precision.INT64 or parameter.name.endswith(".ape")
    return len(parameter.shape) > 1 and not words
