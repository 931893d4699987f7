"""Arrivals: which requests reach an engine, and when. Values only; imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from pipeserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to come."""

    arrival_s: float
    """After the run's begin; of no meaning in a closed loop."""
    num_prompt_tokens: int
    num_output_tokens: int
    key: str = ""
    """Whose it is."""
    priority: int = 0
    """Lower goes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """All requests of a run."""

    requests: tuple[Request, ...]
    """By arrival, or in the order in which clients take them."""
    num_clients: int | None = None
    """A closed loop: each client sends its next request when its last one has ended. None: each
    request comes at its arrival_s."""

    @property
    def num_first(self) -> int:
        """Requests that are there before any has ended: of a closed loop one per client."""
        return len(self.requests) if self.num_clients is None else self.num_clients


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Of prompts or outputs: one of some numbers, or anything between two."""

    choices: tuple[int, ...]
    is_range: bool = False
    """The logarithm is uniform between the two choices."""

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """512 (all the same), 64,2048 (each as likely) or 64-8192 (log-uniform).

        Raises:
            ConfigError: anything else.
        """
        is_range = "-" in text
        parts = text.split("-" if is_range else ",")
        values = tuple(int(part) for part in parts if part.strip().isdecimal())
        if len(values) < len(parts) or min(values) < 1 or (is_range and len(values) != 2):
            raise ConfigError(
                f"length is {text!r}; give a number above 0, some (64,2048) or a range (64-8192)"
            )
        return cls(choices=values, is_range=is_range)

    def __str__(self) -> str:
        """As parse takes it."""
        return ("-" if self.is_range else ",").join(map(str, self.choices))

    @property
    def longest(self) -> int:
        return max(self.choices)

    def draw(self, rng: np.random.Generator) -> int:
        """One length."""
        if not self.is_range:
            return int(rng.choice(self.choices))
        low, high = (math.log(each) for each in sorted(self.choices))
        return round(math.exp(rng.uniform(low, high)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of the requests of a made-up trace."""

    num_requests: int
    prompt: Lengths
    output: Lengths
    seed: int = 0


def clients(num_clients: int, shape: Shape) -> Trace:
    """A closed loop, all clients beginning at once."""
    return Trace(requests=_requests(repeat(0.0), shape), num_clients=num_clients)


def poisson(rate_per_s: float, shape: Shape) -> Trace:
    """Independent arrivals, so many per second on average."""
    gaps_s = np.random.default_rng((shape.seed, 1)).exponential(1 / rate_per_s, shape.num_requests)
    return Trace(requests=_requests(np.cumsum(gaps_s).tolist(), shape))


def bursts(size: int, period_s: float, shape: Shape) -> Trace:
    """`size` requests at once every period_s."""
    arrivals_s = [index // size * period_s for index in range(shape.num_requests)]
    return Trace(requests=_requests(arrivals_s, shape))


def _requests(arrivals_s: Sequence[float] | repeat[float], shape: Shape) -> tuple[Request, ...]:
    rng = np.random.default_rng((shape.seed, 0))  # the same lengths, however they arrive
    return tuple(
        Request(
            arrival_s=arrival_s,
            num_prompt_tokens=shape.prompt.draw(rng),
            num_output_tokens=shape.output.draw(rng),
        )
        for arrival_s, _ in zip(arrivals_s, range(shape.num_requests), strict=False)
    )


def read_trace(path: Path) -> Trace:
    """A file of JSON lines, in any order: arrival_s, prompt_tokens, output_tokens and, where
    wanted, key and priority.

    Raises:
        ConfigError: the file cannot be read, or a line is none of these; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from None
    requests = [
        _parse_request(line, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not requests:
        raise ConfigError(f"the trace {path} has no request; give one JSON object per line")
    return Trace(requests=tuple(sorted(requests, key=lambda request: request.arrival_s)))


def _parse_request(line: str, where: str) -> Request:
    try:
        values: Any = json.loads(line)
        request = Request(
            arrival_s=float(values["arrival_s"]),
            num_prompt_tokens=int(values["prompt_tokens"]),
            num_output_tokens=int(values["output_tokens"]),
            key=str(values.get("key", "")),
            priority=int(values.get("priority", 0)),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f'{where}: {error!r}; a line is like {{"arrival_s": 0.5, "prompt_tokens": 512, '
            '"output_tokens": 128}'
        ) from None
    is_number = math.isfinite(request.arrival_s) and request.arrival_s >= 0
    if not is_number or min(request.num_prompt_tokens, request.num_output_tokens) < 1:
        raise ConfigError(
            f"{where}: arrival_s is {request.arrival_s}, prompt_tokens "
            f"{request.num_prompt_tokens}, output_tokens {request.num_output_tokens}; the first "
            "is at least 0, the others at least 1"
        )
    return request
