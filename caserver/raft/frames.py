"""Cuts what arrives on one connection into frames: the first is waited for, all later ones are handed over as they come.

Nothing is read ahead of what is handled but one frame, and a frame that has begun has to end in time. No task and no future
is woken for a frame, which is what a commit in a hurry would wait for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from caserver.raft.messages import FRAME_BYTES_MAX, LENGTH_BYTES, payload_bytes


class Malformed(ValueError):
    """What arrived is not what may be sent here; the text does not repeat it."""


class Frames(asyncio.Protocol):
    """The receiving end of a stream, and its transport to send on."""

    def __init__(self, *, first_limit: int, frame_seconds: float) -> None:
        """``first_limit`` is the most bytes of the first frame; ``frame_seconds`` the time for the rest of a later one."""
        self._loop = asyncio.get_running_loop()
        self._first_limit, self._frame_seconds = first_limit, frame_seconds
        self._first: asyncio.Future[bytes] = self._loop.create_future()
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._rest = bytearray()  # of a frame that is not here as a whole, or that nobody takes yet
        self._needed = 0  # bytes that it has to have
        self._take: Callable[[bytes], None] | None = None
        self._taken: Callable[[], None] = lambda: None
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def transport(self) -> asyncio.Transport:
        """What the connection sends on."""
        if self._transport is None:
            raise RuntimeError("the connection is not made yet")
        return self._transport

    def abort(self) -> None:
        """Drop the connection, if it was made: a task that is cancelled just then never gets to see its transport."""
        if self._transport is not None:
            self._transport.abort()

    async def first(self) -> bytes:
        """The first frame; EOFError or OSError if the connection ends before it, Malformed for a length not allowed."""
        return await self._first

    async def deliver(self, take: Callable[[bytes], None], taken: Callable[[], None] = lambda: None) -> None:
        """Hand over every later frame until the connection ends; ``taken`` is called when all that has arrived was.

        Raises what ended it: OSError, Malformed for a length that is not allowed, TimeoutError, or whatever ``take`` raises.
        """
        self._take, self._taken, self._needed = take, taken, 0
        if not self._closed.done():
            self.transport.resume_reading()
            self.data_received(b"")
        await self._closed

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # a stream's is one in all but name on every loop

    def data_received(self, data: bytes) -> None:
        """Cut and hand over."""
        if self._closed.done():
            return
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return
            data = bytes(self._rest)
            self._rest.clear()
        try:
            self._cut(data)
        except Exception as exc:  # noqa: BLE001 - whoever waits for the end of the connection is told, whatever it is
            self._end(exc)

    def eof_received(self) -> None:
        """The other end is done: so is this one."""
        self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._end(exc, closed=True)

    def _cut(self, data: bytes) -> None:
        position, size, self._needed = 0, len(data), LENGTH_BYTES
        while size - position >= LENGTH_BYTES:
            if self._take is None and self._first.done():
                self._needed = FRAME_BYTES_MAX  # reading pauses; nobody may take it before it is known who this is
                break
            begin = position + LENGTH_BYTES
            end = begin + self._length(data[position:begin])
            if end > size:
                self._needed = end - position
                break
            position = end
            self._hand_over(data[begin:end])
            if self._closed.done():
                return
        self._rest += data[position:]
        self._watch(begun=position > 0)
        if self._take is not None and position:
            self._taken()

    def _length(self, header: bytes) -> int:
        try:
            if self._take is None:
                return payload_bytes(header, limit=self._first_limit)
            return payload_bytes(header)
        except ValueError as exc:
            raise Malformed(str(exc)) from exc

    def _hand_over(self, payload: bytes) -> None:
        if self._take is not None:
            self._take(payload)
            return
        self.transport.pause_reading()
        self._first.set_result(payload)

    def _watch(self, *, begun: bool) -> None:
        """Give a later frame its time from its beginning on; whoever waits for the first one has a limit of his own."""
        if self._deadline is not None and (begun or not self._rest):
            self._deadline.cancel()
            self._deadline = None
        if self._deadline is None and self._rest and self._take is not None:
            late = TimeoutError("the rest of a frame did not come in time")
            self._deadline = self._loop.call_later(self._frame_seconds, self._end, late)

    def _end(self, exc: BaseException | None, *, closed: bool = False) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if not self._first.done():
            self._first.set_exception(exc or EOFError("the other end closed the connection"))
            self._first.exception()  # seen, should nobody wait for it any more
        if not self._closed.done():
            if exc is None:
                self._closed.set_result(None)
            else:
                self._closed.set_exception(exc)
                self._closed.exception()
        if not closed and self._transport is not None:
            self._transport.abort()
