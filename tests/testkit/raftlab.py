"""A Raft cluster on a table: real engines, guards and journals; time, disks and every single message moved by hand."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from caserver.environment import PrivateKey
from caserver.errors import Corrupt
from caserver.raft import messages, snapshot_file
from caserver.raft.disk import MemoryDisk
from caserver.raft.engine import Engine, Proposal
from caserver.raft.guard import Standing, Timing
from caserver.raft.journal import Journal
from caserver.raft.ports import Message, Outcome
from caserver.raft.seam import FIRST_INDEX

TIMING = Timing(heartbeat=0.06, timeout_min=0.3, timeout_max=0.6)


class LabClock:
    def __init__(self) -> None:
        self.elapsed = 1000.0

    def now(self) -> datetime:
        return datetime(2026, 3, 1, tzinfo=UTC) + timedelta(seconds=self.elapsed)

    def monotonic(self) -> float:
        return self.elapsed

    async def sleep(self, seconds: float) -> None:
        raise NotImplementedError


class NodeClock:
    """The lab's time with a wall clock of the node's own."""

    def __init__(self, lab: Lab, name: str) -> None:
        self._lab, self._name = lab, name

    def now(self) -> datetime:
        return self._lab.clock.now() + timedelta(seconds=self._lab.walls[self._name])

    def monotonic(self) -> float:
        return self._lab.clock.elapsed

    async def sleep(self, seconds: float) -> None:
        raise NotImplementedError


class LabEntropy:
    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def bytes(self, count: int) -> bytes:
        return self._random.randbytes(count)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)

    def private_key(self, kind: str, bits: int) -> PrivateKey:
        raise NotImplementedError


class Register:
    """A state machine that keeps every command, in order; ``slice_entries`` to a slice of its dump."""

    def __init__(self, *, slice_entries: int = 10, fail: Callable[[str], None] | None = None) -> None:
        self.state: tuple[str, ...] = ()
        self._slice_entries, self._fail = slice_entries, fail

    def encode(self, command: str) -> bytes:
        return command.encode()

    def apply(self, command: bytes) -> int:
        text = command.decode()
        if self._fail is not None:
            self._fail(text)
        self.state += (text,)
        return len(self.state)

    def dump(self) -> Iterator[bytes]:
        return self._slices(self.state)

    def _slices(self, state: tuple[str, ...]) -> Iterator[bytes]:
        for start in range(0, len(state), self._slice_entries):
            yield "".join(f"{each}\n" for each in state[start : start + self._slice_entries]).encode()

    def load(self, snapshot: bytes) -> None:
        self.state = tuple(snapshot.decode().splitlines())


class LabMarker:
    """The initialised marker as a file of the node's disk."""

    def __init__(self, disk: MemoryDisk) -> None:
        self._disk = disk

    @property
    def initialised(self) -> bool:
        return self._disk.read("marker") is not None

    def mark_initialised(self) -> None:
        self._disk.replace("marker", b"1")


@dataclass
class Wire:
    """Messages under way, by (from, to)."""

    queues: dict[tuple[str, str], deque[Message]] = field(default_factory=lambda: defaultdict(deque))
    cut: set[tuple[str, str]] = field(default_factory=set)

    def clear(self) -> None:
        self.queues.clear()


class LabNetwork:
    def __init__(self, node: str, wire: Wire) -> None:
        self._node, self._wire = node, wire

    def send(self, peer: str, message: Message) -> bool:
        if (self._node, peer) in self._wire.cut:
            return True  # lost on the way
        payload = messages.frame(message)[messages.LENGTH_BYTES :]
        self._wire.queues[(self._node, peer)].append(messages.decode(payload))
        return True

    def connected(self, peer: str) -> bool:
        return True

    def close(self) -> None:
        pass


class Node:
    """One engine with what it stands on; ``restart`` keeps the disk."""

    def __init__(self, lab: Lab, name: str, *, disk: MemoryDisk | None = None, rejoin: bool = False) -> None:
        self.lab, self.name, self.disk = lab, name, disk or MemoryDisk()
        self.machine = lab.make_machine()
        self.outcomes: list[Outcome[Any]] = []
        self.faults: list[OSError] = []
        self.journal = Journal(self.disk, on_fault=self.faults.append)
        content = self.disk.read(snapshot_file.SNAPSHOT_FILE)
        snapshot = None if content is None else snapshot_file.decode(content)
        self.journal.heal(None if snapshot is None else (snapshot.previous, snapshot.last))
        lab.lives += 1
        self.engine = Engine(
            node=name,
            peers=[each for each in lab.lists.get(name, lab.names) if each != name],
            machine=self.machine,
            journal=self.journal,
            snapshot=snapshot,
            marker=LabMarker(self.disk),
            disk=self.disk,
            network=LabNetwork(name, lab.wire),
            clock=NodeClock(lab, name),
            entropy=LabEntropy(f"{name} {lab.lives}"),
            timing=TIMING,
            rejoin=rejoin,
            origin=lab.origin,
            snapshot_every=lab.snapshot_every,
            erased=lab.erased,
        )

    @property
    def leads(self) -> bool:
        return self.engine.leadership().is_leader

    @property
    def term(self) -> int:
        return self.engine.leadership().term

    def standing(self) -> Standing:
        return self.engine.standing

    def log(self) -> list[tuple[int, int]]:
        return [(index, term) for _, index, term in self.journal[:]]

    def propose(self, *commands: str) -> None:
        for command in commands:
            self.engine.propose(Proposal(command.encode(), self.outcomes.append))
        self.engine.tick()

    def compact(self) -> None:
        making = self.engine.making
        while making is not None and making.advance():
            pass
        if making is not None:
            self.engine.store_snapshot(making)
            self.engine.snapshot_stored(making)


class Lab:
    """``names`` as letters; nodes are linked to each other and have said what they are."""

    def __init__(
        self,
        names: str,
        *,
        snapshot_every: int = 1000,
        machine: Callable[[], Register] = Register,
        founded: bool = True,
        lists: Mapping[str, str] | None = None,  # of nodes that list others than ``names``
        origin: int = FIRST_INDEX,
        erased: Callable[[Any, Any], bool] = lambda _before, _after: False,
    ) -> None:
        self.origin, self.erased = origin, erased
        self.lists = lists or {}
        self.names, self.snapshot_every, self.make_machine = names, snapshot_every, machine
        self.clock, self.wire, self.lives = LabClock(), Wire(), 0
        self.walls = dict.fromkeys(names, 0.0)  # seconds that the wall clock of each node is ahead
        self.nodes = {name: Node(self, name) for name in names}
        if founded:
            self.link_all()
            self.settle()

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    # -- links

    def link(self, a: str, b: str) -> None:
        for here, there in ((a, b), (b, a)):
            self.wire.cut.discard((here, there))
            self.nodes[here].engine.link(there, up=True)

    def unlink(self, a: str, b: str) -> None:
        for here, there in ((a, b), (b, a)):
            self.wire.queues[(here, there)].clear()
            self.nodes[here].engine.link(there, up=False)

    def link_all(self) -> None:
        for position, a in enumerate(self.names):
            for b in self.names[position + 1 :]:
                self.link(a, b)

    def cut(self, *names: str) -> None:
        """Messages from and to ``names`` vanish, unnoticed by the links."""
        for name in names:
            for other in self.names:
                if other != name:
                    self.wire.cut |= {(name, other), (other, name)}
                    self.wire.queues[(name, other)].clear()
                    self.wire.queues[(other, name)].clear()

    def mend(self) -> None:
        self.wire.cut.clear()

    # -- moving things

    def deliver(self, a: str, b: str, *, count: int | None = None) -> None:
        """Hand over what ``a`` sent to ``b``, without the tick that follows in life."""
        queue = self.wire.queues[(a, b)]
        while queue and count != 0:
            self.nodes[b].engine.receive(a, queue.popleft())
            count = None if count is None else count - 1

    def exchange(self, a: str, others: Iterable[str], *, rounds: int = 10) -> None:
        """Let ``a`` and each of ``others`` talk, and nobody else."""
        for _ in range(rounds):
            for b in others:
                for here, there in ((a, b), (b, a)):
                    self.nodes[here].engine.tick()
                    self.deliver(here, there)
                    self.nodes[there].engine.tick()

    def settle(self, *, rounds: int = 50) -> None:
        """Deliver everything that is under way, and what it causes; time stands still."""
        for _ in range(rounds):
            for node in self.nodes.values():
                node.engine.tick()
            # Only what is under way now: an answer travels as long as any other message.
            busy = [(pair, len(queue)) for pair, queue in self.wire.queues.items() if queue]
            for (a, b), count in busy:
                if b in self.nodes:
                    self.deliver(a, b, count=count)
                else:
                    self.wire.queues[(a, b)].clear()
            if not busy:
                return

    def run(self, seconds: float, *, step: float = 0.01) -> None:
        """Let time pass with everybody talking."""
        end = self.clock.elapsed + seconds
        while self.clock.elapsed < end:
            self.clock.elapsed += step
            self.settle()

    def elect(self, name: str, voters: Iterable[str] | None = None) -> None:
        """Make ``name`` the leader with the votes of ``voters``, by letting time pass for it alone."""
        voters = [each for each in self.nodes if each != name] if voters is None else list(voters)
        for _ in range(100):
            self.clock.elapsed += 0.05
            self.exchange(name, voters, rounds=3)
            if self.nodes[name].leads:
                return
        raise AssertionError(f"{name} was not elected")

    def leaders(self) -> list[str]:
        return [name for name, node in self.nodes.items() if node.leads]

    def await_leader(self, *, seconds: float = 5.0) -> Node:
        for _ in range(int(seconds / 0.02)):
            self.run(0.02)
            if len(self.leaders()) == 1:
                return self.nodes[self.leaders()[0]]
        raise AssertionError("no leader was elected")

    # -- crashes

    def crash(self, name: str, *, power_loss: bool = False) -> MemoryDisk:
        """Kill a node; returns what its disk holds."""
        node = self.nodes.pop(name)
        for other in self.nodes:
            self.wire.queues[(other, name)].clear()
            self.wire.queues[(name, other)].clear()
            self.nodes[other].engine.link(name, up=False)
        return node.disk.after_power_loss() if power_loss else node.disk

    def start(self, name: str, disk: MemoryDisk | None = None, *, rejoin: bool = False) -> Node:
        self.nodes[name] = Node(self, name, disk=disk, rejoin=rejoin)
        for other in self.nodes:
            if other != name:
                self.link(name, other)
        return self.nodes[name]


def corrupting(command: str) -> None:
    if command == "poison":
        raise Corrupt("cannot read this")


def committed(lab: Lab, leader: str, count: int, *, prefix: str = "k") -> None:
    for number in range(count):
        lab[leader].propose(f"{prefix}{number}")
        lab.settle()
    lab.run(0.1)
