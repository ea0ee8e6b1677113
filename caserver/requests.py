"""The operations that only the leader performs, as values, and how they cross the internal hop.

A follower sends a ``Request`` with its caller's token and gets an ``Answer`` or an error of the tree; ids and claims of the
follower count for nothing. The codec is JSON with a version; unknown operations and versions are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from caserver.fields import Secret


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf a request is made: the presented token, and where from (for the audit trail only)."""

    token: Secret | None = None
    source: str = ""  # "node remote-address"
    request_id: str = ""  # hex, chosen where the request entered the cluster; a retry carries the same one


@dataclass(frozen=True, slots=True)
class SignLeaves:
    """Sign CSRs (PEM), each on its own merits."""

    csrs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChangeConfiguration:
    """Replace the CA configuration; ``body`` is the JSON object as the caller sent it."""

    body: str
    cas: int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class ReadIndex:
    """Ask how far a local read must have applied; ``consistent`` proves leadership with a quorum first."""

    consistent: bool = False


Request = SignLeaves | ChangeConfiguration | ReadIndex


@dataclass(frozen=True, slots=True)
class IssuedLeaf:
    """A signed leaf with its chain; instants are epoch seconds."""

    serial: int
    chain_pem: str  # leaf, then every certificate that a live bundle may need
    service: str
    service_uri: str
    not_before: int
    not_after: int
    root_id: str
    signing_key_id: str
    index: int  # Create- and ModifyIndex: the index of the booking


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one CSR of several was not signed."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class LeavesSigned:
    """One result per CSR, in order."""

    results: tuple[IssuedLeaf | Failure, ...]


@dataclass(frozen=True, slots=True)
class ConfigurationChanged:
    """The change is in force at ``index``; ``rotated`` says whether the active root changed."""

    index: int
    rotated: bool
    warnings: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class ReadAt:
    """A read of local state is as fresh as was asked for once it has applied ``index``."""

    index: int


Answer = LeavesSigned | ConfigurationChanged | ReadAt
