"""The curriculum of the embedded model, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from training.needles import Shape


@dataclass(frozen=True, slots=True)
class Stage:
    """`window` and `top_k` replace the model's; a share of right answer tokens above `enough` ends the stage early.

    With `crowd`, each HCA entry counts up to so often, log-uniformly by step: a million tokens have 8,192 of them.
    """

    name: str
    steps: int
    shape: Shape
    window: int | None = None
    top_k: int | None = None
    matrix_rate: float = 0.01
    other_rate: float = 0.003
    text_weight: float = 0.2
    warm_steps: int = 20
    decay: bool = False
    enough: float | None = None
    crowd: int = 1


STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("short", 200, Shape(40, 112, 3, 3, 8), 16, enough=0.99, text_weight=0.1, other_rate=0.004),
        Stage("window", 300, Shape(20, 384, 8, 8, 16), None, 32, enough=0.994, matrix_rate=0.007),
        Stage("skips", 250, Shape(8, 1024, 16, 16, 64, 0.8), None, 32, matrix_rate=0.005, other_rate=0.002),
        Stage("long", 500, Shape(4, 2048, 48, 24, 256, 0.8), None, 64, 0.005, 0.002, text_weight=0.3, decay=True),
        Stage("crowd", 280, Shape(4, 2048, 48, 24, 64, 0.8), None, 64, 0.004, 0.0015, decay=True, crowd=2048),
    )
}
