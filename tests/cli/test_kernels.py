"""`thalweg kernels` through the real command line."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

from thalweg.cli import serve
from thalweg.cli.main import main
from thalweg.kernels import backends, registry
from thalweg.kernels.arguments import Weight
from thalweg.kernels.backends import Backend, every_backend
from thalweg.kernels.cpu.library import LibraryMissing
from thalweg.kernels.registry import deterministic_kernels
from thalweg.kernels.spec import OPS

NAMES = [spec.name for spec in OPS]


def command(*arguments: str, code: int = 0) -> str:
    """What it prints: to stderr where it fails as a user's error."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["thalweg", "kernels", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main()
    assert (end.value.code or 0) == code, (out.getvalue(), err.getvalue())
    return err.getvalue() if code == 2 else out.getvalue()


def cells(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


def test_list_names_every_op_and_backend() -> None:
    columns, *rows = cells(command("list"))
    assert [row[0] for row in rows[: len(OPS)]] == NAMES
    assert all(row.count("chosen") == 1 and len(row) == len(columns) for row in rows[: len(OPS)])
    about = {row[0]: row[1:] for row in rows[len(OPS) + 1 :]}
    assert list(about) == columns[1:] == [backend.name for backend in every_backend()]
    assert about["reference"] == ["yes", "plain torch on any device"]
    assert all(reason for _, reason in about.values())


def test_list_for_machines() -> None:
    facts = json.loads(command("list", "--json"))
    assert [op["op"] for op in facts["ops"]] == NAMES
    assert all("reference" in op["backends"] and op["chosen"] in op["backends"] for op in facts["ops"])
    assert all(backend["usable"] is (backend["why_not"] is None) for backend in facts["backends"])


def test_without_a_library_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(level: object) -> None:
        raise LibraryMissing("the compiler was on holiday")

    monkeypatch.setattr(backends, "load_library", missing)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    text = command("list")
    assert "cpu-plain\tno\tthe compiler was on holiday" in text
    assert "the compiler was on holiday" in command("verify", "--kernels", "plain", code=2)
    found = json.loads(command("verify", "route", "--json"))["verdicts"]
    assert [verdict["backend"] for verdict in found] == ["reference", "deterministic"]


def test_explain_says_what_is_chosen_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    _, *rows = cells(command("explain", "--kernels", "reference"))
    assert [row[:3] for row in rows] == [[name, "reference", "as set"] for name in NAMES]
    text = command("explain", "attention", "--kernels", "reference", "--deterministic", "--shape", "race")
    assert "backend: deterministic (as set: bits of a row depend on that row alone)" in text
    assert "tolerance: 2e-05" in text and "sinks fp32 [H]" in text
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "there is no CUDA device, and TRITON_INTERPRET=1 is not set" in command("explain", "--device", "cuda")
    assert "the compiled kernels compute in float32" in command("explain", "linear", "--dtype", "bfloat16")


def test_explain_computes_the_costs() -> None:
    facts = json.loads(command("explain", "linear", "--json"))
    cost = next(cost for cost in facts["costs"] if cost["sizes"]["rows"] == 8)
    sizes = cost["sizes"]
    assert cost["flops"] == 2 * 8 * sizes["width"] * sizes["outputs"]
    assert facts["op"] == "linear" and facts["tolerance"] == 1e-4 and facts["model"] == "default"
    everything = json.loads(command("explain", "--json"))["ops"]
    assert [op["op"] for op in everything] == NAMES and all(op["why"] for op in everything)


@pytest.mark.parametrize("arguments", [("explain", "linaer"), ("verify", "route", "linaer"), ("bench", "linaer")])
def test_a_wrong_name_gives_the_nearest(arguments: tuple[str, ...]) -> None:
    assert command(*arguments, code=2) == "thalweg: there is no op 'linaer'. Did you mean 'linear'?\n"


def test_wrong_choices_are_told() -> None:
    assert "Did you mean 'race'?" in command("bench", "--shape", "rase", code=2)
    assert "Did you mean 'avx2'?" in command("verify", "--kernels", "avx22", code=2)
    assert "no shape of these ops" in command("bench", "route", "--only", "sideways", code=2)
    assert "No such file" in command("bench", "route", "--out", "/nowhere/at/all.jsonl", code=2)


def test_verify_checks_every_usable_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # its interpreter takes minutes
    found = json.loads(command("verify", "linear", "round_kv", "--seed", "7", "--json"))["verdicts"]
    usable = [backend for backend in every_backend() if backend.kernels is not None]
    for op in ("linear", "round_kv"):
        ours = {verdict["backend"]: verdict for verdict in found if verdict["op"] == op}
        assert {b.name for b in usable if op in b.own_ops()} <= set(ours)
        assert all(not v["failures"] and v["cases"] > 3 for v in ours.values())
        assert {name for name, v in ours.items() if v["rows_checked"]} == set(ours) - {"reference"}
    text = command("verify", "index_topk", "compress", "--kernels", "deterministic")
    assert "index_topk\tdeterministic" in text and "same bits\tok" in text and "0 kernels wrong" in text


def broken(name: str, **wrong: Callable) -> Callable[[], tuple[Backend, ...]]:
    kernels = replace(deterministic_kernels(), **wrong)
    return lambda: (*every_backend()[:1], Backend(name, kernels, exact=True, any_threads=True))


def test_verify_catches_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(x: Tensor, weight: Weight) -> Tensor:
        return deterministic_kernels().linear(x, weight) * 1.001

    def round_kv(rows: Tensor, rope_dim: int) -> Tensor:
        return torch.nextafter(deterministic_kernels().round_kv(rows, rope_dim), torch.tensor(0.0))

    def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(backends, "every_backend", broken("cpu-plain", linear=linear, round_kv=round_kv, swiglu=swiglu))
    text = command("verify", "linear", "round_kv", "swiglu", "route", code=1)
    verdicts = {tuple(row[:2]): row[-1] for row in cells(text) if len(row) == 8}
    assert verdicts.pop(("op", "backend")) == "verdict"
    assert {key for key, verdict in verdicts.items() if verdict != "ok"} == {
        (op, "cpu-plain") for op in ("linear", "round_kv", "swiglu")
    }
    assert "not the exact result" in text and "RuntimeError: no such instruction" in text


def test_verify_catches_rows_that_depend_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right within the tolerance, with bits that tell how many rows there were, or how many threads."""

    def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
        return deterministic_kernels().swiglu(gate, up, limit) + 1e-7 * len(gate)

    def compress(*given: Tensor) -> Tensor:
        return deterministic_kernels().compress(*given) + 1e-6 * torch.get_num_threads()

    monkeypatch.setattr(backends, "every_backend", broken("cpu-avx2", swiglu=swiglu, compress=compress))
    found = json.loads(command("verify", "swiglu", "compress", "--json", code=1))["verdicts"]
    failures = {v["op"]: v["failures"] for v in found if v["backend"] == "cpu-avx2"}
    assert any("other bits alone" in failure for failure in failures["swiglu"])
    assert any("other bits with 2 threads" in failure for failure in failures["compress"])


def test_bench_writes_a_line_per_backend(tmp_path: Path) -> None:
    before, file = torch.get_num_threads(), tmp_path / "kernels.jsonl"
    arguments = ("bench", "linear", "route", "--only", "decode 1", "--seconds", "0", "--threads", "1")
    text = command(*arguments, "--kernels", "reference", "--out", str(file))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert text.startswith("this machine with 1 thread") and len(cells(text)) == len(lines) + 2
    assert {line["op"] for line in lines} == {"linear", "route"}
    for line in lines:
        assert line["backend"] == "reference" and line["threads"] == 1 and line["model"] == "default"
        assert line["seconds"] > 0 and line["runs"] >= 3 and line["speedup_over_reference"] == 1
        limit = max(line["flops"] / line["ceiling_gflops"], line["bytes"] / line["ceiling_gbytes"]) / 1e9
        assert line["limit_seconds"] == pytest.approx(limit)
        assert {"machine", "cores", "torch", "thalweg", "commit"} <= set(line)
    command(*arguments, "--out", str(file))
    more = [json.loads(line) for line in file.read_text().splitlines()][len(lines) :]
    assert {line["op"] for line in more} == {"linear", "route"} and len(more) >= len(lines)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("deterministic", [False, True])
def test_start_up_says_in_one_line_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], deterministic: bool
) -> None:
    def missing(level: object) -> None:
        raise LibraryMissing("the compiler was on holiday")

    plan = SimpleNamespace(groups=(), sequences_of=lambda tokens: 1, token_capacity=9)
    for there in (True, False):
        if not there:
            monkeypatch.setattr(registry, "load_library", missing)
        kernel_set = registry.select_kernels(torch.device("cpu"), deterministic=deterministic)
        serve._print_report(SimpleNamespace(choices=(), cache_plan=plan, max_model_len=9, kernel_set=kernel_set))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no compiled kernels")]
        compiled = any(choice.backend.startswith("cpu-") for choice in kernel_set.choices)
        assert len(lines) == (not compiled)
    assert lines == ["no compiled kernels: the compiler was on holiday; torch computes, slower"]
    assert registry.select_kernels(torch.device("cuda")).missing == ""
