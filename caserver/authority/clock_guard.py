"""Notices when this node's wall clock cannot be trusted: what is dated wrongly cannot be taken back.

Two witnesses: the monotonic clock of the same machine, over the last minute, and the wall clocks of the majority. While
either contradicts by more than ``LIMIT`` seconds, and until both have agreed for ``STEADY`` seconds, nothing is issued,
rotated, renewed, expired or pruned. Looked at before every such step, and by ``watch`` in between, so that a jump of long
ago is not mistaken for one of just now. Raft itself knows no wall clock and goes on.

A machine may start with a wrong clock that is set right a moment later, and a single node has nobody to compare with: what
removes something for good waits until the clock was watched for ``STEADY`` seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

import structlog

from caserver.authority.ports import Log
from caserver.environment import Clock
from caserver.errors import Unavailable

LIMIT = 30.0  # seconds
STEADY = 60.0  # seconds
LOOK_EVERY = 5.0  # seconds
_SAMPLE_EVERY = 1.0  # seconds at least between samples that are kept
_log = structlog.get_logger(__name__)


class ClockGuard:
    """Judges the clock of the node that it runs on."""

    def __init__(self, log: Log, clock: Clock) -> None:
        self._log = log
        self._clock = clock
        self._samples: deque[tuple[float, float]] = deque()  # (monotonic, wall minus monotonic), oldest first
        self._watched_from: float | None = None  # monotonic instant of the first look
        self._doubted_at: float | None = None
        self._why = ""

    def fault(self) -> str | None:
        """Why the clock is not to be trusted right now; None if it is."""
        now = self._clock.monotonic()
        offset = self._clock.now().timestamp() - now
        self._compare(now, offset)
        if self._doubted_at is None or now - self._doubted_at >= STEADY:
            self._doubted_at = None
            return None
        return self._why

    def require(self) -> None:
        """Unavailable, with the reason, while the clock is not to be trusted."""
        fault = self.fault()
        if fault is not None:
            raise Unavailable(fault)

    def is_proven(self) -> bool:
        """Whether the clock is to be trusted with what cannot be undone: it was watched for long enough, too."""
        trusted = self.fault() is None
        return trusted and self._watched_from is not None and self._clock.monotonic() - self._watched_from >= STEADY

    async def watch(self, hand_over: Callable[[], Awaitable[bool]]) -> None:
        """Look again and again, until cancelled; say when doubt begins and ends.

        A leader whose clock the majority contradicts hands leadership over (``hand_over``): they can sign meanwhile. Where
        it is one clock against another, the next leader would have the same doubt.
        """
        doubted = False
        while True:
            fault = self.fault()
            if (fault is not None) != doubted:
                doubted = fault is not None
                _log.warning(
                    "the clock is not trusted" if doubted else "the clock is trusted again", reason=fault or ""
                )
            elif self._log.leadership.is_leader and abs(self._log.leadership.clock_outvoted) > LIMIT:
                _log.warning("leadership is handed over because of the clock", handed_over=await hand_over())
            await self._clock.sleep(LOOK_EVERY)

    def _compare(self, now: float, offset: float) -> None:
        if self._watched_from is None:
            self._watched_from = now
        # The sample before the last minute stays: a jump may lie between two looks.
        while len(self._samples) > 1 and self._samples[1][0] <= now - STEADY:
            self._samples.popleft()
        jump = max((offset - former for _, former in self._samples), key=abs, default=0.0)
        node, apart = self._log.leadership.node, self._log.leadership.clock_offset
        if abs(jump) > LIMIT:
            self._samples.clear()
            self._doubt(now, f"the wall clock of {node} jumped by {jump:+.0f} s")
        elif abs(apart) > LIMIT:
            self._doubt(now, f"the wall clock of {node} is {apart:+.0f} s off those of the other servers")
        if not self._samples or now - self._samples[-1][0] >= _SAMPLE_EVERY:
            self._samples.append((now, offset))

    def _doubt(self, now: float, what: str) -> None:
        self._doubted_at = now
        self._why = f"{what}: set it right; signing and rotating resume once it has been steady for {STEADY:g} s"
