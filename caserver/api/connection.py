"""One HTTP connection as ``aiohttp`` serves it, within bounds: who is kept waiting, or does not read, holds little memory.

Left to itself it takes in half a megabyte of a body that nobody asked for, a megabyte of headers for each of some thirty
requests that are sent ahead of their turn, and keeps for ever what a client does not read. Here bytes come in small pieces,
what follows a request waits unread until that is answered, and an answer that does not move ends the connection.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from aiohttp import hdrs, web

from caserver.api import status
from caserver.errors import InvalidRequest

PIECE = 16 << 10  # bytes taken from a connection at a time
READ_BUFFER = 8 << 10  # of a body; beyond twice as many the connection rests until some were read
AHEAD_MAX = 16 << 10  # bytes behind a request under way, after which the connection rests
HEAD_MAX = 32 << 10  # bytes of a request before its body
OVERHEAD_MAX = 16 << 10  # bytes that a body in chunks may have besides, and as many as its content: tiny ones cost time
LINGER_BYTES = 256 << 10  # of a refused body that are taken in and dropped, so that its sender reads why (Go: as many),
LINGER_SECONDS = 2.0  # and for how long
_HEAD_TOO_LARGE = (
    b"HTTP/1.1 %d Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    % status.HEAD_TOO_LARGE
)


class Answer(web.Response):
    """A response without the server's name and version."""

    async def _prepare_headers(self) -> None:
        await super()._prepare_headers()
        self.headers.popall(hdrs.SERVER, None)


class Exposure(Protocol):
    """The listener of a connection."""

    exposed: bool  # whether others may read along


class Connection(web.RequestHandler, asyncio.BufferedProtocol):
    """One connection; a request that is not HTTP is answered as Go does, with a bare status."""

    __slots__ = ("_ahead", "_fed", "_piece", "_request", "_stall", "_stalled", "_waste", "is_broken", "listener")

    def __init__(
        self, manager: web.Server, *, listener: Exposure, piece: memoryview, stalled: float, **options: Any
    ) -> None:
        """``piece`` is where bytes are read to, one for all connections of a loop: what comes is copied out at once.

        ``stalled`` is for how many seconds a client may leave an answer unread.
        """
        super().__init__(manager, read_bufsize=READ_BUFFER, lingering_time=LINGER_SECONDS, **options)
        self.listener = listener
        self._piece = piece
        self._stalled = stalled
        self._stall: asyncio.TimerHandle | None = None
        self._request: web.BaseRequest | None = None  # under way
        self._ahead = bytearray()  # what came behind it
        self._fed = 0  # bytes given to the parser since it began; without one, of the head that is awaited
        self.is_broken = False  # whether a body does not end, so that nothing can follow it
        self._waste: int | None = None  # how much more may come of the body of a request that is answered

    # -- what comes in

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport reads to."""
        return self._piece

    def buffer_updated(self, nbytes: int) -> None:
        """Take in what was read: give it to the parser if it is its turn, else keep it."""
        data = bytes(self._piece[:nbytes])
        if self.is_broken:
            self._rest()
        elif self._waste is not None:
            self._drop(data)
        elif self._is_turn() and not self._ahead:  # which is still to come in the moment before a request begins
            self._feed(data)
        elif len(self._ahead) < 4 * AHEAD_MAX:
            self._ahead += data
            if len(self._ahead) >= AHEAD_MAX:
                self._rest()
        else:
            self.force_close()

    def _is_turn(self) -> bool:
        """Whether what comes now is the next for the parser."""
        return not self._messages if self._request is None else not self._request.content.is_eof()

    def _feed(self, data: bytes) -> None:
        request = self._request
        body = 0 if request is None else request.content.total_bytes
        if self._fed - body > (HEAD_MAX if request is None else OVERHEAD_MAX + body):
            self._cut()
            return
        self._fed += len(data)
        self.data_received(data)
        if request is not None and self._messages and not request.content.is_eof():
            self._break(request, "the request body is not in chunks as HTTP has them")

    def _cut(self) -> None:
        """End a connection that goes on and on without saying what it wants."""
        if self._request is not None:
            why = "the request body is hardly one: send larger chunks, and no extensions or trailers"
            self._break(self._request, why)
            return
        if self.transport is not None:
            self.transport.write(_HEAD_TOO_LARGE)
        self.force_close()

    def _break(self, request: web.BaseRequest, why: str) -> None:
        """Tell who reads a body that it will not end, and take in nothing more; ``is_broken`` from now on."""
        if self._waste is not None:  # nobody reads it
            self.force_close()
            return
        request.content.set_exception(InvalidRequest(why))
        request.content.feed_eof()
        self.is_broken = True

    def _drop(self, data: bytes) -> None:
        """Go on with a body that nobody reads, as far as that is allowed: its connection may be used again."""
        self._waste = (self._waste or 0) - len(data)
        if self._waste < 0:
            self._rest()
            if self.transport is not None and self.transport.can_write_eof():
                self.transport.write_eof()  # closing now would reset the connection, and the answer with it
            return
        self._feed(data)
        if self._request is not None and self._request.content.is_eof():
            self._end()

    def _rest(self) -> None:
        if self.transport is not None:
            self.transport.pause_reading()

    def _resume_transport_reading(self) -> None:
        """Go on, as aiohttp does with every body that was read; not with as much waiting behind the request."""
        if len(self._ahead) < AHEAD_MAX:
            super()._resume_transport_reading()

    # -- the course of a request

    def begin(self, request: web.BaseRequest) -> None:
        """``request`` is dealt with from now on."""
        self._request, self._waste = request, None
        self._fed = request.content.total_bytes
        self._go_on()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the rest of an answer; what came behind its request is looked at after that."""
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            if request.content.is_eof():
                self._end()
                self._go_on()
            else:
                self._waste = LINGER_BYTES

    def _end(self) -> None:
        self._request, self._waste, self._fed = None, None, 0

    def _go_on(self) -> None:
        if not self._is_turn():
            return
        ahead, self._ahead = bytes(self._ahead), bytearray()
        if ahead or self._request is None:  # the parser may have stopped with something left: it miscounts at times
            self._feed(ahead)
        if self.transport is not None and not self._reading_paused:
            self.transport.resume_reading()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Bare answer to what the HTTP parser refused; the connection ends."""
        answer = Answer(status=status)
        answer.force_close()
        return answer

    # -- what goes out

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; an answer is sent when all of it has left this process."""
        made: Any = transport
        made.set_write_buffer_limits(high=1)  # 0 means "always" over TLS
        if made.get_extra_info("sslcontext") is not None:
            made.set_read_buffer_limits(high=PIECE)
        super().connection_made(transport)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        super().pause_writing()
        if self.transport is not None:
            self._stall = self._loop.call_later(self._stalled, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read what there was."""
        self._move()
        super().resume_writing()

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection has ended."""
        self._move()
        self._ahead.clear()
        super().connection_lost(exc)

    def _move(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
