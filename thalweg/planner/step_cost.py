"""A whole step of a model: every layer's attention, hyper-connections, experts and collectives, the head, the drafts.

Attention comes from kernel_times.py by layer kind, the rest from op_times.py. Parts of a step that run in one launch
(chunks of several prompts, decodes beside them) pay launches and decode weights once. `seconds` is for simulators: it
interpolates between remembered sizes, a few per octave, and agrees with `estimate` to about a percent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from thalweg.config.model import LayerKind, ModelConfig
from thalweg.planner.cost import NOTHING, Estimate, Origin, StepWork
from thalweg.planner.hardware import Accelerator, accelerator
from thalweg.planner.kernel_features import AttentionShape, KernelQuery
from thalweg.planner.kernel_times import KernelTimes, shipped_kernel_times
from thalweg.planner.layout import Deployment
from thalweg.planner.op_times import ExpertShape, OpCall, OpTimes, shipped_op_times

PER_OCTAVE = 4  # sizes that `seconds` remembers in each doubling


@dataclass(frozen=True, slots=True)
class Tables:
    """What was measured."""

    kernels: KernelTimes
    ops: OpTimes


def shipped_tables() -> Tables:
    """The package's tables."""
    return Tables(shipped_kernel_times(), shipped_op_times())


class ModelStepCost:
    """Prices steps of one deployment of a model; implements `StepCost`."""

    def __init__(self, model: ModelConfig, deployment: Deployment, tables: Tables | None = None) -> None:
        deployment.layout.check(model)
        self.model, self.deployment = model, deployment
        self.device: Accelerator = accelerator(deployment.device)
        self.tables = tables or shipped_tables()
        self._attention = (deployment.framework, self.device.name)
        self._layers = Counter(model.layer_kinds)
        self._shapes = {kind: AttentionShape.of(model, kind) for kind in self._layers}
        self._draft_shape = AttentionShape.of(model, LayerKind.WINDOW)
        self._heads = model.num_attention_heads / deployment.layout.tp
        self._experts = ExpertShape(
            model.hidden_size, model.moe_intermediate_size, model.num_experts, model.experts_per_token
        )
        self._chunk = _Grid(lambda new, past: self._chunk_estimate(new, past).seconds)
        self._decode = _Grid(lambda batch, context: self._decode_estimate(batch, context, 0.0, 1.0).seconds)
        self._dense = _Grid(lambda tokens, sampled: self._dense_estimate(tokens, sampled).seconds)
        self._drafts = _Grid(lambda batch, _: self._draft_estimate(batch).seconds)
        self._floors = self._chunk_floor(), self._decode_floor()

    def seconds(self, work: StepWork) -> float:
        """The step's time, interpolated between remembered sizes."""
        if not work.tokens:
            return 0.0
        total = self._dense.at(work.tokens, work.sampled)
        for new, past in work.chunks:
            total += self._chunk.at(new, past)
        if work.decodes:
            each = work.decode_tokens / work.decodes
            total += self._decode.at(work.decodes * each, work.decode_context / work.decodes)
            total += self._drafts.at(work.decodes, 0) if each > 1 else 0.0
        return total - self._shared(work)

    def estimate(self, work: StepWork) -> Estimate:
        """The step's time with its interval and origin."""
        if not work.tokens:
            return NOTHING
        total = self._dense_estimate(work.tokens, work.sampled)
        for new, past in work.chunks:
            total += self._chunk_estimate(new, past)
        if work.decodes:
            each = work.decode_tokens / work.decodes
            context = work.decode_context / work.decodes
            total += self._decode_estimate(work.decodes, context, work.longest_context, each)
            total += self._draft_estimate(work.decodes) if each > 1 else NOTHING
        shared = self._shared(work)
        return Estimate(total.seconds - shared, total.low - shared, total.high - shared, total.origin)

    def parts(self, work: StepWork) -> dict[str, float]:
        """Seconds of a step by part, for people: attention by layer kind, dense ops by name, drafts."""
        found: dict[str, float] = {}
        for kind, count in self._layers.items():
            found[f"attention {kind}"] = sum(
                (self._prefill(kind, new, past).seconds for new, past in work.chunks), 0.0
            ) * count
            if work.decodes:
                query = self._decode_query(
                    work.decodes, work.decode_context / work.decodes, work.longest_context,
                    work.decode_tokens / work.decodes,
                )
                found[f"attention {kind}"] += count * self._layer("decode", kind, query).seconds
        for name, estimate in self._dense_ops(work.tokens, work.sampled).items():
            found[name] = estimate.seconds
        if work.decode_tokens > work.decodes:
            found["drafts"] = self._draft_estimate(work.decodes).seconds
        return found

    def _shared(self, work: StepWork) -> float:
        """What parts of a step that run in one launch do not pay twice."""
        chunk, decode = self._floors
        if not work.chunks:
            return 0.0
        return (len(work.chunks) - 1) * chunk + (decode if work.decodes else 0.0)

    def _chunk_floor(self) -> float:
        return sum(n * self._floor("prefill", kind) for kind, n in self._layers.items())

    def _decode_floor(self) -> float:
        return sum(n * self._floor("decode", kind) for kind, n in self._layers.items())

    def _floor(self, phase: str, kind: LayerKind) -> float:
        return self.tables.kernels.floor(_table(phase, kind), self._attention, self._shapes[kind], self._heads)

    def _layer(self, phase: str, kind: LayerKind, query: KernelQuery) -> Estimate:
        shape = self._shapes.get(kind, self._draft_shape)
        estimate = self.tables.kernels.estimate(_table(phase, kind), self._attention, shape, query)
        return estimate

    def _prefill(self, kind: LayerKind, new: float, past: float) -> Estimate:
        """A chunk in one layer: at least what as many decodes of one token would take to read the same weights."""
        query = KernelQuery(1, max(1.0, new / self.deployment.layout.cp), past, self._heads)
        whole = self._layer("prefill", kind, query)
        least = self._layer("decode", kind, KernelQuery(1, 1, max(1.0, past), self._heads))
        return whole if whole.seconds >= least.seconds else least

    def _chunk_estimate(self, new: float, past: float) -> Estimate:
        total = NOTHING
        for kind, count in self._layers.items():
            total += self._prefill(kind, new, past) * count
        return total + self._context_gather(new)

    def _context_gather(self, new: float) -> Estimate:
        """Context parallel ranks hand each other the compressed rows and window of a chunk."""
        layout = self.deployment.layout
        if layout.cp == 1:
            return NOTHING
        rows = new * sum(
            count * (1 + (1 / shape.ratio if shape.ratio else 0.0))
            for kind, count in self._layers.items()
            for shape in (self._shapes[kind],)
        )
        each = OpCall(0, layout.cp, 1, rows * 584 / self.model.num_layers)
        return self._op("all_gather", "bf16", each, framework="nccl") * self.model.num_layers

    def _decode_query(self, batch: float, context: float, longest: float, each: float) -> KernelQuery:
        return KernelQuery(batch, each, max(1.0, context), self._heads, longest)

    def _decode_estimate(self, batch: float, context: float, longest: float, each: float) -> Estimate:
        total, query = NOTHING, self._decode_query(batch, context, longest, each)
        for kind, count in self._layers.items():
            total += self._layer("decode", kind, query) * count
        return total

    def _dense_estimate(self, tokens: float, sampled: float) -> Estimate:
        total = NOTHING
        for estimate in self._dense_ops(tokens, sampled).values():
            total += estimate
        return total

    def _dense_ops(self, tokens: float, sampled: float) -> dict[str, Estimate]:
        """All but attention, of all layers and the head. Every expert rank sees the tokens of all data parallel ranks."""
        layers, layout = self.model.num_layers, self.deployment.layout
        own = tokens / layout.cp
        found = {name: estimate * layers for name, estimate in self._layer_ops(own).items()}
        if sampled:
            found["head"] = self._gemm(sampled, self.model.hidden_size, self.model.vocab_size / layout.tp, "bf16")
        return found

    def _layer_ops(self, own: float) -> dict[str, Estimate]:
        layout, hidden, inner = self.deployment.layout, self.model.hidden_size, self.model.moe_intermediate_size
        slices = layout.tp
        mix = OpCall(own, shape=(hidden, 0))
        every = own * layout.dp * layout.cp
        call = OpCall(every, layout.expert_slices, layout.expert_ranks, shape=self._experts)
        found = {
            "hyper-connections": self._op("mhc_pre", "", mix) + self._op("mhc_post", "", mix),
            "experts": self._op("moe", self.deployment.quant, call),
            "shared expert": self._gemm(own, hidden, 2 * inner / slices, "fp8")
            + self._gemm(own, inner / slices, hidden, "fp8"),
            "router": self._gemm(own, hidden, self.model.num_experts, "bf16"),
            "collectives": self._collectives(own),
        }
        return found

    def _collectives(self, own: float) -> Estimate:
        layout, hidden = self.deployment.layout, self.model.hidden_size
        total = NOTHING
        if layout.tp > 1:
            reduce = OpCall(0, layout.tp, 1, own * hidden * 2)
            total += self._op("all_reduce", "bf16", reduce) * (2 if layout.dp * layout.cp == 1 else 1)
        ranks = layout.dp * layout.cp
        if ranks == 1:
            return total
        if layout.exchange == "gather":
            every = OpCall(0, ranks, 1, own * ranks * hidden * 2)
            both = (self._op(kind, "bf16", every, framework="nccl") for kind in ("all_gather", "reduce_scatter"))
            return sum(both, total)
        call = OpCall(own, 1, layout.expert_ranks, shape=self._experts)
        both = (self._op(f"{layout.exchange}_{way}", "", call, framework="vllm") for way in ("dispatch", "combine"))
        return sum(both, total)

    def _draft_estimate(self, batch: float) -> Estimate:
        """The draft passes of a step: one window layer and the head each, a token per sequence."""
        speculation = self.deployment.speculation
        if speculation is None:
            return NOTHING
        one = self._layer("decode", LayerKind.WINDOW, KernelQuery(batch, 1, self.model.window, self._heads))
        for estimate in self._layer_ops(batch).values():
            one += estimate
        hidden = self.model.hidden_size
        one += self._gemm(batch, 2 * hidden, hidden, "fp8")
        one += self._gemm(batch, hidden, self.model.vocab_size / self.deployment.layout.tp, "bf16")
        return one * speculation.drafts

    def _gemm(self, tokens: float, width: float, outputs: float, quant: str) -> Estimate:
        return self._op("gemm", quant, OpCall(tokens, shape=(round(width), round(outputs))))

    def _op(self, kind: str, quant: str, call: OpCall, framework: str = "") -> Estimate:
        return self.tables.ops.estimate(kind, (framework or self.deployment.framework, self.device.name, quant), call)


def _table(phase: str, kind: LayerKind) -> str:
    """The rows that price a layer: a layer without entries is an HCA layer that has none."""
    return f"{LayerKind.HCA if kind is LayerKind.WINDOW else kind}_{phase}_module"


class _Grid:
    """A function of two sizes, remembered at a few sizes per octave and interpolated between them."""

    def __init__(self, price: Callable[[float, float], float]) -> None:
        self._price = price
        self._known: dict[tuple[int, int], float] = {}

    def at(self, first: float, second: float) -> float:
        """The interpolated value."""
        i, left = _step(first)
        j, right = _step(second)
        near = self._value(i, j)
        total = near
        if left:
            total += left * (self._value(i + 1, j) - near)
        if right:
            total += right * (self._value(i, j + 1) - near)
        return total

    def _value(self, i: int, j: int) -> float:
        key = (i, j)
        if key not in self._known:
            self._known[key] = self._price(_size(i), _size(j))
        return self._known[key]


def _step(size: float) -> tuple[int, float]:
    """The remembered size below, and how far towards the next."""
    if size < 1:
        return 0, 0.0
    low = 1 + math.floor(PER_OCTAVE * math.log2(size))
    below, above = _size(low), _size(low + 1)
    share = (size - below) / (above - below)
    return (low, share) if share < 1 else (low + 1, 0.0)


def _size(step: int) -> float:
    return 0.0 if step == 0 else 2.0 ** ((step - 1) / PER_OCTAVE)


__all__ = ["ModelStepCost", "Origin", "Tables", "shipped_tables"]
