"""Random requests of every API, right and wrong ones, as many as wanted: what `benchmarks.soak` sends.

Each client draws from its own generator, so that what it sends depends on the seed alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

JSON = "application/json"
MOST_OUTPUT = 48
DOCUMENTS, DOCUMENT_CHARACTERS = 6, 60_000
_FUNCTION = {
    "name": "set_alarm",
    "description": "Set an alarm.",
    "parameters": {
        "type": "object",
        "properties": {"hour": {"type": "integer"}, "label": {"enum": ["tea", "bread"]}},
        "required": ["hour"],
    },
}
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One request. `status` is what its answer must have; a stream is whole with one of `ends` in its last event.

    Answers to calls with the same `probe` must all be the same.
    """

    api: str
    path: str
    body: bytes
    status: int = 200
    content_type: str = JSON
    ends: tuple[str, ...] = ()
    choices: int = 1
    probe: int | None = None

    @property
    def streams(self) -> bool:
        return bool(self.ends)


_ENDS = {
    "chat": ("data: [DONE]",),
    "completions": ("data: [DONE]",),
    "messages": ('"type":"message_stop"',),
    "responses": ('"type":"response.completed"', '"type":"response.incomplete"'),
}
_PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
}


class Traffic:
    """Draws calls. `documents` are long texts; prompts share their beginnings."""

    def __init__(self, documents: list[str], seed: int) -> None:
        self._documents = documents
        self._random = random.Random(seed)
        self._makers: dict[str, Callable[[], Fields]] = {
            "chat": self._chat,
            "completions": self._completion,
            "messages": self._messages,
            "responses": self._responses,
        }

    def delay(self, most: float) -> float:
        """Seconds up to `most`, short ones more often."""
        return most * self._random.random() ** 3

    def happens(self, share: float) -> bool:
        return self._random.random() < share

    def call(self) -> Call:
        """The next request: one in eight is wrong, one in ten is a question whose answer must always be the same."""
        drawn = self._random.random()
        if drawn < 1 / 8:
            return self._wrong()
        if drawn < 1 / 8 + 1 / 10:
            return self._probe()
        api = self._random.choice(list(self._makers))
        return self._sent(api, self._makers[api](), streams=self.happens(0.6))

    def _sent(self, api: str, fields: Fields, *, streams: bool, probe: int | None = None) -> Call:
        body = json.dumps(fields | {"stream": streams}).encode()
        ends = _ENDS[api] if streams else ()
        prompts = fields.get("prompt")
        several = len(prompts) if isinstance(prompts, list) and isinstance(prompts[0], str) else 1
        return Call(api, _PATHS[api], body, ends=ends, choices=fields.get("n", 1) * several, probe=probe)

    def _probe(self) -> Call:
        """Greedy, of a length of its own, so that cached and computed prefixes of all lengths meet."""
        number = self._random.randrange(12)
        text = self._documents[number % DOCUMENTS][: 300 * 2**number % 23_456] + f"\n\nWhat is the value of {number}?"
        fields = {"prompt": text, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        return self._sent("completions", fields, streams=False, probe=number)

    def _text(self) -> str:
        """Mostly short; else the beginning of a document with a question behind it."""
        if self.happens(0.5):
            return f"Say {self._random.randrange(10**6)} in words."
        document = self._random.choice(self._documents)
        long = DOCUMENT_CHARACTERS if self.happens(0.15) else 6_000
        return f"{document[: self._random.randrange(long)]}\n\nWhat is the value of {self._random.randrange(99)}?"

    def _sampling(self) -> Fields:
        options: tuple[Fields, ...] = (
            {"temperature": 0}, {"temperature": 1.3, "top_p": 0.9}, {"seed": 7}, {"top_k": 5, "min_p": 0.1},
            {"stop": ["e", "\n\n"]}, {"repetition_penalty": 1.2}, {"presence_penalty": 0.5, "ignore_eos": True},
            {"n": self._random.randint(2, 4)}, {"logit_bias": {"5": 3.5}}, {"priority": 2}, {"cache_salt": "other"},
            {"min_tokens": 1}, {"return_cache_report": True},
        )  # fmt: skip
        fields: Fields = {"max_tokens": self._random.randint(1, MOST_OUTPUT)}
        for option in self._random.sample(options, self._random.randrange(3)):
            fields |= option
        return fields

    def _turns(self) -> list[Fields]:
        turns: list[Fields] = [{"role": "user", "content": self._text()}]
        if self.happens(0.3):
            turns += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And then?"}]
        return turns

    def _chat(self) -> Fields:
        fields: Fields = {"messages": self._turns(), **self._sampling()}
        extras: tuple[Fields, ...] = (
            {}, {}, {"logprobs": True, "top_logprobs": 3}, {"thinking": {"type": "enabled", "budget_tokens": 4}},
            {"tools": [{"type": "function", "function": _FUNCTION}]},
            {"tools": [{"type": "function", "function": _FUNCTION}], "tool_choice": "required"},
            {"response_format": {"type": "json_object"}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA}}},
            {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        )  # fmt: skip
        return fields | self._random.choice(extras)

    def _completion(self) -> Fields:
        prompts: tuple[Any, ...] = (
            self._text(),
            self._text(),
            [self._random.randrange(300, 1900) for _ in range(self._random.randrange(1, 2000))],
            [self._text()[:2000] + "?" for _ in range(self._random.randint(1, 5))],
        )
        extras: tuple[Fields, ...] = ({}, {}, {"echo": True}, {"logprobs": 2})
        return {"prompt": self._random.choice(prompts), **self._sampling()} | self._random.choice(extras)

    def _messages(self) -> Fields:
        tool = {"name": "set_alarm", "input_schema": _FUNCTION["parameters"]}
        extras: tuple[Fields, ...] = (
            {}, {}, {"system": "Be brief."}, {"stop_sequences": ["a"]}, {"tools": [tool]},
            {"tools": [tool], "tool_choice": {"type": "any"}}, {"thinking": {"type": "enabled", "budget_tokens": 5}},
            {"output_config": {"format": {"type": "json_schema", "schema": _SCHEMA}}},
        )  # fmt: skip
        fields: Fields = {"messages": self._turns(), "max_tokens": self._random.randint(1, MOST_OUTPUT)}
        return fields | self._random.choice(extras)

    def _responses(self) -> Fields:
        tool = {"type": "function", **_FUNCTION}
        extras: tuple[Fields, ...] = (
            {}, {}, {"instructions": "Be brief."}, {"tools": [tool]}, {"tools": [tool], "tool_choice": "required"},
            {"tools": [{"type": "custom", "name": "run"}]}, {"reasoning": {"effort": "high"}},
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": _SCHEMA}}},
        )  # fmt: skip
        fields: Fields = {"input": self._text(), "max_output_tokens": self._random.randint(1, MOST_OUTPUT)}
        return fields | self._random.choice(extras)

    def _wrong(self) -> Call:
        """What must be refused, and with which status."""
        api = self._random.choice(list(self._makers))
        path, fields = _PATHS[api], self._makers[api]()
        good = json.dumps(fields).encode()
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}
        hello: Fields = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        choices = (
            (path, json.dumps(fields | {"temperatur": 1}).encode(), 400, JSON),
            (path, json.dumps(fields | {"model": "another"}).encode(), 404, JSON),
            (path, json.dumps(fields | {"temperature": "hot"}).encode(), 400, JSON),
            (path, good[: len(good) // 2], 400, JSON),
            (path, good, 415, "text/plain"),
            ("/v1/nothing", good, 404, JSON),
            (_PATHS["completions"], json.dumps({"prompt": "a", "max_tokens": 10**7}).encode(), 400, JSON),
            (_PATHS["completions"], json.dumps({"prompt": [5, 10**6]}).encode(), 400, JSON),
            (_PATHS["chat"], json.dumps(hello | {"response_format": schema}).encode(), 400, JSON),
            (_PATHS["chat"], json.dumps(hello | {"n": 3, "logit_bias": {"99999": 1}}).encode(), 400, JSON),
        )
        path, body, status, kind = self._random.choice(choices)
        return Call("wrong", path, body, status, kind)
