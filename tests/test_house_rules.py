"""The rules that keep the code readable: sizes, nesting, names, and words that have no place here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("thalweg", "training", "benchmarks", "docs", "examples")
FILES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))
MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_ARGUMENTS, MOST_NESTING = 500, 60, 8, 3
# Command verbs take one argument per flag: the framework reads their signatures.
MANY_ARGUMENTS = {"serve", "generate", "new_model", "needle", "profile", "simulate"}
BAD_NAMES = re.compile(r"manager|utils|helper|(^|_)base(_|\.|$)", re.IGNORECASE)
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module", params=FILES, ids=name_of)
def source(request: pytest.FixtureRequest) -> Path:
    return request.param


def compiled_by_triton(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A Triton kernel: its arguments are pointers, strides and sizes, and it cannot call out for what it repeats."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Depth of blocks in a function; `elif` continues its `if`, an inner function starts anew."""
    deepest = depth
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, FUNCTIONS):
                continue
            continues = name == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If)
            deepest = max(deepest, nesting(child, depth + (isinstance(child, BLOCKS) and not continues)))
    return deepest


def test_sizes(source: Path) -> None:
    text = source.read_text()
    assert len(text.splitlines()) <= MOST_FILE_LINES
    for function in functions(ast.parse(text)):
        if compiled_by_triton(function):
            continue
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert lines <= MOST_FUNCTION_LINES, f"{function.name} has {lines} lines"
        arguments = function.args
        count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
        own = bool(arguments.args) and arguments.args[0].arg in ("self", "cls")
        assert count - own <= MOST_ARGUMENTS or function.name in MANY_ARGUMENTS, f"{function.name} takes {count}"
        assert nesting(function) <= MOST_NESTING, f"{function.name} nests {nesting(function)} deep"


def test_docstrings_and_names(source: Path) -> None:
    tree = ast.parse(source.read_text())
    assert ast.get_docstring(tree) or not source.read_text().strip(), "a module without a docstring"
    assert not BAD_NAMES.search(source.name), "the file's name says nothing"
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            assert not BAD_NAMES.search(node.name), f"{node.name} says nothing"


def test_no_mutable_state_in_modules(source: Path) -> None:
    for node in ast.parse(source.read_text()).body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        names = [t.id for t in getattr(node, "targets", [getattr(node, "target", None)]) if isinstance(t, ast.Name)]
        constant = all(name.isupper() or name.startswith("__") for name in names)
        assert not isinstance(value, MUTABLE) or constant, f"module state at line {node.lineno}"
        assert not isinstance(node, ast.Global), "a module writes globals"


def test_imports_point_down() -> None:
    result = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_nothing_is_left_for_later_and_no_machine_is_named(source: Path) -> None:
    found = re.search(r"\b(TODO|FIXME|XXX)\b|/(home|root|Users)/\w", source.read_text())
    assert not found, found
