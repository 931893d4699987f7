"""The unit file: systemd accepts it, and its timeouts fit the daemon's defaults."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeserve.config import Config

UNIT = Path(__file__).parent.parent / "systemd" / "pipeserve.service"


@pytest.fixture(scope="module")
def service() -> configparser.SectionProxy:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(UNIT)
    return unit["Service"]


def verify(unit: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """systemd-analyze on a copy whose program exists, since it checks for that."""
    assert unit.count("/opt/pipeserve/.venv/bin/pipeserve") == 1
    path = folder / "pipeserve.service"
    path.write_text(unit.replace("/opt/pipeserve/.venv/bin/pipeserve", sys.executable))
    return subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", "--man=no", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


@needs_systemd
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    done = verify(UNIT.read_text(), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
def test_systemd_would_complain(tmp_path: Path) -> None:
    done = verify(UNIT.read_text().replace("WatchdogSec=60", "WatchdogSecs=60"), tmp_path)
    assert "WatchdogSecs" in done.stderr


def test_systemd_waits_longer_than_the_daemon_drains(service: configparser.SectionProxy) -> None:
    drain_timeout_s = Config.model_fields["drain_timeout_s"].default
    assert float(service["TimeoutStopSec"]) >= drain_timeout_s + 10


def test_the_unit_speaks_the_daemons_protocol(service: configparser.SectionProxy) -> None:
    assert service["Type"] == "notify"
    assert service["NotifyAccess"] == "main"
    assert service["KillSignal"] == "SIGTERM"
    assert float(service["WatchdogSec"]) > 0
    assert service["Restart"] == "on-failure"


def test_cuda_survives_the_hardening(service: configparser.SectionProxy) -> None:
    for option in ("MemoryDenyWriteExecute", "PrivateDevices", "ProtectClock"):
        assert option not in service
