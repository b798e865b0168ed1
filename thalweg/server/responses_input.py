"""The body of OpenAI's Responses API, and the chat body that says the same.

The conversion is that of DeepSeek's own servers (deepseek-recipe): instructions and leading system items make the
system text, developer items are texts of a user turn, and the reasoning, messages and calls between two of those are
one assistant turn. Nothing is stored: what a conversation needs comes with each request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from thalweg.errors import RequestError, nearest
from thalweg.server.origin import Origin, check_fields, optional_text_of, text_of
from thalweg.server.responses_tools import Toolbox, ToolName, custom_arguments
from thalweg.server.schemas import ApiBody, ChatBody, Count, Share, Temperature, parse_body
from thalweg.server.sealed import unseal

_NAMES: Mapping[str, str] = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "chat_template_kwargs": "reasoning.context",
}
_ITEM_FIELDS: Mapping[str, tuple[str, ...]] = {
    "message": ("type", "role", "content", "id", "status", "phase"),
    "reasoning": ("type", "id", "summary", "content", "encrypted_content", "status"),
    "function_call": ("type", "id", "call_id", "name", "namespace", "arguments", "status"),
    "custom_tool_call": ("type", "id", "call_id", "name", "namespace", "input", "status"),
    "function_call_output": ("type", "id", "call_id", "output", "status"),
    "custom_tool_call_output": ("type", "id", "call_id", "output", "status", "name"),
}
_TEXT_PARTS = ("input_text", "output_text", "text")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Reasoning(_Part):
    """`summary` asks for what is not made here: the reasoning itself is given. `context` all_turns keeps old turns'."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None = None
    summary: Literal["auto", "concise", "detailed", "none"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "all_turns"] | None = None


class TextFormat(_Part):
    type: Literal["text", "json_object", "json_schema"]
    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: StrictBool | None = None


class TextBody(_Part):
    """Only the middle verbosity: the model knows no other."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesStreamOptions(_Part):
    """Nothing is obfuscated, whatever it says; and the last event always has the usage."""

    include_obfuscation: StrictBool | None = None
    include_usage: StrictBool | None = None


Included = Literal[
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponsesBody(ApiBody):
    """POST /v1/responses. `metadata` and `parallel_tool_calls` are only given back."""

    api: ClassVar[str] = "responses"
    model: StrictStr | None = None
    input: StrictStr | list[Any]
    instructions: StrictStr | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    reasoning: Reasoning | None = None
    text: TextBody | None = None
    include: list[Included] | None = None
    stream: StrictBool | None = None
    stream_options: ResponsesStreamOptions | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: StrictStr | None = None
    cache_salt: StrictStr | None = None
    return_cache_report: StrictBool | None = None


def to_chat(body: ResponsesBody) -> tuple[ChatBody, Toolbox, Origin]:
    """The chat body that says the same, its tools, and what its parts are called here. Raises RequestError."""
    if body.previous_response_id is not None:
        message = "previous_response_id is not supported: nothing is stored here; send the whole input with store false"
        raise RequestError(message, param="previous_response_id")
    origin = Origin(_NAMES)
    toolbox = Toolbox.read(body.tools or [], origin)
    reasoning = body.reasoning or Reasoning()
    form = body.text.format if body.text is not None else None
    fields = {
        "messages": _Items(body, origin).messages,
        "tools": toolbox.functions or None,
        "tool_choice": _tool_choice(body.tool_choice, toolbox),
        "max_tokens": body.max_output_tokens,
        "reasoning_effort": reasoning.effort,
        "chat_template_kwargs": {"drop_thinking": False} if reasoning.context == "all_turns" else None,
        "response_format": None if form is None else _format(form),
    }
    same = ("model", "parallel_tool_calls", "stream", "temperature", "top_p", "cache_salt", "return_cache_report")
    fields |= {name: getattr(body, name) for name in same}
    with origin.in_errors():
        chat = parse_body(ChatBody, {name: value for name, value in fields.items() if value is not None})
    return chat, toolbox, origin


class _Items:
    """Builds chat messages from instructions and input items."""

    def __init__(self, body: ResponsesBody, origin: Origin) -> None:
        self.messages: list[dict[str, Any]] = []
        self._places = origin.messages
        self._turn: dict[str, Any] | None = None  # the assistant turn that is not over yet
        if body.instructions:
            self._system("instructions", body.instructions)
        if isinstance(body.input, str):
            self._add("input", {"role": "user", "content": body.input})
        else:
            for index, item in enumerate(body.input):
                self._item(item, f"input[{index}]")
        if not self.messages:
            raise RequestError("input must hold at least one item", param="input")

    def _add(self, place: str, message: dict[str, Any]) -> None:
        self._turn = message if message["role"] == "assistant" else None
        self.messages.append(message)
        self._places.append(place)

    def _system(self, place: str, text: str) -> None:
        """Leading system texts are one message: tools stand behind the first one."""
        if len(self.messages) == 1 and self.messages[0]["role"] == "system":
            self.messages[0]["content"] += "\n\n" + text
        else:
            self._add(place, {"role": "system", "content": text})

    def _item(self, value: object, path: str) -> None:
        kind = value.get("type", "message") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in _ITEM_FIELDS:
            hint = nearest(kind, _ITEM_FIELDS) if isinstance(kind, str) else ""
            message = f"{path}.type {kind!r:.80} is not supported; it may be {', '.join(_ITEM_FIELDS)}.{hint}"
            raise RequestError(message, param=f"{path}.type")
        item = check_fields(value, _ITEM_FIELDS[kind], path)
        if kind == "message":
            self._message(item, path)
        elif kind == "reasoning":
            self._reasoning(item, path)
        elif kind.endswith("_output"):
            content = _text(item.get("output"), f"{path}.output")
            answered = text_of(item.get("call_id"), f"{path}.call_id")
            self._add(path, {"role": "tool", "tool_call_id": answered, "content": content})
        else:
            self._call(item, path)

    def _message(self, item: Mapping[str, Any], path: str) -> None:
        role, text = item.get("role"), _text(item.get("content"), f"{path}.content")
        if role == "system":
            self._system(path, text)
        elif role == "assistant":
            turn = self._assistant(path)
            turn["content"] = text if turn["content"] is None else f"{turn['content']}\n\n{text}"
        elif role in ("user", "developer"):
            self._add(path, {"role": "user", "content": text})
        else:
            message = f"{path}.role must be 'user', 'assistant', 'system' or 'developer'; got {role!r:.80}"
            raise RequestError(message, param=f"{path}.role")

    def _reasoning(self, item: Mapping[str, Any], path: str) -> None:
        """The reasoning in full, or from our own encrypted content; another server's cannot be read."""
        content = "" if item.get("content") is None else item["content"]
        text = _text(content, f"{path}.content", ("reasoning_text", "text"))
        sealed = item.get("encrypted_content")
        text = text or (isinstance(sealed, str) and unseal(sealed)) or ""
        if self._turn is not None and (self._turn["content"] is not None or "tool_calls" in self._turn):
            self._turn = None
        if text:
            turn = self._assistant(path)
            before = turn.get("reasoning_content")
            turn["reasoning_content"] = f"{before}\n{text}" if before else text

    def _call(self, item: Mapping[str, Any], path: str) -> None:
        namespace = optional_text_of(item.get("namespace"), f"{path}.namespace")
        custom = item.get("type") == "custom_tool_call"
        name = ToolName(text_of(item.get("name"), f"{path}.name"), namespace)
        given = text_of(item.get("input" if custom else "arguments"), f"{path}.{'input' if custom else 'arguments'}")
        function = {"name": name.function, "arguments": custom_arguments(given) if custom else given}
        call = {"id": text_of(item.get("call_id"), f"{path}.call_id"), "type": "function", "function": function}
        self._assistant(path).setdefault("tool_calls", []).append(call)

    def _assistant(self, path: str) -> dict[str, Any]:
        """The open assistant turn, or a new one."""
        if self._turn is None:
            self._add(path, {"role": "assistant", "content": None})
        assert self._turn is not None, "a turn was begun"
        return self._turn


def _text(value: object, path: str, kinds: tuple[str, ...] = _TEXT_PARTS) -> str:
    """A string, or parts of text; several are joined by a blank line."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RequestError(f"{path} must be a string or a list of parts", param=path)
    texts = []
    for index, part in enumerate(value):
        place = f"{path}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            names = " or ".join(map(repr, kinds))
            raise RequestError(f"{place}.type must be {names}; got {kind!r:.80}", param=f"{place}.type")
        fields = check_fields(part, ("type", "text", "annotations", "logprobs", "prompt_cache_breakpoint"), place)
        texts.append(text_of(fields.get("text"), f"{place}.text"))
    return "\n\n".join(texts)


def _tool_choice(choice: Any, toolbox: Toolbox) -> Any:
    """The chat form. Forced choices are for chat to take or refuse."""
    if not isinstance(choice, dict):
        return choice
    fields = check_fields(choice, ("type", "name", "namespace"), "tool_choice")
    if fields.get("type") not in ("function", "custom"):
        kind = fields.get("type")
        raise RequestError(f"tool_choice.type {kind!r:.80} is not supported", param="tool_choice.type")
    namespace = optional_text_of(fields.get("namespace"), "tool_choice.namespace")
    name = ToolName(text_of(fields.get("name"), "tool_choice.name"), namespace)
    if name.function not in toolbox.names:
        hint = nearest(name.function, toolbox.names)
        raise RequestError(f"tool_choice.name: no tool {name.name!r}.{hint}", param="tool_choice.name")
    return {"type": "function", "function": {"name": name.function}}


def _format(form: TextFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type}
    holder = {"name": form.name or "output", "schema": form.schema_, "strict": form.strict}
    return {"type": "json_schema", "json_schema": {k: v for k, v in holder.items() if v is not None}}
