"""From the messages of a chat to the text of a prompt, and to what the answer may hold.

Runs in the text executor; pure functions of their arguments.
"""

from __future__ import annotations

from pipeserve.server.chat_requests import ChatCompletionRequest, ChatPrompt
from pipeserve.server.state import Services
from pipeserve.text.answer import AnswerForm
from pipeserve.text.tokenizer import Tokenizer
from pipeserve.text.tool_calls import special_words
from pipeserve.text.tool_prompt import with_calls_as_text, with_tools_told


def render_chat(request: ChatPrompt, services: Services) -> str:
    """The prompt by the model's own template; tools that it has no place for are told in words.

    Raises:
        ChatTemplateError: the template refused the messages, or failed on them.
    """
    template = services.chat_template
    features = template.features
    messages = request.messages_for_template(features)
    tools = [tool.for_template() for tool in request.offered_tools]
    if not features.tool_calls:
        messages = with_calls_as_text(messages)
    if tools and not features.tools:
        has_system = template.takes_system_messages
        messages = with_tools_told(messages, tools, told_to="system" if has_system else "user")
    generation_prompt = request.add_generation_prompt
    return template.render(
        messages,
        add_generation_prompt=True if generation_prompt is None else generation_prompt,
        tools=tools or None,
        extra=request.template_variables,
    )


def encode_chat(text: str, tokenizer: Tokenizer) -> list[int]:
    """A template writes the special tokens itself, but some leave BOS to the tokenizer."""
    prompt = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    if not tokenizer.add_bos or bos is None or prompt[:1] == [bos]:
        return prompt
    return [bos, *prompt]


def answer_form(request: ChatCompletionRequest, prompt: str, services: Services) -> AnswerForm:
    """What the answer to this prompt may hold besides text."""
    features = services.chat_template.features
    tags = features.reasoning
    names = frozenset(tool.function.name for tool in request.offered_tools)
    return AnswerForm(
        reasoning=None if request.reasoning_format == "none" else tags,
        is_reasoning_open=tags is not None and prompt.rstrip().endswith(tags.opening),
        shows_reasoning=request.include_reasoning is not False,
        tool_calls=features.tool_call_format if names else None,
        tool_names=names,
        max_calls=1 if request.parallel_tool_calls is False else None,
    )


def shown_token_ids(form: AnswerForm, services: Services) -> tuple[int, ...]:
    """Control tokens that the answer's parts are told apart by, and so must be in its text."""
    words: tuple[str, ...] = ()
    if form.tool_calls is not None:
        words += special_words(form.tool_calls)
    tags = services.chat_template.features.reasoning
    if tags is not None:
        words += (tags.opening, tags.closing)
    ids = map(services.tokenizer.token_id, words)
    return tuple(
        index for index in ids if index is not None and services.tokenizer.is_special(index)
    )
