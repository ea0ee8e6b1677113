"""The second composition root: one node of the product, as ``daemon`` and ``raft.thread`` build it, on simulated ports.

Engine, guard, journal, data directory, state machine, authority, provider, leader and leaf cache are the real ones; the
subclasses here only tell the witness what passes. ``Parts`` lets a test put in a broken one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, TypeVar

from caserver.authority.authority import Authority
from caserver.authority.operations import Operations
from caserver.authority.ports import Log, Providers
from caserver.backup import Backups
from caserver.config.acl_settings import ACLSettings
from caserver.errors import CaserverError, Corrupt
from caserver.forwarding.leader import Leader
from caserver.internode.keyring import Keyring
from caserver.leaf_cache import LeafCache
from caserver.node_gate import NodeGate
from caserver.pki.chain import verify_chain
from caserver.pki.proof import Cell, prove
from caserver.providers.builtin import builtin_kind
from caserver.raft.data_dir import DataDir
from caserver.raft.engine import Engine
from caserver.raft.guard import Timing
from caserver.raft.journal import Journal
from caserver.raft.ports import Committed, Message, NotCommitted, Outcome, Seals
from caserver.raft.replicated_log import ReplicatedLog
from caserver.raft.snapshot_file import Snapshot
from caserver.raft.status import RaftStatus
from caserver.raft.stored_keys import LOOK_EVERY, StoredKeys
from caserver.raft.thread import _ClusterBinder
from caserver.requests import (
    Answer,
    Caller,
    LeavesSigned,
    Request,
    decode_request,
    encode_answer,
)
from caserver.state.commands import Command, IssueLeaves, Result
from caserver.state.configuration import parse_bootstrap
from caserver.state.machine import CAStateMachine
from caserver.state.model import CAState
from caserver.state.sealing import erases, keys_in_command, keys_in_state
from tests.sim.bundles import CERTIFICATE
from tests.sim.disk import Crash, Death, Platter, SimDisk
from tests.sim.loop import Process, VirtualLoop
from tests.sim.mishaps import named, traced
from tests.sim.network import SimHop, SimNetwork, Wires
from tests.sim.server import SimServer
from tests.sim.witness import Witness
from tests.testkit.access import OFF, access
from tests.testkit.fakes import SeededEntropy

T = TypeVar("T")
HANDSHAKES = 0.1  # share of proofs that are made by real handshakes
EPOCH = datetime(2026, 3, 1, 12, tzinfo=UTC)  # when every simulation begins
DATACENTER = "dc1"
SECRET = bytes(range(32))
TIMING = Timing.scaled(1.0)
CA_CONFIG = {"leaf_cert_ttl": "1h"}
PIECE = 6000  # characters of a restored state that go into one command


class SimClock:
    """Satisfies ``environment.Clock``: the loop's time, and a wall clock that may be wrong."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.ahead = 0.0  # seconds that the wall clock of this node is ahead

    def now(self) -> datetime:
        return EPOCH + timedelta(seconds=self._loop.time() + self.ahead)

    def monotonic(self) -> float:
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class SimWorkers:
    """Satisfies ``environment.Workers``: threads do what they are given a little later, while the loop goes on.

    Handshakes are most of what a simulated rotation costs, and OpenSSL has the second word in them: the first is that of
    ``verify_chain``, by which the witness judges every leaf. So most of them are left out.
    """

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    async def run(self, function: Callable[..., T], *args: object) -> T:
        await asyncio.sleep(self._lag())
        shorter: Any = _first_word if function == prove and self._chance.random() > HANDSHAKES else function
        result: T = shorter(*args)
        await asyncio.sleep(self._lag())
        return result

    def _lag(self) -> float:
        return self._chance.choice((0.0, self._chance.uniform(0.0, 0.002), self._chance.uniform(0.0, 0.05)))


def _first_word(cells: Iterable[Cell], at: datetime) -> list[str]:
    """What ``prove`` says without handshakes."""
    found = []
    for cell in cells:
        certificates = CERTIFICATE.findall(cell.endpoint.chain_pem)
        reason = verify_chain(certificates[0], certificates[1:], cell.bundle, at)
        if reason is not None:
            found.append(f"{cell.name}: {reason}")
    return found


class SimEngine(Engine):
    """Tells the witness what it applies."""

    def __init__(self, life: Life, **parts: Any) -> None:
        self.life = life
        super().__init__(**parts)

    def apply(self, index: int, command: bytes) -> object:
        entry = self._core.entry(index)
        self.life.witness.commits(self.life, index, command, 0 if entry is None else entry[2])
        result = super().apply(index, command)
        self.life.witness.applied(self.life, index, result, self.life.machine.state)
        return result

    def _install(self, peer: str, snapshot: Snapshot, content: bytes) -> None:
        before = self.applied_index
        super()._install(peer, snapshot, content)
        if self.applied_index > before:
            self.life.witness.happened("snapshot installed")


class SimLog(ReplicatedLog[Command, CAState, Result]):
    """Tells the witness what was proposed and how it ended."""

    life: Life

    async def propose(self, command: Command, *, deadline: float = 5.0) -> Outcome[Result]:
        life = self.life
        encoded = self._machine.encode(command)
        if isinstance(command, IssueLeaves):
            life.witness.proposed(command)
        life.witness.offered(encoded)
        outcome = await super().propose(command, deadline=deadline)
        if not life.alive:
            return outcome
        if isinstance(outcome, Committed):
            life.witness.acknowledged(life, encoded, outcome.result)
        elif isinstance(outcome, NotCommitted):
            life.witness.disowned(life, encoded)
        return outcome


class SimRaft:
    """Satisfies ``authority.ports.Raft``: what ``RaftThread`` carries across its loops is here on the same one."""

    def __init__(self, log: SimLog) -> None:
        self._log = log

    async def status(self, *, restart: bool = False) -> RaftStatus:
        return self._log.status(restart=restart)

    async def transfer_leadership(self, to: str | None = None, *, deadline: float = 5.0) -> bool:
        return await self._log.transfer_leadership(to, deadline=deadline)


class SimLeader(Leader):
    """Tells the witness which leaves came back."""

    life: Life

    async def execute(self, caller: Caller, request: Request) -> Answer:
        answer = await super().execute(caller, request)
        if isinstance(answer, LeavesSigned) and self.life.alive:
            self.life.witness.received(self.life, answer)
        return answer


@dataclass(frozen=True)
class Parts:
    """What a node is made of; a test that plants a bug replaces one."""

    data_dir: type[DataDir] = DataDir
    machine: Callable[[], CAStateMachine] = CAStateMachine
    tinker: Callable[[Engine], None] = lambda _: None  # called with every new engine
    log_of_authority: Callable[[SimLog], Log] = lambda log: log
    tamper: Callable[[Life], None] = lambda _: None  # called with every new life, as a part of its process
    acl: ACLSettings = OFF  # its management token is the one that clients show


@dataclass
class Setting:
    """What all nodes of a simulation share."""

    loop: VirtualLoop
    wires: Wires
    witness: Witness
    chance: random.Random
    names: tuple[str, ...]
    seed: int
    snapshot_every: int
    parts: Parts
    note: Callable[[str], None]
    server: SimServer  # of the external provider; it outlives every process


class Node:
    """A place in the cluster: its disk and its clock stay, its processes come and go."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self.setting = name, setting
        self.platter = Platter()
        self.clock = SimClock(setting.loop)
        self.life: Life | None = None
        self.lives = 0
        self.unfit: str | None = None  # why a process of this node refused to run
        self.secrets: tuple[bytes, ...] = (SECRET,)  # of the cluster, as this node's configuration lists them

    def start(self, *, rejoin: bool = False, crash_in: int | None = None) -> Life | None:
        """Run a process on what the disk holds; None if it died, or refused (``unfit``), while it started."""
        self.lives += 1
        self.unfit = None
        life = self.life = Life(self)
        self.setting.note(f"start {self.name} life {self.lives} rejoin {rejoin}")
        if crash_in is not None:
            life.disk.crash_in(crash_in, lambda: life.die(Death.POWER))
        try:
            life.process.context.run(life.start, rejoin=rejoin)
        except Crash:
            return None
        except Corrupt as exc:
            life.refuse(exc)
            return None
        return life


class Life:
    """One process of a node."""

    def __init__(self, node: Node) -> None:
        setting = self.setting = node.setting
        self.node, self.name, self.number = node, node.name, node.lives
        self.witness = setting.witness
        self.process = Process()
        self.disk = SimDisk(
            node.platter,
            chance=setting.chance,
            note=lambda what: setting.note(f"{node.name} {what}"),
        )
        self.network: SimNetwork | Any = None
        self.engine: SimEngine | Any = None
        self.journal: Journal | Any = None
        self.replies: dict[asyncio.Future[Any], None] = {}  # to clients, who are told if the process dies
        self.machine = setting.parts.machine()

    @property
    def alive(self) -> bool:
        return self.process.alive

    @property
    def state(self) -> CAState:
        return self.machine.state

    def start(self, *, rejoin: bool) -> None:
        """As ``RaftThread._live`` and ``daemon`` do it."""
        setting, clock = self.setting, self.node.clock
        entropy = SeededEntropy(hash_of(setting.seed, self.name, self.number))
        others = [name for name in setting.names if name != self.name]
        data = setting.parts.data_dir.open(self.disk, node=self.name, names=setting.names, rejoin=rejoin)
        self.workers = SimWorkers(random.Random(hash_of(setting.seed, self.name, self.number, "workers")))
        log = self.log = SimLog(self.machine, clock=clock, workers=self.workers)
        log.life = self
        log.failed.add_done_callback(self._failed)
        membership = data.membership(on_fault=log.disk_failed)
        self.network = SimNetwork(
            self.name,
            self.process,
            setting.wires,
            peers=others,
            membership=membership,
            receive=self._receive,
            on_link=log.link,
        )
        self.journal, snapshot = data.load(on_fault=log.disk_failed)
        self.engine = SimEngine(
            self,
            node=self.name,
            peers=others,
            machine=self.machine,
            journal=self.journal,
            snapshot=snapshot,
            marker=data,
            disk=self.disk,
            network=self.network,
            clock=clock,
            entropy=entropy,
            timing=TIMING,
            rejoin=data.rejoining,
            origin=data.origin,
            snapshot_every=setting.snapshot_every,
            seals=keys_in_state,
            erased=erases,
        )
        setting.parts.tinker(self.engine)
        keyring = self.keyring = _keyring(self.node.secrets)
        stored = StoredKeys(
            self.engine,
            self.journal,
            self.machine,
            keyring=keyring,
            seals=Seals(keys_in_command, keys_in_state, erases),
        )
        stored.require_held()
        stored.look()
        streams: Any = self.network
        binder = _ClusterBinder(data, membership, streams, lambda: self.machine.state.founding_id)
        self.witness.born(self)
        log.start(self.engine, self.network, before_change=binder.bind)
        setting.wires.endpoints[self.name] = self
        self.network.start()
        self._supervise("keys", self._watch_keys(stored))
        self._start_authority(entropy, keyring)
        setting.parts.tamper(self)

    async def _watch_keys(self, stored: StoredKeys[CAState]) -> None:
        """As ``RaftThread._watch``."""
        while True:
            if stored.look():
                self.log.compact()
            await self.node.clock.sleep(LOOK_EVERY)

    def _start_authority(self, entropy: SeededEntropy, keyring: Keyring) -> None:
        setting, clock, workers = self.setting, self.node.clock, self.workers
        log = setting.parts.log_of_authority(self.log)
        own = access(log, keyring=keyring, clock=clock, entropy=entropy, settings=setting.parts.acl)
        authority = Authority(
            log,
            providers=Providers({"consul": builtin_kind(clock, entropy, workers), "vault": setting.server.kind()}),
            keyring=keyring,
            clock=clock,
            entropy=entropy,
            workers=workers,
            datacenter=DATACENTER,
            bootstrap=parse_bootstrap(None, CA_CONFIG),
            gate=own.gate,
            tokens=own.tokens,
        )
        raft = SimRaft(self.log)
        self.operations = Operations(
            log, raft=raft, authority=authority.execute, gate=own.gate, tokens=own.tokens, clock=clock
        )
        hop = SimHop(self.name, self.process, setting.wires)
        self.leader = SimLeader(log, execute=self.operations.execute, hop=hop, clock=clock, entropy=entropy)
        self.leader.life = self
        self.leaf_cache = LeafCache(
            log,
            self.leader,
            gate=NodeGate(own.gate, log, self.leader, clock=clock),
            clock=clock,
            entropy=entropy,
            datacenter=DATACENTER,
            max_entries=100,
            clock_fault=authority.clock_fault,
        )
        self.backups = Backups(
            log,
            self.leader,
            keyring=keyring,
            clock=clock,
            entropy=entropy,
            workers=workers,
            servers={},
            scratch=None,
            piece=PIECE,
        )
        self._supervise("authority", authority.run())
        self._supervise("leaf cache", self.leaf_cache.run())
        self._supervise("clock watch", authority.watch_clock(raft.transfer_leadership))

    def _supervise(self, part: str, work: Coroutine[Any, Any, None]) -> None:
        """Run what never ends while the process lives; the agent would stop if it did."""

        def ended(task: asyncio.Task[None]) -> None:
            if self.alive:
                exc = None if task.cancelled() else task.exception()
                how = "by itself" if exc is None else named(exc)
                self.witness.fail(f"the {part} of {self.name} ended: {how}", "" if exc is None else traced(exc))

        self.setting.loop.create_task(work).add_done_callback(ended)

    def _receive(self, peer: str, message: Message) -> None:
        before = self.witness.hears(self, peer, message)
        self.log.receive(peer, message)
        if self.alive:
            self.witness.heard(self, peer, message, before)

    def caller(self, request_id: str = "") -> Caller:
        """A client of this node."""
        return Caller(token=self.setting.parts.acl.initial_management, source="sim", request_id=request_id)

    async def perform(self, peer: str, frame: bytes) -> bytes:
        """What the internal channel does with a frame of ``peer``."""
        try:
            caller, wanted = decode_request(frame)
            answer: Answer | CaserverError = await self.operations.execute(
                replace(caller, source=f"{peer} sim"), wanted
            )
        except CaserverError as exc:
            answer = exc
        return encode_answer(answer)

    # -- the end

    def _failed(self, failed: asyncio.Future[None]) -> None:
        if failed.cancelled() or not self.alive:
            return
        self.refuse(failed.exception() or RuntimeError("failed"))

    def refuse(self, exc: BaseException) -> None:
        """The process stopped by itself: it says why and ends."""
        self.node.unfit = f"{type(exc).__name__}: {exc}"
        self.setting.note(f"{self.name} stopped: {self.node.unfit}")
        self.die(Death.KILLED)
        self.witness.stopped(self, exc)

    def die(self, death: Death) -> None:
        """End the process between two instructions; its disk keeps what such a death leaves."""
        if not self.alive:
            return
        setting = self.setting
        setting.note(f"{self.name} dies: {death.value}")
        if setting.wires.endpoints.get(self.name) is self:
            del setting.wires.endpoints[self.name]
        self.disk.close()
        self.process.alive = False
        setting.loop.go_on(self.process)
        if self.network is not None:
            self.network.die(silently=death is Death.POWER)
        self.node.platter.after(death, setting.chance)
        self.witness.died(self)
        setting.loop.call_soon(self._bury, context=self.process.context)
        if self.node.life is self:
            self.node.life = None

    def _bury(self) -> None:
        if self.engine is not None:
            self.log.stop()
        self.process.cancel_tasks()
        for reply in tuple(self.replies):
            if not reply.done():
                reply.set_exception(ConnectionResetError("the node died"))


@cache
def _keyring(secrets: tuple[bytes, ...]) -> Keyring:
    """Deriving keys takes a while, and the same secrets yield the same ones."""
    return Keyring(secrets)


def hash_of(*parts: object) -> int:
    """A number that is the same in every run, other than ``hash``."""
    return random.Random(repr(parts)).getrandbits(63)
