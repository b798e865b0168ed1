"""JSON Schemas as clients send them: what is wrong with one, and where, before a grammar is made of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from thalweg.errors import nearest

_TYPES = ("string", "number", "integer", "boolean", "null", "object", "array")
# Keywords of JSON Schema that say something about a value and that no grammar here can hold to.
_NOT_ENFORCED = frozenset({
    "not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains", "propertyNames",
    "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems",
    "$dynamicRef", "$recursiveRef",
})  # fmt: skip
_OF_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_OF_SCHEMA = ("items", "additionalProperties", "additionalItems")
_MOST_SCHEMAS = 20_000
_DEEPEST = 100


@dataclass(frozen=True, slots=True)
class SchemaFault:
    """What is wrong, and the path of the place. `wrong`: no schema at all; else a rule that cannot be enforced."""

    path: str
    words: str
    wrong: bool


def faults(schema: object, path: str) -> Iterator[SchemaFault]:
    """All faults of a schema, outermost first."""
    left: deque[tuple[object, str, int]] = deque([(schema, path, 0)])
    for _ in range(_MOST_SCHEMAS):
        if not left:
            return
        part, place, depth = left.popleft()
        if isinstance(part, bool):
            continue
        if not isinstance(part, Mapping):
            yield SchemaFault(place, "must be a JSON Schema, an object or a boolean", wrong=True)
            continue
        yield from _own_faults(part, place, schema)
        if depth >= _DEEPEST:
            yield SchemaFault(place, f"is nested more than {_DEEPEST} levels deep", wrong=True)
            return
        left += [(inner, inner_path, depth + 1) for inner_path, inner in _inner(part, place)]
    yield SchemaFault(path, f"has more than {_MOST_SCHEMAS} schemas in it", wrong=True)


def resolved(schema: object, root: object) -> object:
    """The schema that a chain of local `$ref`s leads to; itself where there is none, None where it leads nowhere."""
    for _ in range(_DEEPEST):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema
        schema = _target(schema["$ref"], root)
    return None


def _inner(schema: Mapping[str, Any], path: str) -> Iterator[tuple[str, object]]:
    for key in _OF_SCHEMAS_BY_NAME:
        if isinstance(schema.get(key), Mapping):
            yield from ((f"{path}.{key}.{name}", inner) for name, inner in schema[key].items())
    for key in _OF_SCHEMAS:
        if isinstance(schema.get(key), list):
            yield from ((f"{path}.{key}[{index}]", inner) for index, inner in enumerate(schema[key]))
    for key in _OF_SCHEMA:
        if key in schema and not isinstance(schema[key], list):
            yield f"{path}.{key}", schema[key]


def _own_faults(schema: Mapping[str, Any], path: str, root: object) -> Iterator[SchemaFault]:
    for key, value in schema.items():
        if key in _NOT_ENFORCED and not (key == "uniqueItems" and value is False):
            yield SchemaFault(f"{path}.{key}", "is a keyword that cannot be enforced here", wrong=False)
        elif key in _CHECKS and (words := _CHECKS[key](value)):
            yield SchemaFault(f"{path}.{key}", words, wrong=True)
    reference = schema.get("$ref")
    if isinstance(reference, str) and _target(reference, root) is None:
        yield SchemaFault(f"{path}.$ref", f"leads nowhere: {reference!r:.80} is not in this schema", wrong=True)


def _target(reference: str, root: object) -> object:
    if not reference.startswith("#"):
        return None
    part = root
    for name in reference[1:].split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(part, list) and name.isdecimal() and int(name) < len(part):
            part = part[int(name)]
        elif isinstance(part, Mapping) and name in part:
            part = part[name]
        else:
            return None
    return part


def _type_words(value: object) -> str:
    given = value if isinstance(value, list) else [value]
    for name in given:
        if name not in _TYPES:
            hint = nearest(name, _TYPES) if isinstance(name, str) else ""
            return f"must be one of {', '.join(_TYPES)}, or a list of them; got {name!r:.80}.{hint}"
    return "" if given else "must not be empty"


def _names_words(value: object) -> str:
    fine = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return "" if fine else "must be a list of property names"


def _schemas_by_name_words(value: object) -> str:
    return "" if isinstance(value, Mapping) else "must be an object of schemas by name"


def _schemas_words(value: object) -> str:
    return "" if isinstance(value, list) and value else "must be a list of at least one schema"


def _values_words(value: object) -> str:
    return "" if isinstance(value, list) and value else "must be a list of at least one value"


def _text_words(value: object) -> str:
    return "" if isinstance(value, str) else "must be a string"


def _count_words(value: object) -> str:
    fine = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return "" if fine else "must be a whole number of at least 0"


_CHECKS: Mapping[str, Callable[[object], str]] = {
    "type": _type_words,
    "required": _names_words,
    "enum": _values_words,
    "pattern": _text_words,
    "format": _text_words,
    "$ref": _text_words,
    **dict.fromkeys(_OF_SCHEMAS_BY_NAME, _schemas_by_name_words),
    **dict.fromkeys(_OF_SCHEMAS, _schemas_words),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _count_words),
}
