"""Traces: both file forms, what is wrong with a line, and the shapes of traffic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from thalweg.errors import ConfigError
from thalweg.planner.trace import Session, read_trace
from thalweg.planner.workload import NAMES, SHAPES, workload_sessions

MOONCAKE = {"timestamp": 1500, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 9]}
SESSION = {
    "start": 2.0, "tenant": "a", "id": "one", "prefix": [["system", 800]],
    "turns": [{"input_tokens": 120, "output_tokens": 300}, {"input_tokens": 5, "output_tokens": 9, "pause": 8.5}],
}  # fmt: skip


def read(path: Path, *lines: Any) -> list[Session]:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return list(read_trace(path))


def test_mooncake_lines_share_the_blocks_with_equal_ids(tmp_path: Path) -> None:
    other = {**MOONCAKE, "timestamp": 2500, "input_length": 1024, "hash_ids": [46, 5]}
    first, second = read(tmp_path / "t.jsonl", MOONCAKE, "", other)
    assert (first.start, second.start) == (1.5, 2.5)
    assert [tokens for _, tokens in first.turns[0].pieces] == [512, 512, 76]
    assert first.turns[0].prompt_tokens == 1100 and first.turns[0].output_tokens == 52
    texts = [[text for text, _ in session.turns[0].pieces] for session in (first, second)]
    assert texts[0][0] == texts[1][0] and texts[0][1] != texts[1][1]
    assert first.turns[0].output not in (*texts[0], *texts[1])


def test_turns_of_a_session_contain_all_that_was_said_before(tmp_path: Path) -> None:
    session, other = read(tmp_path / "t.jsonl", SESSION, {**SESSION, "id": "two"})
    first, second = session.turns
    assert session.name == "one" and session.tenant == "a" and second.pause == 8.5
    assert second.pieces[:2] == first.pieces and second.pieces[2] == (first.output, 300)
    assert second.prompt_tokens == 800 + 120 + 300 + 5 and first.hints == (800,)
    assert other.turns[0].pieces[0] == first.pieces[0] and other.turns[0].pieces[1] != first.pieces[1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: no JSON"),
        ("[]", "line 2: not a JSON object"),
        ({**MOONCAKE, "hash_ids": [1]}, "hash_ids: 1 ids for input_length 1100"),
        ({**MOONCAKE, "hash_ids": "x"}, "hash_ids: not a list of whole numbers"),
        ({**MOONCAKE, "input_length": 0}, "input_length: 0 is not a whole number from 1"),
        ({**MOONCAKE, "timestamp": -1}, "timestamp: -1 is not a number of at least 0"),
        ({**MOONCAKE, "timestamp": 100}, "line 2: starts at 0.1 s, before the line above it (1.5 s)"),
        ({**MOONCAKE, "output_lenght": 3}, "output_lenght: no such field Did you mean 'output_length'?"),
        ({**SESSION, "turns": []}, "turns: not a list of at least one turn"),
        ({**SESSION, "turns": [{"input_tokens": 1}]}, "turns[0].output_tokens: None is not a whole number from 1"),
        ({**SESSION, "turns": [{"input_tokens": 1, "output_tokens": True}]}, "turns[0].output_tokens: True"),
        ({**SESSION, "turns": [{"input_tokens": 1, "output_tokens": 1, "pase": 2}]}, "turns[0].pase: no such field"),
        ({**SESSION, "prefix": [["system"]]}, "prefix[0]: not [name, tokens]"),
        ({**SESSION, "prefix": [], "turns": [{"input_tokens": 0, "output_tokens": 1}]}, "0 without a prefix"),
        ({**SESSION, "tenant": 3}, "tenant: not a text"),
        ({**SESSION, "turns": [{"input_tokens": 1, "output_tokens": 1, "priority": 0.5}]}, "turns[0].priority: 0.5"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_number_and_field(line: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as failure:
        read(tmp_path / "t.jsonl", MOONCAKE, line)
    assert said in failure.value.message and "t.jsonl line 2" in failure.value.message


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_trace(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="has no lines"):
        read(tmp_path / "t.jsonl", "")


def turns_of(sessions: Iterator[Session]) -> list[tuple[Any, ...]]:
    return [(s.start, t.pieces, t.output_tokens, t.pause) for s in sessions for t in s.turns]


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_gives_the_same_trace_for_the_same_seed(name: str) -> None:
    first = turns_of(workload_sessions(name, 60, seed=3))
    assert first == turns_of(workload_sessions(name, 60, seed=3))
    assert first != turns_of(workload_sessions(name, 60, seed=4))
    assert len(first) == 60
    starts = [start for start, *_ in first]
    assert starts == sorted(starts)


def test_shapes_differ_in_what_limits_them() -> None:
    drawn = {name: [t for s in workload_sessions(name, 300, 1) for t in s.turns] for name in SHAPES}
    median = {n: sorted(t.prompt_tokens for t in turns)[150] for n, turns in drawn.items()}
    assert median["short-chat"] < 3_000 < 30_000 < median["long-context-agents"] and median["coding-agents"] > 50_000
    rollouts = list(workload_sessions("rl-rollouts", 64, 1))
    same = [a.turns[0].pieces == b.turns[0].pieces for a, b in pairwise(rollouts)]
    assert same.count(False) == 3 and rollouts[0].turns[0].output != rollouts[1].turns[0].output


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"name": "short-chet"}, "Did you mean 'short-chat'"),
        ({"requests": 0}, "requests: 0"),
        ({"rate": 0.0}, "rate: 0"),
    ],
)
def test_wrong_workloads(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        workload_sessions(**{"name": "short-chat", "requests": 5, "seed": 0, **wrong})
