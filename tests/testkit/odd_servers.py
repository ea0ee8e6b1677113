"""Servers that behave as a Vault server, or a proxy before one, never should."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.testkit.cluster import LOOPBACK

Script = Callable[[socket.socket, threading.Event], None]  # what is done with a connection; the event: it is over

PAUSE = 0.02  # seconds between two bytes that drip: no single wait for one is ever long
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
GOOD = OK + b'Content-Length: 20\r\n\r\n{"data": {"x": "y"}}'


@contextmanager
def serving(script: Script, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server whose every connection is ``script``; its address. Scripts that go on for ever end with the server."""
    over = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError), self._opened() as connection:  # the client may have enough of it
                script(connection, over)

        def _opened(self) -> socket.socket:
            request: socket.socket = self.request
            return request if tls is None else tls.wrap_socket(request, server_side=True)

    with socketserver.ThreadingTCPServer((LOOPBACK, 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield f"{'http' if tls is None else 'https'}://{LOOPBACK}:{server.server_address[1]}"
        finally:
            over.set()
            server.shutdown()


def dripping(head: bytes, drip: bytes) -> Script:
    """``head`` at once, then ``drip`` again and again, each time soon."""

    def script(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(head)
        while not over.wait(PAUSE):
            connection.sendall(drip)

    return script


def flooding(head: bytes) -> Script:
    """``head``, and then as much as the other side takes in."""

    def script(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(head)
        while not over.is_set():
            connection.sendall(b"x" * 65536)

    return script


def saying(reply: bytes) -> Script:
    """``reply`` to the first request."""

    def script(connection: socket.socket, _: threading.Event) -> None:
        read_request(connection)
        connection.sendall(reply)

    return script


def read_request(connection: socket.socket) -> bytes:
    """The head of a request: a connection that closes with something unread takes its answer back."""
    read = b""
    while b"\r\n\r\n" not in read and (more := connection.recv(65536)):
        read += more
    return read
