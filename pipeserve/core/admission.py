"""AdmissionParams: on what terms a sequence waits, runs and shares computed blocks.

Values only; the engine half gives them their meaning.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionParams:
    """What a request says about its place in the line; the defaults are those of a plain chat."""

    priority: int = 0
    """Lower is served first."""
    account: str = ""
    """Whose share of the tokens it takes: a name for the API key, empty where there is none."""
    is_background: bool = False
    """Takes only what interactive sequences leave, and gives it back as soon as they want it."""
    cache_salt: str = ""
    """Blocks are shared only among sequences with the same one."""
