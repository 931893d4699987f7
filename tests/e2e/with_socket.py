"""Runs a program as systemd's socket unit does: FD, then the program and its arguments."""

from __future__ import annotations

import os
import sys

os.dup2(int(sys.argv[1]), 3, inheritable=True)
environ = {**os.environ, "LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execve(sys.executable, [sys.executable, *sys.argv[2:]], environ)
