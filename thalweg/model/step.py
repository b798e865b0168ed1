"""What all layers of one forward pass share: rotation angles and compressor phases."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from thalweg.config.model import LayerKind
from thalweg.model.inputs import CompressorInputs, StepInputs
from thalweg.model.rotary import Angles, angles, both_angles


@dataclass(frozen=True, slots=True)
class StepTables:
    """Angles of the new tokens in window and in compressed layers; per compressor kind its inputs, the angles of its
    new entries and each token's position in its compression window."""

    window: Angles
    compressed: Angles
    compressors: dict[LayerKind, tuple[CompressorInputs, Angles, Tensor]]

    def angles(self, kind: LayerKind) -> Angles:
        return self.window if kind is LayerKind.WINDOW else self.compressed

    def compressor(self, kind: LayerKind) -> tuple[CompressorInputs, Angles, Tensor]:
        return self.compressors[kind]


def step_tables(step: StepInputs, frequencies: Tensor) -> StepTables:
    """Computed once per step for all layers. frequencies [2, r/2]: those of window and of compressed layers."""
    window, compressed = both_angles(step.positions, frequencies)
    none = Angles(compressed.cos[:0], compressed.sin[:0], compressed.back[:0])
    compressors = {
        kind: (
            inputs,
            angles(inputs.positions, frequencies[1]) if len(inputs.positions) else none,
            step.positions % inputs.ratio,
        )
        for kind, inputs in ((LayerKind.CSA, step.csa), (LayerKind.HCA, step.hca))
        if inputs is not None
    }
    return StepTables(window, compressed, compressors)
