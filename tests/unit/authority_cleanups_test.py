"""What is owed at a server that is gone for good: seen, and given up."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from caserver.cleanup_requests import CleanupForgotten, CleanupsRead, ForgetCleanup, OwedCleanup, ReadCleanups
from caserver.errors import NotFound, NotLeader, PermissionDenied, ProviderUnavailable
from caserver.requests import Caller
from caserver.state.commands import ProviderRetired
from tests.testkit.external import FakeVault
from tests.testkit.fakes import FakeLog, ManualClock, settle
from tests.testkit.nodes import CLUSTER_ID, Node, bootstrap_configuration, build_node, operator_root, running

TRIED = 90  # seconds after which a clean-up was tried, clock guard included
BUILTIN = {**operator_root("ec-256"), "CSRMaxPerSecond": 0}
VAULT = {
    "Address": "https://vault:8200",
    "Token": "s.sesame",
    "RootPKIPath": "root-a",
    "IntermediatePKIPath": "team/inter-a",
    "Namespace": "mesh",
    "CSRMaxPerSecond": 0,
}


def scene() -> tuple[Node, FakeVault]:
    clock = ManualClock()
    server = FakeVault(clock)
    return build_node(FakeLog(), clock=clock, server=server, bootstrap=bootstrap_configuration()), server


async def gone_for_good(node: Node, server: FakeVault) -> OwedCleanup:
    """Away from a server that is never coming back; what is owed there."""
    await node.configure(VAULT, provider="vault")
    server.down = ProviderUnavailable("gone for good")
    await node.configure(BUILTIN, ForceWithoutCrossSigning=True)
    await node.clock.advance(TRIED)
    (owed,) = await owed_by(node)
    return owed


async def owed_by(node: Node) -> tuple[OwedCleanup, ...]:
    answer = await node.authority.execute(Caller(), ReadCleanups())
    assert isinstance(answer, CleanupsRead)
    return answer.cleanups


async def forget(node: Node, cleanup_id: str, request_id: str = "r1") -> CleanupForgotten:
    answer = await node.authority.execute(
        Caller(request_id=request_id, source="n1 10.0.0.9"), ForgetCleanup(cleanup_id)
    )
    assert isinstance(answer, CleanupForgotten)
    return answer


async def test_what_is_owed_says_where_what_is_left_and_why() -> None:
    node, server = scene()
    async with running(node):
        owed = await gone_for_good(node, server)
        (retiring,) = node.state.retiring

    assert (owed.provider, owed.address, owed.namespace, owed.path) == (
        "vault",
        "https://vault:8200",
        "mesh",
        "team/inter-a",
    )
    assert f"caserver-{CLUSTER_ID}-{retiring.epoch}" in owed.left[0]
    assert owed.id == f"{retiring.epoch}-{retiring.root_id.replace(':', '')[:8]}"
    assert "gone for good" in owed.reason
    assert "sesame" not in repr(owed)


async def test_what_is_given_up_is_not_tried_again_and_the_log_says_what_is_left() -> None:
    node, server = scene()
    async with running(node):
        owed = await gone_for_good(node, server)
        assert f"cleanup forget {owed.id}" in dict(node.authority.degraded)["CleanupOwed"]
        with capture_logs() as lines:
            await forget(node, owed.id)
        assert await owed_by(node) == ()
        assert node.authority.degraded == ()
        tried = node.external.calls.count("retire")
        await node.clock.advance(3600)
        assert node.external.calls.count("retire") == tried

    (told,) = [line for line in lines if line["event"] == "an operator gave a clean-up up"]
    seen = {key: told[key] for key in ("id", "address", "path", "namespace", "left", "source")}
    assert seen == {
        "id": owed.id,
        "address": owed.address,
        "path": owed.path,
        "namespace": owed.namespace,
        "left": owed.left,
        "source": "n1 10.0.0.9",
    }
    assert "sesame" not in repr(told)


async def test_a_retry_finds_that_it_is_done_and_another_request_finds_nothing() -> None:
    node, server = scene()
    async with running(node):
        owed = await gone_for_good(node, server)
        first = await forget(node, owed.id)
        assert await forget(node, owed.id) == first
        with pytest.raises(NotFound, match="is owed: it was done or given up"):
            await forget(node, owed.id, request_id="r2")


async def test_one_of_several_is_given_up_and_the_others_go_on() -> None:
    node, server = scene()
    async with running(node):
        owed = await gone_for_good(node, server)
        server.down = None
        await node.configure({**VAULT, "RootPKIPath": "root-b", "IntermediatePKIPath": "inter-b"}, provider="vault")
        server.down = ProviderUnavailable("gone for good")
        await node.configure({**operator_root("ec-384"), "CSRMaxPerSecond": 0}, ForceWithoutCrossSigning=True)
        await forget(node, owed.id)
        (other,) = [each for each in await owed_by(node) if each.provider == "vault"]
        assert other.path == "inter-b"
        server.down = None
        await node.clock.advance(1200)
        assert await owed_by(node) == ()
        assert {path for path, _ in server.standing} <= {owed.path}


async def test_who_may_not_any_more_when_it_is_their_turn_gives_nothing_up() -> None:
    node, server = scene()
    async with running(node):
        owed = await gone_for_good(node, server)

        def no_more() -> None:
            raise PermissionDenied("Permission denied")

        with pytest.raises(PermissionDenied):
            await node.authority._cleanups.execute(Caller(request_id="r1"), ForgetCleanup(owed.id), still=no_more)
        assert await owed_by(node) == (owed,)


class SlowToProve(FakeLog):
    """A log whose next barrier takes until it is told to end."""

    slow: asyncio.Event | None = None

    async def barrier(self, *, deadline: float = 5.0) -> None:
        slow, self.slow = self.slow, None
        if slow is not None:
            await slow.wait()
        await super().barrier(deadline=deadline)


async def test_what_is_given_up_while_leadership_is_being_proven_for_a_try_is_not_tried() -> None:
    clock, log = ManualClock(), SlowToProve()
    server = FakeVault(clock)
    node = build_node(log, clock=clock, server=server, bootstrap=bootstrap_configuration())
    async with running(node):
        owed = await gone_for_good(node, server)
        server.down, tried = None, node.external.calls.count("retire")
        proven = log.slow = asyncio.Event()
        await clock.advance(600)
        assert log.slow is None  # it is about to try again

        log.hold(ProviderRetired)
        forgetting = asyncio.create_task(forget(node, owed.id))
        await settle()
        assert log.held == 1
        proven.set()
        await settle()
        log.release()
        await forgetting
        await clock.advance(600)

        assert (await owed_by(node), node.external.calls.count("retire")) == ((), tried)


async def test_only_the_leader_knows() -> None:
    node = build_node(FakeLog().elsewhere("n2"))
    with pytest.raises(NotLeader):
        await node.authority.execute(Caller(), ReadCleanups())
