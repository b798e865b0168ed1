"""Which version of the project a benchmark measured."""

from __future__ import annotations

import subprocess


def commit_name() -> str:
    """The short name of the commit that is checked out; empty outside a checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
