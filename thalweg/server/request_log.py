"""The request log: one JSON line per finished request, at level INFO of the logger `thalweg.requests`.

Lines leave by a thread of their own: a reader of the log that is slow, or stuck, never holds up an answer.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from datetime import UTC, datetime
from typing import Any

from thalweg.metrics.finished import FinishedRequest

_log = logging.getLogger("thalweg.requests")
_MOST_PENDING = 10_000  # lines; more are dropped, and counted in the next one
_FLUSH_SECONDS = 1.0


def log_finished(request: FinishedRequest) -> None:
    """Write one line, if anybody listens at INFO."""
    if _log.isEnabledFor(logging.INFO):
        _log.info("%s", json.dumps(log_fields(request), separators=(",", ":")))


def log_fields(request: FinishedRequest) -> dict[str, Any]:
    """The fields of a line. No text, no token, no API key: only the key's name."""
    ended = datetime.fromtimestamp(request.ended_at, UTC).isoformat(timespec="milliseconds")
    return {
        "time": ended.replace("+00:00", "Z"),
        "id": request.request_id,
        "caller": request.caller or None,
        "finish_reason": request.reason,
        "error": request.error,
        "prompt_tokens": request.prompt_tokens,
        **{
            f"{source}_tokens": request.prompt_sources.get(source, 0)
            for source in ("device", "host", "disk", "replayed", "computed")
        },
        "miss_reason": request.miss_reason,
        "output_tokens": request.output_tokens,
        "queue_seconds": round(request.queue_seconds, 6),
        "load_seconds": round(request.load_seconds, 6),
        "prefill_seconds": round(request.prefill_seconds, 6),
        "decode_seconds": round(request.decode_seconds, 6),
        "ttft_seconds": _rounded(request.first_token_seconds),
        "tpot_seconds": _rounded(request.token_seconds),
        "total_seconds": round(request.seconds, 6),
        "preemptions": request.preemptions,
    }


class LineWriter(logging.Handler):
    """Writes messages, one a line, to a file descriptor from a thread, which dies with the process.

    No lock is held while a write blocks, so that not even the end of the process waits for the reader.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[str | threading.Event] = queue.Queue(_MOST_PENDING)
        self._dropped = 0
        threading.Thread(target=self._write, name="thalweg-request-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1

    def flush(self) -> None:
        """Wait for the lines so far, but not for ever."""
        written = threading.Event()
        try:
            self._lines.put_nowait(written)
        except queue.Full:
            return
        written.wait(_FLUSH_SECONDS)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            dropped, self._dropped = self._dropped, 0
            lost = f'{{"dropped_lines":{dropped}}}\n' if dropped else ""
            data = (lost + line + "\n").encode()
            while data:
                data = data[os.write(self._descriptor, data) :]


def write_request_log(descriptor: int) -> None:
    """Let the lines go to a file descriptor, and nowhere else."""
    _log.setLevel(logging.INFO)
    _log.propagate = False
    _log.addHandler(LineWriter(descriptor))


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
