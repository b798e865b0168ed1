"""Hooks for schemathesis: what is generated stays as it is, but answers are short. Nothing wrong becomes right."""

from __future__ import annotations

from typing import Any

import schemathesis

MOST_TOKENS, MOST_CHOICES = 4, 2
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
# What limits an answer that may otherwise be as long as the context.
LIMIT_OF = {"/chat/completions": "max_tokens", "/responses": "max_output_tokens"}


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    body = case.body
    if not isinstance(body, dict):
        return
    for name in (*LIMITS, "min_tokens"):
        if isinstance(body.get(name), int) and body[name] > MOST_TOKENS:
            body[name] = MOST_TOKENS
    limit = next((name for ending, name in LIMIT_OF.items() if case.path.endswith(ending)), None)
    if limit is not None and not any(body.get(name) for name in LIMITS):
        body[limit] = MOST_TOKENS
    if isinstance(body.get("n"), int) and MOST_CHOICES < body["n"] <= 16:
        body["n"] = MOST_CHOICES
