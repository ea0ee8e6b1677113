"""An event loop on virtual time, on which every callback belongs to one process of the simulated cluster.

Time passes only while nothing is ready, and a little with every callback. A process that is paused runs nothing: what
would have run waits and runs in order once it goes on, while the clock went on all the time (SIGSTOP, a long collection, a
frozen virtual machine). Tasks and futures hash by number, so that sets of them iterate alike in every run.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any, Protocol

STEP_SECONDS = 0.00002  # that every callback takes
_TASKS_SWEPT = 256


class Process:
    """What owns callbacks and tasks: one life of one node."""

    def __init__(self) -> None:
        self.paused = False
        self.alive = True
        self.countdown = 0  # callbacks after which ``then`` is called; 0 = never
        self.then: Callable[[], None] = lambda: None
        self.parked: list[_Handle | _TimerHandle] = []
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.context = copy_context()
        self.context.run(OWNER.set, self)

    def cancel_tasks(self) -> None:
        """Let everything that it was doing end; nothing of it can be seen outside any more."""
        for task in tuple(self.tasks):
            task.cancel()


OWNER: ContextVar[Process | None] = ContextVar("OWNER", default=None)


class Observer(Protocol):
    """Who looks after every callback."""

    def after(self, owner: Process | None) -> None:
        """A callback of ``owner`` has run."""
        ...

    def ended(self, task: SimTask) -> None:
        """A task has ended, before anybody hears of it."""
        ...


class _Numbered:
    _number: int

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class SimFuture(_Numbered, asyncio.Future):  # type: ignore[type-arg]
    """A future that hashes by number and knows who made it."""

    def __init__(self, *, loop: VirtualLoop) -> None:
        self._number = loop.next_number()
        self.owner = OWNER.get()
        super().__init__(loop=loop)


class SimTask(_Numbered, asyncio.Task):  # type: ignore[type-arg]
    """A task that hashes by number and is known to its process."""

    def __init__(self, coro: Coroutine[Any, Any, Any], *, loop: VirtualLoop, **options: Any) -> None:
        self._number = loop.next_number()
        super().__init__(coro, loop=loop, **options)
        context: Context | None = options.get("context")
        self.owner = owner = OWNER.get() if context is None else context.get(OWNER)
        if owner is None:
            return
        if len(owner.tasks) > _TASKS_SWEPT:
            for task in [each for each in owner.tasks if each.done()]:
                del owner.tasks[task]
        owner.tasks[self] = None
        if not owner.alive:
            self.cancel()

    @property
    def failure(self) -> BaseException | None:
        """What a task that has ended raised; to look does not count as having been told."""
        return self._exception


class _Handle(asyncio.Handle):
    _loop: VirtualLoop
    _callback: Callable[..., object] | None
    _context: Context

    def _run(self) -> None:
        if self._loop.may_run(self):
            super()._run()
            self._loop.ran(self)


class _TimerHandle(asyncio.TimerHandle):
    _loop: VirtualLoop
    _callback: Callable[..., object] | None
    _context: Context
    _scheduled: bool

    def _run(self) -> None:
        if self._loop.may_run(self):
            super()._run()
            self._loop.ran(self)


class _NoSelector:
    """Waits by moving time."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("every task waits and nothing is scheduled: the simulation is stuck")
        self._loop.pass_time(timeout)
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """See above."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._number = 0
        self._selector = _NoSelector(self)
        self.observer: Observer | None = None
        self.set_task_factory(_make_task)  # type: ignore[arg-type]

    def time(self) -> float:
        """Virtual seconds since the simulation began."""
        return self._now

    def pass_time(self, seconds: float) -> None:
        """Move the clock."""
        self._now += seconds

    def next_number(self) -> int:
        """A number that no task or future had before."""
        self._number += 1
        return self._number

    def create_future(self) -> asyncio.Future[Any]:
        return SimFuture(loop=self)

    def may_run(self, handle: _Handle | _TimerHandle) -> bool:
        """Whether the callback may run now; one of a paused process waits until it goes on."""
        owner: Process | None = handle._context.get(OWNER)
        if owner is not None and owner.paused:
            owner.parked.append(handle)
            return False
        self._now += STEP_SECONDS
        return True

    def ran(self, handle: _Handle | _TimerHandle) -> None:
        """A callback has run."""
        owner: Process | None = handle._context.get(OWNER)
        if owner is not None and owner.countdown:
            owner.countdown -= 1
            if not owner.countdown:
                owner.then()
        if self.observer is not None:
            task = getattr(handle._callback, "__self__", None)
            if type(task) is SimTask and task.done():
                self.observer.ended(task)
            self.observer.after(owner)

    def go_on(self, process: Process) -> None:
        """End the pause of a process."""
        process.paused = False
        parked, process.parked = process.parked, []
        self._ready.extend(parked)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = _TimerHandle(when, callback, list(args), self, context)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True
        return timer

    def _call_soon(self, callback: Callable[..., Any], args: Any, context: Context | None) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def _process_events(self, event_list: list[Any]) -> None:
        """There are no events but time."""

    def _write_to_self(self) -> None:
        """There is no other thread to be woken by."""


def _make_task(loop: VirtualLoop, coro: Coroutine[Any, Any, Any], **options: Any) -> SimTask:
    return SimTask(coro, loop=loop, **options)
