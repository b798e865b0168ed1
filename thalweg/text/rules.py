"""What a chat answer must keep to: phases of one output, and what its next token may be in each.

    REASONING --</think>--> FREE --< and the DSML token--> GRAMMAR of a block of calls
        |                                                     (tools are there, and the model may call)
        +------</think>---> GRAMMAR from the first token on   (a call is required, or JSON)

Thinking is never held to a grammar; a thinking budget closes it by force. In a grammar, the end comes only where a
sentence of it is complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from thalweg.text.chat import OutputStart
from thalweg.text.grammar import Grammar, GrammarRun
from thalweg.text.markers import DSML, END_THINK
from thalweg.text.tokenizer import Tokenizer
from thalweg.types import AllowedTokens, TokenArray


class _Phase(StrEnum):
    REASONING = "reasoning"
    FREE = "free"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class RuleTokens:
    """The ids that the phases turn on."""

    end_think: int
    mark: int  # DSML
    eos: tuple[int, ...]  # the first one is used where the end is all that may come
    openers: frozenset[int]  # ids of text that ends with `<`

    @classmethod
    def of(cls, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...]) -> RuleTokens:
        """Looks at every id once."""
        openers = (token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token).endswith(b"<"))
        eos = tuple(dict.fromkeys((tokenizer.eos_id, *eos_token_ids)))
        return cls(tokenizer.special_id(END_THINK), tokenizer.special_id(DSML), eos, frozenset(openers))


@dataclass(frozen=True, slots=True)
class ChatRules:
    """The rules of a request, shared by its choices; an OutputRules.

    `grammar` holds for the whole answer behind the thinking; `calls` for a block of calls from behind the DSML token
    that opens it, where the answer is free to have one. At most one of them is set.
    """

    tokens: RuleTokens
    starts_in: OutputStart
    grammar: Grammar | None = None
    calls: Grammar | None = None
    thinking_budget: int | None = None

    def start(self) -> ChatRulesState:
        return ChatRulesState(self)


class ChatRulesState:
    """Where one output stands; an OutputState. Follows the output's tokens, however its computing was interrupted."""

    def __init__(self, rules: ChatRules) -> None:
        self._rules = rules
        self._phase = _Phase.REASONING
        self._run: GrammarRun | None = None
        self._seen = 0
        self._last = -1
        self._reasoning_tokens = 0
        if rules.starts_in is not OutputStart.REASONING:
            self._begin_answer()

    def allowed(self, output: TokenArray) -> AllowedTokens | None:
        """What may follow the output so far, int32 [output tokens]; None for anything. Raises GrammarError."""
        for token in output[self._seen :].tolist():
            self._advance(token)
        self._seen = len(output)
        if self._phase is _Phase.REASONING:
            return self._in_reasoning()
        if self._run is not None:
            return self._in_grammar(self._run)
        # A mark that opens no tag would be markup without a meaning.
        opens = self._last in self._rules.tokens.openers
        return None if opens or self._rules.calls is None else AllowedTokens(banned=(self._rules.tokens.mark,))

    def ends_with(self, token: int) -> bool:
        """Whether this token, chosen next, is the end of the grammar, and so of the output."""
        return self._phase is _Phase.GRAMMAR and token in self._rules.tokens.eos

    def _in_reasoning(self) -> AllowedTokens | None:
        rules = self._rules
        if rules.thinking_budget is not None and self._reasoning_tokens >= rules.thinking_budget:
            return AllowedTokens(forced=rules.tokens.end_think)
        return AllowedTokens(banned=rules.tokens.eos) if rules.grammar is not None else None

    def _in_grammar(self, run: GrammarRun) -> AllowedTokens:
        if run.over:
            return AllowedTokens(forced=self._rules.tokens.eos[0])
        return AllowedTokens(mask=run.allowed(), may_end=run.can_end)

    def _advance(self, token: int) -> None:
        tokens = self._rules.tokens
        if self._run is not None:
            self._run.consume(token)
        elif self._phase is _Phase.REASONING and token == tokens.end_think:
            self._begin_answer()
        elif self._phase is _Phase.REASONING:
            self._reasoning_tokens += 1
        elif token == tokens.mark and self._rules.calls is not None:
            self._phase = _Phase.GRAMMAR
            self._run = self._rules.calls.start()
        self._last = token

    def _begin_answer(self) -> None:
        grammar = self._rules.grammar
        self._phase = _Phase.FREE if grammar is None else _Phase.GRAMMAR
        self._run = None if grammar is None else grammar.start()
