"""From logits to tokens. A request's choice never depends on its neighbours.

Rows of which only a token is wanted are drawn together, and their tokens read from the device at once. The others are
taken one at a time: penalties and biases change logits, then the rules of the request's output mask them, then the
truncations draw. Log-probabilities are those of the raw logits.

Randomness is a counter-based generator keyed by the request's seed and the output position: a request that was
preempted, moved or batched differently draws the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from thalweg.engine.request import Sequence
from thalweg.errors import EngineError, GrammarError, ThalwegError
from thalweg.kernels.ops import Sample
from thalweg.kernels.reference.sampling import sample
from thalweg.types import AllowedTokens, SampledToken, SamplingParams, TokenLogprob

_log = logging.getLogger("thalweg.engine")


class Sampler:
    """Chooses the next token of each sequence. `eos_token_ids` are masked while min_tokens is not reached."""

    def __init__(self, eos_token_ids: tuple[int, ...], kernel: Sample = sample) -> None:
        self._eos = eos_token_ids
        self._kernel = kernel

    def sample(self, logits: Tensor, sequences: list[Sequence], seeds: list[int]) -> list[SampledToken | ThalwegError]:
        """logits fp32 [O, vocab], one row per sequence; seeds one 64-bit number per sequence. For a sequence whose
        rules leave no token, or whose rules or parameters fail, that error."""
        plain = [row for row, sequence in enumerate(sequences) if self._is_plain(sequence)]
        tokens = dict(zip(plain, self._together(logits, plain, sequences, seeds), strict=True))
        return [
            SampledToken(tokens[row]) if row in tokens else self._one(logits[row], sequence, seed)
            for row, (sequence, seed) in enumerate(zip(sequences, seeds, strict=True))
        ]

    def _is_plain(self, sequence: Sequence) -> bool:
        """Whether the logits alone decide, and nothing but the token is asked for."""
        params = sequence.request.sampling
        changed = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        held = sequence.output_tokens < params.min_tokens
        return not (sequence.rules or params.logprobs is not None or changed or params.logit_bias or held)

    def _together(self, logits: Tensor, rows: list[int], sequences: list[Sequence], seeds: list[int]) -> list[int]:
        """Tokens of these rows, with one wait for the device."""
        if not rows:
            return []
        if len(rows) < len(sequences):
            logits = logits.index_select(0, _sent(rows, torch.int64, logits.device))
        return self._draw(logits, [sequences[row] for row in rows], [seeds[row] for row in rows])

    def _draw(self, logits: Tensor, sequences: list[Sequence], seeds: list[int]) -> list[int]:
        """A token for each row of logits [n, vocab]. Waits for the device once."""
        asked = [sequence.request.sampling for sequence in sequences]
        if all(params.temperature == 0 for params in asked):
            return list(map(int, logits.argmax(-1).tolist()))
        controls = [
            (params.temperature, params.top_k, params.top_p, params.min_p, _uniform(seed, sequence.output_tokens))
            for params, sequence, seed in zip(asked, sequences, seeds, strict=True)
        ]
        return list(map(int, self._kernel(logits, _sent(controls, torch.float64, logits.device)).tolist()))

    def _one(self, raw: Tensor, sequence: Sequence, seed: int) -> SampledToken | ThalwegError:
        try:
            return self._sampled(raw, sequence, seed)
        except GrammarError as error:
            return error
        except Exception as error:  # its rules or parameters fail: nothing to its neighbours
            _log.exception("no token could be sampled for request %s", sequence.request_id)
            return EngineError(f"no token could be sampled: {error}")

    def _sampled(self, raw: Tensor, sequence: Sequence, seed: int) -> SampledToken:
        params = sequence.request.sampling
        allowed = None if sequence.rules is None else sequence.rules.allowed(sequence.output)
        if allowed is not None and allowed.forced is not None:
            return _with_logprobs(raw, allowed.forced, params.logprobs)
        logits = self._masked(_adjusted(raw, sequence, params), sequence, allowed)
        token = self._draw(logits[None], [sequence], [seed])[0]
        return _with_logprobs(raw, token, params.logprobs)

    def _masked(self, logits: Tensor, sequence: Sequence, allowed: AllowedTokens | None) -> Tensor:
        """The rules' mask, then what min_tokens and ignore_eos hold back, unless nothing else would be left."""
        params = sequence.request.sampling
        held: set[int] = set()
        if sequence.output_tokens < params.min_tokens:
            held = {*self._eos, *params.stop_token_ids}
        if allowed is not None:
            logits = self._within(logits, allowed)
            if params.ignore_eos and allowed.mask is not None:
                held |= set(self._eos)
        if not held:
            return logits
        without = logits.clone()
        without[list(held)] = float("-inf")
        return without if allowed is None or bool(without.max() > float("-inf")) else logits

    def _within(self, logits: Tensor, allowed: AllowedTokens) -> Tensor:
        """A copy in which what is not allowed is minus infinity."""
        if allowed.mask is not None:
            logits = torch.where(self._allowed_ids(allowed, logits), logits, float("-inf"))
        elif allowed.banned:
            logits = logits.clone()
        if allowed.banned:
            logits[list(allowed.banned)] = float("-inf")
        return logits

    def _allowed_ids(self, allowed: AllowedTokens, logits: Tensor) -> Tensor:
        """bool [vocab], at least one of them true. Ids past the tokenizer's are never allowed."""
        assert allowed.mask is not None
        ids = np.unpackbits(np.frombuffer(allowed.mask, np.uint8), count=logits.shape[-1], bitorder="little")
        ids[list(self._eos)] = allowed.may_end
        if not ids.any():
            raise GrammarError("the grammar of this output leaves no token that could come next")
        return torch.from_numpy(ids.view(np.bool_)).to(logits.device)


def _adjusted(raw: Tensor, sequence: Sequence, params: SamplingParams) -> Tensor:
    """Penalties and biases, on a copy if anything changes."""
    logits = raw
    if params.repetition_penalty != 1.0:
        logits = _repetition(logits.clone(), sequence, params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        output = torch.from_numpy(sequence.output.astype(np.int64)).to(raw.device)
        counts = torch.bincount(output, minlength=raw.shape[-1]).to(raw.dtype)
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    if params.logit_bias:
        tokens, biases = zip(*params.logit_bias, strict=True)
        ids = torch.tensor(tokens, device=raw.device)
        logits = logits.index_add(-1, ids, torch.tensor(biases, dtype=raw.dtype, device=raw.device))
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


def _sent(values: SequenceOf[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a device, without a wait for it."""
    here = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return here.to(device, non_blocking=True)


def _with_logprobs(raw: Tensor, token: int, wanted: int | None) -> SampledToken:
    if wanted is None:
        return SampledToken(token)
    logprobs = torch.log_softmax(raw.float(), -1)
    values, ids = logprobs.topk(min(wanted, raw.shape[-1])) if wanted else (logprobs[:0], logprobs[:0].long())
    top = tuple(TokenLogprob(int(i), float(v)) for i, v in zip(ids, values, strict=True))
    return SampledToken(token, float(logprobs[token]), top)
