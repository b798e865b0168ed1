"""The forward pass against transformers' DeepseekV4ForCausalLM on random checkpoints, in fp32, within 1e-4.

One long forward of transformers gives the rows of every shorter prompt: everything in the model is causal. Unwritten
cache rows are NaN in these tests, so that reading one shows.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.model.geometries import GEOMETRIES, config_of, engine_weights, oracle
from tests.model.paging import PagedSequences
from thalweg.config.model import ModelConfig
from thalweg.kernels.registry import reference_kernels
from thalweg.memory.layout import CacheLayout, RowFormat
from thalweg.model.numerics import Numerics
from thalweg.model.transformer import Model
from thalweg.model.weights import allocate

TOKENS = 403  # more than 4 * 4 * index_topk for every geometry, and not a multiple of anything
TOLERANCE = 1e-4
LENGTHS = (1, 2, 3, 4, 5, 127, 128, 129, 255, 256, 257, 400, 401, 402, 403)
CHUNKS = (1, 2, 3, 5, 7, 64, 127, 128, 129)


@dataclasses.dataclass
class Case:
    config: ModelConfig
    weights: dict[str, torch.Tensor]
    tokens: list[int]
    expected: torch.Tensor
    fields: dict

    def model(self, numerics: Numerics | None = None) -> Model:
        return Model(self.config, dict(self.weights), numerics or Numerics(), reference_kernels())


@pytest.fixture(scope="module", params=sorted(GEOMETRIES))
def case(request: pytest.FixtureRequest) -> Case:
    fields = GEOMETRIES[request.param]
    config = config_of(fields)
    weights = engine_weights(config)
    tokens = torch.randint(0, config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = oracle(fields, weights)(tokens[None]).logits[0].float()
    assert 1 < expected.std() < 4
    return Case(config, weights, tokens.tolist(), expected, fields)


def forward(case: Case, chunk: int, length: int = TOKENS, numerics: Numerics | None = None) -> torch.Tensor:
    """Logits of every row of a prompt computed in chunks."""
    numerics = numerics or Numerics()
    cache = PagedSequences(case.config, 1, length, CacheLayout(numerics.kv, numerics.index, case.config.rope_dim))
    model = case.model(numerics)
    with torch.inference_mode():
        parts = [
            model.forward(cache.inputs([(0, start, case.tokens[start : min(start + chunk, length)])]), cache)
            for start in range(0, length, chunk)
        ]
    return torch.cat(parts)


def test_selection_is_exercised(case: Case) -> None:
    assert 4 * case.config.index_topk < TOKENS


@pytest.mark.parametrize("length", LENGTHS)
def test_whole_prefill(case: Case, length: int) -> None:
    assert (forward(case, length, length) - case.expected[:length]).abs().max() < TOLERANCE


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_and_token_by_token(case: Case, chunk: int) -> None:
    assert (forward(case, chunk) - case.expected).abs().max() < TOLERANCE


def test_ragged_batch_equals_each_alone(case: Case) -> None:
    """Sequences of different lengths, some prefilling and some decoding in one step."""
    lengths = (1, 130, 77, 260, 4)
    cache = PagedSequences(case.config, len(lengths), 300)
    model = case.model()
    with torch.inference_mode():
        first = model.forward(cache.inputs([(s, 0, case.tokens[:n]) for s, n in enumerate(lengths)]), cache)
        more = (1, 3, 60, 1, 130)
        pieces = [(s, n, case.tokens[n : n + m]) for s, (n, m) in enumerate(zip(lengths, more, strict=True))]
        second = model.forward(cache.inputs(pieces), cache)
    expected = torch.cat([case.expected[:n] for n in lengths])
    assert (first - expected).abs().max() < TOLERANCE
    expected = torch.cat([case.expected[n : n + m] for n, m in zip(lengths, more, strict=True)])
    assert (second - expected).abs().max() < TOLERANCE


def test_only_output_rows_are_computed_in_the_last_layer_and_exactly(case: Case) -> None:
    cache = PagedSequences(case.config, 2, 300)
    model = case.model()
    with torch.inference_mode():
        silent = model.forward(cache.inputs([(0, 0, case.tokens[:200]), (1, 0, case.tokens[:64])], []), cache)
        last = model.forward(
            cache.inputs([(0, 200, case.tokens[200:270]), (1, 64, case.tokens[64:66])], [69, 71]), cache
        )
    assert silent.shape == (0, case.config.vocab_size)
    assert (last - case.expected[[269, 65]]).abs().max() < TOLERANCE


def test_quantization_simulation_reads_back_what_it_attended(case: Case) -> None:
    numerics = Numerics.serving(torch.float32, RowFormat.FLOAT32, RowFormat.FLOAT32, simulate=True)
    whole, chunked = forward(case, TOKENS, numerics=numerics), forward(case, 7, numerics=numerics)
    # A value on the edge of two roundings may fall either way by the last bit of a matrix product: few rows differ.
    rows = (whole - chunked).abs().amax(-1)
    assert (rows < 1e-3).float().mean() > 0.9
    assert 0.01 < (whole - case.expected).abs().mean() < 1.0


def test_bfloat16_stays_near_float32(case: Case) -> None:
    weights = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in case.weights.items()}
    wide = {n: t.float() if t.is_floating_point() else t for n, t in weights.items()}
    dtypes = {n: t.dtype for n, t in allocate(case.config, torch.bfloat16, torch.device("cpu")).items()}
    narrow = {n: t.to(dtypes[n]) for n, t in weights.items()}
    kernels = reference_kernels()
    logits = []
    for tensors, dtype in ((narrow, torch.bfloat16), (wide, torch.float32)):
        form = RowFormat(str(dtype).removeprefix("torch."))
        cache = PagedSequences(case.config, 1, 200, CacheLayout(form, form, case.config.rope_dim))
        model = Model(case.config, tensors, Numerics.serving(dtype, form, form), kernels)
        with torch.inference_mode():
            logits.append(model.forward(cache.inputs([(0, 0, case.tokens[:200])]), cache))
    difference = (logits[0] - logits[1]).abs()
    assert difference.mean() < 0.15 and not logits[0].isnan().any()


def test_mtp_weights_are_kept(case: Case) -> None:
    assert case.config.num_mtp_layers == 1
    assert "mtp.0.e_proj.weight" in case.weights and "mtp.0.ffn.experts.down" in case.weights
