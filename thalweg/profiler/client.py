"""Streamed requests to an OpenAI-compatible endpoint, with the time of every chunk."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from thalweg.errors import ConfigError, UnavailableError

# Between two bytes: servers may be silent while they read a long prompt.
_TIMEOUT = httpx.Timeout(connect=30, read=3600, write=600, pool=None)
_RESETS = ("/reset_prefix_cache", "/flush_cache")  # vLLM's and SGLang's; ours are both
_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True)
class Form:
    """How this endpoint wants to be asked. `forced`: it takes ignore_eos."""

    model: str
    api: str = "completions"
    forced: bool = True
    stream_usage: bool = True

    def body(self, text: str, output_tokens: int, api: str | None = None) -> dict[str, Any]:
        """A greedy, streamed request. With `api` another one than the usual."""
        asked = {"prompt": text} if (api or self.api) == "completions" else {"messages": _one_turn(text)}
        fields = {"model": self.model, **asked, "max_tokens": output_tokens, "temperature": 0, "stream": True}
        if self.forced:
            fields["ignore_eos"] = True
        if self.stream_usage:
            fields["stream_options"] = {"include_usage": True}
        return fields


def _one_turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, by this process's clock. `times`: when chunks with content came. None: the endpoint does not say."""

    text: str
    sent: float
    times: tuple[float, ...]
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None

    @property
    def first_token_seconds(self) -> float:
        return self.times[0] - self.sent

    @property
    def output_tokens(self) -> int:
        """As reported, else one for every chunk."""
        return self.completion_tokens or len(self.times)

    @property
    def token_seconds(self) -> float | None:
        """Seconds per token after the first; None with a single one."""
        if self.output_tokens < 2 or len(self.times) < 2:
            return None
        return (self.times[-1] - self.times[0]) / (self.output_tokens - 1)

    def tokens_between(self, begin: float, end: float) -> float:
        """Output tokens that came in (begin, end], where chunks carry equally many."""
        return sum(begin < t <= end for t in self.times) * self.output_tokens / len(self.times)


class Client:
    """Talks to one server, keeping connections. `url` is where it listens, with or without the final /v1."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        address = url if "://" in url else f"http://{url}"
        try:
            parts = urlsplit(address)
            _ = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r}: {error}", param="url") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no address such as http://127.0.0.1:8000", param="url")
        self.url = address.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(headers=headers, timeout=_TIMEOUT, limits=limits, trust_env=False)

    async def close(self) -> None:
        await self._http.aclose()

    async def get(self, path: str) -> httpx.Response | None:
        """The answer to a GET with status 200; None for any other. Raises UnavailableError if there is no answer."""
        try:
            response = await self._http.get(self.url + path, timeout=30)
        except httpx.HTTPError as error:
            raise UnavailableError(f"{self.url} does not answer: {error!r}") from error
        return response if response.status_code == httpx.codes.OK else None

    async def reset_cache(self) -> bool:
        """Have all cached prefixes forgotten, where the endpoint offers that."""
        for path in _RESETS:
            try:
                response = await self._http.post(self.url + path, timeout=60)
            except httpx.HTTPError:
                return False
            if response.status_code == httpx.codes.OK:
                return True
        return False

    async def ask(self, form: Form, text: str, output_tokens: int, api: str | None = None) -> Answer:
        """One answer to its end. Raises UnavailableError with what the endpoint said."""
        reading = Reading()
        await self.read(form, text, output_tokens, reading, api)
        return reading.answer()

    async def read(self, form: Form, text: str, output_tokens: int, reading: Reading, api: str | None = None) -> None:
        """The same into `reading`, which has what came so far if the task is cancelled."""
        body = json.dumps(form.body(text, output_tokens, api)).encode()
        headers = {"Content-Type": "application/json"}
        reading.sent = time.perf_counter()
        try:
            path = self.url + _PATHS[api or form.api]
            async with self._http.stream("POST", path, content=body, headers=headers) as response:
                if response.status_code != httpx.codes.OK:
                    said = (await response.aread()).decode("utf-8", "replace").strip()
                    raise UnavailableError(f"POST {path}: {response.status_code} {said[:500]}")
                async for line in response.aiter_lines():
                    reading.add(line)
        except httpx.HTTPError as error:
            raise UnavailableError(f"{self.url} does not answer: {error!r}") from error
        if not reading.times:
            raise UnavailableError(f"{self.url} answered without any content")


class Reading:
    """An answer while it comes."""

    def __init__(self) -> None:
        self.sent = 0.0
        self.times: list[float] = []
        self._texts: list[str] = []
        self._empty: float | None = None  # when a chunk without content came first
        self._usage: dict[str, Any] = {}

    def add(self, line: str) -> None:
        """One line of the stream. Raises UnavailableError for an error, or for what is no JSON object."""
        if not line.startswith("data:"):
            return
        data = line[len("data:") :].strip()
        if data == "[DONE]":
            if not self.times and self._empty is not None:
                self.times.append(self._empty)
            return
        try:
            chunk = dict(json.loads(data))
        except (ValueError, TypeError) as error:
            raise UnavailableError(f"the endpoint streamed {data[:80]!r}, which is no JSON object") from error
        if chunk.get("error"):
            said = chunk["error"]
            raise UnavailableError(str(said.get("message", said) if isinstance(said, dict) else said))
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or ():
            self._choice(choice)

    def _choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta") or choice
        content = delta.get("text") or delta.get("content") or ""
        thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
        if content or thought:
            self.times.append(time.perf_counter())
            self._texts.append(thought + content)
        elif self._empty is None:
            self._empty = time.perf_counter()

    def answer(self) -> Answer:
        usage = self._usage
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", usage.get("prompt_cache_hit_tokens"))
        return Answer(
            "".join(self._texts),
            self.sent,
            tuple(self.times),
            usage.get("prompt_tokens"),
            cached,
            usage.get("completion_tokens"),
        )
