"""Who may call: API keys, the tenant that each stands for, and the check in front of every endpoint but a few.

Prefix caches are kept apart by tenant. A tenant is a digest of the key alone, so that it is the same after a restart
and whatever the key is named. Keys are never logged or shown; their names are.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from thalweg.errors import ConfigError, RequestError, nearest
from thalweg.server.wire import error_response

KEY_VARIABLE = "THALWEG_API_KEY"
SHORTEST_KEY = 8
# The live page without its data: a browser cannot show a key before there is a page to type it into.
LIVE_PAGE_PATHS = frozenset({"/", "/page/live.js", "/page/draw.js", "/page/live.css", "/page/icon.svg"})
# What balancers and monitors ask; it tells nothing of any prompt.
_OPEN = frozenset({"/health", "/version", "/metrics"}) | LIVE_PAGE_PATHS
_KEY = re.compile(r"[!-~]+")  # what a header carries unchanged
_log = logging.getLogger("thalweg.server")


class InvalidKeyError(RequestError):
    """No API key, or an unknown one."""

    status = 401
    kind = "invalid_api_key"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a request is from. Without API keys there is one caller, without name or tenant."""

    name: str = ""
    tenant: str = ""


class ApiKeys:
    """The keys of a server by name. Only their digests are kept."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        """Raises ConfigError naming the entry of a key that is too short, cannot be sent, or is there twice."""
        callers: dict[bytes, Caller] = {}
        for name, key in keys.items():
            if len(key) < SHORTEST_KEY:
                raise ConfigError(f"API key {name!r} has {len(key)} characters; at least {SHORTEST_KEY}", param=name)
            if not _KEY.fullmatch(key):
                raise ConfigError(f"API key {name!r}: only ASCII letters, digits and signs, no spaces", param=name)
            digest = _digest(key.encode())
            if digest in callers:
                raise ConfigError(f"API key {name!r} is the same as {callers[digest].name!r}", param=name)
            callers[digest] = Caller(name, _tenant(key))
        self._callers = tuple(callers.items())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(caller.name for _, caller in self._callers)

    def caller(self, key: bytes) -> Caller | None:
        """Whose key this is. Takes as long for every key: digests are compared, with all entries, in constant time."""
        digest, found = _digest(key), None
        for known, caller in self._callers:
            if hmac.compare_digest(known, digest):
                found = caller
        return found


class KeyCheck:
    """ASGI middleware: lets in whoever shows a key, and notes the caller for `caller_of`."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        key = _shown_key(Request(scope))
        caller = self._keys.caller(key) if key is not None else None
        if caller is None:
            wrong = "no API key: send Authorization: Bearer KEY" if key is None else "the API key is not known here"
            response = error_response(InvalidKeyError(wrong), scope["path"])
            response.headers["WWW-Authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)


def is_open(path: str) -> bool:
    """Whether a path needs no API key."""
    return path in _OPEN or path.startswith("/health/")


def caller_of(request: Request) -> Caller:
    """Whom a request is from, as KeyCheck found."""
    caller = request.scope.get("state", {}).get("caller", Caller())
    assert isinstance(caller, Caller), "something else took the caller's place"
    return caller


def load_keys(flag: str | None, file: Path | None, environment: Mapping[str, str] = os.environ) -> ApiKeys:
    """Keys of --api-key, or else THALWEG_API_KEY, under the name `default`, and of --api-keys-file. Raises ConfigError.

    A variable that is set but empty is an error too: it must not open the server.
    """
    single = flag if flag is not None else environment.get(KEY_VARIABLE)
    keys = {} if file is None else _read_keys(file)
    if single is not None:
        if "default" in keys:
            raise ConfigError(f"{file}: the name 'default' is that of --api-key", param="default")
        keys["default"] = single
    return ApiKeys(keys)


def _read_keys(file: Path) -> dict[str, str]:
    """The [keys] table: name = "key"."""
    try:
        content: dict[str, Any] = tomllib.loads(file.read_text("utf-8"))
        mode = file.stat().st_mode
    except (OSError, ValueError) as error:
        raise ConfigError(f"--api-keys-file {file}: {error}", param="api_keys_file") from error
    for name in content:
        if name != "keys":
            raise ConfigError(f"{file}: unknown entry {name!r}.{nearest(name, ['keys'])}", param=name)
    keys = content.get("keys", {})
    if not isinstance(keys, dict) or not keys:
        raise ConfigError(f'{file}: a table [keys] with lines such as name = "key" is needed', param="keys")
    for name, key in keys.items():
        if not isinstance(key, str):
            raise ConfigError(f"{file}: API key {name!r} is not a text", param=name)
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        _log.warning("%s can be read by other users of this machine; chmod 600 keeps the API keys private", file)
    return keys


def _shown_key(request: Request) -> bytes | None:
    """The bearer token, or else the x-api-key header, which Anthropic's clients send."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key")
    return key.encode("latin-1") if key else None


def _digest(key: bytes) -> bytes:
    return blake2b(key, digest_size=32).digest()


def _tenant(key: str) -> str:
    return blake2b(key.encode(), key=b"thalweg tenant", digest_size=32).hexdigest()
