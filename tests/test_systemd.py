"""The units: systemd accepts them, CUDA survives their hardening, `make install` places them."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeserve.config import Config, load_config
from tests.processes import ROOT

UNITS = ROOT / "systemd"
PROGRAM = "/opt/pipeserve/bin/python"
MOST_EXPOSURE = 2.0
"""systemd-analyze's score from 0 (hardened) to 10; 1.6 with systemd 252."""


def section(unit: str, name: str) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNITS / unit)
    return parser[name]


@pytest.fixture(scope="module")
def service() -> configparser.SectionProxy:
    return section("pipeserve.service", "Service")


def verify(service: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """systemd-analyze on copies whose program exists, since it checks for that."""
    assert service.count(PROGRAM) == 1
    path = folder / "pipeserve.service"
    path.write_text(service.replace(PROGRAM, sys.executable))
    shutil.copy(UNITS / "pipeserve.socket", folder)
    return analyze("verify", "--recursive-errors=no", "--man=no", str(path))


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


@needs_systemd
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    done = verify((UNITS / "pipeserve.service").read_text(), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = analyze("verify", "--man=no", str(tmp_path / "pipeserve.socket"))
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
def test_systemd_would_complain(tmp_path: Path) -> None:
    unit = (UNITS / "pipeserve.service").read_text()
    done = verify(unit.replace("WatchdogSec=60", "WatchdogSecs=60"), tmp_path)
    assert "WatchdogSecs" in done.stderr


@needs_systemd
def test_the_service_is_hardened() -> None:
    unit = str(UNITS / "pipeserve.service")
    done = analyze("security", "--offline=true", f"--threshold={MOST_EXPOSURE * 10:.0f}", unit)
    assert done.returncode == 0, done.stdout.splitlines()[-1]


def test_systemd_waits_longer_than_the_daemon_drains(service: configparser.SectionProxy) -> None:
    drain_timeout_s = Config.model_fields["drain_timeout_s"].default
    assert float(service["TimeoutStopSec"]) >= drain_timeout_s + 10


def test_the_unit_speaks_the_daemons_protocol(service: configparser.SectionProxy) -> None:
    assert service["Type"] == "notify"
    assert service["NotifyAccess"] == "main"
    assert service["KillSignal"] == "SIGTERM"
    assert service["ExecReload"].endswith("-HUP $MAINPID")
    assert float(service["WatchdogSec"]) > 0
    assert service["Restart"] == "on-failure"


def test_cuda_survives_the_hardening(service: configparser.SectionProxy) -> None:
    for option in ("MemoryDenyWriteExecute", "PrivateDevices", "PrivateUsers", "ProcSubset"):
        assert option not in service
    assert service["DeviceAllow"] == "char-nvidia* rwm"
    assert service["LimitMEMLOCK"] == "infinity"
    assert service["Environment"].startswith(("XDG_CACHE_HOME", "HOME"))


def test_the_socket_has_the_daemons_own_address() -> None:
    fields = Config.model_fields
    address = section("pipeserve.socket", "Socket")["ListenStream"]
    assert address == f"{fields['host'].default}:{fields['port'].default}"


def installed(destination: Path, *variables: str) -> None:
    command = ["make", "-s", "install-service", f"DESTDIR={destination}", *variables]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def test_make_install_places_everything_and_keeps_what_was_changed(tmp_path: Path) -> None:
    installed(tmp_path, "PREFIX=/srv/pipeserve")
    lib = tmp_path / "usr/local/lib"
    unit = (lib / "systemd/system/pipeserve.service").read_text()
    assert "ExecStart=/srv/pipeserve/bin/python -P -m pipeserve serve " in unit
    assert (lib / "systemd/system/pipeserve.socket").is_file()
    assert "u pipeserve " in (lib / "sysusers.d/pipeserve.conf").read_text()
    assert "/etc/pipeserve/api-keys" in (lib / "tmpfiles.d/pipeserve.conf").read_text()
    assert (tmp_path / "usr/local/share/pipeserve/monitoring/alerts.yml").is_file()
    config = tmp_path / "etc/pipeserve/config.toml"
    assert load_config(overrides={}, config_file=config, environ={}).model == "demo"
    assert config.stat().st_mode & 0o777 == 0o640
    config.write_text("port = 9000\n")
    installed(tmp_path)
    assert config.read_text() == "port = 9000\n"
