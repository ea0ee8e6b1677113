"""Exceptions that nobody foresaw: wherever one appears in a living process or in the simulation itself, the run has failed.

A task may end with what its awaiter is meant to hear: an error of the tree, or a time-out. Anything else is a defect,
whether somebody awaits the task, takes note of it in silence or logs it and goes on. What a dead process trips over while
its remains are cleared away happened to nobody.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from caserver.errors import CaserverError
from tests.sim.disk import Crash
from tests.sim.loop import OWNER, SimFuture, SimTask

_FORESEEN = (CaserverError, TimeoutError)
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")  # differs from run to run
Fail = Callable[[str, str], None]  # takes what is wrong and a traceback


def is_foreseen(exc: BaseException) -> bool:
    """Whether a caller is meant to hear it."""
    return isinstance(exc, _FORESEEN)


def traced(exc: BaseException) -> str:
    """The traceback of an exception, the same in every run."""
    return _ADDRESS.sub("0x", "".join(traceback.format_exception(exc)))


def named(exc: BaseException) -> str:
    """Kind and text of an exception, the same in every run."""
    return _ADDRESS.sub("0x", f"{type(exc).__name__}: {exc}")


class Mishaps:
    """Looks at every way by which an exception can come to an end."""

    def __init__(self, fail: Fail) -> None:
        self._fail = fail

    def ended(self, task: SimTask) -> None:
        """A task has ended."""
        exc = task.failure
        if exc is None or is_foreseen(exc) or _is_of_the_dead(task):
            return
        work: Any = task.get_coro()
        self._fail(f"nobody foresaw how {work.__qualname__} ended: {named(exc)}", traced(exc))

    def unhandled(self, _loop: Any, context: Mapping[str, Any]) -> None:
        """The handler of the loop: an exception left a callback, or nobody asked how a task or a future ended."""
        exc, subject = context.get("exception"), context.get("future", context.get("task"))
        if isinstance(exc, Crash) or (isinstance(subject, SimFuture | SimTask) and _is_of_the_dead(subject)):
            return
        owner = OWNER.get()
        if subject is None and owner is not None and not owner.alive:
            return
        known = "" if exc is None else named(exc)
        self._fail(f"{context['message']}: {known}", "" if exc is None else traced(exc))

    def logged(self, event: Mapping[str, Any]) -> None:
        """The product wrote a line: one with a traceback is that of a defect that it outlived."""
        given, owner = event.get("exc_info"), OWNER.get()
        exc = sys.exc_info()[1] if given is True else given
        if isinstance(exc, BaseException) and (owner is None or owner.alive):
            self._fail(f"a defect was logged: {event['event']}: {named(exc)}", traced(exc))


def _is_of_the_dead(subject: SimFuture | SimTask) -> bool:
    return subject.owner is not None and not subject.owner.alive
