"""The leader's decisions on tokens and policies when things go wrong: lost answers, repeats, others who were faster."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from caserver.acl_requests import (
    BootstrapACL,
    CloneToken,
    PolicyWritten,
    PutPolicy,
    PutToken,
    Removed,
    RemovePolicy,
    RemoveToken,
    TokenWritten,
)
from caserver.config.acl_settings import ACLSettings
from caserver.errors import (
    ACLDisabled,
    CommitFailed,
    CommitUnknown,
    Conflict,
    InvalidRequest,
    NotInitialized,
    NotLeader,
)
from caserver.fields import Secret
from caserver.requests import Caller, Request, decode_answer, decode_request, encode_answer, encode_request
from caserver.state.acl import ANONYMOUS_ID, MANAGEMENT_ID
from caserver.state.acl_commands import ACLInitialize, SetPolicy, SetToken
from caserver.state.commands import Bootstrap
from tests.testkit.access import Access, access
from tests.testkit.acl_states import policy
from tests.testkit.fakes import FakeLog, ManualClock, SeededEntropy, settle
from tests.testkit.nodes import KEYRING
from tests.testkit.states import CLUSTER_ID, NOW, stored

ON = ACLSettings(enabled=True, default_allow=False)
A, B = "b6b856da-5193-4e78-845a-7d61ca8371ba", "c01a1f82-44be-41b0-a686-685fb6e0f485"
S, T = "0c1fa2f8-7f7c-4b3b-9b0c-1d8f8d4e2a57", "1c1fa2f8-7f7c-4b3b-9b0c-1d8f8d4e2a57"
MAKE = PutToken(accessor_id=A, secret=S, create=True, body="{}")
ONCE = Caller(request_id="r1")


async def initialized(settings: ACLSettings = ON) -> tuple[FakeLog, Access]:
    log = FakeLog()
    sealed = KEYRING.seal(b"h" * 32, purpose="acl/hmac-key", nonce=bytes(12))
    log.commit(Bootstrap(NOW, CLUSTER_ID, stored(), sealed))
    own = access(log, keyring=KEYRING, clock=ManualClock(), entropy=SeededEntropy(), settings=settings)
    await own.tokens.initialize()
    return log, own


async def test_initializing_is_done_once_by_whoever_leads() -> None:
    log, own = await initialized(replace(ON, initial_management=Secret(S)))
    first = log.state.acl
    await own.tokens.initialize()

    assert log.state.acl == first
    assert len(log.applied(ACLInitialize)) == 1
    assert set(first.policies) == {MANAGEMENT_ID}
    (initial,) = [each for each in first.tokens.values() if each.accessor_id != ANONYMOUS_ID]
    assert initial.policies == (MANAGEMENT_ID,)
    assert first.bootstrap_index == first.index


async def test_a_failed_initialization_is_told_so_that_it_is_tried_again() -> None:
    log, _own = await initialized(replace(ON, initial_management=Secret(S)))
    other = access(
        log,
        keyring=KEYRING,
        clock=ManualClock(),
        entropy=SeededEntropy(2),
        settings=replace(ON, initial_management=Secret(T)),
    )
    log.fail_next()
    with pytest.raises(CommitFailed):
        await other.tokens.initialize()
    log.lose_next_command()
    with pytest.raises(CommitUnknown):
        await other.tokens.initialize()
    await other.tokens.initialize()

    assert len(log.state.acl.tokens) == 3


@pytest.mark.parametrize("request_", [RemoveToken(A), RemovePolicy(A)])
async def test_that_there_is_nothing_to_remove_is_told_only_by_a_leader_that_proves_to_be_one(
    request_: RemoveToken | RemovePolicy,
) -> None:
    log, own = await initialized()
    log.unproven = True
    with pytest.raises(NotLeader):
        await own.tokens.execute(ONCE, request_)
    log.unproven = False

    assert await own.tokens.execute(ONCE, request_) == Removed(log.state.index)


async def test_without_acls_nothing_is_made_and_nothing_done() -> None:
    log, own = await initialized(ACLSettings())

    assert not log.state.acl.tokens
    with pytest.raises(ACLDisabled):
        await own.tokens.execute(ONCE, MAKE)


async def test_before_the_cluster_has_a_key_no_token_is_kept() -> None:
    own = access(FakeLog(), keyring=KEYRING, clock=ManualClock(), entropy=SeededEntropy(), settings=ON)

    with pytest.raises(NotInitialized):
        await own.tokens.execute(ONCE, MAKE)


async def test_a_repeated_request_finds_its_first_effect() -> None:
    log, own = await initialized()

    first = await own.tokens.execute(ONCE, MAKE)
    again = await own.tokens.execute(ONCE, replace(MAKE, secret=T))

    assert isinstance(first, TokenWritten)
    assert again == first
    assert len(log.applied(SetToken)) == 1
    removed = await own.tokens.execute(Caller(request_id="r2"), RemoveToken(A))
    assert isinstance(removed, Removed)
    assert await own.tokens.execute(Caller(request_id="r2"), RemoveToken(A)) == removed


async def test_an_answer_that_was_lost_is_found_in_the_state() -> None:
    log, own = await initialized()
    log.lose_next_reply()

    answer = await own.tokens.execute(ONCE, MAKE)

    assert isinstance(answer, TokenWritten)
    assert answer.token == log.state.acl.tokens[A]


async def test_a_command_that_was_lost_is_told_as_unknown_and_may_be_sent_again() -> None:
    log, own = await initialized()
    log.lose_next_command()
    with pytest.raises(CommitUnknown):
        await own.tokens.execute(ONCE, MAKE)
    log.fail_next()
    with pytest.raises(CommitFailed):
        await own.tokens.execute(ONCE, MAKE)

    assert isinstance(await own.tokens.execute(ONCE, MAKE), TokenWritten)


async def test_what_changed_meanwhile_is_decided_anew() -> None:
    log, own = await initialized()
    body = json.dumps({"Name": "web", "Rules": 'service "web" { policy = "write" }'})
    made = await own.tokens.execute(Caller(), PutPolicy(policy_id=A, create=True, body=body))
    assert isinstance(made, PolicyWritten)
    log.hold(SetPolicy)
    changing = asyncio.ensure_future(
        own.tokens.execute(ONCE, PutPolicy(policy_id=A, create=False, body='{"Name": "mine"}'))
    )
    await settle()
    log.commit(SetPolicy("other", NOW, replace(made.policy, name="theirs"), made.policy.modify_index))
    log.release()
    answer = await changing

    assert isinstance(answer, PolicyWritten)
    assert log.state.acl.policies[A].name == "mine"


async def test_a_name_that_somebody_else_took_meanwhile_is_refused() -> None:
    log, own = await initialized()
    log.hold(SetPolicy)
    making = asyncio.ensure_future(
        own.tokens.execute(ONCE, PutPolicy(policy_id=A, create=True, body='{"Name": "web"}'))
    )
    await settle()
    log.commit(SetPolicy("other", NOW, policy(B, name="web"), 0))
    log.release()

    with pytest.raises(InvalidRequest, match='A Policy with Name "web" already exists'):
        await making


async def test_nobody_waits_for_ever_behind_others() -> None:
    log, own = await initialized()
    made = await own.tokens.execute(Caller(), PutPolicy(policy_id=A, create=True, body='{"Name": "web"}'))
    assert isinstance(made, PolicyWritten)

    def interfere() -> None:
        current = log.state.acl.policies[A]
        log.commit(SetPolicy(f"other {current.modify_index}", NOW, current, current.modify_index))
        log.tripwire.arm_at("propose SetPolicy", interfere)

    log.tripwire.arm_at("propose SetPolicy", interfere)
    with pytest.raises(Conflict):
        await own.tokens.execute(ONCE, PutPolicy(policy_id=A, create=False, body='{"Name": "mine"}'))


@pytest.mark.parametrize(
    "request_",
    [
        BootstrapACL(accessor_id=A, secret=S),
        MAKE,
        CloneToken(source_id=A, accessor_id=B, secret=T, description="d"),
        RemoveToken(A),
        PutPolicy(policy_id=A, create=False, body="{}"),
        RemovePolicy(A),
    ],
    ids=lambda each: type(each).__name__,
)
def test_requests_and_answers_cross_the_hop_and_show_no_secret(request_: Request) -> None:
    caller = Caller(token=Secret(T), source="n1 x", request_id="r")

    assert decode_request(encode_request(caller, request_)) == (caller, request_)
    assert S not in repr(request_)
    assert T not in repr(request_)


async def test_answers_cross_the_hop() -> None:
    _, own = await initialized()
    token = await own.tokens.execute(Caller(), MAKE)
    body = json.dumps({"Name": "web", "Rules": 'service "web" { policy = "write" }'})
    written = await own.tokens.execute(Caller(), PutPolicy(policy_id=A, create=True, body=body))

    for answer in (token, written, Removed(7)):
        assert decode_answer(encode_answer(answer)) == answer
