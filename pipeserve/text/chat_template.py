"""ChatTemplate: messages to prompt, by the Jinja template that came with the model.

The template is a stranger's program: it runs in a sandbox without a way to Python. It can still
take long, so the caller renders in a worker with a deadline. Safe to render from any thread.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from pipeserve.errors import ChatTemplateError, GGUFFormatError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.text.template_features import TemplateFeatures
from pipeserve.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""For a file without a template whose vocabulary has ChatML's tokens."""

PLAIN = (
    "{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For a file without a template: a transcript, which a base model can go on with."""

MAX_OPERATION_SIZE = 1_000_000
"""Most characters, items or bits that one * or ** in a template may produce."""

MAX_SOURCE_CHARACTERS = 1_000_000
"""A hundred times what is common."""

# What the expressions of a template can raise, sandbox or not.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,  # RecursionError is one
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A compiled template and the names of the tokens that it may write."""

    def __init__(self, source: str | None, *, bos_token: str, eos_token: str) -> None:
        """Compile `source`; None takes the plain transcript.

        Raises:
            ChatTemplateError: the source is not a template.
        """
        self._bos_token = bos_token
        self._eos_token = eos_token
        source = PLAIN if source is None else source
        self.source = source
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise ChatTemplateError(
                f"the model's chat template has {len(source)} characters; at most "
                f"{MAX_SOURCE_CHARACTERS} are possible"
            )
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.features = TemplateFeatures.of(source, environment)
        except (
            jinja2.TemplateError,
            SyntaxError,
            RecursionError,
            MemoryError,
            ValueError,
        ) as error:
            raise ChatTemplateError(
                f"the model's chat template cannot be compiled: {error}"
            ) from error

    @classmethod
    def from_gguf(cls, gguf_file: GGUFFile, tokenizer: Tokenizer) -> ChatTemplate:
        """The file's own template; without one ChatML where the vocabulary has it, else PLAIN.

        Raises:
            GGUFFormatError: the file's template is not a text or cannot be compiled.
        """
        fallback = CHATML if tokenizer.has_token("<|im_start|>") else PLAIN
        source = gguf_file.metadata_str("tokenizer.chat_template", fallback)
        try:
            return cls(source, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
        except ChatTemplateError as error:
            raise GGUFFormatError(gguf_file.path, f"tokenizer.chat_template: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`; `extra` holds further variables of the template.

        Raises:
            ChatTemplateError: the template refused the messages, or failed on them.
        """
        variables = {
            **(extra or {}),
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._bos_token,
            "eos_token": self._eos_token,
        }
        try:
            return self._template.render(variables)
        except _RENDER_ERRORS as error:
            raise ChatTemplateError(
                f"the model's chat template failed: {str(error) or type(error).__name__}",
                param="messages",
            ) from error

    @functools.cached_property
    def takes_system_messages(self) -> bool:
        """Whether a chat may begin with one; some templates refuse it, some leave it out."""
        system = {"role": "system", "content": _PROBE}
        try:
            return _PROBE in self.render([system, {"role": "user", "content": "?"}])
        except ChatTemplateError:
            return False


_PROBE = "Be brief."


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Options, filters and functions that templates rely on, as transformers defines them
    (src/transformers/utils/chat_template_utils.py)."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    del environment.globals["lipsum"]  # no template needs it, and its output has no bound
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        namespace=_Namespace,
        dict=_Dict(),
    )
    return environment


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox in which * and ** cannot build huge values: one such operation would hold the
    interpreter's lock, and with it the whole daemon, past any deadline."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if _result_size(operator, left, right) > MAX_OPERATION_SIZE:
            raise jinja2.exceptions.SecurityError(
                f"the result of {operator} would be larger than {MAX_OPERATION_SIZE}"
            )
        return super().call_binop(context, operator, left, right)


def _result_size(operator: str, left: Any, right: Any) -> int:
    """Bound of the result's items, characters or bits; 0 where it cannot be large."""
    if isinstance(left, int) and isinstance(right, int):
        if operator == "**":
            return left.bit_length() * max(right, 0)
        return left.bit_length() + right.bit_length()
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(count, int):
            return len(sequence) * max(count, 0)
    return 0


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} marks what the model wrote, for training; here its content just shows."""

    tags = {"generation"}  # noqa: RUF012 - declared so by the base class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace() without names that could reach the object itself."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_attribute_name(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute_name(name)
        super().__setitem__(name, value)


def _check_attribute_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the name {name!r}")


class _Dict:
    """dict as a function: the type itself would offer a template more than it needs."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
