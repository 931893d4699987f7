"""The bodies of /tokenize, /detokenize and /apply-template, and what is answered to them; also
/tokenizer_info, which has none.

Runs in the text executor; pure functions of their arguments. The first two speak the fields of
llama-server and of vLLM.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from pipeserve.errors import InvalidParameterError
from pipeserve.server.body import Body, check_token_ids, parse
from pipeserve.server.chat_messages import MAX_MESSAGES, ChatMessage
from pipeserve.server.chat_prompt import render_chat
from pipeserve.server.chat_requests import ChatPrompt
from pipeserve.server.json_pieces import list_items, text_pieces, to_json
from pipeserve.server.state import Services
from pipeserve.text.tokenizer import Tokenizer


class TokenizeRequest(ChatPrompt):
    """POST /tokenize: one of content, prompt and messages."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": [name]} for name in ("content", "prompt", "messages")]
        }
    )

    model: str | None = None
    content: str | None = None
    """A text; special tokens around it only if add_special says so (llama-server)."""
    prompt: str | None = None
    """A text; special tokens around it unless add_special_tokens says otherwise (vLLM)."""
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1, max_length=MAX_MESSAGES)] = ()
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    """false: names of control tokens are text like any other."""
    with_pieces: bool | None = None
    """The tokens come as objects with id and piece (llama-server)."""
    return_token_strs: bool | None = None
    """The tokens' texts come as a list of their own (vLLM)."""

    @model_validator(mode="after")
    def _one_of_three(self) -> TokenizeRequest:
        given = [self.content is not None, self.prompt is not None, bool(self.messages)]
        if sum(given) != 1:
            raise InvalidParameterError(
                f"content is one of {sum(given)} texts that are given; send one of content, prompt "
                "and messages",
                param="content",
            )
        return self

    @property
    def adds_special(self) -> bool:
        """Whether the tokenizer puts special tokens around the text."""
        given = self.add_special if self.add_special_tokens is None else self.add_special_tokens
        return self.prompt is not None if given is None else given


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: tuple[int, ...]


class ApplyTemplateRequest(ChatPrompt):
    """POST /apply-template."""

    model: str | None = None


def tokenize(body: bytes, services: Services, strict_fields: bool) -> list[str]:
    """The answer to a body of /tokenize, as pieces of JSON.

    Raises:
        RequestError: the body is malformed, names another model or does not fit the template.
    """
    request = parse(body, TokenizeRequest, strict_fields=strict_fields)
    _check_model(request.model, services)
    text = request.content if request.prompt is None else request.prompt
    if text is None:
        text = render_chat(request, services)
    tokenizer = services.tokenizer
    ids = tokenizer.encode(
        text,
        add_special_tokens=request.adds_special,
        parse_special=request.parse_special is not False,
    )
    facts = {"count": len(ids), "max_model_len": services.engine.facts.context_length}

    def token(token_id: int) -> object:
        if not request.with_pieces:
            return token_id
        return {"id": token_id, "piece": _piece(token_id, tokenizer)}

    def text_of(token_id: int) -> str:
        return _bytes(token_id, tokenizer).decode(errors="replace")

    answer = ['{"tokens":[', *list_items(ids, token), f"],{to_json(facts)[1:-1]}"]
    if request.return_token_strs:
        answer += [',"token_strs":[', *list_items(ids, text_of), "]"]
    return [*answer, "}"]


def detokenize(body: bytes, services: Services, strict_fields: bool) -> list[str]:
    """The answer to a body of /detokenize; raises as tokenize does."""
    request = parse(body, DetokenizeRequest, strict_fields=strict_fields)
    _check_model(request.model, services)
    check_token_ids(request.tokens, vocab_size=services.tokenizer.vocab_size, param="tokens")
    text = services.tokenizer.decode(request.tokens, skip_special=False)
    pieces = [*text_pieces(text)]
    return ['{"content":', *pieces, ',"prompt":', *pieces, "}"]


def apply_template(body: bytes, services: Services, strict_fields: bool) -> list[str]:
    """The answer to a body of /apply-template; raises as tokenize does."""
    request = parse(body, ApplyTemplateRequest, strict_fields=strict_fields)
    _check_model(request.model, services)
    return ['{"prompt":', *text_pieces(render_chat(request, services)), "}"]


def tokenizer_info(services: Services) -> dict[str, Any]:
    """What programs need beside /tokenize to do without the model's own tokenizer files; in the
    names of transformers and of vLLM."""
    tokenizer = services.tokenizer
    return {
        "bos_token": tokenizer.bos_token or None,
        "eos_token": tokenizer.eos_token or None,
        "add_bos_token": tokenizer.add_bos,
        "chat_template": services.chat_template.source,
        "model_max_length": services.engine.facts.context_length,
    }


def _check_model(name: str | None, services: Services) -> None:
    if name is not None:
        services.card.check_name(name)


def _bytes(token_id: int, tokenizer: Tokenizer) -> bytes:
    return tokenizer.token_bytes(token_id, skip_special=False)


def _piece(token_id: int, tokenizer: Tokenizer) -> str | list[int]:
    """A text, or the bytes of what is none on its own."""
    raw = _bytes(token_id, tokenizer)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)
