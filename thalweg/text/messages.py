"""Chat messages as clients send them -> checked values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thalweg.errors import RequestError, nearest

ROLES = ("system", "user", "assistant", "tool", "latest_reminder", "developer")
_KNOWN = (
    "role", "content", "name", "tools", "tool_calls", "tool_call_id", "reasoning_content", "prefix", "task", "wo_eos",
    "response_format", "refusal", "audio", "function_call", "annotations",
)  # fmt: skip
_TASKS = ("action", "query", "authority", "domain", "title", "read_url")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool by the assistant. `arguments` is JSON text as the client sent it."""

    id: str
    name: str
    arguments: str

    def parameters(self) -> list[tuple[str, Any]]:
        """Argument names and values; text that is no JSON object becomes one parameter named `arguments`."""
        try:
            values = json.loads(self.arguments or "{}")
        except ValueError:
            values = self.arguments
        return list(values.items()) if isinstance(values, dict) else [("arguments", self.arguments)]


@dataclass(frozen=True, slots=True)
class Message:
    """One checked message. Fields that a role does not use are empty."""

    role: str
    content: str = ""
    reasoning: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    response_schema: Mapping[str, Any] | None = None
    task: str = ""
    open_ended: bool = False

    def having(self, **changes: Any) -> Message:
        return replace(self, **changes)


def parse_messages(messages: Sequence[Any]) -> list[Message]:
    """Check every message. Raises RequestError with the path of the first wrong field."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("messages must be a list of at least one message", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, path: str) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(f"{path} must be an object", param=path)
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{path}.role is {role!r}; allowed are {', '.join(ROLES)}", param=f"{path}.role")
    for name in message:
        if name not in _KNOWN:
            raise RequestError(f"{path}.{name} is not a known field.{nearest(name, _KNOWN)}", param=f"{path}.{name}")
    for name in ("audio", "function_call"):
        if message.get(name) is not None:
            raise RequestError(f"{path}.{name} is not supported", param=f"{path}.{name}")
    task = message.get("task") or ""
    if task and task not in _TASKS:
        raise RequestError(f"{path}.task is {task!r}; allowed are {', '.join(_TASKS)}", param=f"{path}.task")
    optional = role == "assistant"
    return Message(
        role=role,
        content=_content(message.get("content"), f"{path}.content", optional=optional),
        reasoning=_content(message.get("reasoning_content"), f"{path}.reasoning_content", optional=True),
        tools=parse_tools(message.get("tools") or (), f"{path}.tools"),
        tool_calls=_tool_calls(message.get("tool_calls") or (), f"{path}.tool_calls"),
        tool_call_id=_text(message.get("tool_call_id") or "", f"{path}.tool_call_id"),
        response_schema=_schema(message.get("response_format"), f"{path}.response_format"),
        task=task,
        open_ended=bool(message.get("prefix") or message.get("wo_eos")),
    )


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{path} must be a string, not {type(value).__name__}", param=path)
    return value


def _content(value: Any, path: str, *, optional: bool) -> str:
    """A string, or parts of type text, which are separated by a blank line."""
    if value is None and optional:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence):
        raise RequestError(f"{path} must be a string or a list of text parts", param=path)
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise RequestError(f"{path}[{i}].type is {kind!r}; only 'text' is supported", param=f"{path}[{i}].type")
        texts.append(_text(part.get("text"), f"{path}[{i}].text"))
    return "\n\n".join(texts)


def parse_tools(tools: Any, path: str) -> tuple[Mapping[str, Any], ...]:
    """OpenAI-form tools -> the function objects whose JSON the prompt lists."""
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise RequestError(f"{path} must be a list", param=path)
    functions = []
    for i, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if kind != "function":
            raise RequestError(f"{path}[{i}].type is {kind!r}; only 'function' is supported", param=f"{path}[{i}].type")
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(f"{path}[{i}].function.name must be a string", param=f"{path}[{i}].function.name")
        functions.append({k: v for k, v in function.items() if k != "strict"})
    return tuple(functions)


def _tool_calls(calls: Any, path: str) -> tuple[ToolCall, ...]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(f"{path} must be a list", param=path)
    result = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise RequestError(f"{path}[{i}].function must be an object", param=f"{path}[{i}].function")
        name = _text(function.get("name"), f"{path}[{i}].function.name")
        arguments = _text(function.get("arguments") or "", f"{path}[{i}].function.arguments")
        result.append(ToolCall(_text(call.get("id") or "", f"{path}[{i}].id"), name, arguments))
    return tuple(result)


def _schema(value: Any, path: str) -> Mapping[str, Any] | None:
    if value is None or isinstance(value, Mapping):
        return value
    raise RequestError(f"{path} must be an object", param=path)


def merge_tool_results(messages: list[Message]) -> list[Message]:
    """Tool results become blocks of a user turn, in the order of the calls that they answer; neighbouring user turns
    and results are one turn, their blocks joined by a blank line."""
    merged: list[Message] = []
    results: list[tuple[str, str]] = []
    order: list[str] = []
    for index, message in enumerate(messages):
        if message.role == "assistant":
            order = [call.id for call in message.tool_calls]
        if message.role == "tool":
            if message.tool_call_id and message.tool_call_id not in order:
                path = f"messages[{index}].tool_call_id"
                raise RequestError(
                    f"{path} {message.tool_call_id!r} answers no call of the last assistant message", param=path
                )
            results.append((message.tool_call_id, f"<tool_result>{message.content}</tool_result>"))
            continue
        _flush(merged, results, order)
        if message.role == "user" and merged and merged[-1].role == "user" and not merged[-1].task:
            both = f"{merged[-1].content}\n\n{message.content}"
            merged[-1] = message.having(content=both, tools=merged[-1].tools + message.tools)
        else:
            merged.append(message)
    _flush(merged, results, order)
    return merged


def _flush(merged: list[Message], results: list[tuple[str, str]], order: list[str]) -> None:
    if not results:
        return
    results.sort(key=lambda r: order.index(r[0]) if r[0] in order else len(order))
    text = "\n\n".join(block for _, block in results)
    results.clear()
    if merged and merged[-1].role == "user":
        merged[-1] = merged[-1].having(content=f"{merged[-1].content}\n\n{text}")
    else:
        merged.append(Message(role="user", content=text))
