from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from structlog.testing import capture_logs

from caserver.authority.clock_guard import STEADY
from caserver.authority.maintenance import LOOK_AGAIN, agenda
from caserver.errors import ProviderUnavailable
from caserver.raft.ports import Leadership
from caserver.state.commands import ProviderRetired, PruneRoots
from caserver.state.model import CAState
from tests.testkit.fakes import FakeLog
from tests.testkit.nodes import (
    DAY,
    Node,
    bootstrap_configuration,
    build_node,
    leading_node,
    operator_root,
    running,
    why_not,
)

UNLIMITED = {"CSRMaxPerSecond": 0}
HOUR = 3600

T = TypeVar("T")


def listed(node: Node) -> set[str]:
    return {root.id for root in node.state.roots}


def owed(node: Node) -> int:
    return len(node.state.retiring)


async def test_the_former_provider_is_retired_ten_seconds_after_the_rotation() -> None:
    async with leading_node() as node:
        await node.clock.advance(STEADY)
        await node.configure({**operator_root("ec-256"), **UNLIMITED})
        await node.clock.advance(9)
        assert owed(node) == 1
        await node.clock.advance(2)
        assert owed(node) == 0
        assert node.control.retired == [1]


async def test_retiring_is_tried_again_until_it_works_also_by_a_later_leader() -> None:
    async with leading_node() as node:
        await node.clock.advance(STEADY)
        await node.configure({**operator_root("ec-256"), **UNLIMITED})
        node.control.failures["retire"] = ProviderUnavailable("asleep")
        await node.clock.advance(200)
        assert owed(node) == 1
        assert node.control.calls.count("retire") == 3
        assert await node.sign("web")
        second = build_node(node.log.elsewhere("n2"), clock=node.clock, seed=2)
        async with running(second):
            second.log.become_leader()
            await node.clock.advance(STEADY + LOOK_AGAIN)
            assert owed(second) == 0


class DefectiveLog(FakeLog):
    """A log that fails whoever waits for what maintenance waits for, twice."""

    def __init__(self) -> None:
        super().__init__()
        self._defects = iter([LookupError("a defect"), LookupError("another")])

    async def changed(self, select: Callable[[CAState, Leadership], T], seen: T) -> T:
        if select is agenda and (defect := next(self._defects, None)) is not None:
            raise defect
        return await super().changed(select, seen)


async def test_a_defect_between_two_steps_does_not_end_maintenance() -> None:
    node = build_node(DefectiveLog())
    with capture_logs() as lines:
        async with running(node):
            await node.clock.advance(STEADY)
            await node.configure({**operator_root("ec-256"), **UNLIMITED})
            await node.clock.advance(20)
            assert owed(node) == 0

    assert [each["event"] for each in lines].count("maintenance failed, it will be tried again") == 2


async def test_a_provider_that_cannot_be_retired_holds_up_nothing_else() -> None:
    async with leading_node(bootstrap_configuration(leaf_cert_ttl="1h")) as node:
        await node.sign("web")
        node.control.failures["retire"] = ProviderUnavailable("asleep")
        await node.configure({**operator_root("ec-256"), "LeafCertTTL": "1h", **UNLIMITED})
        await node.clock.advance(4 * HOUR)
        assert owed(node) == 1
        assert node.state.ledger.row_count == 0
        assert len(listed(node)) == 1
        assert [code for code, _ in node.authority.degraded] == ["CleanupOwed"]
        node.control.failures.clear()
        await node.clock.advance(600)
        assert owed(node) == 0
        assert node.authority.degraded == ()


async def test_what_a_root_had_before_it_went_and_came_back_is_cleaned_up_too() -> None:
    async with leading_node(bootstrap_configuration(**operator_root("ec-256"))) as node:
        await node.clock.advance(STEADY)
        await node.configure({**operator_root("ec-384"), **UNLIMITED})
        await node.configure({**operator_root("ec-256"), **UNLIMITED})
        await node.clock.advance(30)
        assert owed(node) == 0
        assert node.control.retired == [1, 2]


async def test_an_old_root_is_pruned_two_leaf_lives_after_it_was_rotated_out() -> None:
    async with leading_node(bootstrap_configuration(leaf_cert_ttl="24h")) as node:
        first = node.state.active_root
        assert first is not None
        await node.sign("web")
        await node.configure({**operator_root("ec-256", days=3650), "LeafCertTTL": "24h", **UNLIMITED})
        with capture_logs() as logs:
            await node.clock.advance(2 * 24 * HOUR - 10)
            assert first.id in listed(node)
            await node.clock.advance(HOUR)
        assert first.id not in listed(node)
        assert [entry["id"] for entry in logs if entry["event"] == "pruning old unused root CA"] == [first.id]
        assert len(node.log.applied(PruneRoots)) == 1
        (leaf,) = await node.sign("web")
        active = node.state.active_root
        assert active is not None
        assert why_not(leaf, active.pem, node.clock.now()) is None


async def test_an_old_root_stays_as_long_as_a_leaf_of_it_lives() -> None:
    async with leading_node(bootstrap_configuration(leaf_cert_ttl="72h")) as node:
        (leaf,) = await node.sign("web")
        await node.configure({"LeafCertTTL": "1h", **UNLIMITED})
        await node.configure({**operator_root("ec-256"), "LeafCertTTL": "1h", **UNLIMITED})
        await node.clock.advance(DAY)
        assert leaf.root_id in listed(node)
        await node.clock.advance(6 * DAY)
        assert leaf.root_id not in listed(node)


async def test_the_key_of_a_pruned_root_is_gone_with_it() -> None:
    async with leading_node(bootstrap_configuration(leaf_cert_ttl="1h")) as node:
        first = node.state.active_root
        assert first is not None
        sealed = first.sealed_key
        await node.configure({**operator_root("ec-256"), "LeafCertTTL": "1h", **UNLIMITED})
        await node.clock.advance(4 * HOUR)
        assert listed(node) != {first.id}
        assert repr(sealed) not in repr(node.state)


async def test_expired_leaves_are_forgotten_and_the_latest_request_ids_are_not() -> None:
    async with leading_node(bootstrap_configuration(leaf_cert_ttl="1h")) as node:
        await node.sign("web", "db")
        await node.configure({"LeafCertTTL": "2h", **UNLIMITED}, request_id="a1")
        assert node.state.ledger.row_count == 2
        assert "a1" in node.state.requests
        await node.clock.advance(3 * HOUR)
        assert node.state.ledger.row_count == 0
        assert "a1" in node.state.requests


async def test_a_follower_maintains_nothing() -> None:
    async with leading_node() as node:
        follower = build_node(node.log.elsewhere("n2"), clock=node.clock, seed=2)
        async with running(follower):
            await node.configure({**operator_root("ec-256"), **UNLIMITED})
            await node.clock.advance(STEADY + LOOK_AGAIN)
            assert follower.control.calls == []
            assert len(node.log.applied(ProviderRetired)) == 1


async def test_an_idle_ca_writes_nothing() -> None:
    async with leading_node() as node:
        await node.clock.advance(2 * HOUR)
        entries = len(node.log.entries)
        await node.clock.advance(3 * DAY)
        assert len(node.log.entries) == entries
