"""What fits on a GPU: weights by layout, workspace, and sessions in the rest, by cache group. No tensor is made.

Two parameters describe a sequence in any engine: bytes per request and bytes per token. Ours come from the real
geometry (cache/geometry.py) and byte layout (memory/layout.py). vLLM's come from its page geometry: one pool of blocks
for all groups, each block as large as the largest group's page of 256 tokens; and a running request reserves, of the
windows and compressor states, blocks for a whole step of tokens. vLLM reports pool / need(max_model_len) *
max_model_len as its "KV cache size", which is no storage (vllm-project/vllm#51041, groups as listed in #54703).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from thalweg.cache.geometry import Group, cache_groups
from thalweg.cache.policy import CHECKPOINT_SPACING_UNITS
from thalweg.checkpoint.parameters import Parameter, Storage, parameters
from thalweg.config.model import LayerKind, ModelConfig
from thalweg.errors import ConfigError, nearest
from thalweg.memory.capacity import checkpoint_bytes, live_bytes
from thalweg.memory.layout import CacheLayout, RowFormat
from thalweg.planner.hardware import accelerator
from thalweg.planner.layout import Deployment, ParallelLayout
from thalweg.planner.op_times import WEIGHT_BYTES

GIB = 2**30
PAGE_ALIGNMENT = 576  # bytes, of vLLM's fp8_ds_mla pages
PAGE_TOKENS = 256  # vLLM's --block-size for V4
WINDOW_PAGE_TOKENS, CSA_STATE_TOKENS, HCA_STATE_TOKENS = 64, 4, 8
RUNTIME_BYTES = 3758096384 + 411041792  # a CUDA context, libraries and graphs; NCCL: aiconfigurator's system files
INDEX_LOGITS_BYTES = 512 * 2**20  # vLLM's default bound of the indexer's scores
ENGINES = ("thalweg", "vllm")


@dataclass(frozen=True, slots=True)
class GroupNeed:
    """What a sequence needs of one group: blocks of `block_bytes` for every `block_tokens` of context, or, of a sliding
    group, blocks for at most `most_tokens` and one more."""

    name: str
    block_bytes: int
    block_tokens: int
    most_tokens: int | None = None

    def bytes(self, tokens: int) -> int:
        """Bytes of this group for a sequence of so many tokens."""
        if self.most_tokens is None:
            return -(-tokens // self.block_tokens) * self.block_bytes
        return (-(-min(tokens, self.most_tokens) // self.block_tokens) + 1) * self.block_bytes


@dataclass(frozen=True, slots=True)
class SessionNeed:
    """All groups of a sequence in an engine's geometry."""

    engine: str
    groups: tuple[GroupNeed, ...]

    def bytes(self, tokens: int) -> int:
        """Bytes of one sequence of so many tokens."""
        return sum(group.bytes(tokens) for group in self.groups)

    def by_group(self, tokens: int) -> dict[str, int]:
        """The same by group: the proof of a capacity."""
        return {group.name: group.bytes(tokens) for group in self.groups}

    @property
    def request_bytes(self) -> int:
        """Bytes of a long sequence that do not depend on its length."""
        return sum(g.bytes(g.most_tokens) for g in self.groups if g.most_tokens is not None)

    @property
    def token_bytes(self) -> float:
        """Bytes that one more token adds."""
        return sum(g.block_bytes / g.block_tokens for g in self.groups if g.most_tokens is None)


def session_need(
    model: ModelConfig, engine: str, step_tokens: int, layout: CacheLayout | None = None, *, prefix_caching: bool = True
) -> SessionNeed:
    """A sequence's need in an engine. Raises ConfigError for engines whose page geometry is not known here."""
    if engine not in ENGINES:
        raise ConfigError(
            f"engine: the page geometry of {engine!r} is not known; known: {', '.join(ENGINES)}."
            f"{nearest(engine, ENGINES)}",
            param="engine",
        )
    layout = layout or CacheLayout(RowFormat.FP8, RowFormat.FP8, model.rope_dim)
    if engine == "thalweg":
        return _our_need(model, layout, prefix_caching=prefix_caching)
    return _vllm_need(model, layout, step_tokens)


def _our_need(model: ModelConfig, layout: CacheLayout, *, prefix_caching: bool) -> SessionNeed:
    """Our geometry: live sliding groups cost the same at any length; a checkpoint every so many units is shared out."""
    specs = cache_groups(model)
    needs = []
    for spec in specs:
        if spec.compressed:
            needs.append(GroupNeed(spec.group, layout.block_bytes(spec), spec.tokens_per_block))
        else:
            needs.append(GroupNeed(spec.group, live_bytes(spec, layout), 1, 0))
    if prefix_caching:
        unit = max((s.tokens_per_block for s in specs if s.compressed), default=model.unit_tokens)
        share = -(-checkpoint_bytes(specs, layout) // CHECKPOINT_SPACING_UNITS)
        needs.append(GroupNeed("checkpoints", share, unit))
    return SessionNeed("thalweg", tuple(needs))


def _page(rows: int, row_bytes: int) -> int:
    return -(-rows * row_bytes // PAGE_ALIGNMENT) * PAGE_ALIGNMENT


def _vllm_need(model: ModelConfig, layout: CacheLayout, step_tokens: int) -> SessionNeed:
    streams = {s.name: s for spec in cache_groups(model) for s in spec.streams}
    kv = layout.row_bytes(streams["window"])
    index = layout.row_bytes(streams[Group.INDEX]) if Group.INDEX in streams else 0
    csa, hca = len(model.layers_of(LayerKind.CSA)), len(model.layers_of(LayerKind.HCA))
    state = 2 * 4  # key-value and gate, fp32
    page = csa * (_page(PAGE_TOKENS // model.csa_ratio, kv) + _page(PAGE_TOKENS // model.csa_ratio, index))
    page += hca * _page(PAGE_TOKENS // model.hca_ratio, kv)
    window = _page(WINDOW_PAGE_TOKENS, kv)
    groups = math.ceil(model.num_layers / max(1, page // window))  # window layers in as few groups as a page holds
    csa_state = csa * (
        _page(CSA_STATE_TOKENS, 2 * state * model.head_dim) + _page(CSA_STATE_TOKENS, 2 * state * model.index_head_dim)
    )
    hca_state = hca * _page(HCA_STATE_TOKENS, state * model.head_dim)
    block = max(page, window * -(-model.num_layers // groups), csa_state, hca_state)
    needs = [GroupNeed("entries", block, PAGE_TOKENS)]
    sliding = model.window - 1 + step_tokens
    needs += [GroupNeed(f"window {i}", block, WINDOW_PAGE_TOKENS, sliding) for i in range(groups)]
    if csa:
        needs.append(GroupNeed("csa state", block, CSA_STATE_TOKENS, 2 * model.csa_ratio - 1 + step_tokens))
    if hca:
        needs.append(GroupNeed("hca state", block, HCA_STATE_TOKENS, model.hca_ratio - 1 + step_tokens))
    return SessionNeed("vllm", tuple(needs))


def weight_bytes(model: ModelConfig, layout: ParallelLayout, quant: str, *, drafts: bool = False) -> float:
    """Bytes of weights on one GPU. Heads, shared experts, embedding and head are split over tensor parallel ranks,
    experts over all GPUs; the rest is on each."""
    table = (p for p in parameters(model) if drafts or not p.name.startswith("mtp."))
    return sum(_stored(p, model, quant) / _ranks(p, layout) for p in table)


def _ranks(parameter: Parameter, layout: ParallelLayout) -> int:
    if parameter.storage is Storage.EXPERT:
        return layout.gpus
    split = ("attn.wq_b.", "attn.wo_a.", "attn.wo_b.", "attn.attn_sink", "shared_experts.", "embed.", "head.weight")
    return layout.tp if any(part in f".{parameter.name}" for part in split) else 1


def _stored(parameter: Parameter, model: ModelConfig, quant: str) -> float:
    if parameter.storage is Storage.EXPERT:
        return WEIGHT_BYTES[quant] * parameter.elements
    plain = 4.0 if model.weight_dtype == "fp32" else 2.0
    matrix = {"fp8": 1 + 1 / 128**2}.get(model.weight_dtype, plain)
    each = {Storage.FP32: 4.0, Storage.INT64: 8.0, Storage.BF16: plain, Storage.MATRIX: matrix}
    return each[parameter.storage] * parameter.elements


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """One GPU's memory: `usable` = weights + workspace + pool; and what a session needs of the pool."""

    usable_bytes: int
    weights_bytes: int
    workspace_bytes: int
    pool_bytes: int
    need: SessionNeed

    def sessions(self, tokens: int) -> float:
        """Sequences of so many tokens that the pool holds at once, as a figure to compare; floor it to admit."""
        return self.pool_bytes / self.need.bytes(tokens)

    def tokens(self, context: int) -> int:
        """Tokens held in sequences of `context` tokens: what vLLM calls its KV cache size."""
        return int(self.sessions(context) * context)

    def proof(self, tokens: int) -> Mapping[str, int]:
        """Bytes by name that add up to the usable memory: weights, workspace, each group of all sessions, left over."""
        whole = math.floor(self.sessions(tokens))
        groups = {name: whole * size for name, size in self.need.by_group(tokens).items()}
        left = self.pool_bytes - sum(groups.values())
        return {"weights": self.weights_bytes, "workspace": self.workspace_bytes, **groups, "left over": left}


def plan_memory(
    model: ModelConfig, deployment: Deployment, *, utilization: float = 0.9, cache: CacheLayout | None = None
) -> MemoryPlan:
    """One GPU of a deployment (one rank's pool). Raises ConfigError if weights and workspace leave no room."""
    if not 0 < utilization <= 1:
        raise ConfigError(f"utilization: {utilization} is not in (0, 1]", param="utilization")
    deployment.layout.check(model)
    engine = "vllm" if deployment.framework == "vllm" else deployment.framework
    usable = int(accelerator(deployment.device).memory_bytes * utilization)
    speculation = deployment.speculation
    weights = round(weight_bytes(model, deployment.layout, deployment.quant, drafts=speculation is not None))
    streams = deployment.chunk_tokens * model.hidden_size * model.hc_streams * 2
    workspace = RUNTIME_BYTES + INDEX_LOGITS_BYTES + 2 * streams
    pool = usable - weights - workspace
    if pool <= 0:
        raise ConfigError(
            f"memory: {model.num_layers} layers on {deployment.layout.gpus} x {deployment.device} need "
            f"{(weights + workspace) / GIB:,.1f} GiB per GPU; {usable / GIB:,.1f} GiB are usable",
            param="layout",
        )
    return MemoryPlan(usable, weights, workspace, pool, session_need(model, engine, deployment.chunk_tokens, cache))
