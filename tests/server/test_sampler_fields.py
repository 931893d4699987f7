"""The fields of the further samplers: what chain of samplers a request asks for."""

from __future__ import annotations

import numpy as np
import pytest

from pipeserve.core.sampler_chain import (
    DEFAULT_ORDER,
    MAX_TAIL_TOKENS,
    WHOLE_SEQUENCE,
    BreakerGroup,
    Dry,
    Mirostat,
    SamplerChain,
    SamplerName,
)
from pipeserve.core.sampling import SamplingParams
from pipeserve.errors import InvalidParameterError
from pipeserve.server.completion_requests import CompletionRequest
from pipeserve.text.sequence_breakers import breaker_groups
from tests.server.conftest import Server
from tests.server.fakes import ByteTokenizer

MESSAGES = [{"role": "user", "content": "a"}]


def sampling(**fields: object) -> SamplingParams:
    request = CompletionRequest.model_validate({"model": "m", "prompt": "p", **fields})
    return request.sampling(
        seed=0,
        max_tokens=10,
        vocab_size=259,
        eos_token_ids=frozenset({2}),
        breaker_groups=lambda strings: breaker_groups(ByteTokenizer(), strings),  # type: ignore[arg-type]
    )


NEUTRAL: dict[str, object] = {
    "typical_p": 1,
    "top_n_sigma": -1,
    "xtc_probability": 0,
    "xtc_threshold": 0.2,
    "dry_multiplier": 0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": -1,
    "dry_sequence_breakers": ("\n",),
    "mirostat": 0,
    "mirostat_tau": 5,
    "mirostat_eta": 0.1,
    "dynatemp_range": 0,
    "dynatemp_exponent": 1,
    "repeat_last_n": 64,
    "repeat_penalty": 1,
}
"""llama-server's defaults, which clients send along."""


def test_defaults_of_llama_server_leave_a_plain_row() -> None:
    assert sampling(**NEUTRAL).chain is None


@pytest.mark.parametrize(
    ("fields", "chain"),
    [
        ({"typical_p": 0.9}, SamplerChain(typical_p=0.9)),
        ({"top_n_sigma": 1}, SamplerChain(top_n_sigma=1.0)),
        (
            {"xtc_probability": 0.5, "xtc_threshold": 0.2},
            SamplerChain(xtc_probability=0.5, xtc_threshold=0.2),
        ),
        (
            {"dynatemp_range": 0.5, "dynatemp_exponent": 2},
            SamplerChain(dynatemp_range=0.5, dynatemp_exponent=2.0),
        ),
        ({"mirostat": 2}, SamplerChain(mirostat=Mirostat(tau=5.0, eta=0.1))),
        (
            {"mirostat": 2, "mirostat_tau": 3, "mirostat_eta": 0.2},
            SamplerChain(mirostat=Mirostat(tau=3.0, eta=0.2)),
        ),
        (
            {"repeat_last_n": 5, "presence_penalty": 1},
            SamplerChain(penalty_window=5),
        ),
        (
            {"repeat_last_n": -1, "frequency_penalty": 1},
            SamplerChain(penalty_window=WHOLE_SEQUENCE),
        ),
        ({"repeat_penalty": 1.1}, SamplerChain(penalty_window=64)),
        (
            {
                "dry_multiplier": 0.8,
                "dry_base": 2,
                "dry_allowed_length": 3,
                "dry_penalty_last_n": 50,
                "dry_sequence_breakers": (),
            },
            SamplerChain(dry=Dry(multiplier=0.8, base=2.0, allowed_length=3, window=50)),
        ),
        (
            {"samplers": ("top-k", "temp", "typical_p", "dry")},
            SamplerChain(
                order=(
                    SamplerName.TOP_K,
                    SamplerName.TEMPERATURE,
                    SamplerName.TYPICAL_P,
                    SamplerName.DRY,
                )
            ),
        ),
        ({"samplers": ()}, SamplerChain(order=())),
    ],
)
def test_fields_make_a_chain(fields: dict[str, object], chain: SamplerChain) -> None:
    assert sampling(**fields).chain == chain


def test_default_breakers_are_those_of_llama_server() -> None:
    chain = sampling(dry_multiplier=1).chain
    assert chain is not None and chain.dry is not None
    (group,) = chain.dry.breakers
    assert group.tail == ()
    assert sorted(map(chr, group.head_ids)) == ["\n", '"', "*", ":"]
    assert chain.dry == Dry(multiplier=1.0, breakers=chain.dry.breakers)


def test_which_samplers_act() -> None:
    everything = {
        "typical_p": 0.9,
        "top_n_sigma": 1,
        "xtc_probability": 0.5,
        "dry_multiplier": 1,
        "repeat_last_n": 9,
        "repetition_penalty": 1.1,
        "temperature": 0.5,
        "top_k": 10,
        "top_p": 0.5,
        "min_p": 0.1,
    }
    assert sampling(**everything).active_samplers == DEFAULT_ORDER
    assert not sampling(**everything).has_penalties
    only = {"xtc_probability": 0.5, "presence_penalty": 1}
    assert sampling(**only).active_samplers == (SamplerName.XTC,)
    assert sampling(**only).has_penalties  # OpenAI's, before the chain
    assert sampling(xtc_probability=0.5, xtc_threshold=0.6).active_samplers == ()
    assert sampling(**everything, mirostat=2).active_samplers == (
        SamplerName.TEMPERATURE,
        SamplerName.MIROSTAT,
    )
    listed = sampling(**everything, samplers=("min_p", "top_k", "min_p"))
    assert [name.value for name in listed.active_samplers] == ["min_p", "top_k", "min_p"]
    assert not listed.has_penalties


@pytest.mark.parametrize(
    ("fields", "param", "mend"),
    [
        ({"typical_p": 1.5}, "typical_p", "between 0 and 1"),
        ({"typical_p": -0.1}, "typical_p", "between 0 and 1"),
        ({"xtc_probability": 2}, "xtc_probability", "between 0 and 1"),
        ({"xtc_threshold": -1}, "xtc_threshold", "between 0 and 1"),
        ({"dry_multiplier": -1}, "dry_multiplier", "between 0 and 1000"),
        ({"dry_multiplier": 1, "dry_base": 0.5}, "dry_base", "between 1 and 1000"),
        ({"dry_allowed_length": -1}, "dry_allowed_length", "at least 0"),
        ({"dry_penalty_last_n": -2}, "dry_penalty_last_n", "at least -1"),
        ({"dry_sequence_breakers": [""]}, "dry_sequence_breakers[0]", "at least 1"),
        ({"dry_sequence_breakers": "\n"}, "dry_sequence_breakers", "must be a list"),
        ({"dry_sequence_breakers": ["x"] * 33}, "dry_sequence_breakers", "at most 32"),
        ({"mirostat": 1}, "mirostat", "send 2"),
        ({"mirostat": 2, "mirostat_tau": -1}, "mirostat_tau", "between 0 and 100"),
        ({"mirostat": 2, "mirostat_eta": 11}, "mirostat_eta", "between 0 and 10"),
        ({"dynatemp_range": -1}, "dynatemp_range", "between 0 and 100"),
        ({"dynatemp_exponent": -1}, "dynatemp_exponent", "between 0 and 100"),
        ({"repeat_last_n": -2}, "repeat_last_n", "at least -1"),
        ({"repeat_penalty": 0}, "repeat_penalty", "greater than 0"),
        ({"samplers": ["top_k", "tfs_z"]}, "samplers", "known are penalties, dry"),
        ({"samplers": ["mirostat"]}, "samplers", "no sampler"),
        ({"samplers": "kpm"}, "samplers", "must be a list"),
    ],
)
async def test_wrong_values_are_refused_by_name(
    server: Server, fields: dict[str, object], param: str, mend: str
) -> None:
    status, answer = await server.post(
        "/v1/chat/completions", {"model": "tiny", "messages": MESSAGES, **fields}
    )
    assert status == 400
    assert answer["error"]["param"] == param
    assert param.split("[")[0] in answer["error"]["message"]
    assert mend in answer["error"]["message"]


async def test_the_chain_reaches_the_engine(server: Server) -> None:
    status, _ = await server.post(
        "/v1/completions",
        {"model": "tiny", "prompt": "a", "n": 2, "xtc_probability": 0.5, "dry_multiplier": 0.8},
    )
    assert status == 200
    for submitted in server.engine.submitted:
        chain = submitted.sampling.chain
        assert chain is not None and chain.dry is not None
        assert (chain.xtc_probability, chain.dry.multiplier) == (0.5, 0.8)


def test_too_many_tokens_of_breakers() -> None:
    heads = np.zeros(1, dtype=np.int32).tobytes()
    long = tuple(
        BreakerGroup(tail=(index,) * 20, heads=heads) for index in range(MAX_TAIL_TOKENS // 20 + 1)
    )
    with pytest.raises(InvalidParameterError, match="send fewer or shorter ones") as caught:
        Dry(multiplier=1.0, breakers=long)
    assert caught.value.param == "dry_sequence_breakers"


def test_a_longer_repetition_counts_no_more_where_the_penalty_is_beyond_float32() -> None:
    longest = Dry(multiplier=1.0).longest_counted
    assert 1.75 ** (longest - 2) < float(np.finfo(np.float32).max) < 1.75 ** (longest - 1)
    assert Dry(multiplier=1.0, base=1.0).longest_counted == 258
