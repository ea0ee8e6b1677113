"""Drives one ``Engine`` on the running loop and offers it as the ``Log`` that the rest of the program knows.

Everything that happens in one turn of the loop, be it messages, proposals or barriers, ends in one tick of the engine and
so in one flush of the journal. An exception out of the engine ends the node: nothing is sent any more, every caller is
told that the outcome is unknown, and ``failed`` says why.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

import structlog

from caserver.environment import Clock, Workers
from caserver.errors import NotLeader, Unavailable
from caserver.raft.compaction import Making
from caserver.raft.crossing import Deadlines, settle
from caserver.raft.engine import Engine, Proposal
from caserver.raft.guard import Standing
from caserver.raft.ports import (
    Committed,
    Leadership,
    Message,
    Network,
    NotCommitted,
    Outcome,
    OutcomeUnknown,
    StateMachine,
)
from caserver.raft.status import RaftStatus, Vitals

Command = TypeVar("Command")
State = TypeVar("State")
Result = TypeVar("Result")
Selected = TypeVar("Selected")

_log = structlog.get_logger(__name__)
_HINT_AFTER, _HINT_EVERY = 5.0, 30.0  # seconds
_REFRESH_EVERY = 0.05  # seconds between two looks at how long the leader was silent, and the like
_STOPPED = "this Raft node has stopped"
_EXHAUSTED = (errno.EMFILE, errno.ENFILE)  # only opening a file says so: nothing of it was changed
_EXHAUSTED_SECONDS = 1.0


class Watchers(Generic[State]):
    """Those who wait on one loop for something to become different; each distinct ``select`` runs once per change."""

    def __init__(self, read: Callable[[], tuple[State, Leadership]]) -> None:
        self._read = read
        self._waiting: dict[Callable[[State, Leadership], Any], dict[asyncio.Future[Any], Any]] = {}

    async def changed(self, select: Callable[[State, Leadership], Selected], seen: Selected) -> Selected:
        """Wait until ``select(state, leadership) != seen`` and return the new value."""
        future: asyncio.Future[Selected] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(select, {})[future] = seen
        try:
            # Only now: whoever changes what is read asks afterwards whether anyone is waiting.
            value = select(*self._read())
            if value != seen:
                return value
            return await future
        finally:
            waiting = self._waiting.get(select, {})
            waiting.pop(future, None)
            if not waiting:
                self._waiting.pop(select, None)

    def __bool__(self) -> bool:
        """Whether anyone waits; may be asked from another thread, after the change."""
        return bool(self._waiting)

    def notify(self) -> None:
        """State or leadership changed: wake those for whom that makes a difference."""
        now = self._read()
        for select, waiting in tuple(self._waiting.items()):
            try:
                value = select(*now)
            except Exception as exc:  # noqa: BLE001 - a defect of one selector belongs to those who wait on it
                for future in tuple(waiting):
                    _resolve(future, exc)
                continue
            for future, seen in tuple(waiting.items()):
                if value != seen:
                    _resolve(future, value)


def _resolve(future: asyncio.Future[Any], value: object) -> None:
    if future.done():
        return
    if isinstance(value, Exception):
        future.set_exception(value)
    else:
        future.set_result(value)


class ReplicatedLog(Generic[Command, State, Result]):
    """The log on its own loop; made, started and used there. ``state`` and ``leadership`` may be read from anywhere."""

    def __init__(
        self,
        machine: StateMachine[Command, State, Result],
        *,
        clock: Clock,
        workers: Workers,
        on_change: Callable[[], None] = lambda: None,
        vitals: Vitals | None = None,
    ) -> None:
        """``on_change`` is called on the loop after each turn that changed state or leadership."""
        self._vitals, self._started = vitals or Vitals(), clock.monotonic()
        self._machine, self._clock, self._workers, self._on_change = machine, clock, workers, on_change
        self._loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[None] = self._loop.create_future()
        self._engine: Engine | None = None
        self._network: Network | None = None
        self._before_change: Callable[[], None] = lambda: None
        self._stopped = False
        self._kicked: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0  # monotonic, of the timer
        self._compaction: asyncio.Task[None] | None = None
        self._hint_at = clock.monotonic() + _HINT_AFTER
        self._standing: Standing | None = None
        self._pending = Deadlines(self._loop)
        self._leadership = Leadership(node="", leader=None, term=0, is_leader=False)
        self._outlook: Hashable = None
        self._refresh_at = 0.0
        self._published: tuple[Any, Leadership] = (machine.state, self._leadership)
        self._watchers: Watchers[State] = Watchers(lambda: (self.state, self.leadership))

    def start(self, engine: Engine, network: Network, *, before_change: Callable[[], None] = lambda: None) -> None:
        """Begin to drive ``engine``, whose messages ``network`` carries; the first tick is done on return.

        ``before_change`` is called before a changed state is shown to anyone; if it raises, the node fails.
        """
        self._engine, self._network, self._before_change = engine, network, before_change
        self._turn()

    # -- Log

    @property
    def state(self) -> State:
        """The state after the last applied command."""
        return self._machine.state

    @property
    def leadership(self) -> Leadership:
        """Who leads, as of the last turn."""
        return self._leadership

    async def changed(self, select: Callable[[State, Leadership], Selected], seen: Selected) -> Selected:
        """Wait until ``select(state, leadership) != seen``; ``select`` is pure and module-level."""
        return await self._watchers.changed(select, seen)

    async def propose(self, command: Command, *, deadline: float = 5.0) -> Outcome[Result]:
        """Replicate one command; the outcome says exactly what is known after at most ``deadline`` seconds."""
        future: asyncio.Future[Outcome[Result]] = self._loop.create_future()
        proposal = Proposal(self._machine.encode(command), partial(settle, future))
        self.submit(proposal, deadline)
        try:
            return await future
        finally:
            proposal.withdrawn = not proposal.appended

    def submit(self, proposal: Proposal, deadline: float) -> None:
        """Replicate one command; ``done`` gets the outcome once, from the loop, perhaps at once, after at most ``deadline`` s."""
        told = proposal.done
        if self._engine is None or self._stopped:
            told(NotCommitted(_STOPPED))
            return
        started = self._clock.monotonic()

        def done(outcome: Outcome[Result]) -> None:
            if isinstance(outcome, Committed):
                self._vitals.commit.add((self._clock.monotonic() - started) * 1000)
            if self._pending.drop(proposal):
                told(outcome)

        def give_up(reason: str | None) -> None:
            proposal.withdrawn = not proposal.appended
            if reason is not None:
                told(OutcomeUnknown(reason))
            elif proposal.appended:
                told(OutcomeUnknown(f"no majority confirmed the command within {deadline:g} s"))
            else:
                told(NotCommitted(f"the command was not appended within {deadline:g} s and is withdrawn"))

        proposal.done = done
        self._pending.add(proposal, deadline, give_up)
        self._engine.propose(proposal)
        self._kick()

    async def barrier(self, *, deadline: float = 5.0) -> None:
        """Return once ``state`` holds everything committed before the call; NotLeader if leadership cannot be proven."""
        future: asyncio.Future[str | None] = self._loop.create_future()
        self.submit_barrier(partial(settle, future), deadline)
        reason = await future
        if reason is not None:
            raise NotLeader(reason)

    def submit_barrier(self, told: Callable[[str | None], None], deadline: float) -> None:
        """As ``barrier``: ``told(None)``, or why leadership cannot be proven, once, from the loop, perhaps at once."""
        if self._engine is None or self._stopped:
            told(_STOPPED)
            return

        def done(reason: str | None) -> None:
            if self._pending.drop(done):
                told(reason)

        def give_up(reason: str | None) -> None:
            told(reason or f"no majority confirmed the leadership of this node within {deadline:g} s")

        self._pending.add(done, deadline, give_up)
        self._engine.barrier(done)
        self._kick()

    async def transfer_leadership(self, to: str | None = None, *, deadline: float = 5.0) -> bool:
        """Hand leadership to ``to`` or to whoever is furthest; whether somebody else leads after at most ``deadline`` s."""
        engine = self._engine
        if engine is None or self._stopped or not engine.hand_over(to):
            return False
        self._publish(
            engine
        )  # that it is sure of nothing any more, before the turn in which another node is told to lead
        self._kick()
        own: str | None = self.leadership.node
        seen = own
        try:
            async with asyncio.timeout(deadline):
                while seen in {own, None}:
                    seen = await self.changed(_leader, seen)
                    if seen == own:
                        return False  # elected again: the other one did not get the votes
        except TimeoutError:
            return False
        return True

    def status(self, *, restart: bool = False) -> RaftStatus:
        """What an operator may want to know; ``restart`` begins a new interval of the extremes."""
        if self._engine is None or self._stopped:
            raise Unavailable(_STOPPED)
        vitals = self._vitals
        return replace(
            self._engine.status(),
            running_for=self._clock.monotonic() - self._started,
            wins=vitals.wins,
            leader_changes=vitals.leader_changes,
            queue=len(self._pending),
            commit=vitals.commit.read(restart=restart),
            apply=vitals.apply.read(restart=restart),
            fsync=vitals.fsync.read(restart=restart),
        )

    # -- network

    def receive(self, peer: str, message: Message) -> None:
        """Take one message; never raises."""
        engine = self._engine
        if engine is None or self._stopped:
            return
        try:
            due = engine.receive(peer, message)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the node must stop and say so
            self.fail(exc)
            return
        if due:
            self._kick()

    def link(self, peer: str, up: bool) -> None:  # noqa: FBT001 - the network's callback
        """A link came up or went down; never raises."""
        if self._engine is not None and not self._stopped:
            self._guarded(lambda engine: engine.link(peer, up=up))
            self._kick()

    def compact(self) -> None:
        """Begin a snapshot of what is applied, unless there is one; never raises."""
        if self._engine is not None and not self._stopped:
            self._guarded(Engine.compact)
            self._kick()

    # -- driving

    def act(self) -> None:
        """Do now what messages and calls of this turn of the loop ask for, instead of at its end."""
        if self._kicked is not None:
            self._turn()

    def _kick(self) -> None:
        if self._kicked is None:
            self._kicked = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        if self._kicked is not None:
            self._kicked.cancel()
            self._kicked = None
        engine = self._engine
        if engine is None or self._stopped or not self._guarded(Engine.tick):
            return
        self._set_alarm(engine.next_wakeup())
        if engine.making is not None and self._compaction is None:
            self._compaction = self._loop.create_task(self._compact(engine, engine.making))
        self._publish(engine)
        self._tell_operator(engine)

    def _set_alarm(self, at: float) -> None:
        """Turn again at ``at`` or earlier: mostly the alarm that is set comes first and is left alone."""
        if self._timer is not None and self._alarm_at <= at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._alarm_at = at
        self._timer = self._loop.call_later(max(0.0, at - self._clock.monotonic()), self._alarm)

    def _alarm(self) -> None:
        self._timer = None
        if self._engine is None or self._stopped:
            return
        due = self._engine.next_wakeup()
        if due > self._clock.monotonic():
            self._set_alarm(due)  # what it was set for was done, or put off, before
        else:
            self._turn()

    def _tell_operator(self, engine: Engine) -> None:
        if engine.standing is not self._standing:
            self._standing = engine.standing
            _log.info("standing", standing=self._standing.value)
        if self._clock.monotonic() >= self._hint_at:
            self._hint_at = self._clock.monotonic() + _HINT_EVERY
            obstacle = engine.leadership().obstacle
            if obstacle is not None:
                _log.warning("not_founded", reason=obstacle)

    def _publish(self, engine: Engine) -> None:
        state, outlook, now = self._machine.state, engine.outlook(), self._clock.monotonic()
        before_state, before = self._published
        if state is not before_state and not self._guarded(lambda _: self._before_change()):
            return
        leadership = before
        if outlook != self._outlook or now >= self._refresh_at:
            leadership, self._outlook, self._refresh_at = engine.leadership(), outlook, now + _REFRESH_EVERY
        self._leadership = leadership
        self._published = (state, leadership)
        if leadership != before:
            _log.info("leadership", leader=leadership.leader, term=leadership.term, leads=leadership.is_leader)
            self._vitals.wins += leadership.is_leader and not before.is_leader
            self._vitals.leader_changes += leadership.leader not in {None, before.leader}
        if state is not before_state or leadership != before or leadership.peers != before.peers:
            self._watchers.notify()
            self._on_change()

    async def _compact(self, engine: Engine, making: Making) -> None:
        """Write a snapshot between turns, its file in a worker."""
        try:
            while making.advance():
                await self._clock.sleep(0)
                if engine.making is not making or self._stopped:
                    return  # a later one arrived from the leader, or nobody needs it any more
            if not await self._stored(engine, making):
                return
            if not self._stopped:
                self._guarded(lambda each: each.snapshot_stored(making))
                _log.info("snapshot_written", index=making.index, bytes=making.size)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the node must stop and say so
            self.fail(exc)
        finally:
            self._compaction = None

    async def _stored(self, engine: Engine, making: Making) -> bool:
        """Write the file of a snapshot; False if nobody needs it any more. Without descriptors it is tried again later."""
        while engine.making is making and not self._stopped:
            making.writing = True
            try:
                await self._workers.run(engine.store_snapshot, making)
            except OSError as exc:
                if exc.errno not in _EXHAUSTED:
                    raise
                _log.warning("snapshot_put_off", index=making.index, error=str(exc), seconds=_EXHAUSTED_SECONDS)
            else:
                return True
            making.writing = False
            await self._clock.sleep(_EXHAUSTED_SECONDS)
        return False

    def _guarded(self, act: Callable[[Engine], None]) -> bool:
        """Let the engine act; whether it is still fit to run."""
        if self._engine is None:
            return False
        try:
            act(self._engine)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the node must stop and say so
            self.fail(exc)
            return False
        return True

    def disk_failed(self, exc: OSError) -> None:
        """The journal could not be written: say so at once, whatever the engine was doing."""
        self.fail(exc)

    def fail(self, exc: Exception) -> None:
        """Stop for good; ``failed`` carries the reason."""
        if self._stopped:
            return
        _log.critical("raft_failed", error=str(exc), kind=type(exc).__name__)
        self.stop("this Raft node has failed")
        if not self.failed.done():
            self.failed.set_exception(exc)

    def stop(self, reason: str = _STOPPED) -> None:
        """Send nothing any more and tell everyone who waits; the journal is left as durable as it is."""
        if self._stopped:
            return
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        if self._network is not None:
            self._network.close()
        self._pending.give_up_all(reason)
        node, term = self._leadership.node, self._leadership.term
        self._leadership = Leadership(node=node, leader=None, term=term, is_leader=False)
        self._watchers.notify()
        self._on_change()

    async def wait_compacted(self) -> None:
        """Return when no snapshot is being written."""
        if self._compaction is not None:
            await asyncio.wait([self._compaction])


def _leader(_: object, leadership: Leadership) -> str | None:
    return leadership.leader
