"""The links between Raft nodes: mutual TLS 1.3 streams that carry the frames of ``messages``.

Every node dials every peer and sends only on the connection that it dialled, so a reconnect never mixes an old and a new
stream; the newest inbound connection of a peer closes its older one. A link begins with a hello in each direction, and
both ends refuse when the two do not belong together (``Membership``). Who is there is what the certificate says.

Strangers cost little: few at a time, a short time each, small frames only, and one log line a minute. A peer that does
not take what is sent to it is dropped, never buffered without bound.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import structlog

from caserver.internode.identity import NodeIdentity
from caserver.internode.membership import HELLO_BYTES_MAX, LATER_KINDS, Hello, Membership
from caserver.raft.crossing import settle
from caserver.raft.frames import Frames, Malformed
from caserver.raft.messages import LENGTH_BYTES, decode, frame
from caserver.raft.ports import Message

Address = tuple[str, int]  # host (name or IP literal) and port

PAUSE_MIN_SECONDS, PAUSE_MAX_SECONDS = 0.05, 0.5  # between two attempts to dial
REFUSED_SECONDS = 2.0  # after a refusal, which no quick repetition mends
STRANGERS_CALM = 16  # above this the listener takes at most one connection per ACCEPT_PAUSE
ACCEPT_PAUSE_SECONDS = 0.01
EXHAUSTED_SECONDS = 0.1  # pause after accept() failed, mostly for want of file descriptors
NOTICE_SECONDS = 60.0  # between two log lines that say the same
_NOTICES_MAX = 256
_DEAD_MILLISECONDS = 3000  # unacknowledged for so long: the link is gone, dial again instead of waiting for TCP

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a link may take."""

    dial_seconds: float = 2.0  # for name resolution, connection, TLS and both hellos
    hello_seconds: float = 3.0  # the same, seen from the listener
    frame_seconds: float = 30.0  # for the rest of a frame once it began
    strangers: int = 64  # connections that have not said hello yet; the oldest makes room
    send_bytes: int = 64 << 20  # waiting for one peer; a leader sends at most one heartbeat's worth of snapshot ahead


class _Refused(Exception):
    """The other end does not belong here; the text says why."""


@dataclass(frozen=True, slots=True, eq=False)
class _Link:
    """One authenticated connection."""

    peer: str
    frames: Frames
    transport: asyncio.Transport
    hello: Hello  # what the other end said

    def abort(self) -> None:
        self.transport.abort()


class _Notices:
    """Says which log lines are worth writing: each key once a minute."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, ...], float] = {}
        self._suppressed: Counter[tuple[str, ...]] = Counter()

    def due(self, *key: str) -> int | None:
        """How often this was suppressed since it was last written; None if it is to be suppressed now."""
        now = asyncio.get_running_loop().time()
        if now - self._last.get(key, -NOTICE_SECONDS) < NOTICE_SECONDS:
            self._suppressed[key] += 1
            return None
        if len(self._last) >= _NOTICES_MAX:
            self._last.clear()
        self._last[key] = now
        return self._suppressed.pop(key, 0)


class Streams:
    """``Network`` over sockets. Everything runs on the loop that calls ``start``.

    ``peers`` holds where each node is dialled and is read anew at every attempt; this node's own entry is ignored. Host
    names are resolved off the loop. ``receive`` gets each message in the order in which its peer sent it. ``on_link`` is
    told when the outgoing link to a peer comes up or goes down, the latter also from within ``send``. ``on_read`` is called
    after each batch of messages that came together.
    """

    def __init__(
        self,
        node: str,
        peers: Mapping[str, Address],
        *,
        bind: Address,
        identity: NodeIdentity,
        membership: Membership,
        receive: Callable[[str, Message], None],
        on_link: Callable[[str, bool], None],
        limits: Limits | None = None,
        on_read: Callable[[], None] = lambda: None,
    ) -> None:
        self._node = node
        self._limits = limits or Limits()
        self._addresses = peers
        self._peers = sorted(set(peers) - {node})
        self._bind = bind
        self._identity = identity
        self._membership = membership
        self._receive = receive
        self._on_link, self._on_read = on_link, on_read
        self._server_context = identity.server_context()
        self._client_context = identity.client_context()
        self._listening: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.Task[None], None] = {}  # in the order of their arrival
        self._outbound: dict[str, _Link] = {}
        self._inbound: dict[str, _Link] = {}
        self._framed: tuple[Message, bytes] = ({}, b"")  # the last message sent
        self._notices = _Notices()
        self.counts: Counter[str] = Counter()  # refusals and failures by kind

    async def start(self) -> None:
        """Listen and begin to dial; OSError if the address cannot be bound."""
        self._listening = await _listen(self._bind)
        listening = self._listening
        # Closed by the end of the task that waits on it: a descriptor must not be reused while the loop watches it.
        self._spawn(self._accept(listening)).add_done_callback(lambda _: listening.close())
        for peer in self._peers:
            self._spawn(self._keep_dialling(peer))

    @property
    def address(self) -> Address:
        """Where this node listens; RuntimeError before ``start`` and after ``close``."""
        if self._listening is None:
            raise RuntimeError("the streams are not started")
        host, port = self._listening.getsockname()[:2]
        return str(host), int(port)

    def send(self, peer: str, message: Message) -> bool:
        """Queue one message, in order, at most once; False if it was certainly not sent."""
        link = self._outbound.get(peer)
        if link is None or (message["type"] in LATER_KINDS and message["type"] not in link.hello.kinds):
            return False
        if message is not self._framed[0]:  # a leader sends the same to one peer after the other
            self._framed = message, frame(message)
        data = self._framed[1]
        transport = link.transport
        if transport.get_write_buffer_size() + len(data) > self._limits.send_bytes:
            self._notice("peer_too_slow", peer, waiting_bytes=transport.get_write_buffer_size())
            self._unlink(link)
            return False
        transport.write(data)
        return True

    def connected(self, peer: str) -> bool:
        """Whether the outgoing link to ``peer`` is up."""
        return peer in self._outbound

    def waiting_bytes(self, peer: str) -> int:
        """What was sent to ``peer`` and still waits in this process: a sender of snapshots paces itself by it."""
        link = self._outbound.get(peer)
        return 0 if link is None else link.transport.get_write_buffer_size()

    @property
    def releases(self) -> Mapping[str, str]:
        """Which release of caserver each linked peer runs, as far as it says."""
        return {peer: link.hello.release for peer, link in self._outbound.items() if link.hello.release}

    def recheck(self) -> None:
        """Drop links whose other end no longer belongs here; to be called after ``Membership.adopt``."""
        for link in [*self._outbound.values(), *self._inbound.values()]:
            reason = self._membership.check(link.hello)
            if reason is not None:
                self._notice("peer_refused", link.peer, reason=reason)
                link.abort()

    def close(self) -> None:
        """Drop all links and stop listening; ``on_link`` hears of the links that were up."""
        self._listening = None
        for task in self._tasks:
            task.cancel()
        for link in [*self._outbound.values(), *self._inbound.values()]:
            self._unlink(link)

    async def wait_closed(self) -> None:
        """Return when everything that ``close`` stopped has ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports let go of their sockets one turn after they were aborted

    # --- dialling

    async def _keep_dialling(self, peer: str) -> None:
        attempt = 0
        while True:
            try:
                async with asyncio.timeout(self._limits.dial_seconds):
                    link = await self._dial(peer)
            except _Refused as exc:
                self._notice("peer_refused", peer, reason=str(exc), address=self._shown(peer))
                await asyncio.sleep(REFUSED_SECONDS)
                continue
            except (OSError, EOFError, ValueError) as exc:
                self._notice("peer_unreachable", peer, address=self._shown(peer), error=_sentence(exc))
                attempt += 1
            else:
                attempt = 0
                await self._hold(link)
            await asyncio.sleep(self._pause(peer, attempt))

    async def _dial(self, peer: str) -> _Link:
        host, port = self._addresses[peer]
        loop = asyncio.get_running_loop()
        frames = self._frames()
        try:
            transport, _ = await loop.create_connection(
                lambda: frames, host, port, ssl=self._client_context, server_hostname=""
            )
            _tune(transport)
            present = self._certified(transport)
            transport.write(_framed(self._membership.hello(self._node, to=peer)))
            _require(present == peer, f"node {present} answers there: correct the `peer` addresses")
            hello = Hello.decode(await _first_frame(frames))
            self._require_belonging(hello, peer)
        except BaseException:
            frames.abort()
            raise
        return _Link(peer, frames, transport, hello)

    async def _hold(self, link: _Link) -> None:
        """Keep an outgoing link until the other end closes it; it never sends anything on it."""
        self._outbound[link.peer] = link
        _log.info("peer_linked", peer=link.peer, address=self._shown(link.peer))
        try:
            self._on_link(link.peer, True)
            await link.frames.deliver(_refuse)
        except (OSError, Malformed):
            pass  # reset, timed out, or not a node of ours after all: the link is gone just the same
        finally:
            self._unlink(link)

    def _unlink(self, link: _Link) -> None:
        link.abort()
        if self._inbound.get(link.peer) is link:
            del self._inbound[link.peer]
        if self._outbound.get(link.peer) is link:
            del self._outbound[link.peer]
            _log.info("peer_unlinked", peer=link.peer)
            self._on_link(link.peer, False)

    def _pause(self, peer: str, attempt: int) -> float:
        # The spread is a hash, not a draw: nodes that start together need not knock together, and a run can be repeated.
        spread = crc32(f"{self._node} {peer} {attempt}".encode()) / (1 << 32)
        return min(PAUSE_MIN_SECONDS * 2.0 ** min(attempt, 8), PAUSE_MAX_SECONDS) * (1 + spread) / 2

    def _shown(self, peer: str) -> str:
        host, port = self._addresses[peer]
        return f"{host}:{port}"

    # --- listening

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, address = listening.accept()
            except BlockingIOError:
                await _readable(listening)
                continue
            except OSError as exc:  # no descriptors left, or the connection was gone again: neither ends the listener
                self._notice("accept_failed", error=_sentence(exc))
                await asyncio.sleep(EXHAUSTED_SECONDS)
                continue
            connection.setblocking(False)
            self._admit(connection, str(address[0]))
            if len(self._strangers) > STRANGERS_CALM:
                await asyncio.sleep(ACCEPT_PAUSE_SECONDS)

    def _admit(self, connection: socket.socket, address: str) -> None:
        if len(self._strangers) >= self._limits.strangers:
            self.counts["stranger_evicted"] += 1
            next(iter(self._strangers)).cancel()
        task = self._spawn(self._serve(connection, address))
        self._strangers[task] = None
        task.add_done_callback(self._known)
        task.add_done_callback(lambda _: connection.close())  # also if it is cancelled before it ran a step

    def _known(self, task: asyncio.Task[None]) -> None:
        self._strangers.pop(task, None)

    async def _serve(self, connection: socket.socket, address: str) -> None:
        try:
            async with asyncio.timeout(self._limits.hello_seconds):
                link = await self._welcome(connection, address)
        except (_Refused, OSError, EOFError, ValueError) as exc:
            # Keyed by kind alone: a stranger must not be able to fill the log, or this table, from many addresses.
            self._notice("stranger_refused", kind=type(exc).__name__, address=address, reason=_sentence(exc))
            return
        task = asyncio.current_task()
        if link is None or task is None:
            return
        self._known(task)
        older = self._inbound.get(link.peer)
        self._inbound[link.peer] = link
        if older is not None:
            older.abort()
        try:
            await self._read_messages(link)
        finally:
            self._unlink(link)

    async def _welcome(self, connection: socket.socket, address: str) -> _Link | None:
        """Authenticate who dialled and exchange hellos; None if it is a node that was refused and told so."""
        frames = self._frames()
        try:
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                lambda: frames, connection, ssl=self._server_context, ssl_handshake_timeout=self._limits.hello_seconds
            )
            _tune(transport)
            hello = Hello.decode(await frames.first())
            peer = self._certified(transport)
            transport.write(_framed(self._membership.hello(self._node, to=peer)))
            self._require_belonging(hello, peer)
        except _Refused as exc:
            self._notice("peer_refused", hello.node, address=address, reason=str(exc))
            frames.abort()
            return None
        except BaseException:
            frames.abort()
            raise
        return _Link(peer, frames, transport, hello)

    def _certified(self, transport: asyncio.Transport) -> str:
        """The name in the certificate of the other end; _Refused if it is not one of the cluster's."""
        name = self._identity.peer_name(transport.get_extra_info("ssl_object"))
        if name is None:
            raise _Refused("its certificate names no node of the peer list")
        return name

    def _require_belonging(self, hello: Hello, peer: str) -> None:
        """_Refused unless the other end, whose certificate says ``peer``, is the node that it should be."""
        _require(
            peer != self._node,
            f"two nodes run under the name {self._node}: give one of them the node_name of its own `peer` block",
        )
        _require(hello.node == peer, f"it calls itself {hello.node[:64]} and holds the certificate of {peer}")
        _require(
            hello.to == self._node,
            f"it looks for node {hello.to[:64]} at this node's address: correct its `peer` addresses",
        )
        reason = self._membership.check(hello)
        if reason is not None:
            raise _Refused(reason)
        self._membership.meet(hello)

    async def _read_messages(self, link: _Link) -> None:
        def take(payload: bytes) -> None:
            if self._inbound.get(link.peer) is not link:
                return  # a newer connection took its place
            try:
                message = decode(payload)
            except ValueError as exc:
                raise Malformed(str(exc)) from exc
            self._receive(link.peer, message)

        try:
            await link.frames.deliver(take, self._on_read)
        except OSError:
            return
        except Malformed as exc:
            self._notice("peer_message_refused", link.peer, reason=_sentence(exc))

    # --- both

    def _frames(self) -> Frames:
        return Frames(first_limit=HELLO_BYTES_MAX, frame_seconds=self._limits.frame_seconds)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        # Whatever arrives here came out of the engine: the owner of the loop decides what that means.
        task.get_loop().call_exception_handler({"message": "a stream failed", "exception": task.exception()})

    def _notice(self, event: str, peer: str = "", **details: object) -> None:
        self.counts[event] += 1
        # Another reason is news, and only a node of this cluster can give a peer's one.
        said = details.get("kind", details.get("reason", "") if peer else "")
        suppressed = self._notices.due(event, peer, str(said))
        if suppressed is None:
            return
        if peer:
            details["peer"] = peer
        if suppressed:
            details["suppressed"] = suppressed
        _log.warning(event, **details)


def _framed(hello: Hello) -> bytes:
    payload = hello.encode()
    return len(payload).to_bytes(LENGTH_BYTES) + payload


def _refuse(_: bytes) -> None:
    raise Malformed("nothing is sent on a connection by the end that was dialled")


async def _first_frame(frames: Frames) -> bytes:
    """The hello of the node that was dialled. In TLS 1.3 it may refuse our certificate after our handshake is done."""
    try:
        return await frames.first()
    except (ConnectionError, EOFError) as exc:
        raise ConnectionError(
            "it hung up without a hello, and its log says why: a node needs the same cluster_secret as the others"
        ) from exc


async def _listen(bind: Address) -> socket.socket:
    host, port = bind
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    both = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
    listening = socket.create_server(address[:2], family=family, backlog=128, dualstack_ipv6=both)
    listening.setblocking(False)
    return listening


async def _readable(listening: socket.socket) -> None:
    """Wait for a connection without taking it: one that was taken would be lost if the wait were cancelled just then."""
    loop = asyncio.get_running_loop()
    arrived = loop.create_future()
    loop.add_reader(listening, settle, arrived, None)
    try:
        await arrived
    finally:
        loop.remove_reader(listening)


def _tune(transport: asyncio.Transport) -> None:
    """Send at once, and notice a dead link in seconds; options that this system lacks are left out."""
    connection: socket.socket = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (
        ("TCP_USER_TIMEOUT", _DEAD_MILLISECONDS),
        ("TCP_KEEPIDLE", 2),
        ("TCP_KEEPINTVL", 1),
        ("TCP_KEEPCNT", 3),
    ):
        option = getattr(socket, name, None)
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _require(fulfilled: bool, otherwise: str) -> None:  # noqa: FBT001  # reads as an assertion
    if not fulfilled:
        raise _Refused(otherwise)


def _sentence(exc: BaseException) -> str:
    if isinstance(exc, ssl.SSLError):
        return f"TLS failed ({exc.reason or exc}): a node needs the same cluster_secret as the others"
    if isinstance(exc, TimeoutError) and not str(exc):
        return "no answer in time"
    return str(exc) or type(exc).__name__
