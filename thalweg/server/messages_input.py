"""Bodies of Anthropic's Messages API, and the chat bodies that say the same.

The conversion is that of DeepSeek's own servers (deepseek-recipe): texts of one turn are joined by blank lines, system
messages inside the conversation become reminders in a user turn. What the encoding has no place for is listed in
docs/http-api.md: `is_error`, `cache_control` and redacted thinking.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from thalweg.errors import RequestError
from thalweg.server.origin import Origin, check_fields, text_of
from thalweg.server.schemas import MOST_STOPS, ApiBody, ChatBody, Count, Share, Temperature, parse_body
from thalweg.server.sealed import unseal

_NAMES: Mapping[str, str] = {
    "stop": "stop_sequences",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "chat_template_kwargs": "context_management",
    "parameters": "input_schema",
}
_TOOL_FIELDS = ("name", "description", "input_schema", "type", "cache_control", "eager_input_streaming", "strict")
_BLOCK_FIELDS: Mapping[str, tuple[str, ...]] = {
    "text": ("type", "text", "cache_control"),
    "thinking": ("type", "thinking", "signature", "cache_control"),
    "redacted_thinking": ("type", "data", "cache_control"),
    "tool_use": ("type", "id", "name", "input", "caller", "cache_control"),
    "tool_result": ("type", "tool_use_id", "content", "is_error", "cache_control"),
}
_BLOCKS_OF_ROLE: Mapping[str, tuple[str, ...]] = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}
# Claude Code's bookkeeping at the front of its system prompt: other digits in every request, so nothing behind it would
# ever be cached, and nothing that is meant for the model.
_BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MessagesThinking(_Part):
    """`display` omitted: blocks without text, whose signature carries it."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(_Part):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(_Part):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class KeptThinking(_Part):
    type: Literal["all", "thinking_turns"]
    value: Count | None = None


class ClearThinking(_Part):
    """Anthropic's edit that leaves old thinking out: all but that of the last `keep` turns, one by default."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"] | KeptThinking | None = None

    def kept_turns(self) -> int | None:
        """How many of the last turns with thinking keep it; None for all."""
        if self.keep == "all" or (isinstance(self.keep, KeptThinking) and self.keep.type == "all"):
            return None
        return (self.keep.value if isinstance(self.keep, KeptThinking) else None) or 1


class ContextManagement(_Part):
    edits: Annotated[list[ClearThinking], Field(max_length=1)] = Field(default_factory=list)


class ToolChoiceBody(_Part):
    type: Literal["auto", "any", "tool", "none"]
    name: StrictStr | None = None
    disable_parallel_tool_use: StrictBool | None = None


class CountBody(ApiBody):
    """POST /v1/messages/count_tokens: what makes the prompt."""

    api: ClassVar[str] = "messages"
    model: StrictStr | None = None
    messages: list[Any]
    system: StrictStr | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: ToolChoiceBody | None = None
    thinking: MessagesThinking | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None

    @property
    def omits_thinking(self) -> bool:
        return self.thinking is not None and self.thinking.display == "omitted"


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: Count
    stop_sequences: Annotated[list[StrictStr], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stream: StrictBool | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0, strict=True)] | None = None
    cache_salt: StrictStr | None = None
    return_cache_report: StrictBool | None = None


def to_chat(body: CountBody) -> tuple[ChatBody, Origin]:
    """The chat body that says the same, and what its parts are called here. Raises RequestError."""
    origin = Origin(_NAMES)
    fields: dict[str, Any] = {"model": body.model, "messages": _Turns(body, origin).messages}
    fields["tools"] = _tools(body.tools or [], origin) or None
    fields["tool_choice"] = _tool_choice(body.tool_choice)
    if body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    if body.thinking is not None:
        off = body.thinking.type == "disabled"
        budget = {} if body.thinking.budget_tokens is None else {"budget_tokens": body.thinking.budget_tokens}
        fields["thinking"] = {"type": "disabled" if off else "enabled", **budget}
    if body.output_config is not None:
        form = body.output_config.format
        fields["reasoning_effort"] = body.output_config.effort
        fields["response_format"] = form and {
            "type": "json_schema",
            "json_schema": {"name": "output", "schema": form.schema_},
        }
    if body.context_management is not None and body.context_management.edits:
        fields["chat_template_kwargs"] = {"drop_thinking": False}
    if isinstance(body, MessagesBody):
        fields["stop"] = body.stop_sequences or None
        same = ("max_tokens", "stream", "temperature", "top_p", "top_k", "cache_salt", "return_cache_report")
        fields |= {name: getattr(body, name) for name in same}
    with origin.in_errors():
        return parse_body(ChatBody, {name: value for name, value in fields.items() if value is not None}), origin


class _Turns:
    """Builds chat messages from system text and message blocks."""

    def __init__(self, body: CountBody, origin: Origin) -> None:
        self.messages: list[dict[str, Any]] = []
        self._places = origin.messages
        texts = [body.system] if isinstance(body.system, str) else _texts(body.system or [], "system")
        system = "\n\n".join(filter(None, (_BILLING.sub("", text) for text in texts)))
        if system:
            self._add("system", {"role": "system", "content": system})
        if not body.messages:
            raise RequestError("messages must hold at least one message", param="messages")
        for index, message in enumerate(body.messages):
            self._message(message, f"messages[{index}]", last=index + 1 == len(body.messages))
        self._clear_thinking(body.context_management)

    def _add(self, place: str, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self._places.append(place)

    def _message(self, value: object, path: str, *, last: bool) -> None:
        message = check_fields(value, ("role", "content"), path)
        role = message.get("role")
        if not isinstance(role, str) or role not in _BLOCKS_OF_ROLE:
            raise RequestError(f"{path}.role must be 'user', 'assistant' or 'system'", param=f"{path}.role")
        blocks = _blocks(message.get("content"), role, f"{path}.content")
        if role == "assistant":
            self._assistant(blocks, path, last=last)
            return
        for place, block in blocks:
            if block["type"] == "tool_result":
                self._add(place, _result(block, place))
            else:
                text = text_of(block.get("text"), f"{place}.text")
                text = f"<system-reminder>\n{text}\n</system-reminder>" if role == "system" else text
                self._add(place, {"role": "user", "content": text})

    def _assistant(self, blocks: list[tuple[str, dict[str, Any]]], path: str, *, last: bool) -> None:
        """One assistant turn; at the end of the conversation it is the beginning of the answer."""
        texts, reasoning, calls = [], [], []
        for place, block in blocks:
            if block["type"] == "text":
                texts.append(text_of(block.get("text"), f"{place}.text"))
            elif block["type"] == "thinking":
                reasoning.append(_thinking(block, place))
            elif block["type"] == "tool_use":
                calls.append(_call(block, place))
        if last and calls:
            raise RequestError(f"{path}.content has tool_use blocks without results after it", param=f"{path}.content")
        message: dict[str, Any] = {"role": "assistant", "content": "\n\n".join(texts)}
        if any(reasoning):
            message["reasoning_content"] = "\n\n".join(filter(None, reasoning))
        if calls:
            message["tool_calls"] = calls
        self._add(path, {**message, "prefix": True} if last else message)

    def _clear_thinking(self, management: ContextManagement | None) -> None:
        edits = management.edits if management is not None else []
        kept = edits[0].kept_turns() if edits else None
        if kept is None:
            return
        thinking = [message for message in self.messages if message.get("reasoning_content")]
        for message in thinking[:-kept]:
            del message["reasoning_content"]


def _blocks(content: object, role: str, path: str) -> list[tuple[str, dict[str, Any]]]:
    """(path, block) of each content block; a string is one text block."""
    if isinstance(content, str):
        return [(path, {"type": "text", "text": content})]
    if not isinstance(content, list):
        raise RequestError(f"{path} must be a string or a list of content blocks", param=path)
    allowed = _BLOCKS_OF_ROLE[role]
    blocks = []
    for index, block in enumerate(content):
        place = f"{path}[{index}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in allowed:
            names = " or ".join(map(repr, allowed))
            raise RequestError(f"{place}.type must be {names} in a {role} message; got {kind!r:.80}", param=place)
        blocks.append((place, check_fields(block, _BLOCK_FIELDS[kind], place)))
    return blocks


def _texts(content: object, path: str) -> list[str]:
    return [text_of(block.get("text"), f"{place}.text") for place, block in _blocks(content, "system", path)]


def _thinking(block: Mapping[str, Any], path: str) -> str:
    """The block's text, or what our own signature carries where the client was not shown it."""
    text = text_of(block.get("thinking"), f"{path}.thinking")
    signature = block.get("signature")
    return text or (isinstance(signature, str) and unseal(signature)) or ""


def _call(block: Mapping[str, Any], path: str) -> dict[str, Any]:
    if not isinstance(block.get("input"), dict):
        raise RequestError(f"{path}.input must be an object", param=f"{path}.input")
    arguments = json.dumps(block["input"], ensure_ascii=False)
    name = text_of(block.get("name"), f"{path}.name")
    identity = text_of(block.get("id"), f"{path}.id")
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(block: Mapping[str, Any], path: str) -> dict[str, Any]:
    content = block.get("content")
    texts = [content] if isinstance(content, str) else _texts([] if content is None else content, f"{path}.content")
    answered = text_of(block.get("tool_use_id"), f"{path}.tool_use_id")
    return {"role": "tool", "tool_call_id": answered, "content": "\n\n".join(texts)}


def _tools(tools: list[Any], origin: Origin) -> list[dict[str, Any]]:
    read = []
    for index, value in enumerate(tools):
        path = f"tools[{index}]"
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in (None, "custom"):
            message = f"{path}.type {kind!r:.80} is a tool of Anthropic's servers; only tools of the client's run here"
            raise RequestError(message, param=f"{path}.type")
        tool = check_fields(value, _TOOL_FIELDS, path)
        if not isinstance(tool.get("input_schema"), dict):
            raise RequestError(f"{path}.input_schema must be a JSON Schema object", param=f"{path}.input_schema")
        function = {
            "name": tool.get("name"),
            "description": tool.get("description"),
            "parameters": tool["input_schema"],
            "strict": True if tool.get("strict") else None,
        }
        origin.tools.append(path)
        read.append({"type": "function", "function": {k: v for k, v in function.items() if v is not None}})
    return read


def _tool_choice(choice: ToolChoiceBody | None) -> Any:
    """The chat form. `any` and `tool` are for chat to take or refuse."""
    if choice is None or choice.type in ("auto", "none"):
        return choice and choice.type
    if choice.type == "any":
        return "required"
    return {"type": "function", "function": {"name": choice.name}}
