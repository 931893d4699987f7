"""Model files that mean harm: each is refused with its name, none crashes or holds up the loader.

The loader is all that a start reads of a file before its weights: header, shapes, vocabulary,
merges, chat template.
"""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path

import pytest

from pipeserve.errors import ModelError, PipeserveError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.models.registry import check_model
from pipeserve.text.chat_template import ChatTemplate
from pipeserve.text.tokenizer import Tokenizer
from tests.gguf.hostile_files import (
    TOKENS,
    Kind,
    float32,
    int32,
    metadata,
    model_bytes,
    numbers,
    string,
    strings,
    tensors,
    uint32,
    uint64,
)

MESSAGES = [{"role": "user", "content": "hello"}]

pytestmark = pytest.mark.timeout(60)  # a file that holds the loader up fails here


def load(path: Path) -> str:
    """What a start does with the file before it reads weights; the first prompt."""
    with GGUFFile.open(path) as gguf_file:
        check_model(gguf_file)
        tokenizer = Tokenizer.from_gguf(gguf_file)
        template = ChatTemplate.from_gguf(gguf_file, tokenizer)
    prompt = template.render(MESSAGES)
    tokenizer.decode(tokenizer.encode(prompt, add_special_tokens=True))
    return prompt


def test_the_file_as_it_is_can_be_served(tmp_path: Path) -> None:
    """So that the cases below fail for their own reason."""
    path = tmp_path / "model.gguf"
    path.write_bytes(model_bytes())
    assert load(path) == "user: hello\n"


LOST = {**tensors(2)}
del LOST["blk.1.ffn_up.weight"]
CORPUS = {
    "layers that block_count hides": (
        model_bytes(shapes=tensors(3)),
        "block_count is 1, but .* blk.1",
    ),
    "more layers than tensors": (model_bytes({"llama.block_count": uint32(2)}), "blk.1"),
    "endless layers": (model_bytes({"llama.block_count": uint64(2**62)}), "block_count"),
    "a tensor lost": (model_bytes({"llama.block_count": uint32(2)}, LOST), "blk.1.ffn_up"),
    "no heads in any layer": (
        model_bytes({"llama.attention.head_count_kv": numbers(Kind.INT32, "i", [0])}),
        "head_count_kv .*at least 1",
    ),
    "heads that are no number": (
        model_bytes({"llama.attention.head_count": numbers(Kind.FLOAT32, "f", [math.nan])}),
        "head_count .*not whole numbers",
    ),
    "no heads at all": (
        model_bytes({"llama.attention.head_count": numbers(Kind.INT32, "i", [])}),
        "head_count",
    ),
    "more heads than values": (
        model_bytes(
            {"llama.attention.head_count": uint32(2**31), "llama.attention.key_length": None}
        ),
        "key_length is 0",
    ),
    "rope base 0": (model_bytes({"llama.rope.freq_base": float32(0.0)}), "freq_base is 0"),
    "rope base NaN": (model_bytes({"llama.rope.freq_base": float32(math.nan)}), "freq_base is nan"),
    "epsilon NaN": (
        model_bytes({"llama.attention.layer_norm_rms_epsilon": float32(math.nan)}),
        "rms_epsilon is nan",
    ),
    "scaling by infinity": (
        model_bytes({"llama.rope.scaling.factor": float32(math.inf)}),
        "scaling.factor is inf",
    ),
    "no tokens": (
        model_bytes({"tokenizer.ggml.tokens": strings([])}),
        "tokens",
    ),
    "types that are no numbers": (
        model_bytes(
            {"tokenizer.ggml.token_type": numbers(Kind.FLOAT32, "f", [math.nan] * len(TOKENS))}
        ),
        "token_type .*not whole numbers",
    ),
    "an id outside the vocabulary": (
        model_bytes({"tokenizer.ggml.eos_token_id": uint32(2**31)}),
        "eos_token_id is 2147483648",
    ),
    "a token of a megabyte": (
        model_bytes(
            {
                "tokenizer.ggml.model": string("llama"),
                "tokenizer.ggml.tokens": strings([*TOKENS[:-1], "a" * 1_000_000]),
            }
        ),
        "token 259 has 1000000 characters",
    ),
    "a merge of nothing": (
        model_bytes({"tokenizer.ggml.merges": strings(["", " "])}),
        "merge 0",
    ),
    "a template of megabytes": (
        model_bytes({"tokenizer.chat_template": string("a" * 5_000_000)}),
        "chat_template.*5000000 characters",
    ),
    "a template of brackets": (
        model_bytes({"tokenizer.chat_template": string("{{" + "(" * 50_000)}),
        "chat_template",
    ),
    "a template that opens blocks": (
        model_bytes({"tokenizer.chat_template": string("{% if 1 %}" * 5_000)}),
        "chat_template",
    ),
    "a template that calls itself": (
        model_bytes(
            {
                "tokenizer.chat_template": string(
                    "{% macro a(x) %}{{ a(x) }}{% endmacro %}{{ a(1) }}"
                )
            }
        ),
        "recursion",
    ),
    "a template that includes itself": (
        model_bytes({"tokenizer.chat_template": string("{% include 'self' %}")}),
        "template",
    ),
    "a template that leaves the sandbox": (
        model_bytes(
            {
                "tokenizer.chat_template": string(
                    "{{ messages.__class__.__mro__[1].__subclasses__() }}"
                )
            }
        ),
        "template",
    ),
    "a template that fills the memory": (
        model_bytes({"tokenizer.chat_template": string("{{ 'a' * 10**12 }}")}),
        "template",
    ),
    "a template that pads": (
        model_bytes({"tokenizer.chat_template": string("{{ 'a'|center(10**12) }}")}),
        "template",
    ),
}


@pytest.mark.parametrize("case", CORPUS)
def test_a_hostile_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    content, problem = CORPUS[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(PipeserveError, match=f"(?s){problem}") as caught:
        load(path)
    if isinstance(caught.value, ModelError):
        assert str(caught.value).startswith(str(path))


def hostile_values(rng: random.Random) -> list[tuple[Kind, bytes]]:
    special = [0.0, -1.0, 1e300, math.inf, -math.inf, math.nan]
    floats = [rng.choice(special) for _ in range(rng.choice([0, 1, len(TOKENS)]))]
    return [
        uint32(rng.choice([0, 1, 2, 3, 7, 2**31, 2**32 - 1])),
        uint64(rng.choice([0, 2**53, 2**63, 2**64 - 1])),
        int32(rng.choice([-1, -(2**31)])),
        float32(rng.choice([0.0, -1.0, 1e-45, 3e38, math.inf, math.nan])),
        (Kind.FLOAT64, struct.pack("<d", rng.choice(special))),
        (Kind.BOOL, rng.choice([b"\0", b"\1", b"\xff"])),
        string(rng.choice(["", "gpt2", "llama", "default", "{{ x }}", "{% for", "\0" * 50])),
        strings([rng.choice(["", " ", "h e", "\U0010ffff", "a" * 2000])] * rng.randint(0, 3)),
        strings([rng.choice(TOKENS) for _ in TOKENS]),
        numbers(Kind.FLOAT64, "d", floats),
        numbers(Kind.INT64, "q", [rng.choice([-(2**63), -1, 0, 3, 2**62])] * len(TOKENS)),
    ]


def test_random_values_for_any_key_are_served_or_refused(tmp_path: Path) -> None:
    """Every key gets hostile values of every type in turn, alone and with another."""
    rng = random.Random(8)
    keys = [
        *metadata(),
        "llama.rope.scaling.type",
        "llama.rope.scaling.factor",
        "llama.expert_count",
        "general.alignment",
        "split.count",
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.unknown_token_id",
        "llama.attention.value_length",
    ]
    path = tmp_path / "model.gguf"
    outcomes = {True: 0, False: 0}
    for round_ in range(2):
        for key in keys:
            for value in hostile_values(rng):
                changes = {key: value}
                if round_:
                    changes[rng.choice(keys)] = rng.choice(hostile_values(rng))
                path.write_bytes(model_bytes(changes))
                outcomes[_is_served(path, str(changes))] += 1
    assert min(outcomes.values()) > 20


def test_random_bytes_anywhere_are_served_or_refused(tmp_path: Path) -> None:
    rng = random.Random(9)
    whole = model_bytes()
    header = whole.index(b"blk.0.ffn_down.weight") + 80
    path = tmp_path / "model.gguf"
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            content[rng.randrange(header)] = rng.choice(
                [0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)]
            )
        path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        _is_served(path, "random bytes")


def _is_served(path: Path, what: str) -> bool:
    try:
        load(path)
    except PipeserveError:
        return False
    except Exception as error:
        raise AssertionError(f"{what[:2000]} is not refused but raises {error!r}") from error
    return True
