"""A real systemd, as a user's service manager, in a mount namespace of its own.

Run as a program (`unshare -m`) it starts the manager over a folder of units and waits for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SYSTEMD = "/usr/lib/systemd/systemd"


def can_run() -> bool:
    """Whether this user may mount, and systemd is there."""
    if os.geteuid() != 0 or not Path(SYSTEMD).exists() or shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-m", "true"], check=False).returncode == 0


class ServiceManager:
    """systemctl --user on that manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, *arguments: str, timeout_s: float = 60.0) -> str:
        done = subprocess.run(
            ["systemctl", "--user", *arguments],
            env=environ(self._folder),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"systemctl {arguments}: {done.stderr}"
        return done.stdout

    def show(self, unit: str, *names: str) -> dict[str, str]:
        lines = self.run("show", unit, f"--property={','.join(names)}").splitlines()
        return dict(line.split("=", 1) for line in lines)


def environ(folder: Path) -> Mapping[str, str]:
    return {
        **os.environ,
        "XDG_RUNTIME_DIR": str(folder),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "SYSTEMD_UNIT_PATH": f"{folder / 'units'}:",
    }


@contextmanager
def service_manager(folder: Path) -> Iterator[ServiceManager]:
    """Over the units in folder/units; its services are stopped when the context is left."""
    folder.chmod(0o700)
    (folder / "config").mkdir()
    process = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", sys.executable, __file__],
        env=environ(folder),
        stdin=subprocess.DEVNULL,
    )
    manager = ServiceManager(folder)
    try:
        _await_socket(folder / "systemd" / "private", process)
        yield manager
    finally:
        process.terminate()
        process.wait(30)


def _await_socket(path: Path, process: subprocess.Popen[bytes]) -> None:
    import time

    end_s = time.monotonic() + 20
    while not path.exists():
        assert process.poll() is None, "systemd ended"
        assert time.monotonic() < end_s, "systemd does not come up"
        time.sleep(0.05)


def main() -> None:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    Path("/run/systemd/system").mkdir(parents=True)  # else it believes that it has no business here
    os.execv(SYSTEMD, [SYSTEMD, "--user", "--unit=pipeserve.socket"])


if __name__ == "__main__":
    main()
