"""The two ports of the authority: the replicated log it decides on, and the provider that holds or reaches CA keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol, TypeVar, assert_never

from caserver.errors import CaserverError, CommitFailed, CommitUnknown, Conflict
from caserver.fields import Secret
from caserver.raft.ports import Committed, Leadership, NotCommitted, Outcome, OutcomeUnknown
from caserver.raft.status import RaftStatus
from caserver.state.commands import Applied, Command, Refused, Result
from caserver.state.configuration import CAConfiguration
from caserver.state.model import CARoot, CAState, RootID
from caserver.state.vault_configuration import VaultLocal

Selected = TypeVar("Selected")
Backend = Mapping[str, str]  # facts that a provider finds its things by again (paths, ids); replicated, never a secret


class Log(Protocol):
    """The replicated log as the main loop sees it."""

    @property
    def state(self) -> CAState:
        """The latest applied state; an immutable value. Read it once per decision."""
        ...

    @property
    def leadership(self) -> Leadership:
        """Who leads, as far as this node knows."""
        ...

    async def propose(self, command: Command, *, deadline: float = 5.0) -> Outcome[Result]:
        """Replicate one command; ``deadline`` in seconds. Never raises for a Raft reason: the outcome says it."""
        ...

    async def barrier(self, *, deadline: float = 5.0) -> None:
        """Return once ``state`` holds everything committed before the call; NotLeader if leadership cannot be proven."""
        ...

    async def changed(self, select: Callable[[CAState, Leadership], Selected], seen: Selected) -> Selected:
        """Wait until ``select(state, leadership) != seen``, return the new value; ``select`` is a module-level pure function."""
        ...


class Raft(Protocol):
    """The Raft node below the log, as its operators see it."""

    async def status(self, *, restart: bool = False) -> RaftStatus:
        """Its standing and what it measured; ``restart`` begins a new interval of extremes. Unavailable if it is gone."""
        ...

    async def transfer_leadership(self, to: str | None = None, *, deadline: float = 5.0) -> bool:
        """Hand leadership over to ``to`` or to whoever is furthest; whether somebody else leads now."""
        ...


Verdict = Applied | Refused | NotCommitted | OutcomeUnknown


def verdict(outcome: Outcome[Result]) -> Verdict:
    """The four ways a proposal can end, as one flat union to match on."""
    return outcome.result if isinstance(outcome, Committed) else outcome


async def commit(log: Log, command: Command) -> None:
    """Commit a step that its caller decides anew if it fails: Conflict = refused, CommitFailed = certainly not committed."""
    outcome = verdict(await log.propose(command))
    match outcome:
        case Applied():
            return
        case Refused() as refused:
            raise Conflict(f"{type(command).__name__}: {refused.reason} {refused.detail}".rstrip())
        case NotCommitted(reason=why):
            raise CommitFailed(why)
        case OutcomeUnknown(reason=why):
            raise CommitUnknown(why)
        case _:
            assert_never(outcome)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a configuration would lead to, found without changing anything."""

    root_id: RootID | None  # the root it stands for if that exists already; None = a new one would be generated
    root_pem: str | None
    warnings: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # backend permissions that the change will use, for the plan


@dataclass(frozen=True, slots=True)
class Prepared:
    """A provider made ready: its root and, if leaves are signed by an intermediate, that one."""

    root_pem: str
    root_key: Secret | None  # PKCS#8 PEM (built-in), to be sealed by the authority; None if the key lives elsewhere
    intermediates: tuple[str, ...] = ()  # PEM, signing certificate first; empty if the root signs leaves itself
    warnings: tuple[str, ...] = ()
    backend: Backend = field(default_factory=dict)
    root_csr: str | None = (
        None  # PEM, a request made with the root's key, for a predecessor that cross-signs only those
    )


@dataclass(frozen=True, slots=True)
class Tended:
    """How a provider is, and when it wants to be looked after again."""

    next_in: float  # seconds
    troubles: tuple[tuple[str, str], ...] = ()  # (code, reason) for operators
    token_expires_at: float | None = None  # epoch seconds; None: there is no token, or it never expires
    signer_lost: bool = False  # what signs leaves is gone from the backend: another one is to be made


@dataclass(frozen=True, slots=True)
class SigningOrder:
    """One leaf to sign: built only from what apply booked and from the checked CSR's public key."""

    issue_id: str
    serial: int | None  # None where the provider chooses
    spiffe_uri: str
    common_name: str
    public_key: bytes  # SubjectPublicKeyInfo, DER
    csr_pem: str  # for providers that sign CSRs elsewhere
    not_before: int
    not_after: int  # where the provider chooses the validity: the latest that it may


@dataclass(frozen=True, slots=True)
class SignedLeaf:
    """A finished leaf certificate (PEM, one block, final newline)."""

    issue_id: str
    pem: str
    serial: int


class Provider(Protocol):
    """Holds or reaches the CA key of one configuration. Never writes replicated state; every member is idempotent.

    An instance belongs to one (configuration, root): ``prepare`` binds it to the root it makes or finds, a later leader
    binds a new instance from the replicated root instead.
    """

    async def inspect(self) -> Inspection:
        """Read only: which root the configuration stands for. InvalidConfig names every fault of an operator's root."""
        ...

    async def prepare(self, *, now: datetime, epoch: int) -> Prepared:
        """Make the configuration's root (and intermediate) exist and bind to it; renewing an intermediate is this too.

        What it makes at a backend is named after cluster and ``epoch``, so that whoever repeats the call finds it.
        """
        ...

    async def sign_leaves(self, orders: Sequence[SigningOrder]) -> Sequence[SignedLeaf | CaserverError]:
        """Sign each order, in order; a failure of one is its own value."""
        ...

    async def cross_sign(
        self, certificate_pem: str, *, csr_pem: str | None, serial: int, not_before: datetime, not_after: datetime
    ) -> str:
        """Issue a certificate with the subject, key, SKI and SAN of ``certificate_pem`` signed by this provider's root.

        ``csr_pem`` asks for the same with that root's key. A backend that draws serials and instants itself keeps to
        ``not_after``.
        """
        ...

    async def retire(self, *, epochs: tuple[int, ...], keep: Backend | None) -> None:
        """Remove what ``prepare`` made at the backend for ``epochs`` under this configuration.

        ``keep`` is the active root's backend: what that names stays. Nothing that others made is touched.
        """
        ...

    async def tend(self, now: datetime) -> Tended:
        """Look after what keeps the provider able to sign: tokens, the health of its backend. Asked while it is in force."""
        ...

    def close(self) -> None:
        """Release pools and sessions; calls under way end as they would, none follows."""
        ...


class ProviderFactory(Protocol):
    """Builds a provider for a configuration; bound to ``root`` (and its opened key) if that is given."""

    def __call__(
        self, configuration: CAConfiguration, *, trust_domain: str, root: CARoot | None, root_key: Secret | None
    ) -> Provider:
        """No I/O happens here."""
        ...


@dataclass(frozen=True, slots=True)
class Leavings:
    """What ``retire`` would remove, and where; nobody looked whether it is there."""

    address: str
    namespace: str
    path: str
    things: tuple[str, ...]  # in words


class LeavingsOf(Protocol):
    """Tells what ``prepare`` may have left behind for an epoch under a configuration."""

    def __call__(self, configuration: CAConfiguration, *, trust_domain: str, epoch: int) -> Leavings | None:
        """None: nothing that a backend would hold. No I/O happens here."""
        ...


@dataclass(frozen=True, slots=True)
class ProviderKind:
    """How to build the providers of one name, and what the authority must know of all of them."""

    build: ProviderFactory
    chooses_serials: bool = False  # and instants: an external backend signs, one request a leaf
    leavings: LeavingsOf | None = None  # None: it has no backend


@dataclass(frozen=True, slots=True)
class Providers:
    """The providers this build knows, by the name that ``Provider`` takes in a configuration."""

    kinds: Mapping[str, ProviderKind] = field(default_factory=dict)
    vault_local: VaultLocal = field(default_factory=VaultLocal)  # what this server knows of Vault by itself
