"""A small client for OpenAI-compatible endpoints: JSON requests and server-sent events, one connection each."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from thalweg.errors import ConfigError, UnavailableError

# Between two bytes. Our own server sends a comment every 5 s; others are silent while they read a long prompt.
_TIMEOUT_SECONDS = 3600


class Client:
    """Talks to one server. `url` is where it listens, with or without the final /v1."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r}: {error}", param="url") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no address such as http://127.0.0.1:8000", param="url")
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str) -> str:
        """The body of a GET; UnavailableError for anything but 200."""
        with self._response("GET", path, None) as response:
            return response.read().decode("utf-8", "replace")

    def events(self, path: str, fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """(kind, text) of a streamed answer: `data` lines and `comment` lines, up to [DONE]."""
        with self._response("POST", path, fields) as response:
            while line := response.readline().decode("utf-8", "replace"):
                text = line.strip()
                if text == "data: [DONE]":
                    return
                if text.startswith("data: "):
                    yield "data", text[len("data: ") :]
                elif text.startswith(":"):
                    yield "comment", text[1:].strip()
        raise UnavailableError(f"{self.url} ended a stream before [DONE]")

    @contextmanager
    def _response(self, method: str, path: str, fields: dict[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
        """An answer with status 200; everything else is an UnavailableError with what the endpoint said."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=_TIMEOUT_SECONDS)
        body = None if fields is None else json.dumps(fields).encode("utf-8")
        try:
            connection.request(method, self._prefix + path, body, self._headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                said = response.read().decode("utf-8", "replace").strip()
                raise UnavailableError(f"{method} {path}: {response.status} {said}")
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"{self.url} does not answer: {error!r}") from error
        finally:
            connection.close()
