"""What the replicated log needs from below and offers above, free of asyncio, sockets and files.

``StateMachine`` is what the log replicates; ``Disk`` and ``Network`` are what the engine stands on. Real ones are
``PosixDisk`` and ``Streams``; the simulator has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

State = TypeVar("State")
Command_contra = TypeVar("Command_contra", contravariant=True)
State_co = TypeVar("State_co", covariant=True)
Result_co = TypeVar("Result_co", covariant=True)

Message = dict[str, Any]


class StateMachine(Protocol[Command_contra, State_co, Result_co]):
    """Deterministic, total and pure but for the state that it holds; called on the Raft thread only (``state`` anywhere)."""

    @property
    def state(self) -> State_co:
        """The state after the last applied command: an immutable value, safe to read from any thread."""
        ...

    def encode(self, command: Command_contra) -> bytes:
        """Versioned bytes of a command."""
        ...

    def apply(self, command: bytes) -> Result_co:
        """Apply one committed command and return its result; never raises, but Corrupt for bytes it cannot read."""
        ...

    def dump(self) -> Iterator[bytes]:
        """Versioned bytes of the state as it is now, in slices made lazily, so that the log can pause between them."""
        ...

    def load(self, snapshot: bytes) -> None:
        """Replace the state; Corrupt if the bytes cannot be read."""
        ...


@dataclass(frozen=True, slots=True)
class Committed(Generic[Result_co]):
    """The command is committed and applied here; ``result`` is what apply returned (which may be a refusal)."""

    result: Result_co


@dataclass(frozen=True, slots=True)
class NotCommitted:
    """The command certainly never commits; trying again is safe."""

    reason: str


@dataclass(frozen=True, slots=True)
class OutcomeUnknown:
    """The command may commit later or may have committed; only reading the state tells."""

    reason: str


Outcome = Committed[Result_co] | NotCommitted | OutcomeUnknown


@dataclass(frozen=True, slots=True)
class Seals(Generic[State]):
    """How the log learns which keys sealed what it stores: ids of keys, as hex, of the secrets inside."""

    of_command: Callable[[bytes], frozenset[str]]
    of_state: Callable[[State], frozenset[str]]
    erased: Callable[[State, State], bool] = lambda _before, _after: False  # whether a step took a sealed value away


@dataclass(frozen=True, slots=True)
class KeyReport:
    """What a node tells the others of its cluster secrets, by key id."""

    held: tuple[str, ...]  # current first
    stored: tuple[str, ...]  # those that sealed something in its journal, its snapshot or its state; sorted


@dataclass(frozen=True, slots=True)
class Leadership:
    """What this node believes about who leads; a hint for routing, never a licence to sign."""

    node: str  # this node's name
    leader: str | None
    term: int
    is_leader: bool  # leads, and has applied the no-op of its term
    is_voter: bool = True  # False: new, or wiped and not promoted yet
    # Monotonic instant until which no other node can have been elected, as far as clocks run at one speed: until then a
    # leader's state is all that there is. A node that was stopped in between finds it over before anything else.
    fresh_until: float = field(default=float("inf"), compare=False)
    last_contact: float = field(default=0.0, compare=False)  # seconds since the leader was heard; 0 on the leader
    # Seconds that this node's wall clock is ahead of the middle one of all that are linked and were heard. Of two in the
    # middle the first takes the one that is further off, the second the nearer one.
    clock_offset: float = field(default=0.0, compare=False)
    clock_outvoted: float = field(default=0.0, compare=False)
    peers: Mapping[str, bool] = field(default_factory=dict, compare=False)  # name -> connected, without this node
    # Why there will be no leader, and what to do: of a cluster that was never founded, as it looks from this node.
    obstacle: str | None = field(default=None, compare=False)
    # This node's report and those of the peers that said so since they are linked.
    keys: Mapping[str, KeyReport] = field(default_factory=dict, compare=False)


class Disk(Protocol):
    """The files of one data directory, by plain name; every error is OSError."""

    def read(self, name: str) -> bytes | None:
        """The whole file, or None if there is none."""
        ...

    def append(self, name: str, data: bytes) -> None:
        """Append all of ``data``, creating the file (0600) if needed; not durable before ``datasync``."""
        ...

    def datasync(self, name: str) -> None:
        """Return when everything appended to the file so far is durable."""
        ...

    def replace(self, name: str, data: bytes | None) -> None:
        """Atomically and durably make ``data`` the file's whole content (temporary file, fsync, rename, directory fsync); None removes it."""
        ...

    def lock(self) -> None:
        """Take the directory for this process; OSError if another process holds it."""
        ...


class Marker(Protocol):
    """The durable word that this node once was a voter."""

    @property
    def initialised(self) -> bool:
        """Whether it is set."""
        ...

    def mark_initialised(self) -> None:
        """Set it, durable on return."""
        ...


class Network(Protocol):
    """Sends messages to peers; what arrives is handed to ``Engine.receive(peer, message)``."""

    def send(self, peer: str, message: Message) -> bool:
        """Queue one message, in order, at most once; False if it was certainly not sent."""
        ...

    def connected(self, peer: str) -> bool:
        """Whether a link to ``peer`` is up right now."""
        ...

    def close(self) -> None:
        """Drop all links and stop listening."""
        ...
