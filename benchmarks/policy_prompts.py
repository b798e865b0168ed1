"""Prompts of the window policies' benchmark: agents, a repository, documents in rotation. Real text; repeats exactly.

See policies.py for what each workload is like.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from thalweg.prose.facts import FIRST_WORDS, WORDS, held_out, needle_line, question_for
from thalweg.prose.library import library_texts
from thalweg.text.chat import ChatOptions, EncoderRevision, encode_chat
from thalweg.text.tokenizer import Tokenizer

CHARACTERS_PER_TOKEN = 3.4
SEED = 20


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens, before `scale`."""

    agents: int = 3
    turns: int = 12
    head: int = 2600
    result: int = 350
    document: int = 16_000
    questions: int = 40
    rotated: int = 8_000
    answer: int = 8
    scale: int = 1


QUICK = Sizes(agents=2, turns=2, head=600, result=100, document=1200, questions=4, rotated=700, answer=2)


@dataclass(frozen=True)
class Asked:
    """One request, and the answer that a good model gives."""

    prompt: tuple[int, ...]
    hints: tuple[int, ...]
    expected: str


Reply = Callable[[Asked], str]


class Texts:
    """Real text, facts hidden in it, and questions for them; repeats with its seed."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        random = np.random.default_rng(seed)
        first, second = np.divmod(np.arange(len(WORDS) ** 2), len(WORDS))
        free = random.permutation(np.flatnonzero(held_out(first, second) & (first != second)))
        self._keys = iter([f"{WORDS[i]} {WORDS[j]}" for i, j in zip(first[free], second[free], strict=True)])
        self._random = random
        self._tokenizer = tokenizer
        self._source = (line for text in library_texts() for line in text.splitlines())

    def lines(self, tokens: int) -> list[str]:
        """The next lines of the library, about so many tokens."""
        found, size = [], 0
        while size < tokens * CHARACTERS_PER_TOKEN:
            line = next(self._source)
            found.append(line)
            size += len(line) + 1
        return found

    def fact(self) -> tuple[str, str]:
        """Key and value."""
        value = f"{self._random.choice(FIRST_WORDS)} {self._random.choice(WORDS)}"
        return next(self._keys), value

    def document(self, tokens: int, facts: list[tuple[str, str]]) -> list[str]:
        """Lines with the facts spread evenly over them."""
        found = self.lines(tokens)
        for i, (key, value) in reversed(list(enumerate(facts))):
            found.insert((2 * i + 1) * len(found) // (2 * len(facts)), needle_line(key, value).rstrip())
        return found

    def asked(self, messages: list[dict[str, Any]], expected: str, tools: list[dict[str, Any]] | None = None) -> Asked:
        options = ChatOptions(thinking=False, revision=EncoderRevision.PREVIEW, tools=tools)
        chat = encode_chat(messages, self._tokenizer, options)
        return Asked(chat.token_ids, chat.boundaries, expected)


def agents(texts: Texts, sizes: Sizes, reply: Reply) -> list[Asked]:
    """Turns of all agents, interleaved. An answer becomes a part of the next prompt, with a call of a tool after it."""
    system = "You work on a code base.\n" + "\n".join(texts.lines(sizes.head * sizes.scale // 2))
    tools = [_tool(texts, i, sizes.head * sizes.scale // 12) for i in range(6)]
    histories: list[list[dict[str, Any]]] = [[{"role": "system", "content": system}] for _ in range(sizes.agents)]
    asked = []
    for turn in range(sizes.turns):
        for agent, history in enumerate(histories):
            key, value = texts.fact()
            content = "\n".join(texts.document(sizes.result * sizes.scale, [(key, value)]))
            role = {"role": "tool", "tool_call_id": f"{turn - 1}"} if turn else {"role": "user"}
            head = "" if turn else f"You are agent {agent}.\n"
            history.append({**role, "content": head + content})
            history.append({"role": "user", "content": question_for(key)})
            asked.append(texts.asked(history, value, tools))
            call = {"name": f"tool_{turn % 6}", "arguments": json.dumps({"path": f"part/{agent}/{turn}.py"})}
            calls = [{"id": f"{turn}", "type": "function", "function": call}]
            history.append({"role": "assistant", "content": reply(asked[-1]), "tool_calls": calls})
    return asked


def _tool(texts: Texts, number: int, tokens: int) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    function = {"name": f"tool_{number}", "description": "\n".join(texts.lines(tokens)), "parameters": parameters}
    return {"type": "function", "function": function}


def repository(texts: Texts, sizes: Sizes, _: Reply) -> list[Asked]:
    """Seven of ten questions come after the whole document, the others after a part of it, in a shuffled order."""
    facts = [texts.fact() for _ in range(sizes.questions)]
    lines = texts.document(sizes.document * sizes.scale, facts)
    early = [number for number in range(sizes.questions) if number % 10 in (2, 5, 8)]
    asked = []
    for number in np.random.default_rng(SEED).permutation(sizes.questions).tolist():
        quarters = 1 + early.index(number) % 3 if number in early else 4
        part = lines[: quarters * len(lines) // 4]
        inside = [(key, value) for key, value in facts if needle_line(key, value).rstrip() in part]
        key, value = inside[number % len(inside)]
        asked.append(texts.asked([{"role": "user", "content": "\n".join(part) + f"\n\n{question_for(key)}"}], value))
    return asked


def rotation(texts: Texts, sizes: Sizes, _: Reply) -> list[Asked]:
    """Four documents one after the other, twice, with another question the second time."""
    facts = [[texts.fact(), texts.fact()] for _ in range(4)]
    documents = ["\n".join(texts.document(sizes.rotated * sizes.scale, pair)) for pair in facts]
    return [
        texts.asked([{"role": "user", "content": f"{document}\n\n{question_for(pair[turn][0])}"}], pair[turn][1])
        for turn in range(2)
        for document, pair in zip(documents, facts, strict=True)
    ]


WORKLOADS = (agents, repository, rotation)
