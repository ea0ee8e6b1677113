"""What a Raft node can tell of itself and its peers to those who operate it, and how what takes time is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from caserver.environment import Clock
from caserver.raft.guard import Guard, PeerView
from caserver.raft.ports import Disk, Leadership, StateMachine
from caserver.raft.seam import Core
from caserver.telemetry.metrics import Summary, Totals

Command = TypeVar("Command")
State = TypeVar("State")
Result = TypeVar("Result")
_MILLISECONDS = 1000.0


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One peer as this node sees it."""

    connected: bool
    voter: bool
    last_contact: float | None  # seconds since its last message; None: never heard since this node started
    steady_for: float  # seconds that it has been what it is, on the same link
    last_index: int  # highest entry known durable there; known on the leader only, 0 elsewhere
    last_term: int  # of that entry; 0 if it is compacted away here
    release: str = ""  # of caserver; empty while it is not linked


@dataclass(frozen=True, slots=True)
class RaftStatus:
    """One node at one moment; all counts since its start."""

    leadership: Leadership
    last_index: int
    last_term: int
    commit_index: int
    applied_index: int
    contact_max: float  # seconds of silence after which a peer counts as unhealthy
    peers: Mapping[str, PeerStatus] = field(default_factory=dict)
    running_for: float = 0.0  # seconds
    release: str = ""  # of caserver, here
    campaigns: int = 0
    wins: int = 0
    leader_changes: int = 0
    queue: int = 0  # proposals and barriers under way
    refused: Mapping[str, int] = field(default_factory=dict)  # rule -> messages
    links: Mapping[str, int] = field(default_factory=dict)  # event -> connections
    commit: Totals = field(default_factory=Totals)  # milliseconds
    apply: Totals = field(default_factory=Totals)
    fsync: Totals = field(default_factory=Totals)


def status_of(core: Core, guard: Guard, leadership: Leadership, *, now: float, contact_max: float) -> RaftStatus:
    """What the protocol knows; ``now`` is monotonic. What its driver counts is left at zero."""
    _, last_index, last_term = core.last()
    return RaftStatus(
        leadership=leadership,
        last_index=last_index,
        last_term=last_term,
        commit_index=core.commit_index(),
        applied_index=core.applied_index(),
        contact_max=contact_max,
        peers={peer: _peer_status(core, guard, peer, view, now) for peer, view in guard.peers.items()},
        campaigns=guard.campaigns,
        refused=dict(guard.counts),
    )


def _peer_status(core: Core, guard: Guard, peer: str, view: PeerView, now: float) -> PeerStatus:
    match = core.match_index(peer) if core.is_leader() else 0
    entry = core.entry(match)
    return PeerStatus(
        connected=view.announced,
        voter=guard.has_vote(peer),
        last_contact=now - view.heard if view.life else None,
        steady_for=now - max(view.since, view.linked),
        last_index=match,
        last_term=0 if entry is None else entry[2],
    )


@dataclass(slots=True)
class Vitals:
    """What one node measures; written on the Raft thread."""

    commit: Summary = field(default_factory=Summary)
    apply: Summary = field(default_factory=Summary)
    fsync: Summary = field(default_factory=Summary)
    wins: int = 0
    leader_changes: int = 0


class TimedDisk:
    """A ``Disk`` whose flushes are measured."""

    def __init__(self, disk: Disk, clock: Clock, flushes: Summary) -> None:
        self._disk, self._clock, self._flushes = disk, clock, flushes

    def read(self, name: str) -> bytes | None:
        """As the disk below."""
        return self._disk.read(name)

    def append(self, name: str, data: bytes) -> None:
        """As the disk below."""
        self._disk.append(name, data)

    def datasync(self, name: str) -> None:
        """As the disk below, measured."""
        started = self._clock.monotonic()
        self._disk.datasync(name)
        self._flushes.add((self._clock.monotonic() - started) * _MILLISECONDS)

    def replace(self, name: str, data: bytes | None) -> None:
        """As the disk below."""
        self._disk.replace(name, data)

    def lock(self) -> None:
        """As the disk below."""
        self._disk.lock()


class TimedMachine(Generic[Command, State, Result]):
    """A ``StateMachine`` whose applications are measured."""

    def __init__(self, machine: StateMachine[Command, State, Result], clock: Clock, applied: Summary) -> None:
        self._machine, self._clock, self._applied = machine, clock, applied

    @property
    def state(self) -> State:
        """As the machine below."""
        return self._machine.state

    def encode(self, command: Command) -> bytes:
        """As the machine below."""
        return self._machine.encode(command)

    def apply(self, command: bytes) -> Result:
        """As the machine below, measured."""
        started = self._clock.monotonic()
        result = self._machine.apply(command)
        self._applied.add((self._clock.monotonic() - started) * _MILLISECONDS)
        return result

    def dump(self) -> Iterator[bytes]:
        """As the machine below."""
        return self._machine.dump()

    def load(self, snapshot: bytes) -> None:
        """As the machine below."""
        self._machine.load(snapshot)
