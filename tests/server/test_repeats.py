"""The watch over prompts that repeat: it warns once, counts reasons, and is quiet where nothing is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from thalweg.server.repeats import RepeatWatch
from thalweg.types import CacheReport, MissReason

MISS = CacheReport(reason=MissReason.EVICTED)
PROMPT = np.arange(200, dtype=np.int32)


def serve(watch: RepeatWatch, times: int, report: CacheReport = MISS, prompt: np.ndarray = PROMPT) -> None:
    for _ in range(times):
        watch.begin(prompt)(report)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_it_warns_at_twenty_once_and_again_after_a_hit(caplog: pytest.LogCaptureFixture) -> None:
    watch = RepeatWatch("ann", 128)
    serve(watch, 1 + 19)
    assert warnings(caplog) == []
    serve(watch, 5, CacheReport(reason=MissReason.NO_CHECKPOINT))
    assert len(warnings(caplog)) == 1
    assert "20 prompts of 'ann'" in caplog.text and "evicted 19, no-checkpoint 1" in caplog.text
    serve(watch, 100)
    assert len(warnings(caplog)) == 1
    serve(watch, 1, CacheReport(128))
    serve(watch, 20)
    assert len(warnings(caplog)) == 2


@pytest.mark.parametrize("hit", [CacheReport(host_tokens=128), CacheReport(replayed_tokens=128)])
def test_any_reuse_starts_the_count_anew(caplog: pytest.LogCaptureFixture, hit: CacheReport) -> None:
    watch = RepeatWatch("", 128)
    for _ in range(5):
        serve(watch, 15)
        serve(watch, 1, hit)
    assert warnings(caplog) == []


def test_quiet_without_a_repetition(caplog: pytest.LogCaptureFixture) -> None:
    watch = RepeatWatch("", 128)
    serve(watch, 50, prompt=PROMPT[:128])  # no complete unit before the last token
    serve(watch, 50, CacheReport(reason=MissReason.DISABLED))
    for start in range(50):
        serve(watch, 1, prompt=PROMPT + start)
    together = [watch.begin(PROMPT + 1000) for _ in range(50)]  # all began before any was served
    for served in together:
        served(MISS)
    assert warnings(caplog) == []


def test_what_is_remembered_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    watch = RepeatWatch("", 128)
    for _ in range(3):
        for start in range(1100):
            serve(watch, 1, prompt=PROMPT + start)
    assert warnings(caplog) == []
