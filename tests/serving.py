"""A server of `nanopref.people` for tests: in a process of its own, which can be killed and started anew."""

import http.client
import json
import re
import socket
import time
from pathlib import Path

from helpers import Fork


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """`python -m nanopref.people` with these words, at a free port."""

    def __init__(self, out: Path, *words: str):
        self.out, self.port = out, free_port()
        self.words = ("--out", str(out), "--port", str(self.port), *words)
        self.process, self.key = None, ""
        self.start()

    def start(self) -> None:
        self.out.with_suffix(".log").unlink(missing_ok=True)
        self.process = Fork(self.out.with_suffix(".log"), "nanopref.people", *self.words)
        while not (found := re.search(r"key=(\S+)", self.output())):
            assert self.process.is_alive(), self.output()
            time.sleep(0.02)
        assert self.key in ("", found[1])  # the link stays as it was
        self.key = found[1]

    def output(self) -> str:
        return self.process.log.read_text() if self.process.log.exists() else ""

    @property
    def link(self) -> str:
        return f"http://127.0.0.1:{self.port}/?key={self.key}"

    def kill(self) -> None:
        self.process.kill()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)

    def request(self, method: str, path: str, body: bytes = b"", connection=None, **headers) -> tuple[int, bytes, dict]:
        """Status, content and headers of an answer."""
        connection = connection or self.connect()
        headers = {"X-Key": self.key} | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {name: value for name, value in headers.items() if value is not None})
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.headers)

    def ask(self, path: str, connection=None, **fields) -> dict:
        """What the page would be told."""
        status, content, _ = self.request("POST", path, json.dumps(fields).encode(), connection)
        assert status == 200, content
        return json.loads(content)

    def vote(self, annotator: str, pair: dict, choice: str, connection=None, **more) -> dict:
        said = {"id": pair["id"], "again": pair["again"], "choice": choice, "seconds": 1.5, "why": ""} | more
        return self.ask("/vote", connection, annotator=annotator, **said)

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.out / "votes.jsonl").read_text().splitlines()]
