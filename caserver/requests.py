"""The operations that only the leader performs, as values, and how they cross the internal hop.

A follower sends a ``Request`` with its caller's token and gets an ``Answer`` or an error of the tree; ids and claims of the
follower count for nothing. The codec is JSON with a version; unknown operations and versions are refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any, assert_never

from caserver.acl_requests import (
    REQUESTS as ACL_REQUESTS,
)
from caserver.acl_requests import (
    ACLAnswer,
    ACLRequest,
    PolicyWritten,
    Removed,
    TokenWritten,
    decode_acl_answer,
    decode_arguments,
    encode_acl_answer,
)
from caserver.cleanup_requests import (
    REQUESTS as CLEANUP_REQUESTS,
)
from caserver.cleanup_requests import (
    CleanupAnswer,
    CleanupForgotten,
    CleanupRequest,
    CleanupsRead,
    decode_cleanup,
    decode_cleanup_answer,
    encode_cleanup_answer,
)
from caserver.errors import CaserverError, InvalidRequest, RateLimited, from_kind
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

    body: str = field(repr=False)  # may hold a private key
    cas: int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class ReadIndex:
    """Ask how far a local read must have applied; ``consistent`` proves leadership with a quorum first."""

    consistent: bool = False


@dataclass(frozen=True, slots=True)
class ReadServers:
    """Ask how the servers of the cluster are; ``consistent`` proves leadership with a quorum first."""

    consistent: bool = False


@dataclass(frozen=True, slots=True)
class TransferLeadership:
    """Let another server lead: ``to``, or any but ``away_from``, who led when this was asked (a retry finds it done)."""

    to: str | None
    away_from: str


@dataclass(frozen=True, slots=True)
class AdmitRestore:
    """Ask whether a restore may begin: before anything of the snapshot is read."""


@dataclass(frozen=True, slots=True)
class StageRestore:
    """Bring in one piece of a verified snapshot's state; the caller's request id names the restore."""

    number: int  # from 0
    piece: str = field(repr=False)  # ASCII
    key_ids: tuple[str, ...]  # keys that sealed what is in the state, hex


@dataclass(frozen=True, slots=True)
class CommitRestore:
    """Let what was brought in take the place of the present state."""

    pieces: int
    digest: str  # of the pieces, as ``state.restore_apply.next_digest`` chains it


@dataclass(frozen=True, slots=True)
class AbortRestore:
    """Forget what was brought in; answers ``done`` if it took its place already."""


RestoreRequest = AdmitRestore | StageRestore | CommitRestore | AbortRestore
CARequest = SignLeaves | ChangeConfiguration | ReadIndex | CleanupRequest | RestoreRequest
ClusterRequest = ReadServers | TransferLeadership
Request = CARequest | ClusterRequest | ACLRequest


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


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """One server as the leader sees it."""

    name: str
    leader: bool
    voter: bool
    healthy: bool
    connected: bool
    last_contact: float  # seconds since the leader heard it; -1.0: not since the leader started
    last_index: int  # highest entry known durable there
    last_term: int
    stable_since: int  # instant at which it became what it is
    release: str = ""  # of caserver; empty while it is not linked


@dataclass(frozen=True, slots=True)
class ServersRead:
    """All servers, by name."""

    servers: tuple[ServerStatus, ...]

    @property
    def healthy(self) -> bool:
        """Whether every server is well and has a vote."""
        return all(each.healthy and each.voter for each in self.servers)

    @property
    def failure_tolerance(self) -> int:
        """How many more of the healthy voters the cluster can lose and still have a majority."""
        voters = sum(each.healthy and each.voter for each in self.servers)
        return max(0, voters - (len(self.servers) // 2 + 1))


@dataclass(frozen=True, slots=True)
class LeadershipMoved:
    """``leader`` leads now."""

    leader: str


@dataclass(frozen=True, slots=True)
class RestoreProgress:
    """How far a restore is: the state's index, and whether the restored state is in place."""

    index: int
    done: bool = False


CAAnswer = LeavesSigned | ConfigurationChanged | ReadAt | CleanupAnswer | RestoreProgress
Answer = CAAnswer | ServersRead | LeadershipMoved | ACLAnswer


# The codec of the internal hop. JSON by an allow-list per operation; a frame holds a caller's token in clear, so it is
# never logged and travels only inside mutual TLS.

CODEC_VERSION = 1

_REQUESTS: dict[str, type[Request]] = {
    "sign_leaves": SignLeaves,
    "change_configuration": ChangeConfiguration,
    "read_index": ReadIndex,
    "read_servers": ReadServers,
    "admit_restore": AdmitRestore,
    "stage_restore": StageRestore,
    "commit_restore": CommitRestore,
    "abort_restore": AbortRestore,
    "transfer_leadership": TransferLeadership,
    **CLEANUP_REQUESTS,
    **ACL_REQUESTS,
}
_REQUEST_NAMES = {kind: name for name, kind in _REQUESTS.items()}


def encode_request(caller: Caller, request: Request) -> bytes:
    """One frame of the internal hop; it contains the caller's token in clear."""
    document = {
        "version": CODEC_VERSION,
        "token": None if caller.token is None else caller.token.reveal(),
        "source": caller.source,
        "request_id": caller.request_id,
        "operation": _REQUEST_NAMES[type(request)],
        "arguments": {each.name: getattr(request, each.name) for each in fields(request)},
    }
    return json.dumps(document, separators=(",", ":")).encode()


def decode_request(frame: bytes) -> tuple[Caller, Request]:
    """Inverse of ``encode_request``; InvalidRequest for anything that this version does not know exactly."""
    document = _document(frame)
    operation = document.get("operation")
    kind = _REQUESTS.get(operation) if isinstance(operation, str) else None
    if kind is None:
        raise InvalidRequest(f"the internal operation {operation!r} is not known to this version; upgrade this node")
    token = _one(document, "token", str | None)
    caller = Caller(
        token=None if token is None else Secret(token),
        source=_one(document, "source", str),
        request_id=_one(document, "request_id", str),
    )
    arguments = _one(document, "arguments", dict)
    return caller, _decoded(str(operation), kind, arguments)


def _decoded(operation: str, kind: type[Request], arguments: dict[str, Any]) -> Request:
    if operation in ACL_REQUESTS:
        return decode_arguments(ACL_REQUESTS[operation], arguments)
    if operation in CLEANUP_REQUESTS:
        return decode_cleanup(CLEANUP_REQUESTS[operation], arguments)
    return _request(kind, arguments)


def _request(kind: type[Request], arguments: dict[str, Any]) -> Request:
    if set(arguments) != {each.name for each in fields(kind)}:
        raise InvalidRequest("an internal request has other arguments than this version knows")
    if kind is SignLeaves:
        return SignLeaves(csrs=_texts(arguments, "csrs"))
    if kind is ReadIndex:
        return ReadIndex(consistent=_one(arguments, "consistent", bool))
    if kind is ReadServers:
        return ReadServers(consistent=_one(arguments, "consistent", bool))
    if kind is TransferLeadership:
        return TransferLeadership(to=_one(arguments, "to", str | None), away_from=_one(arguments, "away_from", str))
    if kind is AdmitRestore or kind is AbortRestore:
        return kind()
    if kind is StageRestore:
        piece, key_ids = _one(arguments, "piece", str), _texts(arguments, "key_ids")
        return StageRestore(number=_one(arguments, "number", int), piece=piece, key_ids=key_ids)
    if kind is CommitRestore:
        return CommitRestore(pieces=_one(arguments, "pieces", int), digest=_one(arguments, "digest", str))
    return ChangeConfiguration(
        body=_one(arguments, "body", str),
        cas=_one(arguments, "cas", int | None),
        force=_one(arguments, "force", bool),
    )


def encode_answer(answer: Answer | CaserverError) -> bytes:
    """One frame back: the answer, or an error as kind and detail."""
    document: dict[str, Any] = {"version": CODEC_VERSION}
    match answer:
        case CaserverError():
            document["error"] = _encode_error(answer)
        case LeavesSigned():
            document["leaves"] = [_encode_result(each) for each in answer.results]
        case ConfigurationChanged():
            document["changed"] = _plain(answer)
        case ReadAt():
            document["read_at"] = answer.index
        case RestoreProgress():
            document["restore"] = _plain(answer)
        case ServersRead():
            document["servers"] = [_plain(each) for each in answer.servers]
        case LeadershipMoved():
            document["leader"] = answer.leader
        case CleanupsRead() | CleanupForgotten():
            document |= encode_cleanup_answer(answer)
        case TokenWritten() | PolicyWritten() | Removed():
            document |= encode_acl_answer(answer)
        case _:
            assert_never(answer)
    return json.dumps(document, separators=(",", ":")).encode()


def decode_answer(frame: bytes) -> Answer:
    """Inverse of ``encode_answer``: returns the answer or raises the error that it carries; InvalidRequest if unreadable."""
    document = _document(frame)
    if "error" in document:
        raise _decode_error(_one(document, "error", dict))
    if "leaves" in document:
        return LeavesSigned(tuple(_decode_result(each) for each in _one(document, "leaves", list)))
    if "changed" in document:
        changed = _one(document, "changed", dict)
        return ConfigurationChanged(
            index=_one(changed, "index", int),
            rotated=_one(changed, "rotated", bool),
            warnings=_texts(changed, "warnings"),
        )
    if "restore" in document:
        progress = _one(document, "restore", dict)
        return RestoreProgress(index=_one(progress, "index", int), done=_one(progress, "done", bool))
    if "servers" in document:
        return ServersRead(tuple(_decode_server(each) for each in _one(document, "servers", list)))
    if "leader" in document:
        return LeadershipMoved(_one(document, "leader", str))
    return decode_cleanup_answer(document) or decode_acl_answer(document) or ReadAt(_one(document, "read_at", int))


def _encode_error(error: CaserverError) -> dict[str, Any]:
    told: dict[str, Any] = {"kind": error.kind, "detail": error.detail}
    if isinstance(error, RateLimited):
        told["retry_after"] = error.retry_after
    return told


def _encode_result(result: IssuedLeaf | Failure) -> dict[str, Any]:
    return {"failure" if isinstance(result, Failure) else "leaf": _plain(result)}


def _plain(value: Failure | IssuedLeaf | ConfigurationChanged | RestoreProgress | ServerStatus) -> dict[str, Any]:
    return {each.name: getattr(value, each.name) for each in fields(value)}


def _decode_result(document: object) -> IssuedLeaf | Failure:
    if not isinstance(document, dict):
        raise InvalidRequest("an internal answer holds a result that is not an object")
    if "failure" in document:
        failure = _one(document, "failure", dict)
        return Failure(kind=_one(failure, "kind", str), detail=_one(failure, "detail", str))
    leaf = _one(document, "leaf", dict)
    texts = {name: _one(leaf, name, str) for name in _LEAF_TEXTS}
    numbers = {name: _one(leaf, name, int) for name in _LEAF_NUMBERS}
    return IssuedLeaf(**texts, **numbers)


def _decode_server(document: object) -> ServerStatus:
    if not isinstance(document, dict):
        raise InvalidRequest("an internal answer holds a server that is not an object")
    flags = {name: _one(document, name, bool) for name in ("leader", "voter", "healthy", "connected")}
    numbers = {name: _one(document, name, int) for name in ("last_index", "last_term", "stable_since")}
    contact = float(_one(document, "last_contact", float | int))
    texts = {name: _one(document, name, str) for name in ("name", "release")}
    return ServerStatus(last_contact=contact, **texts, **flags, **numbers)


_LEAF_TEXTS = ("chain_pem", "service", "service_uri", "root_id", "signing_key_id")
_LEAF_NUMBERS = ("serial", "not_before", "not_after", "index")


def _decode_error(document: dict[str, Any]) -> CaserverError:
    kind, detail = _one(document, "kind", str), _one(document, "detail", str)
    if kind == RateLimited.__name__:
        return RateLimited(detail, float(_one(document, "retry_after", float | int)))
    return from_kind(kind, detail)


def _document(frame: bytes) -> dict[str, Any]:
    try:
        document = json.loads(frame)
    except (ValueError, RecursionError) as exc:
        # The frame itself stays out of the message: it may hold a token.
        raise InvalidRequest("an internal frame is not JSON") from exc
    if not isinstance(document, dict):
        raise InvalidRequest("an internal frame is not a JSON object")
    if document.get("version") != CODEC_VERSION:
        raise InvalidRequest(
            f"an internal frame has version {document.get('version')!r}, this node speaks {CODEC_VERSION}; "
            "run the same version on every node"
        )
    return document


def _one(document: dict[str, Any], name: str, kind: Any) -> Any:
    value = document.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InvalidRequest(f"an internal frame has no valid {name}")
    return value


def _texts(document: dict[str, Any], name: str) -> tuple[str, ...]:
    values = _one(document, name, list)
    if not all(isinstance(each, str) for each in values):
        raise InvalidRequest(f"an internal frame has no valid {name}")
    return tuple(values)
