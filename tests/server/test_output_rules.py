"""Rules made of requests: which grammar where, limits of time, and many of them at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from thalweg.config.model_parse import default_model
from thalweg.errors import RequestError
from thalweg.server.output_rules import OutputRuleMaker, OutputWishes, offered_tools
from thalweg.text.chat import OutputStart
from thalweg.text.tokenizer import Tokenizer

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
JSON = {"type": "json_object"}
CONTENT, REASONING, INSIDE = OutputStart.CONTENT, OutputStart.REASONING, OutputStart.TOOL_CALLS


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(default_model())


@pytest.fixture(scope="module")
def maker(tokenizer: Tokenizer) -> OutputRuleMaker:
    return OutputRuleMaker(tokenizer, (tokenizer.eos_id,))


def wishes(*tools: Any, **fields: Any) -> OutputWishes:
    return OutputWishes(tools=offered_tools(list(tools), []), **fields)


@pytest.mark.parametrize(
    ("wanted", "starts_in", "grammar", "calls"),
    [
        (wishes(), CONTENT, False, False),
        (wishes(TOOL), CONTENT, False, True),
        (wishes(TOOL), REASONING, False, True),
        (wishes(TOOL, tool_choice="none"), CONTENT, False, False),
        (wishes(TOOL, tool_choice="required"), INSIDE, True, False),
        (wishes(TOOL, tool_choice="required"), REASONING, True, False),
        (wishes(TOOL, response_format=JSON), CONTENT, True, False),
        (wishes(TOOL, response_format=JSON, tool_choice="none"), CONTENT, True, False),
        (wishes(response_format=JSON), REASONING, True, False),
    ],
)
def test_which_grammar_holds(
    wanted: OutputWishes, starts_in: OutputStart, grammar: bool, calls: bool, maker: OutputRuleMaker
) -> None:
    rules = asyncio.run(maker.make(wanted, starts_in))
    assert (rules is not None) is (grammar or calls)
    assert rules is None or ((rules.grammar is not None), (rules.calls is not None)) == (grammar, calls)
    assert rules is None or rules.starts_in is starts_in


def test_a_budget_alone_makes_rules_only_where_there_is_thinking(maker: OutputRuleMaker) -> None:
    budget = wishes(thinking_budget=5)
    rules = asyncio.run(maker.make(budget, REASONING))
    assert rules is not None and rules.thinking_budget == 5 and rules.grammar is None and rules.calls is None
    assert asyncio.run(maker.make(budget, CONTENT)) is None


def test_tools_of_messages_count() -> None:
    messages = [{"role": "system", "content": "", "tools": [TOOL]}, {"role": "user", "content": "x"}, "no message"]
    assert [tool.path for tool in offered_tools([TOOL], messages)] == ["tools[0]", "messages[0].tools[0]"]
    assert offered_tools(None, None) == offered_tools("x", {}) == []


def test_the_same_schemas_are_compiled_once(maker: OutputRuleMaker) -> None:
    async def run() -> list[Any]:
        return [await maker.make(wishes(TOOL), CONTENT) for _ in range(2)]

    first, second = asyncio.run(run())
    assert first.calls is second.calls


def test_schemas_that_take_too_long_are_refused_and_others_go_on(tokenizer: Tokenizer) -> None:
    impatient = OutputRuleMaker(tokenizer, (tokenizer.eos_id,), compile_seconds=0.001)
    large = {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(1500)}}
    format_ = {"type": "json_schema", "json_schema": {"schema": large}}

    async def run() -> None:
        with pytest.raises(RequestError, match="take over") as caught:
            await impatient.make(wishes(response_format=format_), CONTENT)
        assert caught.value.param == "response_format"
        assert await impatient.make(wishes(), CONTENT) is None

    asyncio.run(run())


def test_schemas_of_any_size_end_in_an_answer(maker: OutputRuleMaker) -> None:
    """Too much for a grammar: strict and formats are refused by path, a tool that is not strict takes anything."""
    wide = {"enum": [f"{i} {'x' * 100}" for i in range(6000)]}
    holder = {"type": "object", "properties": {"a": wide}}

    def tool(strict: bool) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "f", "strict": strict, "parameters": holder}}

    assert asyncio.run(maker.make(wishes(tool(False)), CONTENT)) is not None
    for wanted, path in (
        (wishes(tool(True)), "tools[0].function.parameters"),
        (wishes(response_format={"type": "json_schema", "json_schema": {"schema": wide}}), "response_format"),
    ):
        with pytest.raises(RequestError) as caught:
            asyncio.run(maker.make(wanted, CONTENT))
        assert (caught.value.param or "").startswith(path)
