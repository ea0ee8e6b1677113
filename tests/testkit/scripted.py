"""An HTTP server with scripted answers, and a record of what it was asked: the other end for client and commands."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as it arrived."""

    method: str
    target: str
    headers: dict[str, str]
    body: str


@dataclass(slots=True)
class Scripted:
    """What to answer next, and what was asked so far."""

    port: int = 0
    status: int = 200
    body: str = "{}"
    asked: list[Asked] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    first: list[str] = field(default_factory=list)  # bodies of the answers before that one, with 200

    def answers(self, body: str, status: int = 200) -> None:
        self.body, self.status = body, status

    def answers_in_turn(self, *bodies: str) -> None:
        """Answer one request with each of ``bodies``, and what comes then as before."""
        self.first.extend(bodies)

    def next_answer(self) -> tuple[str, int]:
        return (self.first.pop(0), 200) if self.first else (self.body, self.status)


@contextmanager
def scripted_server() -> Iterator[Scripted]:
    script = Scripted()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            script.asked.append(Asked(self.command, self.path, dict(self.headers), body))
            body, status = script.next_answer()
            answer = body.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_PUT = do_DELETE = _answer  # noqa: N815 - http.server looks for these names

        def date_time_string(self, timestamp: float | None = None) -> str:
            return "Mon, 23 Nov 2026 12:00:00 GMT"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        script.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield script
        finally:
            server.shutdown()
            thread.join()
