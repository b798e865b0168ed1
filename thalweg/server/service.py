"""What every endpoint needs: the runtime, request limits and metrics."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from thalweg.engine.runtime import Runtime
from thalweg.errors import ContextLengthError, OverloadedError, RequestError, UnknownModelError, nearest
from thalweg.metrics.finished import FinishedRequest
from thalweg.metrics.prometheus import EngineGauges, PoolGauges, RequestMetrics
from thalweg.metrics.vllm_names import ModelLabels
from thalweg.server.access import Caller
from thalweg.server.generation import Generation, OutputReader
from thalweg.server.history import History
from thalweg.server.output_rules import OutputRuleMaker
from thalweg.server.record import RequestRecord
from thalweg.server.repeats import RepeatWatch
from thalweg.server.request_log import log_finished
from thalweg.types import GenerateRequest, OutputRules, SamplingParams, Timeline, TokenArray

LONG_TEXT = 20_000  # characters above which work leaves the event loop: about 10 ms of encoding

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Prompt:
    """An encoded prompt: tokens, where later prompts may diverge from it, and how early it is to be computed."""

    tokens: TokenArray
    hints: tuple[int, ...] = ()
    priority: int = 0


@dataclass(frozen=True, slots=True)
class CacheSpace:
    """The prefixes that a request may share: the caller's, divided further by the client's own salt."""

    caller: Caller
    salt: str


def new_id(prefix: str) -> str:
    """A response id that nobody can guess."""
    return f"{prefix}-{secrets.token_hex(12)}"


def new_call_id(index: int) -> str:
    """The id of an answer's tool call number `index`; unique among all answers."""
    return f"call_{index}_{secrets.token_hex(8)}"


class Service:
    """One loaded model behind HTTP."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.metrics = RequestMetrics(self._gauges, _labels(runtime))
        self.history = History()
        self.created = int(time.time())
        self.output_rules = OutputRuleMaker(runtime.tokenizer, runtime.engine.limits.eos_token_ids)
        self._watches: dict[str, RepeatWatch] = {}  # by tenant

    def check_model(self, name: str | None) -> None:
        """Raise UnknownModelError unless the request names this model, or none."""
        own = self.runtime.model_name
        if name is not None and name != own:
            raise UnknownModelError(
                f"no model {name!r} here; this server has {own!r}.{nearest(name, [own])}", param="model"
            )

    async def off_loop(self, size: int, work: Callable[[], Result]) -> Result:
        """Run CPU work of a large text in a thread, so that the event loop goes on answering."""
        return await asyncio.to_thread(work) if size > LONG_TEXT else work()

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a completion prompt: BOS and the text, in which control strings stay text."""
        tokenizer = self.runtime.tokenizer
        return [tokenizer.bos_id, *tokenizer.encode_text(text)]

    def prompt_of_ids(self, ids: list[int]) -> Prompt:
        """Token ids that a client sent. The engine checks them against the vocabulary."""
        if ids and max(ids) >= 2**31:
            raise RequestError("the prompt has a token id outside the vocabulary", param="prompt")
        return Prompt(np.array(ids, np.int32))

    def check_limits(self, caller: Caller, prompts: Sequence[Prompt], choices: int) -> None:
        """Whether the caller's API key may have so many choices of each prompt now.

        Raises ContextLengthError or RequestError where it never may, OverloadedError where it may later.
        """
        limits, wanted = caller.limits, len(prompts) * choices
        longest = max(len(prompt.tokens) for prompt in prompts)
        if limits.max_prompt_tokens is not None and longest > limits.max_prompt_tokens:
            raise ContextLengthError(
                f"{longest} prompt tokens exceed max_prompt_tokens of this API key, {limits.max_prompt_tokens}",
                param="prompt",
            )
        records = self.history.ledger(caller.tenant).open.values()
        most = limits.max_parallel_requests
        if most is not None and wanted > most:
            raise RequestError(f"{wanted} choices exceed max_parallel_requests of this API key, {most}", param="n")
        if most is not None and len(records) + wanted > most:
            raise OverloadedError(f"{len(records)} requests are open; max_parallel_requests of this API key is {most}")
        most = limits.max_queued_requests
        if most is not None and (queued := sum(record.queued for record in records)) >= most:
            raise OverloadedError(f"{queued} requests are queued; max_queued_requests of this API key is {most}")

    def start(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        reader: OutputReader,
        *,
        request_id: str,
        stops: tuple[str, ...] = (),
        cache: CacheSpace | None = None,
        rules: OutputRules | None = None,
    ) -> Generation:
        """Submit a request to the engine; must run on the event loop."""
        caller, salt = (cache.caller, cache.salt) if cache else (Caller(), "")
        request = GenerateRequest(
            request_id=request_id,
            prompt=prompt.tokens,
            sampling=sampling,
            tenant=caller.tenant,
            cache_salt=salt,
            cache_hints=prompt.hints,
            rules=rules,
            priority=prompt.priority,
            announce=True,
        )
        if caller.tenant not in self._watches:
            self._watches[caller.tenant] = RepeatWatch(caller.name, self.runtime.model_config.unit_tokens)
        on_served = self._watches[caller.tenant].begin(prompt.tokens)
        record = RequestRecord(request, caller, self.metrics, self._ended, self._timelines)
        generation = Generation(self.runtime.engine, request, reader, stops, record, on_served)
        self.history.begun(record)
        return generation

    def _timelines(self) -> Mapping[str, Timeline]:
        return self.runtime.engine.status().timelines

    def _ended(self, record: RequestRecord, finished: FinishedRequest) -> None:
        self.history.ended(record, finished)
        log_finished(finished)

    def _gauges(self) -> EngineGauges:
        status, plan = self.runtime.engine.status(), self.runtime.cache_plan
        specs = {spec.group.value: spec for spec in plan.groups}
        pools = tuple(
            PoolGauges(
                group=g.group,
                total_blocks=g.total_blocks,
                used_blocks=g.total_blocks - g.free_blocks - g.idle_blocks,
                cached_blocks=g.cached_blocks,
                block_bytes=plan.layout.block_bytes(specs[g.group]),
                block_rows=sum(s.rows_per_block * len(s.layers) for s in specs[g.group].streams),
            )
            for g in status.groups
        )
        chosen = self.runtime.kernel_set
        return EngineGauges(
            status.running,
            status.waiting,
            pools,
            status.counters,
            self.runtime.engine.tiers(),
            {choice.op: choice.backend for choice in chosen.choices},
            loading=status.loading,
            compilations=chosen.compilations.in_serving,
        )


def _labels(runtime: Runtime) -> ModelLabels:
    plan, unit = runtime.cache_plan, runtime.model_config.unit_tokens
    return ModelLabels(
        model_name=runtime.model_name,
        block_tokens=unit,
        blocks=plan.token_capacity // unit,
        cache_dtype=plan.layout.kv.value,
        prefix_caching=runtime.prefix_caching,
    )
