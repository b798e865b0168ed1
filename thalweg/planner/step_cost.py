"""A whole step of a model: every layer's attention, hyper-connections, experts and collectives, the head, the drafts.

Attention comes from kernel_times.py by layer kind, the rest from op_times.py. Parts of a step that run in one launch
(chunks of several prompts, decodes beside them) pay launches and decode weights once. `seconds` is for simulators: it
interpolates between remembered sizes, a few per octave, takes decodes as equally long, and is within about 2% of
`estimate`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from thalweg.config.accelerators import Accelerator
from thalweg.config.model import LayerKind, ModelConfig
from thalweg.planner.cost import NOTHING, Estimate, StepWork, total
from thalweg.planner.fitting import Key
from thalweg.planner.hardware import accelerator
from thalweg.planner.kernel_features import KV_ROW_BYTES, AttentionShape, KernelQuery
from thalweg.planner.kernel_times import shipped_kernel_times
from thalweg.planner.layout import Deployment
from thalweg.planner.op_times import ExpertShape, OpCall, shipped_op_times

SMALL_CHUNK = 512  # tokens: below, the weights that must be read bound a chunk
PER_OCTAVE = 4  # sizes that `seconds` remembers in each doubling


class LayerPrices(Protocol):
    """Prices attention layers; `KernelTimes` does."""

    def estimate(self, kind: str, key: Key, shape: AttentionShape, query: KernelQuery) -> Estimate: ...

    def floor(self, kind: str, key: Key, shape: AttentionShape, heads: float) -> float: ...


class OpPrices(Protocol):
    """Prices other ops; `OpTimes` does."""

    def estimate(self, kind: str, key: Key, call: OpCall) -> Estimate: ...


@dataclass(frozen=True, slots=True)
class Tables:
    """Where prices come from."""

    kernels: LayerPrices
    ops: OpPrices


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
        self._floors = self._floor("prefill"), self._floor("decode")
        self._chunk = _Grid(self._price_chunk)
        self._decode: dict[int, _Grid] = {}  # by the tokens that each sequence computes
        self._dense = _Grid(lambda tokens, sampled: total(self._dense_ops(tokens, sampled).values()).seconds)

    def seconds(self, work: StepWork) -> float:
        """The step's time, interpolated between remembered sizes."""
        if not work.tokens:
            return 0.0
        seconds = self._dense.at(work.tokens, work.sampled) - self._shared(work)
        for new, past in work.chunks:
            seconds += self._chunk.at(new, past)
        if work.decodes:
            each = round(work.decode_tokens / work.decodes)
            if each not in self._decode:
                self._decode[each] = _Grid(partial(self._price_decode, each))
            seconds += self._decode[each].at(work.decodes, work.decode_context / work.decodes)
        return seconds

    def estimate(self, work: StepWork) -> Estimate:
        """The step's time with its interval and origin."""
        whole = total(self.parts(work).values())
        return whole * (1 - self._shared(work) / whole.seconds) if whole.seconds else whole

    def parts(self, work: StepWork) -> dict[str, Estimate]:
        """A step by part: attention by layer kind, the other ops by name, drafts. Their sum counts launches that parts
        share more than once."""
        if not work.tokens:
            return {}
        found = {}
        for kind, count in self._layers.items():
            calls = [self._prefill(kind, new, past) for new, past in work.chunks]
            if work.decodes:
                calls.append(self._layer("decode", kind, self._decode_query(work)))
            found[f"attention {kind}"] = total(calls) * count
        if self.deployment.layout.cp > 1:
            found["context gather"] = total(self._context_gather(new) for new, _ in work.chunks)
        found |= self._dense_ops(work.tokens, work.sampled)
        if work.decode_tokens > work.decodes:
            found["drafts"] = self._draft_estimate(work.decodes)
        return found

    def _price_chunk(self, new: float, past: float) -> float:
        layers = (self._prefill(kind, new, past) * count for kind, count in self._layers.items())
        return total((*layers, self._context_gather(new))).seconds

    def _price_decode(self, each: int, batch: float, context: float) -> float:
        query = KernelQuery(batch, each, max(1.0, context), self._heads)
        layers = (self._layer("decode", kind, query) * count for kind, count in self._layers.items())
        return total((*layers, self._draft_estimate(batch) if each > 1 else NOTHING)).seconds

    def _shared(self, work: StepWork) -> float:
        """What parts of a step that run in one launch do not pay twice."""
        chunk, decode = self._floors
        if not work.chunks:
            return 0.0
        return (len(work.chunks) - 1) * chunk + (decode if work.decodes else 0.0)

    def _floor(self, phase: str) -> float:
        kernels = self.tables.kernels
        return sum(
            count * kernels.floor(_table(phase, kind), self._attention, self._shapes[kind], self._heads)
            for kind, count in self._layers.items()
        )

    def _layer(self, phase: str, kind: LayerKind, query: KernelQuery) -> Estimate:
        shape = self._shapes.get(kind, self._draft_shape)
        return self.tables.kernels.estimate(_table(phase, kind), self._attention, shape, query)

    def _prefill(self, kind: LayerKind, new: float, past: float) -> Estimate:
        """A chunk in one layer: at least what the decode of one token takes, which reads the same weights."""
        own = max(1.0, new / self.deployment.layout.cp)
        whole = self._layer("prefill", kind, KernelQuery(1, own, past, self._heads))
        if new > SMALL_CHUNK:
            return whole
        least = self._layer("decode", kind, KernelQuery(1, 1, max(1.0, past), self._heads))
        return whole if whole.seconds >= least.seconds else least

    def _context_gather(self, new: float) -> Estimate:
        """Context parallel ranks hand each other the window rows and entries of a chunk, in every layer."""
        layout = self.deployment.layout
        if layout.cp == 1:
            return NOTHING
        rows = new + sum(
            count * new / shape.ratio / self.model.num_layers
            for kind, count in self._layers.items()
            if (shape := self._shapes[kind]).ratio
        )
        call = OpCall(0, layout.cp, 1, rows * KV_ROW_BYTES)
        return self._op("all_gather", "bf16", call, framework="nccl") * self.model.num_layers

    def _decode_query(self, work: StepWork) -> KernelQuery:
        context = max(1.0, work.decode_context / work.decodes)
        return KernelQuery(work.decodes, work.decode_tokens / work.decodes, context, self._heads, work.longest_context)

    def _dense_ops(self, tokens: float, sampled: float) -> dict[str, Estimate]:
        """All but attention, of all layers and the head."""
        own = tokens / self.deployment.layout.cp
        found = {name: estimate * self.model.num_layers for name, estimate in self._layer_ops(own).items()}
        if sampled:
            outputs = self.model.vocab_size / self.deployment.layout.tp
            found["head"] = self._gemm(sampled, self.model.hidden_size, outputs, "bf16")
        return found

    def _layer_ops(self, own: float) -> dict[str, Estimate]:
        """One layer's ops for a rank's `own` tokens. Experts see the tokens of all data and context parallel ranks."""
        layout, hidden = self.deployment.layout, self.model.hidden_size
        inner = self.model.moe_intermediate_size / layout.tp
        mix = OpCall(own, shape=(hidden, 0))
        call = OpCall(own * layout.dp * layout.cp, layout.expert_slices, layout.expert_ranks, shape=self._experts)
        up, down = self._gemm(own, hidden, 2 * inner, "fp8"), self._gemm(own, inner, hidden, "fp8")
        return {
            "hyper-connections": total((self._op("mhc_pre", "", mix), self._op("mhc_post", "", mix))),
            "experts": self._op("moe", self.deployment.quant, call),
            "shared expert": total((up, down)),
            "router": self._gemm(own, hidden, self.model.num_experts, "bf16"),
            "collectives": self._collectives(own),
        }

    def _collectives(self, own: float) -> Estimate:
        """Sums over tensor parallel ranks; tokens to their experts and back over the others."""
        layout, hidden = self.deployment.layout, self.model.hidden_size
        ranks = layout.dp * layout.cp
        calls = []
        if layout.tp > 1:
            reduce = self._op("all_reduce", "bf16", OpCall(0, layout.tp, 1, own * hidden * 2))
            calls.append(reduce * (2 if ranks == 1 else 1))
        if ranks > 1 and layout.exchange == "gather":
            every = OpCall(0, ranks, 1, own * ranks * hidden * 2)
            calls += [self._op(kind, "bf16", every, framework="nccl") for kind in ("all_gather", "reduce_scatter")]
        elif ranks > 1:
            call = OpCall(own, 1, layout.gpus, shape=self._experts)
            ways = (f"{layout.exchange}_{way}" for way in ("dispatch", "combine"))
            calls += [self._op(kind, "", call, framework="vllm") for kind in ways]  # DeepEP is the same in all
        return total(calls)

    def _draft_estimate(self, batch: float) -> Estimate:
        """The draft passes of a step: one window layer and the head each, a token per sequence."""
        speculation = self.deployment.speculation
        if speculation is None:
            return NOTHING
        hidden, outputs = self.model.hidden_size, self.model.vocab_size / self.deployment.layout.tp
        query = KernelQuery(batch, 1, self.model.window, self._heads)
        parts = [self._layer("decode", LayerKind.WINDOW, query), *self._layer_ops(batch).values()]
        parts += [self._gemm(batch, 2 * hidden, hidden, "fp8"), self._gemm(batch, hidden, outputs, "bf16")]
        return total(parts) * speculation.drafts

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
