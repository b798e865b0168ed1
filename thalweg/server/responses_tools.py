"""Tools of the Responses API as functions, the only kind that the model knows, and their calls in each kind's form.

A custom tool is a function with one text, `input`. A tool of a namespace is named `namespace__tool`, as on DeepSeek's
own servers (deepseek-recipe).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from thalweg.errors import RequestError, nearest
from thalweg.server.origin import Origin, check_fields, optional_text_of, text_of

# Tools that OpenAI's servers run. Codex declares them to every server; the model is not told of them.
NOT_OFFERED = ("web_search", "web_search_2025_08_26", "web_search_preview", "image_generation", "tool_search")
_KINDS = ("function", "custom", "namespace", *NOT_OFFERED)
_FUNCTION_FIELDS = ("type", "name", "description", "parameters", "strict", "output_schema", "defer_loading")
_CUSTOM_FIELDS = ("type", "name", "description", "format", "defer_loading")
_INPUT = "input"


@dataclass(frozen=True, slots=True)
class ToolName:
    """What a client calls a tool."""

    name: str
    namespace: str | None = None
    custom: bool = False

    @property
    def function(self) -> str:
        """What the model calls it."""
        if self.namespace is None:
            return self.name
        return f"{self.namespace.removesuffix('__')}__{self.name}"


@dataclass(slots=True)
class Toolbox:
    """The tools of one request: chat functions, and the client's name of each."""

    functions: list[dict[str, Any]] = field(default_factory=list)
    names: dict[str, ToolName] = field(default_factory=dict)

    @classmethod
    def read(cls, tools: list[Any], origin: Origin) -> Toolbox:
        """Raises RequestError naming a tool that is wrong, unknown, or there twice."""
        box = cls()
        for index, tool in enumerate(tools):
            box._add(tool, f"tools[{index}]", None, origin)
        return box

    def name_of(self, function: str) -> ToolName:
        """The tool that the model called; one that was not offered keeps the model's name."""
        return self.names.get(function, ToolName(function))

    def _add(self, value: object, path: str, namespace: str | None, origin: Origin) -> None:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in _KINDS or (kind == "namespace" and namespace is not None):
            hint = nearest(kind, _KINDS) if isinstance(kind, str) else ""
            message = f"{path}.type {kind!r:.80} is not supported; it may be {', '.join(_KINDS)}.{hint}"
            raise RequestError(message, param=f"{path}.type")
        assert isinstance(value, dict), "it has a type"
        if kind in NOT_OFFERED:
            return
        if kind == "namespace":
            self._add_namespace(value, path, origin)
            return
        tool = check_fields(value, _CUSTOM_FIELDS if kind == "custom" else _FUNCTION_FIELDS, path)
        name = ToolName(text_of(tool.get("name"), f"{path}.name"), namespace, kind == "custom")
        if name.function in self.names:
            raise RequestError(f"{path}.name: there are two tools {name.function!r}", param=f"{path}.name")
        if tool.get("defer_loading") not in (None, False):
            message = f"{path}.defer_loading is not supported: every tool is shown to the model"
            raise RequestError(message, param=f"{path}.defer_loading")
        described = _custom(tool, path) if name.custom else _function(tool)
        self.names[name.function] = name
        self.functions.append({"type": "function", "function": {"name": name.function, **described}})
        origin.tools.append(path)

    def _add_namespace(self, value: dict[str, Any], path: str, origin: Origin) -> None:
        """The description of a namespace is left out, as on DeepSeek's own servers."""
        check_fields(value, ("type", "name", "description", "tools"), path)
        name = text_of(value.get("name"), f"{path}.name")
        if not isinstance(value.get("tools"), list):
            raise RequestError(f"{path}.tools must be a list of tools", param=f"{path}.tools")
        for index, tool in enumerate(value["tools"]):
            self._add(tool, f"{path}.tools[{index}]", name, origin)


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: tool[name] for name in ("description", "parameters") if tool.get(name) is not None}
    return {**given, "strict": True} if tool.get("strict") else given


def _custom(tool: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A function whose one argument is the input. A grammar is described to the model, not enforced."""
    description = optional_text_of(tool.get("description"), f"{path}.description")
    parts = [description] if description else []
    given = {"type": "text"} if tool.get("format") is None else tool["format"]
    form = check_fields(given, ("type", "syntax", "definition"), f"{path}.format")
    if form.get("type") == "grammar":
        syntax = text_of(form.get("syntax"), f"{path}.format.syntax")
        definition = text_of(form.get("definition"), f"{path}.format.definition")
        parts.append(f"The input must follow this {syntax} grammar:\n{definition}")
    elif form.get("type") != "text":
        raise RequestError(f"{path}.format.type must be 'text' or 'grammar'", param=f"{path}.format.type")
    properties = {_INPUT: {"type": "string", "description": "The whole input, as text."}}
    schema = {"type": "object", "properties": properties, "required": [_INPUT], "additionalProperties": False}
    return {"description": "\n\n".join(parts), "parameters": schema}


def custom_arguments(text: str) -> str:
    """The arguments of a call of a custom tool."""
    return json.dumps({_INPUT: text}, ensure_ascii=False)


def custom_input(arguments: str) -> str:
    """The input in a call's arguments; arguments of another shape as they are, so that nothing is lost."""
    value = json.loads(arguments)
    if isinstance(value, dict) and value.keys() == {_INPUT} and isinstance(value[_INPUT], str):
        return value[_INPUT]
    return arguments
