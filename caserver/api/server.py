"""The public listeners: HTTP in, one of the routes, HTTP out; the only place where an unexpected exception is caught.

Low-level ``aiohttp`` server with its own dispatch, because most requests are tiny reads. Headers and texts follow the
recordings of Consul: Go's path cleaning, ``Vary``, gzip on request, plain-text errors without a newline.
"""

from __future__ import annotations

import asyncio
import logging
import posixpath
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from ssl import SSLContext
from typing import Any, BinaryIO
from urllib.parse import quote, unquote_to_bytes

import structlog
from aiohttp import hdrs, web
from aiohttp.http import HttpVersion10, HttpVersion11

from caserver.acl import Resource
from caserver.api import status
from caserver.api.connection import LINGER_BYTES, PIECE, Answer, Connection
from caserver.api.origin import Hosts, Restrictions, refuse_exposed
from caserver.api.pace import Pace
from caserver.api.query import BROKEN_ESCAPE, Body, Call, NodeView, Readiness, Reply, metadata, parse, token_of
from caserver.api.routes import EXACT, SUBTREES, Admission, Route
from caserver.environment import within
from caserver.errors import CaserverError, ProviderUnavailable, RateLimited, TooLarge, Unavailable
from caserver.listening import Address, Limits, Listening, client_of
from caserver.unix_socket import UnixSocket

__all__ = ["ApiServer", "Listener", "NodeView", "Readiness"]

BODY_DEADLINE = 30.0  # seconds for a whole request body
IDLE_DEADLINE = 120.0  # seconds for the head of a request and between two requests of a connection
SHUTDOWN_DEADLINE = 10.0  # seconds for requests in progress when the server closes
FLUSH_DEADLINE = 1.0  # seconds for answers that are made to leave then
CONNECTIONS_PER_CLIENT = 200
CONNECTIONS = 1024
UPLOAD_PIECE = 256 << 10  # bytes of a file that are taken in at a time
DOUBTFUL_BODIES = 16  # bodies that callers who will probably be refused may send at a time
PROVIDER_AGAIN = 5  # seconds after which to ask again while the backend of the CA is away; it is looked at as often
_TEXT = "text/plain; charset=utf-8"
_HTML = "text/html; charset=utf-8"
_ELSEWHERE = "other"  # counts for every path and method that is not in the table
_PATH_SAFE = "/$&+,:;=@~!*'()"
_WEIGHT = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
_BARE_HEAD = b"HTTP/1.1 %d Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_log = structlog.get_logger("caserver.api")
# aiohttp reports broken clients through this logger; they are no news, and its access log is off.
_aiohttp_log = logging.getLogger("caserver.api.http")


@dataclass(frozen=True, slots=True)
class Listener:
    """One address to listen on; port 0 takes a free one, ``tls`` makes it HTTPS.

    ``exposed`` says that others may read along, so that routes with secrets are refused here.
    """

    host: str | UnixSocket
    port: int = 0
    tls: SSLContext | None = None
    exposed: bool = False

    @property
    def address(self) -> Address:
        """What is bound."""
        return self.host if isinstance(self.host, UnixSocket) else (self.host, self.port)


class _Stream(web.StreamResponse):
    """A response in chunks without the server's name and version."""

    async def _prepare_headers(self) -> None:
        await super()._prepare_headers()
        self.headers.popall(hdrs.SERVER, None)


class _HttpServer(web.Server):
    """What serves the connections of all listeners."""

    def __init__(self, handler: Any, **options: Any) -> None:
        super().__init__(handler, handler_cancellation=True)
        self._options = options | {"piece": memoryview(bytearray(PIECE))}
        self.served: list[_Served] = []

    def connection(self, listener: _Served) -> Connection:
        """A new connection of a listener."""
        return Connection(self, listener=listener, loop=asyncio.get_running_loop(), **self._options)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """Called by every connection that ends."""
        super().connection_lost(handler, exc)
        for each in self.served:
            each.listening.left(handler)


class _Served:
    """A listener at work, and whether others may read along there."""

    def __init__(self, http: _HttpServer, listener: Listener, limits: Limits) -> None:
        self.exposed = listener.exposed
        self.listening = Listening(
            listener.address, connection=partial(http.connection, self), limits=limits, tls=listener.tls
        )

    def renew(self, listener: Listener, limits: Limits) -> None:
        """Go on by what was changed."""
        self.exposed = listener.exposed
        self.listening.renew(limits=limits, tls=listener.tls)


class ApiServer:
    """Serves the public interface of one node."""

    def __init__(
        self,
        node: NodeView,
        listeners: Sequence[Listener],
        *,
        connections_per_client: int = CONNECTIONS_PER_CLIENT,
        connections: int = CONNECTIONS,
        hosts: Hosts | None = None,
        idle_deadline: float = IDLE_DEADLINE,
        restrictions: Restrictions | None = None,
        strangers_per_second: float = 0.0,
    ) -> None:
        """``connections`` is how many each listener takes at a time, ``connections_per_client`` from one address.

        ``idle_deadline`` is how long the head of a request may take, and the next request of a connection;
        ``strangers_per_second`` how many requests without a valid token are begun while ACLs are on (0: any number).
        """
        self._node = node
        self._listeners = tuple(listeners)
        self._idle_deadline = idle_deadline
        self._pace = Pace(node.clock, rate=strangers_per_second)
        self._limits = Limits(connections, connections_per_client, refusal=_BARE_HEAD % status.NOT_READY)
        self._hosts = hosts or Hosts()
        self._restrictions = restrictions or Restrictions()
        self._http: _HttpServer | None = None
        self._writes: set[asyncio.Task[Reply]] = set()
        self._under_way = 0  # requests whose answer is not made yet
        self._closing: asyncio.Event | None = None  # set when none is
        self._uploading = False
        self._doubtful = asyncio.Semaphore(DOUBTFUL_BODIES)

    async def start(self) -> None:
        """Bind every listener; OSError if an address cannot be bound (then none is)."""
        http = self._http = _HttpServer(
            self._handle,
            keepalive_timeout=self._idle_deadline,
            stalled=self._idle_deadline,
            auto_decompress=False,
            access_log=None,
            logger=_aiohttp_log,
        )
        try:
            for each in self._listeners:
                served = _Served(http, each, self._limits)
                await served.listening.start()
                http.served.append(served)
        except OSError:
            await self.close()
            raise

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Host and port of every bound TCP socket, in the order of the listeners."""
        return [] if self._http is None else [found for each in self._http.served for found in each.listening.addresses]

    @property
    def shown(self) -> list[str]:
        """Every bound socket as people write it."""
        return [] if self._http is None else [found for each in self._http.served for found in each.listening.shown]

    def renew(
        self,
        listeners: Sequence[Listener],
        *,
        connections_per_client: int,
        hosts: Hosts,
        restrictions: Restrictions,
        strangers_per_second: float = 0.0,
    ) -> None:
        """Go on by changed settings of the same listeners, without a pause; open connections keep their TLS.

        ValueError for other addresses than those that it was made with, and if TLS was turned on or off.
        """
        if [each.address for each in listeners] != [each.address for each in self._listeners]:
            raise ValueError("the addresses of a server do not change while it runs")
        self._listeners = tuple(listeners)
        self._limits = replace(self._limits, per_client=connections_per_client)
        self._hosts, self._restrictions = hosts, restrictions
        self._pace.renew(strangers_per_second)
        for served, listener in zip(() if self._http is None else self._http.served, listeners, strict=False):
            served.renew(listener, self._limits)

    async def close(self, *, grace: float = SHUTDOWN_DEADLINE) -> None:
        """Stop listening, end blocking queries, give the other requests ``grace`` seconds."""
        self._node.blocked.cancel()
        self._pace.close()
        http, self._http = self._http, None
        if http is None:
            return
        for each in http.served:
            each.listening.close()
        # aiohttp's own way of closing drops what arrives of a request that it waits for.
        self._closing = asyncio.Event()
        if self._under_way:
            with suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await self._closing.wait()
        http.pre_shutdown()
        await http.shutdown(FLUSH_DEADLINE)
        for each in http.served:
            await each.listening.wait_closed()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The edge: every request ends in an answer here, whatever happens below."""
        self._under_way += 1
        if isinstance(request.protocol, Connection):
            request.protocol.begin(request)
        try:
            await self._in_turn(request)
            route, reply = await self._answer(request)
        finally:
            self._under_way -= 1
            if self._closing is not None and not self._under_way:
                self._closing.set()
        path = _ELSEWHERE if route is None else route.path
        method = request.method if route is not None and request.method in route.handlers else _ELSEWHERE
        self._node.requests[path, method, reply.status] += 1
        if reply.pieces is not None:
            return await self._stream(request, reply, reply.pieces)
        response = _respond(request, reply, vary=route is not None)
        if route is not None:
            response.headers.update(self._restrictions.headers)
        if self._closing is not None or _leaves_much(request):
            response.force_close()
        return response

    async def _in_turn(self, request: web.BaseRequest) -> None:
        """Return when the request may begin: at once with a valid token, and where nobody is asked for one."""
        gate = self._node.gate
        if gate.closed and gate.is_stranger(token_of(request.raw_path.partition("?")[2], request.headers)):
            await self._pace.turn(_address(request) or _remote(request))

    async def _stream(self, request: web.BaseRequest, reply: Reply, pieces: Sequence[bytes]) -> web.StreamResponse:
        """Send a body piece by piece: as it is, whatever encodings the client takes, for it is compressed already."""
        answer = _Stream(status=reply.status, headers={**reply.headers, hdrs.VARY: hdrs.ACCEPT_ENCODING})
        answer.headers.update(self._restrictions.headers)
        answer.content_type = reply.content_type
        if request.version < HttpVersion11:  # which knows no chunks
            answer.content_length = sum(map(len, pieces))
        else:
            answer.enable_chunked_encoding()
        if self._closing is not None:
            answer.force_close()
        await answer.prepare(request)
        try:
            for piece in pieces:
                await within(self._node.clock, IDLE_DEADLINE, answer.write(piece))
            await answer.write_eof()
        except TimeoutError:  # it does not read: a cut body says more than an end would
            if request.transport is not None:
                request.transport.abort()
        return answer

    async def _answer(self, request: web.BaseRequest) -> tuple[Route | None, Reply]:
        if request.version < HttpVersion10:  # a request line without a version: the parser takes it for one of 1991
            return None, Reply(status=status.BAD_REQUEST)
        target = request.raw_path
        path, _, query = target.partition("?")
        route = EXACT.get(path)
        tail = ""
        if route is None:
            resolved = _resolve(request, path, query)
            if isinstance(resolved, Reply):
                return None, resolved
            route, tail = resolved
        try:
            self._restrictions.check_path(route.path + tail)
            if request.method not in route.handlers:
                return route, _method_reply(request.method, route)
            self._restrictions.check_write(request.method, _address(request))
            self._hosts.check(request.method, request.headers)
            if route.secret and _is_exposed(request):
                raise refuse_exposed(route.path)
            options = parse(query, request.headers, reading=request.method == hdrs.METH_GET)
            call = Call(options=options, remote=_remote(request), tail=tail)
        except CaserverError as exc:
            return route, _error(exc)
        return route, await self._run(request, route, call)

    async def _run(self, request: web.BaseRequest, route: Route, call: Call) -> Reply:
        node = self._node
        try:
            await _admit(node, request.method, call, route)
            if request.method == hdrs.METH_GET:
                reply = await route.handlers[request.method](node, call)
                # While the handler waited the token may have been taken away, and a copy that lagged has learnt of it.
                await _admit(node, request.method, call, route)
                return reply
            if route.admission is not None:
                return await self._run_upload(request, route, call, route.admission)
            _check_length(request, route.body_max)
            async with self._place(request, route, call):
                body = await self._read_body(request, route.body_max)
                return await self._write(request.method, route, replace(call, body=body))
        except CaserverError as exc:
            return _error(exc, metadata(node, 1, stale=False) if route.metadata else {})
        except Exception:  # noqa: BLE001 the request edge: a bug becomes a bare 500 and a traceback in the log
            _log.exception("request_failed", method=request.method, path=route.path)
            return _text(status.INTERNAL_ERROR, status.BUG)

    def _place(self, request: web.BaseRequest, route: Route, call: Call) -> AbstractAsyncContextManager[object]:
        """Where a body is taken in: of callers whom this node would refuse a few at a time, lest they fill the memory.

        It is the leader that decides; and a body that came with its head is there already.
        """
        doubted = self._node.gate.doubts(call.caller(self._node), route.permission)
        return self._doubtful if doubted and not request.content.is_eof() else nullcontext()

    async def _run_upload(self, request: web.BaseRequest, route: Route, call: Call, admission: Admission) -> Reply:
        """Run a handler whose body is a file; one at a time, each admitted before a byte of its body is taken."""
        await admission(self._node, call)
        if self._uploading:
            raise Unavailable("another file is being taken in by this node; wait for its end and try again")
        self._uploading = True
        try:
            file = self._node.backups.upload()
            try:
                await self._take_in(request, file, route.body_max)
            except BaseException:
                file.close()
                raise
            return await self._write(request.method, route, replace(call, upload=file))
        finally:
            self._uploading = False

    async def _take_in(self, request: web.BaseRequest, file: BinaryIO, limit: int) -> None:
        """The body into a file; its end may take long to come, but not the next part of it."""
        _check_length(request, limit)
        await _invite(request)
        if request.body_exists:
            request.content.set_read_chunk_size(UPLOAD_PIECE)
        size = 0
        try:
            while chunk := await within(self._node.clock, BODY_DEADLINE, request.content.readany()):
                size += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                await self._node.backups.append(file, chunk)
        except TimeoutError:
            raise _SlowBody(f"no more of the request body arrived within {BODY_DEADLINE:.0f} s") from None

    async def _write(self, method: str, route: Route, call: Call) -> Reply:
        """Run a state-changing handler to its end even if the client goes away."""
        task = asyncio.ensure_future(route.handlers[method](self._node, call))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        if call.upload is not None:
            task.add_done_callback(partial(_close, call.upload))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_forget)
            raise

    async def _read_body(self, request: web.BaseRequest, limit: int) -> bytes:
        await _invite(request)
        if request.content.is_eof():  # small bodies arrive with their head
            return _limited(request.content.read_nowait(), limit)
        try:
            return await within(self._node.clock, BODY_DEADLINE, _collect(request, limit))
        except TimeoutError:
            raise _SlowBody(f"the request body did not arrive within {BODY_DEADLINE:.0f} s") from None


async def _admit(node: NodeView, method: str, call: Call, route: Route) -> None:
    """PermissionDenied unless the caller may do what this node does by itself.

    That is every read, and whatever is about this agent. The leader decides the other writes, once their body was read;
    who reads the name of a service asks about it, and who leaves parts of an answer out about each of them.
    """
    needed = route.permission
    if needed is None or needed.resource is Resource.SERVICE or route.filtered:
        return
    if needed.resource is Resource.AGENT:
        needed = needed.of(node.node_name)
    elif method != hdrs.METH_GET:
        return
    await node.gate.require(call.caller(node), needed, operation=f"{method} {route.path}")


class _SlowBody(CaserverError):
    """The client did not send its body in time."""


async def _invite(request: web.BaseRequest) -> None:
    """Tell a client that waits with its body to send it."""
    if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue" and request.version == HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0


async def _collect(request: web.BaseRequest, limit: int) -> bytes:
    body = bytearray()
    while chunk := await request.content.readany():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _check_length(request: web.BaseRequest, limit: int) -> None:
    """TooLarge for a body that says so itself, before any of it is read."""
    if (request.content_length or 0) > limit:
        raise _too_large(limit)


def _limited(body: bytes, limit: int) -> bytes:
    if len(body) > limit:
        raise _too_large(limit)
    return body


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the request body is larger than {limit // 1024} KiB")


def _close(file: BinaryIO, _: asyncio.Task[Reply]) -> None:
    """Drop an upload that was dealt with."""
    file.close()


def _forget(task: asyncio.Task[Reply]) -> None:
    """Log what became of a write that nobody waits for any more."""
    if not task.cancelled() and (exc := task.exception()) is not None:
        _log.warning("abandoned_write_failed", error=type(exc).__name__)


def _leaves_much(request: web.BaseRequest) -> bool:
    """Whether more of the body is to come than is worth the connection, or perhaps nothing, for want of an invitation."""
    if isinstance(request.protocol, Connection) and request.protocol.is_broken:
        return True
    if request.content.is_eof():
        return False
    return request.content_length is None or request.content_length > LINGER_BYTES or hdrs.EXPECT in request.headers


def _is_exposed(request: web.BaseRequest) -> bool:
    return not isinstance(request.protocol, Connection) or request.protocol.listener.exposed


def _address(request: web.BaseRequest) -> str:
    """The IP address of the client; empty for one without, and once it is gone."""
    peer = None if request.transport is None else request.transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) else ""


def _remote(request: web.BaseRequest) -> str:
    """Address and port of the client, or the user who speaks through a Unix socket; empty once it is gone."""
    if request.transport is None:
        return ""
    peer = request.transport.get_extra_info("peername")
    if isinstance(peer, tuple):
        return f"{peer[0]}:{peer[1]}"
    connection = request.transport.get_extra_info("socket")
    try:
        return "" if connection is None else client_of(connection, peer)
    except OSError:
        return ""


def _resolve(request: web.BaseRequest, path: str, query: str) -> tuple[Route, str] | Reply:
    """Find the route of a path that is not in the table as it stands, the way Go's ServeMux does."""
    if not path.startswith("/"):  # absolute form or "*"
        path = request.rel_url.raw_path or "/"
    decoded = unquote_to_bytes(path).decode("utf-8", "surrogateescape")
    if "\0" in decoded or BROKEN_ESCAPE.search(path):
        return Reply(status=status.BAD_REQUEST)
    cleaned = _clean(decoded)
    if cleaned != decoded:
        return _moved(request.method, cleaned, query) if _prints(path) else Reply(status=status.BAD_REQUEST)
    if decoded == "/":
        return _moved(request.method, "/ui/", query)
    if route := EXACT.get(decoded):
        return route, ""
    for each in SUBTREES:
        if decoded.startswith(each.path):
            return each, decoded[len(each.path) :]
        if decoded + "/" == each.path:
            return _moved(request.method, each.path, query)
    return Reply(status=status.NOT_FOUND if _prints(path) else status.BAD_REQUEST)


def _prints(path: str) -> bool:
    """What a filter of Consul asks of every path; names below a route are refused by who reads them, with a reason."""
    # Of a broken character that filter sees the mark that stands for it, which prints.
    return unquote_to_bytes(path).decode("utf-8", "replace").isprintable()


def _clean(path: str) -> str:
    """Go's ``path.Clean`` as ServeMux applies it: one slash at a time, no dots, a final slash kept."""
    cleaned = posixpath.normpath("/" + path).replace("//", "/")
    return cleaned + "/" if path.endswith("/") and cleaned != "/" else cleaned


def _moved(method: str, path: str, query: str) -> Reply:
    location = quote(path, safe=_PATH_SAFE, errors="surrogateescape") + (f"?{query}" if query else "")
    headers = {"Location": location}
    if method not in {hdrs.METH_GET, hdrs.METH_HEAD}:
        return Reply(headers=headers, status=status.MOVED)
    body = f'<a href="{escape(location)}">Moved Permanently</a>.\n\n'.encode()
    return Reply(Body(body), headers, content_type=_HTML, status=status.MOVED)


def _method_reply(method: str, route: Route) -> Reply:
    allow = {"Allow": route.allow}
    if method == hdrs.METH_OPTIONS:
        return Reply(headers=allow)
    return _text(f"method {method} not allowed", status.METHOD_NOT_ALLOWED, allow)


def _error(error: CaserverError, headers: Mapping[str, str] | None = None) -> Reply:
    if isinstance(error, _SlowBody):
        return _text(error.detail, status.SLOW_REQUEST)
    found = dict(headers or {})
    if isinstance(error, RateLimited):
        found["Retry-After"] = str(max(1, round(error.retry_after)))
    elif isinstance(error, ProviderUnavailable):
        found["Retry-After"] = str(PROVIDER_AGAIN)
    return _text(status.text_of(error), status.status_of(error), found)


def _text(text: str, code: int, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(Body(text.encode("utf-8", "replace")), headers or {}, content_type=_TEXT, status=code)


def _accepts_gzip(header: str) -> bool:
    """Whether Accept-Encoding names gzip with a weight above zero; the last mention counts."""
    accepted = False
    for each in header.split(","):
        name, *parameters = (part.strip().lower() for part in each.split(";"))
        if name == "gzip":
            weights = [part[2:] for part in parameters if part.startswith("q=")]
            accepted = not weights or bool(_WEIGHT.fullmatch(weights[-1]) and float(weights[-1]) > 0)
    return accepted


def _respond(request: web.BaseRequest, reply: Reply, *, vary: bool) -> web.StreamResponse:
    headers = dict(reply.headers)
    if vary:
        headers[hdrs.VARY] = hdrs.ACCEPT_ENCODING
    body = b""
    if reply.body is not None:
        body = reply.body.plain
        headers[hdrs.CONTENT_TYPE] = reply.content_type
        if vary and _accepts_gzip(request.headers.get(hdrs.ACCEPT_ENCODING, "")):
            body = reply.body.gzipped
            headers[hdrs.CONTENT_ENCODING] = "gzip"
    headers[hdrs.CONTENT_LENGTH] = str(len(body))
    return Answer(body=body, status=reply.status, headers=headers)
