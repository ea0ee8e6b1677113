"""The replicated state of one certificate authority: plain immutable values.

Instants are whole seconds since the epoch (UTC), certificates are PEM, ids of roots are Consul's (SHA-1 of the DER as
lower-case hex with colons). Private keys and tokens appear only as ``Sealed``. ``CAState`` is swapped as a whole; nothing
in it is ever changed in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NewType

from immutables import Map

from caserver.internode.keyring import Sealed
from caserver.state.acl import ACLState

Index = NewType("Index", int)
RootID = NewType("RootID", str)
UseKey = tuple[RootID, str]  # root, service
BackendFacts = tuple[tuple[str, str], ...]  # what a provider finds its things by at its backend, sorted; never a secret

HOUR = 3600  # seconds; expiry buckets of the ledger's leaves
HISTORY_MAX = 50  # configurations kept for undo and for "who changed what"
REQUEST_IDS_KEPT = 600  # seconds a request id is remembered at least, by the clocks of the leaders
REQUEST_IDS_MIN = 1000  # the latest of them are remembered whatever a clock says: it may have been set forward
RESTORE_IDLE = 30  # seconds without another piece after which a restore is given up: whoever brought them has died


@dataclass(frozen=True, slots=True)
class Effective:
    """The normalised configuration: what decides equality, lifetimes and pruning. Durations are seconds."""

    leaf_ttl: int = 72 * HOUR
    intermediate_ttl: int = 8760 * HOUR
    root_ttl: int = 87600 * HOUR
    rotation_period: int = 2160 * HOUR
    csr_max_per_second: float = 50.0  # 0 = no limit
    csr_max_concurrent: int = 0  # 0 = no limit
    private_key_type: str = "ec"
    private_key_bits: int = 256


@dataclass(frozen=True, slots=True)
class StoredConfiguration:
    """A CA configuration as it is replicated: the caller's words with secrets cut out, and what they mean."""

    provider: str  # "consul" | "vault"
    given: str  # JSON object text of Config as the caller wrote it, key order kept, secret values "<redacted>"
    secrets: tuple[tuple[str, Sealed], ...]  # (PascalCase key, sealed value), sorted by key
    effective: Effective
    root_cert: str | None = None  # PEM of the operator's root, byte for byte as given
    force_without_cross_signing: bool = False


@dataclass(frozen=True, slots=True)
class Configuration:
    """The configuration in force."""

    stored: StoredConfiguration
    create_index: Index
    modify_index: Index


@dataclass(frozen=True, slots=True)
class CARoot:
    """One root of the trust bundle, active or on its way out."""

    id: RootID
    name: str  # "Consul CA Root Cert" or "Vault CA Root Cert"
    pem: str  # byte for byte as generated or given
    serial: int
    not_before: int
    not_after: int
    key_type: str  # "ec" | "rsa"
    key_bits: int
    signing_key_id: str  # SKI of the certificate that signs leaves, lower hex with colons
    provider: str
    intermediates: tuple[str, ...]  # PEM; what a leaf's chain carries after the leaf, in this order
    sealed_key: Sealed | None  # the CA private key (built-in), PKCS#8 DER sealed; None with Vault and after pruning
    active: bool
    rotated_out_at: int | None
    leaf_not_after_max: int  # highest NotAfter of any leaf booked under this root; 0 = none
    leaf_ttl_max: int  # longest leaf lifetime in force while this root was active, seconds
    live_by_hour: Map[int, int]  # expiry hour (epoch // 3600) -> leaves booked and not expired
    create_index: Index
    modify_index: Index
    backend: BackendFacts = ()
    epoch: int = 0  # of the change that made what signs leaves below it; names at a backend derive from it


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One issued leaf."""

    issue_id: str  # ours, hex; known before any serial is
    root_id: RootID
    service: str  # the service name of the SPIFFE ID, decoded
    serial: int | None  # None until a provider that chooses serials has told it
    not_before: int
    not_after: int
    index: Index  # of the booking


@dataclass(frozen=True, slots=True)
class LedgerHour:
    """Leaves that expire within one hour, in order of booking: rows of numbers ``first .. next - 1`` (evicted from the front)."""

    first: int
    next: int
    rows: Map[int, LedgerRow]


@dataclass(frozen=True, slots=True)
class ServiceUse:
    """How much one service was issued under one root."""

    count: int
    latest_not_after: int
    last_serial: int | None


@dataclass(frozen=True, slots=True)
class Ledger:
    """What was issued: single leaves and totals per (root, service), each up to ``max_rows``."""

    hours: Map[int, LedgerHour] = field(default_factory=Map)
    row_count: int = 0
    uses: Map[UseKey, ServiceUse] = field(default_factory=Map)
    uses_by_expiry: Map[int, Map[UseKey, None]] = field(
        default_factory=Map
    )  # by latest_not_after; made anew from a snapshot
    max_rows: int = 100_000


@dataclass(frozen=True, slots=True)
class Change:
    """A provider change that was begun and is neither completed nor aborted: what a later leader completes or cleans up."""

    request_id: str
    begun_at: int
    configuration: StoredConfiguration
    epoch: int  # ca_epoch that it leads to, never given twice; names and paths at a provider derive from it
    begun_index: Index
    force: bool = False  # failing proofs are overridden
    renew: bool = False  # the active root stays, what signs leaves below it is made anew


@dataclass(frozen=True, slots=True)
class Retiring:
    """Clean-up still owed: to a provider or a signing certificate that was replaced, or after a change that was given up."""

    configuration: StoredConfiguration
    root_id: RootID  # whose provider it was; empty after a change that was given up
    not_before: int  # instant before which nothing is removed
    epoch: int  # under which the names were derived of what is to be removed
    backend: BackendFacts = ()

    @property
    def id(self) -> str:
        """What operators call it by: its epoch, and the beginning of the root's id if there is one."""
        return "-".join(filter(None, (str(self.epoch), self.root_id.replace(":", "")[:8])))


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One past or present configuration."""

    index: Index
    at: int
    kind: str  # "bootstrap" | "rotate" | "configure" | "restore"
    active_root_id: RootID | None
    configuration: StoredConfiguration


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A state-changing request that was applied: lets a retry find its first effect."""

    at: int
    index: Index
    result: str  # "activated" | "configured" | "renewed" | "restored" | "forgotten" | "aborted[ <kind>]: <reason>"


@dataclass(frozen=True, slots=True)
class Reading:
    """An encoded state as far as it was read, line by line."""

    lines: int = 0  # read so far
    head: str = ""  # the line with everything that is small; decoded at the end, like the next
    acl: tuple[str, ...] = ()  # lines of tokens and policies
    ledger: Ledger = field(default_factory=Ledger)
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Restoring:
    """A snapshot that is being brought in piece by piece. Nothing of it counts before it is whole and committed."""

    request_id: str
    at: int  # of the latest piece
    pieces: int
    digest: str  # hex; SHA-256 over the digest before the latest piece and that piece
    key_ids: tuple[str, ...]  # keys that sealed what is in it
    tail: str  # the line that is not complete yet
    reading: Reading = field(default_factory=Reading)


@dataclass(frozen=True, slots=True)
class CAState:
    """Everything that the cluster agrees on."""

    cluster_id: str | None = None  # lower-case UUID; the trust domain is "<cluster_id>.consul"
    founding_id: str | None = None  # the first cluster id that was applied: by it the nodes know each other for ever
    restored_index: Index = Index(0)  # of the latest restore: what was decided or signed before it is of another past
    index: Index = Index(0)
    ca_epoch: int = 0  # bumped by every change of active root or signing certificate
    sealed_hmac_key: Sealed | None = None
    configuration: Configuration | None = None
    roots: tuple[CARoot, ...] = ()  # sorted by id, as Consul lists them
    roots_index: Index = Index(0)  # last change of the roots or of the configuration (Consul: one index for both)
    change: Change | None = None
    retiring: tuple[Retiring, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)
    history: tuple[HistoryEntry, ...] = ()
    requests: Map[str, RequestRecord] = field(default_factory=Map)
    epoch_given: int = 0  # highest epoch that any change was announced with, whatever became of it
    acl: ACLState = field(default_factory=ACLState)
    restoring: Restoring | None = None

    @property
    def trust_domain(self) -> str | None:
        """``<cluster id>.consul``, or None before bootstrap."""
        return None if self.cluster_id is None else f"{self.cluster_id}.consul"

    @property
    def active_root(self) -> CARoot | None:
        """The one active root, or None before the CA is initialized."""
        return next((root for root in self.roots if root.active), None)

    def root(self, root_id: str) -> CARoot | None:
        """The root with this id."""
        return next((root for root in self.roots if root.id == root_id), None)
