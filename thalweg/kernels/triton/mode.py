"""Whether this process interprets Triton's kernels or compiles them."""

from __future__ import annotations

import os

INTERPRET = "TRITON_INTERPRET"  # Triton's own variable; it must be set before triton is imported


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on a CPU."""
    return os.environ.get(INTERPRET, "0") not in ("0", "")
