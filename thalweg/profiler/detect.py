"""What an endpoint is and can say: found by asking, with no server's name known beforehand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

from thalweg.errors import UnavailableError
from thalweg.profiler.client import Client, Form
from thalweg.profiler.counters import hit_tokens, running_requests, stated_capacity
from thalweg.profiler.profile import EndpointFacts
from thalweg.profiler.prompts import Prompts

_PROBE_TOKENS = 1500  # enough for any cache's unit
_OUTPUT = 16
_NO_CACHED = "cached tokens: not reported; hits are told {}"


async def detect(client: Client, model: str | None, seed: int) -> tuple[EndpointFacts, Form]:
    """Raises UnavailableError if nothing answers there, or no known form of request is accepted."""
    listed = await client.get("/v1/models")
    card = _first_card(_json(listed), model)
    name = model or card.get("id")
    if name is None:
        raise UnavailableError(f"{client.url} lists no model; name one with --model")
    prompts = Prompts(seed)
    form = await _accepted(client, str(name), prompts)
    text = prompts.cold("detect", prompts.characters(_PROBE_TOKENS))
    first = await client.ask(form, text, _OUTPUT)
    again = await client.ask(form, text, _OUTPUT)
    forced = form.forced and first.completion_tokens == again.completion_tokens == _OUTPUT
    version = _json(await client.get("/version")).get("version")
    response = await client.get("/metrics")
    metrics = "" if response is None else response.text
    counted, others = hit_tokens(metrics) is not None, running_requests(metrics)
    usage, cached = again.prompt_tokens is not None, again.cached_tokens is not None
    notes = [
        *([] if listed is not None else ["/v1/models: not there"]),
        *([] if usage else ["usage: not reported; tokens are estimated from characters and chunks"]),
        *([] if cached else [_NO_CACHED.format("by the counter of /metrics" if counted else "by time")]),
        *([] if forced else ["output length: cannot be forced; answers may be shorter than asked for"]),
        *([] if response is not None else ["/metrics: not there"]),
        *([f"{others} requests of others are running: times are with them"] if others else []),
        *([] if form.api == "completions" else ["/v1/completions: not accepted; prompts are chat messages"]),
    ]
    longest = card.get("max_model_len") or (card.get("meta") or {}).get("n_ctx_train")
    server = listed.headers.get("server") if listed is not None else None
    facts = EndpointFacts(
        client.url,
        str(name),
        longest,
        version,
        server,
        form.api,
        cached,
        counted,
        usage,
        forced,
        stated_capacity(metrics),
        tuple(notes),
    )
    return facts, form


async def _accepted(client: Client, model: str, prompts: Prompts) -> Form:
    """The first form of request that is answered, those that say most tried first."""
    said = ""
    for api, forced, usage in product(("completions", "chat"), (True, False), (True, False)):
        form = Form(model, api, forced, usage)
        try:
            await client.ask(form, prompts.cold("form", 200), 2)
        except UnavailableError as error:
            said = error.message
            continue
        return form
    raise UnavailableError(f"{client.url} accepts no request that is known here; the last answer: {said}")


def _json(response: Any) -> dict[str, Any]:
    """The body as an object; an empty one where it is none."""
    try:
        body = response.json()
    except (AttributeError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _first_card(body: dict[str, Any], model: str | None) -> dict[str, Any]:
    data = body.get("data")
    cards = [card for card in data if isinstance(card, dict)] if isinstance(data, list) else []
    return next((c for c in cards if model in (None, c.get("id"))), {})


def same_endpoint(facts: EndpointFacts) -> dict[str, Any]:
    """What must be the same for samples to be put together."""
    kept = replace(facts, notes=())
    return {"url": kept.url, "model": kept.model, "max_model_len": kept.max_model_len, "version": kept.version}
