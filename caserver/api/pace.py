"""Strangers wait for their turn, so that a flood of them does not slow the callers that the cluster knows.

Only so many requests without a valid token are begun a second, those of each address in turn; the others wait, they are not
refused. A connection asks nothing new before it is answered, so that what waits is bounded by the connections.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

from caserver.environment import Clock

BURST = 20  # begun at once after a pause
_WHOLE = 1.0 - 1e-6  # of a turn: sums of fractions are never quite one


class Pace:
    """Whose turn it is; on one event loop."""

    def __init__(self, clock: Clock, *, rate: float) -> None:
        """``rate`` is requests a second; 0 lets everybody in at once."""
        self._clock = clock
        self._rate = rate
        self._spare = float(BURST)  # requests that may begin at once
        self._counted = clock.monotonic()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # by address, the next one first
        self._runner: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return sum(map(len, self._waiting.values()))

    def renew(self, rate: float) -> None:
        """Go on by a changed rate."""
        self._rate = rate

    async def turn(self, address: str) -> None:
        """Return when a request from this address may begin."""
        if not self._rate or (not self._waiting and self._take()):
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(address, deque()).append(mine)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.get_running_loop().create_task(self._run())
        await mine

    def close(self) -> None:
        """Let nobody wait any more: those who do are cancelled."""
        if self._runner is not None:
            self._runner.cancel()
        for each in (future for line in self._waiting.values() for future in line):
            each.cancel()
        self._waiting.clear()

    def _take(self) -> bool:
        now = self._clock.monotonic()
        self._spare = min(float(BURST), self._spare + (now - self._counted) * self._rate)
        self._counted = now
        if self._spare < _WHOLE:
            return False
        self._spare = max(0.0, self._spare - 1.0)
        return True

    async def _run(self) -> None:
        """Let one after the other begin, until nobody waits."""
        while self._waiting:
            while self._rate and not self._take():
                await self._clock.sleep((1.0 - self._spare) / self._rate)
            self._begin_next()

    def _begin_next(self) -> None:
        """The first of the next address whose client is still there."""
        while self._waiting:
            address, line = self._waiting.popitem(last=False)
            while line:
                first = line.popleft()
                if first.done():
                    continue
                first.set_result(None)
                if line:
                    self._waiting[address] = line  # behind the other addresses
                return
