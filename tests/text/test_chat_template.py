"""ChatTemplate: equal to transformers, closed to hostile templates, clear about errors."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from pipeserve.errors import ChatTemplateError, GGUFFormatError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.text.chat_template import ChatTemplate
from pipeserve.text.tokenizer import Tokenizer
from tests.text.small_vocabularies import write_byte_vocabulary

CHATS: dict[str, list[dict[str, Any]]] = {
    "one question": [{"role": "user", "content": "Hi"}],
    "with system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi\n\n there "},
    ],
    "several turns": [
        {"role": "user", "content": "1+1? <b>&amp;"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "ü🙂 {{ 1 }} {% x %}"},
    ],
    "nothing": [],
}
TOOL = {"type": "function", "function": {"name": "f", "description": "<&'\"ü"}}

# Each exercises a feature that templates of well-known models use.
TEMPLATES = {
    "loop variables": (
        "{%- for m in messages %}\n    {%- if loop.first %}{{ bos_token }}{% endif %}\n"
        "  {{ m.role | upper }}: {{ m['content'] | trim }}{{ eos_token if loop.last }}\n"
        "{% endfor -%}\n"
    ),
    "white space": "  {% if true %}\n  a\n  {% endif %}\n\n{# c #}\n  b  \n",
    "namespace": (
        "{% set ns = namespace(n=0, found=false) %}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ ns.found }}"
    ),
    "break and continue": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ m.content }}{% break %}{% endfor %}"
    ),
    "tools": (
        "{% if tools %}{{ tools | tojson }}\n{{ tools[0] | tojson(indent=2) }}"
        "{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}"
    ),
    "macro": (
        "{% macro turn(m) %}[{{ m.role }}]{{ m.content }}{% endmacro %}"
        "{% for m in messages %}{{ turn(m) }}{% endfor %}"
    ),
    "generation block": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    ),
    "strings": (
        "{% for m in messages %}{{ m.content.split(' ')[0] }}{{ m.content[1:] }}"
        "{{ m.content.replace('i', 'o') if 'i' in m.content }}{{ m.content | length }}"
        "{{ '=' * 3 }}{{ m.content.startswith('H') }}{% endfor %}"
    ),
    "dict and items": (
        "{% set d = dict(a=1, b=[1, 2]) %}{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}"
        "{{ dict.fromkeys(['x', 'y'], 0) }}"
    ),
    "undefined": "{{ nothing }}{% if nothing is defined %}x{% endif %}{{ messages[99] }}",
    "filters": (
        "{{ messages | map(attribute='role') | list }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    ),
    "no autoescape": "{% for m in messages %}{{ m.content }}{% endfor %}<&>",
    "extra": "{{ enable_thinking }}{{ documents }}",
}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>")


def load(path: Path) -> tuple[ChatTemplate, Tokenizer]:
    with GGUFFile.open(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
        return ChatTemplate.from_gguf(file, tokenizer), tokenizer


class TestLikeTransformers:
    def test_demo_model(self, demo_model_path: Path) -> None:
        ours, tokenizer = load(demo_model_path)
        theirs = AutoTokenizer.from_pretrained(
            demo_model_path.parent, gguf_file=demo_model_path.name
        )
        for chat in filter(None, CHATS.values()):
            for prompts in (True, False):
                text = ours.render(chat, add_generation_prompt=prompts)
                assert text == theirs.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=prompts
                )
                ids = tokenizer.encode(text, add_special_tokens=True)
                assert ids == theirs.encode(text, add_special_tokens=False)

    @pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
    @pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
    @pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "tools"])
    def test_features(
        self, source: str, chat: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> None:
        extra = {"enable_thinking": False, "documents": [{"text": "<ü>"}]}
        texts, _ = render_jinja_template(
            conversations=[chat],
            tools=tools,
            chat_template=source,
            add_generation_prompt=True,
            bos_token="<s>",
            eos_token="</s>",
            **extra,
        )
        assert template(source).render(chat, tools=tools, extra=extra) == texts[0]


class TestVariables:
    def test_extra_cannot_replace_what_the_server_sets(self) -> None:
        extra = {"messages": [], "bos_token": "x", "mine": 1}
        source = "{{ messages | length }}{{ bos_token }}{{ mine }}"
        assert template(source).render(CHATS["one question"], extra=extra) == "1<s>1"

    def test_messages_are_not_changed(self) -> None:
        messages = [{"role": "user", "content": "Hi", "parts": [1]}]
        before = json.dumps(messages)
        for change in ("messages.append(1)", "messages[0].update(a=1)", "messages[0].parts.pop()"):
            with pytest.raises(ChatTemplateError):
                template("{{ " + change + " }}").render(messages)
        assert json.dumps(messages) == before

    def test_date_of_today(self) -> None:
        before = datetime.datetime.now().strftime("%Y-%m-%d")
        rendered = template("{{ strftime_now('%Y-%m-%d') }}").render([])
        assert before <= rendered <= datetime.datetime.now().strftime("%Y-%m-%d")


class TestErrors:
    def test_the_templates_own_message_is_told(self) -> None:
        refusing = template("{{ raise_exception('Roles must alternate') }}")
        with pytest.raises(ChatTemplateError, match="Roles must alternate") as caught:
            refusing.render(CHATS["one question"])
        assert caught.value.param == "messages"

    @pytest.mark.parametrize(
        "source", ["{% for %}", "{{ ", "{% endif %}", "{{ x | nofilter }}", "{% generation %}"]
    )
    def test_syntax_is_checked_at_once(self, source: str) -> None:
        with pytest.raises(ChatTemplateError, match="cannot be compiled"):
            template(source)

    @pytest.mark.parametrize(
        "expression",
        [
            "1 / 0",
            "messages[0].content + 1",
            "messages.nothing.deeper",
            "{}['a']['b']",
            "nothing()",
            "messages | tojson(indent='x', sort_keys=nothing())",
            "strftime_now(3)",
            "nothing | tojson",
        ],
    )
    def test_failures_are_named(self, expression: str) -> None:
        with pytest.raises(ChatTemplateError, match="chat template failed"):
            template("{{ " + expression + " }}").render(CHATS["one question"])


ESCAPES = {
    "class of a text": "''.__class__.__mro__[1].__subclasses__()",
    "class by filter": "('' | attr('__class__')).__mro__",
    "class by subscript": "''['__class__']['__mro__']",
    "globals of a function": "raise_exception.__globals__",
    "globals of a clock": "strftime_now.__globals__['__builtins__']",
    "code of a macro": "x.__code__",
    "globals of a method": "cycler.__init__.__globals__.os.popen('id')",
    "joiner": "joiner.__init__.__globals__",
    "namespace": "namespace.__init__.__globals__",
    "namespace with a class": "namespace(__class__='x')",
    "namespace with private attributes": "namespace(_Namespace__attrs=1)",
    "dict": "dict.__class__.__init__.__globals__",
    "self": "self.__init__.__globals__",
    "self's environment": "self._TemplateReference__context.environment",
    "loop": "[1] | map(attribute='__class__') | list",
    "format": "'{0.__class__.__mro__}'.format('')",
    "format map": "'{x.__class__}'.format_map({'x': ''})",
    "format filter": "'%s' | format(raise_exception.__globals__)",
    "sort by attribute": "messages | sort(attribute='__class__') | first",
    "import": "__import__('os')",
    "open": "open('/etc/passwd').read()",
    "generator frame": "(messages | map('upper')).gi_frame.f_globals",
    "mro of a type": "namespace.mro()",
    "changing a list": "messages.clear()",
    "lipsum": "lipsum.__globals__",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_template_cannot_reach_python(name: str) -> None:
    """Either the sandbox refuses, or the expression comes to nothing at all."""
    source = "{% macro x() %}{% endmacro %}{{ " + ESCAPES[name] + " }}"
    try:
        rendered = template(source).render(CHATS["one question"])
    except ChatTemplateError:
        return
    assert rendered in ("", "[Undefined]", str(CHATS["one question"][0]))


def test_private_namespace_attribute_cannot_be_set() -> None:
    with pytest.raises(ChatTemplateError, match="cannot hold the name '__class__'"):
        template("{% set n = namespace() %}{% set n.__class__ = 1 %}").render([])


@pytest.mark.parametrize("statement", ["include", "import", "extends"])
def test_template_cannot_load_files(statement: str) -> None:
    clause = "'/etc/passwd' as x" if statement == "import" else "'/etc/passwd'"
    with pytest.raises(ChatTemplateError):
        template("{% " + statement + " " + clause + " %}").render([])


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(200000) %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 10 ** 8 * 'a' }}",
        "{{ [0] * 10 ** 9 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 2 ** 100000000 }}",
        "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ 1" + "0" * 5000 + " }}",
        "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
        "{% if 1 %}" * 200 + "{% endif %}" * 200,
    ],
    ids=lambda source: source[:40],
)
def test_template_cannot_run_away(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        template(source).render([])


def test_operators_work_below_the_limit() -> None:
    source = "{{ '-' * 20 }}{{ 3 * 4 }}{{ 2 ** 10 }}{{ 2.5 * 2 }}{{ 7 % 4 }}{{ '%d' % 3 }}"
    assert template(source).render([]) == "-" * 20 + "1210245.033"
    assert template("{{ [1] * 2 }}{{ 0.5 ** 2 }}{{ 2 ** -1 }}").render([]) == "[1, 1]0.250.5"


class TestFallback:
    CHAT = CHATS["with system"][:1] + CHATS["one question"]

    def test_chatml_where_the_vocabulary_has_it(self, tmp_path: Path) -> None:
        control = ["<|im_start|>", "<|im_end|>"]
        ours, tokenizer = load(write_byte_vocabulary(tmp_path / "a.gguf", control=control))
        text = ours.render(self.CHAT)
        assert text == (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer.encode(text, add_special_tokens=False).count(257) == 3
        assert not ours.render(self.CHAT, add_generation_prompt=False).endswith("assistant\n")

    def test_transcript_where_it_has_not(self, gemma_model_path: Path) -> None:
        ours, _ = load(gemma_model_path)
        assert ours.render(self.CHAT) == "system: Be brief.\n\nuser: Hi\n\nassistant:"
        assert ours.render(self.CHAT, add_generation_prompt=False).endswith("user: Hi\n\n")

    def test_no_source_is_the_transcript(self) -> None:
        plain = ChatTemplate(None, bos_token="", eos_token="")
        assert plain.render(CHATS["one question"]) == "user: Hi\n\nassistant:"

    def test_the_files_own_template_comes_first(self, tmp_path: Path) -> None:
        path = write_byte_vocabulary(
            tmp_path / "a.gguf",
            control=["<|im_start|>"],
            ids={"bos_token_id": 257},
            chat_template="{{ bos_token }}{{ messages[0].content }}",
        )
        ours, _ = load(path)
        assert ours.render(CHATS["one question"]) == "<|im_start|>Hi"

    def test_broken_template_in_the_file(self, tmp_path: Path) -> None:
        path = write_byte_vocabulary(tmp_path / "a.gguf", chat_template="{% for %}")
        with pytest.raises(GGUFFormatError, match=rf"{path}: tokenizer.chat_template: .* compiled"):
            load(path)
