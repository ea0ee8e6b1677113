"""Bugs to be found: each is one part of the product, broken in the way that somebody might break it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from caserver.authority.ports import Log
from caserver.raft import snapshot_file
from caserver.raft.data_dir import DataDir
from caserver.raft.engine import Engine
from caserver.raft.journal import Journal
from caserver.raft.ports import Committed, Leadership, Message, Outcome
from caserver.requests import Answer, Caller, Request, SignLeaves
from caserver.state.apply import apply
from caserver.state.codec import encode_state
from caserver.state.commands import Command, IssueLeaves, Result
from caserver.state.machine import CAStateMachine
from caserver.state.model import CAState
from tests.sim.node import Life, Parts, SimLog

TRIPPED = "planted"  # what a defect says
THIRD = 3


class _VotesUnsynced(Journal):
    """Flushes entries, but lets term and vote wait for the next entry."""

    def setCurrentTerm(self, term: int, vote: str | None) -> None:  # noqa: N802
        self._voting = True
        super().setCurrentTerm(term, vote)
        self._voting = False

    def sync(self) -> None:
        entries = self._contents.entries
        written = getattr(self, "_written", None)
        if self._pending and written == (len(entries), self.last):
            return  # nothing but votes since
        super().sync()
        self._written = (len(entries), self.last)


class _DeletesAsStock(Journal):
    """Deletes what pysyncobj asks it to delete, at once, as pysyncobj's own journals do."""

    def deleteEntriesFrom(self, position: int) -> None:  # noqa: N802
        entries = self._contents.entries
        if position < len(entries):
            self._put(b"T", entries[position][1].to_bytes(8, "little"))
            del entries[position:]


def _with_journal(kind: type[Journal]) -> Parts:
    class Broken(DataDir):
        def load(self, *, on_fault: Callable[[OSError], None]) -> tuple[Journal, snapshot_file.Snapshot | None]:
            snapshot = snapshot_file.read(self._disk)
            journal = kind(self._disk, on_fault=on_fault)
            journal.heal(None if snapshot is None else (snapshot.previous, snapshot.last))
            return journal, snapshot

    return Parts(data_dir=Broken)


def _reads_without_quorum(engine: Engine) -> None:
    """A leader takes its own word for it that it still leads."""
    guard: Any = engine._guard
    asked = guard.run_barriers

    def run_barriers() -> None:
        if engine._core.is_leader():
            waiting, guard._barriers = guard._barriers, []
            for done in waiting:
                done(None)
        asked()

    guard.run_barriers = run_barriers


def _counts_stale_answers(engine: Engine) -> None:
    """A leader takes what a node acknowledged in an earlier term for an answer of this one, as pysyncobj does."""
    guard: Any = engine._guard
    believe = guard._handlers["next_node_idx"]

    def of_this_term(peer: str, message: Message) -> None:
        believe(peer, {**message, "term": engine._core.term()})

    guard._handlers["next_node_idx"] = of_this_term


def _counts_votes_twice(engine: Engine) -> None:
    """A candidate counts every vote that arrives, as pysyncobj does."""
    guard: Any = engine._guard
    believe = guard._handlers["response_vote"]

    def anew(peer: str, message: Message) -> None:
        guard._votes_seen.clear()
        believe(peer, message)

    guard._handlers["response_vote"] = anew


class _DropsARoot(CAStateMachine):
    """Forgets rotated-out roots in its snapshots."""

    def dump(self) -> Iterator[bytes]:
        active = tuple(root for root in self.state.roots if root.active)
        return encode_state(replace(self.state, roots=active))


class _SignsEarly:
    """Shows the authority an outcome as soon as a booking is proposed: it signs before the commit."""

    def __init__(self, log: SimLog) -> None:
        self._log = log

    @property
    def state(self) -> CAState:
        return self._log.state

    @property
    def leadership(self) -> Leadership:
        return self._log.leadership

    async def propose(self, command: Command, *, deadline: float = 5.0) -> Outcome[Result]:
        if not isinstance(command, IssueLeaves):
            return await self._log.propose(command, deadline=deadline)
        self._log.life.setting.loop.create_task(self._log.propose(command, deadline=deadline))
        return Committed(apply(self._log.state, command)[1])

    async def barrier(self, *, deadline: float = 5.0) -> None:
        await self._log.barrier(deadline=deadline)

    async def changed(self, select: Callable[[CAState, Leadership], Any], seen: Any) -> Any:
        return await self._log.changed(select, seen)


def _signing_early(log: SimLog) -> Log:
    return _SignsEarly(log)


class _TripsOverBookings(_SignsEarly):
    """Raises what nobody expects of it at its third booking; whoever asked is told, and goes on."""

    def __init__(self, log: SimLog) -> None:
        super().__init__(log)
        self._booked = 0

    async def propose(self, command: Command, *, deadline: float = 5.0) -> Outcome[Result]:
        self._booked += isinstance(command, IssueLeaves)
        if self._booked == THIRD:
            raise LookupError(TRIPPED)
        return await self._log.propose(command, deadline=deadline)


def _tripping_over_bookings(log: SimLog) -> Log:
    return _TripsOverBookings(log)


async def _trip() -> None:
    raise LookupError(TRIPPED)


def _trip_at_once() -> None:
    raise LookupError(TRIPPED)


def _in_an_answer(life: Life) -> None:
    async def leaf(*_: object, **__: object) -> None:
        await _trip()

    life.leaf_cache.leaf = leaf  # type: ignore[assignment]


def _behind_the_hop(life: Life) -> None:
    execute = life.operations.execute

    async def trip(caller: Caller, request: Request) -> Answer:
        if isinstance(request, SignLeaves):
            await _trip()
        return await execute(caller, request)

    life.operations.execute = trip  # type: ignore[method-assign]


def _in_a_task_that_nobody_awaits(life: Life) -> None:
    life.setting.loop.call_later(1.0, lambda: life.setting.loop.create_task(_trip()))


def _in_a_task_whose_end_is_passed_over(life: Life) -> None:
    async def pass_over() -> None:
        await asyncio.gather(_trip(), return_exceptions=True)

    life.setting.loop.call_later(1.0, lambda: life.setting.loop.create_task(pass_over()))


def _in_a_callback(life: Life) -> None:
    life.setting.loop.call_later(1.0, _trip_at_once)


def _in_a_part_that_never_ends(life: Life) -> None:
    async def end() -> None:
        await asyncio.sleep(1.0)

    life._supervise("part", end())


PLANTED: dict[str, Parts] = {
    "a journal that forgets to sync before a vote": _with_journal(_VotesUnsynced),
    "a journal that deletes where pysyncobj says so": _with_journal(_DeletesAsStock),
    "a leader that signs before the commit": Parts(log_of_authority=_signing_early),
    "a snapshot that drops a root": Parts(machine=_DropsARoot),
    "a barrier without a quorum": Parts(tinker=_reads_without_quorum),
    "a leader that counts answers of an earlier term": Parts(tinker=_counts_stale_answers),
    "a candidate that counts a vote twice": Parts(tinker=_counts_votes_twice),
}

DEFECTS: dict[str, Parts] = {
    "in what a client is told": Parts(tamper=_in_an_answer),
    "behind the hop to the leader": Parts(tamper=_behind_the_hop),
    "in a task that nobody awaits": Parts(tamper=_in_a_task_that_nobody_awaits),
    "in a task whose end is passed over": Parts(tamper=_in_a_task_whose_end_is_passed_over),
    "in a callback": Parts(tamper=_in_a_callback),
    "where it is logged and outlived": Parts(log_of_authority=_tripping_over_bookings),
}
ENDS = Parts(tamper=_in_a_part_that_never_ends)
