"""The commands of the replicated log and what applying one can say.

Everything that apply needs rides in the command: times (whole epoch seconds), ids, serials, sealed keys, and what the
decision was based on (``expect_index`` or ``expect_epoch``), so that a stale decision is refused, not obeyed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from caserver.internode.keyring import Sealed
from caserver.state.acl_commands import ACLCommand
from caserver.state.model import BackendFacts, Index, LedgerRow, RequestRecord, RootID, StoredConfiguration


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Fix the cluster id and the first configuration; refused if the cluster has one."""

    at: int
    cluster_id: str
    configuration: StoredConfiguration
    sealed_hmac_key: Sealed


@dataclass(frozen=True, slots=True)
class BeginChange:
    """Announce a provider change before its first side effect. ``expect_index`` is the configuration's ModifyIndex (0 = none)."""

    request_id: str
    at: int
    expect_index: Index
    expect_epoch: int
    configuration: StoredConfiguration
    force: bool = False  # failing proofs are overridden, whoever finishes the change
    renew: bool = False  # the active root stays, what signs leaves below it is made anew


@dataclass(frozen=True, slots=True)
class NewRoot:
    """The root that a change activates (fields as in ``CARoot``)."""

    id: RootID
    name: str
    pem: str
    serial: int
    not_before: int
    not_after: int
    key_type: str
    key_bits: int
    signing_key_id: str
    provider: str
    intermediates: tuple[str, ...]
    sealed_key: Sealed | None
    backend: BackendFacts = ()


@dataclass(frozen=True, slots=True)
class ActivateRoot:
    """The one atomic step of a rotation: new root active, old one rotated out, configuration, retiring, epoch.

    Completes the ``BeginChange`` of the same request id and takes the configuration from it. A root id that is already
    listed (rotating back) becomes active again and keeps its create index.
    """

    request_id: str
    at: int
    expect_epoch: int
    root: NewRoot
    retire_not_before: int | None  # when the previous provider may be cleaned up; None = nothing is owed


@dataclass(frozen=True, slots=True)
class SetConfiguration:
    """Store a configuration that keeps the active root."""

    request_id: str
    at: int
    expect_index: Index
    expect_epoch: int
    configuration: StoredConfiguration


@dataclass(frozen=True, slots=True)
class SetIntermediate:
    """Replace the active root's chain and signing certificate (a renewed intermediate), and clean up after the former.

    Completes the ``BeginChange`` of the same request id, which was announced as a renewal, and takes the configuration
    from it.
    """

    request_id: str
    at: int
    expect_epoch: int
    root_id: RootID
    intermediates: tuple[str, ...]
    signing_key_id: str
    retire_not_before: int  # when the former signing certificate may be cleaned up
    backend: BackendFacts = ()


@dataclass(frozen=True, slots=True)
class AbortChange:
    """Give up the change in progress; ``reason`` is what the caller is told, as an error of this ``kind``."""

    request_id: str
    at: int
    reason: str
    kind: str = ""  # as in errors; empty: none of ours
    retire_not_before: int | None = None  # when what it left at a backend may be cleaned up; None = it left nothing


@dataclass(frozen=True, slots=True)
class ProviderRetired:
    """The clean-up owed for ``root_id`` and ``epoch`` is done; with a ``request_id``: an operator gave it up."""

    at: int
    root_id: RootID
    epoch: int
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class PruneRoots:
    """Drop rotated-out roots that nothing needs any more (apply checks that each may go)."""

    at: int
    expect_epoch: int
    root_ids: tuple[RootID, ...]


@dataclass(frozen=True, slots=True)
class LeafOrder:
    """One leaf to book."""

    issue_id: str
    service: str
    serial: int | None
    not_before: int
    not_after: int


@dataclass(frozen=True, slots=True)
class IssueLeaves:
    """Book a batch of leaves under the active root: the fence before every signature."""

    at: int
    root_id: RootID
    ca_epoch: int
    orders: tuple[LeafOrder, ...]


@dataclass(frozen=True, slots=True)
class RecordSerials:
    """Bind serials that a provider chose: (expiry hour, row number, serial).

    ``restored_index`` is that of the state in which the leaves were booked: after a restore the numbers are those of others.
    """

    at: int
    serials: tuple[tuple[int, int, int], ...]
    restored_index: Index


@dataclass(frozen=True, slots=True)
class ExpireLeaves:
    """Forget leaves that expired before ``at``, service totals that are older, and old request ids."""

    at: int


@dataclass(frozen=True, slots=True)
class Reseal:
    """Replace sealed values by the same secrets under the current key: (name as in ``state.sealing``, new value).

    ``expect_index`` is the state's ``roots_index``; refused if that moved or a name is no longer there.
    """

    at: int
    expect_index: Index
    values: tuple[tuple[str, Sealed], ...]


@dataclass(frozen=True, slots=True)
class RestoreChunk:
    """Bring in the next piece of an encoded state; ``number`` counts from 0, which begins a restore.

    A restore in which nothing happened for ``RESTORE_IDLE`` seconds makes way for another one.
    """

    request_id: str
    at: int
    number: int
    piece: str = field(repr=False)  # ASCII, as large as goes into a command
    key_ids: tuple[str, ...]  # keys that sealed what is in the state, hex


@dataclass(frozen=True, slots=True)
class RestoreCommit:
    """Put the state that was brought in into the place of the present one, if it is whole and the one that is meant."""

    request_id: str
    at: int
    pieces: int
    digest: str  # as in ``Restoring``


@dataclass(frozen=True, slots=True)
class RestoreAbort:
    """Forget what was brought in."""

    request_id: str
    at: int


RestoreCommand = RestoreChunk | RestoreCommit | RestoreAbort

Command = (
    Bootstrap
    | BeginChange
    | ActivateRoot
    | SetConfiguration
    | SetIntermediate
    | AbortChange
    | ProviderRetired
    | PruneRoots
    | IssueLeaves
    | RecordSerials
    | ExpireLeaves
    | Reseal
    | ACLCommand
    | RestoreCommand
)


class Reason(StrEnum):
    """Why apply refused a command."""

    ALREADY_BOOTSTRAPPED = "already bootstrapped"
    NOT_BOOTSTRAPPED = "not bootstrapped"
    STALE_INDEX = "decided on a stale index"
    STALE_EPOCH = "decided on a stale CA epoch"
    CHANGE_IN_PROGRESS = "another change is in progress"
    NO_SUCH_CHANGE = "no such change is in progress"
    NO_SUCH_ROOT = "no such root"
    ROOT_NOT_ACTIVE = "the root is not active"
    ROOT_STILL_NEEDED = "the root is still needed"
    NO_SUCH_TOKEN = "no such token"  # noqa: S105 - a sentence
    NO_SUCH_POLICY = "no such policy"
    DUPLICATE_REQUEST = "the request was already applied"
    RESTORE_IN_PROGRESS = "another restore is in progress"
    NO_SUCH_RESTORE = "no such restore is in progress"
    INVALID = "the command is not valid"


@dataclass(frozen=True, slots=True)
class Applied:
    """The command took effect at ``index``; ``rows`` are the booked leaves of IssueLeaves with (hour, number) of each."""

    index: Index
    rows: tuple[tuple[int, int, LedgerRow], ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """The command changed nothing (deterministically, on every node); ``record`` is what a DUPLICATE_REQUEST did first."""

    reason: Reason
    detail: str = ""
    record: RequestRecord | None = None


Result = Applied | Refused
