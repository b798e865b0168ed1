"""Chat messages as clients send them, checked and frozen. Every complaint names the field by its path."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeGuard

from thalweg.errors import RequestError, nearest
from thalweg.text.markers import TASK_MARKERS


class Role(StrEnum):
    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    LATEST_REMINDER = "latest_reminder"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call in an assistant message. `arguments` is the JSON text that the client sent, unparsed."""

    id: str | None
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message. Fields that its role does not have keep their defaults."""

    role: Role
    content: str = ""
    reasoning: str | None = None  # None where the client sent none
    tool_calls: tuple[ToolCall, ...] = ()
    answers: int | None = None  # tool messages: which call of the last assistant message this is the result of
    tools: tuple[Mapping[str, Any], ...] = ()  # function descriptions: name, description, parameters
    response_format: Mapping[str, Any] | None = None
    task: str | None = None
    open: bool = False  # assistant: no EOS, the model continues this turn
    continues_reasoning: bool = False  # assistant with `prefix`, reasoning and no content: thinking goes on


_COMMON_FIELDS = frozenset({"role", "content", "task"})
_TOOL_BEARING_FIELDS = _COMMON_FIELDS | {"tools", "response_format"}
_FIELDS: Mapping[Role, frozenset[str]] = {
    Role.SYSTEM: _TOOL_BEARING_FIELDS,
    Role.DEVELOPER: _TOOL_BEARING_FIELDS,
    Role.USER: _COMMON_FIELDS,
    Role.ASSISTANT: _COMMON_FIELDS | {"reasoning_content", "reasoning", "tool_calls", "wo_eos", "prefix"},
    Role.TOOL: frozenset({"role", "content", "tool_call_id", "name"}),  # `name` repeats the call's; not encoded
    Role.LATEST_REMINDER: frozenset({"role", "content"}),
}


def read_messages(messages: Sequence[Mapping[str, Any]], path: str = "messages") -> tuple[Message, ...]:
    """Checks messages. Raises RequestError whose `param` is a path such as `messages[2].content[0].type`."""
    if not _is_list(messages):
        raise RequestError(f"{path} must be a list of messages", param=path)
    if not messages:
        raise RequestError(f"{path} must hold at least one message", param=path)
    read: list[Message] = []
    calls = _OpenCalls()
    for index, raw in enumerate(messages):
        place = f"{path}[{index}]"
        message = _read_message(raw, place, calls)
        if message.role is Role.ASSISTANT:
            calls = _OpenCalls(message.tool_calls)
            if raw.get("prefix") and index + 1 < len(messages):
                raise RequestError(f"{place}.prefix: only the last message can be continued", param=f"{place}.prefix")
        read.append(message)
    return tuple(read)


def read_tools(value: object, path: str) -> tuple[Mapping[str, Any], ...]:
    """Checks tools in OpenAI form, `[{"type": "function", "function": {"name", "description", "parameters"}}]`."""
    if value is None:
        return ()
    if not _is_list(value):
        raise RequestError(f"{path} must be a list of tools", param=path)
    return tuple(_read_tool(tool, f"{path}[{index}]") for index, tool in enumerate(value))


def read_response_format(value: object, path: str) -> Mapping[str, Any] | None:
    """Checks a response format: `{"type": "text"}`, `{"type": "json_object"}`, `{"type": "json_schema",
    "json_schema": {"schema": …}}`, or a JSON Schema itself. None means that nothing is asked for."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RequestError(f"{path} must be an object with a `type`", param=path)
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_schema":
        holder = value.get("json_schema")
        if not isinstance(holder, Mapping) or not isinstance(holder.get("schema"), Mapping):
            place = f"{path}.json_schema.schema"
            raise RequestError(f"{place} must be a JSON Schema object", param=place)
    to_json(value, path)
    return value


def to_json(value: object, path: str) -> str:
    """JSON as the published encoder writes it: `, ` and `: ` between items, non-ASCII kept, order kept."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} must be plain JSON: {error}", param=path) from error
    return text


class _OpenCalls:
    """The calls of the last assistant message and which of them have a result."""

    def __init__(self, calls: tuple[ToolCall, ...] = ()) -> None:
        self._calls = calls
        self._answered: set[int] = set()

    def answer(self, call_id: str | None, path: str) -> int:
        """The index of the call that a result belongs to; without an id, the first call that has none yet."""
        for index, call in enumerate(self._calls):
            if call.id == call_id if call_id is not None else index not in self._answered:
                self._answered.add(index)
                return index
        known = [call.id for call in self._calls if call.id is not None]
        if not self._calls:
            reason = "the assistant message before it has no tool_calls"
        elif call_id is None:
            reason = f"all {len(self._calls)} tool_calls before it have a result already"
        else:
            reason = f"tool_call_id must be one of {known} of the assistant message before it"
        raise RequestError(f"{path} answers no call: {reason}", param=path)


def _read_message(raw: object, path: str, calls: _OpenCalls) -> Message:
    if not isinstance(raw, Mapping):
        raise RequestError(f"{path} must be an object with `role` and `content`", param=path)
    role = _read_role(raw.get("role"), f"{path}.role")
    _check_fields(raw, role, path)
    if role is Role.ASSISTANT:
        return _read_assistant(raw, path)
    content = _read_content(raw.get("content"), f"{path}.content")
    if role is Role.TOOL:
        call_id = _read_optional_text(raw.get("tool_call_id"), f"{path}.tool_call_id")
        return Message(role, content, answers=calls.answer(call_id, f"{path}.tool_call_id"))
    return Message(
        role,
        content,
        tools=read_tools(raw.get("tools"), f"{path}.tools"),
        response_format=read_response_format(raw.get("response_format"), f"{path}.response_format"),
        task=_read_task(raw.get("task"), f"{path}.task"),
    )


def _read_assistant(raw: Mapping[str, Any], path: str) -> Message:
    field = "reasoning" if raw.get("reasoning_content") is None else "reasoning_content"
    reasoning = None if raw.get(field) is None else _read_content(raw[field], f"{path}.{field}")
    tool_calls = _read_tool_calls(raw.get("tool_calls"), f"{path}.tool_calls")
    open_turn = _read_flag(raw.get("wo_eos"), f"{path}.wo_eos")
    prefix = _read_flag(raw.get("prefix"), f"{path}.prefix")
    if raw.get("content") is None and not tool_calls and reasoning is None and not (open_turn or prefix):
        message = f"{path}.content is missing: an assistant message has content, reasoning_content or tool_calls"
        raise RequestError(message, param=f"{path}.content")
    content = "" if raw.get("content") is None else _read_content(raw["content"], f"{path}.content")
    return Message(
        Role.ASSISTANT,
        content,
        reasoning=reasoning,
        tool_calls=tool_calls,
        task=_read_task(raw.get("task"), f"{path}.task"),
        open=open_turn or prefix,
        continues_reasoning=prefix and bool(reasoning) and not content and not tool_calls,
    )


def _read_role(value: object, path: str) -> Role:
    if isinstance(value, str) and value in set(Role):
        return Role(value)
    allowed = ", ".join(Role)
    hint = nearest(value, [role.value for role in Role]) if isinstance(value, str) else ""
    raise RequestError(f"{path} must be one of {allowed}; got {value!r:.80}.{hint}", param=path)


def _check_fields(raw: Mapping[str, Any], role: Role, path: str) -> None:
    """Unknown fields are refused unless they are empty: clients send whole response messages back, nulls included."""
    allowed = _FIELDS[role]
    for field, value in raw.items():
        if field not in allowed and value not in (None, [], {}):
            names = ", ".join(sorted(allowed))
            hint = nearest(str(field), allowed)
            message = f"{path}.{field} is not supported in a {role} message; it may have {names}.{hint}"
            raise RequestError(message, param=f"{path}.{field}")


def _read_content(value: object, path: str) -> str:
    """A string, or text parts; several parts are joined by a blank line."""
    if isinstance(value, str):
        return _read_text(value, path)
    if not _is_list(value):
        raise RequestError(f'{path} must be a string or a list of {{"type": "text", "text": …}} parts', param=path)
    return "\n\n".join(_read_part(part, f"{path}[{index}]") for index, part in enumerate(value))


def _read_part(part: object, path: str) -> str:
    if not isinstance(part, Mapping):
        raise RequestError(f'{path} must be an object {{"type": "text", "text": …}}', param=path)
    if part.get("type") != "text":
        message = f"{path}.type must be 'text', the only kind of part this model reads; got {part.get('type')!r:.80}"
        raise RequestError(message, param=f"{path}.type")
    return _read_text(part.get("text"), f"{path}.text")


def _read_text(value: object, path: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{path} must be a string", param=path)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{path} has half of a surrogate pair at character {error.start}", param=path) from error
    return value


def _read_optional_text(value: object, path: str) -> str | None:
    return None if value is None else _read_text(value, path)


def _read_flag(value: object, path: str) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    raise RequestError(f"{path} must be true or false", param=path)


def _read_task(value: object, path: str) -> str | None:
    names = [name for name, _ in TASK_MARKERS]
    if value is None:
        return None
    if isinstance(value, str) and value in names:
        return value
    raise RequestError(f"{path} must be one of {', '.join(names)}; got {value!r:.80}", param=path)


def _read_tool_calls(value: object, path: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if not _is_list(value):
        raise RequestError(f"{path} must be a list of calls", param=path)
    return tuple(_read_tool_call(call, f"{path}[{index}]") for index, call in enumerate(value))


def _read_tool_call(value: object, path: str) -> ToolCall:
    call = _object_with_function(value, path)
    function = call["function"]
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        place = f"{path}.function.arguments"
        raise RequestError(f"{place} must be a string that holds a JSON object", param=place)
    return ToolCall(
        id=_read_optional_text(call.get("id"), f"{path}.id"),
        name=_read_name(function, path),
        arguments=_read_text(arguments, f"{path}.function.arguments"),
    )


def _read_tool(value: object, path: str) -> Mapping[str, Any]:
    function: Mapping[str, Any] = _object_with_function(value, path)["function"]
    _read_name(function, path)
    _read_optional_text(function.get("description"), f"{path}.function.description")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        place = f"{path}.function.parameters"
        raise RequestError(f"{place} must be a JSON Schema object", param=place)
    to_json(parameters, f"{path}.function.parameters")
    to_json(function, f"{path}.function")
    return function


def _object_with_function(value: object, path: str) -> Mapping[str, Any]:
    """A tool or a call: an object whose `function` is an object; `type` may be left out."""
    if not isinstance(value, Mapping):
        raise RequestError(f"{path} must be an object with a `function`", param=path)
    if value.get("type", "function") != "function":
        message = f"{path}.type must be 'function'; got {value['type']!r:.80}"
        raise RequestError(message, param=f"{path}.type")
    if not isinstance(value.get("function"), Mapping):
        raise RequestError(f"{path}.function must be an object with a `name`", param=f"{path}.function")
    return value


def _read_name(function: Mapping[str, Any], path: str) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not name:
        place = f"{path}.function.name"
        raise RequestError(f"{place} must be a string of at least one character", param=place)
    return _read_text(name, f"{path}.function.name")


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
