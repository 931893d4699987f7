"""Reads a request's body within the limits on its size, its time and what JSON makes of it.

Runs on the event loop.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from pipeserve.config import Config
from pipeserve.errors import InvalidParameterError

PROGRESS_BYTES = 64 * 1024
"""Of a body, in each of which a client may take its time."""
MAX_JSON_VALUES = 1_000_000
"""Some bytes of JSON become fifty of memory each: bounds that. The parser itself refuses what is
nested more than 200 deep (pydantic-core's jiter)."""


async def read_body(request: web.Request, config: Config) -> bytes:
    """The whole body, unpacked where it was compressed.

    Raises:
        HTTPRequestEntityTooLarge: it has more than max_body_bytes, packed or unpacked.
        HTTPRequestTimeout: it took longer than client_timeout_s, which begins anew with every
            PROGRESS_BYTES.
        InvalidParameterError: it would hold too many values.
    """
    limit = int(config.max_body_bytes)
    if request.content_length is not None and request.content_length > limit:
        raise web.HTTPRequestEntityTooLarge(limit, request.content_length)
    body = bytearray()
    try:
        async with asyncio.timeout(config.client_timeout_s) as deadline:
            num_reached = 0
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > limit:
                    raise web.HTTPRequestEntityTooLarge(limit, len(body))
                if len(body) >= num_reached + PROGRESS_BYTES:
                    num_reached = len(body)
                    deadline.reschedule(asyncio.get_running_loop().time() + config.client_timeout_s)
    except TimeoutError:
        raise web.HTTPRequestTimeout(
            reason=f"no further {PROGRESS_BYTES // 1024} KiB of the body, nor its end, came within "
            f"{config.client_timeout_s:g} s (client_timeout_s)"
        ) from None
    _check_values(body)
    return bytes(body)


def _check_values(body: bytearray) -> None:
    # Those inside strings count too: so many commas are no prompt of any use either.
    num_values = sum(map(body.count, (b",", b"[", b"{")))
    if num_values > MAX_JSON_VALUES:
        raise InvalidParameterError(
            f"the body has {num_values} commas and brackets; send at most {MAX_JSON_VALUES}"
        )
