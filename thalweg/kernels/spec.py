"""What each op promises and what it costs: tolerance, arithmetic and bytes as functions of shapes. No torch.

FLOPs count a multiply-add as two. Bytes count every input and output once, in the given element sizes: the least that
any kernel must move. Tests hold every backend to `tolerance`; the kernel report compares times with these costs.

The deterministic backend promises bits besides, for every op: a row of the result is the same bits whatever other rows
are computed with it and wherever it lies among them, on one machine with one number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, float]


def _none(sizes: Shapes) -> float:
    return 0.0


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One op. `tolerance` is the largest absolute difference from the float64 result on inputs of standard deviation 1;
    0 means that the result is exact. flops and bytes take named sizes, listed in `sizes`; `products` are those of the
    flops that a GPU's matrix units can do."""

    name: str
    computes: str
    tolerance: float
    sizes: tuple[str, ...]
    flops: Callable[[Shapes], float]
    bytes: Callable[[Shapes], float]
    products: Callable[[Shapes], float] = _none


def _visible_keys(s: Shapes) -> float:
    """Key rows that the queries of a step attend to: window and entries."""
    return s["queries"] * (s["window"] + s["entries"])


OPS: tuple[OpSpec, ...] = (
    OpSpec(
        "linear",
        "x w^T",
        1e-4,
        ("rows", "width", "outputs", "element", "weight_element"),
        lambda s: 2 * s["rows"] * s["width"] * s["outputs"],
        lambda s: (
            s["rows"] * (s["width"] + s["outputs"]) * s["element"] + s["width"] * s["outputs"] * s["weight_element"]
        ),
        lambda s: 2 * s["rows"] * s["width"] * s["outputs"],
    ),
    OpSpec(
        "grouped_linear",
        "x w^T, each group with its own w",
        1e-4,
        ("rows", "groups", "width", "outputs", "element", "weight_element"),
        lambda s: 2 * s["rows"] * s["groups"] * s["width"] * s["outputs"],
        lambda s: (
            s["rows"] * s["groups"] * (s["width"] + s["outputs"]) * s["element"]
            + s["groups"] * s["width"] * s["outputs"] * s["weight_element"]
        ),
        lambda s: 2 * s["rows"] * s["groups"] * s["width"] * s["outputs"],
    ),
    OpSpec(
        "rms_norm",
        "w x / sqrt(mean(x^2) + eps)",
        1e-5,
        ("rows", "width", "element"),
        lambda s: 4 * s["rows"] * s["width"],
        lambda s: (2 * s["rows"] + 1) * s["width"] * s["element"],
    ),
    OpSpec(
        "rotate",
        "rotation of the last channels, pair by pair",
        1e-5,
        ("rows", "width", "rope", "element"),
        lambda s: 3 * s["rows"] * s["rope"],
        lambda s: 2 * s["rows"] * s["width"] * s["element"] + 4 * s["rows"] * s["rope"],
    ),
    OpSpec(
        "norm_rotate",
        "rms_norm, then rotate",
        1e-5,
        ("rows", "width", "rope", "element"),
        lambda s: 4 * s["rows"] * s["width"] + 3 * s["rows"] * s["rope"],
        lambda s: 2 * s["rows"] * s["width"] * s["element"] + 4 * s["rows"] * s["rope"],
    ),
    OpSpec(
        "rotate_to",
        "rotate, then a cast of fp32",
        1e-5,
        ("rows", "width", "rope", "element"),
        lambda s: 3 * s["rows"] * s["rope"],
        lambda s: s["rows"] * s["width"] * (4 + s["element"]) + 4 * s["rows"] * s["rope"],
    ),
    OpSpec(
        "mix_in",
        "mHC: projection, sigmoids, Sinkhorn, weighted sum of the streams",
        1e-4,
        ("rows", "streams", "hidden", "iterations", "element"),
        lambda s: (
            s["rows"]
            * (2 * (2 + s["streams"]) * s["streams"] ** 2 * s["hidden"] + 4 * s["iterations"] * s["streams"] ** 2)
        ),
        lambda s: (
            s["rows"] * (s["streams"] + 1) * s["hidden"] * s["element"]
            + 4 * (2 + s["streams"]) * s["streams"] ** 2 * s["hidden"]
        ),
    ),
    OpSpec(
        "mix_out",
        "mHC: streams mixed with the sublayer's output",
        1e-5,
        ("rows", "streams", "hidden", "element"),
        lambda s: 2 * s["rows"] * s["streams"] * (s["streams"] + 1) * s["hidden"],
        lambda s: s["rows"] * (2 * s["streams"] + 1) * s["hidden"] * s["element"],
    ),
    OpSpec(
        "mix_head",
        "mHC: streams collapsed before the head",
        1e-4,
        ("rows", "streams", "hidden", "element"),
        lambda s: 2 * s["rows"] * s["streams"] * (s["streams"] + 1) * s["hidden"],
        lambda s: s["rows"] * (s["streams"] + 1) * s["hidden"] * s["element"] + 4 * s["streams"] ** 2 * s["hidden"],
    ),
    OpSpec(
        "compress",
        "softmax-gated pooling of tokens into entries",
        1e-5,
        ("entries", "tokens", "width"),
        lambda s: 5 * s["entries"] * s["tokens"] * s["width"],
        lambda s: 4 * s["entries"] * s["width"] * (2 * s["tokens"] + 1),
    ),
    OpSpec(
        "insert_entries",
        "compress, rms_norm, rotate, rounding, store_rows",
        2e-5,
        ("entries", "tokens", "width", "rope", "row_bytes"),
        lambda s: s["entries"] * (5 * s["tokens"] * s["width"] + 8 * s["width"] + 3 * s["rope"]),
        lambda s: s["entries"] * (8 * s["tokens"] * (s["width"] + 1) + 4 * s["rope"] + s["row_bytes"] + 8),
    ),
    OpSpec(
        "index_topk",
        "sum_h w_h relu(q_h . key), the k best; ties to the lowest entry",
        0.0,
        ("queries", "heads", "width", "entries", "distinct_rows", "k", "element", "row_bytes"),
        lambda s: s["queries"] * s["entries"] * s["heads"] * (2 * s["width"] + 3),
        lambda s: (
            s["queries"] * (s["heads"] * s["width"] * s["element"] + 8 * s["k"]) + s["distinct_rows"] * s["row_bytes"]
        ),
        lambda s: 2 * s["queries"] * s["entries"] * s["heads"] * s["width"],
    ),
    OpSpec(
        "attention",
        "softmax over window, entries and sink; key = value",
        2e-5,
        ("queries", "heads", "width", "window", "entries", "distinct_rows", "element", "row_bytes"),
        lambda s: 4 * s["heads"] * s["width"] * _visible_keys(s),
        lambda s: 2 * s["queries"] * s["heads"] * s["width"] * s["element"] + s["distinct_rows"] * s["row_bytes"],
        lambda s: 4 * s["heads"] * s["width"] * _visible_keys(s),
    ),
    OpSpec(
        "route",
        "sqrt(softplus) scores, biased choice, normalised weights",
        1e-5,
        ("rows", "experts", "k"),
        lambda s: 6 * s["rows"] * s["experts"],
        lambda s: 4 * s["rows"] * s["experts"] + 12 * s["rows"] * s["k"],
    ),
    OpSpec(
        "swiglu",
        "silu(min(gate, limit)) clamp(up, +-limit)",
        1e-5,
        ("rows", "width", "element"),
        lambda s: 8 * s["rows"] * s["width"],
        lambda s: s["rows"] * s["width"] * (2 * s["element"] + 4),
    ),
    OpSpec(
        "experts",
        "gated linear units of the chosen experts",
        1e-4,
        ("rows", "k", "hidden", "inner", "used_experts", "element", "weight_element"),
        lambda s: 6 * s["rows"] * s["k"] * s["hidden"] * s["inner"],
        lambda s: (
            3 * s["used_experts"] * s["hidden"] * s["inner"] * s["weight_element"]
            + 2 * s["rows"] * s["hidden"] * s["element"]
        ),
        lambda s: 6 * s["rows"] * s["k"] * s["hidden"] * s["inner"],
    ),
    OpSpec(
        "round_kv",
        "e4m3 rounding in blocks of 64 with power-of-two scales, rotated channels to bf16",
        0.0,
        ("rows", "width", "element"),
        lambda s: 4 * s["rows"] * s["width"],
        lambda s: 2 * s["rows"] * s["width"] * s["element"],
    ),
    OpSpec(
        "round_index",
        "Hadamard rotation and e2m1 rounding in blocks of 32",
        0.0,
        ("rows", "width", "element"),
        lambda s: s["rows"] * s["width"] * (int(s["width"]).bit_length() + 8),
        lambda s: 2 * s["rows"] * s["width"] * s["element"],
    ),
    OpSpec(
        "round_index_fp8",
        "e4m3 rounding with one fp32 scale per row",
        0.0,
        ("rows", "width", "element"),
        lambda s: 4 * s["rows"] * s["width"],
        lambda s: s["rows"] * s["width"] * (s["element"] + 4),
    ),
    OpSpec(
        "store_rows",
        "rows packed into the bytes of a cache stream",
        0.0,
        ("rows", "width", "element", "row_bytes"),
        lambda s: 4 * s["rows"] * s["width"],
        lambda s: s["rows"] * (s["width"] * s["element"] + s["row_bytes"] + 8),
    ),
    OpSpec(
        "read_rows",
        "rows gathered from a cache stream and unpacked to fp32",
        0.0,
        ("rows", "width", "row_bytes"),
        lambda s: s["rows"] * s["width"],
        lambda s: s["rows"] * (s["row_bytes"] + 4 * s["width"] + 8),
    ),
    OpSpec(  # exact but where the uniform number is within 1e-5 of a boundary, in the sum of all probabilities
        "sample",
        "truncated distribution of each row of logits, and the token at a uniform number's place in it",
        0.0,
        ("rows", "vocab"),
        lambda s: 6 * s["rows"] * s["vocab"],
        lambda s: s["rows"] * (4 * s["vocab"] + 48),
    ),
)


def spec_of(name: str) -> OpSpec:
    """The specification of an op by name."""
    return next(op for op in OPS if op.name == name)
