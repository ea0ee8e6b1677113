"""The bytes of tokens, policies and their commands: the part of the format that ``state.codec`` takes from here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from immutables import Map

from caserver.state import acl_commands as c
from caserver.state.acl import ACLState, Grant, Policy, ServiceIdentity, Token, earliest_expiry, tokens_by_hash
from caserver.state.shapes import BYTES, FLAG, INT, TEXT, Shape, many, optional, record, row_of, tuple_of

LINE_KINDS = frozenset({"acl", "policies", "tokens"})
_PER_LINE = 200

_GRANT = row_of(Grant, resource=TEXT, access=TEXT, name=TEXT, prefix=FLAG)
POLICY = record(
    Policy,
    id=TEXT,
    name=TEXT,
    description=TEXT,
    rules=TEXT,
    grants=many(_GRANT),
    datacenters=many(TEXT),
    create_index=INT,
    modify_index=INT,
)
TOKEN = record(
    Token,
    accessor_id=TEXT,
    secret_hash=BYTES,
    description=TEXT,
    policies=many(TEXT),
    service_identities=many(row_of(ServiceIdentity, service=TEXT, datacenters=many(TEXT))),
    local=FLAG,
    created_at=INT,
    expires_at=optional(INT),
    create_index=INT,
    modify_index=INT,
)

# Operation -> shape of version 1.
OPERATIONS: dict[str, tuple[type[Any], Shape[Any]]] = {
    "acl_initialize": (
        c.ACLInitialize,
        record(c.ACLInitialize, at=INT, management=POLICY, initial=optional(TOKEN)),
    ),
    "acl_bootstrap": (
        c.ACLBootstrap,
        record(c.ACLBootstrap, request_id=TEXT, at=INT, token=TOKEN, reset_index=INT),
    ),
    "set_token": (c.SetToken, record(c.SetToken, request_id=TEXT, at=INT, token=TOKEN, expect=INT)),
    "delete_token": (c.DeleteToken, record(c.DeleteToken, request_id=TEXT, at=INT, accessor_id=TEXT)),
    "set_policy": (c.SetPolicy, record(c.SetPolicy, request_id=TEXT, at=INT, policy=POLICY, expect=INT)),
    "delete_policy": (c.DeletePolicy, record(c.DeletePolicy, request_id=TEXT, at=INT, policy_id=TEXT)),
}

_INDEXES = tuple_of(INT, INT)
_POLICIES = many(POLICY)
_TOKENS = many(TOKEN)


def lines(acl: ACLState) -> Iterator[tuple[str, Any]]:
    """Kind and body of the lines of a snapshot; none for a cluster that never had ACLs."""
    if not acl.index:
        return
    yield "acl", _INDEXES.pack((acl.index, acl.bootstrap_index))
    policies = iter(sorted(acl.policies))
    while some := list(islice(policies, _PER_LINE)):
        yield "policies", _POLICIES.pack(tuple(acl.policies[each] for each in some))
    tokens = iter(sorted(acl.tokens))
    while some := list(islice(tokens, _PER_LINE)):
        yield "tokens", _TOKENS.pack(tuple(acl.tokens[each] for each in some))


def read_lines(found: Sequence[tuple[str, Any]]) -> ACLState:
    """Inverse of ``lines``; ValueError if they do not fit."""
    index = bootstrap_index = 0
    policies: dict[str, Policy] = {}
    tokens: dict[str, Token] = {}
    for kind, body in found:
        match kind:
            case "acl":
                index, bootstrap_index = _INDEXES.unpack(body)
            case "policies":
                policies.update({each.id: each for each in _POLICIES.unpack(body)})
            case "tokens":
                tokens.update({each.accessor_id: each for each in _TOKENS.unpack(body)})
            case _:
                raise ValueError(f"a line of unknown kind {kind!r}")
    return ACLState(
        tokens=Map(tokens),
        policies=Map(policies),
        by_hash=tokens_by_hash(tokens.values()),
        next_expiry=earliest_expiry(tokens.values()),
        index=index,
        bootstrap_index=bootstrap_index,
    )
