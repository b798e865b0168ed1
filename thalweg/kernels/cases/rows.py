"""Cases of the ops whose rows need nothing but themselves, weights and constants."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thalweg.kernels.arguments import FP4_GROUP, FP8_BLOCK, Matrix, Quantised, Weight
from thalweg.kernels.cases.case import Bind, Case, Input, Source, Wide, over_rows
from thalweg.kernels.ops import Kernels

ELEMENT = 4  # bytes of activations: fp32
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "fp8": 1 + FP8_BLOCK**-2, "fp4": 0.5 + 1 / FP4_GROUP}  # with scales
_FP8_DEVIATION, _FP4_DEVIATION = 32.0, 2.9  # of values before they are scaled; the latter is that of equally many codes
NORM_EPS, MIX_EPS, ROUTED_SCALE = 1e-6, 1e-6, 1.5
_ROUTING_GAP = 1e-5  # between the scores of neighbours in rank: any order of sums must rank them alike
_SPREAD = 3.0  # rows to be rounded have magnitudes from 10^-3 to 10^3


def linear(shape: str, rows: int, width: int, outputs: int, *, form: str = "float32") -> Case:
    """`form` of the weights, one of WEIGHT_BYTES: each backend keeps it or widens it."""

    def inputs(source: Source) -> Bind:
        return over_rows(
            lambda kernels, w, x: kernels.linear(x, w),
            (source.normal(rows, width),),
            weights=(_weight(source, form, outputs, width),),
        )

    sizes = {"rows": rows, "width": width, "outputs": outputs, "element": ELEMENT}
    return Case("linear", shape, sizes | {"weight_element": WEIGHT_BYTES[form]}, rows, inputs)


def grouped_linear(shape: str, rows: int, groups: int, width: int, outputs: int, *, form: str = "float32") -> Case:
    def inputs(source: Source) -> Bind:
        weight = _weight(source, form, groups, outputs, width)
        return over_rows(
            lambda kernels, w, x: kernels.grouped_linear(x, w), (source.normal(rows, groups, width),), weights=(weight,)
        )

    sizes = {"rows": rows, "groups": groups, "width": width, "outputs": outputs, "element": ELEMENT}
    return Case("grouped_linear", shape, sizes | {"weight_element": WEIGHT_BYTES[form]}, rows, inputs)


def _weight(source: Source, form: str, *shape: int) -> Matrix:
    """Of a deviation of about one over the root of the width; scales differ by a factor of two from block to block."""
    if form in ("float32", "bfloat16"):
        weight = source.weight(*shape)
        return weight.bfloat16() if form == "bfloat16" else weight
    *groups, outputs, width = shape
    if form == "fp8":
        data = (source.normal(*shape) * _FP8_DEVIATION).to(torch.float8_e4m3fn)
        blocks, deviation = (*groups, -(-outputs // FP8_BLOCK), -(-width // FP8_BLOCK)), _FP8_DEVIATION
    else:
        data = source.integers(0, 256, *groups, outputs, width // 2).to(torch.uint8)
        blocks, deviation = (*groups, outputs, width // FP4_GROUP), _FP4_DEVIATION
    exponent = 127 + round(math.log2(width**-0.5 / deviation))
    return Quantised(data, source.integers(exponent - 1, exponent + 1, *blocks).to(torch.uint8))


def rms_norm(shape: str, rows: int, width: int, *, weighted: bool = True) -> Case:
    def inputs(source: Source) -> Bind:
        fixed = (source.normal(width),) if weighted else ()
        return over_rows(
            lambda kernels, *given: kernels.rms_norm(given[-1], given[0] if weighted else None, NORM_EPS),
            (source.normal(rows, width),),
            fixed=fixed,
        )

    return Case("rms_norm", shape, {"rows": rows, "width": width, "element": ELEMENT}, rows, inputs)


def rotate(shape: str, rows: int, heads: int, width: int, rope: int) -> Case:
    """Heads are rows to the op's costs."""

    def inputs(source: Source) -> Bind:
        angles = source.normal(rows, rope // 2) * 100
        x = source.normal(rows, heads, width)
        return over_rows(
            lambda kernels, x, c, s: kernels.rotate(x.clone(), c, s), (x, Wide(angles.cos()), Wide(angles.sin()))
        )

    sizes = {"rows": rows * heads, "width": width, "rope": rope, "element": ELEMENT}
    return Case("rotate", shape, sizes, rows, inputs)


def norm_rotate(shape: str, rows: int, heads: int, width: int, rope: int, *, weighted: bool) -> Case:
    """Heads are rows to the op's costs."""

    def inputs(source: Source) -> Bind:
        angles, x = source.normal(rows, rope // 2) * 100, source.normal(rows, heads, width)

        def call(kernels: Kernels, *given: Tensor) -> Tensor:
            *weight, x, c, s = given
            return kernels.norm_rotate(x, weight[0] if weighted else None, NORM_EPS, c, s)

        fixed = (source.normal(width),) if weighted else ()
        return over_rows(call, (x, Wide(angles.cos()), Wide(angles.sin())), fixed=fixed)

    sizes = {"rows": rows * heads, "width": width, "rope": rope, "element": ELEMENT}
    return Case("norm_rotate", shape, sizes, rows, inputs)


def rotate_to(shape: str, rows: int, heads: int, width: int, rope: int) -> Case:
    """From fp32 to the dtype of the activations, which an input of no elements tells."""

    def inputs(source: Source) -> Bind:
        angles, x = source.normal(rows, rope // 2) * 100, source.normal(rows, heads, width)
        return over_rows(
            lambda kernels, like, x, c, s: kernels.rotate_to(x.clone(), c, s, like.dtype),
            (Wide(x), Wide(angles.cos()), Wide(angles.sin())),
            fixed=(source.normal(0),),
        )

    sizes = {"rows": rows * heads, "width": width, "rope": rope, "element": ELEMENT}
    return Case("rotate_to", shape, sizes, rows, inputs)


def mix_in(shape: str, rows: int, streams: int, hidden: int, iterations: int = 20) -> Case:
    def inputs(source: Source) -> Bind:
        outputs = (2 + streams) * streams
        return over_rows(
            lambda kernels, fn, base, scale, x: kernels.mix_in(x, fn, base, scale, NORM_EPS, MIX_EPS, iterations),
            (source.normal(rows, streams, hidden),),
            weights=(Wide(source.weight(outputs, streams * hidden)),),
            fixed=(Wide(source.normal(outputs)), Wide(source.normal(3))),
        )

    sizes = {"rows": rows, "streams": streams, "hidden": hidden, "iterations": iterations, "element": ELEMENT}
    return Case("mix_in", shape, sizes, rows, inputs)


def mix_out(shape: str, rows: int, streams: int, hidden: int) -> Case:
    def inputs(source: Source) -> Bind:
        comb = torch.softmax(source.normal(rows, streams, streams), -1)
        post, streams_ = Wide(source.normal(rows, streams)), source.normal(rows, streams, hidden)
        given = (source.normal(rows, hidden), streams_, post, Wide(comb))
        return over_rows(lambda kernels, *rows: kernels.mix_out(*rows), given)

    return Case("mix_out", shape, _streams(rows, streams, hidden), rows, inputs)


def mix_head(shape: str, rows: int, streams: int, hidden: int) -> Case:
    def inputs(source: Source) -> Bind:
        return over_rows(
            lambda kernels, fn, base, scale, x: kernels.mix_head(x, fn, base, scale, NORM_EPS, MIX_EPS),
            (source.normal(rows, streams, hidden),),
            weights=(Wide(source.weight(streams, streams * hidden)),),
            fixed=(Wide(source.normal(streams)), Wide(source.normal(1))),
        )

    return Case("mix_head", shape, _streams(rows, streams, hidden), rows, inputs)


def _streams(rows: int, streams: int, hidden: int) -> dict[str, int]:
    return {"rows": rows, "streams": streams, "hidden": hidden, "element": ELEMENT}


def compress(shape: str, entries: int, tokens: int, width: int, *, overlap: bool) -> Case:
    """With overlap an entry pools twice as many tokens; some entries have none before them."""

    def inputs(source: Source) -> Bind:
        rows, own = source.normal(entries * tokens, 2 * width), source.order(entries * tokens).view(entries, tokens)
        if not overlap:
            return over_rows(lambda kernels, rows, own: kernels.compress(rows, own), (own,), fixed=(Wide(rows),))
        before = source.normal(entries * tokens, 2 * width)
        previous = source.order(entries * tokens).view(entries, tokens).clone()
        previous[::5] = -1
        return over_rows(
            lambda kernels, rows, before, own, previous: kernels.compress(rows, own, before, previous),
            (own, previous),
            fixed=(Wide(rows), Wide(before)),
        )

    sizes = {"entries": entries, "tokens": tokens * (1 + overlap), "width": width}
    return Case("compress", shape, sizes, entries, inputs)


def route(shape: str, rows: int, experts: int, k: int, *, how: str = "biased") -> Case:
    """`how`: biased, plain (no bias), hashed (given experts), or equal (all logits alike: the lowest ids win)."""

    def inputs(source: Source) -> Bind:
        bias = source.normal(experts) * 0.5 if how == "biased" else None
        logits = torch.zeros(rows, experts) if how == "equal" else _rankable(source, rows, experts, bias)
        chosen = (source.order(experts)[:k] for _ in range(rows))
        given: tuple[Input, ...] = (Wide(logits),)
        if how == "hashed":
            given += (torch.stack(list(chosen)),)
        return over_rows(
            lambda kernels, *all_: kernels.route(
                all_[0 if bias is None else 1],
                None if bias is None else all_[0],
                all_[1] if how == "hashed" else None,
                k,
                ROUTED_SCALE,
            ),
            given,
            fixed=() if bias is None else (Wide(bias),),
        )

    def comparable(result: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Weights by expert: the order of a row's experts is nobody's promise."""
        ids, weights = result
        return (torch.zeros(len(ids), experts, dtype=weights.dtype).scatter(1, ids, weights),)

    return Case("route", shape, {"rows": rows, "experts": experts, "k": k}, rows, inputs, comparable)


def _rankable(source: Source, rows: int, experts: int, bias: Tensor | None) -> Tensor:
    """Logits whose scores keep their ranks under rounding."""
    logits = source.normal(rows, experts) * 2
    while True:
        scores = torch.nn.functional.softplus(logits.double()).sqrt() + (0 if bias is None else bias.double())
        close = scores.sort(-1).values.diff(dim=-1).lt(_ROUTING_GAP).any(-1)
        if not close.any():
            return logits
        logits[close] = source.normal(int(close.sum()), experts) * 2


def swiglu(shape: str, rows: int, width: int, limit: float) -> Case:
    def inputs(source: Source) -> Bind:
        given = (source.normal(rows, width) * 4, source.normal(rows, width) * 4)
        return over_rows(lambda kernels, gate, up: kernels.swiglu(gate, up, limit), given)

    return Case("swiglu", shape, {"rows": rows, "width": width, "element": ELEMENT}, rows, inputs)


def experts(
    shape: str, rows: int, count: int, k: int, hidden: int, inner: int, *, limit: float, form: str = "float32"
) -> Case:
    """Every token chooses k of `count` experts, each as often as the others."""

    def inputs(source: Source) -> Bind:
        ids = torch.stack([source.order(count)[:k] for _ in range(rows)])
        by = torch.softmax(source.normal(rows, k), -1) * ROUTED_SCALE
        given = (source.normal(rows, hidden), ids, Wide(by))
        weights = (_weight(source, form, count, 2 * inner, hidden), _weight(source, form, count, hidden, inner))

        def call(kernels: Kernels, up: Weight, down: Weight, x: Tensor, ids: Tensor, by: Tensor) -> Tensor:
            return kernels.experts(x, ids, by, up, down, limit)

        return over_rows(call, given, weights=weights)

    sizes = {"rows": rows, "k": k, "hidden": hidden, "inner": inner, "used_experts": min(count, rows * k)}
    return Case("experts", shape, sizes | {"element": ELEMENT, "weight_element": WEIGHT_BYTES[form]}, rows, inputs)


def rounding(op: str, shape: str, rows: int, width: int, rope: int = 0) -> Case:
    """round_kv, round_index or round_index_fp8 over magnitudes from small to large."""

    def inputs(source: Source) -> Bind:
        x = source.normal(rows, width) * 10 ** (source.normal(rows, 1).clamp(-1, 1) * _SPREAD)
        arguments = (rope,) if op == "round_kv" else ()
        return over_rows(lambda kernels, x: getattr(kernels, op)(x, *arguments), (x,))

    return Case(op, shape, {"rows": rows, "width": width, "element": ELEMENT}, rows, inputs)


def sample(shape: str, rows: int, vocab: int, how: str) -> Case:
    """`how`: greedy, plain (the temperature alone), or truncated (by everything, in some rows)."""

    def inputs(source: Source) -> Bind:
        logits = source.normal(rows, vocab) * 4
        temperature, top_k, top_p, min_p, uniform = source.integers(0, 1 << 24, rows, 5).div(1 << 24).unbind(1)
        temperature = temperature * 2 * (how != "greedy")
        off, some = torch.tensor([0.0, 1.0, 0.0]), torch.stack([(top_k * vocab / 4).ceil(), top_p, min_p**3], 1)
        truncated = torch.where(source.integers(0, 2, rows, 3).bool() & (how == "truncated"), some, off)
        controls = torch.cat([temperature[:, None], truncated, uniform[:, None]], 1)
        return over_rows(
            lambda kernels, logits, controls: kernels.sample(logits, controls.double()), (logits, Wide(controls))
        )

    return Case("sample", shape, {"rows": rows, "vocab": vocab}, rows, inputs)
