"""The one thread that Raft runs in, with a loop of its own, so that no request can delay a heartbeat.

``RaftThread`` offers the log to the main loop: calls cross over as futures, ``changed`` waits on the main loop and is woken
once per applied batch. It opens the data directory, links the peers and, at ``stop``, hands leadership over first.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from caserver.environment import Clock, Entropy, InlineWorkers, ThreadWorkers, release
from caserver.errors import NotLeader, Unavailable
from caserver.internode.identity import NodeIdentity
from caserver.internode.keyring import Keyring
from caserver.internode.membership import Membership
from caserver.raft.crossing import Answers, Mailbox
from caserver.raft.data_dir import DataDir
from caserver.raft.disk import MemoryDisk, PosixDisk
from caserver.raft.engine import SNAPSHOT_EVERY, Engine, Proposal
from caserver.raft.guard import Timing
from caserver.raft.ports import Disk, Leadership, Message, NotCommitted, Outcome, OutcomeUnknown, Seals, StateMachine
from caserver.raft.replicated_log import ReplicatedLog, Watchers
from caserver.raft.status import RaftStatus, TimedDisk, TimedMachine, Vitals
from caserver.raft.stored_keys import LOOK_EVERY, StoredKeys
from caserver.raft.streams import Address, Streams

Command = TypeVar("Command")
State = TypeVar("State")
Result = TypeVar("Result")
Selected = TypeVar("Selected")
T = TypeVar("T")

_STOPPED = "this Raft node has stopped"
# After each system call the Raft thread waits for the interpreter, up to this long while the main thread computes; a round
# of a leader makes half a dozen of them. With the interpreter's own 5 ms that adds up to a heartbeat.
_SWITCH_SECONDS = 0.0005
_NO_ANSWER = "the Raft thread did not answer in time"
_CROSSING_SECONDS = 1.0  # how much later than its deadline an answer may come from the other loop
_STREAM_FAILED = "a stream failed"  # what Streams reports when one of its tasks ends by a defect


@dataclass(frozen=True, slots=True)
class RaftSettings:
    """What a node needs to know to take part."""

    node: str
    peers: Mapping[str, Address] = field(
        default_factory=dict
    )  # all nodes by name; empty, or only this one: single node
    bind: Address = ("127.0.0.1", 8300)
    multiplier: float = 3.0  # election timeout 0.3-0.6 s, heartbeat 60 ms, times this
    data_dir: Path | None = None  # None: memory only
    rejoin: bool = False  # the node's log is lost and it shall catch up from the others
    snapshot_every: int = SNAPSHOT_EVERY

    @property
    def others(self) -> list[str]:
        """Names of the other nodes, sorted."""
        return sorted(set(self.peers) - {self.node})


class _NoNetwork:
    """A single node's links."""

    def send(self, peer: str, message: Message) -> bool:
        """Never sent."""
        return False

    def connected(self, peer: str) -> bool:
        """Never."""
        return False

    def close(self) -> None:
        """Nothing to close."""


class RaftThread(Generic[Command, State, Result]):
    """The replicated log as the main loop uses it; all methods belong to the loop that called ``start``."""

    def __init__(
        self,
        settings: RaftSettings,
        machine: StateMachine[Command, State, Result],
        *,
        keyring: Keyring,
        clock: Clock,
        entropy: Entropy,
        cluster_id: Callable[[State], str | None] = lambda _: None,
        seals: Seals[State] | None = None,
    ) -> None:
        """``cluster_id`` reads the id that makes this cluster different from all others out of an applied state.

        ``seals`` tells which keys sealed what commands and states hold; without it nothing is sealed.
        """
        self._settings, self._machine, self._keyring = settings, machine, keyring
        self._clock, self._entropy, self._cluster_id = clock, entropy, cluster_id
        self._seals: Seals[State] = seals or Seals(lambda _: frozenset(), lambda _: frozenset())
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._log: ReplicatedLog[Command, State, Result] | None = None
        self._calls: Mailbox | None = None  # into the Raft loop
        self._answers: Answers | None = None  # out of it
        self._streams: Streams | None = None
        self._address: Address | None = None
        self._quit: asyncio.Event | None = None
        self._notice_sent = False
        self._closing = False  # its loop takes no calls any more
        self._turned_at: float | None = None
        self._idle = Leadership(node=settings.node, leader=None, term=0, is_leader=False)
        self._watchers: Watchers[State] = Watchers(lambda: (self.state, self.leadership))
        self._main: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None
        self._fatal: asyncio.Future[None] | None = None

    # -- life

    async def start(self) -> None:
        """Open the data directory and begin; Corrupt or OSError, as an operator must read it, if that cannot be."""
        self._main = asyncio.get_running_loop()
        self._answers = Answers(self._main)
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))
        ready = self._main.create_future()
        self._ended, self._fatal = self._main.create_future(), self._main.create_future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="raft", daemon=True)
        self._thread.start()
        await ready

    @property
    def fatal(self) -> asyncio.Future[None]:
        """Carries the exception if the Raft thread had to stop by itself; the process must end then."""
        if self._fatal is None:
            raise RuntimeError("the Raft thread is not started")
        return self._fatal

    @property
    def address(self) -> Address | None:
        """Where peers are listened to; None for a single node."""
        return self._address

    @property
    def silent_for(self) -> float:
        """Seconds since the Raft thread last was free to act: long if its disk hangs."""
        return 0.0 if self._turned_at is None else max(0.0, self._clock.monotonic() - self._turned_at)

    async def step_aside(self) -> None:
        """Hand leadership over if this node leads and another can; to be called while it still serves."""
        if self.leadership.is_leader and self._settings.others:
            patience = Timing.scaled(self._settings.multiplier).timeout_max
            await self.transfer_leadership(deadline=patience)

    async def stop(self) -> None:
        """Hand leadership over if this node leads, then end the thread; waits for both."""
        if self._thread is None or self._ended is None:
            return
        await self.step_aside()
        if self._loop is not None and self._quit is not None and not self._ended.done():
            self._loop.call_soon_threadsafe(self._quit.set)
        await self._ended
        self._thread.join()

    # -- Log

    @property
    def state(self) -> State:
        """The state after the last applied command: an immutable value."""
        return self._machine.state

    @property
    def leadership(self) -> Leadership:
        """Who leads, as far as this node knows."""
        return self._idle if self._log is None else self._log.leadership

    async def changed(self, select: Callable[[State, Leadership], Selected], seen: Selected) -> Selected:
        """Wait until ``select(state, leadership) != seen``, return the new value; ``select`` is module-level and pure."""
        return await self._watchers.changed(select, seen)

    async def propose(self, command: Command, *, deadline: float = 5.0) -> Outcome[Result]:
        """Replicate one command; never raises for a Raft reason: the outcome says it, within ``deadline`` seconds."""
        log, calls, answers = self._log, self._calls, self._answers
        if log is None or calls is None or answers is None or self._is_over():
            return NotCommitted(_STOPPED)
        future: asyncio.Future[Outcome[Result]] = answers.expect(
            deadline + _CROSSING_SECONDS, lambda reason: OutcomeUnknown(reason or _NO_ANSWER)
        )
        proposal = Proposal(self._machine.encode(command), partial(answers.put, future))
        calls.put(log.submit, proposal, deadline)
        try:
            return await future
        finally:
            proposal.withdrawn = True  # if it is not in the log by now; the engine looks before it puts it there
            answers.forget(future)

    async def barrier(self, *, deadline: float = 5.0) -> None:
        """Return once ``state`` holds everything committed before the call; NotLeader if leadership cannot be proven."""
        log, calls, answers = self._log, self._calls, self._answers
        if log is None or calls is None or answers is None or self._is_over():
            raise NotLeader(_STOPPED)
        future: asyncio.Future[str | None] = answers.expect(
            deadline + _CROSSING_SECONDS, lambda reason: reason or _NO_ANSWER
        )
        calls.put(log.submit_barrier, partial(answers.put, future), deadline)
        try:
            reason = await future
        finally:
            answers.forget(future)
        if reason is not None:
            raise NotLeader(reason)

    async def transfer_leadership(self, to: str | None = None, *, deadline: float = 5.0) -> bool:
        """Hand leadership to ``to`` or to whoever is furthest; whether somebody else leads now."""
        if self._log is None or self._is_over():
            return False
        crossing = self._across(self._log.transfer_leadership(to, deadline=deadline))
        try:
            async with asyncio.timeout(deadline + _CROSSING_SECONDS):
                return await crossing
        except TimeoutError:
            return False

    async def status(self, *, restart: bool = False) -> RaftStatus:
        """What an operator may want to know of this node; ``restart`` begins a new interval of the extremes.

        Unavailable if the Raft thread has ended or does not answer.
        """
        if self._log is None or self._is_over():
            raise Unavailable(_STOPPED)
        try:
            async with asyncio.timeout(_CROSSING_SECONDS):
                return await self._across(self._status(self._log, restart=restart))
        except TimeoutError as exc:
            raise Unavailable(_NO_ANSWER) from exc

    async def _status(self, log: ReplicatedLog[Command, State, Result], *, restart: bool) -> RaftStatus:
        status = replace(log.status(restart=restart), release=release())
        streams = self._streams
        if streams is None:
            return status
        told = streams.releases
        peers = {name: replace(peer, release=told.get(name, "")) for name, peer in status.peers.items()}
        return replace(status, peers=peers, links=dict(streams.counts))

    def _is_over(self) -> bool:
        return self._closing or self._ended is None or self._ended.done()

    def _across(self, work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """Run ``work`` on the Raft loop."""
        if self._loop is None:
            raise RuntimeError("the Raft thread is not started")
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _wake(self) -> None:
        self._notice_sent = False  # first: a change from here on is another notice
        self._watchers.notify()

    # -- on the Raft thread

    def _run(self, ready: asyncio.Future[None]) -> None:
        failure: Exception | None = None
        try:
            asyncio.run(self._live(ready))
        except Exception as exc:  # noqa: BLE001 - it is handed to the main loop, whatever it is
            failure = exc
        self._tell_main(self._end, ready, failure)

    def _end(self, ready: asyncio.Future[None], failure: Exception | None) -> None:
        if failure is not None and not ready.done():
            ready.set_exception(failure)
        elif failure is not None and not self.fatal.done():
            self.fatal.set_exception(failure)
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        if self._answers is not None:
            self._answers.give_up_all(_STOPPED)
        self._watchers.notify()

    def _tell_main(self, call: Callable[..., None], *args: object) -> None:
        if self._main is not None and not self._main.is_closed():
            self._main.call_soon_threadsafe(call, *args)

    def _notice(self) -> None:
        if self._watchers and self._answers is not None and not self._notice_sent:
            self._notice_sent = True
            self._answers.call(self._wake)

    async def _live(self, ready: asyncio.Future[None]) -> None:
        self._loop, self._quit = asyncio.get_running_loop(), asyncio.Event()
        directory = self._settings.data_dir
        disk = MemoryDisk() if directory is None else PosixDisk(directory)
        workers = InlineWorkers() if directory is None else ThreadWorkers(1)
        try:
            names = {self._settings.node, *self._settings.peers}
            vitals = Vitals()
            timed = TimedDisk(disk, self._clock, vitals.fsync)
            data = DataDir.open(timed, node=self._settings.node, names=names, rejoin=self._settings.rejoin)
            log: ReplicatedLog[Command, State, Result] = ReplicatedLog(
                self._machine, clock=self._clock, workers=workers, on_change=self._notice, vitals=vitals
            )
            await self._drive(log, data, timed, vitals, ready)
        finally:
            self._closing = True
            if isinstance(workers, ThreadWorkers):
                workers.close()
            disk.close()

    async def _drive(
        self,
        log: ReplicatedLog[Command, State, Result],
        data: DataDir,
        disk: Disk,
        vitals: Vitals,
        ready: asyncio.Future[None],
    ) -> None:
        membership = data.membership(on_fault=log.disk_failed)
        streams = self._make_streams(log, membership)
        journal, snapshot = data.load(on_fault=log.disk_failed)
        network = streams or _NoNetwork()
        engine = Engine(
            node=self._settings.node,
            peers=self._settings.others,
            machine=TimedMachine(self._machine, self._clock, vitals.apply),
            journal=journal,
            snapshot=snapshot,
            marker=data,
            disk=disk,
            network=network,
            clock=self._clock,
            entropy=self._entropy,
            timing=Timing.scaled(self._settings.multiplier),
            rejoin=data.rejoining,
            origin=data.origin,
            snapshot_every=self._settings.snapshot_every,
            seals=self._seals.of_state,
            erased=self._seals.erased,
        )
        stored = StoredKeys(engine, journal, self._machine, keyring=self._keyring, seals=self._seals)
        stored.require_held()
        stored.look()
        binder = _ClusterBinder(data, membership, streams, lambda: self._cluster_id(self._machine.state))
        log.start(engine, network, before_change=binder.bind)
        if streams is not None:
            await self._listen(streams)
        self._calls = Mailbox(asyncio.get_running_loop())
        self._log, self._streams = log, streams
        self._tell_main(_set_ready, ready)
        watch = asyncio.get_running_loop().create_task(self._watch(log, stored))
        try:
            await self._until_told(log)
        finally:
            watch.cancel()
            log.stop()
            await log.wait_compacted()
            if streams is not None:
                await streams.wait_closed()

    async def _listen(self, streams: Streams) -> None:
        try:
            await streams.start()
        except OSError as exc:
            host, port = self._settings.bind
            raise OSError(exc.errno, f"cannot listen for other nodes on {host}:{port}: {exc.strerror or exc}") from exc
        self._address = streams.address

    def _make_streams(self, log: ReplicatedLog[Command, State, Result], membership: Membership) -> Streams | None:
        settings = self._settings
        if not settings.others:
            return None

        def on_defect(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            if context.get("message") == _STREAM_FAILED and isinstance(context.get("exception"), Exception):
                log.fail(context["exception"])
            else:
                asyncio.get_running_loop().default_exception_handler(context)

        asyncio.get_running_loop().set_exception_handler(on_defect)
        return Streams(
            settings.node,
            settings.peers,
            bind=settings.bind,
            identity=NodeIdentity(self._keyring, settings.node, settings.peers),
            membership=membership,
            receive=log.receive,
            on_link=log.link,
            on_read=log.act,
        )

    async def _watch(self, log: ReplicatedLog[Command, State, Result], stored: StoredKeys[State]) -> None:
        try:
            while True:
                self._turned_at = self._clock.monotonic()
                if stored.look():
                    log.compact()
                await self._clock.sleep(LOOK_EVERY)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the node must stop and say so
            log.fail(exc)

    async def _until_told(self, log: ReplicatedLog[Command, State, Result]) -> None:
        """Return when ``stop`` is called; raise what made the log fail."""
        if self._quit is None:
            return
        quit_ = self._quit
        log.failed.add_done_callback(lambda _: quit_.set())
        await quit_.wait()
        if log.failed.done():
            log.failed.result()


@dataclass(slots=True)
class _ClusterBinder:
    """Remembers the cluster id as soon as it is applied, on disk and against the peers."""

    data: DataDir
    membership: Membership
    streams: Streams | None
    read: Callable[[], str | None]
    bound: str | None = None

    def bind(self) -> None:
        """Called after each change of the state; Corrupt if this node belongs to another cluster."""
        cluster_id = self.read()
        if cluster_id is None or cluster_id == self.bound:
            return
        self.bound = cluster_id
        self.data.mark_cluster(cluster_id)
        self.membership.adopt(cluster_id)
        if self.streams is not None:
            self.streams.recheck()


def _set_ready(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
