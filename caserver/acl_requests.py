"""What is asked of the leader about tokens and policies, and how it crosses the internal hop.

Ids and secrets are drawn where the request enters the cluster, so that a retry asks for the same thing again; the leader
checks them as if a stranger had chosen them. Answers carry no secret: who drew it knows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, assert_never
from uuid import UUID

from caserver.errors import InvalidRequest
from caserver.state.acl import Policy, Token
from caserver.state.acl_codec import POLICY, TOKEN
from caserver.state.shapes import Shape

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BootstrapACL:
    """Make the first management token, or the next one after it was lost and the reset file says so."""

    accessor_id: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class PutToken:
    """Make a token (``create``), or change what one stands for; ``body`` is the JSON object as the caller sent it."""

    accessor_id: str
    secret: str = field(repr=False)  # of a new token
    create: bool
    body: str = field(repr=False)  # may hold the secret, too


@dataclass(frozen=True, slots=True)
class CloneToken:
    """Make a token that stands for what another one does."""

    source_id: str
    accessor_id: str
    secret: str = field(repr=False)
    description: str  # empty: that of the other one


@dataclass(frozen=True, slots=True)
class RemoveToken:
    """Forget a token; nothing to do if there is none."""

    accessor_id: str


@dataclass(frozen=True, slots=True)
class PutPolicy:
    """Make a policy (``create``) or change one; ``body`` is the JSON object as the caller sent it."""

    policy_id: str
    create: bool
    body: str


@dataclass(frozen=True, slots=True)
class RemovePolicy:
    """Forget a policy; nothing to do if there is none."""

    policy_id: str


def new_id(random: bytes) -> str:
    """A UUID made of 16 random bytes: an id, or a secret."""
    return str(UUID(bytes=random, version=4))


ACLRequest = BootstrapACL | PutToken | CloneToken | RemoveToken | PutPolicy | RemovePolicy


@dataclass(frozen=True, slots=True)
class TokenWritten:
    """The token as it is kept now."""

    token: Token


@dataclass(frozen=True, slots=True)
class PolicyWritten:
    """The policy as it is kept now."""

    policy: Policy


@dataclass(frozen=True, slots=True)
class Removed:
    """It is not there, as of ``index``."""

    index: int


ACLAnswer = TokenWritten | PolicyWritten | Removed

REQUESTS: dict[str, type[ACLRequest]] = {
    "bootstrap_acl": BootstrapACL,
    "put_token": PutToken,
    "clone_token": CloneToken,
    "remove_token": RemoveToken,
    "put_policy": PutPolicy,
    "remove_policy": RemovePolicy,
}
_TYPES: dict[str, type] = {"str": str, "bool": bool}


def decode_arguments(kind: type[ACLRequest], arguments: dict[str, Any]) -> ACLRequest:
    """The request with these arguments; InvalidRequest if one is missing, foreign or of another type."""
    expected = {each.name: _TYPES[str(each.type)] for each in fields(kind)}
    if arguments.keys() != expected.keys() or any(type(arguments[name]) is not each for name, each in expected.items()):
        raise InvalidRequest("an internal request has other arguments than this version knows")
    return kind(**arguments)


def encode_acl_answer(answer: ACLAnswer) -> dict[str, Any]:
    """The member of an answer frame."""
    match answer:
        case TokenWritten(token=token):
            return {"token": TOKEN.pack(token)}
        case PolicyWritten(policy=policy):
            return {"policy": POLICY.pack(policy)}
        case Removed(index=index):
            return {"removed_at": index}
        case _:
            assert_never(answer)


def decode_acl_answer(document: dict[str, Any]) -> ACLAnswer | None:
    """Inverse of ``encode_acl_answer``; None if the frame holds something else, InvalidRequest if it is damaged."""
    if "token" in document:
        return TokenWritten(_unpacked(TOKEN, document["token"]))
    if "policy" in document:
        return PolicyWritten(_unpacked(POLICY, document["policy"]))
    if "removed_at" in document:
        index = document["removed_at"]
        if type(index) is not int:
            raise InvalidRequest("an internal frame has no valid removed_at")
        return Removed(index)
    return None


def _unpacked(shape: Shape[T], value: object) -> T:
    try:
        return shape.unpack(value)
    except (ValueError, TypeError) as exc:
        raise InvalidRequest("an internal answer holds a token or policy that cannot be read") from exc
