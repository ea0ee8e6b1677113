"""Serials that an external provider chose, brought into the ledger after the fact: many in one command.

Best effort: a leaf is answered before its serial is booked, and what cannot be booked leaves its row without one. Nothing
waits for this, and a repeated command changes nothing. A restore takes the rows away that wait for a serial.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

import structlog

from caserver.authority.ports import Log, verdict
from caserver.environment import Clock
from caserver.raft.ports import NotCommitted, OutcomeUnknown
from caserver.state.commands import Applied, RecordSerials, Refused
from caserver.state.model import Index

GATHER = 0.1  # seconds in which serials come together before they are proposed
BATCH_MAX = 500  # of one command
KEPT_MAX = 10_000  # that wait; beyond it the oldest are given up
ATTEMPTS = 5  # for one batch
AGAIN = 1.0  # seconds between them

_Serial = tuple[int, int, int]  # expiry hour, row number, serial

_log = structlog.get_logger(__name__)


class SerialRecorder:
    """Proposes what it is given, in order, while this node leads."""

    def __init__(self, log: Log, clock: Clock) -> None:
        self._log = log
        self._clock = clock
        self._waiting: deque[tuple[Index, _Serial]] = deque()  # with the restore that it was booked after
        self._task: asyncio.Task[None] | None = None

    def add(self, hour: int, number: int, serial: int) -> None:
        """Note the serial of one row of the ledger as it is now."""
        self._waiting.append((self._log.state.restored_index, (hour, number, serial)))
        if len(self._waiting) > KEPT_MAX:
            self._waiting.popleft()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Give up what waits."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while self._waiting:
            await self._clock.sleep(GATHER)
            if not self._waiting:
                return
            restored_index, batch = self._next()
            if not await self._record(restored_index, batch):
                _log.warning("serials were not booked, their ledger entries stay without", leaves=len(batch))

    def _next(self) -> tuple[Index, tuple[_Serial, ...]]:
        """What may go into one command."""
        first, batch = self._waiting[0][0], list[_Serial]()
        while self._waiting and self._waiting[0][0] == first and len(batch) < BATCH_MAX:
            batch.append(self._waiting.popleft()[1])
        return first, tuple(batch)

    async def _record(self, restored_index: Index, batch: tuple[_Serial, ...]) -> bool:
        for attempt in range(ATTEMPTS):
            if attempt:
                await self._clock.sleep(AGAIN)
            command = RecordSerials(int(self._clock.now().timestamp()), batch, restored_index)
            match verdict(await self._log.propose(command)):
                case Applied():
                    return True
                case Refused():
                    return False
                case NotCommitted() | OutcomeUnknown():
                    continue
        return False
