"""Connections to a Vault server on which an exchange takes no longer, and no more, than it may.

Time-outs of HTTP libraries are those of single waits: who sends a byte now and then is waited for without end. Here every
wait of a connection, from dialling to the last byte of an answer, is cut to what is left of the whole exchange, and what
comes is counted. The allowance is that of the thread which runs the exchange; nothing else of it needs to know.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import requests
import requests.adapters
import urllib3
import urllib3.connection
import urllib3.connectionpool

from caserver.environment import Clock

CONNECT_TIMEOUT = 2.0  # seconds for each address of a server
ANSWER_MAX = 8 << 20  # bytes of one answer, headers included: thousands of issuers, the longest list that is read


class TooMuch(Exception):
    """An answer is larger than any that was asked for."""


class Encoded(Exception):
    """An answer is compressed, which was not asked for and would make its size a guess."""


@dataclass(slots=True)
class _Allowance:
    clock: Clock
    ends: float
    room: int = ANSWER_MAX

    def left(self, most: float | None = None) -> float:
        """Seconds for the next wait; TimeoutError when there are none."""
        left = self.ends - self.clock.monotonic()
        if left <= 0:
            raise TimeoutError
        return left if most is None else min(left, most)

    def took(self, count: int) -> None:
        self.room -= count
        if self.room < 0:
            raise TooMuch


_allowance: ContextVar[_Allowance] = ContextVar("allowance")


@contextmanager
def allowed(clock: Clock, ends: float) -> Iterator[None]:
    """Within, exchanges of this thread end with TimeoutError at ``ends`` (monotonic), or with TooMuch."""
    token = _allowance.set(_Allowance(clock, ends))
    try:
        yield
    finally:
        _allowance.reset(token)


class _Bounded(socket.socket):
    """Waits for the other side no longer than is allowed; these are the calls that urllib3 makes of a connection."""

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        allowance = _allowance.get()
        self.settimeout(allowance.left())
        count = super().recv_into(*args, **kwargs)
        allowance.took(count)
        return count

    def send(self, *args: Any, **kwargs: Any) -> int:
        self.settimeout(_allowance.get().left())
        return super().send(*args, **kwargs)

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        self.settimeout(_allowance.get().left())
        super().sendall(*args, **kwargs)


class _BoundedTLS(_Bounded, ssl.SSLSocket):
    """The same through TLS, whose every read, write and handshake is one wait however many records it takes."""

    def do_handshake(self, block: bool = False) -> None:  # noqa: FBT001, FBT002  the signature is that of ssl
        self.settimeout(_allowance.get().left())
        super().do_handshake(block)


def _dialled(host: str, port: int, options: Any) -> socket.socket:
    """A connection to the first address of ``host`` that takes one; OSError of the last if none does."""
    failed: OSError = socket.gaierror(socket.EAI_NONAME, "no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        timeout = _allowance.get().left(CONNECT_TIMEOUT)
        opened = _Bounded(family, kind, protocol)
        try:
            for option in options or ():
                opened.setsockopt(*option)
            opened.settimeout(timeout)
            opened.connect(address)
        except OSError as exc:
            opened.close()
            failed = exc
        else:
            return opened
    raise failed


class _Connection(urllib3.connection.HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _dialled(self._dns_host, self.port or self.default_port, self.socket_options)


class _TLSConnection(urllib3.connection.HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _dialled(self._dns_host, self.port or self.default_port, self.socket_options)


class _Pool(urllib3.connectionpool.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(urllib3.connectionpool.HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class Transport(requests.adapters.HTTPAdapter):
    """A pool of such connections, with a TLS context of our own where requests would load its own bundle into it."""

    def __init__(self, pool_size: int, context: ssl.SSLContext | None, server_name: str | None) -> None:
        self._tls: dict[str, Any] = {} if context is None else {"ssl_context": context}
        if context is not None:
            context.sslsocket_class = _BoundedTLS
            if server_name is not None:
                self._tls["server_hostname"] = server_name
        super().__init__(pool_connections=1, pool_maxsize=pool_size, max_retries=0, pool_block=True)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **pool_kwargs: Any) -> None:  # noqa: FBT001, FBT002  the signature is that of requests
        """Pools of connections that are bounded."""
        super().init_poolmanager(connections, maxsize, block=block, **pool_kwargs, **self._tls)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Leave the context as it was made: requests would add its bundle of public CAs to it."""
        if not verify:
            conn.cert_reqs = "CERT_NONE"

    def add_headers(self, request: requests.PreparedRequest, **kwargs: Any) -> None:
        """Ask for answers as they are."""
        request.headers["Accept-Encoding"] = "identity"

    def build_response(self, req: requests.PreparedRequest, resp: Any) -> requests.Response:
        """An answer of which nothing was read yet; Encoded if it is not as it was asked for."""
        if resp.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            resp.close()
            resp.release_conn()  # its place in the pool
            raise Encoded
        return super().build_response(req, resp)
