"""Samples survive being cut off anywhere, and are never mixed up with those of another measurement."""

from __future__ import annotations

from pathlib import Path

import pytest

from thalweg.errors import ConfigError
from thalweg.profiler.prompts import Prompts
from thalweg.profiler.store import SampleFile

HEADER = {"plan": "a", "model": "m"}


def test_samples_cut_at_any_byte_are_whole_samples(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    file = SampleFile(path, HEADER)
    for number in range(3):
        file.add(f"key{number}", {"value": number}, took=1.5)
    file.close()
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        again = SampleFile(path, HEADER)
        kept = sum(end <= cut for end in ends[1:])
        assert [r["value"] for r in again.records.values()] == list(range(kept))
        assert again.seconds == pytest.approx(1.5 * kept)
        again.add("more", {"value": 9}, took=0.0)
        again.close()
        assert SampleFile(path, HEADER).records["more"]["value"] == 9


def test_another_measurement_is_refused_or_discarded(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    SampleFile(path, HEADER).add("key", {}, 1.0)
    with pytest.raises(ConfigError, match="model was 'm' and is 'other'"):
        SampleFile(path, HEADER | {"model": "other"})
    assert not SampleFile(path, HEADER | {"model": "other"}, fresh=True).records


def test_prompts_differ_at_the_front_and_are_long_enough() -> None:
    prompts = Prompts(0)
    texts = [prompts.cold(f"key{i}", 5000, body="one") for i in range(50)]
    assert len({text[:30] for text in texts}) == 50
    assert {len(text) for text in texts} == {5000}
    assert Prompts(0).stretch("k", 900) == prompts.stretch("k", 900) != Prompts(1).stretch("k", 900)
    assert Prompts(0).salt("k") != prompts.salt("k"), "another process must not meet what this one left in a cache"


def test_filler_is_never_the_same_line_over_and_over() -> None:
    lines = [line for line in Prompts(3).stretch("k", 60_000).split("\n") if len(line.strip()) > 20]
    assert len(set(lines)) > 0.8 * len(lines)


def test_needles_are_in_the_text_and_are_asked_for() -> None:
    text, value = Prompts(0).needle("k", 3000, 2, "salt")
    key = text.rsplit("What is the value of ", 1)[1].removesuffix("?")
    assert f'The value of {key} is: "{value}".' in text
    assert text.count(" data data\n\nWhat is") == 1
