"""Routing and experts. Tokens are sorted by expert on the device; the host knows only how many there are.

Every (token, expert) pair is one row of two grouped products whose tiles hold rows of one expert each: as in tiles.py,
a row's sums know nothing of the rows beside it, nor of where among them it was put. What the k experts of a token gave
is added in the order in which the token names them. Temporaries: one row of the inner width and one of the hidden width
for every pair.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.kernels.arguments import Weight
from thalweg.kernels.triton.launch import Launch
from thalweg.kernels.triton.tiles import TYPES, options_of, step_of, tile_product

ROWS = 32  # pairs in a tile: few of a step choose the same expert, and a lone one pays for the whole tile
OUTPUTS = 128  # of a tile; of gate and up 64 each
SORTING, PLAIN = {"num_warps": 8, "num_stages": 3}, {"num_warps": 4, "num_stages": 3}
SCANNED = 1024  # pairs that are looked at together
ELEMENTS = 2048  # that one program computes: two loads of 16 bytes in every thread


def route(logits: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    logits = logits.contiguous()
    ids = logits.new_empty((tokens, k), dtype=torch.int64) if chosen is None else chosen.contiguous()
    weights = logits.new_empty(ids.shape, dtype=torch.float32)
    if tokens:
        route_token[(tokens,)](
            logits, logits if bias is None else bias, ids, weights, scale, experts, ids.shape[1],
            BIASED=bias is not None, CHOSEN=chosen is not None,
            EXPERTS=triton.next_power_of_2(experts), K=triton.next_power_of_2(ids.shape[1]), **PLAIN,
        )  # fmt: skip
    return ids, weights


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    gate, up = (x if x.stride(-1) == 1 and x.dim() == 2 else x.contiguous() for x in (gate, up))
    width = gate.shape[-1]
    result = gate.new_empty(gate.shape, dtype=torch.float32)
    if size := result.numel():
        strides = gate.stride(-2) if gate.dim() > 1 else width, up.stride(-2) if up.dim() > 1 else width
        gate_elements[(triton.cdiv(size, ELEMENTS),)](
            gate, up, result, size, width, *strides, limit, ELEMENTS=ELEMENTS, **PLAIN
        )
    return result


def experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Weight, down: Weight, limit: float) -> Tensor:
    """Between the matrices rows are in the dtype of x."""
    (tokens, k), hidden, inner = ids.shape, down.outputs, down.width
    result = x.new_empty((tokens, hidden), dtype=torch.float32)
    if tokens == 0:
        return result
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    order, tiles = _sorted(ids, len(gate_up.data))
    gated, given = x.new_empty((tokens * k, inner)), x.new_empty((tokens * k, hidden))
    _product(x, gate_up, order, tiles, gated, weights, limit, k)
    _product(gated, down, order, tiles, given, None, limit, 1)
    size = result.numel()
    add_experts[(triton.cdiv(size, ELEMENTS),)](given, result, size, hidden, k, ELEMENTS=ELEMENTS, **PLAIN)
    return result


def _sorted(ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Numbers of all pairs, ordered by expert, and for every tile its expert, first place and end in that order. There
    are as many tiles as any choice could need; those that this one does not need have expert -1."""
    pairs = ids.numel()
    order = ids.new_empty(pairs, dtype=torch.int32)
    tiles = ids.new_empty((min(pairs, pairs // ROWS + count), 3), dtype=torch.int32)
    sort_pairs[(count,)](
        ids, order, tiles, pairs, len(tiles), ROWS=ROWS, EXPERTS=triton.next_power_of_2(count), SCANNED=SCANNED,
        **SORTING,
    )  # fmt: skip
    return order, tiles


def _product(
    x: Tensor, weight: Weight, order: Tensor, tiles: Tensor, out: Tensor, weights: Tensor | None, limit: float, k: int
) -> None:
    """Each pair's row of x, or its token's where k > 1 pairs share one, times its expert's matrix. With `weights` that
    matrix has gate and up rows, and what is written is gated and weighted."""
    data, scales = weight.data, weight.data if weight.scales is None else weight.scales
    outputs = out.shape[1]
    gated = weights is not None
    own = OUTPUTS // 2 if gated else OUTPUTS
    expert_tile[(len(tiles), triton.cdiv(outputs, own))](
        x, data, scales, order, tiles, out if weights is None else weights, out, outputs, weight.width, limit, k,
        data[0].numel(), scales[0].numel(), **_tile_constants(data.dtype, weight.width, gated=gated),
        **options_of(OUTPUTS, x.dtype),
    )  # fmt: skip


def _tile_constants(weight: torch.dtype, width: int, *, gated: bool) -> dict[str, int | bool]:
    step = step_of(weight)
    return {"OUTPUTS": OUTPUTS, "ROWS": ROWS, "STEP": step, "WHOLE": width % step == 0, "GATED": gated}


@triton.jit
def score(logits):
    """sqrt(softplus(x)) = sqrt(max(x, 0) + log(1 + u)), u = exp(-|x|); what 1 + u loses of u is made good."""
    u = tl.exp(-tl.abs(logits))
    w = 1.0 + u
    more = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.sqrt(tl.maximum(logits, 0.0) + more)


@triton.jit
def route_token(
    logits, bias, ids, weights, scale, experts, k,
    BIASED: tl.constexpr, CHOSEN: tl.constexpr, EXPERTS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Experts and weights of one token."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, K)
    if CHOSEN:
        given = tl.load(ids + token * k + place, mask=place < k, other=0)
        scores = score(tl.load(logits + token * experts + given).to(tl.float32))
    else:
        expert = tl.arange(0, EXPERTS)
        there = expert < experts
        every = score(tl.load(logits + token * experts + expert, mask=there, other=0.0).to(tl.float32))
        ranked = every
        if BIASED:
            ranked += tl.load(bias + expert, mask=there, other=0.0).to(tl.float32)
        ranked = tl.where(there, ranked, float("-inf"))
        scores = tl.zeros([K], tl.float32)
        for number in range(k):
            best = tl.argmax(ranked, 0, tie_break_left=True)
            tl.store(ids + token * k + number, best.to(tl.int64))
            scores = tl.where(place == number, tl.sum(tl.where(expert == best, every, 0.0)), scores)
            ranked = tl.where(expert == best, float("-inf"), ranked)
    scores = tl.where(place < k, scores, 0.0)
    tl.store(weights + token * k + place, scores / tl.sum(scores) * scale, mask=place < k)


@triton.jit
def gated_linear(gate, up, limit):
    """silu(min(gate, limit)) * clamp(up, +-limit)."""
    gate = tl.minimum(gate, limit)
    return gate / (1.0 + tl.exp(-gate)) * tl.minimum(tl.maximum(up, -limit), limit)


@triton.jit
def gate_elements(gate, up, out, size, width, gate_row, up_row, limit, ELEMENTS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    there = place < size
    row, column = place // width, place % width
    g = tl.load(gate + row * gate_row + column, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + place, gated_linear(g, u, limit), mask=there)


@triton.jit
def sort_pairs(
    ids, order, tiles, pairs, most, ROWS: tl.constexpr, EXPERTS: tl.constexpr, SCANNED: tl.constexpr
):  # fmt: skip
    """One expert's part of the order and of the tiles; every program counts all pairs itself, so that none waits."""
    own = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    lane = tl.arange(0, SCANNED)
    counts = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, pairs, SCANNED):
        there = first + lane < pairs
        chosen = tl.load(ids + first + lane, mask=there, other=0).to(tl.int32)
        counts += tl.histogram(chosen, EXPERTS, mask=there)
    needed = (counts + ROWS - 1) // ROWS
    begin = tl.sum(tl.where(expert < own, counts, 0))
    count = tl.sum(tl.where(expert == own, counts, 0))
    tile = tl.sum(tl.where(expert < own, needed, 0))
    if own == tl.num_programs(0) - 1:
        for unused in range(tl.sum(needed), most):
            tl.store(tiles + unused * 3, -1)
    for number in range(0, count, ROWS):
        entry = tiles + (tile + number // ROWS) * 3
        tl.store(entry, own)
        tl.store(entry + 1, begin + number)
        tl.store(entry + 2, begin + count)
    found = begin
    if count > 0:
        for first in range(0, pairs, SCANNED):
            there = first + lane < pairs
            mine = there & (tl.load(ids + first + lane, mask=there, other=-1) == own)
            taken = mine.to(tl.int32)
            tl.store(order + found + tl.cumsum(taken, 0) - 1, first + lane, mask=mine)
            found += tl.sum(taken)


@triton.jit
def expert_tile(
    x, weight, scales, order, tiles, weights, out, outputs, width, limit, k, weight_expert, scales_expert,
    OUTPUTS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One tile of out [pairs, outputs]. Neighbouring programs have other rows, and often the same expert."""
    expert = tl.load(tiles + tl.program_id(0) * 3).to(tl.int64)
    if expert < 0:
        return
    place = tl.load(tiles + tl.program_id(0) * 3 + 1) + tl.arange(0, ROWS)
    present = place < tl.load(tiles + tl.program_id(0) * 3 + 2)
    pair = tl.load(order + place, mask=present, other=0).to(tl.int64)
    i = tl.arange(0, OUTPUTS)
    if GATED:
        # 8 gate rows, 8 up rows, and so on: a thread of a tensor core's result then holds a gate and its up.
        n = tl.program_id(1) * (OUTPUTS // 2) + i // 16 * 8 + i % 8
        known = n < outputs
        row = n + i // 8 % 2 * outputs
    else:
        n = tl.program_id(1) * OUTPUTS + i
        known = n < outputs
        row = n
    acc = tile_product(
        x + pair // k * width, present, weight + expert * weight_expert, scales + expert * scales_expert, row, known,
        0, width, width, OUTPUTS, ROWS, STEP, WHOLE,
    )  # fmt: skip
    if GATED:
        both = tl.permute(tl.reshape(acc, (OUTPUTS // 16, 2, 8, ROWS)), (0, 2, 3, 1))
        gate, up = tl.split(both)
        by = tl.load(weights + pair, mask=present, other=0.0).to(tl.float32)
        acc = tl.reshape(gated_linear(gate, up, limit), (OUTPUTS // 2, ROWS)) * by[None, :]
        n = tl.program_id(1) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
        known = n < outputs
    target = out + pair[None, :] * outputs + n[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=known[:, None] & present[None, :])


@triton.jit
def add_experts(given, out, size, hidden, k, ELEMENTS: tl.constexpr):
    """out [T, D] = the sum of given [T, k, D] over k, the first of them first."""
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    there = place < size
    own = given + place // hidden * k * hidden + place % hidden
    total = tl.zeros([ELEMENTS], tl.float32)
    for _ in range(k):
        total += tl.load(own, mask=there, other=0.0).to(tl.float32)
        own += hidden
    tl.store(out + place, total, mask=there)


def launches(config: ModelConfig) -> list[Launch]:
    """Experts in FP4, as released models have them, and in FP8, as base models do."""
    hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    wide, k = triton.next_power_of_2(experts), triton.next_power_of_2(config.experts_per_token)
    route = {"logits": "*fp32", "bias": "*fp32", "ids": "*i64", "weights": "*fp32", "scale": "fp32"}
    route |= {"experts": "i32", "k": "i32"}
    swiglu = dict.fromkeys(("gate", "up"), "*bf16") | {"out": "*fp32"}
    swiglu |= dict.fromkeys(("size", "width", "gate_row", "up_row"), "i32") | {"limit": "fp32"}
    order = {"ids": "*i64", "order": "*i32", "tiles": "*i32", "pairs": "i32", "most": "i32"}
    added = {"given": "*bf16", "out": "*fp32"} | dict.fromkeys(("size", "hidden", "k"), "i32")
    sorting, adding = {"ROWS": ROWS, "EXPERTS": wide, "SCANNED": SCANNED}, {"ELEMENTS": ELEMENTS}
    return [
        *(
            Launch("route", what, route_token, route, {**how, "EXPERTS": wide, "K": k}, PLAIN, aligned=("experts",))
            for what, how in (
                ("by score", {"BIASED": True, "CHOSEN": False}),
                ("by token", {"BIASED": False, "CHOSEN": True}),
            )
        ),
        Launch("swiglu", f"{inner}", gate_elements, swiglu, adding, PLAIN, aligned=("width", "gate_row", "up_row")),
        Launch("experts", f"pairs of {experts} sorted", sort_pairs, order, sorting, SORTING),
        *(_of_experts(weight, hidden, inner, gated=True) for weight in (torch.uint8, torch.float8_e4m3fn)),
        *(_of_experts(weight, inner, hidden, gated=False) for weight in (torch.uint8, torch.float8_e4m3fn)),
        Launch("experts", "experts added", add_experts, added, adding, PLAIN, aligned=("hidden", "size")),
    ]


def _of_experts(weight: torch.dtype, width: int, outputs: int, *, gated: bool) -> Launch:
    x, form = torch.bfloat16, "FP4" if weight is torch.uint8 else "FP8"
    types = {"x": TYPES[x], "weight": TYPES[weight], "scales": "*u8", "order": "*i32", "tiles": "*i32"}
    types |= {"weights": "*fp32" if gated else TYPES[x], "out": TYPES[x], "outputs": "i32", "width": "i32"}
    types |= {"limit": "fp32", "k": "i32", "weight_expert": "i32", "scales_expert": "i32"}
    what = f"{form}, {'gate and up' if gated else 'down'} {width} to {outputs}"
    aligned = ("outputs", "width", "weight_expert", "scales_expert")
    constants = _tile_constants(weight, width, gated=gated)
    return Launch("experts", what, expert_tile, types, constants, options_of(OUTPUTS, x), True, aligned)
