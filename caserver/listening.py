"""A listener that strangers cannot exhaust: counts connections when they arrive, before anything is spent on them.

Beyond the limits a connection is turned away at once. Few may be in their TLS handshake at a time, each for a short time,
and a new one makes room by ending the oldest. Without descriptors the listener waits; it says so once a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from asyncio import sslproto
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from ssl import SSLContext
from typing import Any

import structlog

from caserver import unix_socket
from caserver.unix_socket import UnixSocket

HANDSHAKE_SECONDS = 10.0
HANDSHAKES_MAX = 128
EXHAUSTED_SECONDS = 0.1  # pause after accept() failed, mostly for want of file descriptors
NOTICE_SECONDS = 60.0  # between two log lines that say the same
_BACKLOG = 1024
_AT_ONCE = 16  # connections taken in before everything else gets a turn
_READ_BYTES = 64 << 10
_TLS_BYTES = 16 << 10  # a record

_log = structlog.get_logger("caserver.listening")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the clients of one listener may hold; ``refusal`` is what those turned away are told where there is no TLS."""

    connections: int
    per_client: int  # of these, from one address; 0 = all of them
    handshakes: int = HANDSHAKES_MAX
    handshake_seconds: float = HANDSHAKE_SECONDS
    refusal: bytes = b""


Address = tuple[str, int] | UnixSocket


class _NarrowTLS(sslproto.SSLProtocol):
    """TLS of one connection, whose buffer many can have: asyncio's own takes a quarter of a megabyte for each."""

    max_size = _TLS_BYTES


class Listening:
    """One address. Everything runs on the loop that calls ``start``; whose connection ends calls ``left``."""

    def __init__(
        self,
        address: Address,
        *,
        connection: Callable[[], asyncio.Protocol],
        limits: Limits,
        tls: SSLContext | None,
    ) -> None:
        """``address`` is host and port, or a Unix socket; ``connection`` makes what serves one connection; port 0 takes a free one."""
        self._address = address
        self._inode: unix_socket.Inode | None = None  # of a Unix socket, once it is bound
        self._connection, self._limits, self._tls = connection, limits, tls
        self._sockets: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._arriving: dict[asyncio.Task[object], None] = {}  # in the order of their arrival
        self._open: dict[asyncio.BaseProtocol, str] = {}
        self._clients: Counter[str] = Counter()
        self._noticed: dict[str, float] = {}

    async def start(self) -> None:
        """Bind every address of the host and begin; OSError if one cannot be bound (then none is)."""
        try:
            if isinstance(self._address, UnixSocket):
                listening, self._inode = unix_socket.bound(self._address)
                self._sockets.append(listening)
            else:
                await self._bind(*self._address)
        except OSError as exc:
            self.close()
            raise OSError(exc.errno, f"cannot listen on {self._shown}: {_reason(exc)}") from exc
        for each in self._sockets:
            task = asyncio.get_running_loop().create_task(self._accept(each))
            # Closed by the end of the task that waits on it: a descriptor must not be reused while the loop watches it.
            task.add_done_callback(partial(_closed, each))
            self._accepting.append(task)

    async def _bind(self, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                self._sockets.append(_bound(family, address))
            except OSError as exc:
                if exc.errno != errno.EAFNOSUPPORT or len(found) == 1:  # "localhost" on a machine without IPv6
                    raise

    def renew(self, *, limits: Limits, tls: SSLContext | None) -> None:
        """Take in new connections by these from now on; open ones, and handshakes under way, go on as they began.

        TLS cannot be turned on or off so.
        """
        if (tls is None) != (self._tls is None):
            raise ValueError(f"{self._shown} cannot change between plain and TLS while it listens")
        self._limits, self._tls = limits, tls

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Host and port of every bound TCP socket; none before ``start`` and after ``close``."""
        return [each.getsockname()[:2] for each in self._sockets if each.family != socket.AF_UNIX]

    @property
    def shown(self) -> list[str]:
        """Every bound socket as people write it: ``host:port``, or ``unix://`` and the path."""
        if isinstance(self._address, UnixSocket):
            return [str(self._address)] if self._sockets else []
        return [f"{host}:{port}" for host, port in self.addresses]

    @property
    def count(self) -> int:
        """Connections that are open, those in their handshake included."""
        return len(self._open)

    def left(self, connection: asyncio.BaseProtocol) -> None:
        """A connection has ended; one that is none of this listener's is nothing."""
        client = self._open.pop(connection, None)
        if client is None:
            return
        self._clients[client] -= 1
        if not self._clients[client]:
            del self._clients[client]

    def close(self) -> None:
        """Take nothing in any more and end the handshakes; open connections stay."""
        sockets, self._sockets = self._sockets, []
        if isinstance(self._address, UnixSocket) and self._inode is not None:
            unix_socket.remove(self._address.path, self._inode)
            self._inode = None
        for task in (*self._accepting, *self._arriving):
            task.cancel()
        if not self._accepting:
            for each in sockets:
                each.close()

    async def wait_closed(self) -> None:
        """Return when everything that ``close`` stopped has ended."""
        await asyncio.gather(*self._accepting, *self._arriving, return_exceptions=True)
        self._accepting.clear()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for _ in range(_AT_ONCE):
                try:
                    connection, address = await loop.sock_accept(listening)
                except OSError as exc:  # no descriptors left, or the connection was gone again
                    self._notice("accept_failed", error=str(exc))
                    await asyncio.sleep(EXHAUSTED_SECONDS)
                else:
                    self._admit(connection, client_of(connection, address))
            await asyncio.sleep(0)

    def _admit(self, connection: socket.socket, client: str) -> None:
        limits = self._limits
        if len(self._open) >= limits.connections or 0 < limits.per_client <= self._clients[client]:
            self._notice("connections_refused", open=len(self._open), client=client)
            self._refuse(connection)
            return
        if len(self._arriving) >= limits.handshakes:
            oldest = next(iter(self._arriving))
            del self._arriving[oldest]
            oldest.cancel()
        protocol = self._connection()
        self._open[protocol] = client
        self._clients[client] += 1
        seconds = None if self._tls is None else limits.handshake_seconds
        task: asyncio.Task[object] = asyncio.get_running_loop().create_task(
            _welcomed(protocol, connection, self._tls, seconds)
        )
        self._arriving[task] = None
        task.add_done_callback(partial(self._arrived, protocol, connection))

    def _arrived(self, protocol: asyncio.Protocol, connection: socket.socket, task: asyncio.Task[object]) -> None:
        self._arriving.pop(task, None)
        failure = None if task.cancelled() else task.exception()
        if not task.cancelled() and failure is None:
            return
        connection.close()  # also if the task was cancelled before it ran a step
        self.left(protocol)
        if failure is not None and not isinstance(failure, OSError):
            task.get_loop().call_exception_handler({"message": "a connection was not taken in", "exception": failure})

    def _refuse(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            if self._tls is None:
                connection.send(self._limits.refusal)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(_READ_BYTES)  # what is left unread at the end would reset the connection

    def _notice(self, event: str, **details: object) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._noticed.get(event, -NOTICE_SECONDS) >= NOTICE_SECONDS:
            self._noticed[event] = now
            _log.warning(event, listener=self._shown, **details)

    @property
    def _shown(self) -> str:
        return str(self._address) if isinstance(self._address, UnixSocket) else "{}:{}".format(*self._address)


def client_of(connection: socket.socket, address: Any) -> str:
    """Who connected, as far as limits tell clients apart: the IP address, or over a Unix socket the user."""
    if connection.family == socket.AF_UNIX:
        return f"user {unix_socket.user_of(connection)}"
    return str(address[0])


def _reason(exc: OSError) -> str:
    # ``create_server`` adds the address to the text; resolvers have errors of their own.
    if isinstance(exc, FileExistsError | socket.gaierror) or not exc.errno:
        return exc.strerror or str(exc)
    return os.strerror(exc.errno).lower()


def _bound(family: int, address: Any) -> socket.socket:
    listening = socket.create_server(address, family=family, backlog=_BACKLOG)
    listening.setblocking(False)
    return listening


def _closed(listening: socket.socket, _: asyncio.Task[None]) -> None:
    listening.close()


async def _welcomed(
    protocol: asyncio.Protocol, connection: socket.socket, tls: SSLContext | None, seconds: float | None
) -> None:
    """Hand the connection to what serves it, after the handshake where there is TLS."""
    loop = asyncio.get_running_loop()
    if tls is None:
        await loop.connect_accepted_socket(lambda: protocol, connection)
        return
    shaken: asyncio.Future[None] = loop.create_future()
    limit: Any = seconds  # typeshed wants an int
    narrow = _NarrowTLS(loop, protocol, tls, shaken, server_side=True, ssl_handshake_timeout=limit)
    transport, _ = await loop.connect_accepted_socket(lambda: narrow, connection)
    transport.set_write_buffer_limits(high=1)
    try:
        await shaken
    except BaseException:
        transport.close()
        raise
