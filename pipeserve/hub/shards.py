"""The naming of sharded GGUF sets: NAME-00001-of-0000N.gguf, as llama.cpp's gguf-split writes it.

Pure text; it must not know where the files lie.
"""

from __future__ import annotations

import re

from pipeserve.errors import HubError

_SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf")


def shard_names(file_name: str) -> tuple[str, ...]:
    """All file names of the set that file_name opens; just file_name where it is no shard.

    Raises:
        HubError: file_name is a later shard, or its numbers make no sense.
    """
    shard = _SHARD.fullmatch(file_name)
    if shard is None:
        return (file_name,)
    index, count = int(shard["index"]), int(shard["count"])
    names = tuple(f"{shard['stem']}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1))
    if not 1 <= index <= count:
        raise HubError(f"{file_name}: there is no shard {index} in a set of {count}")
    if index != 1:
        raise HubError(f"{file_name} is shard {index} of {count}; name the first one: {names[0]}")
    return names
