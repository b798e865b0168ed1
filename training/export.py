"""Writes trained weights in the official layout, in bf16: `python -m training.export --run FILE --model DIRECTORY`.

The file appears by one rename: a reader finds the old one or the new one, never half of one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from thalweg.checkpoint.parameters import parameters
from thalweg.checkpoint.writer import WriteFormat, write_checkpoint
from thalweg.config.model_parse import parse_model_config, read_config_json
from training.network import Weights

MOST_BYTES = 5 * 10**6


def export(weights: Weights, model: Path) -> int:
    """Replace model.safetensors of a model directory, whose config.json describes the weights; returns its size."""
    fields = read_config_json(model)
    values = [(p, weights[p.name].detach()) for p in parameters(parse_model_config(fields))]
    with tempfile.TemporaryDirectory(dir=model.parent, prefix=".export-") as scratch:
        made = Path(scratch) / "made"
        write_checkpoint(made, fields, values, WriteFormat())
        file = made / "model.safetensors"
        size = file.stat().st_size
        assert size <= MOST_BYTES, f"{size} bytes are too many to ship in the package"
        file.chmod(0o644)
        file.replace(model / file.name)
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    options = parser.parse_args()
    sys.stdout.write(f"{export(torch.load(options.run)['weights'], options.model)} bytes\n")


if __name__ == "__main__":
    main()
