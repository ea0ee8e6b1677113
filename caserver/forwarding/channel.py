"""Both ends of the hop between two nodes: one POST of one frame over mutual TLS, on connections that are kept.

The listener serves a fixed list of operations, not the public API, and hands them to the authority of this node, which
refuses with NotLeader if it does not lead: nothing is ever forwarded twice. Who the peer is, its certificate says; what a
frame says about its origin is kept for the audit trail only, behind the proven name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import aiohttp
import structlog
from aiohttp import hdrs, web

from caserver.errors import CaserverError, CommitUnknown, InvalidRequest, NotLeader, Unavailable
from caserver.internode.identity import NodeIdentity
from caserver.listening import Limits, Listening
from caserver.requests import Answer, Caller, Request, decode_request, encode_answer

PATH = "/internal"
_FRAME_MAX = 4 * 1024 * 1024  # bytes; a list of CSRs within the public limit grows by JSON's escapes
_CONNECTIONS_MAX = 256  # from each peer, and as many to it
_CONNECT_DEADLINE = 3.0  # seconds, handshake included
_HANDSHAKES_MAX = 32  # under way at the listener
_FRAME_DEADLINE = 10.0  # seconds for a whole frame to arrive
_KEEPALIVE = 60.0  # seconds that the client keeps an idle connection; the server keeps it longer
_SERVER_KEEPALIVE = 90.0
_SHUTDOWN_DEADLINE = 5.0
_log = structlog.get_logger("caserver.forwarding")
_aiohttp_log = logging.getLogger("caserver.forwarding.http")

Serve = Callable[[Caller, Request], Awaitable[Answer]]


class _WrongPeer(aiohttp.ClientConnectionError):
    """The other end of a new connection is not the node that was dialled; nothing was sent."""


class _PeerConnector(aiohttp.TCPConnector):
    """Connections to one peer; one that turns out to end at another node is closed before anything is sent."""

    def __init__(self, identity: NodeIdentity, peer: str, *, limit: int) -> None:
        super().__init__(ssl=identity.client_context(), limit=limit, keepalive_timeout=_KEEPALIVE, ttl_dns_cache=None)
        self._identity = identity
        self._expected = peer

    async def connect(self, req: Any, traces: Any, timeout: Any) -> Any:  # noqa: ASYNC109 the base class's signature
        """Take a kept connection or open one (called by the session for every request)."""
        connection = await super().connect(req, traces, timeout)
        transport = connection.transport
        proven = None if transport is None else self._identity.peer_name(transport.get_extra_info("ssl_object"))
        if proven != self._expected:
            connection.close()
            raise _WrongPeer(f"it identifies itself as {proven!r}")
        return connection


class _HopServer(web.Server):
    """What serves the connections of the listener."""

    listening: Listening | None = None

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """Called by every connection that ends."""
        super().connection_lost(handler, exc)
        if self.listening is not None:
            self.listening.left(handler)


class Channel:
    """The internal listener of this node and its connections to the other ones."""

    def __init__(
        self,
        identity: NodeIdentity,
        node: str,
        *,
        peers: Mapping[str, tuple[str, int]],
        bind: tuple[str, int],
        serve: Serve,
        connections_per_peer: int = _CONNECTIONS_MAX,
        frame_max: int = _FRAME_MAX,
    ) -> None:
        """``frame_max`` bounds, in bytes, what either end takes from the other."""
        self._frame_max = frame_max
        self._per_peer = connections_per_peer
        self._identity = identity
        self._node = node
        self._peers = {name: address for name, address in peers.items() if name != node}
        self._bind = bind
        self._serve = serve
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._http: _HopServer | None = None

    async def start(self) -> None:
        """Bind the listener; OSError if the address cannot be bound."""
        http = _HopServer(
            self._handle,
            keepalive_timeout=_SERVER_KEEPALIVE,
            auto_decompress=False,
            access_log=None,
            logger=_aiohttp_log,
        )
        # Behind the handshake there are only nodes; before it, strangers, for whom there is room apart from that.
        connections = self._per_peer * len(self._peers) + _HANDSHAKES_MAX
        http.listening = Listening(
            self._bind,
            connection=http,
            limits=Limits(
                connections,
                per_client=connections,
                handshakes=_HANDSHAKES_MAX,
                handshake_seconds=_CONNECT_DEADLINE,
            ),
            tls=self._identity.server_context(),
        )
        await http.listening.start()
        self._http = http

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that the listener is bound to."""
        if self._http is None or self._http.listening is None:
            raise RuntimeError("the channel is not started")
        return self._http.listening.addresses[0]

    async def close(self, *, grace: float = _SHUTDOWN_DEADLINE) -> None:
        """Stop listening, give what is being served ``grace`` seconds, drop all connections."""
        http, self._http = self._http, None
        listening = None if http is None else http.listening
        if listening is not None:
            listening.close()
        if http is not None:
            http.pre_shutdown()
            await http.shutdown(grace)
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()
        if listening is not None:
            await listening.wait_closed()

    async def send(self, node: str, frame: bytes, deadline: float) -> bytes:
        """Deliver one frame to ``node`` and return the answer frame (port ``Hop``)."""
        if node not in self._peers:
            raise NotLeader(f"{node} is not among the configured peers")
        host, port = self._peers[node]
        url = f"https://[{host}]:{port}{PATH}" if ":" in host else f"https://{host}:{port}{PATH}"
        timeout = aiohttp.ClientTimeout(total=deadline, sock_connect=_CONNECT_DEADLINE)
        try:
            async with self._session(node).post(url, data=frame, timeout=timeout, allow_redirects=False) as response:
                return await self._answer_frame(response, node)
        except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError, _WrongPeer) as exc:
            raise NotLeader(f"{node} cannot be reached") from exc
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            # A kept connection may break before or after the frame arrived.
            raise CommitUnknown(f"{node} did not answer") from exc

    def _session(self, node: str) -> aiohttp.ClientSession:
        session = self._sessions.get(node)
        if session is None:
            session = self._sessions[node] = aiohttp.ClientSession(
                connector=_PeerConnector(self._identity, node, limit=self._per_peer),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                skip_auto_headers=(hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING),
            )
        return session

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        transport = request.transport
        peer = None if transport is None else self._identity.peer_name(transport.get_extra_info("ssl_object"))
        if peer is None or peer not in self._peers:
            _log.warning("hop_refused", peer=peer, reason="not a configured peer")
            if transport is not None:
                transport.abort()
            return web.Response(status=HTTPStatus.FORBIDDEN)
        if request.method != hdrs.METH_POST or request.raw_path != PATH:
            return web.Response(status=HTTPStatus.NOT_FOUND)
        return web.Response(body=encode_answer(await self._perform(peer, request)), content_type="application/json")

    async def _perform(self, peer: str, request: web.BaseRequest) -> Answer | CaserverError:
        try:
            async with asyncio.timeout(_FRAME_DEADLINE):
                frame = await self._read_frame(request)
            caller, wanted = decode_request(frame)
            _, _, client = caller.source.partition(" ")
            return await self._serve(replace(caller, source=f"{peer} {client}".rstrip()), wanted)
        except TimeoutError:
            return Unavailable("the frame did not arrive in time")
        except CaserverError as exc:
            return exc
        except Exception:  # noqa: BLE001 the edge of the hop: a bug is logged here and shown as nothing more
            _log.exception("hop_failed", peer=peer)
            return CaserverError("internal error")

    async def _read_frame(self, request: web.BaseRequest) -> bytes:
        frame = bytearray()
        while chunk := await request.content.readany():
            frame += chunk
            if len(frame) > self._frame_max:
                raise InvalidRequest(f"an internal frame is larger than {self._frame_max} bytes")
        return bytes(frame)

    async def _answer_frame(self, response: aiohttp.ClientResponse, node: str) -> bytes:
        if response.status != HTTPStatus.OK:
            raise NotLeader(f"{node} refused the internal request with status {response.status}")
        frame = bytearray()
        async for chunk in response.content.iter_any():
            frame += chunk
            if len(frame) > self._frame_max:
                raise CommitUnknown(f"{node} answered with more than {self._frame_max} bytes")
        return bytes(frame)
