"""What a served model asks of each op, by model: one decoding request, eight of them, a chunk of a prompt.

Shapes follow the model's config. Experts of a large model are too many to be made here: no more stand for them
than one step uses, or than fit half a GiB per matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from thalweg.config.model import ModelConfig
from thalweg.config.model_parse import load_model_config
from thalweg.kernels.cases import caches, entries, rows, stored
from thalweg.kernels.cases.caches import Heads, Span
from thalweg.kernels.cases.case import Case
from thalweg.kernels.spec import OPS

WIDE_FORMS = ("float32", "bfloat16")  # of weights: on a CPU narrower ones are widened when they are loaded
MODELS = ("default", "race", "flash")
DECODE, BATCH, CHUNK = 1, 8, 1024
SHORT, LONG = 1 << 16, 1 << 20  # tokens of context
_LONG_CHUNK = 128  # queries of a chunk at the long context: the index alone takes seconds for them
_LARGEST_WEIGHT = 1 << 27  # elements of one weight, or of all experts, that is made here: half a GiB
_NAMES = {DECODE: "decode 1", BATCH: "batch 8", CHUNK: "prefill 1024"}


def model_config(name: str) -> ModelConfig:
    """The embedded model, one for speed comparisons on small machines, or Flash."""
    return _race() if name == "race" else load_model_config(name)


def _race() -> ModelConfig:
    """Flash with its head and index widths kept, and everything else as small as one core can use."""
    return replace(
        load_model_config("flash"),
        vocab_size=4096,
        hidden_size=512,
        num_attention_heads=8,
        q_lora_rank=256,
        o_groups=2,
        o_lora_rank=256,
        index_heads=8,
        num_experts=16,
        experts_per_token=2,
        moe_intermediate_size=512,
    )


def workloads(config: ModelConfig) -> list[Case]:
    """Every op at least once, in the order of spec.py."""
    makers = (_linear, _grouped, _elements, _mixes, _compress, _index, _attention, _experts, _stored, _samples)
    order = [spec.name for spec in OPS]
    return sorted((case for make in makers for case in make(config)), key=lambda case: order.index(case.op))


def _linear(config: ModelConfig) -> Iterator[Case]:
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    shapes = {
        "query, down": (hidden, config.q_lora_rank),
        "query, up": (config.q_lora_rank, heads),
        "router": (hidden, config.num_experts),
        "head": (hidden, config.vocab_size),
    }
    for name, (width, outputs) in shapes.items():
        if width * outputs > _LARGEST_WEIGHT:
            continue
        for count, step in _NAMES.items():
            if name == "head" and count == CHUNK:  # logits are wanted of single tokens
                continue
            for form in WIDE_FORMS:
                shape = f"{step}, {name} {width} to {outputs}, {form} weights"
                yield rows.linear(shape, count, width, outputs, form=form)


def _grouped(config: ModelConfig) -> Iterator[Case]:
    width, outputs = config.num_attention_heads * config.head_dim // config.o_groups, config.o_lora_rank
    for count, step in _NAMES.items():
        for form in WIDE_FORMS:
            shape = f"{step}, {config.o_groups} times {width} to {outputs}, {form} weights"
            yield rows.grouped_linear(shape, count, config.o_groups, width, outputs, form=form)


def _elements(config: ModelConfig) -> Iterator[Case]:
    hidden, heads, width, rope = config.hidden_size, config.num_attention_heads, config.head_dim, config.rope_dim
    for count, step in _NAMES.items():
        yield rows.rms_norm(f"{step}, hidden {hidden}", count, hidden)
        yield rows.rms_norm(f"{step}, {heads} heads of {width}", count * heads, width, weighted=False)
        shape = f"{step}, {heads} heads of {width}"
        yield rows.rotate(shape, count, heads, width, rope)
        yield rows.norm_rotate(shape, count, heads, width, rope, weighted=False)
        yield rows.norm_rotate(f"{step}, {width}", count, 1, width, rope, weighted=True)
        yield rows.rotate_to(shape, count, heads, width, rope)
        yield rows.swiglu(
            f"{step}, {config.moe_intermediate_size}", count, config.moe_intermediate_size, config.swiglu_limit
        )
        yield rows.rounding("round_kv", f"{step}, {width}", count, width, rope)
        index = config.index_heads * count
        yield rows.rounding(
            "round_index",
            f"{step}, {config.index_heads} heads of {config.index_head_dim}",
            index,
            config.index_head_dim,
        )
        yield rows.rounding("round_index_fp8", f"{step}, {config.index_head_dim}", count, config.index_head_dim)


def _mixes(config: ModelConfig) -> Iterator[Case]:
    streams, hidden = config.hc_streams, config.hidden_size
    for count, step in _NAMES.items():
        shape = f"{step}, {streams} streams of {hidden}"
        yield rows.mix_in(shape, count, streams, hidden, config.hc_sinkhorn_iters)
        yield rows.mix_out(shape, count, streams, hidden)
        if count != CHUNK:
            yield rows.mix_head(shape, count, streams, hidden)


def _compress(config: ModelConfig) -> Iterator[Case]:
    for tokens, overlap in ((config.csa_ratio, True), (config.hca_ratio, False)):
        for count, step in ((1, "one entry"), (CHUNK // tokens, "prefill 1024")):
            shape = f"{step}, {tokens} tokens of {config.head_dim}"
            yield rows.compress(shape, count, tokens, config.head_dim, overlap=overlap)
            yield from inserted(config, step, count, tokens)


def inserted(config: ModelConfig, step: str, count: int, tokens: int) -> Iterator[Case]:
    """Entries of one compressor, and the index keys beside them, in the formats that are served."""
    overlap = tokens == config.csa_ratio
    groups = [("KV", entries.KV_ROUNDINGS[-1], config.head_dim)]
    if overlap:
        groups.append(("keys", entries.INDEX_ROUNDINGS[-1], config.index_head_dim))
    for name, form, width in groups:
        shape, rope = f"{step}, {tokens} tokens of {width}, {form[0].name} {name}", config.rope_dim
        yield entries.insert_entries(shape, form, count, tokens, width, rope, overlap=overlap, steady=False)


def _steps() -> Iterator[tuple[str, tuple[Span, ...]]]:
    yield "decode 1 at 64K", (Span(SHORT - 1),)
    yield "batch 8 at 64K", (Span(SHORT - 1),) * BATCH
    yield "prefill 1024 at 64K", (Span(SHORT - CHUNK, CHUNK),)
    yield "decode 1 at 1M", (Span(LONG - 1),)
    yield f"prefill {_LONG_CHUNK} at 1M", (Span(LONG - _LONG_CHUNK, _LONG_CHUNK),)


def _index(config: ModelConfig) -> Iterator[Case]:
    ratio = config.csa_ratio
    heads = Heads(config.index_heads, config.index_head_dim, 0, 0, ratio, config.unit_tokens // ratio)
    for step, spans in _steps():
        yield caches.index_topk(f"{step}, float32 keys", spans, heads, stored.WIDE, config.index_topk, exact=False)
    for form in stored.INDEX_FORMATS[2:]:
        yield caches.index_topk(f"decode 1 at 1M, {form.name} keys", (Span(LONG - 1),), heads, form, config.index_topk)


def _attention(config: ModelConfig) -> Iterator[Case]:
    shape = (config.num_attention_heads, config.head_dim, config.rope_dim, config.window)
    sparse = Heads(*shape, config.csa_ratio, config.unit_tokens // config.csa_ratio)
    dense = Heads(*shape, config.hca_ratio, config.unit_tokens // config.hca_ratio)
    for count, step in _NAMES.items():
        spans = (Span(SHORT - CHUNK, CHUNK),) if count == CHUNK else (Span(SHORT - 1),) * count
        yield caches.attention(f"{step}, window", spans, dense, stored.WIDE, "window")
        yield caches.attention(f"{step} at 64K, selected", spans, sparse, stored.WIDE, "selected", config.index_topk)
    for step, spans in _steps():
        yield caches.attention(f"{step}, all", spans, dense, stored.WIDE, "all")
    packed, last = stored.KV_FORMATS[-1], (Span(LONG - 1),)
    yield caches.attention("decode 1 at 1M, selected, fp8 rows", last, sparse, packed, "selected", config.index_topk)
    yield caches.attention("decode 1 at 1M, all, fp8 rows", last, dense, packed, "all")


def _experts(config: ModelConfig) -> Iterator[Case]:
    hidden, inner, k = config.hidden_size, config.moe_intermediate_size, config.experts_per_token
    fit = max(k, min(config.num_experts, _LARGEST_WEIGHT // (2 * hidden * inner)))
    for count, step in _NAMES.items():
        yield rows.route(f"{step}, {k} of {config.num_experts}", count, config.num_experts, k)
        made = min(fit, config.num_experts if count == CHUNK else count * k)
        for form in WIDE_FORMS:
            shape = f"{step}, {k} of {made} times {hidden} to {inner}, {form} weights"
            yield rows.experts(shape, count, made, k, hidden, inner, limit=config.swiglu_limit, form=form)


def _stored(config: ModelConfig) -> Iterator[Case]:
    width, rope, index = config.head_dim, config.rope_dim, config.index_head_dim
    for count, step in _NAMES.items():
        for form in (stored.WIDE, stored.KV_FORMATS[-1]):
            yield stored.store_rows(f"{step}, {form.name} KV {width}", form, count, width, rope)
            yield stored.read_rows(f"{step}, {form.name} KV {width}", form, count, width, rope)
        form = stored.INDEX_FORMATS[-1]
        yield stored.store_rows(f"{step}, {form.name} keys {index}", form, count, index)
        yield stored.read_rows(f"{step}, {form.name} keys {index}", form, count, index)


def _samples(config: ModelConfig) -> Iterator[Case]:
    for count, step in _NAMES.items():
        if count != CHUNK:
            yield rows.sample(f"{step}, {config.vocab_size} logits", count, config.vocab_size, "plain")
            yield rows.sample(f"{step}, {config.vocab_size} logits, truncated", count, config.vocab_size, "truncated")
