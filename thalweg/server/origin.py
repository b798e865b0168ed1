"""Errors about a chat body, said in the words of the body of another API that it was made from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from thalweg.errors import RequestError, nearest

_ENTRY = re.compile(r"(messages|tools)\[(\d+)\](.*)", re.DOTALL)


@dataclass(slots=True)
class Origin:
    """Where the parts of a chat body come from: `names` by field, `messages` and `tools` by their place in the list."""

    names: Mapping[str, str]
    messages: list[str] = field(default_factory=list)
    tools: list[str] = field(default_factory=list)

    @contextmanager
    def in_errors(self) -> Iterator[None]:
        """Renames the field of a RequestError raised inside."""
        try:
            yield
        except RequestError as error:
            old = error.param
            new = None if old is None else self._path(old)
            if old is None or new is None or new == old:
                raise
            raise type(error)(error.message.replace(old, new), param=new) from error

    def _path(self, path: str) -> str | None:
        entry = _ENTRY.fullmatch(path)
        if entry is None:
            return self.names.get(path.partition(".")[0], path)
        places = self.messages if entry[1] == "messages" else self.tools
        if int(entry[2]) >= len(places):
            return path
        place = places[int(entry[2])]
        if entry[1] == "messages":
            return place
        rest = entry[3].removeprefix(".function").lstrip(".")
        first, dot, more = rest.partition(".")
        return f"{place}.{self.names.get(first, first)}{dot}{more}" if rest else place


def check_fields(value: object, allowed: tuple[str, ...], path: str) -> dict[str, Any]:
    """An object with no other fields than these, null and empty ones aside: clients send whole responses back."""
    if not isinstance(value, dict):
        raise RequestError(f"{path} must be an object", param=path)
    for name, content in value.items():
        if name not in allowed and content not in (None, [], {}, ""):
            hint = nearest(str(name), allowed) or f" Supported: {', '.join(allowed)}."
            raise RequestError(f"{path}.{name} is not a supported field.{hint}", param=f"{path}.{name}")
    return value


def text_of(value: object, path: str) -> str:
    """A string. Raises RequestError naming the path."""
    if not isinstance(value, str):
        raise RequestError(f"{path} must be a string", param=path)
    return value


def optional_text_of(value: object, path: str) -> str | None:
    """A string, or None for null. Raises RequestError naming the path."""
    return None if value is None else text_of(value, path)
