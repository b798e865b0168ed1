"""Padded decode steps: the logits of the true rows and every cache row are those of the step itself, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.backends import EXACT, Kernels
from tests.model.fields import FLASH_LIKE, NARROW
from tests.model.geometries import config_of, engine_weights
from tests.model.paging import PagedSequences
from thalweg.cache.geometry import cache_groups
from thalweg.config.model import ModelConfig
from thalweg.kernels.arguments import Segments
from thalweg.memory.layout import CacheLayout, RowFormat
from thalweg.model import parts
from thalweg.model.inputs import StepInputs
from thalweg.model.numerics import Numerics
from thalweg.model.padding import FEW, Bucket, bucket_of, buckets, padded
from thalweg.model.transformer import Model

BACKENDS = {name: EXACT[name] for name in ("deterministic", *[n for n in EXACT if n.startswith("cpu-")][-1:])}
LENGTHS = (1, 3, 126, 127, 251)  # of the prompts: the steps behind them complete entries of every kind, and none
STEPS = 12


def words(count: int, seed: int) -> list[int]:
    return torch.randint(2, 90, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def rows_of(cache: PagedSequences, config: ModelConfig) -> list[torch.Tensor]:
    streams = [(s.name, layer) for spec in cache_groups(config) for s in spec.streams for layer in s.layers]
    return [cache.rows(*stream).view(torch.uint8) for stream in streams]


@pytest.mark.parametrize("kernels", [make() for make in BACKENDS.values()], ids=list(BACKENDS))
@pytest.mark.parametrize("fields", [FLASH_LIKE, NARROW])
@pytest.mark.parametrize(("kv", "index"), [(RowFormat.FLOAT32, RowFormat.FLOAT32), (RowFormat.FP8, RowFormat.FP4)])
def test_a_padded_step_is_the_step(fields: dict, kernels: Kernels, kv: RowFormat, index: RowFormat) -> None:
    complete, shapes = compared(fields, kernels, (kv, index), LENGTHS)
    assert complete == {(False, False), (True, False), (True, True)} and len(shapes) < STEPS


def test_every_sequence_may_complete_an_entry() -> None:
    """In a full bucket nothing is left over for the rows that their windows read."""
    wide = (RowFormat.FLOAT32, RowFormat.FLOAT32)
    _, shapes = compared(FLASH_LIKE, BACKENDS[list(BACKENDS)[-1]](), wide, (127, 127, 255, 255))
    assert Bucket(4, 4, 4, 384) in shapes


def compared(
    fields: dict, kernels: Kernels, formats: tuple[RowFormat, RowFormat], lengths: tuple[int, ...]
) -> tuple[set[tuple[bool, bool]], dict[Bucket, list]]:
    """Decodes behind prompts of these lengths, as they are and padded; gives which kinds of entries were completed, and
    the sizes of each bucket."""
    kv, index = formats
    config = config_of(fields)
    model = Model(config, engine_weights(config), Numerics.serving(torch.float32, kv, index), kernels)
    layout = CacheLayout(kv, index, config.rope_dim)
    plain, filled = (PagedSequences(config, len(lengths), 384, layout) for _ in range(2))
    positions, shapes, complete = list(lengths), {}, set()
    for i, length in enumerate(lengths):
        for cache in (plain, filled):
            model.forward(cache.inputs([(i, 0, words(length, i))], []), cache)
    for step in range(STEPS):
        pieces = [(i, positions[i], words(1, 7 * step + i)) for i in range(step % len(lengths), len(lengths))]
        for i, _, _ in pieces:
            positions[i] += 1
        inputs = plain.inputs(pieces)
        bucket = bucket_of(inputs, 384)
        assert bucket in set(buckets(config, 8, 384))
        made = padded(filled.inputs(pieces), bucket)
        sizes = [tuple(x.shape) for x in parts.sized(made)]
        assert shapes.setdefault(bucket, sizes) == sizes, "the bucket is all that sizes depend on"
        complete.add((bucket.csa > 0, bucket.hca > 0))
        expected, found = model.forward(inputs, plain), model.forward(made, filled)
        assert len(found) == bucket.sequences and torch.equal(found[: len(expected)], expected)
        assert all(torch.equal(a, b) for a, b in zip(rows_of(plain, config), rows_of(filled, config), strict=True))
    return complete, shapes


def test_a_step_carried_to_a_device_is_the_same() -> None:
    """As one tensor, numbers included: nothing is left that a kernel would have to copy for itself."""
    config = config_of(FLASH_LIKE)
    model = Model(config, engine_weights(config), Numerics(), BACKENDS["deterministic"]())
    cache = PagedSequences(config, 2, 384)
    step = cache.inputs([(0, 0, words(130, 1)), (1, 0, words(5, 2))], [129, 134])
    sent: list[torch.Tensor] = []

    def carry(whole: torch.Tensor) -> torch.Tensor:
        sent.append(whole.clone())
        return sent[-1]

    moved = parts.carried(step, carry)
    assert len(sent) == 1
    memory = sent[0].untyped_storage().data_ptr()
    there = [*parts.sized(moved), *parts.ragged(moved), *(own.on(sent[0].device) for own in parts.ints(moved))]
    assert all(tensor.untyped_storage().data_ptr() == memory for tensor in there)
    assert all(tensor.storage_offset() % 2 == 0 for tensor in there)  # a kernel for every other address is another one
    assert torch.equal(model.forward(moved, cache), model.forward(step, cache))


def test_buckets_are_few_and_hold_every_decode_step() -> None:
    config = config_of(FLASH_LIKE)
    known = set(buckets(config, 256, 1 << 20))
    assert len(known) == 135 and len(set(buckets(config, 16, 1 << 20))) == 75
    for count in (1, 2, 3, 16, 17, 200, 256):
        for start in (0, 8191, 8192, (1 << 20) - 1):
            for entries in ((0, 0), (1, 0), (count, 0), (1, 1), (count, count), (count, min(FEW, count))):
                assert bucket_of(decode_step(count, start, *entries), 1 << 20) in known
    wanted = Bucket(4, 4, 0, 8192)
    assert bucket_of(decode_step(3, 8191, 1, 0), 1 << 20) == wanted
    assert bucket_of(decode_step(3, 5000, 1, 0), 6000) == replace(wanted, context=6000)


def test_only_decode_steps_have_a_bucket() -> None:
    cache = PagedSequences(config_of(FLASH_LIKE), 2, 128)
    assert bucket_of(cache.inputs([(0, 5, [3]), (1, 9, [4])]), 128) is not None
    assert bucket_of(cache.inputs([(0, 5, [3]), (1, 9, [4])], [1]), 128) is None
    assert bucket_of(cache.inputs([(0, 5, [3]), (1, 9, [4, 5])], [0, 2]), 128) is None


def decode_step(count: int, start: int, csa: int, hca: int) -> StepInputs:
    """So much of a step as says its bucket."""
    own = PagedSequences(config_of(FLASH_LIKE), 1, 128).inputs([(0, 0, [3])])
    segments = Segments(range(count + 1), (start,) * count)
    rows = torch.arange(count)
    compressors = {
        kind: replace(getattr(own, kind), positions=torch.arange(entries))
        for kind, entries in (("csa", csa), ("hca", hca))
    }
    return replace(own, token_ids=rows, output_rows=rows, segments=segments, **compressors)
