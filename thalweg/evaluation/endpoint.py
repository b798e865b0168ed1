"""A small HTTP client for the command line's own use: JSON requests and server-sent events over one connection each."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

from thalweg.errors import UnavailableError

_TIMEOUT_SECONDS = 60  # between two bytes: the server sends a keep-alive every 5 s


class Client:
    """Talks to one server on a host and port."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port

    def get(self, path: str) -> str:
        """The body of a GET; UnavailableError for anything but 200."""
        return self._text("GET", path, None)

    def post(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        """The JSON answer of a POST."""
        return dict(json.loads(self._text("POST", path, fields)))

    def events(self, path: str, fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """(kind, text) of a streamed answer: `data` lines and `comment` lines, up to [DONE]."""
        connection = self._send("POST", path, fields)
        try:
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise UnavailableError(f"POST {path}: {response.status} {response.read().decode()}")
            while line := response.readline().decode("utf-8"):
                text = line.strip()
                if text == "data: [DONE]":
                    return
                if text.startswith("data: "):
                    yield "data", text[len("data: ") :]
                elif text.startswith(":"):
                    yield "comment", text[1:].strip()
        finally:
            connection.close()

    def _text(self, method: str, path: str, fields: dict[str, Any] | None) -> str:
        connection = self._send(method, path, fields)
        try:
            response = connection.getresponse()
            body = response.read().decode("utf-8")
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise UnavailableError(f"{method} {path}: {response.status} {body}")
        return body

    def _send(self, method: str, path: str, fields: dict[str, Any] | None) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_SECONDS)
        body = None if fields is None else json.dumps(fields).encode("utf-8")
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
        except OSError as error:
            connection.close()
            raise UnavailableError(f"{self._host}:{self._port} does not answer: {error}") from error
        return connection
