"""`thalweg` with arguments, in this process and in one of its own."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from unittest import mock

from thalweg.cli.main import main


def run(*arguments: str, ok: bool = True) -> str:
    """What the command prints: to stdout if it should succeed, else to stderr."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["thalweg", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    assert (code == 0) is ok, (code, err.getvalue())
    assert ok or code == 2, code
    return out.getvalue() if ok else err.getvalue()


def run_alone(*arguments: str, ok: bool = True) -> str:
    """The same in a process of its own."""
    result = subprocess.run([sys.executable, "-m", "thalweg", *arguments], capture_output=True, text=True, check=False)
    assert (result.returncode == 0) is ok, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout if ok else result.stderr
