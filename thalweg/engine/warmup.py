"""Steps that are run before the first request, so that no request waits for what a step of its shape needs once: a
kernel compiled, a graph captured, the calls of a small step noted.

They are real steps of a request that owns the first block of every pool, over and over: nothing is cached yet, so
nobody reads what they write.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from itertools import product

import numpy as np

from thalweg.cache.geometry import CacheGroupSpec
from thalweg.cache.policy import Resume
from thalweg.cache.sequence import SequenceCache
from thalweg.cache.tables import GrowingTable, SlidingTable
from thalweg.config.model import ModelConfig
from thalweg.engine.plan import SequencePlan, StepPlan
from thalweg.engine.request import Running, Sequence
from thalweg.model.graphs import StepLimits
from thalweg.model.padding import Bucket, buckets, contexts
from thalweg.types import CacheReport, GenerateRequest, SamplingParams

# Compiled kernels differ by which sizes are one or a multiple of 16, and by nothing else of a batch.
PROMPT_LENGTHS = (2, 15, 16, 17, 48)
_SAMPLINGS = (SamplingParams(temperature=0.0), SamplingParams(top_k=40, top_p=0.9, min_p=0.01))


class WarmUp:
    """Step plans for one model, its cache groups and the limits of its steps."""

    def __init__(self, config: ModelConfig, groups: SequenceOf[CacheGroupSpec], limits: StepLimits) -> None:
        self._config = config
        self._groups = groups
        self._limits = limits
        self._tables = {spec.group: _first_block(spec, limits.context) for spec in groups if spec.compressed}
        zeros = np.zeros(limits.context, np.int32)
        self._requests = tuple(
            Sequence(GenerateRequest(f"warm-up {i}", zeros, sampling), lambda event: None, 1, 0.0)
            for i, sampling in enumerate(_SAMPLINGS)
        )

    def graphs(self) -> Iterator[StepPlan]:
        """A decode step of every bucket."""
        for bucket in buckets(self._config, self._limits.sequences, self._limits.context):
            plan = self._decodes(bucket)
            if plan is not None:
                yield plan

    def small_decodes(self, most: int) -> Iterator[StepPlan]:
        """Decode steps of up to so many sequences, in which none, one or all of them complete an entry."""
        for count in range(1, most + 1):
            for csa, hca in ((0, 0), (1, 0), (count, 0), (1, 1)):
                plan = self._decodes(Bucket(count, csa, hca, min(self._limits.context, 8 * self._config.unit_tokens)))
                if plan is not None:
                    yield plan

    def prompts(self, most_tokens: int) -> Iterator[StepPlan]:
        """Parts of prompts at every depth: small ones alone and beside a decode, at their end and before it, then the
        largest."""
        depths = sorted({0, *(context // 2 for context in contexts(self._limits.context))})
        small = product(PROMPT_LENGTHS, (0, 1), (False, True))
        for start, (length, others, samples) in product(depths, (*small, (most_tokens, 0, False))):
            if start + length <= self._limits.context:
                decodes = [self._item(start, start + 1, samples=True, number=i) for i in range(others)]
                yield StepPlan((*decodes, self._item(start, start + length, samples=samples, number=others)))

    def _decodes(self, bucket: Bucket) -> StepPlan | None:
        """One step of a bucket, near the end of its contexts; None where none of them is so long."""
        unit = self._config.unit_tokens
        begin = max(0, bucket.context // unit - 1) * unit
        starts = [begin + unit - 1] * bucket.hca
        starts += [begin + self._config.csa_ratio - 1] * (bucket.csa - bucket.hca)
        starts += [begin] * (bucket.sequences - len(starts))
        if max(starts) >= self._limits.context:
            return None
        return StepPlan(tuple(self._item(s, s + 1, samples=True, number=i) for i, s in enumerate(starts)))

    def _item(self, start: int, end: int, *, samples: bool, number: int) -> SequencePlan:
        resume = Resume(units=0, start=0, replayed=0)
        cache = SequenceCache(CacheReport(), resume, None, {}, rows_from=0, target_tokens=end)
        cache.growing = dict(self._tables)
        cache.sliding = {spec.group: _alive(spec, start, end) for spec in self._groups if not spec.compressed}
        return SequencePlan(Running(self._requests[number % len(self._requests)], cache), start, end, samples)


def _first_block(spec: CacheGroupSpec, tokens: int) -> GrowingTable:
    table = GrowingTable()
    for _ in range(-(-tokens // spec.tokens_per_block)):
        table.append(0)
    return table


def _alive(spec: CacheGroupSpec, start: int, end: int) -> SlidingTable:
    table = SlidingTable(spec)
    for number in range(spec.first_live_block(start), -(-end // spec.tokens_per_block)):
        table.put(number, 0)
    return table
