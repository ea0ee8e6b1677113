"""A TLS listener that strangers cannot fill: whoever has not finished its handshake is one of a few, for a short time.

``asyncio.Server`` takes in as many handshakes as there are descriptors. Here the oldest unfinished one makes room for the
next, and a want of descriptors (of whatever cause) is a pause, not an end.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable

import structlog

STRANGERS_MAX = 32  # handshakes under way
EXHAUSTED_SECONDS = 0.1  # pause after accept() failed, mostly for want of file descriptors
NOTICE_SECONDS = 60.0  # between two log lines about that
_BACKLOG = 128
_log = structlog.get_logger("caserver.forwarding")


class Doorway:
    """Listens on every address of a host; each finished handshake gets a protocol of ``factory``."""

    def __init__(
        self, factory: Callable[[], asyncio.BaseProtocol], *, context: ssl.SSLContext, handshake_deadline: float
    ) -> None:
        self._factory = factory
        self._context = context
        self._deadline = handshake_deadline
        self._sockets: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._strangers: dict[asyncio.Task[None], None] = {}  # in the order of their arrival
        self._noticed = float("-inf")

    async def start(self, host: str, port: int) -> None:
        """Bind and begin to accept; OSError if an address cannot be bound (then none is)."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, address in dict.fromkeys((each[0], each[4][:2]) for each in found):
                listening = socket.create_server(address, family=family, backlog=_BACKLOG)
                listening.setblocking(False)
                self._sockets.append(listening)
        except OSError:
            await self.close()
            raise
        self._accepting = [loop.create_task(self._accept(each)) for each in self._sockets]

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the first bound address; RuntimeError before ``start`` and after ``close``."""
        if not self._sockets:
            raise RuntimeError("the doorway is not open")
        host, port = self._sockets[0].getsockname()[:2]
        return str(host), int(port)

    @property
    def strangers(self) -> int:
        """Handshakes under way."""
        return len(self._strangers)

    async def close(self) -> None:
        """Stop listening and drop unfinished handshakes; finished ones belong to their protocols."""
        tasks = [*self._accepting, *self._strangers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listening in self._sockets:
            listening.close()
        self._sockets.clear()
        self._accepting.clear()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as exc:
                self._notice(exc, loop.time())
                await asyncio.sleep(EXHAUSTED_SECONDS)
                continue
            self._admit(connection, loop)

    def _admit(self, connection: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        if len(self._strangers) >= STRANGERS_MAX:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.cancel()
        task = loop.create_task(self._shake_hands(connection, loop))
        self._strangers[task] = None
        task.add_done_callback(lambda done: self._strangers.pop(done, None))

    async def _shake_hands(self, connection: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        try:
            await loop.connect_accepted_socket(
                self._factory, connection, ssl=self._context, ssl_handshake_timeout=self._deadline
            )
        except OSError:  # no TLS, no certificate of ours, or too slow: nothing worth a line
            connection.close()
        except BaseException:
            connection.close()
            raise

    def _notice(self, exc: OSError, now: float) -> None:
        if now - self._noticed >= NOTICE_SECONDS:
            self._noticed = now
            _log.warning("accept_failed", error=str(exc))
