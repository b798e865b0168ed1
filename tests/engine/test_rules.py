"""Outputs that keep to rules: masks of one row, ends, failures, and outputs that are preempted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.assembly import EOS, Shape, answer, model_engine, prompt_of, submit
from tests.model.fields import FLASH_LIKE
from thalweg.engine.request import Sequence
from thalweg.engine.sampler import Sampler
from thalweg.errors import GrammarError, RequestError
from thalweg.types import AllowedTokens, FinishReason, GenerateRequest, SamplingParams, TokenArray


@dataclass(frozen=True)
class Steps:
    """Rules that say what the token number n may be; behind the last step anything goes."""

    steps: tuple[AllowedTokens | None, ...]
    end: bool = False

    def start(self) -> StepsState:
        return StepsState(self)


class StepsState:
    def __init__(self, rules: Steps) -> None:
        self._rules = rules
        self._seen: list[int] = []

    def allowed(self, output: TokenArray) -> AllowedTokens | None:
        assert output.tolist()[: len(self._seen)] == self._seen, "an output only grows"
        self._seen = output.tolist()
        steps = self._rules.steps
        return steps[len(output)] if len(output) < len(steps) else None

    def ends_with(self, token: int) -> bool:
        return self._rules.end and token == EOS


def mask(*ids: int, may_end: bool = False, **more: Any) -> AllowedTokens:
    bits = np.zeros(128, np.uint8)
    bits[list(ids)] = 1
    return AllowedTokens(mask=np.packbits(bits, bitorder="little").tobytes(), may_end=may_end, **more)


LOGITS = torch.tensor([2.0, 4.0, 0.5, 0.0, -1.0, 3.0])


def chosen(step: AllowedTokens | None, output: tuple[int, ...] = (), **params: Any) -> Any:
    params = {"temperature": 0.0, **params}
    rules = Steps((step,) * 9)
    request = GenerateRequest("r", np.array([4], np.int32), SamplingParams(**params), rules=rules)
    sequence = Sequence(request, lambda event: None, 100, 0.0)
    for token in output:
        sequence.append(token)
    return Sampler((EOS,)).sample(LOGITS[None], [sequence], [0])[0]


def test_a_mask_and_what_it_does_not_touch() -> None:
    free = chosen(None, logprobs=2)
    held = chosen(mask(2, 3), logprobs=2)
    assert (free.token, held.token) == (1, 2)
    raw = torch.log_softmax(LOGITS, -1)
    assert held.logprob == pytest.approx(float(raw[2])) and held.top == free.top
    assert chosen(mask(2, 3), temperature=1.5, top_p=0.01).token == 2
    assert chosen(AllowedTokens(banned=(1,))).token == 5
    assert chosen(AllowedTokens(forced=4), logprobs=0).logprob == pytest.approx(float(raw[4]))
    assert torch.equal(LOGITS, torch.tensor([2.0, 4.0, 0.5, 0.0, -1.0, 3.0])), "the logits are another's too"


def test_the_end_comes_only_where_rules_and_limits_let_it() -> None:
    assert chosen(mask(2, may_end=True)).token == EOS
    assert chosen(mask(2, EOS, may_end=False)).token == 2, "whatever the mask has for it"
    assert chosen(mask(2, may_end=True), min_tokens=1).token == 2
    assert chosen(mask(2, may_end=True), min_tokens=1, output=(3,)).token == EOS
    assert chosen(mask(2, may_end=True), ignore_eos=True).token == 2
    assert chosen(mask(may_end=True), ignore_eos=True, min_tokens=5).token == EOS, "nothing else is left"
    assert chosen(mask(3), stop_token_ids=(3,), min_tokens=5).token == 3


def test_biases_and_penalties_come_before_the_mask() -> None:
    assert chosen(None, logit_bias=((1, -100.0), (4, 100.0))).token == 4
    assert chosen(mask(2, 3), logit_bias=((1, 100.0), (3, 1.0))).token == 3
    assert chosen(mask(3), logit_bias=((3, -100.0),)).token == 3, "the only one that may come"
    assert chosen(mask(2, 3), output=(2,), presence_penalty=1.0).token == 3


def test_a_dead_end_fails_alone() -> None:
    assert isinstance(chosen(mask()), GrammarError)
    engine = model_engine(FLASH_LIKE, Shape())
    dead = Steps((None, None, mask()))
    try:
        failing = submit(engine, "dead", prompt_of(1, 40), rules=dead)
        others = [submit(engine, str(i), prompt_of(i, 30), max_tokens=12) for i in range(3)]
        assert failing.done.wait(60) and all(outcome.done.wait(60) for outcome in others)
        assert failing.last.finish is FinishReason.ERROR and isinstance(failing.last.error, GrammarError)
        assert len(failing.tokens) == 2 and all(len(outcome.tokens) == 12 for outcome in others)
        assert engine.status().running == 0
    finally:
        engine.close()


def test_the_end_of_a_grammar_ends_the_output() -> None:
    engine = model_engine(FLASH_LIKE, Shape())
    try:
        ended = answer(engine, "x", prompt_of(1, 40), rules=Steps((mask(5), AllowedTokens(forced=EOS)), end=True))
        assert (ended.tokens, ended.last.finish) == ([5, EOS], FinishReason.STOP), "whatever ignore_eos says"
        cut = answer(engine, "y", prompt_of(1, 40), rules=Steps((mask(5),) * 9, end=True), max_tokens=3)
        assert (cut.tokens, cut.last.finish) == ([5] * 3, FinishReason.LENGTH)
        for field in ({"logit_bias": ((97 + 2000, 1.0),)}, {"stop_token_ids": (-1,)}):
            with pytest.raises(RequestError) as caught:
                submit(engine, "z", prompt_of(1, 4), **field)
            assert caught.value.param == next(iter(field))
    finally:
        engine.close()


def test_preemption_and_company_leave_rules_alone() -> None:
    """Requests that give way again and again, each with a mask of its own for every token."""
    rng = np.random.default_rng(3)

    def rules() -> Steps:
        return Steps(
            tuple(mask(*rng.choice(np.arange(2, 97), 9, replace=False).tolist()) for _ in range(300)), end=True
        )

    wanted = [rules() for _ in range(5)]
    prompts = [prompt_of(i, 100 + 40 * i) for i in range(5)]
    alone, crowd = model_engine(FLASH_LIKE, Shape(prefix_caching=False)), model_engine(FLASH_LIKE, Shape(), units=8)
    try:
        options = {"max_tokens": 200, "temperature": 0.8, "seed": 5}
        expected = [
            answer(alone, str(i), p, rules=r, **options).tokens
            for i, (p, r) in enumerate(zip(prompts, wanted, strict=True))
        ]
        outcomes = [
            submit(crowd, str(i), p, rules=r, **options) for i, (p, r) in enumerate(zip(prompts, wanted, strict=True))
        ]
        assert all(outcome.done.wait(120) for outcome in outcomes)
        assert [outcome.tokens for outcome in outcomes] == expected
        assert crowd.status().counters["preemptions"] > 0
    finally:
        alone.close()
        crowd.close()
