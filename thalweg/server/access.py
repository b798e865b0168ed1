"""Who may call: API keys, what each may ask for, the tenant that it stands for, and the check in front of endpoints.

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
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from thalweg.config.options import parse_bytes
from thalweg.errors import ConfigError, RequestError, nearest
from thalweg.server.wire import error_response

KEY_VARIABLE = "THALWEG_API_KEY"
SHORTEST_KEY = 8
MAX_BODY_BYTES = 64 * 2**20
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


class ForbiddenError(RequestError):
    """The API key is known and does not open this."""

    status = 403
    kind = "permission_denied"


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What the holder of one API key may ask for; None: whatever the server does.

    Every choice of every prompt is a request. Those that are open run, load or wait; those that are queued have not
    begun.
    """

    max_parallel_requests: int | None = None  # open at once
    max_queued_requests: int | None = None
    max_prompt_tokens: int | None = None
    max_body_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is configured. `admin`: what concerns all callers is allowed."""

    key: str = field(repr=False)
    limits: KeyLimits = KeyLimits()
    admin: bool = False


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a request is from. Without API keys there is one caller, without name, tenant or limits."""

    name: str = ""
    tenant: str = ""
    limits: KeyLimits = KeyLimits()
    admin: bool = True


class ApiKeys:
    """The keys of a server by name. Only their digests are kept."""

    def __init__(self, keys: Mapping[str, ApiKey]) -> None:
        """Raises ConfigError naming the entry of a key that is too short, cannot be sent, or is there twice."""
        callers: dict[bytes, Caller] = {}
        for name, configured in keys.items():
            key = configured.key
            if len(key) < SHORTEST_KEY:
                raise ConfigError(f"API key {name!r} has {len(key)} characters; at least {SHORTEST_KEY}", param=name)
            if not _KEY.fullmatch(key):
                raise ConfigError(f"API key {name!r}: only ASCII letters, digits and signs, no spaces", param=name)
            digest = _digest(key.encode())
            if digest in callers:
                raise ConfigError(f"API key {name!r} is the same as {callers[digest].name!r}", param=name)
            callers[digest] = Caller(name, _tenant(key), configured.limits, configured.admin)
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

    The single key is an administrator's; [limits] of the file hold for it as well. A variable that is set but empty is
    an error too: it must not open the server.
    """
    single = flag if flag is not None else environment.get(KEY_VARIABLE)
    limits, keys = (KeyLimits(), {}) if file is None else read_keys(file)
    if single is not None:
        if "default" in keys:
            raise ConfigError(f"{file}: the name 'default' is that of --api-key", param="default")
        keys["default"] = ApiKey(single, limits, admin=True)
    return ApiKeys(keys)


def read_keys(file: Path) -> tuple[KeyLimits, dict[str, ApiKey]]:
    """The limits of every key that has none of its own, and the keys by name. Raises ConfigError naming the entry."""
    try:
        content: dict[str, Any] = tomllib.loads(file.read_text("utf-8"))
        mode = file.stat().st_mode
    except (OSError, ValueError) as error:
        raise ConfigError(f"--api-keys-file {file}: {error}", param="api_keys_file") from error
    _check_names(f"{file}: ", content, ["keys", "limits"])
    keys, limits = content.get("keys", {}), content.get("limits", {})
    if not isinstance(keys, dict) or not keys:
        raise ConfigError(f'{file}: a table [keys] with lines such as name = "key" is needed', param="keys")
    if not isinstance(limits, dict):
        raise ConfigError(f"{file}: limits is no table", param="limits")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        _log.warning("%s can be read by other users of this machine; chmod 600 keeps the API keys private", file)
    for_all = _limits(f"{file}: [limits] ", limits, KeyLimits())
    return for_all, {name: _key_of(f"{file}: API key {name!r} ", entry, for_all) for name, entry in keys.items()}


def _key_of(where: str, entry: Any, for_all: KeyLimits) -> ApiKey:
    """An entry of [keys]: the key alone, or a table with the key and its own limits."""
    table = {"key": entry} if isinstance(entry, str) else entry
    if not isinstance(table, dict) or not isinstance(table.get("key"), str):
        raise ConfigError(f"{where}is not a text, and no table with a text `key`", param="key")
    own = {name: value for name, value in table.items() if name not in ("key", "admin")}
    admin = table.get("admin", False)
    if not isinstance(admin, bool):
        raise ConfigError(f"{where}has admin {admin!r}, which is not true or false", param="admin")
    return ApiKey(table["key"], _limits(where, own, for_all, "key", "admin"), admin)


def _limits(where: str, given: Mapping[str, Any], otherwise: KeyLimits, *beside: str) -> KeyLimits:
    """Limits as given, the others as `otherwise` has them. `beside` them other names are known."""
    names = [limit.name for limit in fields(KeyLimits)]
    _check_names(where, given, [*names, *beside])
    values = dict(given)
    if "max_body_bytes" in values:
        values["max_body_bytes"] = parse_bytes(values["max_body_bytes"], "max_body_bytes")
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{where}has {name} {value!r}, which is not a whole number from 1 on", param=name)
    if values.get("max_body_bytes", 0) > MAX_BODY_BYTES:
        raise ConfigError(
            f"{where}has a max_body_bytes over the server's own, {MAX_BODY_BYTES}", param="max_body_bytes"
        )
    return replace(otherwise, **values)


def _check_names(where: str, given: Mapping[str, Any], known: list[str]) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"{where}unknown entry {name!r}.{nearest(name, known)}", param=name)


def _shown_key(request: Request) -> bytes | None:
    """The bearer token, or else the x-api-key header, which Anthropic's clients send."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key")
    return key.encode("latin-1") if key else None


def _digest(key: bytes) -> bytes:
    return blake2b(key, digest_size=32).digest()


def _tenant(key: str) -> str:
    return blake2b(key.encode(), key=b"thalweg tenant", digest_size=32).hexdigest()
