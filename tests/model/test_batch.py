"""The engine's batch builder against the plain one: same reads and writes, up to the numbers of the blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.model.fields import FLASH_LIKE, NARROW
from tests.model.paging import PagedSequences
from thalweg.cache.coordinator import Coordinator
from thalweg.cache.geometry import cache_groups
from thalweg.cache.policy import CheckpointPolicy
from thalweg.cache.prefix_index import Namespace
from thalweg.config.model_parse import parse_model_config
from thalweg.engine.batch import BatchBuilder
from thalweg.engine.plan import SequencePlan, StepPlan
from thalweg.engine.request import Running, Sequence
from thalweg.types import GenerateRequest


@pytest.mark.parametrize("fields", [FLASH_LIKE, NARROW])
@pytest.mark.parametrize("steps", [[5, 1, 1, 1, 1], [128, 1, 127, 129], [300, 3, 1], [127, 2, 260, 1]])
def test_builders_agree(fields: dict, steps: list[int]) -> None:
    config = parse_model_config(fields)
    groups = cache_groups(config)
    coordinator = Coordinator(groups, dict.fromkeys((s.group for s in groups), 400), CheckpointPolicy(128, 0))
    builder = BatchBuilder(config, groups)
    total = sum(steps)
    runs = []
    for s in range(2):
        prompt = np.random.default_rng(s).integers(0, 90, total + s).astype(np.int32)
        sequence = Sequence(GenerateRequest(str(s), prompt), lambda event: None, 1, 0.0)
        cache = coordinator.attach(sequence.tokens, Namespace(bytes([s])))
        assert cache is not None
        runs.append(Running(sequence, cache))
    plain = PagedSequences(config, 2, total + 2)
    for count in steps:
        pieces, items = [], []
        for s, running in enumerate(runs):
            start = running.cache.computed_tokens
            end = start + count + (s if start == 0 else 0)
            assert coordinator.reserve(running.cache, end)
            items.append(SequencePlan(running, start, end, samples=True))
            pieces.append((s, start, running.sequence.tokens[start:end].tolist()))
        ours = builder.build(StepPlan(tuple(items)))
        theirs = plain.inputs(pieces)
        for name in ("token_ids", "positions"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert ours.segments == theirs.segments and ours.past_offsets == theirs.past_offsets
        for kind in ("csa", "hca"):
            mine, other = getattr(ours, kind), getattr(theirs, kind)
            assert torch.equal(mine.own, other.own) and torch.equal(mine.positions, other.positions)
            assert torch.equal(mine.pending_writes.source, other.pending_writes.source)
            assert mine.previous is None or torch.equal(mine.previous, other.previous)
        for name, lists in ours.blocks.items():
            assert lists.offsets == theirs.blocks[name].offsets
            assert len(set(lists.ids.tolist())) == len(lists.ids)
        for running, item in zip(runs, items, strict=True):
            coordinator.commit(running.cache, running.sequence.tokens, item.end)
