"""rms_norm, rotate, the hyper-connections and the storage roundings against their equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.kernels.backends import Kernels, every_backend
from tests.model.fields import FLASH_LIKE
from thalweg.config.model_parse import parse_model_config, read_config_json
from thalweg.kernels.spec import spec_of
from thalweg.model.rotary import angles, compressed_frequencies, window_frequencies


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(name: str, ours: Tensor, twin: Tensor) -> None:
    assert (ours.double() - twin.double()).abs().max() <= spec_of(name).tolerance


@every_backend()
def test_rms_norm(kernels: Kernels) -> None:
    x, w = random(7, 33), random(33, seed=1)
    twin = x.double() / torch.sqrt((x.double() ** 2).mean(-1, keepdim=True) + 1e-6)
    close("rms_norm", kernels.rms_norm(x, None, 1e-6), twin)
    close("rms_norm", kernels.rms_norm(x, w, 1e-6), twin * w.double())
    narrow = kernels.rms_norm(x.bfloat16(), w.bfloat16(), 1e-6)
    assert narrow.dtype is torch.bfloat16 and (narrow.float() - twin * w).abs().max() < 0.05


@every_backend()
@pytest.mark.parametrize("width", [1, 31, 64, 1000])
def test_rms_norm_of_any_rows(kernels: Kernels, width: int) -> None:
    """More axes, memory with gaps, a bfloat16 weight beside fp32 rows, no rows."""
    x, w = random(9, 3, width + 2)[..., 1:-1], random(width, seed=1).bfloat16()
    twin = x.double() / torch.sqrt((x.double() ** 2).mean(-1, keepdim=True) + 1e-6)
    close("rms_norm", kernels.rms_norm(x, None, 1e-6), twin)
    close("rms_norm", kernels.rms_norm(x, w, 1e-6), twin * w.double())
    assert kernels.rms_norm(x[:0], w, 1e-6).shape == (0, 3, width)


@every_backend()
def test_rotate_turns_interleaved_pairs_and_back(kernels: Kernels) -> None:
    x, positions = random(5, 3, 20), torch.tensor([0, 1, 77, 4096, 1_000_000])
    table = angles(positions, 1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8))
    turned = kernels.rotate(x.clone(), table.cos, table.sin)
    assert torch.equal(turned[..., :12], x[..., :12])
    for t in range(5):
        for i in range(4):
            theta = float(torch.tensor(float(positions[t])) * (1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8))[i])
            a, b = x[t, :, 12 + 2 * i].double(), x[t, :, 13 + 2 * i].double()
            c, s = math.cos(theta), math.sin(theta)
            close("rotate", turned[t, :, 12 + 2 * i], a * c - b * s)
            close("rotate", turned[t, :, 13 + 2 * i], a * s + b * c)
    assert kernels.rotate(turned, table.cos, table.back) is turned
    close("rotate", turned, x)


@every_backend()
@pytest.mark.parametrize("shape", [(6, 40), (6, 3, 41), (6, 2, 3, 200), (0, 3, 40)])
@pytest.mark.parametrize("pairs", [1, 4, 20, 75])
def test_rotate_takes_any_memory(kernels: Kernels, shape: tuple[int, ...], pairs: int) -> None:
    if 2 * pairs > shape[-1]:
        return
    wide = random(*shape[:-1], shape[-1] + 3)
    x, turn = wide[..., 2:-1], random(shape[0], 2 * pairs, seed=1)
    cos, sin = turn[:, :pairs], turn[:, pairs:]
    turned = kernels.rotate(x.clone(memory_format=torch.preserve_format), cos, sin)
    gaps = wide.clone()
    assert torch.allclose(kernels.rotate(gaps[..., 2:-1], cos, sin), turned, atol=spec_of("rotate").tolerance)
    assert torch.equal(gaps[..., :2], wide[..., :2]) and torch.equal(gaps[..., -1], wide[..., -1])
    narrow = kernels.rotate(x.bfloat16(), cos, sin)
    assert turned.shape == narrow.shape == shape and narrow.dtype is torch.bfloat16
    assert torch.equal(turned[..., : -2 * pairs], x[..., : -2 * pairs])
    a, b = x[..., -2 * pairs :: 2].double(), x[..., x.shape[-1] - 2 * pairs + 1 :: 2].double()
    each = (shape[0], *(1 for _ in shape[1:-1]), pairs)
    c, s = cos.double().reshape(each), sin.double().reshape(each)
    twin = torch.cat([x[..., : -2 * pairs].double(), torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)], -1)
    if len(x):
        close("rotate", turned, twin)
        assert (narrow.double() - twin).abs().max() < 0.1


def test_yarn_frequencies_of_the_released_models() -> None:
    """r = 64: pairs up to 15 are unscaled, from 25 on divided by 16, blended in between (model-spec 3.4)."""
    config = parse_model_config(read_config_json("flash"))
    plain = 160000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    ours = compressed_frequencies(config, torch.device("cpu")).double()
    for i in range(32):
        ramp = min(1.0, max(0.0, (i - 15) / (25 - 15)))
        expected = plain[i] / 16 * ramp + plain[i] * (1 - ramp)
        assert ours[i] == pytest.approx(float(expected), rel=1e-6)
    window = window_frequencies(config, torch.device("cpu")).double()
    assert torch.allclose(window, 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64), rtol=1e-6)
    small = parse_model_config({**FLASH_LIKE, "rope_scaling": None})
    assert torch.equal(
        compressed_frequencies(small, torch.device("cpu")),
        1.0 / 160000.0 ** (torch.arange(0, 8, 2, dtype=torch.float32) / 8),
    )


def mix_twin(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int) -> tuple[Tensor, ...]:
    """model-spec 3.2, token by token and cell by cell in float64."""
    tokens, n, _ = streams.shape
    eps = 1e-6
    xs, posts, combs = [], [], []
    for t in range(tokens):
        v = streams[t].double().flatten()
        z = (fn.double() @ v) / torch.sqrt((v**2).mean() + eps)
        pre = torch.sigmoid(z[:n] * scale[0] + base[:n]) + eps
        post = 2 * torch.sigmoid(z[n : 2 * n] * scale[1] + base[n : 2 * n])
        logits = z[2 * n :].view(n, n) * scale[2] + base[2 * n :].view(n, n)
        c = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True) + eps
        for i in range(iterations):
            if i:
                for j in range(n):
                    c[j] = c[j] / (c[j].sum() + eps)
            for k in range(n):
                c[:, k] = c[:, k] / (c[:, k].sum() + eps)
        xs.append(sum(pre[j] * streams[t, j].double() for j in range(n)))
        posts.append(post)
        combs.append(c)
    return torch.stack(xs), torch.stack(posts), torch.stack(combs)


@every_backend()
@pytest.mark.parametrize(("n", "iterations"), [(4, 20), (2, 1), (3, 5), (1, 3), (5, 20), (8, 2), (11, 3), (16, 2)])
@pytest.mark.parametrize(("tokens", "hidden"), [(6, 12), (1, 150), (21, 40)])
def test_hyper_connections(kernels: Kernels, n: int, iterations: int, tokens: int, hidden: int) -> None:
    streams, y = random(tokens, n, hidden), random(tokens, hidden, seed=1)
    fn, base, scale = random((2 + n) * n, n * hidden, seed=2) / 7, random((2 + n) * n, seed=3), random(3, seed=4)
    x, post, comb = kernels.mix_in(streams, kernels.pack(fn), base, scale, 1e-6, 1e-6, iterations)
    for ours, twin in zip((x, post, comb), mix_twin(streams, fn, base, scale, iterations), strict=True):
        close("mix_in", ours, twin)
    out = kernels.mix_out(y, streams, post, comb)
    for k in range(n):
        twin = post[:, k, None].double() * y.double()
        for j in range(n):
            twin = twin + comb[:, j, k, None].double() * streams[:, j].double()
        close("mix_out", out[:, k], twin)
    head_fn, head_base, head_scale = random(n, n * hidden, seed=5) / 7, random(n, seed=6), random(1, seed=7)
    v = streams.double().flatten(1)
    z = v @ head_fn.double().T / torch.sqrt((v**2).mean(-1, keepdim=True) + 1e-6)
    pre = torch.sigmoid(z * head_scale + head_base) + 1e-6
    twin = (pre[:, :, None] * streams.double()).sum(1)
    close("mix_head", kernels.mix_head(streams, kernels.pack(head_fn), head_base, head_scale, 1e-6, 1e-6), twin)


@every_backend()
def test_hyper_connections_of_narrow_streams_and_of_none(kernels: Kernels) -> None:
    """Streams in bfloat16 give results in bfloat16; the weights of a token are fp32 all the same."""
    streams, y, fn = random(9, 4, 24).bfloat16(), random(9, 24, seed=1).bfloat16(), random(24, 96, seed=2) / 7
    base, scale = random(24, seed=3), random(3, seed=4)
    packed, head = kernels.pack(fn), kernels.pack(fn[:4])
    x, post, comb = kernels.mix_in(streams, packed, base, scale, 1e-6, 1e-6, 20)
    same = kernels.mix_in(streams.float(), packed, base, scale, 1e-6, 1e-6, 20)
    out = kernels.mix_out(y, streams, post, comb)
    collapsed = kernels.mix_head(streams, head, base[:4], scale[:1], 1e-6, 1e-6)
    assert {t.dtype for t in (x, out, collapsed)} == {torch.bfloat16} and post.dtype is comb.dtype is torch.float32
    assert torch.equal(x, same[0].bfloat16()) and torch.equal(post, same[1]) and torch.equal(comb, same[2])
    assert torch.equal(out, kernels.mix_out(y.float(), streams.float(), post, comb).bfloat16())
    none = kernels.mix_in(streams[:0].float(), packed, base, scale, 1e-6, 1e-6, 20)
    assert [t.shape for t in none] == [(0, 24), (0, 4), (0, 4, 4)]
    assert kernels.mix_out(y[:0].float(), streams[:0].float(), *none[1:]).shape == (0, 4, 24)


def nearest_e4m3(value: float) -> float:
    """By search over all finite e4m3 values; ties to the even mantissa."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = [(float(v), i) for i, v in enumerate(codes) if not math.isnan(v)]
    return min(finite, key=lambda entry: (abs(entry[0] - value), entry[1] % 2))[0]


@every_backend()
@pytest.mark.parametrize(("width", "rope"), [(72, 8), (512, 64), (64, 16)])
def test_round_kv(kernels: Kernels, width: int, rope: int) -> None:
    rows = random(4, width) * torch.tensor([[1e-6], [0.3], [50.0], [1e4]])
    ours = kernels.round_kv(rows, rope)
    assert torch.equal(ours[:, width - rope :], rows[:, width - rope :].bfloat16().float())
    for r in range(4):
        for begin in range(0, width - rope, 64):
            block = rows[r, begin : min(begin + 64, width - rope)]
            scale = 2.0 ** math.ceil(math.log2(max(float(block.abs().max()), 1e-4) / 448))
            for i in range(0, len(block), 7):
                assert float(ours[r, begin + i]) == nearest_e4m3(float(block[i]) / scale) * scale


@every_backend()
@pytest.mark.parametrize("width", [16, 32, 128])
def test_round_index(kernels: Kernels, width: int) -> None:
    x = random(5, width) * 3
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    turned = x.double() @ matrix.double() / math.sqrt(width)
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    ours = kernels.round_index(x)
    for r in range(5):
        for begin in range(0, width, 32):
            block = turned[r, begin : begin + 32]
            scale = 2.0 ** math.ceil(math.log2(float(block.abs().max()) / 6))
            for i, value in enumerate(block.tolist()):
                code = min(range(8), key=lambda c: (abs(table[c] - abs(value) / scale), c % 2))
                assert float(ours[r, begin + i]) == math.copysign(table[code] * scale, value)
