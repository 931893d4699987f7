"""The HTTP side on a real socket with the production runner, over a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass

import aiohttp
import openai
import pytest
from aiohttp import web

from pipeserve.config import Config
from pipeserve.server.api_keys import ApiKeys
from pipeserve.server.app import build_app, make_runner
from pipeserve.server.options import LiveOptions
from pipeserve.server.state import AppState, ModelCard, Services
from pipeserve.server.text_pool import TextPool
from pipeserve.text.chat_template import ChatTemplate
from pipeserve.text.grammar import GrammarCompiler
from tests.server.fakes import ByteTokenizer, ScriptedEngine

TEMPLATE = (
    "{{ prefix }}"
    "{% for message in messages %}"
    "{% if message.content == 'refuse' %}{{ raise_exception('I refuse') }}{% endif %}"
    "{{ message.role }}:{{ message.content }}{{ suffix }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server and its insides."""

    host: str
    port: int
    state: AppState
    services: Services
    engine: ScriptedEngine
    http: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def async_openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def sync_openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    async def post(self, path: str, body: object) -> tuple[int, dict[str, object]]:
        """Status and body of a POST; a body of bytes is sent as it is."""
        if isinstance(body, bytes):
            response = self.http.post(f"{self.url}{path}", data=body)
        else:
            response = self.http.post(f"{self.url}{path}", json=body)
        async with response as answer:
            return answer.status, await answer.json()


def make_services(engine: ScriptedEngine, text_pool: TextPool) -> Services:
    return Services(
        engine=engine.client,
        tokenizer=ByteTokenizer(),
        chat_template=ChatTemplate(TEMPLATE, bos_token="<|begin|>", eos_token="<|end|>"),
        card=ModelCard(name="tiny", created=1_700_000_000, fingerprint="fp_test"),
        grammars=GrammarCompiler(ByteTokenizer, vocab_size=ByteTokenizer.vocab_size),
        text_pool=text_pool,
    )


@asynccontextmanager
async def running_server(
    config: Config | None = None, keys: ApiKeys | None = None
) -> AsyncIterator[Server]:
    """A server that is still loading; `server.state.ready(server.services)` opens it."""
    state = AppState()
    options = LiveOptions(config or Config(), keys)
    runner = make_runner(build_app(state, options), options, shutdown_timeout_s=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    engine = ScriptedEngine()
    with closing(TextPool(2)) as text_pool:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as http:
            yield Server(
                host=host,
                port=port,
                state=state,
                services=make_services(engine, text_pool),
                engine=engine,
                http=http,
            )
        await runner.cleanup()
    engine.client.shut_down()


@pytest.fixture
async def loading_server() -> AsyncIterator[Server]:
    async with running_server() as server:
        yield server


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running_server(Config(max_body_bytes=64 * 1024)) as server:
        server.state.ready(server.services)
        yield server
        async with asyncio.timeout(10):  # no request is left behind, whatever the test did
            await server.state.wait_idle()
        assert server.engine.client.num_live == 0
