"""Model output back to reasoning, content and tool calls, token by token (model-spec section 8, user need 7).

    REASONING --</think>--> CONTENT --<DSML tool_calls>--> BLOCK --<DSML invoke>--> CALL --<DSML parameter>--> VALUE
        |                      ^                             |  ^                    |  ^                       |
        +--block--> DRAFT      +-----------AFTER <-----------+  +--------------------+  +-----------------------+

Tolerant where the meaning is plain: a block without blank line, outer tags or closing tags, ASCII bars for `｜`, a
JSON object as the body of a call, a parameter that does not say if it is a string. A block inside thinking is a call
only if thinking never closes and nothing follows; else it was a draft and stays reasoning. Whatever is neither text
nor a call is kept in `unparsed` and makes the message `malformed`; no DSML reaches content.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum

from thalweg.text.chat import OutputStart
from thalweg.text.deltas import (
    ContentText,
    Delta,
    ParsedMessage,
    ReasoningText,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    collect,
)
from thalweg.text.dsml import (
    ANY_SPELLING,
    CONTROL_ONLY,
    DSML_MARK,
    END_THINK_MARK,
    TAG_BEGINNING,
    THINK_MARK,
    ArgumentsWriter,
    NoTag,
    Tag,
    Unfinished,
    Word,
    read_object,
    read_tag,
    spelled,
)
from thalweg.text.markers import DSML, END_THINK, THINK
from thalweg.text.stream import TokenStream
from thalweg.text.tokenizer import Tokenizer


class _State(StrEnum):
    REASONING = "reasoning"
    DRAFT = "draft"
    CONTENT = "content"
    BLOCK = "block"
    CALL = "call"
    VALUE = "value"
    AFTER = "after"


_STARTS = {
    OutputStart.REASONING: _State.REASONING,
    OutputStart.CONTENT: _State.CONTENT,
    OutputStart.TOOL_CALLS: _State.BLOCK,
}
_CONTROL_MARKS = {DSML: DSML_MARK, THINK: THINK_MARK, END_THINK: END_THINK_MARK}
_SURROGATE = re.compile("[\ud800-\udfff]")
# Ends of text that may turn out to belong to a tag, with the line breaks that would go with it.
_CONTENT_TAIL = re.compile(r"\n{0,2}(?:</?)?(?:[｜|](?:D(?:S(?:ML?)?)?)?)?\Z")
_REASONING_TAIL = re.compile(r"\n{0,2}<?\Z")
_VALUE_TAIL = re.compile(r"\n?(?:</?)?(?:[｜|](?:D(?:S(?:ML?)?)?)?)?\Z")
_LONGEST_TAIL = 9
_CUT_MARK = re.compile(r"(?:</?\||｜)D(?:S(?:ML?)?)?\Z")
_DRAFT_OPENER = re.compile(rf"\s*<{DSML_MARK}\w+[ \t]*>?\s*")
_DRAFT_CLOSER = re.compile(rf"</{DSML_MARK}(?:tool|function)_calls>?")
_DRAFT_CALL = f"<{DSML_MARK}invoke"
_LONGEST_CLOSER = 24
_WORD_REST = re.compile(r"[^\s<]*")


class ChatParser:
    """Feeds on one output's tokens; the deltas joined do not depend on how the output was cut.

    `spelled_marks`: markup whose marks are spelled in ordinary text counts as markup in content. It does not where the
    content is held to a grammar, JSON say, that may have such text in a string.
    """

    def __init__(
        self, tokenizer: Tokenizer, starts_in: OutputStart = OutputStart.CONTENT, *, spelled_marks: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._stream = TokenStream(tokenizer)
        self._state = _STARTS[starts_in]
        self._content_mark = ANY_SPELLING if spelled_marks else CONTROL_ONLY
        self._reasoning_tokens = 0
        self._draft_tokens = 0  # since the block began that may be calls
        self._buffer = ""
        self._fresh = True  # nothing shown yet of this reasoning or content
        self._final = False
        self._searched = 0  # a draft's closer does not begin before here
        self._mark = CONTROL_ONLY  # which marks count inside the block
        self._opener = ""
        self._calls_in_block = 0
        self._arguments = ArgumentsWriter()
        self._discarding = False
        self._body = ""
        self._unparsed: list[str] = []
        self._deltas: list[Delta] = []
        self._calls = 0
        self.malformed = False

    @property
    def unparsed(self) -> str:
        """Markup that was no call, and text where only calls may stand."""
        return "".join(self._unparsed)

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of the thinking so far, without the one that closes it; a draft's count once it is known as one."""
        return self._reasoning_tokens

    @property
    def tool_calls(self) -> int:
        """Calls begun so far."""
        return self._calls

    def push(self, token: int) -> list[Delta]:
        """What this token adds; often nothing while it may be part of a tag."""
        control = self._tokenizer.special_text(token)
        before = self._state
        if control is None:
            deltas = self.push_piece(self._stream.push(token))
        else:
            deltas = self.push_piece(self._stream.flush()) + self.push_piece(control, special=True)
        self._count(before)
        return deltas

    def push_all(self, tokens: Iterable[int]) -> list[Delta]:
        """What these tokens add."""
        return [delta for token in tokens for delta in self.push(token)]

    def push_piece(self, text: str, special: bool = False) -> list[Delta]:
        """What a piece of text adds; `special` where it is one control token and not text that spells it. A control
        token without a meaning in an answer says nothing: shown as text it would come back as text."""
        if special:
            self._buffer += _CONTROL_MARKS.get(text, "")
        else:
            self._buffer += _SURROGATE.sub("�", text)
        return self._run()

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the output. Call it once; no push may follow."""
        self._buffer += self._stream.flush()
        self._final = True
        return self._run()

    def _count(self, before: _State) -> None:
        """Whose token was just pushed: the thinking's, a draft's from the rest of its opening tag on, or neither."""
        thinking = (_State.REASONING, _State.DRAFT)
        if before in thinking and self._state is _State.DRAFT:
            self._draft_tokens += 1
        elif before in thinking:
            ended = self._state is not _State.REASONING
            self._reasoning_tokens += self._draft_tokens + (0 if ended else 1)
            self._draft_tokens = 0

    def _run(self) -> list[Delta]:
        steps = {
            _State.REASONING: self._reasoning,
            _State.DRAFT: self._draft,
            _State.CONTENT: self._content,
            _State.BLOCK: self._block,
            _State.CALL: self._call,
            _State.VALUE: self._value,
            _State.AFTER: self._after,
        }
        while steps[self._state]():
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    # Each step takes what it can from the front of the buffer; False: it needs more text, or there will be none.

    def _reasoning(self) -> bool:
        while self._fresh and self._buffer.startswith(THINK_MARK):
            self._skip(1)
        end = self._buffer.find(END_THINK_MARK)
        mark = CONTROL_ONLY.search(self._buffer, 0, end if end >= 0 else len(self._buffer))
        if mark is None and end >= 0:
            self._show_reasoning(end)
            self._skip(1)
            self._enter(_State.CONTENT)
            return True
        if mark is None:
            self._show_reasoning(self._certain(_REASONING_TAIL))
            return False
        tag = read_tag(self._buffer, mark)
        at_line_start = (tag.start == 0 and self._fresh) or self._buffer.endswith("\n", 0, tag.start)
        if isinstance(tag, Unfinished) and at_line_start and end < 0:
            self._show_reasoning(self._before_tag(tag.start))
            if self._final:
                self._refuse(len(self._buffer))
            return False
        if isinstance(tag, Tag) and tag.word is Word.BLOCK and not tag.closing and at_line_start:
            self._show_reasoning(self._before_tag(tag.start))
            self._state = _State.DRAFT
            self._searched = 0
            return True
        self._show_reasoning(mark.end())
        return True

    def _draft(self) -> bool:
        """A block inside thinking, from its leading line breaks on."""
        length = self._draft_length()
        if length is not None:
            self._show_reasoning(length)
            self._state = _State.REASONING
        elif self._final:
            self._enter(_State.CONTENT)
        return length is not None or self._final

    def _draft_length(self) -> int | None:
        """How much of the buffer is certain to be reasoning and no call; None while all of it may be calls."""
        opener = _DRAFT_OPENER.match(self._buffer)
        following = opener.end() if opener else 0
        if not _DRAFT_CALL.startswith(self._buffer[following : following + len(_DRAFT_CALL)]):
            return following
        end = self._buffer.find(END_THINK_MARK, self._searched)
        if end >= 0:
            return end
        closer = _DRAFT_CLOSER.search(self._buffer, self._searched)
        if closer and self._buffer[closer.end() :].strip():
            return closer.end()
        self._searched = closer.start() if closer else max(0, len(self._buffer) - _LONGEST_CLOSER)
        return None

    def _content(self) -> bool:
        if self._fresh and self._buffer[:1] in (THINK_MARK, END_THINK_MARK):
            self._state = _State.REASONING if self._buffer[0] == THINK_MARK else _State.CONTENT
            self._skip(1)
            return True
        mark = self._content_mark.search(self._buffer)
        if mark is None:
            may_be_cut = self._final and self._content_mark is ANY_SPELLING
            cut = _CUT_MARK.search(self._buffer) if may_be_cut else None
            self._show_content(self._certain(_CONTENT_TAIL) if cut is None else self._tail_start(_CONTENT_TAIL))
            if cut is not None:
                self._refuse(len(self._buffer))
            return False
        tag = read_tag(self._buffer, mark)
        if isinstance(tag, Tag) and not tag.closing and tag.word is not Word.PARAMETER:
            self._show_content(self._before_tag(tag.start))
            self._mark = CONTROL_ONLY if mark.group() == DSML_MARK else ANY_SPELLING
            self._opener = ""
            self._calls_in_block = 0
            self._state = _State.BLOCK
            if tag.word is Word.BLOCK:
                self._opener = self._take(len(self._buffer) - len(self._buffer.lstrip("\n")) + tag.end - tag.start)
            return True
        if isinstance(tag, Unfinished):
            self._show_content(self._before_tag(tag.start))
            if self._final:
                self._refuse(len(self._buffer))
            return False
        self._show_content(tag.start)
        self._refuse(tag.end - tag.start)
        return True

    def _block(self) -> bool:
        """Between calls."""
        tag = self._tag_in_front()
        if tag is None:
            rest = self._buffer.strip()
            closing = not rest or rest.startswith("</")  # calls are whole, only the block's own end is not
            if self._final and not (closing and self._calls_in_block):
                self._unparsed.append(spelled(self._opener))
                self._refuse(len(self._buffer))
                self._opener = ""
            return False
        if isinstance(tag, Tag) and tag.word is Word.INVOKE and not tag.closing:
            self._skip(tag.end)
            self._begin_call(tag.name)
            return True
        if isinstance(tag, Tag) and tag.word is Word.BLOCK:
            self._skip(tag.end)
            self._state = _State.AFTER if tag.closing else _State.BLOCK
            return True
        if not self._calls_in_block:
            self._unparsed.append(spelled(self._opener))
            self.malformed = True
            self._opener = ""
            self._state = _State.CONTENT
            return True
        self._refuse(self._stray_end(tag))
        return True

    def _call(self) -> bool:
        """Inside a call, between its parameters."""
        tag = self._tag_in_front()
        if tag is None:
            if self._final:
                self._body += self._take(len(self._buffer))
                self._end_call(complete=False)
                self._state = _State.BLOCK
            return False
        if isinstance(tag, NoTag) or (tag.word is Word.PARAMETER and tag.closing):
            self._body += spelled(self._take(self._stray_end(tag)))
            return True
        if tag.word is Word.PARAMETER:
            self._begin_value(tag)
            return True
        if tag.word is Word.INVOKE and tag.closing:
            self._skip(tag.end)
        self._end_call(complete=True)  # a missing </invoke> before the next call or the block's end
        self._state = _State.BLOCK
        return True

    def _value(self) -> bool:
        mark = self._mark.search(self._buffer)
        if mark is None:
            self._show_value(self._certain(_VALUE_TAIL))
            if self._final:
                self._end_value()
                self._state = _State.CALL
            return self._final
        tag = read_tag(self._buffer, mark)
        if isinstance(tag, NoTag) or (isinstance(tag, Tag) and tag.word is Word.BLOCK and not tag.closing):
            self._show_value(tag.end)
            return True
        if isinstance(tag, Tag) and tag.word is Word.PARAMETER and tag.closing:
            self._show_value(tag.start)
            self._skip(tag.end - tag.start)
            self._end_value()
            self._state = _State.CALL
            return True
        line_break = self._buffer.endswith("\n", 0, tag.start)
        self._show_value(tag.start - line_break)
        if isinstance(tag, Unfinished) and not self._final:
            return False
        if isinstance(tag, Unfinished):
            self._refuse(len(self._buffer))
        self._end_value()
        self._state = _State.CALL
        return True

    def _after(self) -> bool:
        """Behind a block: what follows is content or another block; white space alone is neither."""
        text = self._buffer.lstrip()
        tag = self._tag_in_front()
        if not text or (tag is None and not self._final):
            return False
        if text[0] == END_THINK_MARK:
            self._buffer = text[1:]
            return True
        if isinstance(tag, Tag):
            self._buffer = text
        self._state = _State.CONTENT
        return True

    def _tag_in_front(self) -> Tag | NoTag | None:
        """The tag that the buffer begins with, behind white space; NoTag for other text, None where more must come."""
        start = len(self._buffer) - len(self._buffer.lstrip())
        rest = self._buffer[start:]
        if not rest or TAG_BEGINNING.match(rest):
            return None
        mark = self._mark.match(self._buffer, start + (2 if rest.startswith("</") else 1)) if rest[0] == "<" else None
        if mark is None:
            return NoTag(start, start + 1)
        tag = read_tag(self._buffer, mark)
        return None if isinstance(tag, Unfinished) else tag

    def _stray_end(self, tag: Tag | NoTag) -> int:
        """Where what is no call's ends: a tag out of place, or a word. White space behind it waits for what follows."""
        if isinstance(tag, Tag):
            return tag.end
        word = _WORD_REST.match(self._buffer, tag.end)
        return word.end() if word else tag.end

    def _begin_call(self, name: str) -> None:
        self._deltas.append(ToolCallStart(self._calls, name))
        self._calls += 1
        self._calls_in_block += 1
        self._opener = ""
        self._arguments = ArgumentsWriter()
        self._body = ""
        self._state = _State.CALL

    def _end_call(self, complete: bool) -> None:
        body = self._body.strip()
        if self._arguments.is_empty and read_object(body):
            self._add_arguments(body)
        else:
            self._unparsed.append(body)
            self._add_arguments(self._arguments.end())
            self.malformed = self.malformed or bool(body) or not complete
        self._deltas.append(ToolCallEnd(self._calls - 1, complete))

    def _begin_value(self, tag: Tag) -> None:
        self._discarding = self._arguments.has(tag.name)  # JSON cannot take the first one back
        if self._discarding:
            self._refuse(tag.end)
        else:
            self._skip(tag.end)
            self._add_arguments(self._arguments.begin_value(tag.name, tag.is_string))
        self._state = _State.VALUE

    def _end_value(self) -> None:
        if not self._discarding:
            self._add_arguments(self._arguments.end_value())

    def _add_arguments(self, text: str) -> None:
        if text:
            self._deltas.append(ToolCallArguments(self._calls - 1, text))

    def _show_value(self, length: int) -> None:
        text = spelled(self._take(length))
        if self._discarding:
            self._unparsed.append(text)
        elif text:
            self._add_arguments(self._arguments.value(text))

    def _show_reasoning(self, length: int) -> None:
        if length > 0:
            self._fresh = False
            self._deltas.append(ReasoningText(spelled(self._take(length))))

    def _show_content(self, length: int) -> None:
        if length > 0:
            self._fresh = False
            self._deltas.append(ContentText(spelled(self._take(length))))

    def _refuse(self, length: int) -> None:
        self.malformed = True
        self._unparsed.append(spelled(self._take(length)))

    def _enter(self, state: _State) -> None:
        self._state = state
        self._fresh = True

    def _certain(self, tail: re.Pattern[str]) -> int:
        """Length of the buffer that cannot become part of a tag; at the end of the output, all of it."""
        return len(self._buffer) if self._final else self._tail_start(tail)

    def _tail_start(self, tail: re.Pattern[str]) -> int:
        found = tail.search(self._buffer, max(0, len(self._buffer) - _LONGEST_TAIL))
        return found.start() if found else len(self._buffer)

    def _before_tag(self, start: int) -> int:
        """Where the (at most two) line breaks before a tag begin."""
        text = self._buffer[:start]
        return start - min(2, len(text) - len(text.rstrip("\n")))

    def _take(self, length: int) -> str:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        return text

    def _skip(self, length: int) -> None:
        self._buffer = self._buffer[length:]


def parse_message(
    tokens: Iterable[int], tokenizer: Tokenizer, starts_in: OutputStart = OutputStart.CONTENT
) -> ParsedMessage:
    """Parses a whole output at once."""
    parser = ChatParser(tokenizer, starts_in)
    deltas = [*parser.push_all(tokens), *parser.finish()]
    return collect(deltas, parser.malformed, parser.unparsed)
