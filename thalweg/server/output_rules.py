"""From the fields of a request that say what its answer must be to the rules that its output keeps to.

Every wire form comes through `OutputRuleMaker.make` with the fields in OpenAI's spelling.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from thalweg.errors import RequestError, nearest
from thalweg.text.chat import OutputStart, ToolChoice
from thalweg.text.dsml_grammar import BlockStart, Function, calls_grammar, can_name
from thalweg.text.grammar import Grammar, GrammarCompiler, GrammarTextError, json_term
from thalweg.text.rules import ChatRules, RuleTokens
from thalweg.text.schema import SchemaFault, faults
from thalweg.text.tokenizer import Tokenizer

_COMPILE_SECONDS = 10.0
_CHOICES = ("auto", "none", "required")
_FORMATS = ("text", "json_object", "json_schema")
_FORMAT_FIELDS = ("name", "description", "schema", "strict")


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A tool in OpenAI form and its path in the request."""

    path: str
    tool: Any

    @property
    def function(self) -> Mapping[str, Any]:
        function = self.tool.get("function") if isinstance(self.tool, Mapping) else None
        return function if isinstance(function, Mapping) else {}


@dataclass(frozen=True, slots=True)
class OutputWishes:
    """What a request says of its output. `tools` and `response_format` were checked by the chat encoder.

    `continues_content`: the last message is an answer that the model goes on with.
    """

    tools: Sequence[OfferedTool] = ()
    tool_choice: object = None
    several_calls: bool = True
    response_format: Mapping[str, Any] | None = None
    thinking_budget: int | None = None
    continues_content: bool = False


def offered_tools(tools: object, messages: object) -> list[OfferedTool]:
    """The request's own tools and those of its messages."""
    holders = [("tools", tools)]
    if isinstance(messages, list):
        given = ((f"messages[{i}].tools", m.get("tools")) for i, m in enumerate(messages) if isinstance(m, Mapping))
        holders += [(path, value) for path, value in given if value]
    return [
        OfferedTool(f"{path}[{index}]", tool)
        for path, value in holders
        if isinstance(value, list)
        for index, tool in enumerate(value)
    ]


def read_tool_choice(value: object, tools: Sequence[OfferedTool]) -> tuple[ToolChoice, str | None]:
    """`auto`, `none`, `required`, or `{"type": "function", "function": {"name": …}}`, which is `required` with a name.

    Raises RequestError whose `param` is the path of what is wrong.
    """
    if value is None:
        return ToolChoice.AUTO, None
    if isinstance(value, str):
        if value not in _CHOICES:
            hint = nearest(value, _CHOICES)
            message = f"tool_choice must be one of {', '.join(_CHOICES)}, or an object that names a function.{hint}"
            raise RequestError(message, param="tool_choice")
        if value == "required" and not tools:
            raise RequestError("tool_choice 'required' needs tools", param="tool_choice")
        return ToolChoice(value), None
    if not isinstance(value, Mapping):
        raise RequestError("tool_choice must be a string or an object", param="tool_choice")
    if value.get("type") != "function":
        message = f"tool_choice.type must be 'function'; got {value.get('type')!r:.80}"
        raise RequestError(message, param="tool_choice.type")
    function = value.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError("tool_choice.function.name must be a string", param="tool_choice.function.name")
    names = [tool.function.get("name") for tool in tools]
    if name not in names:
        hint = nearest(name, [known for known in names if isinstance(known, str)])
        message = f"tool_choice.function.name is {name!r:.80}, which is none of the tools.{hint}"
        raise RequestError(message, param="tool_choice.function.name")
    return ToolChoice.REQUIRED, name


def read_output_format(value: object) -> Mapping[str, Any] | None:
    """OpenAI's `response_format`; None for text. Raises RequestError whose `param` is the path of what is wrong."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RequestError("response_format must be an object with a `type`", param="response_format")
    kind = value.get("type")
    if kind not in _FORMATS:
        message = f"response_format.type must be one of {', '.join(_FORMATS)}; got {kind!r:.80}"
        raise RequestError(message, param="response_format.type")
    _check_names(value, ("type", "json_schema"), "response_format")
    holder = value.get("json_schema")
    if kind != "json_schema":
        return None if kind == "text" else value
    if not isinstance(holder, Mapping):
        path = "response_format.json_schema"
        raise RequestError(f"{path} must be an object with a `schema`", param=path)
    _check_names(holder, _FORMAT_FIELDS, "response_format.json_schema")
    strict = holder.get("strict")
    if strict is not None and not isinstance(strict, bool):
        path = "response_format.json_schema.strict"
        raise RequestError(f"{path} must be true or false", param=path)
    return value


def _check_names(value: Mapping[str, Any], known: Sequence[str], path: str) -> None:
    for name in value:
        if name not in known:
            hint = nearest(str(name), known)
            raise RequestError(f"{path}.{name} is not a supported field.{hint}", param=f"{path}.{name}")


class OutputRuleMaker:
    """Makes rules off the event loop and off the engine thread."""

    def __init__(
        self, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...], compile_seconds: float = _COMPILE_SECONDS
    ) -> None:
        """Looks at the whole vocabulary. A request whose schemas take longer than `compile_seconds` is refused."""
        self._compile_seconds = compile_seconds
        self._tokens = RuleTokens.of(tokenizer, eos_token_ids)
        self._compiler = GrammarCompiler(tokenizer)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="thalweg-grammar")

    async def make(self, wishes: OutputWishes, starts_in: OutputStart) -> ChatRules | None:
        """The rules of one request, None where its output is free.

        Raises RequestError naming the path of a schema that is wrong or cannot be enforced as asked.
        """
        if not wishes.tools and wishes.response_format is None:
            return self._rules(wishes, starts_in)
        work = asyncio.get_running_loop().run_in_executor(self._pool, self._rules, wishes, starts_in)
        try:
            return await asyncio.wait_for(work, self._compile_seconds)
        except TimeoutError:
            path = "tools" if wishes.response_format is None else "response_format"
            raise RequestError(
                f"the schemas of {path} take over {self._compile_seconds:g} s to compile", param=path
            ) from None

    def _rules(self, wishes: OutputWishes, starts_in: OutputStart) -> ChatRules | None:
        choice, name = read_tool_choice(wishes.tool_choice, wishes.tools)
        functions = [] if choice is ToolChoice.NONE else list(_functions(wishes.tools, name))
        required = choice is ToolChoice.REQUIRED
        if required and not functions:
            raise RequestError("tool_choice: none of the tools has a name that a call can carry", param="tool_choice")
        answer = None if required else self._answer(wishes)
        start = BlockStart.NOTHING if required or answer else BlockStart.MARK
        start = BlockStart.TAG if starts_in is OutputStart.TOOL_CALLS else start
        several = wishes.several_calls and name is None
        grammar = self._calls(functions, start, several=several, instead=answer) if functions else None
        if not functions and answer is not None:
            grammar = self._compiler.compile(f"start: {answer}\n")
        rules = ChatRules(self._tokens, starts_in, thinking_budget=wishes.thinking_budget)
        if grammar is not None:
            free = start is BlockStart.MARK and bool(functions)
            return replace(rules, calls=grammar) if free else replace(rules, grammar=grammar)
        budgeted = wishes.thinking_budget is not None and starts_in is OutputStart.REASONING
        return rules if budgeted else None

    def _answer(self, wishes: OutputWishes) -> str | None:
        """The term of the answer's JSON, tried; None where the answer is text."""
        wanted = wishes.response_format
        if wanted is None:
            return None
        if wishes.continues_content:
            raise RequestError(
                "response_format: an answer that is continued cannot be held to it", param="response_format"
            )
        if wanted["type"] == "json_object":
            return json_term({"type": "object"})
        holder, path = wanted["json_schema"], "response_format.json_schema.schema"
        lenient = holder.get("strict") is False
        for fault in faults(holder["schema"], path):
            if fault.wrong or not lenient:
                raise _refused(fault, "" if fault.wrong else "; with strict: false it is left out of account")
        term = json_term(holder["schema"], lenient=lenient)
        grammar = self._tried(f"start: {term}\n", path)
        if holder.get("strict") and grammar.warnings:
            raise RequestError(f"{path} cannot be enforced strictly: {grammar.warnings[0]:.300}", param=path)
        return term

    def _calls(self, functions: list[_Offered], start: BlockStart, *, several: bool, instead: str | None) -> Grammar:
        """The grammar of all calls. Where it does not compile, each function is tried by itself."""
        mark = self._tokens.mark

        def text(offered: Sequence[_Offered]) -> str:
            return calls_grammar([f.function for f in offered], mark, start, several=several, instead=instead)

        try:
            return self._compiler.compile(text(functions))
        except GrammarTextError:
            kept = [self._checked(offered) for offered in functions]
            return self._tried(text(kept), "tools")

    def _checked(self, offered: _Offered) -> _Offered:
        """The function itself; with any parameters where its schema cannot be enforced and need not be."""
        alone = calls_grammar([offered.function], self._tokens.mark, BlockStart.TAG, several=False)
        if offered.strict:
            self._tried(alone, offered.path)
            return offered
        try:
            self._compiler.compile(alone)
        except GrammarTextError:
            return replace(offered, function=replace(offered.function, loose=True))
        return offered

    def _tried(self, text: str, path: str) -> Grammar:
        try:
            return self._compiler.compile(text)
        except GrammarTextError as error:
            raise RequestError(f"{path} cannot be enforced: {error!s:.300}", param=path) from error


@dataclass(frozen=True, slots=True)
class _Offered:
    """A function and the path of its schema."""

    function: Function
    path: str
    strict: bool


def _functions(tools: Sequence[OfferedTool], name: str | None) -> Iterator[_Offered]:
    """The functions that may be called: the named one, or all whose names a call can carry. Raises RequestError."""
    for tool in tools:
        own, path = tool.function.get("name"), f"{tool.path}.function.parameters"
        strict = tool.function.get("strict") is True
        schema = tool.function.get("parameters") or {}
        fault = _first_fault(schema, path, strict=strict)
        if fault is not None:
            raise _refused(fault, "" if fault.wrong else ", which strict asks for")
        if not isinstance(own, str) or (name is not None and own != name):
            continue
        if can_name(own):
            loose = not isinstance(schema, Mapping) or not all(map(can_name, schema.get("properties") or {}))
            yield _Offered(Function(own, schema, lenient=not strict, loose=loose), path, strict)
        elif strict or name is not None:
            place = f"{tool.path}.function.name"
            raise RequestError(f"{place} has a quotation mark or is too long: no call can carry it", param=place)


def _first_fault(schema: object, path: str, *, strict: bool) -> SchemaFault | None:
    return next((fault for fault in faults(schema, path) if fault.wrong or strict), None)


def _refused(fault: SchemaFault, more: str) -> RequestError:
    return RequestError(f"{fault.path} {fault.words}{more}", param=fault.path)
