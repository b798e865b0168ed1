"""The bill and the log-probabilities in OpenAI's form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from thalweg.text.tokenizer import Tokenizer
from thalweg.types import SampledToken, Usage


def usage_fields(usages: Sequence[Usage], reasoning_tokens: int = 0) -> dict[str, Any]:
    """`usage` of a response with one or more choices of one prompt, which is counted once.

    prompt_cache_hit_tokens + prompt_cache_miss_tokens = prompt_tokens.
    """
    prompt, cached = usages[0].prompt_tokens, usages[0].cached_tokens
    output = sum(u.output_tokens for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
    }


def _token_fields(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[SampledToken]) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    content = [
        _token_fields(tokenizer, t.token, t.logprob)
        | {"top_logprobs": [_token_fields(tokenizer, alternative.token, alternative.logprob) for alternative in t.top]}
        for t in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[SampledToken], offset: int) -> dict[str, Any]:
    """`logprobs` of a completion choice; text_offset counts characters from the start of the output."""
    texts = [tokenizer.token_bytes(t.token).decode("utf-8", "replace") for t in tokens]
    offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
    tops = []
    for sampled in tokens:
        known = {tokenizer.token_bytes(a.token).decode("utf-8", "replace"): a.logprob for a in sampled.top}
        tops.append(known)
    return {
        "tokens": texts,
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
