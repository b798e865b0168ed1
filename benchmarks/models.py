"""Models that the benchmarks make: by name, as `thalweg new-model` writes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# The public race's model: 6 layers (window, CSA, HCA, CSA, HCA, CSA), about 77 M parameters.
RACE = (
    "hidden_size=512", "num_attention_heads=8", "head_dim=512", "qk_rope_head_dim=64", "q_lora_rank=256",
    "o_groups=8", "o_lora_rank=160", "index_n_heads=8", "index_head_dim=128", "index_topk=512", "sliding_window=128",
    "n_routed_experts=16", "num_experts_per_tok=2", "moe_intermediate_size=320", "num_hash_layers=0",
    "compress_ratios=0,4,128,4,128,4", "num_nextn_predict_layers=0", "max_position_embeddings=1048576",
)  # fmt: skip
SHAPES: dict[str, tuple[str, ...]] = {
    "race": ("--layers", "6", "--vocab-size", "4096", *(word for field in RACE for word in ("--set", field))),
    # Small enough for transformers to read 64K tokens with it; in the layout that both read.
    "small": ("--layers", "6", "--scale", "0.06", "--layout", "transformers"),
    # Layers of the released pattern with CSA in the middle: the indexer scores the whole history in prefill.
    "middle": ("--layers", "8", "--scale", "0.1"),
}


def make_model(name: str, folder: Path) -> str:
    """Write one of SHAPES under a folder; its directory."""
    directory = folder / name
    command = [sys.executable, "-m", "thalweg", "new-model", str(directory), "--like", "flash", *SHAPES[name]]
    subprocess.run(command, check=True)
    return str(directory)
