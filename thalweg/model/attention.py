"""V4 attention: one shared key = value head over a window, compressed entries and a sink (model-spec 3.3 to 3.7)."""

from __future__ import annotations

from torch import Tensor

from thalweg.config.model import LayerKind, ModelConfig
from thalweg.kernels.arguments import AttentionContext, PagedRows, PastRows, Segments, StoredRows
from thalweg.kernels.ops import Kernels
from thalweg.model.compressor import Compressor, CompressorStreams
from thalweg.model.inputs import CacheRows, CompressorInputs, StepInputs, picked
from thalweg.model.numerics import Numerics
from thalweg.model.rotary import Angles
from thalweg.model.step import StepTables
from thalweg.model.weights import Weights


class Attention:
    """One layer's attention. `forward` writes this step's rows to the cache and reads everything back from there."""

    def __init__(self, weights: Weights, config: ModelConfig, layer: int, numerics: Numerics, kernels: Kernels) -> None:
        self._weights = weights
        self._config = config
        self._layer = layer
        self._kind = config.layer_kinds[layer]
        self._numerics = numerics
        self._kernels = kernels
        self._wq_a, self._wq_b = weights.matrix("wq_a.weight"), weights.matrix("wq_b.weight")
        self._wkv = weights.matrix("wkv.weight")
        self._wo_a, self._wo_b = weights.matrix("wo_a.weight", config.o_groups), weights.matrix("wo_b.weight")
        self._compressor: Compressor | None = None
        self._indexer: Indexer | None = None
        eps = config.rms_norm_eps
        if self._kind is LayerKind.HCA:
            streams = CompressorStreams("pending_hca", None)
            self._compressor = Compressor(weights.under("compressor."), layer, streams, eps, kernels)
        elif self._kind is LayerKind.CSA:
            streams = CompressorStreams("pending_csa", "tail_csa")
            self._compressor = Compressor(weights.under("compressor."), layer, streams, eps, kernels)
            self._indexer = Indexer(weights.under("indexer."), config, layer, numerics, kernels)

    def forward(self, x: Tensor, step: StepInputs, tables: StepTables, cache: CacheRows, *, last: bool) -> Tensor:
        """x [T, D], normed -> [T, D], or [O, D] for the output rows alone in the last layer."""
        config, weights, kernels = self._config, self._weights, self._kernels
        angles = tables.angles(self._kind)
        kv, eps = kernels.linear(x, self._wkv), config.rms_norm_eps
        kv = kernels.norm_rotate(kv, weights["kv_norm.weight"], eps, angles.cos, angles.sin)
        kv = self._numerics.stored_kv(kv, config.rope_dim, kernels)
        self._compress(x, step, tables, cache)
        result = x[:0]
        if not last or len(step.output_rows):
            queries = step.output_segments if last else step.segments
            x, angles = (picked(x, step.output_rows), angles.at(step.output_rows)) if last else (x, angles)
            result = self._attend(x, kv, angles, step, queries, cache)
        kernels.store_rows(self._rows("window", cache), step.window_writes.slots, step.window_writes.of(kv))
        return result

    def _compress(self, x: Tensor, step: StepInputs, tables: StepTables, cache: CacheRows) -> None:
        """Write the entries that this step completes, before anybody reads them."""
        if self._compressor is None:
            return
        inputs, angles, phase = tables.compressor(self._kind)
        stream = self._kind.value
        rows, slots = cache.rows(stream, self._layer), inputs.entries[stream]
        target = self._numerics.kv_target(rows, slots, self._config)
        self._compressor.insert(x, phase, inputs, angles, cache, target)
        if self._indexer is not None:
            self._indexer.write_keys(x, phase, inputs, angles, cache)

    def _rows(self, stream: str, cache: CacheRows) -> StoredRows:
        return self._numerics.kv_rows(cache.rows(stream, self._layer), self._config)

    def _attend(
        self, x: Tensor, kv: Tensor, angles: Angles, step: StepInputs, queries: Segments, cache: CacheRows
    ) -> Tensor:
        config, weights, kernels = self._config, self._weights, self._kernels
        eps, shape = config.rms_norm_eps, (config.num_attention_heads, config.head_dim)
        low = kernels.rms_norm(kernels.linear(x, self._wq_a), weights["q_norm.weight"], eps)
        query = kernels.linear(low, self._wq_b).unflatten(-1, shape)
        query = kernels.norm_rotate(query, None, eps, angles.cos, angles.sin)
        selected = None
        if self._indexer is not None:
            selected = self._indexer.select(x, low, angles, step, queries, cache)
        past = PastRows(self._rows("window", cache), step.past_slots, step.past_offsets)
        stream = self._kind.value
        entries = None if self._compressor is None else paged_rows(stream, self._rows(stream, cache), step)
        ratio = config.ratio_of(self._layer)
        context = AttentionContext(queries, step.segments, past, entries, ratio, config.window)
        mixed = kernels.attention(query, kv, context, weights["attn_sink"], selected)
        return self._project(kernels.rotate_to(mixed, angles.cos, angles.back, x.dtype))

    def _project(self, heads: Tensor) -> Tensor:
        """Grouped low-rank output projection: [Q, H, d] -> [Q, D]."""
        grouped = heads.flatten(1).unflatten(1, (self._config.o_groups, -1))
        low = self._kernels.grouped_linear(grouped, self._wo_a)
        return self._kernels.linear(low.flatten(1), self._wo_b)


class Indexer:
    """Scores compressed entries with small keys of their own and selects the best (model-spec section 3.7)."""

    def __init__(self, weights: Weights, config: ModelConfig, layer: int, numerics: Numerics, kernels: Kernels) -> None:
        streams = CompressorStreams("pending_index", "tail_index")
        self._compressor = Compressor(weights.under("compressor."), layer, streams, config.rms_norm_eps, kernels)
        self._wq_b, self._weights_proj = weights.matrix("wq_b.weight"), weights.matrix("weights_proj.weight")
        self._config = config
        self._layer = layer
        self._numerics = numerics
        self._kernels = kernels

    def write_keys(self, x: Tensor, phase: Tensor, inputs: CompressorInputs, angles: Angles, cache: CacheRows) -> None:
        rows, slots = cache.rows("index", self._layer), inputs.entries["index"]
        target = self._numerics.index_target(rows, slots, self._config)
        self._compressor.insert(x, phase, inputs, angles, cache, target)

    def select(
        self, x: Tensor, low: Tensor, angles: Angles, step: StepInputs, queries: Segments, cache: CacheRows
    ) -> Tensor:
        """Entry numbers int64 [Q, k] for queries with inputs x [Q, D] and low-rank queries [Q, q_lora]."""
        config, kernels = self._config, self._kernels
        query = kernels.linear(low, self._wq_b)
        query = query.unflatten(-1, (config.index_heads, config.index_head_dim))
        query = self._numerics.index_query(kernels.rotate(query, angles.cos, angles.sin), kernels)
        scale = (config.index_heads * config.index_head_dim) ** -0.5
        weights = kernels.linear(x, self._weights_proj).float() * scale
        keys = paged_rows("index", self._rows(cache), step)
        return kernels.index_topk(query, weights, keys, queries, config.csa_ratio, config.index_topk)

    def _rows(self, cache: CacheRows) -> StoredRows:
        return self._numerics.index_rows(cache.rows("index", self._layer), self._config)


def paged_rows(stream: str, rows: StoredRows, step: StepInputs) -> PagedRows:
    """The rows of a compressed stream of all sequences of the step."""
    blocks = step.blocks[stream]
    return PagedRows(rows, blocks.ids, blocks.offsets, blocks.rows_per_block)
