"""Schemas of what clients send, where the models of the bodies leave it to code: messages, blocks, items, tools.

They say what is refused by its form alone. What depends on several fields, on the model's length or on a schema that
the client sends is checked by the code and refused with a 400 as well.
"""

from __future__ import annotations

from collections.abc import Mapping

from thalweg.server.json_schemas import (
    ANYTHING,
    FLAG,
    NAME,
    NOTHING,
    OBJECT,
    TEXT,
    Schema,
    any_of,
    list_of,
    one_of_values,
    or_null,
    record,
    ref,
)
from thalweg.server.messages_input import CountBody, MessagesBody
from thalweg.server.responses_input import ResponsesBody
from thalweg.server.responses_tools import NOT_OFFERED
from thalweg.server.schemas import (
    MOST_BIAS,
    MOST_STOPS,
    ApiBody,
    ChatBody,
    CompletionBody,
    TokenizeBody,
)
from thalweg.text.markers import TASK_MARKERS

# Other fields are taken if they hold nothing: clients send whole answers back.
_EMPTY_IN_CHAT = one_of_values(None, [], {})
_EMPTY = one_of_values(None, [], {}, "")

_TEXT_PART = record({"type": one_of_values("text"), "text": TEXT}, rest=True)
_CONTENT = any_of(TEXT, list_of(_TEXT_PART))
_TASK = or_null(one_of_values(*(name for name, _ in TASK_MARKERS)))
_FUNCTION_TYPE = one_of_values("function")


def _chat_message(*roles: str, **fields: Schema) -> Schema:
    """A message of one of the roles, with content."""
    return record({"role": one_of_values(*roles), "content": _CONTENT}, fields, _EMPTY_IN_CHAT)


_ASSISTANT_FIELDS = {
    "content": or_null(_CONTENT),
    "task": _TASK,
    "reasoning_content": or_null(_CONTENT),
    "reasoning": ANYTHING,
    "tool_calls": or_null(list_of(ref("ChatToolCall"))),
    "wo_eos": or_null(FLAG),
    "prefix": or_null(FLAG),
}
_CHAT: Mapping[str, Schema] = {
    "ChatMessage": any_of(
        _chat_message("user", task=_TASK),
        _chat_message(
            "system",
            "developer",
            task=_TASK,
            tools=or_null(list_of(ref("ChatTool"))),
            response_format=or_null(OBJECT),
        ),
        record({"role": one_of_values("assistant")}, _ASSISTANT_FIELDS, _EMPTY_IN_CHAT),
        _chat_message("tool", tool_call_id=or_null(TEXT), name=ANYTHING),
        _chat_message("latest_reminder"),
    ),
    "ChatToolCall": record(
        {"function": record({"name": NAME, "arguments": TEXT}, rest=True)},
        {"id": or_null(TEXT), "type": _FUNCTION_TYPE},
        rest=True,
    ),
    "ChatTool": record(
        {"function": record({"name": NAME}, {"description": or_null(TEXT), "parameters": or_null(OBJECT)}, rest=True)},
        {"type": _FUNCTION_TYPE},
        rest=True,
    ),
    "ChatToolChoice": any_of(
        one_of_values(None, "auto", "none", "required"),
        record({"type": _FUNCTION_TYPE, "function": record({"name": TEXT}, rest=True)}, rest=True),
    ),
    "ResponseFormat": any_of(
        record({"type": one_of_values("text", "json_object")}, {"json_schema": ANYTHING}),
        record({
            "type": one_of_values("json_schema"),
            "json_schema": record(
                {"schema": OBJECT}, {"name": ANYTHING, "description": ANYTHING, "strict": or_null(FLAG)}
            ),
        }),
    ),
}  # fmt: skip

_CACHE_CONTROL = {"cache_control": ANYTHING}


def _block(kind: str, required: dict[str, Schema], **optional: Schema) -> Schema:
    return record({"type": one_of_values(kind), **required}, {**optional, **_CACHE_CONTROL}, _EMPTY)


_TEXT_BLOCK = _block("text", {"text": TEXT})
_TEXT_BLOCKS = list_of(_TEXT_BLOCK)
_RESULT_BLOCK = _block(
    "tool_result", {"tool_use_id": TEXT}, content=any_of(TEXT, _TEXT_BLOCKS, NOTHING), is_error=ANYTHING
)
_ASSISTANT_BLOCKS = any_of(
    _TEXT_BLOCK,
    _block("thinking", {"thinking": TEXT}, signature=ANYTHING),
    _block("redacted_thinking", {}, data=ANYTHING),
    _block("tool_use", {"id": TEXT, "name": TEXT, "input": OBJECT}, caller=ANYTHING),
)


def _turn(role: str, block: Schema) -> Schema:
    return record({"role": one_of_values(role), "content": any_of(TEXT, list_of(block))}, rest=_EMPTY)


_MESSAGES: Mapping[str, Schema] = {
    "MessagesTurn": any_of(
        _turn("user", any_of(_TEXT_BLOCK, _RESULT_BLOCK)),
        _turn("assistant", _ASSISTANT_BLOCKS),
        _turn("system", _TEXT_BLOCK),
    ),
    "MessagesTool": record(
        {"name": NAME, "input_schema": OBJECT},
        {
            "type": one_of_values(None, "custom"), "description": or_null(TEXT), "cache_control": ANYTHING,
            "eager_input_streaming": ANYTHING, "strict": ANYTHING,
        },
        _EMPTY,
    ),
}  # fmt: skip

_FALSE = one_of_values(False, None)
_ID_AND_STATUS = {"id": ANYTHING, "status": ANYTHING}


def _parts(*kinds: str) -> Schema:
    more = {"annotations": ANYTHING, "logprobs": ANYTHING, "prompt_cache_breakpoint": ANYTHING}
    return any_of(TEXT, list_of(record({"type": one_of_values(*kinds), "text": TEXT}, more, _EMPTY)))


_PARTS = _parts("input_text", "output_text", "text")


def _item(kind: str, required: dict[str, Schema], **optional: Schema) -> Schema:
    return record({"type": one_of_values(kind), **required}, {**_ID_AND_STATUS, **optional}, _EMPTY)


def _tool(kind: str, **optional: Schema) -> Schema:
    return record({"type": one_of_values(kind), "name": TEXT}, {"defer_loading": _FALSE, **optional}, _EMPTY)


_CALL = {"call_id": TEXT, "name": TEXT}
_PLAIN_TOOLS = (
    _tool("function", description=or_null(TEXT), parameters=or_null(OBJECT), strict=ANYTHING, output_schema=ANYTHING),
    _tool(
        "custom",
        description=or_null(TEXT),
        format=any_of(
            NOTHING,
            record({"type": one_of_values("text")}, {"syntax": ANYTHING, "definition": ANYTHING}, _EMPTY),
            record({"type": one_of_values("grammar"), "syntax": TEXT, "definition": TEXT}, rest=_EMPTY),
        ),
    ),
    record({"type": one_of_values(*NOT_OFFERED)}, rest=True),
)
_RESPONSES: Mapping[str, Schema] = {
    "ResponsesItem": any_of(
        record(
            {"role": one_of_values("user", "assistant", "system", "developer"), "content": _PARTS},
            {"type": one_of_values("message"), **_ID_AND_STATUS, "phase": ANYTHING},
            _EMPTY,
        ),
        _item(
            "reasoning", {}, content=or_null(_parts("reasoning_text", "text")), summary=ANYTHING,
            encrypted_content=ANYTHING,
        ),
        _item("function_call", {**_CALL, "arguments": TEXT}, namespace=or_null(TEXT)),
        _item("custom_tool_call", {**_CALL, "input": TEXT}, namespace=or_null(TEXT)),
        _item("function_call_output", {"call_id": TEXT, "output": _PARTS}),
        _item("custom_tool_call_output", {"call_id": TEXT, "output": _PARTS}, name=ANYTHING),
    ),
    "ResponsesTool": any_of(
        *_PLAIN_TOOLS,
        record(
            {"type": one_of_values("namespace"), "name": TEXT, "tools": list_of(any_of(*_PLAIN_TOOLS))},
            {"description": ANYTHING},
            _EMPTY,
        ),
    ),
    "ResponsesToolChoice": any_of(
        one_of_values(None, "auto", "none", "required"),
        record({"type": one_of_values("function", "custom"), "name": TEXT}, {"namespace": or_null(TEXT)}, _EMPTY),
    ),
}  # fmt: skip

# Schemas of the parts of bodies, by name.
PARTS: Mapping[str, Schema] = {**_CHAT, **_MESSAGES, **_RESPONSES}

_IDS = list_of({"type": "integer", "minimum": 0}, minItems=1)
_SAMPLING: Mapping[str, Schema] = {
    "stop": any_of(NAME, list_of(NAME, maxItems=MOST_STOPS), NOTHING),
    "logit_bias": or_null({
        "type": "object",
        "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
        "additionalProperties": {"type": "number", "minimum": -MOST_BIAS, "maximum": MOST_BIAS},
    }),
}  # fmt: skip
_CHAT_MESSAGES = list_of(ref("ChatMessage"), minItems=1)
_TEMPLATE_FLAGS = {"thinking": FLAG, "enable_thinking": FLAG, "drop_thinking": FLAG}
_MESSAGES_FIELDS: Mapping[str, Schema] = {
    "messages": list_of(ref("MessagesTurn"), minItems=1),
    "system": any_of(TEXT, _TEXT_BLOCKS, NOTHING),
    "tools": or_null(list_of(ref("MessagesTool"))),
}
# By body the fields whose schemas are these instead of the model's own.
FIELDS: Mapping[type[ApiBody], Mapping[str, Schema]] = {
    ChatBody: {
        **_SAMPLING,
        "messages": _CHAT_MESSAGES,
        "tools": or_null(list_of(ref("ChatTool"))),
        "tool_choice": ref("ChatToolChoice"),
        "response_format": or_null(ref("ResponseFormat")),
        "chat_template_kwargs": or_null(record({}, _TEMPLATE_FLAGS)),
    },
    CompletionBody: {**_SAMPLING, "prompt": any_of(TEXT, _IDS, list_of(TEXT, minItems=1), list_of(_IDS, minItems=1))},
    TokenizeBody: {"messages": or_null(_CHAT_MESSAGES)},
    CountBody: _MESSAGES_FIELDS,
    MessagesBody: {**_MESSAGES_FIELDS, "stop_sequences": or_null(list_of(NAME, maxItems=MOST_STOPS))},
    ResponsesBody: {
        "input": any_of(TEXT, list_of(ref("ResponsesItem"), minItems=1)),
        "tools": or_null(list_of(ref("ResponsesTool"))),
        "tool_choice": ref("ResponsesToolChoice"),
        "previous_response_id": NOTHING,
    },
}
