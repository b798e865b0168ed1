"""Messages to prompt: DeepSeek-V4's chat encoding (model-spec section 8), with control tokens that text cannot forge.

Two revisions of the encoder exist. `preview` is the one published with the first checkpoints, as Python. `later`
follows DeepSeek's own request conversion (deepseek-recipe); it differs in the texts of the reasoning efforts and in
these places, where `preview` gives prompts that no turn structure explains:

    case                               preview                          later
    several system messages            each where it stands             joined at the front by blank lines
    an assistant message last          nothing after its EOS            a new assistant turn is opened
    a reminder after a user message    after `<｜Assistant｜><think>`     before it
    two assistant messages in a row    the second without a head        each with its own `<｜Assistant｜>`
    reasoning after the last user      kept                             kept only with tools, or in an open turn
    a tool's description               as the client wrote it           name, description, parameters, no other field
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from thalweg.errors import RequestError, nearest
from thalweg.text import markers
from thalweg.text.messages import (
    Message,
    Role,
    ToolCall,
    read_messages,
    read_response_format,
    read_tools,
    to_json,
)
from thalweg.text.segments import PromptBuilder, Segment
from thalweg.text.tokenizer import Tokenizer


class EncoderRevision(StrEnum):
    """Which published encoder a checkpoint was trained with; it belongs to the checkpoint."""

    PREVIEW = "preview"
    LATER = "later"


class ReasoningEffort(StrEnum):
    """How long the model is asked to think; `low` asks for nothing."""

    LOW = "low"
    HIGH = "high"
    MAX = "max"


class ToolChoice(StrEnum):
    """`none` hides the tools; `required` opens the block of calls, where no thinking comes before it."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


class OutputStart(StrEnum):
    """What the model's first token belongs to."""

    REASONING = "reasoning"
    CONTENT = "content"
    TOOL_CALLS = "tool_calls"


_EFFORT_TEXTS: Mapping[tuple[EncoderRevision, ReasoningEffort], str] = {
    (EncoderRevision.PREVIEW, ReasoningEffort.MAX): markers.EFFORT_ABSOLUTE,
    (EncoderRevision.LATER, ReasoningEffort.HIGH): markers.EFFORT_ABSOLUTE,
    (EncoderRevision.LATER, ReasoningEffort.MAX): markers.EFFORT_BEYOND,
}
_EFFORT_NAMES: Mapping[str, ReasoningEffort] = {
    "minimal": ReasoningEffort.LOW,
    "low": ReasoningEffort.LOW,
    "medium": ReasoningEffort.HIGH,
    "high": ReasoningEffort.HIGH,
    "xhigh": ReasoningEffort.HIGH,
    "max": ReasoningEffort.MAX,
    "ultra": ReasoningEffort.MAX,
}


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How to render a conversation. `tools` and `response_format` are the request's own, in OpenAI form."""

    thinking: bool = True
    reasoning_effort: ReasoningEffort = ReasoningEffort.LOW
    revision: EncoderRevision = EncoderRevision.LATER
    drop_thinking: bool = True  # leave earlier turns' reasoning out; without effect as soon as there are tools
    tools: Sequence[Mapping[str, Any]] | None = None
    response_format: Mapping[str, Any] | None = None
    tool_choice: ToolChoice = ToolChoice.AUTO


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """An encoded prompt. `boundaries` are ascending token positions (0 < p < len) at which prompts of later turns are
    likely to diverge: the end of system text and tools, the end of each user turn, and before the think token."""

    token_ids: tuple[int, ...]
    boundaries: tuple[int, ...]
    starts_in: OutputStart

    @property
    def thinking(self) -> bool:
        """Whether the answer starts inside thinking."""
        return self.starts_in is OutputStart.REASONING


def read_effort(value: object, path: str = "reasoning_effort") -> ReasoningEffort:
    """One of the effort names that clients use. None is `low`. Raises RequestError naming the allowed ones."""
    if value is None:
        return ReasoningEffort.LOW
    if isinstance(value, str) and value in _EFFORT_NAMES:
        return _EFFORT_NAMES[value]
    hint = nearest(value, _EFFORT_NAMES) if isinstance(value, str) else ""
    raise RequestError(f"{path} must be one of {', '.join(_EFFORT_NAMES)}; got {value!r:.80}.{hint}", param=path)


def encode_chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, options: ChatOptions | None = None
) -> ChatPrompt:
    """Token ids of a conversation, up to where the model continues. Raises RequestError naming the field."""
    builder, starts_in = _render(messages, options or ChatOptions())
    token_ids, marks = builder.encode(tokenizer)
    boundaries = tuple(mark for mark in marks if 0 < mark < len(token_ids))
    return ChatPrompt(tuple(token_ids), boundaries, starts_in)


def render_chat(messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None) -> str:
    """The prompt as text, for tests and people. Encoding this text again would let user text forge control tokens."""
    return "".join(segment.text for segment in chat_segments(messages, options))


def chat_segments(messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None) -> list[Segment]:
    """The prompt as control strings and plain text."""
    return _render(messages, options or ChatOptions())[0].segments()


@dataclass(frozen=True, slots=True)
class _Turn:
    """A message to render; for user turns `blocks` are the texts and tool results that share the turn."""

    message: Message
    blocks: tuple[str, ...] = ()

    @property
    def role(self) -> Role:
        return self.message.role

    @property
    def asks(self) -> bool:
        """Whether the model is expected to answer this turn."""
        return self.role in (Role.USER, Role.DEVELOPER)


def _render(messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> tuple[PromptBuilder, OutputStart]:
    read = _with_request_fields(read_messages(messages), options)
    if options.tool_choice is ToolChoice.REQUIRED and not any(message.tools for message in read):
        raise RequestError("tool_choice 'required' needs tools", param="tool_choice")
    turns = _merge(read)
    renderer = _Renderer(turns, options)
    starts_in = renderer.render()
    return renderer.builder, starts_in


def _with_request_fields(messages: tuple[Message, ...], options: ChatOptions) -> list[Message]:
    """The messages with the request's tools and response format on a leading system message."""
    later = options.revision is EncoderRevision.LATER
    rest = list(messages)
    system = [message for message in rest if message.role is Role.SYSTEM] if later else rest[:1]
    if later or system[0].role is Role.SYSTEM:
        rest = [message for message in rest if message.role is not Role.SYSTEM] if later else rest[1:]
    else:
        system = []
    formats = [message.response_format for message in system if message.response_format is not None]
    requested = read_response_format(options.response_format, "response_format")
    formats += [requested] if requested is not None else []
    if len(formats) > 1:
        raise RequestError("response_format is given more than once", param="response_format")
    first = Message(
        Role.SYSTEM,
        "\n\n".join(message.content for message in system if message.content),
        tools=tuple(tool for message in system for tool in message.tools) + read_tools(options.tools, "tools"),
        response_format=formats[0] if formats else None,
        task=system[-1].task if system else None,
    )
    merged = [first, *rest] if system or first.tools or first.response_format is not None else rest
    if options.tool_choice is ToolChoice.NONE:
        return [replace(message, tools=()) for message in merged]
    return merged


def _merge(messages: Sequence[Message]) -> list[_Turn]:
    """Consecutive user and tool messages become one turn, results in the order of the calls they answer."""
    turns: list[_Turn] = []
    results: list[list[Message]] = []
    for message in messages:
        if message.role not in (Role.USER, Role.TOOL):
            turns.append(_Turn(message))
            results.append([])
            continue
        if turns and turns[-1].role is Role.USER and turns[-1].message.task is None:
            results[-1].append(message)
            turns[-1] = replace(turns[-1], message=replace(turns[-1].message, task=message.task))
        else:
            turns.append(_Turn(Message(Role.USER, task=message.task)))
            results.append([message])
    return [replace(turn, blocks=_ordered(parts)) for turn, parts in zip(turns, results, strict=True)]


def _ordered(messages: Sequence[Message]) -> tuple[str, ...]:
    """The texts of one user turn; tool results take the places of tool results, sorted by the call they answer."""
    results = [message for message in messages if message.role is Role.TOOL]
    in_call_order = iter(sorted(results, key=lambda message: message.answers or 0))
    return tuple(
        f"<tool_result>{next(in_call_order).content}</tool_result>" if message.role is Role.TOOL else message.content
        for message in messages
    )


class _Renderer:
    """Writes turns into a PromptBuilder, one after the other."""

    def __init__(self, turns: list[_Turn], options: ChatOptions) -> None:
        self.builder = PromptBuilder()
        self._options = options
        self._later = options.revision is EncoderRevision.LATER
        self._has_tools = any(turn.message.tools for turn in turns)
        self._drops = options.thinking and options.drop_thinking and not self._has_tools
        self._turns = self._without_old_developer_turns(turns) if self._drops else turns
        self._last_question = max((i for i, turn in enumerate(self._turns) if turn.asks), default=-1)

    def render(self) -> OutputStart:
        """Writes the whole prompt; returns what the model's first token belongs to."""
        self.builder.control(markers.BOS)
        if self._options.thinking:
            self.builder.plain(_EFFORT_TEXTS.get((self._options.revision, self._options.reasoning_effort), ""))
        for index, turn in enumerate(self._turns):
            self._turn(index, turn)
        return self._end()

    def _without_old_developer_turns(self, turns: list[_Turn]) -> list[_Turn]:
        last = max((index for index, turn in enumerate(turns) if turn.asks), default=-1)
        return [turn for index, turn in enumerate(turns) if turn.role is not Role.DEVELOPER or index >= last]

    def _turn(self, index: int, turn: _Turn) -> None:
        message = turn.message
        if turn.role is Role.ASSISTANT:
            if self._later:
                self._open_assistant(index)
            self._assistant(index, message)
        elif turn.role is Role.SYSTEM:
            self.builder.plain(message.content)
            self._tools_and_format(message)
        elif turn.role is Role.LATEST_REMINDER:
            self.builder.control(markers.LATEST_REMINDER)
            self.builder.plain(message.content)
        else:
            self.builder.control(markers.USER)
            self.builder.plain("\n\n".join(turn.blocks) if turn.role is Role.USER else message.content)
            self._tools_and_format(message)
        if turn.role is not Role.ASSISTANT:
            self.builder.mark()
        follower = self._turns[index + 1].role if index + 1 < len(self._turns) else Role.ASSISTANT
        if not self._later and follower in (Role.ASSISTANT, Role.LATEST_REMINDER) and (turn.asks or message.task):
            self._open_assistant(index + 1)

    def _end(self) -> OutputStart:
        """Opens the turn that the model writes, unless the last message is an assistant turn left open."""
        last = self._turns[-1] if self._turns else None
        if last is not None and last.role is Role.ASSISTANT and last.message.open:
            return OutputStart.REASONING if self._continues_reasoning(last.message) else OutputStart.CONTENT
        end = len(self._turns)
        if self._later:
            self._open_assistant(end)
        if self._options.tool_choice is ToolChoice.REQUIRED and not self._thinks(end):
            self._dsml("\n\n<", "tool_calls>\n")
            return OutputStart.TOOL_CALLS
        return OutputStart.REASONING if self._thinks(end) else OutputStart.CONTENT

    def _open_assistant(self, index: int) -> None:
        """What stands before the assistant turn `index`: its head and think token, or the mark of a task."""
        task = self._turns[index - 1].message.task if index else None
        if task is None or task == markers.TASK_ACTION:
            self.builder.control(markers.ASSISTANT)
            self.builder.mark()
            thinks = self._thinks(index) if task is None else self._options.thinking
            self.builder.control(markers.THINK if thinks else markers.END_THINK)
        if task is not None:
            self.builder.control(dict(markers.TASK_MARKERS)[task])

    def _thinks(self, index: int) -> bool:
        """Whether the assistant turn `index` (or the one to come) shows a thinking block."""
        if not self._options.thinking or (index > 0 and self._turns[index - 1].message.task is not None):
            return False
        if not self._drops:
            return True
        if not self._later:
            return index > self._last_question
        return index == len(self._turns) or self._turns[index].message.open

    def _continues_reasoning(self, message: Message) -> bool:
        return self._options.thinking and message.continues_reasoning

    def _assistant(self, index: int, message: Message) -> None:
        if self._thinks(index):
            self.builder.plain(message.reasoning or "")
            if self._continues_reasoning(message):
                return
            self.builder.control(markers.END_THINK)
        self.builder.plain(message.content)
        if message.tool_calls:
            self._calls(message.tool_calls)
        if not message.open:
            self.builder.control(markers.EOS)

    def _tools_and_format(self, message: Message) -> None:
        if message.tools:
            self.builder.plain("\n\n")
            self.builder.fixed(markers.TOOLS_BEFORE_SCHEMAS)
            self.builder.plain("\n".join(self._schema(tool) for tool in message.tools))
            self.builder.fixed(markers.TOOLS_AFTER_SCHEMAS)
        if message.response_format is not None:
            self.builder.plain("\n\n" + _format_instruction(message.response_format))

    def _schema(self, tool: Mapping[str, Any]) -> str:
        if self._later:
            description, parameters = tool.get("description"), tool.get("parameters")
            tool = {
                "name": tool["name"],
                "description": "" if description is None else description,
                "parameters": {} if parameters is None else parameters,
            }
        return to_json(tool, "tools")

    def _calls(self, calls: Sequence[ToolCall]) -> None:
        """The DSML block: every tag is `<` or `</`, the control token, and text."""
        self._dsml("\n\n<", "tool_calls>\n")
        for call in calls:
            self._dsml("<", f'invoke name="{call.name}">\n')
            for name, is_string, value in _parameters(call.arguments):
                self._dsml("<", f'parameter name="{name}" string="{str(is_string).lower()}">{value}')
                self._dsml("</", "parameter>\n")
            self._dsml("</", "invoke>\n")
        self._dsml("</", "tool_calls>")

    def _dsml(self, before: str, after: str) -> None:
        self.builder.plain(before)
        self.builder.control(markers.DSML)
        self.builder.plain(after)


def _parameters(arguments: str) -> list[tuple[str, bool, str]]:
    """(name, is a string, text) of each argument. What is no JSON object is passed as one string, `arguments`."""
    try:
        value = json.loads(arguments, parse_constant=_refuse_constant)
        written = {name: _written(item) for name, item in value.items()}
        "".join((*written, *written.values())).encode("utf-8")
    except (ValueError, AttributeError, RecursionError):
        return [("arguments", True, arguments)]
    return [(name, isinstance(value[name], str), text) for name, text in written.items()]


def _written(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _format_instruction(response_format: Mapping[str, Any]) -> str:
    if response_format.get("type") == "json_object":
        return markers.RESPONSE_JSON
    schema: object = response_format
    if response_format.get("type") == "json_schema":
        schema = response_format["json_schema"]["schema"]
    return markers.RESPONSE_SCHEMA + to_json(schema, "response_format")
