"""Tokens from logits, without a sort and without the host.

A program reads one row again and again from the L2 cache: first its largest logit, then the sum of all weights
exp((logit - largest) / temperature). Everything else is a search for one value of the row, by halving the range of
values: for the least that top_k and top_p keep, and for the one in whose share of the kept weights the uniform number
falls. Each pass counts and sums what lies above the middle and finds the row's own values next to it, so that a search
ends as soon as none is between its bounds, after about ten passes, and never has to tell equal values apart. Only the
last pass does: it looks for the token itself, in the order of ids.

Weights are fp32 and summed in fp32 by lane, then in fp64: the sums are within 1e-5 of the row's whole, so a token may
differ from the reference's, which computes in float64, where the uniform number is that close to a boundary. Logits
that differ by less than float64 can tell apart after the division by the temperature are in the order of logits here,
of ids there.

A row depends on itself alone: one program of a fixed shape computes it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.config.model import ModelConfig
from thalweg.kernels.triton.launch import Launch

BLOCK = 8192  # logits read at once, 16 in each thread of 16 warps: four loads of 16 bytes on their way
OPTIONS = {"num_warps": 16}


def sample(logits: Tensor, controls: Tensor) -> Tensor:
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        _sample[(rows,)](logits.float().contiguous(), controls.contiguous(), tokens, **constants(vocab), **OPTIONS)
    return tokens


def constants(vocab: int) -> dict[str, Any]:
    return {"VOCAB": vocab, "BLOCK": min(BLOCK, max(1024, triton.next_power_of_2(vocab)))}


def launches(config: ModelConfig) -> list[Launch]:
    return [
        Launch(
            op="sample",
            what=f"{config.vocab_size:,} logits",
            kernel=_sample,
            types={"logits": "*fp32", "controls": "*fp64", "tokens": "*i64"},
            constants=constants(config.vocab_size),
            options=OPTIONS,
        )
    ]


@triton.jit
def _largest(logits, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, VOCAB, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(logits + place, mask=place < VOCAB, other=float("-inf")))
    return tl.max(largest, 0)


@triton.jit
def _whole(logits, largest, scale, least, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of all weights; sum, number and lowest logit of those that are `least` or more."""
    every = tl.zeros([BLOCK], tl.float32)
    kept = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    for begin in range(0, VOCAB, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        logit = tl.load(logits + place, mask=place < VOCAB, other=float("-inf"))
        weight = tl.exp2((logit - largest) * scale)
        keep = weight >= least
        every += weight
        kept += tl.where(keep, weight, 0.0)
        count += keep.to(tl.int32)
        lowest = tl.minimum(lowest, tl.where(keep, logit, float("inf")))
    return tl.sum(every.to(tl.float64), 0), tl.sum(kept.to(tl.float64), 0), tl.sum(count, 0), tl.min(lowest, 0)


@triton.jit
def _split(logits, largest, scale, middle, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Number and weight of the logits above `middle`, the lowest of them, and the highest of the others."""
    count = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    above = tl.full([BLOCK], float("inf"), tl.float32)
    below = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, VOCAB, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        logit = tl.load(logits + place, mask=place < VOCAB, other=float("-inf"))
        higher = logit > middle
        count += higher.to(tl.int32)
        total += tl.where(higher, tl.exp2((logit - largest) * scale), 0.0)
        above = tl.minimum(above, tl.where(higher, logit, float("inf")))
        below = tl.maximum(below, tl.where(higher, float("-inf"), logit))
    return tl.sum(count, 0), tl.sum(total.to(tl.float64), 0), tl.min(above, 0), tl.max(below, 0)


@triton.jit
def _search(
    logits,
    largest,
    scale,
    low,
    reaching,
    most,
    limit,
    INCLUSIVE: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The lowest logit, `low` or more, above which are less than `most` others of a weight below `limit`.

    `reaching` logits are `low` or more. Returns it, the number and weight of those above it, and its own number.
    """
    high = largest
    count = reaching * 0
    weight = limit * 0.0
    while low < high:
        middle = 0.5 * low + 0.5 * high
        middle = tl.where(middle < high, tl.maximum(middle, low), low)
        more, heavier, above, below = _split(logits, largest, scale, middle, VOCAB, BLOCK)
        holds = (more < most) & ((heavier < limit) | (INCLUSIVE & (heavier == limit)))
        high = tl.where(holds, below, high)
        count = tl.where(holds, more, count)
        weight = tl.where(holds, heavier, weight)
        low = tl.where(holds, low, above)
        reaching = tl.where(holds, reaching, more)
    return high, count, weight, reaching - count


@triton.jit
def _token(logits, value, number, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Id of the logit of this value that has `number` equal ones before it."""
    token = number * 0
    before = number * 0
    for begin in range(0, VOCAB, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        equal = (tl.load(logits + place, mask=place < VOCAB, other=float("nan")) == value).to(tl.int32)
        here = tl.sum(equal, 0)
        if (before <= number) & (number < before + here):
            found = (equal != 0) & (before + tl.cumsum(equal, 0) == number + 1)
            token = tl.sum(tl.where(found, place, 0), 0)
        before += here
    return token


@triton.jit
def _sample(logits, controls, tokens, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * VOCAB
    controls += row * 5
    temperature = tl.load(controls)
    largest = _largest(logits, VOCAB, BLOCK)
    value = largest
    number = tl.program_id(0) * 0
    if temperature != 0:
        top_k = tl.load(controls + 1)
        top_p = tl.load(controls + 2)
        least = tl.maximum(tl.load(controls + 3), 1.1754943508222875e-38).to(tl.float32)  # below: no weight at all
        scale = tl.minimum(1.4426950408889634 / temperature, 3e38).to(tl.float32)
        every, kept, reaching, low = _whole(logits, largest, scale, least, VOCAB, BLOCK)
        most = tl.where((top_k > 0) & (top_k < VOCAB), top_k, VOCAB).to(tl.int32)
        last = reaching  # of the tokens of the lowest kept value, those that are kept
        if (most < reaching) | (top_p < 1):
            limit = tl.where(top_p < 1, top_p * every, 2 * every)
            low, count, above, equal = _search(logits, largest, scale, low, reaching, most, limit, False, VOCAB, BLOCK)
            reaching = count + equal
            own = tl.exp2((low - largest) * scale).to(tl.float64)
            last = tl.ceil(tl.minimum((limit - above) / own, equal)).to(tl.int32)
            last = tl.maximum(tl.minimum(last, most - count), 1)
            kept = above + last * own
        target = tl.load(controls + 4) * kept
        value, count, above, equal = _search(
            logits, largest, scale, low, reaching, VOCAB + 1, target, True, VOCAB, BLOCK
        )
        own = tl.exp2((value - largest) * scale).to(tl.float64)
        kept_equal = tl.where(value == low, tl.minimum(last, equal), equal)
        number = tl.minimum(tl.maximum((target - above) / own, 0), kept_equal - 1).to(tl.int32)
    tl.store(tokens + row, _token(logits, value, number, VOCAB, BLOCK).to(tl.int64))
