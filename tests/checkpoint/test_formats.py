"""FP8 and FP4 weights: every code, every scale, ragged edges; what quantised checkpoints load as."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.checkpoint.files import QUANTIZED, edited, load, write
from thalweg.checkpoint.formats import dequantize_fp4, dequantize_fp8, exponents, quantize_fp4, quantize_fp8
from thalweg.checkpoint.random_model import random_parameters
from thalweg.config.model_parse import parse_model_config
from thalweg.errors import CheckpointError


def e4m3(byte: int) -> float:
    """Sign, four bits of exponent with bias 7, three of mantissa; no infinities."""
    sign, exponent, mantissa = (-1.0 if byte & 128 else 1.0), byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([e4m3(byte) for byte in range(256)])
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def plain_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """model-spec section 5: element (i, j) times 2^(byte - 127) of block (i // 128, j // 128)."""
    codes = weight.view(torch.uint8).numpy()
    i, j = np.indices(codes.shape)
    byte = scale.view(torch.uint8).numpy()[i // 128, j // 128].astype(int)
    return torch.from_numpy((E4M3[codes] * 2.0 ** (byte - 127)).astype(np.float32))


def plain_fp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Column j is the low nibble of byte j // 2 where j is even, else the high one; bit 3 is the sign."""
    i, j = np.indices((packed.shape[0], 2 * packed.shape[1]))
    code = packed.view(torch.uint8).numpy()[i, j // 2] >> (4 * (j % 2)) & 15
    value = E2M1[code & 7] * np.where(code & 8, -1.0, 1.0)
    byte = scale.view(torch.uint8).numpy()[i, j // 32].astype(int)
    return torch.from_numpy((value * 2.0 ** (byte - 127)).astype(np.float32))


def test_every_fp8_code_and_scale() -> None:
    codes = torch.tensor([b for b in range(256) if b & 127 != 127], dtype=torch.uint8)
    weight = codes.repeat(130, 1).view(torch.float8_e4m3fn)
    for byte in (60, 126, 127, 128, 200):
        scale = torch.tensor([[byte, byte + 1], [byte + 2, byte + 3]], dtype=torch.uint8)
        assert torch.equal(dequantize_fp8(weight, scale), plain_fp8(weight, scale))
    powers = exponents(torch.arange(255, dtype=torch.uint8))
    assert torch.equal(powers, torch.tensor([2.0 ** (byte - 127) for byte in range(255)]))


def test_every_fp4_byte() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(torch.int8).reshape(2, 128)
    scale = torch.randint(100, 150, (2, 8), dtype=torch.uint8)
    values = dequantize_fp4(packed, scale)
    assert torch.equal(values, plain_fp4(packed, scale))
    lone = dequantize_fp4(torch.tensor([[0xF1 - 256] + [0] * 15], dtype=torch.int8), torch.tensor([[127]]).byte())
    assert lone[0, :2].tolist() == [0.5, -6.0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 270), st.integers(1, 270), st.integers(-30, 30), st.integers(0, 2**31))
def test_fp8_error_is_half_a_step(rows: int, columns: int, magnitude: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**magnitude
    quantized, scale = quantize_fp8(weight)
    assert scale.shape == (-(-rows // 128), -(-columns // 128)) and quantized.shape == weight.shape
    values = dequantize_fp8(quantized, scale)
    assert torch.equal(values, plain_fp8(quantized, scale))
    spread = exponents(scale).repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    assert ((values - weight).abs() <= torch.maximum(weight.abs() / 16, spread * 2.0**-10)).all()
    for i, j in np.ndindex(*scale.shape):  # the smallest power of two that keeps the block in range
        most = weight[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].abs().max() / exponents(scale)[i, j]
        assert 224 < most <= 448


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(-30, 30), st.integers(0, 2**31))
def test_fp4_error_is_half_a_step(rows: int, groups: int, magnitude: int, seed: int) -> None:
    weight = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed)) * 2.0**magnitude
    packed, scale = quantize_fp4(weight)
    assert packed.shape == (rows, 16 * groups) and scale.shape == (rows, groups)
    values = dequantize_fp4(packed, scale)
    assert torch.equal(values, plain_fp4(packed, scale))
    size = weight.abs() / exponents(scale).repeat_interleave(32, 1)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    assert size.max() <= 6
    assert ((values - weight).abs() / exponents(scale).repeat_interleave(32, 1) <= step / 2).all()


def test_blocks_of_zeros_stay_zeros() -> None:
    for quantize, dequantize in ((quantize_fp8, dequantize_fp8), (quantize_fp4, dequantize_fp4)):
        assert not dequantize(*quantize(torch.zeros(3, 64))).any()


def test_quantized_official_layout(tmp_path: Path) -> None:
    """Every dequantised value equals the plain reading of the stored bytes, and lies near what was written."""
    directory = write(tmp_path / "m", QUANTIZED, quantize=True, plain=torch.bfloat16)
    tensors, stored = load(directory), load_file(directory / "model.safetensors")
    attention = "layers.0.attn.wq_a"
    assert stored[f"{attention}.weight"].dtype == torch.float8_e4m3fn
    assert stored[f"{attention}.scale"].dtype == torch.float8_e8m0fnu and stored[f"{attention}.scale"].shape == (1, 2)
    scaled = 0
    for parameter, value in random_parameters(parse_model_config(QUANTIZED), 0):
        mine = tensors[parameter.name]
        for piece in parameter.official:
            scale = stored.get(piece.name.removesuffix(".weight") + ".scale")
            if scale is None:
                continue
            plain = plain_fp4 if parameter.storage == "expert" else plain_fp8
            rows = slice(piece.first_row, piece.first_row + piece.shape[0])
            part = mine if piece.expert is None else mine[piece.expert, rows]
            assert torch.equal(part, plain(stored[piece.name], scale)), piece.name
            scaled += 1
        error = (mine - value).abs().max()
        limit = {"matrix": 0.07, "expert": 0.3}.get(parameter.storage.value, 0.01)
        assert error <= limit * value.abs().max().clamp_min(1), parameter.name
    assert scaled == sum(name.endswith(".scale") and f"{name[:-6]}.weight" in stored for name in stored) > 100


def test_scales_in_other_shards(tmp_path: Path) -> None:
    whole = load(write(tmp_path / "whole", QUANTIZED, quantize=True))
    pieces = load(write(tmp_path / "pieces", QUANTIZED, quantize=True, max_shard_bytes=1))
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_fp8_experts_and_e8m0_as_bytes(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", QUANTIZED, quantize=True)
    path = directory / "model.safetensors"
    stored = load_file(path)
    name = "layers.1.ffn.experts.0.w2"
    values = torch.randn(160, 64).to(torch.float8_e4m3fn)
    stored[f"{name}.weight"] = values
    stored[f"{name}.scale"] = torch.tensor([[130], [120]], dtype=torch.uint8)
    save_file(stored, path)
    expected = plain_fp8(values, stored[f"{name}.scale"])
    assert torch.equal(load(directory)["layers.1.ffn.experts.down"][0], expected)
    assert float(expected[0, 0]) == float(values[0, 0].float()) * 8


FP4_WEIGHT, FP4_SCALE = "layers.1.ffn.experts.0.w1.weight", "layers.1.ffn.experts.0.w1.scale"
FP8_WEIGHT, FP8_SCALE = "layers.0.attn.wq_a.weight", "layers.0.attn.wq_a.scale"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(FP4_SCALE), [FP4_SCALE, "missing", FP4_WEIGHT]),
        (lambda t: t.pop(FP8_SCALE), [FP8_SCALE, "missing", "F8_E4M3"]),
        (lambda t: t.update({FP4_SCALE: torch.zeros(64, 4).byte()}), [FP4_SCALE, "[64, 4]", "[64, 5]"]),
        (lambda t: t.update({FP8_SCALE: torch.zeros(1, 2)}), [FP8_SCALE, "F32", "F8_E8M0 or U8"]),
        (lambda t: t.update({FP4_WEIGHT: torch.zeros(64, 160).char()}), [FP4_WEIGHT, "[64, 160]", "[64, 80]"]),
        (lambda t: t.update({FP8_WEIGHT: torch.zeros(24, 80).char()}), [FP8_WEIGHT, "I8", "not supported"]),
        (lambda t: t.update({FP8_WEIGHT: torch.zeros(24, 160)}), [FP8_SCALE, "not a tensor of this model"]),
    ],
)
def test_wrong_quantized_tensors_are_named(tmp_path: Path, change, words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(edited(write(tmp_path / "m", QUANTIZED, quantize=True), change))
    assert all(word in caught.value.message for word in words), caught.value.message
