"""From logits to tokens, one row at a time, so that a request's choice never depends on its neighbours.

Randomness is a counter-based generator keyed by the request's seed and the output position: a request that was
preempted, moved or batched differently draws the same numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from thalweg.engine.request import Sequence
from thalweg.types import SampledToken, SamplingParams, TokenLogprob


class Sampler:
    """Chooses the next token of each sequence. `eos_token_ids` are masked while min_tokens is not reached."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos = eos_token_ids

    def sample(self, logits: Tensor, sequences: list[Sequence], seeds: list[int]) -> list[SampledToken]:
        """logits fp32 [O, vocab], one row per sequence; seeds one 64-bit number per sequence."""
        return [self._one(row, s, seed) for row, s, seed in zip(logits, sequences, seeds, strict=True)]

    def _one(self, raw: Tensor, sequence: Sequence, seed: int) -> SampledToken:
        params = sequence.request.sampling
        logits = self._adjusted(raw, sequence, params)
        if params.temperature == 0:
            token = int(logits.argmax())
        else:
            token = _draw(logits, params, _uniform(seed, sequence.output_tokens))
        return _with_logprobs(raw, token, params.logprobs)

    def _adjusted(self, raw: Tensor, sequence: Sequence, params: SamplingParams) -> Tensor:
        """Penalties and the min_tokens mask, on a copy if anything changes."""
        logits = raw
        if params.repetition_penalty != 1.0:
            logits = _repetition(logits.clone(), sequence, params.repetition_penalty)
        if params.presence_penalty or params.frequency_penalty:
            output = torch.from_numpy(sequence.tokens[sequence.prompt_tokens :].astype(np.int64)).to(raw.device)
            counts = torch.bincount(output, minlength=raw.shape[-1]).to(raw.dtype)
            logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        if sequence.output_tokens < params.min_tokens:
            logits = logits.clone()
            logits[list({*self._eos, *params.stop_token_ids})] = float("-inf")
        return logits


def _repetition(logits: Tensor, sequence: Sequence, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of every token seen in prompt or output."""
    seen = torch.from_numpy(np.unique(sequence.tokens).astype(np.int64)).to(logits.device)
    old = logits[seen]
    logits[seen] = torch.where(old > 0, old / penalty, old * penalty)
    return logits


def _uniform(seed: int, position: int) -> float:
    """A uniform number in [0, 1) that depends on the seed and the output position alone."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position])).random())


def _draw(logits: Tensor, params: SamplingParams, uniform: float) -> int:
    """Inverse-CDF draw from the truncated distribution, most likely tokens first (ties: lowest id first)."""
    scaled = logits.double() / params.temperature
    probabilities, order = torch.softmax(scaled, -1).sort(descending=True, stable=True)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if params.top_k > 0:
        keep[params.top_k :] = False
    if params.top_p < 1.0:
        keep &= probabilities.cumsum(-1) - probabilities < params.top_p
    if params.min_p > 0.0:
        keep &= probabilities >= params.min_p * probabilities[0]
    keep[0] = True
    weights = torch.where(keep, probabilities, torch.zeros_like(probabilities)).cumsum(-1)
    place = int(torch.searchsorted(weights, uniform * weights[-1], right=True))
    return int(order[min(place, int(keep.nonzero()[-1]))])


def _with_logprobs(raw: Tensor, token: int, wanted: int | None) -> SampledToken:
    if wanted is None:
        return SampledToken(token)
    logprobs = torch.log_softmax(raw.float(), -1)
    values, ids = logprobs.topk(min(wanted, raw.shape[-1])) if wanted else (logprobs[:0], logprobs[:0].long())
    top = tuple(TokenLogprob(int(i), float(v)) for i, v in zip(ids, values, strict=True))
    return SampledToken(token, float(logprobs[token]), top)
