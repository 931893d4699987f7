"""Errors cross from the engine process to the daemon with their text and everything in them."""

from __future__ import annotations

import pickle

import pytest

from pipeserve import errors
from pipeserve.errors import ModelError, PipeserveError, QueueFullError, RequestError


def all_kinds(kind: type[PipeserveError] = PipeserveError) -> list[type[PipeserveError]]:
    return [kind, *(deeper for sub in kind.__subclasses__() for deeper in all_kinds(sub))]


def example(kind: type[PipeserveError]) -> PipeserveError:
    if issubclass(kind, ModelError):
        return kind("/models/a b.gguf", "it has no layers")
    if issubclass(kind, QueueFullError):
        return kind("too many wait", retry_after_s=7)
    if issubclass(kind, RequestError):
        return kind("wrong", param="top_k")
    return kind("set devices to cpu")


@pytest.mark.parametrize("kind", all_kinds(), ids=lambda kind: kind.__name__)
def test_survives_pickle(kind: type[PipeserveError]) -> None:
    error = example(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_every_class_is_in_the_tree_that_the_module_draws() -> None:
    drawn = errors.__doc__ or ""
    assert all(kind.__name__ in drawn for kind in all_kinds())
