"""Small words for writing JSON Schemas."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

ANYTHING: Schema = {}
TEXT: Schema = {"type": "string"}
NAME: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
NOTHING: Schema = {"type": "null"}
OBJECT: Schema = {"type": "object"}


def ref(name: str) -> Schema:
    """A schema among the components of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def list_of(schema: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": schema, **limits}


def any_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def or_null(schema: Schema) -> Schema:
    return any_of(schema, NOTHING)


def one_of_values(*values: object) -> Schema:
    return {"enum": list(values)}


def record(required: dict[str, Schema], optional: dict[str, Schema] | None = None, rest: object = False) -> Schema:
    """An object with these fields; `rest` is the schema of any others."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": rest,
    }
