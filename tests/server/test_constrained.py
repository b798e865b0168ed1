"""Answers that keep to a format, to tools and to a thinking budget, by a model that would say other things.

The real server and the real `openai` client; the embedded model answers needle questions and knows none of this.
"""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from thalweg.config.model_parse import default_model
from thalweg.text.tokenizer import Tokenizer

MODEL = "thalweg-tiny"
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["tea", "coffee"]},
        "cups": {"type": "integer", "minimum": 1, "maximum": 9},
        "hot": {"type": "boolean"},
    },
    "required": ["kind", "cups", "hot"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA, "strict": True}}


def tool(name: str, strict: bool = False, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": schema, "strict": strict}}


TOOLS = [
    tool("order", kind={"enum": ["tea", "coffee"]}, cups={"type": "integer", "minimum": 1, "maximum": 9}),
    tool("wait", seconds={"type": ["integer", "null"], "minimum": 0, "maximum": 60}),
]
NAMED = {"type": "function", "function": {"name": "wait"}}
THINKING = {"thinking": {"type": "enabled", "budget_tokens": 7}}


def ask(client: OpenAI, text: str = "hello", **fields: Any) -> Any:
    fields = {"model": MODEL, "max_tokens": 600, "temperature": 0, **fields}
    return client.chat.completions.create(messages=[{"role": "user", "content": text}], **fields)


def streamed(client: OpenAI, **fields: Any) -> dict[str, Any]:
    """What a client makes of the chunks of a stream."""
    seen: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish": None, "usage": None}
    for chunk in ask(client, stream=True, stream_options={"include_usage": True}, **fields):
        seen["usage"] = chunk.usage or seen["usage"]
        for choice in chunk.choices:
            seen["content"] += choice.delta.content or ""
            seen["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            seen["finish"] = choice.finish_reason or seen["finish"]
            for call in choice.delta.tool_calls or []:
                if call.index == len(seen["calls"]):
                    seen["calls"].append([call.function.name, ""])
                seen["calls"][call.index][1] += call.function.arguments or ""
    return seen


def check_both(client: OpenAI, **fields: Any) -> Any:
    """Whole and streamed answers say the same, twice; the whole one."""
    whole, again, parts = ask(client, **fields), ask(client, **fields), streamed(client, **fields)
    choice = whole.choices[0]
    assert again.choices[0].message.content == choice.message.content
    calls = [[call.function.name, call.function.arguments] for call in choice.message.tool_calls or []]
    assert (
        parts["calls"]
        == calls
        == [[c.function.name, c.function.arguments] for c in again.choices[0].message.tool_calls or []]
    )
    assert parts["content"] == (choice.message.content or "")
    assert parts["reasoning"] == (getattr(choice.message, "reasoning_content", None) or "")
    assert parts["finish"] == choice.finish_reason
    assert parts["usage"].completion_tokens == whole.usage.completion_tokens
    assert "DSML" not in whole.model_dump_json()
    return whole


def check_order(value: dict[str, Any]) -> None:
    assert value.keys() == {"kind", "cups", "hot"}
    assert value["kind"] in ("tea", "coffee") and value["cups"] in range(1, 10) and isinstance(value["hot"], bool)


@pytest.mark.parametrize("more", [{}, THINKING], ids=["chat", "thinking"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 4}], ids=["greedy", "drawn"])
def test_json_schema(client: OpenAI, more: dict[str, Any], sampling: dict[str, Any]) -> None:
    answer = check_both(client, response_format=FORMAT, extra_body=more, **sampling)
    check_order(json.loads(answer.choices[0].message.content))
    assert answer.choices[0].finish_reason == "stop"
    thought = answer.usage.completion_tokens_details.reasoning_tokens
    assert thought == (7 if more else 0), "this model does not close its thinking by itself"


@pytest.mark.parametrize("more", [{}, THINKING], ids=["chat", "thinking"])
def test_json_object(client: OpenAI, more: dict[str, Any]) -> None:
    """Any object; one that does not end within max_tokens says so."""
    finished = 0
    for seed in range(6):
        fields = {"temperature": 1.3, "seed": seed, "extra_body": more, "max_tokens": 400}
        choice = ask(client, response_format={"type": "json_object"}, **fields).choices[0]
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            finished += isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.finish_reason == "length"
    assert finished


def test_a_cut_is_a_length(client: OpenAI) -> None:
    choice = ask(client, response_format=FORMAT, max_tokens=5).choices[0]
    assert choice.finish_reason == "length"
    with pytest.raises(ValueError):
        json.loads(choice.message.content)
    cut = ask(client, tools=TOOLS, tool_choice="required", max_tokens=12).choices[0]
    assert cut.finish_reason == "length" and "DSML" not in (cut.message.content or "")
    for call in cut.message.tool_calls or []:
        assert isinstance(json.loads(call.function.arguments), dict)


@pytest.mark.parametrize("more", [{}, THINKING], ids=["chat", "thinking"])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 2}], ids=["greedy", "drawn"])
def test_required_and_named_tools(client: OpenAI, choice: Any, more: dict[str, Any], sampling: dict[str, Any]) -> None:
    answer = check_both(
        client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, extra_body=more, **sampling
    ).choices[0]
    (call,) = answer.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert answer.finish_reason == "tool_calls" and not answer.message.content
    if call.function.name == "order":
        assert choice != NAMED
        assert arguments["kind"] in ("tea", "coffee") and arguments["cups"] in range(1, 10) and len(arguments) == 2
    else:
        assert call.function.name == "wait" and arguments.keys() == {"seconds"}
        assert arguments["seconds"] is None or arguments["seconds"] <= 60


def test_tools_with_free_choice_and_none(client: OpenAI) -> None:
    free = check_both(client, tools=TOOLS, max_tokens=20).choices[0]
    assert free.finish_reason in ("stop", "length", "tool_calls") and not free.message.tool_calls
    none = ask(client, tools=TOOLS, tool_choice="none", max_tokens=20).choices[0]
    assert none.message.content == ask(client, max_tokens=20).choices[0].message.content


def test_a_free_answer_that_begins_a_call_finishes_it(client: OpenAI) -> None:
    """The model is pushed to open a block of calls; from there on the grammar holds it."""
    tokenizer = Tokenizer.load(default_model())
    mark, (bracket,) = tokenizer.special_id("｜DSML｜"), tokenizer.encode_text("<")
    bias = {str(mark): 90, str(bracket): 80}
    answer = ask(client, tools=TOOLS, logit_bias=bias, max_tokens=400, parallel_tool_calls=False).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and call.function.name in ("order", "wait")
    assert isinstance(json.loads(call.function.arguments), dict)
    assert set(answer.message.content or "") <= {"<"}


def test_a_format_and_tools_together(client: OpenAI) -> None:
    answer = check_both(client, tools=TOOLS, response_format=FORMAT).choices[0]
    if answer.message.tool_calls:
        assert answer.finish_reason == "tool_calls"
    else:
        check_order(json.loads(answer.message.content))


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_thinking_budget_closes_the_thinking(client: OpenAI, budget: int) -> None:
    extra = {"thinking": {"type": "enabled"}, "thinking_budget": budget, "ignore_eos": True}
    answer = check_both(client, max_tokens=12, extra_body=extra)
    assert answer.usage.completion_tokens_details.reasoning_tokens == budget
    assert answer.usage.completion_tokens == 12 and answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content and bool(answer.choices[0].message.reasoning_content) == (budget > 0)
    unlimited = ask(client, max_tokens=12, extra_body={"thinking": {"type": "enabled"}, "ignore_eos": True})
    assert unlimited.choices[0].message.reasoning_content.startswith(answer.choices[0].message.reasoning_content)


def test_thinking_does_not_end_before_the_answer(client: OpenAI) -> None:
    """Under a grammar, the end of sentence may not come inside thinking: there would be no answer."""
    extra = {"thinking": {"type": "enabled"}}
    answer = ask(client, response_format=FORMAT, max_tokens=40, extra_body=extra)
    assert answer.usage.completion_tokens == 40 or answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_min_tokens_and_ignore_eos_bow_to_the_grammar(client: OpenAI) -> None:
    extra = {"min_tokens": 590, "ignore_eos": True}
    answer = ask(client, response_format=FORMAT, extra_body=extra)
    check_order(json.loads(answer.choices[0].message.content))
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens < 590


def test_logprobs_are_the_models_own(client: OpenAI) -> None:
    """The first token of a constrained answer has the same alternatives as that of a free one after the same prompt."""
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "max_tokens": 1}
    free = ask(client, tools=TOOLS, extra_body={"ignore_eos": True}, **fields)
    held = ask(client, tools=TOOLS, logit_bias={"300": 100}, extra_body={"ignore_eos": True}, **fields)
    first, second = (answer.choices[0].logprobs.content[0] for answer in (free, held))
    assert [t.token for t in first.top_logprobs] == [t.token for t in second.top_logprobs]
    assert [t.logprob for t in first.top_logprobs] == pytest.approx([t.logprob for t in second.top_logprobs], abs=1e-4)
    assert second.token != first.token and second.logprob < first.logprob


def test_logit_bias_in_both_endpoints(client: OpenAI) -> None:
    banned = client.completions.create(model=MODEL, prompt="a", max_tokens=6, temperature=0, logit_bias={"300": 100})
    ids = client.completions.create(model=MODEL, prompt="a", max_tokens=6, temperature=0)
    assert banned.choices[0].text != ids.choices[0].text and len(set(banned.choices[0].text.split())) <= 2


def test_several_choices_keep_to_the_rules_each(client: OpenAI) -> None:
    answer = ask(client, response_format=FORMAT, n=3, temperature=1.2, seed=8)
    values = [json.loads(choice.message.content) for choice in answer.choices]
    for value in values:
        check_order(value)
    assert len({json.dumps(value) for value in values}) > 1


def format_of(schema: Any, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **more}}}


def tools_of(schema: Any, strict: bool = True, name: str = "f") -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}]}


ROOT = "response_format.json_schema.schema"
PARAMETERS = "tools[0].function.parameters"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (format_of({"type": "strng"}), f"{ROOT}.type", "Did you mean 'string'"),
        (format_of({"properties": {"a": {"type": 1}}}), f"{ROOT}.properties.a.type", "must be one of"),
        (format_of({"not": {}}), f"{ROOT}.not", "cannot be enforced"),
        (format_of({"type": "string", "pattern": "(?=a)"}), ROOT, "look-around"),
        (format_of({"oneOf": [{"type": "string"}, {"maxLength": 1}]}, strict=True), ROOT, "strictly"),
        (format_of({}, strict=1), "response_format.json_schema.strict", "true or false"),
        (format_of({}, schem=1), "response_format.json_schema.schem", "Did you mean 'schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
        ({"response_format": "json"}, "response_format", "object"),
        (tools_of({"type": "strng"}, strict=False), f"{PARAMETERS}.type", "must be one of"),
        (tools_of({"properties": {"a": {"uniqueItems": True}}}), f"{PARAMETERS}.properties.a.uniqueItems", "strict"),
        (
            tools_of({"properties": {"a": {"items": {"pattern": "(?=a)", "type": "string"}}}})
            | {"tool_choice": "required"},
            PARAMETERS,
            "look-around",
        ),
        (tools_of({}, name='a"b'), "tools[0].function.name", "quotation mark"),
        (
            tools_of({}) | {"tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
            "none of",
        ),
        (tools_of({}) | {"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.type", "function"),
        (tools_of({}) | {"tool_choice": 3}, "tool_choice", "string or an object"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice.function.name", "none of"),
    ],
)
def test_what_cannot_be_held_to_is_refused_by_path(http: httpx.Client, fields: dict, param: str, words: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **fields}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"], error


def test_what_is_not_strict_is_held_to_as_far_as_it_goes(client: OpenAI) -> None:
    lenient = format_of(
        {
            "type": "object",
            "properties": {"a": {"not": {}, "type": "null"}},
            "required": ["a"],
            "additionalProperties": False,
        },
        strict=False,
    )
    assert json.loads(ask(client, **lenient).choices[0].message.content) == {"a": None}
    odd = tools_of({"properties": {"a": {"items": {"pattern": "(?=a)", "type": "string"}}}}, strict=False)
    answer = ask(client, tool_choice="required", max_tokens=200, parallel_tool_calls=False, **odd).choices[0]
    assert answer.message.tool_calls[0].function.name == "f"
    assert isinstance(json.loads(answer.message.tool_calls[0].function.arguments), dict)


def test_a_continued_answer_and_a_format_do_not_go_together(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "{", "prefix": True}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=messages, response_format={"type": "json_object"})
    assert caught.value.param == "response_format"


def test_masks_cost_little(client: OpenAI) -> None:
    """Time per token with a mask and without; generous, for a busy machine."""
    long = {"type": "array", "items": {"type": "string", "minLength": 20}, "minItems": 40}

    def seconds_per_token(**fields: Any) -> float:
        begin = time.perf_counter()
        usage = ask(client, max_tokens=150, extra_body={"ignore_eos": True}, **fields).usage
        return (time.perf_counter() - begin) / usage.completion_tokens

    seconds_per_token(**format_of(long))
    free = min(seconds_per_token() for _ in range(3))
    held = min(seconds_per_token(**format_of(long)) for _ in range(3))
    print(f"per token: {1000 * free:.2f} ms free, {1000 * held:.2f} ms with a mask")
    assert held < 2 * free + 0.02
