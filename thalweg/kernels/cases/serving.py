"""What a GPU that serves a model at full width asks of each op: decode steps and a prefill chunk at growing context.

Activations are bfloat16, experts FP4, other matrices FP8 but for the head, KV rows 584 bytes, index keys FP4: the
formats in which V4 is released and served.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from thalweg.config.model import ModelConfig
from thalweg.kernels.cases import caches, rows, stored
from thalweg.kernels.cases.caches import Heads, Span
from thalweg.kernels.cases.case import Case
from thalweg.kernels.cases.workloads import inserted
from thalweg.kernels.spec import OPS

CONTEXTS = {"8K": 1 << 13, "128K": 1 << 17, "1M": 1 << 20}
DECODE, BATCH, CHUNK = 1, 16, 8192
STEPS = {"decode 1": DECODE, "decode 16": BATCH, "prefill 8192": CHUNK}
_NARROW = {"element": 2}
_KV = stored.KV_FORMATS[-1]
_INDEX = {form.name: form for form in stored.INDEX_FORMATS[2:]}


def serving_cases(config: ModelConfig) -> list[Case]:
    """In the order of spec.py. A shape is named by its step first and, where context matters, by that last."""
    makers = (_products, _elements, _mixes, _index, _attention, _experts, _stored, _samples)
    order = [spec.name for spec in OPS]
    made = (case for make in makers for case in make(config))
    return sorted((_served(case) for case in made), key=lambda case: order.index(case.op))


def _served(case: Case) -> Case:
    """The same with the sizes of bfloat16 elements, of which the costs are computed."""
    return replace(case, sizes={name: _NARROW.get(name, size) for name, size in case.sizes.items()})


def _spans(count: int, context: int) -> tuple[Span, ...]:
    return (Span(context - CHUNK, CHUNK),) if count == CHUNK else (Span(context - 1),) * count


def _products(config: ModelConfig) -> Iterator[Case]:
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    shapes = {
        "query, down": (hidden, config.q_lora_rank),
        "query, up": (config.q_lora_rank, heads),
        "index query": (config.q_lora_rank, config.index_heads * config.index_head_dim),
        "output, up": (config.o_groups * config.o_lora_rank, hidden),
    }
    for step, count in STEPS.items():
        for name, (width, outputs) in shapes.items():
            yield rows.linear(f"{step}, {name} {width} to {outputs}, fp8 weights", count, width, outputs, form="fp8")
        groups, outputs = config.o_groups, config.o_lora_rank
        shape = f"{step}, {groups} times {heads // groups} to {outputs}, fp8 weights"
        yield rows.grouped_linear(shape, count, groups, heads // groups, outputs, form="fp8")
        if count != CHUNK:  # logits are wanted of single tokens
            shape = f"{step}, head {hidden} to {config.vocab_size}, bfloat16 weights"
            yield rows.linear(shape, count, hidden, config.vocab_size, form="bfloat16")


def _elements(config: ModelConfig) -> Iterator[Case]:
    hidden, heads, width, rope = config.hidden_size, config.num_attention_heads, config.head_dim, config.rope_dim
    for step, count in STEPS.items():
        yield rows.rms_norm(f"{step}, hidden {hidden}", count, hidden)
        shape = f"{step}, {heads} heads of {width}"
        yield rows.rotate(shape, count, heads, width, rope)
        yield rows.norm_rotate(shape, count, heads, width, rope, weighted=False)
        yield rows.norm_rotate(f"{step}, {width}", count, 1, width, rope, weighted=True)
        yield rows.rotate_to(shape, count, heads, width, rope)
        yield rows.swiglu(
            f"{step}, {config.moe_intermediate_size}", count, config.moe_intermediate_size, config.swiglu_limit
        )
        yield rows.rounding("round_kv", f"{step}, {width}", count, width, rope)
        index, size = config.index_heads, config.index_head_dim
        yield rows.rounding("round_index", f"{step}, {index} heads of {size}", index * count, size)
        yield rows.rounding("round_index_fp8", f"{step}, {size}", count, size)


def _mixes(config: ModelConfig) -> Iterator[Case]:
    streams, hidden = config.hc_streams, config.hidden_size
    for step, count in STEPS.items():
        shape = f"{step}, {streams} streams of {hidden}"
        yield rows.mix_in(shape, count, streams, hidden, config.hc_sinkhorn_iters)
        yield rows.mix_out(shape, count, streams, hidden)
        if count != CHUNK:
            yield rows.mix_head(shape, count, streams, hidden)
        for tokens, overlap in ((config.csa_ratio, True), (config.hca_ratio, False)):
            shape = f"{step}, {tokens} tokens of {config.head_dim}"
            yield rows.compress(shape, max(1, count // tokens), tokens, config.head_dim, overlap=overlap)
            yield from inserted(config, step, max(1, count // tokens), tokens)


def _index(config: ModelConfig) -> Iterator[Case]:
    ratio = config.csa_ratio
    heads = Heads(config.index_heads, config.index_head_dim, 0, 0, ratio, config.unit_tokens // ratio)
    for name, form in _INDEX.items():
        for step, count in STEPS.items():
            for length, context in CONTEXTS.items():
                shape = f"{step}, {name} keys at {length}"
                yield caches.index_topk(shape, _spans(count, context), heads, form, config.index_topk, exact=False)


def _attention(config: ModelConfig) -> Iterator[Case]:
    shape = (config.num_attention_heads, config.head_dim, config.rope_dim, config.window)
    for mode, ratio in (("selected", config.csa_ratio), ("all", config.hca_ratio)):
        heads = Heads(*shape, ratio, config.unit_tokens // ratio)
        k = config.index_topk if mode == "selected" else 0
        for step, count in STEPS.items():
            for length, context in CONTEXTS.items():
                yield caches.attention(f"{step}, {mode} at {length}", _spans(count, context), heads, _KV, mode, k)


def _experts(config: ModelConfig) -> Iterator[Case]:
    hidden, inner, k = config.hidden_size, config.moe_intermediate_size, config.experts_per_token
    for step, count in STEPS.items():
        yield rows.route(f"{step}, {k} of {config.num_experts}", count, config.num_experts, k)
        made = min(config.num_experts, count * k)
        shape = f"{step}, {k} of {made} times {hidden} to {inner}, fp4 weights"
        yield rows.experts(shape, count, made, k, hidden, inner, limit=config.swiglu_limit, form="fp4")


def _stored(config: ModelConfig) -> Iterator[Case]:
    width, rope = config.head_dim, config.rope_dim
    for step, count in STEPS.items():
        yield stored.store_rows(f"{step}, {_KV.name} KV {width}", _KV, count, width, rope)
        yield stored.read_rows(f"{step}, {_KV.name} KV {width}", _KV, count, width, rope)
        for name, form in _INDEX.items():
            yield stored.store_rows(f"{step}, {name} keys {config.index_head_dim}", form, count, config.index_head_dim)


def _samples(config: ModelConfig) -> Iterator[Case]:
    for step, count in STEPS.items():
        if count != CHUNK:
            yield rows.sample(f"{step}, {config.vocab_size} logits", count, config.vocab_size, "plain")
            yield rows.sample(f"{step}, {config.vocab_size} logits, truncated", count, config.vocab_size, "truncated")
