"""What the commands on tokens and policies do, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest

from caserver.state.acl import ANONYMOUS_ID, MANAGEMENT_ID, Grant
from caserver.state.acl_commands import (
    ACLBootstrap,
    ACLCommand,
    ACLInitialize,
    DeletePolicy,
    DeleteToken,
    SetPolicy,
    SetToken,
)
from caserver.state.apply import apply
from caserver.state.codec import decode_state, encode_state
from caserver.state.commands import Applied, ExpireLeaves, Reason, Refused
from caserver.state.lifecycle import Expire, due
from caserver.state.model import CAState
from tests.testkit.acl_states import MANAGEMENT, NOW, policy, token
from tests.testkit.states import applied, bootstrapped

INITIALIZE = ACLInitialize(NOW, MANAGEMENT, None)


def with_acls(*commands: ACLCommand) -> CAState:
    return applied(bootstrapped(), INITIALIZE, *commands)


def refused(state: CAState, command: ACLCommand) -> Reason:
    after, result = apply(state, command)

    assert after is state
    assert isinstance(result, Refused)
    return result.reason


def test_a_cluster_begins_with_the_anonymous_token_and_the_policy_for_management():
    acl = with_acls().acl

    assert set(acl.tokens) == {ANONYMOUS_ID}
    assert set(acl.policies) == {MANAGEMENT_ID}
    assert acl.bootstrap_index == 0
    assert acl.index == acl.tokens[ANONYMOUS_ID].create_index == acl.policies[MANAGEMENT_ID].create_index > 0


def test_no_token_is_kept_before_there_is_a_key_for_their_hashes():
    assert refused(CAState(), INITIALIZE) is Reason.NOT_BOOTSTRAPPED


def test_initializing_again_changes_nothing():
    assert refused(with_acls(), INITIALIZE) is Reason.DUPLICATE_REQUEST


def test_the_token_of_the_file_is_made_once_and_counts_as_the_bootstrap():
    initial = token("a1", policies=(MANAGEMENT_ID,))
    state = applied(bootstrapped(), ACLInitialize(NOW, MANAGEMENT, initial))

    assert state.acl.bootstrap_index == state.index
    again = replace(initial, accessor_id="a2")
    assert refused(state, ACLInitialize(NOW, MANAGEMENT, again)) is Reason.DUPLICATE_REQUEST
    another = ACLInitialize(NOW, MANAGEMENT, token("a3", policies=(MANAGEMENT_ID,)))
    after = applied(state, another)
    assert after.acl.bootstrap_index == state.acl.bootstrap_index
    assert set(after.acl.tokens) == {ANONYMOUS_ID, "a1", "a3"}


def test_a_build_that_understands_more_gives_the_builtin_policy_its_new_meaning():
    wider = replace(MANAGEMENT, grants=(*MANAGEMENT.grants, Grant("new", "write")))
    renamed = replace(MANAGEMENT, name="root", modify_index=1)
    state = with_acls()
    state = applied(state, SetPolicy("r1", NOW, renamed, state.acl.policies[MANAGEMENT_ID].modify_index))

    found = applied(state, ACLInitialize(NOW, wider, None)).acl.policies[MANAGEMENT_ID]

    assert (found.name, found.grants) == ("root", wider.grants)


def test_a_lost_management_token_is_replaced_only_by_naming_the_index_of_the_last_bootstrap():
    first = ACLBootstrap("r1", NOW, token("a1", policies=(MANAGEMENT_ID,)), 0)
    state = with_acls(first)
    at = state.acl.bootstrap_index

    assert at == state.index
    second = ACLBootstrap("r2", NOW, token("a2", policies=(MANAGEMENT_ID,)), 0)
    assert refused(state, second) is Reason.STALE_INDEX
    assert refused(state, replace(second, reset_index=at + 1)) is Reason.STALE_INDEX
    after = applied(state, replace(second, reset_index=at))
    assert after.acl.bootstrap_index == after.index
    assert set(after.acl.tokens) == {ANONYMOUS_ID, "a1", "a2"}


def test_a_token_is_found_by_the_hash_of_its_secret_until_it_is_deleted():
    state = with_acls(SetToken("r1", NOW, token("a1", secret_hash=b"h"), 0))

    found = state.acl.token_of(b"h")
    assert found is not None
    assert (found.accessor_id, found.create_index) == ("a1", state.index)
    assert applied(state, DeleteToken("r2", NOW, "a1")).acl.token_of(b"h") is None


def test_what_a_token_stands_for_may_change_but_not_what_it_is():
    state = with_acls(SetPolicy("r1", NOW, policy("p1"), 0), SetToken("r2", NOW, token("a1"), 0))
    known = state.acl.tokens["a1"]

    changed = replace(known, description="new", policies=("p1",))
    after = applied(state, SetToken("r3", NOW, changed, known.modify_index)).acl.tokens["a1"]
    assert (after.description, after.policies, after.create_index) == ("new", ("p1",), known.create_index)
    for other in (
        replace(known, secret_hash=b"other"),
        replace(known, expires_at=NOW + 1),
        replace(known, created_at=NOW - 1),
        replace(known, local=True),
    ):
        assert refused(state, SetToken("r4", NOW, other, known.modify_index)) is Reason.INVALID


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (SetToken("", NOW, token("a9"), 0), Reason.INVALID),
        (SetToken("r1", NOW, token("a9"), 0), Reason.DUPLICATE_REQUEST),
        (SetToken("r9", NOW, token("a1"), 0), Reason.STALE_INDEX),
        (SetToken("r9", NOW, token("a9"), 5), Reason.STALE_INDEX),
        (SetToken("r9", NOW, token("a9", secret_hash=b"hash of a1"), 0), Reason.STALE_INDEX),
        (SetToken("r9", NOW, token("a9", secret_hash=b""), 0), Reason.INVALID),
        (SetToken("r9", NOW, token("a9", policies=("p9",)), 0), Reason.NO_SUCH_POLICY),
        (DeleteToken("r9", NOW, "a9"), Reason.NO_SUCH_TOKEN),
        (DeleteToken("r9", NOW, ANONYMOUS_ID), Reason.NO_SUCH_TOKEN),
        (SetPolicy("r9", NOW, policy("p1"), 0), Reason.STALE_INDEX),
        (SetPolicy("r9", NOW, policy("p9", name="name of p1"), 0), Reason.STALE_INDEX),
        (SetPolicy("r9", NOW, replace(policy("p9"), name=""), 0), Reason.INVALID),
        (DeletePolicy("r9", NOW, "p9"), Reason.NO_SUCH_POLICY),
        (DeletePolicy("r9", NOW, MANAGEMENT_ID), Reason.NO_SUCH_POLICY),
    ],
)
def test_what_would_not_fit_is_refused(command: ACLCommand, reason: Reason):
    state = with_acls(SetToken("r1", NOW, token("a1"), 0), SetPolicy("r2", NOW, policy("p1"), 0))

    assert refused(state, command) is reason


def test_the_builtin_policy_grants_what_it_grants():
    state = with_acls()
    weaker = replace(MANAGEMENT, grants=())

    assert refused(state, SetPolicy("r1", NOW, weaker, state.index)) is Reason.INVALID


def test_a_deleted_policy_is_taken_off_every_token():
    state = with_acls(
        SetPolicy("r1", NOW, policy("p1"), 0),
        SetPolicy("r2", NOW, policy("p2"), 0),
        SetToken("r3", NOW, token("a1", policies=("p1", "p2")), 0),
        SetToken("r4", NOW, token("a2", policies=("p2",)), 0),
    )

    after = applied(state, DeletePolicy("r5", NOW, "p1")).acl

    assert after.tokens["a1"].policies == ("p2",)
    assert after.tokens["a1"].modify_index == after.index
    assert after.tokens["a2"] == state.acl.tokens["a2"]


def test_expired_tokens_are_due_to_be_forgotten_and_then_are():
    state = with_acls(
        SetToken("r1", NOW, token("a1", expires_at=NOW + 700), 0),
        SetToken("r2", NOW, token("a2", expires_at=NOW + 900), 0),
        SetToken("r3", NOW, token("a3"), 0),
    )
    state = applied(state, ExpireLeaves(NOW + 601))

    assert due(state, NOW + 699) is None
    assert due(state, NOW + 700) == Expire()
    after = applied(state, ExpireLeaves(NOW + 700)).acl
    assert set(after.tokens) == {ANONYMOUS_ID, "a2", "a3"}
    assert after.next_expiry == NOW + 900
    assert after.token_of(b"hash of a1") is None


def test_tokens_and_policies_survive_a_snapshot_of_many_lines():
    state = with_acls(SetPolicy("p", NOW, policy("p1", grants=(Grant("service", "write", "web", prefix=True),)), 0))
    for number in range(450):
        made = token(f"t{number}", policies=("p1",), expires_at=NOW + number if number % 2 else None)
        state, result = apply(state, SetToken(f"r{number}", NOW, made, 0))
        assert isinstance(result, Applied)

    assert decode_state(b"".join(encode_state(state))) == state
