"""Model names to local GGUF files: pinned models, hf:owner/repo/file.gguf, paths.

Runs on whatever thread asks and blocks on network and disk; it must not know what a GGUF holds.
"""

from pipeserve.hub.resolve import resolve_model

__all__ = ["resolve_model"]
