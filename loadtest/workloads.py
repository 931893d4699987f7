"""What the load tools ask: short chats, and a mix with longer prompts.

The n-th prompt depends on n alone, and its number comes first, so that prompts share no long
prefix beyond what the chat template puts before them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

Messages = list[dict[str, str]]

_QUESTIONS = (
    "Why does bread rise in the oven?",
    "How do I take the square root of a number without a calculator?",
    "Name three uses for an old newspaper.",
    "What makes the sea salty?",
    "Write a two-line rhyme about a lighthouse.",
    "Explain to a child what a shadow is.",
    "Which is faster, sound or light, and how can I tell?",
    "Plan a walk of one hour through a small town.",
    "What should I pack for a rainy weekend?",
    "How does a bicycle stay upright?",
)

_PARAGRAPH = (
    "The mill stood where the river narrowed, and for two hundred years its wheel had turned "
    "whenever there was grain to grind. When the railway came, flour arrived from the coast in "
    "sacks that cost less than the miller's own, and the wheel stood still for the first time. "
    "The miller's daughter, who had learned to read gauges at the pumping station, took the "
    "stones out and put a dynamo in. By the second winter the street from the bridge to the "
    "church was lit, and people who had never bought her father's flour paid her for light. "
)


def chat(index: int) -> Messages:
    """A short question."""
    question = _QUESTIONS[index % len(_QUESTIONS)]
    return [{"role": "user", "content": f"Question {index}. {question}"}]


def mixed(index: int) -> Messages:
    """Of ten prompts, seven are chats, two are about 3 paragraphs, one is about 10."""
    num_paragraphs = (0, 3, 0, 0, 10, 0, 0, 3, 0, 0)[index % 10]
    if not num_paragraphs:
        return chat(index)
    text = f"Story {index}. {_PARAGRAPH * num_paragraphs}"
    return [{"role": "user", "content": f"{text}\n\nSay in one sentence what happened."}]


WORKLOADS: Mapping[str, Callable[[int], Messages]] = MappingProxyType(
    {"chat": chat, "mixed": mixed}
)
