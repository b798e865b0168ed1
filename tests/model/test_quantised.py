"""A model over weights in their own bytes computes what it computes over the same weights widened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoint.files import QUANTIZED, load, write
from tests.kernels.backends import BACKENDS
from tests.model.paging import PagedSequences
from thalweg.checkpoint.loader import kept_forms, load_parameters
from thalweg.checkpoint.reader import open_checkpoint
from thalweg.kernels.ops import Kernels
from thalweg.kernels.reference.backend import reference_kernels
from thalweg.memory.layout import RowFormat
from thalweg.model.numerics import Numerics
from thalweg.model.transformer import Model
from thalweg.model.weights import allocate

FORMS = frozenset({torch.bfloat16, torch.float8_e4m3fn, torch.uint8})
NUMERICS = Numerics.serving(torch.float32, RowFormat.FLOAT32, RowFormat.FLOAT32, simulate=False)
# Two layers are enough for every matrix: the first routes by token, the second by score and compresses.
SMALL = {
    **QUANTIZED, "num_hidden_layers": 2, "compress_ratios": [0, 4], "o_lora_rank": 128,
    "moe_intermediate_size": 128, "n_routed_experts": 3, "num_nextn_predict_layers": 0,
}  # fmt: skip


def logits(model: Model) -> torch.Tensor:
    cache = PagedSequences(model.config, 1, 128)
    with torch.inference_mode():
        parts = [
            model.forward(cache.inputs([(0, start, tokens)]), cache) for start, tokens in ((0, [3, 9, 4, 7]), (4, [8]))
        ]
    return torch.cat(parts)


@pytest.mark.parametrize("name", [name for name in ("reference", "triton") if name in BACKENDS])
def test_kept_weights(tmp_path: Path, name: str) -> None:
    """Routed experts are FP4 and the shared one FP8: it cannot be one of them here."""
    directory = write(tmp_path / "m", SMALL, quantize=True, plain=torch.bfloat16)
    checkpoint = open_checkpoint(directory)
    kernels: Kernels = BACKENDS[name]()
    tensors = allocate(checkpoint.config, torch.float32, torch.device("cpu"), kept_forms(checkpoint, FORMS))
    load_parameters(checkpoint, tensors)
    if name == "reference":  # it widens as it packs, but multiplies by fp32 alone
        tensors = {n: t.float() if t.dtype is torch.bfloat16 else t for n, t in tensors.items()}
    kept = Model(checkpoint.config, tensors, NUMERICS, kernels)
    wide = Model(checkpoint.config, load(directory), NUMERICS, reference_kernels())
    assert (logits(kept) - logits(wide)).abs().max() <= 1e-4
