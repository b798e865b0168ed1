"""What a request may ask of an engine, checked before it is queued."""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.errors import ContextLengthError, RequestError
from thalweg.types import GenerateRequest


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Lengths in tokens. `max_waiting` counts open requests; `max_queue_seconds` None allows any wait."""

    max_model_len: int
    token_capacity: int
    vocab_size: int
    max_waiting: int
    eos_token_ids: tuple[int, ...]
    max_queue_seconds: float | None = None

    def output_limit(self, request: GenerateRequest) -> int:
        """How many tokens the request may produce.

        Raises RequestError for token ids that the model does not have and for a tenant or salt that is no text,
        ContextLengthError if prompt and output cannot fit.
        """
        self._check_ids(request)
        _check_texts(request)
        return self.output_limit_of(len(request.prompt), request.sampling.max_tokens)

    def output_limit_of(self, prompt: int, wanted: int | None) -> int:
        """The same by lengths alone. Raises ContextLengthError."""
        limit = min(self.max_model_len, self.token_capacity)
        if prompt + (wanted or 1) > limit:
            raise ContextLengthError(
                f"{prompt} prompt tokens + {wanted or 1} output tokens exceed max_model_len, {limit} tokens",
                param="max_tokens" if wanted and prompt + 1 <= limit else "prompt",
            )
        return wanted or limit - prompt

    def _check_ids(self, request: GenerateRequest) -> None:
        last, sampling = self.vocab_size - 1, request.sampling
        for name, ids in (
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", [i for i, _ in sampling.logit_bias]),
        ):
            wrong = next((token for token in ids if not 0 <= token <= last), None)
            if wrong is not None:
                raise RequestError(f"{name} has the token id {wrong}; ids go from 0 to {last}", param=name)
        if len(request.prompt) == 0:
            raise RequestError("the prompt has no tokens; at least one is needed", param="prompt")
        if int(request.prompt.min()) < 0 or int(request.prompt.max()) > last:
            raise RequestError(f"the prompt has a token id outside 0 to {last}", param="prompt")


def _check_texts(request: GenerateRequest) -> None:
    """Half of a surrogate pair has no bytes, and no digest."""
    for name, text in (("tenant", request.tenant), ("cache_salt", request.cache_salt)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"{name} is no valid text: {error}", param=name) from error
