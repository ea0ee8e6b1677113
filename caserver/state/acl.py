"""Who may do what, as the cluster agrees on it: tokens, policies and what the policies grant. Plain immutable values.

A token is kept by a keyed hash of its secret: whoever reads a snapshot learns none, and no secret can be shown twice. A
policy is kept with the grants that its rules were understood to mean, so that every node decides alike, whatever reads
the rules by then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from immutables import Map

ANONYMOUS_ID = "00000000-0000-0000-0000-000000000002"
ANONYMOUS_DESCRIPTION = "Anonymous Token"
MANAGEMENT_ID = "00000000-0000-0000-0000-000000000001"
MANAGEMENT_NAME = "global-management"
MANAGEMENT_DESCRIPTION = "Builtin Policy that grants unlimited access"
RESERVED_PREFIX = "00000000-0000-0000-0000-0000000000"  # of ids that only the cluster itself gives
HASH_BYTES = 32

DENY, READ, LIST, WRITE = "deny", "read", "list", "write"


@dataclass(frozen=True, slots=True, order=True)
class Grant:
    """One rule: ``access`` (deny, read, list, write) to the resource of this name, of any name with this prefix, or at all."""

    resource: str  # "acl" | "operator" | "agent" | "node" | "service"
    access: str
    name: str = ""  # empty with ``prefix``: every name; without: a resource that has no names
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """A named set of rules."""

    id: str  # UUID
    name: str
    description: str
    rules: str  # as they were written
    grants: tuple[Grant, ...]  # what they mean here
    datacenters: tuple[str, ...]  # where they count; empty: everywhere
    create_index: int = 0
    modify_index: int = 0

    @property
    def hash(self) -> bytes:
        """What Consul compares policies by."""
        return _digest(self.name, self.description, self.rules, *self.datacenters)


@dataclass(frozen=True, slots=True)
class ServiceIdentity:
    """What a token for one service and its proxy stands for, without a policy of its own."""

    service: str
    datacenters: tuple[str, ...] = ()  # empty: everywhere


@dataclass(frozen=True, slots=True)
class Token:
    """What a caller shows, known here by its accessor id."""

    accessor_id: str  # UUID; no secret
    secret_hash: bytes = field(
        repr=False
    )  # HMAC-SHA-256 of the secret; empty: no secret opens it (the anonymous token)
    description: str
    policies: tuple[str, ...]  # ids
    service_identities: tuple[ServiceIdentity, ...]
    local: bool
    created_at: int
    expires_at: int | None
    create_index: int = 0
    modify_index: int = 0

    @property
    def hash(self) -> bytes:
        """What Consul compares tokens by."""
        reach = "local" if self.local else "global"
        identities = [part for each in self.service_identities for part in (each.service, *each.datacenters)]
        return _digest(self.description, reach, *self.policies, *identities)

    def is_expired(self, now: float) -> bool:
        """Whether it counts no more."""
        return self.expires_at is not None and self.expires_at <= now


@dataclass(frozen=True, slots=True)
class ACLState:
    """All tokens and policies."""

    tokens: Map[str, Token] = field(default_factory=Map)  # by accessor id
    policies: Map[str, Policy] = field(default_factory=Map)  # by id
    by_hash: Map[bytes, str] = field(default_factory=Map)  # secret hash -> accessor id; made anew from a snapshot
    next_expiry: int | None = None  # of any token; no later than the truth, made anew from a snapshot
    index: int = 0  # of the last change
    bootstrap_index: int = 0  # of the first management token; 0 = none was made

    def token_of(self, secret_hash: bytes) -> Token | None:
        """The token with this secret."""
        accessor_id = self.by_hash.get(secret_hash)
        return None if accessor_id is None else self.tokens.get(accessor_id)

    def policy_named(self, name: str) -> Policy | None:
        """The policy with this name."""
        return next((each for each in self.policies.values() if each.name == name), None)


def tokens_by_hash(tokens: Iterable[Token]) -> Map[bytes, str]:
    """The accessor ids of ``tokens`` by the hash of the secret."""
    return Map({token.secret_hash: token.accessor_id for token in tokens if token.secret_hash})


def earliest_expiry(tokens: Iterable[Token]) -> int | None:
    """The instant at which the first of ``tokens`` expires."""
    return min((token.expires_at for token in tokens if token.expires_at is not None), default=None)


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b("".join(parts).encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest()
