from __future__ import annotations

from dataclasses import replace

import pytest

from caserver.internode.keyring import Keyring, Sealed
from caserver.raft.ports import KeyReport, Leadership
from caserver.state.key_change import hindrance, keyring_status
from caserver.state.model import CAState

OLD, NEW = Keyring([b"o" * 32]), Keyring([b"n" * 32])
A, B = OLD.key_ids[0], NEW.key_ids[0]


def sealed(keyring: Keyring) -> Sealed:
    return keyring.seal(b"secret", purpose="acl/hmac-key", nonce=bytes(12))


def leadership(**reports: KeyReport) -> Leadership:
    peers = dict.fromkeys(("n2", "n3"), True)
    return Leadership(node="n1", leader="n1", term=1, is_leader=True, peers=peers, keys=reports)


def report(*held: str, stored: tuple[str, ...] = ()) -> KeyReport:
    return KeyReport(held, stored)


@pytest.mark.parametrize(
    ("reports", "says"),
    [
        ({}, "n2 has not announced its keys"),
        ({"n2": report(B, A)}, "n3 has not announced its keys"),
        ({"n2": report(A), "n3": report(B, A)}, f"n2 does not hold key {B}"),
        ({"n2": report(B, A), "n3": report(A, B)}, f"n3 still seals with key {A}"),
        ({"n2": report(B, A), "n3": report(B, A)}, None),
        ({"n2": report(B), "n3": report(B, A)}, None),
    ],
)
def test_the_state_is_sealed_anew_once_every_node_seals_with_the_new_key(
    reports: dict[str, KeyReport], says: str | None
) -> None:
    found = hindrance(leadership(n1=report(B, A), **reports), B)

    assert found is None if says is None else says in (found or "")


def test_a_single_node_waits_for_nobody() -> None:
    assert hindrance(Leadership(node="n1", leader="n1", term=1, is_leader=True), B) is None


def needed(state: CAState, **reports: KeyReport) -> dict[str, tuple[str, ...]]:
    return {each.key_id: each.needed for each in keyring_status(state, leadership(**reports)).keys}


def test_a_key_that_seals_the_state_may_not_go() -> None:
    state = replace(CAState(), sealed_hmac_key=sealed(OLD))
    new = {name: report(B, A) for name in ("n1", "n2", "n3")}

    assert needed(state, **new)[A] == ("it seals 1 stored secrets",)
    assert keyring_status(state, leadership(**new)).keys[1].seals == ("hmac",)


def test_a_key_that_any_node_needs_may_not_go() -> None:
    state = replace(CAState(), sealed_hmac_key=sealed(NEW))

    reasons = needed(state, n1=report(B, A), n2=report(A, B), n3=report(B, A, stored=(A, B)))

    assert reasons[A] == ("n2 seals and issues with it", "n3 has it in its journal or snapshot")


def test_nothing_may_go_while_a_node_is_silent() -> None:
    state = replace(CAState(), sealed_hmac_key=sealed(NEW))

    reasons = needed(state, n1=report(B, A), n2=report(B, A))

    assert reasons[A] == ("n3 has not announced its keys",)


def test_a_key_that_nobody_needs_may_go_and_the_current_one_never() -> None:
    state = replace(CAState(), sealed_hmac_key=sealed(NEW))

    reasons = needed(state, n1=report(B, A), n2=report(B, A), n3=report(B))

    assert reasons[A] == ()
    assert reasons[B]


def test_a_key_that_no_node_holds_is_named_too() -> None:
    state = replace(CAState(), sealed_hmac_key=sealed(NEW))

    assert B in needed(state, n1=report(A), n2=report(A), n3=report(A))
