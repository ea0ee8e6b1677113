"""What crosses between two event loops, and what waits with a deadline, at little cost for each.

A wake-up of another thread's loop costs more than everything else about a call, so calls that come together share one
(``Mailbox``); and thousands of deadlines that are almost never reached share one timer (``Deadlines``).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Mailbox:
    """Calls for one loop from any thread, run there in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()
        self._woken = False

    def put(self, call: Callable[..., None], *args: object) -> None:
        """Have ``call(*args)`` run on the loop; never, if the loop is closed already."""
        self._calls.append((call, args))
        if self._woken:
            return
        self._woken = True
        with suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        # First: a call that is put from here on wakes the loop again, so none is left behind.
        self._woken = False
        try:
            for _ in range(len(self._calls)):
                call, args = self._calls.popleft()
                call(*args)
        finally:
            if self._calls and not self._woken:  # one has raised, which is no reason to keep the others waiting
                self._woken = True
                self._loop.call_soon(self._empty)


class Deadlines:
    """Who waits on one loop and for how long; each is told once: that its time is over, or why nothing will come."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: dict[Hashable, tuple[float, Callable[[str | None], None]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: Hashable, seconds: float, give_up: Callable[[str | None], None]) -> None:
        """Call ``give_up(None)`` after so many seconds unless ``drop`` or ``give_up_all`` come first."""
        at = self._loop.time() + seconds
        self._waiting[key] = (at, give_up)
        if at < self._timer_at:
            self._arm(at)

    def drop(self, key: Hashable) -> bool:
        """Wait no longer for ``key``; False if it was told already."""
        return self._waiting.pop(key, None) is not None

    def give_up_all(self, reason: str) -> None:
        """Call every ``give_up(reason)``."""
        waiting, self._waiting = self._waiting, {}
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = None, float("inf")
        for _, give_up in waiting.values():
            give_up(reason)

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = self._loop.call_at(at, self._expire), at

    def _expire(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        now = self._loop.time()
        for key in [key for key, (at, _) in self._waiting.items() if at <= now]:
            _, give_up = self._waiting.pop(key)
            give_up(None)
        if self._waiting:
            self._arm(min(self._timer_at, *(at for at, _ in self._waiting.values())))


class Answers:
    """Futures of one loop that are resolved from another thread, each in time or with what stands for no answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._mailbox = Mailbox(loop)
        self._deadlines = Deadlines(loop)

    def expect(self, seconds: float, otherwise: Callable[[str | None], T]) -> asyncio.Future[T]:
        """A future that is ``otherwise(None)`` after so many seconds and ``otherwise(reason)`` if nothing will come."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._deadlines.add(future, seconds, lambda reason: settle(future, otherwise(reason)))
        return future

    def forget(self, future: asyncio.Future[Any]) -> None:
        """Nobody waits for it any more."""
        self._deadlines.drop(future)

    def give_up_all(self, reason: str) -> None:
        """Nothing will come."""
        self._deadlines.give_up_all(reason)

    def put(self, future: asyncio.Future[T], value: T) -> None:
        """Resolve one, from any thread."""
        self._mailbox.put(settle, future, value)

    def call(self, call: Callable[..., None], *args: object) -> None:
        """Run something else on the loop, from any thread, after what was put before."""
        self._mailbox.put(call, *args)


def settle(future: asyncio.Future[T], value: T) -> None:
    """Resolve a future unless it is done."""
    if not future.done():
        future.set_result(value)
