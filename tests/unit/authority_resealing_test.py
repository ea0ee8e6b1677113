from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from caserver.authority.clock_guard import STEADY
from caserver.authority.maintenance import LOOK_AGAIN
from caserver.authority.resealing import AGAIN
from caserver.internode.keyring import Keyring, Sealed
from caserver.raft.ports import KeyReport
from caserver.state.commands import Reseal
from caserver.state.sealing import keys_in_state, sealed_values
from tests.testkit.fakes import FakeLog
from tests.testkit.nodes import Node, build_node, operator_root, running

OLD_SECRET, NEW_SECRET = b"o" * 32, b"n" * 32
OLD, CHANGING = Keyring([OLD_SECRET]), Keyring([NEW_SECRET, OLD_SECRET])
A, B = OLD.key_ids[0], CHANGING.key_ids[0]


async def sealed_with_old(log: FakeLog) -> None:
    """A CA with an operator's key, a rotation behind it and a history, all of it under the old secret."""
    async with running(build_node(log, keyring=OLD)) as node:
        await node.configure(operator_root("ec-256"))
        await node.configure(operator_root("ec-384"))
        assert keys_in_state(node.state) == {A}
        assert {name.partition("/")[0] for name in sealed_values(node.state)} >= {
            "hmac",
            "root",
            "configuration",
            "history",
        }


def successor(log: FakeLog) -> Node:
    """The node after its restart with the new secret in front."""
    return build_node(log, keyring=CHANGING, seed=2)


async def test_everything_is_sealed_anew_in_one_command() -> None:
    log = FakeLog()
    await sealed_with_old(log)
    names, index = set(sealed_values(log.state)), log.state.roots_index

    with capture_logs() as logs:
        async with running(successor(log)) as node:
            await node.clock.advance(STEADY + LOOK_AGAIN)
            assert await node.sign("web")

    assert keys_in_state(log.state) == {B}
    assert set(sealed_values(log.state)) == {each for each in names if not each.startswith("retiring")}
    assert len(log.applied(Reseal)) == 1
    assert log.state.roots_index == index  # nobody who watches the roots wakes up
    assert [entry["secrets"] for entry in logs if "sealed with the current key" in entry["event"]] == [len(names)]


async def test_what_was_sealed_anew_opens_with_the_new_secret_alone() -> None:
    log = FakeLog()
    await sealed_with_old(log)
    async with running(successor(log)) as node:
        await node.clock.advance(20)
    async with running(build_node(log, keyring=Keyring([NEW_SECRET]), seed=3)) as node:
        assert await node.sign("web")
        await node.configure({**operator_root("ec-384"), "PrivateKey": "<redacted>", "LeafCertTTL": "48h"})


async def test_it_waits_until_every_node_announced_the_new_key() -> None:
    log = FakeLog()
    await sealed_with_old(log)
    log.elsewhere("n2")
    with capture_logs() as logs:
        async with running(successor(log)) as node:
            for report in (None, KeyReport((A,), (A,)), KeyReport((A, B), (A,))):
                log.keys = {} if report is None else {"n2": report}
                await node.clock.advance(30)
                assert keys_in_state(log.state) == {A}
            log.keys = {"n2": KeyReport((B, A), (A,))}
            await node.clock.advance(30)

    assert keys_in_state(log.state) == {B}
    said = [entry["reason"] for entry in logs if "wait to be sealed" in entry["event"]]
    assert len(said) == 3
    assert "n2 still seals" in said[-1]


async def test_a_leader_with_the_old_list_leaves_everything_as_it_is() -> None:
    log = FakeLog()
    await sealed_with_old(log)
    log.elsewhere("n2")
    log.keys = {"n2": KeyReport((B, A), (A,))}
    async with running(build_node(log, keyring=Keyring([OLD_SECRET, NEW_SECRET]))) as node:
        await node.clock.advance(120)

    assert not log.applied(Reseal)


@pytest.mark.parametrize("fault", ["fail_next", "lose_next_command", "lose_next_reply"])
async def test_a_failure_is_tried_again_and_holds_up_nothing_else(fault: str) -> None:
    log = FakeLog()
    await sealed_with_old(log)
    node = successor(log)
    getattr(log, fault)()
    async with running(node):
        assert await node.sign("web")
        await node.clock.advance(2 * AGAIN)

    assert keys_in_state(log.state) == {B}


async def test_a_secret_that_does_not_open_keeps_its_seal_and_is_reported() -> None:
    log = FakeLog()
    await sealed_with_old(log)
    name = next(each for each in sealed_values(log.state) if each.startswith("history"))
    damaged = Sealed(bytes.fromhex(A) + bytes(60))
    log.commit(Reseal(at=1, expect_index=log.state.roots_index, values=((name, damaged),)))
    with capture_logs() as logs:
        async with running(successor(log)) as node:
            await node.clock.advance(3 * AGAIN)
            assert await node.sign("web")

    warnings = [entry for entry in logs if "anew failed" in entry["event"]]
    assert warnings
    assert "does not open" in warnings[0]["reason"]
    assert len(warnings) <= 4
