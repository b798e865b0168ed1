"""Weights that stay in their own bytes: which can, what their bytes are, and that memory is counted as it is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoint.files import QUANTIZED, edited, load, write
from thalweg.checkpoint.formats import quantize_fp8
from thalweg.checkpoint.loader import kept_forms, load_parameters
from thalweg.checkpoint.parameters import SCALES
from thalweg.checkpoint.reader import open_checkpoint
from thalweg.kernels.arguments import Quantised
from thalweg.kernels.reference.linear import widened
from thalweg.model.weights import allocate, weight_bytes

ALL = frozenset({torch.bfloat16, torch.float8_e4m3fn, torch.uint8})
WHOLE_BLOCKS = {**QUANTIZED, "o_lora_rank": 128, "moe_intermediate_size": 128}


def kept(directory: Path, forms: frozenset[torch.dtype]) -> tuple[dict[str, torch.dtype], dict[str, Tensor]]:
    checkpoint = open_checkpoint(directory)
    chosen = kept_forms(checkpoint, forms)
    tensors = allocate(checkpoint.config, torch.float32, torch.device("cpu"), chosen)
    assert weight_bytes(checkpoint.config, torch.float32, chosen) == sum(
        t.numel() * t.element_size() for t in tensors.values()
    )
    for tensor in tensors.values():
        tensor.view(torch.uint8).fill_(255)
    load_parameters(checkpoint, tensors)
    return chosen, tensors


def values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything widened."""
    plain = {name: t for name, t in tensors.items() if not name.endswith(SCALES)}
    for name in plain:
        if name + SCALES in tensors:
            plain[name] = widened(Quantised(tensors[name], tensors[name + SCALES]))
    return plain


@pytest.mark.parametrize("forms", [ALL, frozenset({torch.uint8}), frozenset({torch.bfloat16}), frozenset()])
@pytest.mark.parametrize("fields", [QUANTIZED, WHOLE_BLOCKS], ids=["parts of blocks", "whole blocks"])
def test_kept_weights_are_the_widened_ones(
    tmp_path: Path, fields: dict[str, object], forms: frozenset[torch.dtype]
) -> None:
    directory = write(tmp_path / "m", fields, quantize=True, plain=torch.bfloat16)
    chosen, tensors = kept(directory, forms)
    assert set(chosen.values()) <= forms
    wide, ours = load(directory), values(tensors)
    assert wide.keys() == ours.keys()
    assert all(torch.equal(wide[name], ours[name].to(wide[name].dtype)) for name in wide)


def test_each_parameter_has_its_own_form(tmp_path: Path) -> None:
    chosen, tensors = kept(write(tmp_path / "m", WHOLE_BLOCKS, quantize=True, plain=torch.bfloat16), ALL)
    assert chosen["layers.0.attn.wq_a.weight"] is chosen["layers.2.attn.wo_a.weight"] is torch.float8_e4m3fn
    assert chosen["layers.1.ffn.experts.gate_up"] is chosen["layers.1.ffn.experts.down"] is torch.uint8
    assert chosen["embed.weight"] is chosen["layers.2.attn.compressor.wkv.weight"] is torch.bfloat16
    assert "layers.0.hc_attn_fn" not in chosen and "layers.0.ffn.gate.tid2eid" not in chosen
    hidden, inner, experts = 160, 128, 5
    assert tensors["layers.1.ffn.experts.gate_up"].shape == (experts, 2 * inner, hidden // 2)
    assert tensors["layers.1.ffn.experts.gate_up" + SCALES].shape == (experts, 2 * inner, hidden // 32)
    assert tensors["layers.0.attn.wq_a.weight" + SCALES].shape == (1, 2)


def test_blocks_across_parts_are_kept_as_bfloat16(tmp_path: Path) -> None:
    """Two groups of 16 rows lie in one block of wo_a; gate and up of 64 rows in one of an expert."""
    directory = write(tmp_path / "m", QUANTIZED, quantize=True, plain=torch.bfloat16)
    chosen, _ = kept(directory, ALL)
    assert chosen["layers.0.attn.wo_a.weight"] is torch.bfloat16
    assert chosen["layers.0.attn.wo_b.weight"] is torch.float8_e4m3fn

    def base(tensors: dict[str, Tensor]) -> None:
        """Experts in FP8, as base checkpoints have them."""
        for name in [name for name in tensors if ".experts." in name and name.endswith(".weight")]:
            scale = name.removesuffix(".weight") + ".scale"
            packed = Quantised(tensors[name].view(torch.uint8), tensors[scale].view(torch.uint8))
            tensors[name], made = quantize_fp8(widened(packed))
            tensors[scale] = made.view(torch.float8_e8m0fnu)

    chosen, tensors = kept(edited(directory, base), ALL)
    assert chosen["layers.0.ffn.experts.gate_up"] is torch.bfloat16
    assert chosen["layers.0.ffn.experts.down"] is torch.float8_e4m3fn
    wide = load(directory)
    assert all(torch.equal(wide[name], t.to(wide[name].dtype)) for name, t in values(tensors).items())


def test_one_wide_piece_makes_a_parameter_wide(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", QUANTIZED, quantize=True, plain=torch.bfloat16)

    def widen(tensors: dict[str, Tensor]) -> None:
        for expert, dtype in ((0, torch.bfloat16), (1, torch.float32)):
            name = f"layers.{expert}.ffn.experts.0.w2"
            packed = Quantised(
                tensors[name + ".weight"].view(torch.uint8), tensors.pop(name + ".scale").view(torch.uint8)
            )
            tensors[name + ".weight"] = widened(packed).to(dtype)

    chosen, tensors = kept(edited(directory, widen), ALL)
    assert chosen["layers.0.ffn.experts.down"] is torch.bfloat16 and "layers.1.ffn.experts.down" not in chosen
    wide = load(directory)
    assert all(torch.equal(wide[name], t.to(wide[name].dtype)) for name, t in values(tensors).items())
