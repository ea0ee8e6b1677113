"""Stand-ins for what surrounds the authority: a log on the real apply, a clock that tests move, seeded entropy, a provider that fails on order.

``FakeLog`` is one node's view of a replicated log; ``elsewhere`` gives the view of another node onto the same log, and
``become_leader`` moves the leadership there. It commits through the real state machine and its codec. A ``Tripwire``
counts what happens and kills at a chosen step, as ``kill -9`` would: from then on the dead node neither reads nor writes.
"""

from __future__ import annotations

import asyncio
import builtins
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec

from caserver.authority.ports import (
    Backend,
    Inspection,
    Prepared,
    Provider,
    ProviderKind,
    SignedLeaf,
    SigningOrder,
    Tended,
)
from caserver.environment import CURVES, PrivateKey
from caserver.errors import CaserverError, NotLeader
from caserver.fields import Secret
from caserver.raft.ports import Committed, KeyReport, Leadership, NotCommitted, Outcome, OutcomeUnknown
from caserver.raft.status import PeerStatus, RaftStatus
from caserver.state.commands import Applied, Command, Result
from caserver.state.configuration import CAConfiguration
from caserver.state.machine import CAStateMachine
from caserver.state.model import CARoot, CAState
from tests.testkit.keys import private_key

T = TypeVar("T")
SETTLE_ROUNDS = 60  # loop turns after which tasks that wait for nothing else have come to rest


async def settle() -> None:
    """Let every task run until it waits for something that only the test can bring about."""
    loop: Any = asyncio.get_running_loop()
    for _ in range(SETTLE_ROUNDS):
        await asyncio.sleep(0)
        # Only the loop knows that nothing is left to run, and asyncio has no public name for it. Sockets (the loop's own
        # is the one that is always there) may still bring something: then it takes all the turns.
        if not loop._ready and len(loop._selector.get_map()) == 1:
            return


class Killed(BaseException):
    """The process died here."""


class Tripwire:
    """Counts steps; at an armed one it kills, or does what it was told to do instead."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.sprung = False
        self.dead = False
        self._at: int | str | None = None
        self._action: Callable[[], None] | None = None

    def arm(self, ahead: int, action: Callable[[], None] | None = None) -> None:
        """Spring at the step that lies ``ahead`` (1 = the next one)."""
        self._at = len(self.steps) + ahead
        self._action = action

    def arm_at(self, label: str, action: Callable[[], None] | None = None) -> None:
        """Spring at the next step of this name."""
        self._at = label
        self._action = action

    def step(self, label: str) -> None:
        """Note one step; Killed at the armed one, unless another action was chosen, and ever after."""
        if self.dead:
            raise Killed(label)
        self.steps.append(label)
        if self._at not in (len(self.steps), label):
            return
        self.sprung, self._at = True, None
        if self._action is not None:
            self._action()
            return
        self.dead = True
        raise Killed(label)


class ManualClock:
    """Time that stands still until ``advance`` moves it."""

    def __init__(self, start: datetime = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)) -> None:
        self._start = start
        self._elapsed = 0.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._elapsed)

    def monotonic(self) -> float:
        return self._elapsed

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (self._elapsed + seconds, wake)
        self._sleepers.append(entry)
        try:
            await wake
        finally:
            if entry in self._sleepers:
                self._sleepers.remove(entry)

    def set_wall(self, seconds: float) -> None:
        """Put the wall clock forward (or back): somebody set the time."""
        self._start += timedelta(seconds=seconds)

    def jump(self, seconds: float) -> None:
        """Move time without waking anybody (a stalled process)."""
        self._elapsed += seconds

    async def advance(self, seconds: float) -> None:
        """Move time on, waking sleepers one after another at their instants and letting each run."""
        target = self._elapsed + seconds
        await settle()
        while due := [entry for entry in self._sleepers if entry[0] <= target]:
            entry = min(due, key=lambda each: each[0])
            self._sleepers.remove(entry)
            self._elapsed = max(self._elapsed, entry[0])
            if not entry[1].done():
                entry[1].set_result(None)
            await settle()
        self._elapsed = target
        await settle()


class SeededEntropy:
    """The same bytes and keys for the same seed; RSA keys come from the ready-made ones."""

    def __init__(self, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self._rsa_drawn = 0

    def bytes(self, count: int) -> builtins.bytes:
        return self._random.randbytes(count)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)

    def private_key(self, kind: str, bits: int) -> PrivateKey:
        if kind == "rsa":
            self._rsa_drawn += 1
            return private_key("rsa-4096" if bits == 4096 else ("rsa-2048", "rsa-2048-b")[self._rsa_drawn % 2])
        # 190 bits are below the order of every curve and above the first 2**64 multiples.
        return ec.derive_private_key(self._random.getrandbits(190) | 1 << 189, CURVES[bits])


@dataclass
class _Waiter:
    evaluate: Callable[[], object]
    seen: object
    found: asyncio.Future[Any]


@dataclass
class _Shared:
    machine: CAStateMachine
    views: list[FakeLog]
    leader: str | None = None
    term: int = 1
    entries: list[tuple[Command, Result]] = field(default_factory=list)

    def notify(self) -> None:
        for view in self.views:
            view.notify()


class FakeLog:
    """One node's view of a replicated log that lives in this process; satisfies the authority's ``Log`` port."""

    def __init__(
        self,
        node: str = "n1",
        *,
        leader: bool = True,
        tripwire: Tripwire | None = None,
        shared: _Shared | None = None,
    ) -> None:
        self.node = node
        self.tripwire = tripwire or Tripwire()
        self._shared = shared or _Shared(machine=CAStateMachine(), views=[])
        self._shared.views.append(self)
        if leader:
            self._shared.leader = node
        self._waiters: list[_Waiter] = []
        self._fail = 0
        self._lose_command = 0
        self._lose_reply = 0
        self._open = asyncio.Event()
        self._held: tuple[type, ...] = ()
        self.held = 0  # proposals that wait until ``release``
        self.clock_offset = 0.0
        self.outvoted = True  # whether the offset is the majority's word, or that of one clock against another
        self.keys: dict[str, KeyReport] = {}  # what the nodes said of their cluster secrets
        self.links: dict[str, bool] = {}  # to peers that have no view of their own, and where a test says otherwise
        self.unproven = False  # whether barriers fail: a leader without a quorum

    def elsewhere(self, node: str, *, tripwire: Tripwire | None = None) -> FakeLog:
        """The view of another node, a follower for now."""
        return FakeLog(node, leader=False, tripwire=tripwire, shared=self._shared)

    # -- the port

    @property
    def state(self) -> CAState:
        return self._shared.machine.state

    @property
    def leadership(self) -> Leadership:
        shared = self._shared
        return Leadership(
            node=self.node,
            leader=shared.leader,
            term=shared.term,
            is_leader=shared.leader == self.node,
            clock_offset=self.clock_offset,
            clock_outvoted=self.clock_offset if self.outvoted else 0.0,
            peers={view.node: True for view in shared.views if view.node != self.node} | self.links,
            keys=self.keys,
        )

    async def propose(self, command: Command, *, deadline: float = 5.0) -> Outcome[Result]:
        name = type(command).__name__
        self.tripwire.step(f"propose {name}")
        await asyncio.sleep(0)
        if isinstance(command, self._held):
            self.held += 1
            await self._open.wait()
            self.held -= 1
        if self.tripwire.dead:
            raise Killed(name)
        if not self.leadership.is_leader:
            return NotCommitted("this node does not lead")
        if self._fail:
            self._fail -= 1
            return NotCommitted("told to fail")
        if self._lose_command:
            self._lose_command -= 1
            return OutcomeUnknown("told to lose the command")
        result = self._commit(command)
        self.tripwire.step(f"committed {name}")
        if self._lose_reply:
            self._lose_reply -= 1
            return OutcomeUnknown("told to lose the reply")
        return Committed(result)

    async def barrier(self, *, deadline: float = 5.0) -> None:
        self.tripwire.step("barrier")
        await asyncio.sleep(0)
        if self.unproven or not self.leadership.is_leader:
            raise NotLeader("this node does not lead")

    async def changed(self, select: Callable[[CAState, Leadership], T], seen: T) -> T:
        def evaluate() -> T:
            return select(self.state, self.leadership)

        current = evaluate()
        if current != seen:
            return current
        found: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(evaluate=evaluate, seen=seen, found=found)
        self._waiters.append(waiter)
        try:
            return await found
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    # -- what a test does to it

    def become_leader(self) -> None:
        """Win the next term."""
        self._shared.leader = self.node
        self._shared.term += 1
        self._shared.notify()

    def step_down(self) -> None:
        """Nobody leads from now on."""
        self._shared.leader = None
        self._shared.notify()

    def link(self, peer: str, *, up: bool) -> None:
        """The link to a peer comes up or breaks."""
        self.links[peer] = up
        self._shared.notify()

    def fail_next(self, count: int = 1) -> None:
        """The next proposals are certainly not committed."""
        self._fail += count

    def lose_next_command(self, count: int = 1) -> None:
        """The next proposals end unknown and are never committed."""
        self._lose_command += count

    def lose_next_reply(self, count: int = 1) -> None:
        """The next proposals are committed, but their proposer is told that the outcome is unknown."""
        self._lose_reply += count

    def hold(self, kind: type = object) -> None:
        """Let proposals, of one kind or all, wait until ``release``."""
        self._held = (kind,)
        self._open = asyncio.Event()

    def release(self) -> None:
        """Let waiting proposals go on."""
        self._held = ()
        self._open.set()

    def commit(self, command: Command) -> Result:
        """Commit a command without asking anybody: state that a test starts from."""
        return self._commit(command)

    @property
    def waiting(self) -> int:
        """How many wait for a change."""
        return len(self._waiters)

    @property
    def entries(self) -> Sequence[tuple[Command, Result]]:
        """Everything committed so far with its result."""
        return tuple(self._shared.entries)

    def applied(self, kind: type[Command] | None = None) -> list[Command]:
        """Committed commands that took effect, of one kind or all."""
        return [
            command
            for command, result in self._shared.entries
            if isinstance(result, Applied) and (kind is None or isinstance(command, kind))
        ]

    @property
    def views(self) -> Sequence[FakeLog]:
        """Every node's view of this log."""
        return tuple(self._shared.views)

    def notify(self) -> None:
        """Wake the waiters whose selection changed."""
        for waiter in list(self._waiters):
            value = waiter.evaluate()
            if value != waiter.seen and not waiter.found.done():
                self._waiters.remove(waiter)
                waiter.found.set_result(value)

    def _commit(self, command: Command) -> Result:
        machine = self._shared.machine
        result = machine.apply(machine.encode(command))
        self._shared.entries.append((command, result))
        self._shared.notify()
        return result


class FakeRaft:
    """The Raft node below a ``FakeLog``: all is well unless the test says otherwise; the successor is the first who can."""

    def __init__(self, log: FakeLog, peers: Sequence[str] = ()) -> None:
        self._log = log
        self._peers = [name for name in peers if name != log.node]
        self.unwell: dict[str, PeerStatus] = {}
        self.transfers: list[str | None] = []
        self.stuck = False  # nobody takes over
        self.usurper: str | None = None  # who takes over, whoever is meant to
        self.asked = 0

    async def status(self, *, restart: bool = False) -> RaftStatus:
        self.asked += 1
        index = len(self._log.entries)
        leadership = self._log.leadership
        well = PeerStatus(
            connected=True, voter=True, last_contact=0.02, steady_for=60.0, last_index=index, last_term=leadership.term
        )
        return RaftStatus(
            leadership=leadership,
            last_index=index,
            last_term=leadership.term,
            commit_index=index,
            applied_index=index,
            running_for=60.0,
            contact_max=0.3,
            peers={name: self.unwell.get(name, well) for name in self._peers},
        )

    async def transfer_leadership(self, to: str | None = None, *, deadline: float = 5.0) -> bool:
        self.transfers.append(to)
        views = {view.node: view for view in self._log.views if view is not self._log}
        if self.stuck or not views:
            return False
        views[self.usurper or to or min(views)].become_leader()
        return True


@dataclass
class ProviderControl:
    """What a test tells the providers of one node, and what it learns of them."""

    tripwire: Tripwire = field(default_factory=Tripwire)
    failures: dict[str, CaserverError] = field(default_factory=dict)  # member -> raised until removed
    calls: list[str] = field(default_factory=list)
    retired: list[int] = field(default_factory=list)  # epochs
    hang: asyncio.Event | None = None  # while set to an event, sign_leaves waits for it
    useless_cross_signing: bool = False  # cross_sign hands back what it was given

    def note(self, member: str) -> None:
        """Count one call, or fail as told."""
        self.tripwire.step(f"provider {member}")
        self.calls.append(member)
        if failure := self.failures.get(member):
            raise failure


class FakeProvider:
    """A real provider behind a control."""

    def __init__(self, inner: Provider, control: ProviderControl) -> None:
        self._inner = inner
        self._control = control

    async def inspect(self) -> Inspection:
        self._control.note("inspect")
        return await self._inner.inspect()

    async def prepare(self, *, now: datetime, epoch: int) -> Prepared:
        self._control.note("prepare")
        prepared = await self._inner.prepare(now=now, epoch=epoch)
        self._control.tripwire.step("prepared")
        return prepared

    async def sign_leaves(self, orders: Sequence[SigningOrder]) -> Sequence[SignedLeaf | CaserverError]:
        self._control.note("sign_leaves")
        if self._control.hang is not None:
            await self._control.hang.wait()
        return await self._inner.sign_leaves(orders)

    async def cross_sign(
        self, certificate_pem: str, *, csr_pem: str | None, serial: int, not_before: datetime, not_after: datetime
    ) -> str:
        self._control.note("cross_sign")
        if self._control.useless_cross_signing:
            return certificate_pem
        signed = await self._inner.cross_sign(
            certificate_pem, csr_pem=csr_pem, serial=serial, not_before=not_before, not_after=not_after
        )
        self._control.tripwire.step("cross-signed")
        return signed

    async def retire(self, *, epochs: tuple[int, ...], keep: Backend | None) -> None:
        self._control.note("retire")
        self._control.retired.extend(epochs)
        await self._inner.retire(epochs=epochs, keep=keep)

    async def tend(self, now: datetime) -> Tended:
        self._control.note("tend")
        return await self._inner.tend(now)

    def close(self) -> None:
        self._inner.close()


def controlled(kind: ProviderKind, control: ProviderControl) -> ProviderKind:
    """``kind`` whose providers obey ``control``."""

    def build(
        configuration: CAConfiguration, *, trust_domain: str, root: CARoot | None, root_key: Secret | None
    ) -> Provider:
        inner = kind.build(configuration, trust_domain=trust_domain, root=root, root_key=root_key)
        return FakeProvider(inner, control)

    return replace(kind, build=build)
