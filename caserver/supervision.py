"""Runs the parts of the agent that never end beside everything else, and notices when one ends all the same."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog

_log = structlog.get_logger("caserver.agent")


class Supervisor:
    """Watches over what runs for as long as the agent does; made on the loop that all of it runs on."""

    def __init__(self) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @asynccontextmanager
    async def running(self, name: str, work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
        """Run ``work`` until the context ends; if it ends before, however it does, ``failed`` carries the reason."""
        leaving = False

        async def run() -> None:
            try:
                await work()
                failure: Exception = RuntimeError(f"the {name} ended")
            except asyncio.CancelledError:
                if leaving:
                    raise
                failure = RuntimeError(f"the {name} was cancelled")
            except Exception as exc:  # noqa: BLE001 - whatever it is, the agent must stop and say so
                failure = exc
            if leaving:
                _log.error("a part of the agent failed while it was stopped", part=name, exc_info=failure)
                return
            _log.error("a part of the agent failed, the agent stops", part=name, exc_info=failure)
            if not self.failed.done():
                self.failed.set_exception(failure)

        task = asyncio.get_running_loop().create_task(run())
        try:
            yield
        finally:
            leaving = True
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
