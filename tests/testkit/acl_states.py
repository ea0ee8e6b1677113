"""Tokens, policies and their commands for tests: small builders, Hypothesis strategies, and what holds of all of them."""

from __future__ import annotations

from hypothesis import strategies as st

from caserver.state.acl import (
    ANONYMOUS_ID,
    MANAGEMENT_ID,
    MANAGEMENT_NAME,
    ACLState,
    Grant,
    Policy,
    ServiceIdentity,
    Token,
    earliest_expiry,
    tokens_by_hash,
)
from caserver.state.acl_commands import (
    ACLBootstrap,
    ACLCommand,
    ACLInitialize,
    DeletePolicy,
    DeleteToken,
    SetPolicy,
    SetToken,
)

NOW = 1_800_000_000
ACCESSORS = ("a1", "a2", "a3")
POLICIES = ("p1", "p2")


def token(
    accessor_id: str = "a1",
    *,
    secret_hash: bytes | None = None,
    policies: tuple[str, ...] = (),
    expires_at: int | None = None,
    description: str = "",
) -> Token:
    return Token(
        accessor_id=accessor_id,
        secret_hash=f"hash of {accessor_id}".encode() if secret_hash is None else secret_hash,
        description=description,
        policies=policies,
        service_identities=(),
        local=False,
        created_at=NOW,
        expires_at=expires_at,
    )


def policy(
    policy_id: str = "p1", *, name: str | None = None, rules: str = "", grants: tuple[Grant, ...] = ()
) -> Policy:
    return Policy(policy_id, name or f"name of {policy_id}", "", rules, grants, ())


MANAGEMENT = policy(MANAGEMENT_ID, name=MANAGEMENT_NAME, rules="all", grants=(Grant("acl", "write"),))

_request_ids = st.sampled_from(["", "r1", "r2", "r3"])
_instants = st.sampled_from([NOW, NOW + 60, NOW + 3600, NOW + 86400])
_texts = st.sampled_from(["", "x", "é", "\ud800"])
_hashes = st.sampled_from([b"", b"h1", b"h2", b"\xff" * 32])
_grants = st.builds(
    Grant,
    st.sampled_from(["operator", "service"]),
    st.sampled_from(["deny", "read", "write"]),
    st.sampled_from(["", "web"]),
    st.booleans(),
)
_ids = st.sampled_from([*ACCESSORS, ANONYMOUS_ID, ""])
_policy_ids = st.sampled_from([*POLICIES, MANAGEMENT_ID, ""])


def _tuples(of: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(of, max_size=2).map(tuple)


tokens = st.builds(
    Token,
    _ids,
    _hashes,
    _texts,
    _tuples(_policy_ids),
    _tuples(st.builds(ServiceIdentity, st.sampled_from(["web", "db"]), _tuples(_texts))),
    st.booleans(),
    _instants,
    st.one_of(st.none(), _instants),
)
policies = st.builds(
    Policy, _policy_ids, st.sampled_from(["", "n1", "n2"]), _texts, _texts, _tuples(_grants), _tuples(_texts)
)
_expected = st.integers(0, 9)
commands: st.SearchStrategy[ACLCommand] = st.one_of(
    st.builds(ACLInitialize, _instants, policies, st.one_of(st.none(), tokens)),
    st.builds(ACLBootstrap, _request_ids, _instants, tokens, _expected),
    st.builds(SetToken, _request_ids, _instants, tokens, _expected),
    st.builds(DeleteToken, _request_ids, _instants, _ids),
    st.builds(SetPolicy, _request_ids, _instants, policies, _expected),
    st.builds(DeletePolicy, _request_ids, _instants, _policy_ids),
)


def fitting(acl: ACLState, at: int, request_id: str) -> st.SearchStrategy[ACLCommand]:
    """Commands that suit ``acl``, so that long sequences get somewhere."""
    known = st.sampled_from([*acl.tokens.values(), token("a1"), token("a2", expires_at=at + 60)])
    named = st.sampled_from([*acl.policies.values(), policy("p1"), policy("p2")])
    return st.one_of(
        st.builds(ACLInitialize, st.just(at), st.just(MANAGEMENT), st.one_of(st.none(), st.just(token("a3")))),
        st.builds(
            ACLBootstrap,
            st.just(request_id),
            st.just(at),
            st.just(token(f"boot-{request_id}", policies=(MANAGEMENT_ID,))),
            st.just(acl.bootstrap_index),
        ),
        known.map(lambda each: SetToken(request_id, at, each, each.modify_index)),
        known.map(lambda each: DeleteToken(request_id, at, each.accessor_id)),
        named.map(lambda each: SetPolicy(request_id, at, each, each.modify_index)),
        named.map(lambda each: DeletePolicy(request_id, at, each.id)),
    )


def check_invariants(acl: ACLState, index: int) -> None:
    """What holds of the tokens and policies of every state."""
    assert acl.index <= index
    assert acl.bootstrap_index <= acl.index
    assert acl.by_hash == tokens_by_hash(acl.tokens.values())
    earliest = earliest_expiry(acl.tokens.values())
    assert acl.next_expiry == earliest
    names = [each.name for each in acl.policies.values()]
    assert len(names) == len(set(names))
    hashes = [each.secret_hash for each in acl.tokens.values() if each.secret_hash]
    assert len(hashes) == len(set(hashes))
    for each in acl.tokens.values():
        assert set(each.policies) <= set(acl.policies)
        assert 0 < each.create_index <= each.modify_index <= acl.index
        assert each.secret_hash or each.accessor_id == ANONYMOUS_ID
    for one in acl.policies.values():
        assert 0 < one.create_index <= one.modify_index <= acl.index
