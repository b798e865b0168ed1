"""Serving figures that need no simulation: first-token times, time per token at a concurrency, queues of equal prompts.

Prompts are computed in chunks, each priced behind the tokens before it, and summed: the price of one oversized chunk
would be several times too high. Queues are first come, first served: k equal prompts take k times as long as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from thalweg.errors import ConfigError
from thalweg.planner.cost import Estimate, StepWork, total
from thalweg.planner.hardware import accelerator
from thalweg.planner.memory_model import session_need
from thalweg.planner.step_cost import ModelStepCost


class Serving:
    """Closed forms over a step cost. Concurrency counts requests of one engine; data parallel ranks share them."""

    def __init__(self, cost: ModelStepCost) -> None:
        self.cost = cost
        self._deployment = cost.deployment

    def chunks(self, prompt_tokens: int, reused_tokens: int = 0) -> Iterator[StepWork]:
        """The steps of one prompt, beginning behind what a cache holds of it; the last one samples."""
        if not 0 <= reused_tokens < prompt_tokens:
            raise ConfigError(
                f"reused_tokens: {reused_tokens} of a prompt of {prompt_tokens}: at least one is computed",
                param="reused_tokens",
            )
        start = reused_tokens
        while start < prompt_tokens:
            new = min(self._deployment.chunk_tokens, prompt_tokens - start)
            yield StepWork(((new, start),), sampled=int(start + new == prompt_tokens))
            start += new

    def cold_ttft(self, prompt_tokens: int) -> Estimate:
        """From admission to the first token, alone and with nothing cached."""
        return self.warm_ttft(prompt_tokens, 0)

    def warm_ttft(self, prompt_tokens: int, reused_tokens: int, loaded_bytes: int = 0) -> Estimate:
        """The same with a cached beginning, of which `loaded_bytes` come over the host link first."""
        steps = total(self.cost.estimate(step) for step in self.chunks(prompt_tokens, reused_tokens))
        load = loaded_bytes / accelerator(self._deployment.device).host_link
        return Estimate(steps.seconds + load, steps.low + load, steps.high + load, steps.origin)

    def tokens_per_step(self) -> float:
        """Tokens that a decode step yields per sequence."""
        return self._deployment.speculation.accepted if self._deployment.speculation else 1.0

    def decode_step(self, concurrency: int, context: int) -> Estimate:
        """One step of a rank's share of the decodes."""
        batch = math.ceil(concurrency / self._deployment.layout.dp)
        speculation = self._deployment.speculation
        return self.cost.estimate(StepWork.decode(batch, context, 1 + speculation.drafts if speculation else 1))

    def tpot(self, concurrency: int, prompt_tokens: int, output_tokens: int) -> Estimate:
        """Seconds between tokens in a closed loop: a request decodes through the prompts of all others of its rank.

        So it is in a steady loop; requests that began together each wait for half of the others, which the interval
        allows for.
        """
        step = self.decode_step(concurrency, prompt_tokens + output_tokens // 2) * (1 / self.tokens_per_step())
        others = math.ceil(concurrency / self._deployment.layout.dp) - 1
        if not others:
            return step
        waits = self.cold_ttft(prompt_tokens) * (others / output_tokens)
        return total((step, replace(waits, low=waits.low / 2)))

    def makespan(self, prompts: int, prompt_tokens: int) -> Estimate:
        """Until the last of equal prompts that arrive together has its first token; ranks share them evenly."""
        return self.cold_ttft(prompt_tokens) * math.ceil(prompts / self._deployment.layout.dp)

    def queued_ttft(self, prompts: int, prompt_tokens: int) -> Estimate:
        """The median first-token time of equal prompts that arrive together."""
        each = math.ceil(prompts / self._deployment.layout.dp)
        return self.cold_ttft(prompt_tokens) * ((each + 1) / 2)


class SplitServing:
    """Prompts on one engine, decodes on another: a prompt's cache rows cross the network before its first token, and no
    prompt delays a decode."""

    def __init__(self, prefill: Serving, decode: Serving) -> None:
        self.prefill, self.decode = prefill, decode

    def transfer_seconds(self, prompt_tokens: int) -> float:
        """A prompt's rows over one GPU's share of the network: every tensor parallel rank sends its own copy."""
        model = self.prefill.cost.model
        rows = session_need(model, "thalweg", 0, prefix_caching=False).bytes(prompt_tokens)
        return rows / accelerator(self.prefill.cost.deployment.device).network

    def cold_ttft(self, prompt_tokens: int) -> Estimate:
        """From admission to the first token, with nothing cached."""
        computed, moved = self.prefill.cold_ttft(prompt_tokens), self.transfer_seconds(prompt_tokens)
        return Estimate(computed.seconds + moved, computed.low + moved, computed.high + moved, computed.origin)

    def tpot(self, concurrency: int, prompt_tokens: int, output_tokens: int) -> Estimate:
        """Seconds between tokens of so many requests on the decode engine."""
        step = self.decode.decode_step(concurrency, prompt_tokens + output_tokens // 2)
        return step * (1 / self.decode.tokens_per_step())

    def prefill_engines(self, concurrency: int, prompt_tokens: int, output_tokens: int) -> float:
        """Prefill engines that keep one decode engine busy."""
        each = self.prefill.cold_ttft(prompt_tokens).seconds / self.prefill.cost.deployment.layout.dp
        return concurrency * each / (output_tokens * self.tpot(concurrency, prompt_tokens, output_tokens).seconds)
