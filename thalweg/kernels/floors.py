"""The least time that an op can take on an accelerator, and what sets it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from thalweg.kernels.spec import OpSpec

LAUNCH_SECONDS = 2.5e-6  # an empty kernel in a replayed graph; each machine's own is measured with its kernels


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates of one device: bytes per second, operations per second of products by the type that is multiplied, and of
    ordinary arithmetic; seconds of an empty launch. `origin`: data sheet, or measured there."""

    bandwidth: float
    products: Mapping[str, float]
    ordinary: float
    launch: float
    origin: str


@dataclass(frozen=True, slots=True)
class Floor:
    """`term` is what binds: memory, products, arithmetic or launch."""

    seconds: float
    term: str


def floor(spec: OpSpec, sizes: Mapping[str, float], limits: Limits, multiplied: str = "bf16") -> Floor:
    """The largest of four: bytes, products of `multiplied` numbers, all other arithmetic, one launch."""
    products = spec.products(sizes)
    terms = {
        "memory": spec.bytes(sizes) / limits.bandwidth,
        "products": products / limits.products[multiplied],
        "arithmetic": (spec.flops(sizes) - products) / limits.ordinary,
        "launch": limits.launch,
    }
    term = max(terms, key=lambda name: terms[name])
    return Floor(terms[term], term)
