"""LiveOptions: the options that hold now. A reload puts others in their place.

Owned by the event loop. Knows nothing of files or signals.
"""

from __future__ import annotations

from pipeserve.config import Config
from pipeserve.server.api_keys import ApiKeys


class LiveOptions:
    """What handlers look up anew for every request."""

    def __init__(self, config: Config, keys: ApiKeys | None = None) -> None:
        self.config = config
        self.keys = keys or ApiKeys({})

    def replace(self, config: Config, keys: ApiKeys) -> None:
        """From now on these hold; a request that is being served keeps what it looked up."""
        self.config = config
        self.keys = keys
