"""Which options a running daemon follows."""

from __future__ import annotations

from pipeserve.config import Config
from pipeserve.reload import RELOADABLE, follow


def test_only_reloadable_options_are_followed() -> None:
    now = Config(port=1, max_body_bytes=2048)
    config, need_restart = follow(now, Config(port=2, log_level="debug", block_size=8))
    assert (config.log_level, config.max_body_bytes) == ("debug", Config().max_body_bytes)
    assert (config.port, config.block_size) == (1, Config().block_size)
    assert need_restart == ["block_size", "port"]


def test_reloadable_options_exist() -> None:
    assert set(Config.model_fields) >= RELOADABLE
