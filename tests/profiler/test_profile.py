"""A profile as a file, what it predicts, and what it says of its own errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.commands import run
from tests.profiler.test_surface import CONTEXTS, SHARES, tpot, ttft
from thalweg.errors import ConfigError
from thalweg.profiler.caching import fit_capacity
from thalweg.profiler.plan import usual_plan
from thalweg.profiler.profile import (
    CacheFacts,
    Check,
    EndpointFacts,
    Fill,
    Holdout,
    Load,
    Objectives,
    Profile,
    TpotCell,
    TtftCell,
    errors_of,
)
from thalweg.profiler.surface import Tag


def fills(capacity: float, request: float, most: float, lengths: tuple[int, ...]) -> tuple[Fill, ...]:
    """What an endpoint with these limits would show."""
    counts = [min(capacity / (length + request), most) for length in lengths]
    return tuple(Fill(n + 3, n, 10**6, n * count, True) for n, count in zip(lengths, counts, strict=True))


def profile(scale: float = 1.0) -> Profile:
    """Made of known functions: what it predicts can be checked."""
    first = [TtftCell(c, s, s, None, scale * ttft(c, s), (scale * ttft(c, s),) * 3) for c in CONTEXTS for s in SHARES]
    between = [TpotCell(b, c, scale * tpot(b, c), (scale * tpot(b, c),) * 3) for c in CONTEXTS for b in (1, 2, 4)]
    slow, other = scale * 1.1 * ttft(4000, 0.7), scale * tpot(3, 4000)
    held_out = Holdout(
        (TtftCell(4000, 0.7, 0.7, None, slow, (slow / 1.1, 1.1 * slow)),),
        (TpotCell(3, 4000, other, (other,)),),
        fills(1e5, 100, 1e9, (700,)),
    )
    own = fills(1e5, 100, 1e9, (512, 1024))
    capacity, request, most = fit_capacity(own)
    return Profile(
        format=1,
        thalweg="0",
        created="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        plan=usual_plan(8192, quick=True).fields(),
        endpoint=EndpointFacts(
            "http://x", "m", 65536, None, None, "completions", False, False, True, True, None, ("a note",)
        ),
        objectives=Objectives(1.0, 0.1),
        warm_up="",
        ttft_cells=tuple(first),
        tpot_cells=tuple(between),
        cache=CacheFacts(True, 1, 0, None, capacity, request, most, own),
        interference=None,
        queueing=None,
        checks=(
            Check("needle", 101, 1, "a", "a", "b", "a", 96),
            Check("continuation", 100, 0, "c", "c", "c", None, 96),
        ),
        loads=(Load("closed", 2, None, 100, 0.9, 8, 2.0, (0.5, 2.0), (0.05, 0.05), 1, 0),),
        holdout=held_out,
        surface={},
        left_out=("load/open/1: time",),
        machine={},
    ).with_surface()


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    profile().write(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile()
    assert not list(tmp_path.glob("*.part"))


def test_what_is_no_profile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(ConfigError, match="No such file"):
        Profile.load(path)
    profile().write(path)
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"format": 99}))
    with pytest.raises(ConfigError, match="format 99"):
        Profile.load(path)
    del fields["ttft_cells"][0]["seconds"]
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"ttft_cells\.0\.seconds"):
        Profile.load(path)


def test_predictions_and_their_errors() -> None:
    found = profile()
    assert found.ttft(8192, 0.5).tag is Tag.MEASURED
    assert found.ttft(4000, 0.3).value == pytest.approx(ttft(4000, 0.3), rel=0.05)
    assert found.tpot(3, 1000).value == pytest.approx(tpot(3, 1000), rel=0.03)
    errors = {what: (middle, bias) for what, middle, _, bias, _ in errors_of(found.outcomes())}
    # It is typically 1.1 times what is predicted.
    assert errors["ttft"][1] == pytest.approx(1 / 1.1 - 1, abs=0.03)
    assert errors["tpot"][0] < 0.02
    assert errors["capacity"][0] < 1e-3


def test_the_table_has_every_tag() -> None:
    tags = {point.estimate.tag for point in profile().surface["ttft"]}
    assert tags == {Tag.MEASURED, Tag.EXTRAPOLATED}  # four times the longest is over what the model takes
    longer = replace(profile(), endpoint=replace(profile().endpoint, max_model_len=None)).with_surface()
    assert {point.estimate.tag for point in longer.surface["ttft"]} == {Tag.MEASURED, Tag.EXTRAPOLATED, Tag.BOUND}


@pytest.mark.parametrize(("request_tokens", "most"), [(0, 1e9), (150, 1e9), (0, 120), (200, 90)])
def test_the_limits_of_a_cache_come_back(request_tokens: float, most: float) -> None:
    capacity, request, limit = fit_capacity(fills(200_000, request_tokens, most, (512, 2048, 4096)))
    assert capacity is not None and request is not None
    assert capacity.value == pytest.approx(200_000, rel=0.01)
    assert request.value == pytest.approx(request_tokens, abs=20)
    assert (limit is not None) == (most < 200_000 / (512 + request_tokens))
    assert limit is None or limit.value == pytest.approx(most)


def test_a_cache_that_never_filled_is_a_bound() -> None:
    capacity, request, limit = fit_capacity([Fill(100, 100, 5000, 5000.0, False)])
    assert capacity is not None and (capacity.value, capacity.tag, capacity.high) == (5000, Tag.BOUND, None)
    assert request is limit is None
    assert fit_capacity([])[0] is None


def test_joint_objectives_and_checks() -> None:
    load = profile().loads[0]
    assert (load.attainment, load.goodput) == (0.5, 0.5)
    needle, continuation = profile().checks
    assert needle.found and not needle.equal and not needle.passed
    assert continuation.passed


def test_show_and_diff(tmp_path: Path) -> None:
    profile().write(tmp_path / "a.json")
    profile(scale=0.5).write(tmp_path / "b.json")
    shown = run("profile", "show", str(tmp_path / "a.json"))
    for words in ("profile of m at http://x", "a note", "65,536", "load/open/1\ttime", "1 of 1", "0 of 1"):
        assert words in shown
    compared = run("profile", "diff", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert compared.count("0.50\tfaster") == len(CONTEXTS) * (len(SHARES) + 3)
    assert "no profile" in run("profile", "show", str(Path(__file__)), ok=False)


def test_wrong_flags_are_named() -> None:
    for flags, words in (
        (("--contexts", "2k,1k"), "rising"),
        (("--contexts", "x"), "--contexts 'x'"),
        (("--budget", "soon"), "--budget 'soon'"),
        (("--stages", "cash"), "'cash' is none of"),
    ):
        message = run("profile", "http://127.0.0.1:9", *flags, ok=False)
        assert message.count("\n") == 1
        assert words in message
    assert "does not answer" in run("profile", "http://127.0.0.1:9", ok=False)
