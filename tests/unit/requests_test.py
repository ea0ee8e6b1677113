import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caserver.cleanup_requests import CleanupForgotten, CleanupsRead, ForgetCleanup, OwedCleanup, ReadCleanups
from caserver.errors import CaserverError, CommitUnknown, Conflict, InvalidRequest, NotLeader, RateLimited, Unavailable
from caserver.fields import Secret
from caserver.requests import (
    Answer,
    Caller,
    ChangeConfiguration,
    ConfigurationChanged,
    Failure,
    IssuedLeaf,
    LeadershipMoved,
    LeavesSigned,
    ReadAt,
    ReadIndex,
    ReadServers,
    Request,
    ServersRead,
    ServerStatus,
    SignLeaves,
    TransferLeadership,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)

LEAF = IssuedLeaf(
    serial=1 << 127,
    chain_pem="-----BEGIN CERTIFICATE-----\nMII=\n-----END CERTIFICATE-----\n",
    service="é <web>",
    service_uri="spiffe://x.consul/ns/default/dc/dc1/svc/%C3%A9%20%3Cweb%3E",
    not_before=1_700_000_000,
    not_after=1_700_259_200,
    root_id="aa:bb",
    signing_key_id="cc:dd",
    index=33,
)
SERVER = ServerStatus(
    name="n2",
    leader=True,
    voter=False,
    healthy=True,
    connected=False,
    last_contact=-1.0,
    last_index=7,
    last_term=2,
    stable_since=1_700_000_000,
    release="0.1.0",
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
CALLERS = st.builds(
    Caller, token=st.none() | st.builds(Secret, TEXTS), source=TEXTS, request_id=st.text("0123456789abcdef")
)
REQUESTS = st.one_of(
    st.builds(SignLeaves, csrs=st.lists(TEXTS).map(tuple)),
    st.builds(ChangeConfiguration, body=TEXTS, cas=st.none() | st.integers(0), force=st.booleans()),
    st.builds(ReadIndex, consistent=st.booleans()),
    st.builds(ReadServers, consistent=st.booleans()),
    st.builds(ReadCleanups),
    st.builds(ForgetCleanup, cleanup_id=TEXTS),
    st.builds(TransferLeadership, to=st.none() | TEXTS, away_from=TEXTS),
)


@given(CALLERS, REQUESTS)
def test_a_request_arrives_as_it_was_sent(caller: Caller, request: Request) -> None:
    assert decode_request(encode_request(caller, request)) == (caller, request)


@pytest.mark.parametrize(
    "answer",
    [
        LeavesSigned((LEAF, Failure("InvalidCSR", "no"), LEAF)),
        LeavesSigned(()),
        ConfigurationChanged(index=7, rotated=True, warnings=("P-224 is weak",)),
        ReadAt(12),
        ServersRead(()),
        ServersRead((SERVER,)),
        LeadershipMoved("n2"),
        CleanupsRead(()),
        CleanupsRead((OwedCleanup("3-aabbccdd", "vault", "https://v", "team", "inter", ("a key", "x"), 17, "down"),)),
        CleanupForgotten(9),
    ],
)
def test_an_answer_arrives_as_it_was_sent(answer: Answer) -> None:
    assert decode_answer(encode_answer(answer)) == answer


@pytest.mark.parametrize(
    "error", [NotLeader("x"), Conflict("stale"), CommitUnknown("?"), CaserverError("internal error")]
)
def test_an_error_is_raised_as_the_class_that_was_sent(error: CaserverError) -> None:
    with pytest.raises(type(error)) as caught:
        decode_answer(encode_answer(error))

    assert (type(caught.value), caught.value.detail) == (type(error), error.detail)


def test_a_rate_limit_keeps_its_delay() -> None:
    with pytest.raises(RateLimited) as caught:
        decode_answer(encode_answer(RateLimited("Rate limit reached, try again later", 0.25)))

    assert caught.value.retry_after == 0.25


def test_an_error_of_a_newer_node_is_at_least_unavailable() -> None:
    with pytest.raises(Unavailable):
        decode_answer(b'{"version":1,"error":{"kind":"Novel","detail":"x"}}')


def _altered(**changes: object) -> bytes:
    frame = json.loads(encode_request(Caller(token=Secret("hush-hush")), SignLeaves(csrs=("a",))))
    return json.dumps(frame | changes).encode()


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"hush-hush",
        b"[]",
        b"[" * 100_000,
        _altered(version=2),
        _altered(operation="drop_everything"),
        _altered(operation=["sign_leaves"]),
        _altered(arguments={}),
        _altered(arguments={"csrs": ["a"], "more": 1}),
        _altered(arguments={"csrs": "a"}),
        _altered(arguments={"csrs": [1]}),
        _altered(token=5),
        _altered(source=None),
        _altered(operation="read_index", arguments={"consistent": 1}),
        _altered(operation="transfer_leadership", arguments={"to": 5, "away_from": "n1"}),
        _altered(operation="forget_cleanup", arguments={"cleanup_id": 5}),
        _altered(operation="forget_cleanup", arguments={"cleanup_id": "5", "more": 1}),
        _altered(operation="read_cleanups", arguments={"more": 1}),
        _altered(operation="change_configuration", arguments={"body": "", "cas": True, "force": False}),
    ],
)
def test_a_frame_that_is_not_exactly_known_is_refused_without_being_quoted(frame: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_request(frame)

    assert "hush" not in caught.value.detail


@pytest.mark.parametrize(
    "frame",
    [
        b'{"version":1}',
        b'{"version":1,"leaves":[5]}',
        b'{"version":1,"leaves":[{"leaf":{}}]}',
        b'{"version":1,"changed":{"index":1,"rotated":1,"warnings":[]}}',
        b'{"version":1,"read_at":"5"}',
        b'{"version":1,"leader":5}',
        b'{"version":1,"servers":[5]}',
        b'{"version":1,"servers":[{"name":"n1"}]}',
        b'{"version":1,"cleanups":[{"id":"1"}]}',
        b'{"version":1,"forgotten_at":"5"}',
    ],
)
def test_an_answer_that_is_not_exactly_known_is_refused(frame: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode_answer(frame)
