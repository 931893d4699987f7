"""One short coroutine per endpoint. Runs on the event loop; holds no rules of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from pipeserve.config import Config
from pipeserve.engine.stats import EngineStats
from pipeserve.errors import EngineError, NotReadyError, TextTimeoutError
from pipeserve.server.chat_replies import ChatReply
from pipeserve.server.completion_replies import CompletionReply
from pipeserve.server.generation import Choice, Delta, open_choices, run_together
from pipeserve.server.incoming import read_body
from pipeserve.server.json_pieces import send_json
from pipeserve.server.metrics import Metrics
from pipeserve.server.middleware import RECORD
from pipeserve.server.options import LiveOptions
from pipeserve.server.plan import Plan, plan_chat, plan_completion
from pipeserve.server.responses import (
    FinishedChoice,
    Reply,
    ScoreColumns,
    Usage,
    model_object,
)
from pipeserve.server.sse import DONE, EVENT_STREAM, EventStream, event
from pipeserve.server.state import AppState, Phase, Services
from pipeserve.server.text_requests import (
    apply_template,
    detokenize,
    tokenize,
    tokenizer_info,
)
from pipeserve.text.answer import AnswerParts

OPTIONS = web.AppKey("options", LiveOptions)
STATE = web.AppKey("state", AppState)
METRICS = web.AppKey("metrics", Metrics)
OPENAPI = web.AppKey("openapi", str)
"""The OpenAPI document."""

T = TypeVar("T")
TextJob = Callable[[bytes, Services, bool], T]
"""Text work on a body; the last argument says whether unknown fields are refused."""

STATS_TIMEOUT_S = 1.0
"""A scrape does not wait longer for the engine: it may be stuck, which is what scrapes are for."""


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions"""
    return await _generate(request, plan_chat, ChatReply)


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions"""
    return await _generate(request, plan_completion, CompletionReply)


async def tokenize_text(request: web.Request) -> web.StreamResponse:
    """POST /tokenize"""
    return await _answer_text(request, tokenize)


async def detokenize_tokens(request: web.Request) -> web.StreamResponse:
    """POST /detokenize"""
    return await _answer_text(request, detokenize)


async def render_template(request: web.Request) -> web.StreamResponse:
    """POST /apply-template"""
    return await _answer_text(request, apply_template)


async def describe_tokenizer(request: web.Request) -> web.Response:
    """GET /tokenizer_info"""
    return web.json_response(tokenizer_info(_loaded(request)))


async def openapi(request: web.Request) -> web.Response:
    """GET /openapi.json"""
    return web.json_response(text=request.app[OPENAPI])


async def list_models(request: web.Request) -> web.Response:
    """GET /v1/models"""
    services = _loaded(request)
    return web.json_response({"object": "list", "data": [model_object(services)]})


async def get_model(request: web.Request) -> web.Response:
    """GET /v1/models/{model}"""
    services = _loaded(request)
    services.card.check_name(request.match_info["model"])
    return web.json_response(model_object(services))


async def health(request: web.Request) -> web.Response:
    """GET /health: 200 when requests are taken, else 503 with the reason."""
    readiness = request.app[STATE].readiness
    statuses = {Phase.READY: "ok", Phase.UNLOADED: "ok", Phase.DEGRADED: "degraded"}
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


async def _answer_text(request: web.Request, job: TextJob[list[str]]) -> web.StreamResponse:
    body = await read_body(request, request.app[OPTIONS].config)
    services = _loaded(request)
    return await send_json(request, await _off_the_loop(request, services, job, body))


async def _generate(
    request: web.Request, make_plan: TextJob[Plan], reply_kind: type[Reply]
) -> web.StreamResponse:
    # First, since the engine may be replaced while it comes.
    body = await read_body(request, request.app[OPTIONS].config)
    async with request.app[STATE].admit() as services:
        services.engine.check_capacity(1)  # refused here, a request costs no text thread
        plan = await _off_the_loop(request, services, make_plan, body)
        record = request[RECORD]
        record.prompt_tokens = plan.num_prompt_tokens
        reply = reply_kind(card=services.card, tokenizer=services.tokenizer, plan=plan)
        timeout_s = _timeout_s(plan, request.app[OPTIONS].config)
        async with open_choices(services, plan, record, timeout_s=timeout_s) as choices:
            answer = _stream if plan.is_stream else _answer_whole
            response = await answer(request, plan, reply, choices)
        return response


def _timeout_s(plan: Plan, config: Config) -> float | None:
    """The request's own timeout or the daemon's, whichever is shorter."""
    given = [each for each in (plan.timeout_s, config.request_timeout_s) if each is not None]
    return min(given, default=None)


async def _off_the_loop(
    request: web.Request,
    services: Services,
    job: TextJob[T],
    body: bytes,
) -> T:
    config = request.app[OPTIONS].config
    timeout_s = config.text_timeout_s
    try:
        return await services.text_pool.run(timeout_s, job, body, services, config.strict_fields)
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
        def events(deltas: list[Delta]) -> list[bytes]:
            sent = [event(reply.delta(choice.index, delta)) for delta in deltas]
            if choice.finish_reason is not None:
                sent.append(event(reply.closing(choice)))
            return sent

        opening = reply.opening(choice.index)
        opened = [] if opening is None else [event(opening)]
        while choice.finish_reason is None:
            deltas = await choice.next_deltas()
            await stream.send([*opened, *events(deltas)])
            opened = []
            if choice.finish_reason is None:
                await choice.feed(lambda deltas: stream.send_now(events(deltas)))

    await run_together([pump(choice) for choice in choices])
    usage = reply.usage_chunk(_usage(plan, choices))
    return await stream.end([event(usage), DONE] if plan.includes_usage else [DONE])


async def _answer_whole(
    request: web.Request, plan: Plan, reply: Reply, choices: list[Choice]
) -> web.StreamResponse:
    finished: list[FinishedChoice | None] = [None] * len(choices)

    async def collect(choice: Choice) -> None:
        parts: list[AnswerParts] = []
        scores: list[ScoreColumns] = []
        while choice.finish_reason is None:
            deltas = await choice.next_deltas()
            parts += [delta.parts for delta in deltas]
            # Now, since those of all tokens at the end would hold up everybody else.
            scores += [reply.score(delta.scored) for delta in deltas if delta.scored]
        assert choice.finish_reason is not None, "deltas end with a finish reason"
        finished[choice.index] = FinishedChoice(
            choice=choice,
            parts=AnswerParts.joined(parts),
            scores=scores,
        )

    await run_together([collect(choice) for choice in choices])
    pieces = reply.whole([choice for choice in finished if choice], _usage(plan, choices))
    return await send_json(request, pieces)


def _usage(plan: Plan, choices: list[Choice]) -> Usage:
    return Usage(
        prompt_tokens=plan.num_prompt_tokens,
        cached_tokens=_num_cached_tokens(plan, choices),
        completion_tokens=sum(choice.num_tokens for choice in choices),
        reasoning_tokens=sum(choice.num_reasoning_tokens for choice in choices),
    )


def _num_cached_tokens(plan: Plan, choices: list[Choice]) -> int:
    """Of all prompts, each counted once: what none of its choices computed."""
    counts = [choice.num_cached_tokens for choice in choices]
    firsts = range(0, len(counts), plan.num_choices)
    return sum(min(counts[first : first + plan.num_choices]) for first in firsts)
