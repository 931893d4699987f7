"""Models write what they like, but the calls that they begin are of known tools and valid."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from pipeserve.core.constraint import FreeRun, Grammar, Thoughts, TokenConstraint
from pipeserve.gguf.reader import GGUFFile
from pipeserve.text.answer_grammar import CallableTool, after_thoughts, begun_calls
from pipeserve.text.call_reader import CallDelta
from pipeserve.text.grammar import GrammarCompiler, json_grammar
from pipeserve.text.reasoning import ReasoningTags
from pipeserve.text.tokenizer import Tokenizer
from pipeserve.text.tool_calls import (
    HERMES,
    JSON,
    LLAMA3,
    MISTRAL,
    NEMOTRON,
    PHI4,
    ToolCallFormat,
    ToolCallParser,
)
from tests.text.small_vocabularies import write_byte_vocabulary
from tests.text.writer import CLOSING, allowed_ids

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Päris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "additionalProperties": False}
TOOLS = (
    CallableTool(name="time", parameters=NOTHING),
    CallableTool(name="time_there", parameters=CITY),
)
CONTROL = ("<|end|>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
NAMES = {tool.name for tool in TOOLS}


@dataclass
class Model:
    """Writes a text as long as it may, and then anything that it may."""

    tokenizer: Tokenizer
    compiler: GrammarCompiler

    def write(
        self, grammar: Grammar, *, begins: str, seed: int, control: bool = False, most: int = 400
    ) -> tuple[bytes, list[bool]]:
        """An answer that begins like this text, and for each token whether it had a mask."""
        chance, pieces = random.Random(seed), self.tokenizer.pieces(skip_special=False)
        script = self.tokenizer.encode(begins, add_special_tokens=False, parse_special=control)
        constraint = self.compiler.build(grammar)
        answer, masked, untold = b"", [], list[int]()
        allowed = constraint.allowed()
        for index in range(most):
            wanted = script[index] if index < len(script) else None
            if isinstance(allowed, FreeRun) and wanted is None:
                break
            token_id = self._token(allowed, wanted, chance)
            if token_id in self.tokenizer.eos_token_ids:
                break
            answer += pieces[token_id]
            masked.append(not isinstance(allowed, FreeRun))
            untold.append(token_id)
            if ends_run(allowed, untold):
                allowed = tell(constraint, untold)
        return answer, masked

    def _token(self, allowed: object, wanted: int | None, chance: random.Random) -> int:
        if isinstance(allowed, FreeRun):
            assert wanted is not None
            return wanted
        ids = allowed_ids(allowed)  # type: ignore[arg-type]
        if wanted is not None:
            assert wanted in ids, "what the model wants to write is possible"
            return wanted
        pieces = self.tokenizer.pieces(skip_special=True)
        closing = [each for each in ids if set(pieces[each]) <= CLOSING]
        return chance.choice(closing if closing and chance.random() < 0.3 else ids)


def ends_run(allowed: object, untold: list[int]) -> bool:
    """What the engine finds."""
    if not isinstance(allowed, FreeRun):
        return True
    return untold[-1] in allowed.watched or len(untold) == allowed.max_tokens


def tell(constraint: TokenConstraint, untold: list[int]) -> object:
    for token_id in untold:
        constraint.accept(token_id)
    untold.clear()
    return constraint.allowed()


def model_of(tokenizer: Tokenizer) -> Model:
    compiler = GrammarCompiler(lambda: tokenizer, vocab_size=tokenizer.vocab_size)
    return Model(tokenizer, compiler)


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Knows the words around calls as control tokens, and every byte."""
    path = tmp_path_factory.mktemp("vocabulary") / "bytes.gguf"
    write_byte_vocabulary(path, control=list(CONTROL), ids={"eos_token_id": 257})
    with GGUFFile.open(path) as file:
        return model_of(Tokenizer.from_gguf(file))


@pytest.fixture(scope="module")
def demo(demo_model_path: Path) -> Iterator[Model]:
    """Spells these words out in several tokens."""
    with GGUFFile.open(demo_model_path) as file:
        yield model_of(Tokenizer.from_gguf(file))


def control_of(model: Model) -> dict[str, int]:
    ids = {word: model.tokenizer.token_id(word) for word in (*CONTROL, "[CALL_ID]")}
    return {
        word: token_id
        for word, token_id in ids.items()
        if token_id is not None and model.tokenizer.is_special(token_id)
    }


def calls_in(form: ToolCallFormat, answer: str) -> tuple[str, list[tuple[str, object]]]:
    """Text and calls, as the server tells them apart."""
    parser = ToolCallParser(form, tool_names=NAMES)
    text, deltas = parser.push(answer)
    calls: list[list[str]] = []
    for delta in deltas:
        assert isinstance(delta, CallDelta)
        if delta.name is not None:
            calls.append([delta.name, ""])
        calls[-1][1] += delta.arguments
    if calls and not is_json(calls[-1][1]):
        calls.pop()  # cut off
    return text + parser.finish(), [(name, json.loads(given)) for name, given in calls]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def assert_valid(calls: list[tuple[str, object]]) -> None:
    for name, arguments in calls:
        if name == "time":
            assert arguments == {}
        else:
            assert name == "time_there"
            assert arguments in ({"city": "Rome"}, {"city": "Päris"})


BEGINNINGS = [
    (HERMES, "I <think> so <t<tool_call>", True),
    (HERMES, "<tool_call>\n", True),
    (HERMES, "Well, 1 <2.<tool_call>[", True),
    (HERMES, "a <tool_call>", False),
    (NEMOTRON, "<TOOLCALL>[", False),
    (PHI4, "a\n<|tool_call|>", False),
    (MISTRAL, "[TOOL_CALLS][{", True),
    (MISTRAL, "a [TOOL_CALLS] ", False),
    (LLAMA3, '{"name": "', False),
    (LLAMA3, '  {\n "name" :', False),
    (LLAMA3, '<|python_tag|>{"name":', True),
    (LLAMA3, '<|python_tag|>{"name":', False),
    (JSON, '{"name":', False),
    (JSON, '[ {"name": ', False),
    (LLAMA3, '{"type": "function", "name": ', False),
    (JSON, '{"type": "function", "function": {"name": ', False),
    (JSON, '[{"function":{"name":', False),
    (MISTRAL, '[TOOL_CALLS][{"name": "time", "arguments": {}}][TOOL_CALLS]', True),
]


@pytest.mark.parametrize(
    ("form", "begins", "parse"), BEGINNINGS, ids=lambda each: getattr(each, "name", each)
)
@pytest.mark.parametrize("vocabulary", ["bytewise", "demo"])
def test_a_call_that_is_begun_is_valid(
    form: ToolCallFormat,
    begins: str,
    parse: bool,
    vocabulary: str,
    request: pytest.FixtureRequest,
) -> None:
    model: Model = request.getfixturevalue(vocabulary)
    grammar = begun_calls(form, TOOLS, control=control_of(model) if parse else {})
    num_complete, names = 0, set()
    for seed in range(12):
        answer, _ = model.write(grammar, begins=begins, seed=seed, control=parse)
        _, calls = calls_in(form, answer.decode(errors="replace"))
        if not calls or not answer.endswith((b"}", b"]", b">")):
            continue  # cut, or text after all
        assert_valid(calls)
        names |= {name for name, _ in calls}
        num_complete += 1
    assert num_complete >= 6
    assert names == NAMES


def test_behind_a_control_token_there_is_nothing_but_a_call(bytewise: Model) -> None:
    grammar = begun_calls(LLAMA3, TOOLS, control=control_of(bytewise))
    for seed in range(6):
        answer, _ = bytewise.write(grammar, begins="<|python_tag|>", seed=seed, control=True)
        assert_valid(calls_in(LLAMA3, answer.decode())[1])


TEXTS = [
    (HERMES, "Plain words, 1 < 2, <b>and</b> <tools>; to <tool_cal"),
    (MISTRAL, "Some [TOOL] and [[TOOL_CALL]] too"),
    (LLAMA3, 'Here: {"name": "time"}'),
    (LLAMA3, '{"names": [1, 2]} and more'),
    (JSON, '[1, {"name": 2}]'),
    (JSON, '\n\n{"arguments": {"name": 1}}'),
    (JSON, '{"arguments": {}, "name": "time"}'),
    (JSON, '{"function": "time", "arguments": {"a": 1}}'),
    (JSON, '{"type": "object", "name": "time", "arguments": {"a": 1}}'),
    (JSON, '{"type": "function", "type": "function", "name": "time", "arguments": {"a": 1}}'),
    (JSON, '[[{"name": "tim'),
    (LLAMA3, '[3, {"name": "time", "arguments": {"a": 1}}]'),
]


@pytest.mark.parametrize(("form", "text"), TEXTS, ids=lambda each: getattr(each, "name", each))
@pytest.mark.parametrize("vocabulary", ["bytewise", "demo"])
def test_text_is_free_but_for_what_may_begin_a_call(
    form: ToolCallFormat, text: str, vocabulary: str, request: pytest.FixtureRequest
) -> None:
    model: Model = request.getfixturevalue(vocabulary)
    grammar = begun_calls(form, TOOLS, control={})
    tail = " and so it goes on for quite a while, with quiet words and no more."
    answer, masked = model.write(grammar, begins=text + tail, seed=1)
    assert answer.decode() == text + tail
    assert calls_in(form, answer.decode()) == (text + tail, [])
    num_tail = len(model.tokenizer.encode(tail, add_special_tokens=False))
    assert not any(masked[-num_tail + 2 :])
    assert sum(masked) <= 24


def test_text_may_follow_a_call_and_a_call_may_follow_that(demo: Model) -> None:
    call = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    text = f"One. {call} Two. {call}\n{call} Three."
    answer, masked = demo.write(begun_calls(HERMES, TOOLS, control={}), begins=text, seed=1)
    assert answer.decode() == text
    assert calls_in(HERMES, text)[1] == [("time", {})] * 3
    assert not masked[0]
    assert not masked[-1]


def test_mistrals_own_form_of_names_and_arguments(bytewise: Model) -> None:
    grammar = begun_calls(MISTRAL, TOOLS, control=control_of(bytewise))
    names = set()
    for seed in range(20):
        answer, _ = bytewise.write(
            grammar, begins="[TOOL_CALLS]time", seed=seed, control=True, most=60
        )
        _, calls = calls_in(MISTRAL, answer.decode())
        assert_valid(calls)
        names |= {name for name, _ in calls}
    assert names == NAMES


def test_a_vocabulary_is_watched_wherever_a_word_may_be_cut(demo: Model) -> None:
    """Of every way to write the word in tokens, one is watched before the word is complete."""
    words = demo.compiler._vocabulary().words
    watched, raw = words.watched("<tool_call>"), b"<tool_call>"
    chance, pieces = random.Random(1), demo.tokenizer.pieces(skip_special=True)
    by_first: dict[int, list[int]] = {}
    for token_id, piece in enumerate(pieces):
        if piece and piece in raw:
            by_first.setdefault(piece[0], []).append(token_id)
    for _ in range(300):
        written, seen = b"", False
        while written != raw:
            ids = [t for t in by_first[raw[len(written)]] if raw.startswith(written + pieces[t])]
            token_id = chance.choice(ids)
            written += pieces[token_id]
            seen = seen or token_id in watched
            assert seen or len(written) < 2
    assert len(watched) < 100


THOUGHTS = Thoughts(
    opening="<think>", closing="</think>", is_open=True, in_grammar=False, max_tokens=None
)
WORDS = "hm, well, I wonder about this and that and some more; yes, I do, I really do"


def thinking(**changes: object) -> Thoughts:
    return replace(THOUGHTS, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("vocabulary", ["bytewise", "demo"])
@pytest.mark.parametrize("most", [0, 1, 5, 17])
@pytest.mark.parametrize("is_open", [True, False])
def test_thoughts_end_at_their_limit(
    vocabulary: str, most: int, is_open: bool, request: pytest.FixtureRequest
) -> None:
    model: Model = request.getfixturevalue(vocabulary)
    begins = WORDS if is_open else f"\n<think>{WORDS}"
    script = model.tokenizer.encode(begins, add_special_tokens=False)
    opening = model.tokenizer.encode("\n<think>", add_special_tokens=False)
    num_free = most + (0 if is_open else len(opening))
    kept = model.tokenizer.decode(script[:num_free])
    constraint = model.compiler.build(
        Grammar(definition="", thoughts=thinking(max_tokens=most, is_open=is_open))
    )
    written, untold = list[int](), list[int]()
    allowed = constraint.allowed()
    while not (isinstance(allowed, FreeRun) and allowed == FreeRun(watched=frozenset())):
        if isinstance(allowed, FreeRun):
            written.append(script[len(written)])
        else:
            (forced,) = allowed_ids(allowed)
            written.append(forced)
        untold.append(written[-1])
        if ends_run(allowed, untold):
            allowed = tell(constraint, untold)
    assert model.tokenizer.decode(written) == f"{kept}</think>"


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5])
def test_a_limit_within_a_character_waits_for_its_end(bytewise: Model, most: int) -> None:
    """Where a grammar has the thoughts, it wants whole characters: two of 2 bytes, one of 3."""
    tags = ReasoningTags(opening="<think>", closing="</think>")
    grammar = after_thoughts(json_grammar({"type": "object"}), tags, is_open=True, control={})
    thoughts = thinking(in_grammar=True, max_tokens=most)
    constraint = bytewise.compiler.build(replace(grammar, thoughts=thoughts))
    script, written = "üä€".encode(), b""
    while not written.endswith(b"</think>"):
        ids = allowed_ids(constraint.allowed())  # type: ignore[arg-type]
        following = script[len(written)] if len(written) < len(script) else None
        token_id = following if following in ids else min(ids)
        constraint.accept(token_id)
        written += bytes([token_id])
    ends = {1: 2, 2: 2, 3: 4, 4: 4, 5: 7}
    assert written.startswith(script[: min(most, ends[most])])
    assert len(written.removesuffix(b"</think>")) == ends[most]
    written.decode()


@pytest.mark.parametrize("vocabulary", ["bytewise", "demo"])
@pytest.mark.parametrize("is_open", [True, False])
def test_calls_are_told_from_thoughts(
    vocabulary: str, is_open: bool, request: pytest.FixtureRequest
) -> None:
    model: Model = request.getfixturevalue(vocabulary)
    begins = 'a <tool_call>{"no": 1} </tool> b</think>\n<tool_call>'
    for form in (HERMES, JSON):
        calls = begun_calls(form, TOOLS, control={})
        grammar = replace(calls, thoughts=thinking(is_open=is_open))
        text = begins if is_open else f"<think>{begins}"
        if form is JSON:
            text = text.replace("</think>\n<tool_call>", '</think>{"name": "')
        num_complete = 0
        for seed in range(8):
            answer, _ = model.write(grammar, begins=text, seed=seed)
            _, found = calls_in(form, answer.decode(errors="replace").partition("</think>")[2])
            assert_valid(found)
            num_complete += bool(found)
        assert num_complete >= 4


WISHES = [
    *('{"', "{", "[", "]", "}", '"', ":", ",", " ", "\n", ";", "1", "a", "<", "time_there"),
    *('"name"', '"function"', '"type"', '"arguments"', '"parameters"', '"time"', '"time_there"'),
    *('{"city": "Rome"}', '{"city": 1}', '{"name": "time_there", "arguments": '),
    *('{"name": "time", "arguments": {}}', '{"name": "time", "parameters": {}}'),
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"),
]


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    form=st.sampled_from([HERMES, MISTRAL, LLAMA3, JSON]),
    wishes=st.lists(st.sampled_from(WISHES), max_size=25),
    knows_control=st.booleans(),
)
def test_whatever_is_read_as_a_call_is_valid(
    bytewise: Model, form: ToolCallFormat, wishes: list[str], knows_control: bool
) -> None:
    """Of a model that gets its way wherever the grammar lets it."""
    encode = bytewise.tokenizer.encode
    constraint = bytewise.compiler.build(
        begun_calls(form, TOOLS, control=control_of(bytewise) if knows_control else {})
    )
    pieces, answer, untold = bytewise.tokenizer.pieces(skip_special=False), b"", list[int]()
    allowed = constraint.allowed()
    for wish in wishes:
        for token_id in encode(wish, add_special_tokens=False, parse_special=knows_control):
            if not isinstance(allowed, FreeRun) and token_id not in allowed_ids(allowed):
                break
            answer += pieces[token_id]
            untold.append(token_id)
            if ends_run(allowed, untold):
                allowed = tell(constraint, untold)
    assert_valid(calls_in(form, answer.decode())[1])
