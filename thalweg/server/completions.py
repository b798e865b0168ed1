"""POST /v1/completions: text or tokens in, text out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from thalweg.errors import RequestError
from thalweg.server.access import caller_of
from thalweg.server.cache_report import CacheReporting
from thalweg.server.choices import close_all, collected, expectations, final_usages, merged
from thalweg.server.generation import Generation, Piece, PlainReader
from thalweg.server.schemas import CompletionBody
from thalweg.server.service import CacheSpace, Prompt, Service, new_id
from thalweg.server.sse import EventStream, Message
from thalweg.server.usage import completion_logprobs, usage_fields
from thalweg.text import markers
from thalweg.types import Usage

_MOST_PROMPTS = 64


async def completions(service: Service, body: CompletionBody, request: Request) -> Response:
    """Answer one request; several prompts and `n` give several choices, prompt by prompt."""
    service.check_model(body.model)
    if body.echo and body.logprobs is not None:
        raise RequestError("echo with logprobs is not supported: prompts have no log-probabilities here", param="echo")
    if body.best_of not in (None, body.n or 1):
        raise RequestError(f"best_of must be n ({body.n or 1}): choices are not ranked here", param="best_of")
    reporting = CacheReporting.of(request, body.return_cache_report)
    cache = CacheSpace(caller_of(request), body.salt())
    prompts = [replace(prompt, priority=body.priority or 0) for prompt in await _prompts(service, body)]
    stops, count = body.stops(), body.n or 1
    max_tokens = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default of this endpoint
    service.check_limits(cache.caller, prompts, count)
    generations: list[Generation] = []
    try:
        for prompt in prompts:
            for choice in range(count):
                sampling = body.sampling(max_tokens=max_tokens, logprobs=body.logprobs, choice=choice)
                reader = PlainReader(service.runtime.tokenizer)
                name = new_id("cmpl")
                generations.append(service.start(prompt, sampling, reader, request_id=name, stops=stops, cache=cache))
    except BaseException:
        close_all(generations)
        raise
    answer = _Answer(service, body, generations, count, reporting)
    headers = await expectations(generations)
    if body.stream:
        return EventStream(answer.stream(), lambda: close_all(generations), headers=headers)
    pieces = await collected(request, generations)
    return JSONResponse(answer.whole(pieces), headers=headers | reporting.headers(final_usages(pieces)))


def _given(body: CompletionBody) -> list[str | list[int]]:
    """The prompts, one or a list of them, as text or as token ids."""
    given: Any = body.prompt
    if isinstance(given, list) and not given:
        raise RequestError("prompt is empty", param="prompt")
    many = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    if len(many) > _MOST_PROMPTS:
        raise RequestError(f"prompt lists {len(many)} prompts; at most {_MOST_PROMPTS} are allowed", param="prompt")
    return many


async def _prompts(service: Service, body: CompletionBody) -> list[Prompt]:
    """The prompts as tokens; long ones are encoded off the event loop."""
    prompts = []
    for one in _given(body):
        if body.suffix is not None:
            one = await _around_hole(service, one, body.suffix)
        elif isinstance(one, str):
            one = await service.off_loop(len(one), lambda text=one: service.encode_plain(text))  # type: ignore[misc]
        prompts.append(await service.off_loop(len(one), lambda ids=one: service.prompt_of_ids(ids)))  # type: ignore[misc]
    return prompts


async def _around_hole(service: Service, prompt: str | list[int], suffix: str) -> list[int]:
    """Ids of what stands before and after a hole that the model fills (prefix, suffix, middle: DeepSeek-V3 report,
    section 4.1). Control strings spelled in either stay text."""
    if not isinstance(prompt, str):
        raise RequestError("suffix needs a prompt that is text", param="suffix")
    tokenizer = service.runtime.tokenizer
    missing = [marker for marker in markers.FILL_MARKERS if marker not in tokenizer.special_texts]
    if missing:
        raise RequestError(f"suffix is not supported: this model's tokenizer has no {missing[0]}", param="suffix")
    begin, hole, end = map(tokenizer.special_id, markers.FILL_MARKERS)
    size = len(prompt) + len(suffix)
    before, after = await service.off_loop(size, lambda: tokenizer.encode_texts([prompt, suffix]))
    return [tokenizer.bos_id, begin, *before, hole, *after, end]


class _Answer:
    """Chunks and the whole response of one request."""

    def __init__(
        self,
        service: Service,
        body: CompletionBody,
        generations: list[Generation],
        per_prompt: int,
        reporting: CacheReporting,
    ) -> None:
        self._service = service
        self._body = body
        self._generations = generations
        self._per_prompt = per_prompt
        self._options = body.stream_options
        self._reporting = reporting
        self._echoes = self._prompt_texts() if body.echo else [""] * len(generations)
        self._common = {
            "id": generations[0].request.request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.runtime.model_name,
        }

    def _prompt_texts(self) -> list[str]:
        """For each choice its prompt, which is shown before its first text."""
        decode = self._service.runtime.tokenizer.decode
        texts = [one if isinstance(one, str) else decode(one) for one in _given(self._body)]
        return [text for text in texts for _ in range(self._per_prompt)]

    def whole(self, pieces: list[list[Piece]]) -> dict[str, Any]:
        choices = [self._choice(i, "".join(p.text for p in own), own, 0) for i, own in enumerate(pieces)]
        usages = final_usages(pieces)
        about = {"usage": self._usage(dict(enumerate(usages))), **self._reporting.of_response(usages)}
        return {**self._common, "choices": choices, **about}

    async def stream(self) -> AsyncGenerator[Message, None]:
        usages: dict[int, Usage] = {}
        offsets = [0] * len(self._generations)
        async with aclosing(merged(self._generations)) as pieces:
            async for index, piece in pieces:
                if piece.progress is not None:
                    yield piece.progress
                    continue
                if piece.usage is not None:
                    usages[index] = piece.usage
                yield self._part(index, piece, offsets[index], usages)
                offsets[index] += len(piece.text)
        if self._options and self._options.include_usage:
            yield {**self._common, "choices": [], "usage": self._usage(usages)}

    def _part(self, index: int, piece: Piece, offset: int, usages: dict[int, Usage]) -> dict[str, Any]:
        """One chunk of a stream."""
        chunk = {**self._common, "choices": [self._choice(index, piece.text, [piece], offset)]}
        chunk |= self._reporting.of_chunk(piece.usage, last=piece.finish is not None)
        if self._options and self._options.continuous_usage_stats:
            chunk["usage"] = self._usage(usages)
        return chunk

    def _choice(self, index: int, text: str, pieces: list[Piece], offset: int) -> dict[str, Any]:
        finish = pieces[-1].finish if pieces else None
        text, self._echoes[index] = self._echoes[index] + text, ""
        logprobs = None
        if self._body.logprobs is not None:
            tokens = [token for piece in pieces for token in piece.tokens]
            logprobs = completion_logprobs(self._service.runtime.tokenizer, tokens, offset)
        reason = None if finish is None else finish.value
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _usage(self, usages: dict[int, Usage]) -> dict[str, Any]:
        """The bill of the choices heard of so far. Every prompt counts once, however many choices it has."""
        fields = usage_fields(list(usages.values()))
        of_prompt = {index // self._per_prompt: usage for index, usage in usages.items()}
        counted = next(iter(usages)) // self._per_prompt  # by usage_fields, which bills the first one's prompt
        for usage in (usage for prompt, usage in of_prompt.items() if prompt != counted):
            fields["prompt_tokens"] += usage.prompt_tokens
            fields["total_tokens"] += usage.prompt_tokens
            fields["prompt_tokens_details"]["cached_tokens"] += usage.cached_tokens
            fields["prompt_cache_hit_tokens"] += usage.cached_tokens
            fields["prompt_cache_miss_tokens"] += usage.prompt_tokens - usage.cached_tokens
        return fields
