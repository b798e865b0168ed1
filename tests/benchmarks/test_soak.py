"""A short soak of the real server: what `python -m benchmarks.soak` checks in half an hour."""

from __future__ import annotations

from benchmarks.soak import soak

SECONDS, CLIENTS = 15, 6


def test_everything_at_once_leaves_nothing_behind() -> None:
    facts = soak(SECONDS, CLIENTS, seed=3)
    assert facts["faults"] == [] and facts["changed_answers"] == 0
    assert facts["unended_requests"] == facts["leaked_blocks"] == facts["blocks_after_reset"] == 0
    assert facts["logged_lines"] == []
    assert facts["leaked_files"] <= 2 and facts["threads"]["last"] <= facts["threads"]["warm"] + 4
    ends = {outcome.split()[1] for outcome in facts["outcomes"]}
    assert ends == {"answered", "refused", "left"} and facts["requests"] > 100
    assert facts["engine_ends"].keys() == {"stop", "length", "cancelled"}
