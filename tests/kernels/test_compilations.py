"""What is compiled while serving is counted: by Triton's own compiler, which needs no GPU to be asked."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from thalweg.kernels.compilations import Compilations

# A driver without a device: kernels are specialised and compiled as for a launch, which is then left out.
COMPILED = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from thalweg.kernels.compilations import Compilations
from thalweg.kernels.triton.graphs import watch_compilations

class NoDevice:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

@triton.jit
def double(x, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, 2 * tl.load(x + at, mask=at < count), mask=at < count)

driver.set_active(NoDevice())
compilations = Compilations()
watch_compilations(compilations)
counts = []
def warm(count, block):
    double.warmup(torch.float32, count, BLOCK=block, grid=(1,))
    counts.append((compilations.warmed_up, compilations.in_serving))
warm(3, 16)
warm(5, 16)
compilations.begin_serving()
warm(7, 16)
warm(16, 16)
warm(3, 32)
print(counts)
"""


def test_triton_says_what_it_compiles(tmp_path) -> None:
    """A size like another's costs nothing, one that is a multiple of 16 a kernel of its own, another block too."""
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == str([(1, 0), (1, 0), (1, 0), (1, 1), (1, 2)])


def test_nothing_is_compiled_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    compilations = Compilations()
    with caplog.at_level(logging.WARNING):
        compilations.note("one")
        compilations.begin_serving()
        compilations.note("attention")
    assert (compilations.warmed_up, compilations.in_serving) == (1, 1)
    assert [record.getMessage() for record in caplog.records] == ["compiled while serving: attention"]
