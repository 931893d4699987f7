"""The load tools against a scripted server: they count what it sent, and say when it fails."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

LOADTEST = Path(__file__).parent.parent / "loadtest"


class ScriptedServer(ThreadingHTTPServer):
    """Streams max_tokens pieces of text per chat; each scrape adds 0.5 s to stage 1's busy time."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, object]] = []
        self.num_scrapes = 0
        self.stage_labels = ('stage="0"', 'stage="1"')
        self.failing = ""
        """"": none fails; "refuse": status 429; "break": an error in mid-stream."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            return self._send(200, json.dumps({"data": [{"id": "scripted"}]}))
        self.server.num_scrapes += 1
        name = "pipeserve:stage_busy_seconds_total"
        busy_s = self.server.num_scrapes * 0.5
        first, second = self.server.stage_labels
        self._send(200, f"# TYPE x y\n{name}{{{first}}} 1.0\n{name}{{{second}}} {busy_s}\n")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.server.failing == "refuse":
            return self._send(429, json.dumps({"error": {"message": "too many"}}))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for _ in range(body["max_tokens"]):
            self._event({"choices": [{"delta": {"content": "a"}}]})
        if self.server.failing == "break":
            self._event({"error": {"message": "stage 1 died"}})
        self._event({"choices": [{"delta": {}, "finish_reason": "length"}]})
        usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
        self._event({"choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, event: object) -> None:
        self._chunk(f"data: {json.dumps(event)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        thread = threading.Thread(target=scripted.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield scripted
        scripted.shutdown()
        thread.join()


def streams(server: ScriptedServer, *options: str) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return subprocess.run(
        [sys.executable, str(LOADTEST / "streams.py"), "--url", url, *options],
        capture_output=True,
        text=True,
        check=False,
    )


def test_streams_tells_stages_of_replicas_apart(server: ScriptedServer) -> None:
    server.stage_labels = ('replica="0",stage="0"', 'replica="1",stage="0"')
    done = streams(server, "--streams=1", "--requests=1", "--max-tokens=5", "--json")
    report = json.loads(done.stdout)
    assert report["stage_busy_shares"] == [0.0, pytest.approx(0.5 / report["wall_s"])]


def test_streams_counts_what_was_sent(server: ScriptedServer) -> None:
    done = streams(server, "--streams=3", "--requests=7", "--max-tokens=5", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["num_requests"] == 7
    assert report["num_failed"] == 0
    assert report["num_prompt_tokens"] == 7 * 7
    assert report["num_output_tokens"] == 7 * 5
    assert report["output_tokens_per_s"] == pytest.approx(35 / report["wall_s"])
    assert 0 < report["ttft_p50_s"] <= report["ttft_p99_s"] < report["wall_s"]
    assert 0 <= report["itl_p50_s"] <= report["itl_p99_s"]
    assert report["stage_busy_shares"] == [0.0, pytest.approx(0.5 / report["wall_s"])]
    assert len(server.bodies) == 7 + 1  # and one to warm up
    for body in server.bodies:
        assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("scripted", 5, True)
    assert len({json.dumps(body["messages"]) for body in server.bodies}) == 8


def test_streams_prints_a_table(server: ScriptedServer) -> None:
    done = streams(server, "--requests=2", "--max-tokens=1", "--workload=mixed")
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert lines["output tokens"].strip() == "2"
    assert lines["ITL p50, ms"].strip() == "-"
    assert "%" in lines["busy share per stage"]


def test_streams_says_when_requests_fail(server: ScriptedServer) -> None:
    server.failing = "break"
    done = streams(server, "--requests=2", "--warmup=0", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["num_failed"] == 2
    assert "request 0: stage 1 died" in done.stderr
    server.failing = "refuse"
    done = streams(server, "--requests=2")
    assert done.returncode == 1
    assert "status 429" in done.stderr


# Not importorskip: importing Locust patches the standard library for gevent.
@pytest.mark.skipif(
    importlib.util.find_spec("locust") is None, reason="Locust comes with `make loadtest` only"
)
def test_locust_reports_ttft_and_itl_as_rows(server: ScriptedServer, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "locust", "-f", str(LOADTEST / "locustfile.py"), "--headless"),
            *("--users=2", "--spawn-rate=2", "--run-time=2s", "--stop-timeout=9s", "--json"),
            f"--host=http://127.0.0.1:{server.server_address[1]}",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "MAX_TOKENS": "4"},
    )
    assert done.returncode == 0, done.stderr
    rows = {(row["method"], row["name"]): row for row in json.loads(done.stdout)}
    path = "/v1/chat/completions"
    num_chats = rows["POST", path]["num_requests"]
    assert num_chats >= 1
    assert rows["POST", path]["num_failures"] == 0
    assert rows["TTFT", path]["num_requests"] == num_chats
    assert rows["ITL", path]["num_requests"] == num_chats * 3
