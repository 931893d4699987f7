"""One short coroutine per endpoint. Runs on the event loop; holds no rules of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from pipeserve.config import Config
from pipeserve.engine.stats import EngineStats
from pipeserve.errors import EngineError, NotReadyError, TextTimeoutError
from pipeserve.server.generation import Choice, open_choices, run_together
from pipeserve.server.metrics import Metrics
from pipeserve.server.middleware import RECORD
from pipeserve.server.plan import Plan, plan_chat, plan_completion
from pipeserve.server.responses import (
    ChatReply,
    CompletionReply,
    FinishedChoice,
    Reply,
    Usage,
    model_object,
)
from pipeserve.server.sse import DONE, EVENT_STREAM, EventStream, event
from pipeserve.server.state import AppState, Phase, Services

CONFIG = web.AppKey("config", Config)
STATE = web.AppKey("state", AppState)
METRICS = web.AppKey("metrics", Metrics)

STATS_TIMEOUT_S = 1.0
"""A scrape does not wait longer for the engine: it may be stuck, which is what scrapes are for."""


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions"""
    return await _generate(request, plan_chat, ChatReply)


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions"""
    return await _generate(request, plan_completion, CompletionReply)


async def list_models(request: web.Request) -> web.Response:
    """GET /v1/models"""
    services = _loaded(request)
    model = model_object(services.card, services.engine.facts.context_length)
    return web.json_response({"object": "list", "data": [model]})


async def get_model(request: web.Request) -> web.Response:
    """GET /v1/models/{model}"""
    services = _loaded(request)
    services.card.check_name(request.match_info["model"])
    return web.json_response(model_object(services.card, services.engine.facts.context_length))


async def health(request: web.Request) -> web.Response:
    """GET /health: 200 when requests are taken, else 503 with the reason."""
    readiness = request.app[STATE].readiness
    statuses = {Phase.READY: "ok", Phase.DEGRADED: "degraded"}
    body = {
        "status": statuses.get(readiness.phase, "unavailable"),
        "reason": readiness.phase.value,
        "detail": readiness.detail,
    }
    return web.json_response(body, status=200 if readiness.takes_requests else 503)


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics"""
    body = request.app[METRICS].render(await _engine_stats(request.app[STATE].services))
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _engine_stats(services: Services | None) -> EngineStats | None:
    if services is None:
        return None
    try:
        async with asyncio.timeout(STATS_TIMEOUT_S):
            return await services.engine.stats()
    except (TimeoutError, EngineError):
        return None


def _loaded(request: web.Request) -> Services:
    services = request.app[STATE].services
    if services is None:
        raise NotReadyError(f"loading: {request.app[STATE].readiness.detail}")
    return services


async def _generate(
    request: web.Request, make_plan: Callable[[bytes, Services], Plan], reply_kind: type[Reply]
) -> web.StreamResponse:
    with request.app[STATE].admit() as services:
        body = await _read_body(request)
        services.engine.check_capacity(1)  # refused here, a request costs no text thread
        plan = await _off_the_loop(request, services, make_plan, body)
        record = request[RECORD]
        record.prompt_tokens = plan.num_prompt_tokens
        reply = reply_kind(
            card=services.card,
            tokenizer=services.tokenizer,
            has_logprobs=plan.has_logprobs,
            includes_usage=plan.includes_usage,
        )
        async with open_choices(services, plan, record) as choices:
            answer = _stream if plan.is_stream else _answer_whole
            response = await answer(request, plan, reply, choices)
        return response


async def _read_body(request: web.Request) -> bytes:
    limit = request.client_max_size
    if request.content_length is not None and request.content_length > limit:
        raise web.HTTPRequestEntityTooLarge(limit, request.content_length)
    return await request.read()


async def _off_the_loop(
    request: web.Request,
    services: Services,
    make_plan: Callable[[bytes, Services], Plan],
    body: bytes,
) -> Plan:
    timeout_s = request.app[CONFIG].text_timeout_s
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            return await loop.run_in_executor(services.text_executor, make_plan, body, services)
    except TimeoutError:
        raise TextTimeoutError(
            f"templating and tokenising the request took longer than {timeout_s:g} s "
            "(text_timeout_s); send less text or come back when the daemon is less busy"
        ) from None


async def _stream(
    request: web.Request, plan: Plan, reply: Reply, choices: list[Choice]
) -> web.StreamResponse:
    stream = EventStream(request)
    request[EVENT_STREAM] = stream

    async def pump(choice: Choice) -> None:
        opening = reply.opening(choice.index)
        events = [] if opening is None else [event(opening)]
        async for deltas in choice.deltas():
            events += [event(reply.delta(choice.index, delta)) for delta in deltas]
            if choice.finish_reason is not None:
                events.append(event(reply.closing(choice.index, choice.finish_reason)))
            await stream.send(events)
            events = []

    await run_together([pump(choice) for choice in choices])
    usage = reply.usage_chunk(_usage(plan, choices))
    return await stream.end([event(usage), DONE] if plan.includes_usage else [DONE])


async def _answer_whole(
    request: web.Request, plan: Plan, reply: Reply, choices: list[Choice]
) -> web.Response:
    finished: list[FinishedChoice | None] = [None] * len(choices)

    async def collect(choice: Choice) -> None:
        collected = [delta async for deltas in choice.deltas() for delta in deltas]
        assert choice.finish_reason is not None, "deltas end with a finish reason"
        finished[choice.index] = FinishedChoice(
            text="".join(delta.text for delta in collected),
            scored=[token for delta in collected for token in delta.scored],
            finish_reason=choice.finish_reason,
        )

    await run_together([collect(choice) for choice in choices])
    body = reply.whole([choice for choice in finished if choice], _usage(plan, choices))
    return web.json_response(text=body)


def _usage(plan: Plan, choices: list[Choice]) -> Usage:
    return Usage(
        prompt_tokens=plan.num_prompt_tokens,
        completion_tokens=sum(choice.num_tokens for choice in choices),
    )
