"""Schemas of what this server answers, field by field; nothing else is ever in a body."""

from __future__ import annotations

from collections.abc import Mapping

from thalweg.server.ending import Ending
from thalweg.server.json_schemas import (
    ANYTHING,
    COUNT,
    FLAG,
    INTEGER,
    NOTHING,
    NUMBER,
    OBJECT,
    TEXT,
    Schema,
    any_of,
    list_of,
    one_of_values,
    or_null,
    record,
    ref,
)
from thalweg.types import MissReason

_ERRORS: Mapping[str, Schema] = {
    "Error": record({"error": record({"message": TEXT, "type": TEXT, "param": or_null(TEXT), "code": TEXT})}),
    "AnthropicError": record({"type": one_of_values("error"), "error": record({"type": TEXT, "message": TEXT})}),
}

_CACHE_REPORT = record({
    "prompt_tokens": COUNT,
    "device_tokens": COUNT,
    "host_tokens": COUNT,
    "disk_tokens": COUNT,
    "replayed_tokens": COUNT,
    "computed_tokens": COUNT,
    "resume_token": COUNT,
    "divergence_token": or_null(COUNT),
    "reason": one_of_values(*MissReason),
    "approximation": or_null(TEXT),
})  # fmt: skip
# With what a client may ask to be told of the cache, and what it is always told.
_ABOUT_CACHE = {
    "cache": any_of(ref("CacheReport"), list_of(ref("CacheReport"))),
    "approximation": TEXT,
}
_USAGE = record({
    "prompt_tokens": COUNT,
    "completion_tokens": COUNT,
    "total_tokens": COUNT,
    "prompt_tokens_details": record({"cached_tokens": COUNT}),
    "completion_tokens_details": record({"reasoning_tokens": COUNT}),
    "prompt_cache_hit_tokens": COUNT,
    "prompt_cache_miss_tokens": COUNT,
})  # fmt: skip
_TOKEN = {"token": TEXT, "logprob": NUMBER, "bytes": list_of({"type": "integer", "minimum": 0, "maximum": 255})}
_CALL = record({
    "id": TEXT,
    "type": one_of_values("function"),
    "function": record({"name": TEXT, "arguments": TEXT}),
})  # fmt: skip
_CHAT_ENDINGS = one_of_values(*(ending for ending in Ending if ending is not Ending.STOP_STRING))
_CHAT_CHOICE = record({
    "index": COUNT,
    "message": record(
        {"role": one_of_values("assistant"), "content": or_null(TEXT), "refusal": NOTHING},
        {"reasoning_content": TEXT, "tool_calls": list_of(_CALL)},
    ),
    "logprobs": or_null(record({
        "content": list_of(record({**_TOKEN, "top_logprobs": list_of(record(_TOKEN))})),
        "refusal": NOTHING,
    })),
    "finish_reason": _CHAT_ENDINGS,
})  # fmt: skip
_TEXT_CHOICE = record({
    "index": COUNT,
    "text": TEXT,
    "logprobs": or_null(record({
        "tokens": list_of(TEXT),
        "token_logprobs": list_of(NUMBER),
        "top_logprobs": list_of({"type": "object", "additionalProperties": NUMBER}),
        "text_offset": list_of(COUNT),
    })),
    "finish_reason": one_of_values("stop", "length"),
})  # fmt: skip


def _completion(kind: str, choice: Schema) -> Schema:
    fields = {"id": TEXT, "object": one_of_values(kind), "created": INTEGER, "model": TEXT}
    return record({**fields, "choices": list_of(choice, minItems=1), "usage": ref("Usage")}, _ABOUT_CACHE)


_COMPLETIONS: Mapping[str, Schema] = {
    "CacheReport": _CACHE_REPORT,
    "Usage": _USAGE,
    "ChatCompletion": _completion("chat.completion", _CHAT_CHOICE),
    "Completion": _completion("text_completion", _TEXT_CHOICE),
}

_MESSAGES: Mapping[str, Schema] = {
    "Message": record(
        {
            "id": TEXT,
            "type": one_of_values("message"),
            "role": one_of_values("assistant"),
            "model": TEXT,
            "content": list_of(
                any_of(
                    record({"type": one_of_values("text"), "text": TEXT}),
                    record({"type": one_of_values("thinking"), "thinking": TEXT, "signature": TEXT}),
                    record({"type": one_of_values("tool_use"), "id": TEXT, "name": TEXT, "input": OBJECT}),
                )
            ),
            "stop_reason": one_of_values("end_turn", "max_tokens", "stop_sequence", "tool_use", "malformed_tool_call"),
            "stop_sequence": or_null(TEXT),
            "usage": record({
                "input_tokens": COUNT,
                "cache_creation_input_tokens": COUNT,
                "cache_read_input_tokens": COUNT,
                "output_tokens": COUNT,
                "output_tokens_details": record({"thinking_tokens": COUNT}),
            }),
        },
        _ABOUT_CACHE,
    ),
    "TokenCount": record({"input_tokens": COUNT}),
}  # fmt: skip

_ITEM = {"id": TEXT, "status": one_of_values("completed", "incomplete")}
_REASONING_PART = record({"type": one_of_values("reasoning_text"), "text": TEXT})
_TEXT_PART = record({
    "type": one_of_values("output_text"), "text": TEXT, "annotations": list_of(ANYTHING), "logprobs": list_of(ANYTHING),
})  # fmt: skip
_CALL_NAMES = {"call_id": TEXT, "name": TEXT}
_OUTPUT_ITEM = any_of(
    record({
        "type": one_of_values("message"), **_ITEM, "role": one_of_values("assistant"), "content": list_of(_TEXT_PART),
    }),
    record(
        {
            "type": one_of_values("reasoning"), **_ITEM, "summary": list_of(ANYTHING),
            "content": list_of(_REASONING_PART),
        },
        {"encrypted_content": TEXT},
    ),
    record(
        {"type": one_of_values("function_call"), **_ITEM, **_CALL_NAMES, "arguments": TEXT}, {"namespace": TEXT}
    ),
    record({"type": one_of_values("custom_tool_call"), **_ITEM, **_CALL_NAMES, "input": TEXT}, {"namespace": TEXT}),
)  # fmt: skip
_RESPONSES: Mapping[str, Schema] = {
    "Response": record(
        {
            "id": TEXT,
            "object": one_of_values("response"),
            "created_at": INTEGER,
            "model": TEXT,
            "status": one_of_values("completed", "incomplete"),
            "error": NOTHING,
            "incomplete_details": or_null(record({"reason": TEXT})),
            "output": list_of(_OUTPUT_ITEM),
            "usage": record({
                "input_tokens": COUNT,
                "input_tokens_details": record({"cached_tokens": COUNT, "cache_write_tokens": COUNT}),
                "output_tokens": COUNT,
                "output_tokens_details": record({"reasoning_tokens": COUNT}),
                "total_tokens": COUNT,
            }),
            # The request's own words:
            "background": FLAG,
            "instructions": or_null(TEXT),
            "max_output_tokens": or_null(COUNT),
            "metadata": OBJECT,
            "parallel_tool_calls": FLAG,
            "previous_response_id": NOTHING,
            "reasoning": record({"effort": or_null(TEXT), "summary": NOTHING}),
            "store": FLAG,
            "temperature": NUMBER,
            "text": record({"format": OBJECT}),
            "tool_choice": any_of(TEXT, OBJECT),
            "tools": list_of(OBJECT),
            "top_p": NUMBER,
            "truncation": one_of_values("disabled"),
        },
        {"completed_at": INTEGER, **_ABOUT_CACHE},
    ),
}  # fmt: skip

_MODEL = {
    "id": TEXT,
    "object": one_of_values("model"),
    "created": INTEGER,
    "owned_by": TEXT,
    "root": TEXT,
    "max_model_len": COUNT,
    "type": one_of_values("model"),
    "display_name": TEXT,
    "created_at": TEXT,
}
_OPERATIONS: Mapping[str, Schema] = {
    "Model": record(_MODEL),
    "ModelList": record({
        "object": one_of_values("list"), "data": list_of(ref("Model")), "has_more": FLAG, "first_id": TEXT,
        "last_id": TEXT,
    }),
    "Health": record({"status": one_of_values("ok"), "running": COUNT, "waiting": COUNT}),
    "Ready": record({"status": one_of_values("ready")}),
    "Version": record({"version": TEXT}),
    "Forgotten": record({"forgotten_tokens": COUNT}),
    "ProfileStarted": record({"status": one_of_values("profiling")}),
    "Profile": record({"seconds": NUMBER, "counters": {"type": "object", "additionalProperties": NUMBER}}),
    "Tokens": record({"tokens": list_of(COUNT), "count": COUNT, "max_model_len": COUNT}),
    "Text": record({"prompt": TEXT}),
    "Live": record({
        "now": NUMBER, "caller": or_null(TEXT), "about": OBJECT, "status": OBJECT, "open": list_of(OBJECT),
        "more_open": COUNT, "finished": list_of(OBJECT), "totals": OBJECT, "groups": list_of(OBJECT),
        "tiers": list_of(OBJECT), "speed": OBJECT,
    }),
}  # fmt: skip

# Schemas of answers, by name.
ANSWERS: Mapping[str, Schema] = {**_ERRORS, **_COMPLETIONS, **_MESSAGES, **_RESPONSES, **_OPERATIONS}
