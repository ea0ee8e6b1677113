"""Kill the leader, or take its leadership away, at every step of its work: what is found afterwards is old or new, never a mix."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from caserver.authority.custody import open_root_key
from caserver.errors import CaserverError, CommitUnknown
from caserver.requests import ConfigurationChanged, IssuedLeaf
from caserver.state.commands import ActivateRoot, Bootstrap, SetConfiguration
from caserver.state.model import CARoot
from tests.testkit import nodes
from tests.testkit.external import FakeVault
from tests.testkit.fakes import FakeLog, Killed, ManualClock, Tripwire, settle
from tests.testkit.nodes import KEYRING, Node, ProvingOnce, operator_root, running, why_not

ROTATION = {**operator_root("ec-256"), "CSRMaxPerSecond": 0}
REQUEST_ID = "c0ffee"
MANY = 80  # more steps than any of these operations has
build_node = partial(nodes.build_node, workers=ProvingOnce())


def active(node: Node) -> CARoot:
    (root,) = [root for root in node.state.roots if root.active]
    return root


async def assert_whole(node: Node, leaves_of_before: list[IssuedLeaf]) -> None:
    """The invariants that hold after every interruption, once somebody leads again."""
    state = node.state
    assert state.change is None
    assert node.authority.degraded == ()
    for root in state.roots:
        assert (open_root_key(root, KEYRING) is None) == (root.provider == "vault")
    for leaf in leaves_of_before:
        issuer = state.root(leaf.root_id)
        assert issuer is not None, "a root was lost"
        assert why_not(leaf, issuer.pem, node.clock.now()) is None
    (fresh,) = await node.sign("after")
    assert fresh.root_id == active(node).id
    for root in state.roots:
        assert why_not(fresh, root.pem, node.clock.now()) is None


async def interrupted_rotation(ahead: int, disturb: Callable[[Node, Node], None] | None) -> bool:
    """One rotation on node a, disturbed at step ``ahead``, with node b to take over; False if there is no such step."""
    clock = ManualClock()
    log = FakeLog("a", tripwire=Tripwire())
    a, b = build_node(log, clock=clock), build_node(log.elsewhere("b"), clock=clock, seed=2)
    async with running(a), running(b):
        old, before = active(a), await a.sign("web", "db")
        wire = log.tripwire
        wire.arm(ahead, None if disturb is None else lambda: disturb(a, b))
        call = asyncio.ensure_future(a.configure(ROTATION, request_id=REQUEST_ID))
        with contextlib.suppress(Killed, CaserverError):
            await call
        if not wire.sprung:
            return False
        if disturb is None:
            await a.stop()
            assert active(b).id in {old.id, *(root.id for root in b.state.roots)}
            assert (len(b.state.roots), active(b).id == old.id) in {(1, True), (2, False)}
            b.log.become_leader()
        await settle()
        leader = b if b.log.leadership.is_leader else a
        await assert_whole(leader, before)
        # The caller does what a forwarder does: it repeats the call, and that has one effect in all.
        answer = await leader.configure(ROTATION, request_id=REQUEST_ID)
        assert answer.rotated
        done = [command for command in leader.log.applied(ActivateRoot) if isinstance(command, ActivateRoot)]
        assert [command.request_id for command in done].count(REQUEST_ID) == 1
        assert len(leader.state.roots) == 2
        assert active(leader).id != old.id
        await assert_whole(leader, before)
        return True


async def every_step(attempt: Callable[[int], Awaitable[bool]]) -> int:
    """How many steps there are to interrupt; each was."""
    for ahead in range(1, MANY):
        if not await attempt(ahead):
            return ahead - 1
    pytest.fail("the operation never ended")


async def test_a_leader_killed_at_any_step_of_a_rotation_leaves_old_or_new() -> None:
    assert await every_step(lambda ahead: interrupted_rotation(ahead, None)) >= 12


async def test_a_leader_deposed_at_any_step_of_a_rotation_leaves_old_or_new() -> None:
    assert await every_step(lambda ahead: interrupted_rotation(ahead, lambda _, b: b.log.become_leader())) >= 12


async def test_leadership_that_is_lost_and_won_again_at_any_step_leaves_old_or_new() -> None:
    def flicker(a: Node, _b: Node) -> None:
        a.log.step_down()
        asyncio.get_running_loop().call_soon(a.log.become_leader)

    assert await every_step(lambda ahead: interrupted_rotation(ahead, flicker)) >= 12


async def interrupted_start(ahead: int) -> bool:
    """A cluster whose first leader dies at step ``ahead`` of giving it a CA."""
    clock = ManualClock()
    log = FakeLog("a", tripwire=Tripwire())
    a, b = build_node(log, clock=clock), build_node(log.elsewhere("b"), clock=clock, seed=2)
    log.tripwire.arm(ahead)
    a.start()
    await settle()
    await a.stop()
    if not log.tripwire.sprung:
        return False
    async with running(b):
        b.log.become_leader()
        await settle()
        assert len(b.log.applied(Bootstrap)) == 1
        assert len(b.state.roots) == 1
        await assert_whole(b, [])
        return True


async def test_a_leader_killed_at_any_step_of_the_initialization_leaves_work_that_the_next_one_finishes() -> None:
    assert await every_step(interrupted_start) >= 8


async def interrupted_store(ahead: int) -> bool:
    """A change of lifetimes, with the leader dying at step ``ahead``."""
    clock = ManualClock()
    log = FakeLog("a", tripwire=Tripwire())
    a, b = build_node(log, clock=clock), build_node(log.elsewhere("b"), clock=clock, seed=2)
    async with running(a), running(b):
        root = active(a)
        log.tripwire.arm(ahead)
        with contextlib.suppress(Killed):
            await a.configure({"LeafCertTTL": "24h", "CSRMaxPerSecond": 0}, request_id=REQUEST_ID)
        if not log.tripwire.sprung:
            return False
        await a.stop()
        b.log.become_leader()
        await settle()
        await b.configure({"LeafCertTTL": "24h", "CSRMaxPerSecond": 0}, request_id=REQUEST_ID)
        assert len(b.log.applied(SetConfiguration)) == 1
        assert active(b).id == root.id
        await assert_whole(b, [])
        return True


async def test_a_leader_killed_at_any_step_of_a_store_leaves_old_or_new() -> None:
    assert await every_step(interrupted_store) >= 3


VAULT_A, VAULT_B = (
    {
        "Address": "https://vault:8200",
        "Token": "s.t",
        "RootPKIPath": f"root-{name}",
        "IntermediatePKIPath": "inter",
        "CSRMaxPerSecond": 0,
    }
    for name in "ab"
)
# What is in force, what is wanted, and the same way back and forth below an external provider.
EXTERNAL = {
    "in": (None, VAULT_A),
    "out": (VAULT_A, ROTATION),
    "across": (VAULT_A, VAULT_B),
    "renewal": (VAULT_A, {**VAULT_A, "PrivateKeyBits": 384}),
}
CLEANED_UP = 300  # seconds after which nothing is owed any more


async def put(node: Node, config: dict[str, object]) -> ConfigurationChanged:
    provider = "vault" if "Address" in config else "consul"
    return await node.configure(config, provider=provider, request_id=REQUEST_ID)


async def interrupted_external(ahead: int, way: str, disturb: Callable[[Node, Node], None] | None) -> bool:
    """A change to, from or below an external provider, disturbed at step ``ahead``; nothing is left behind at its server."""
    clock = ManualClock()
    log = FakeLog("a", tripwire=Tripwire())
    server = FakeVault(clock)
    a = build_node(log, clock=clock, server=server)
    b = build_node(log.elsewhere("b"), clock=clock, seed=2, server=server)
    present, wanted = EXTERNAL[way]
    async with running(a), running(b):
        if present is not None:
            await a.configure(present, provider="vault")
        before, epoch = await a.sign("web"), a.state.ca_epoch
        wire = log.tripwire
        server.step = wire.step
        wire.arm(ahead, None if disturb is None else lambda: disturb(a, b))
        call = asyncio.ensure_future(put(a, wanted))
        with contextlib.suppress(Killed, CaserverError):
            await call
        server.step = lambda _: None
        if not wire.sprung:
            return False
        if disturb is None:
            await a.stop()
            b.log.become_leader()
        await settle()
        leader = b if b.log.leadership.is_leader else a
        await assert_whole(leader, before)
        record = leader.state.requests.get(REQUEST_ID)
        assert record is None or not record.result.startswith("aborted"), (
            "a change that only lost its leader was given up"
        )
        await put(leader, wanted)
        assert leader.state.ca_epoch > epoch
        await clock.advance(CLEANED_UP)
        await assert_whole(leader, before)
        assert leader.state.retiring == ()
        at = dict(active(leader).backend)
        assert server.standing == ({(at["path"], int(at["epoch"]))} if at else set())
        return True


@pytest.mark.parametrize("way", EXTERNAL)
async def test_a_leader_killed_at_any_step_of_an_external_change_leaves_nothing_behind(way: str) -> None:
    assert await every_step(lambda ahead: interrupted_external(ahead, way, None)) >= 12


async def test_a_leader_deposed_at_any_step_of_an_external_change_leaves_nothing_behind() -> None:
    def depose(_a: Node, b: Node) -> None:
        b.log.become_leader()

    assert await every_step(lambda ahead: interrupted_external(ahead, "across", depose)) >= 12


def held_up(server: FakeVault, step: str) -> asyncio.Event:
    """Let the next request of this name wait for the event, and nobody else's."""
    event = asyncio.Event()

    def hold(label: str) -> None:
        if label == step:
            server.step, server.hang = lambda _: None, event
            asyncio.get_running_loop().call_soon(
                asyncio.get_running_loop().call_soon, lambda: setattr(server, "hang", None)
            )

    server.step = hold
    return event


async def test_a_deposed_leader_makes_nothing_anew_that_its_successors_have_cleaned_up() -> None:
    clock = ManualClock()
    log = FakeLog("a")
    server = FakeVault(clock)
    a = build_node(log, clock=clock, server=server)
    b = build_node(log.elsewhere("b"), clock=clock, seed=2, server=server)
    async with running(a), running(b):
        await a.configure(VAULT_A, provider="vault")
        assert b.authority.clock_fault() is None  # it watches its clock from here on
        await clock.advance(CLEANED_UP)
        event = held_up(server, "vault make intermediate")
        call = asyncio.ensure_future(put(a, VAULT_B))
        await settle()
        b.log.become_leader()
        await settle()
        assert dict(active(b).backend)["epoch"] == "3"
        await b.configure(VAULT_A, provider="vault")
        await clock.advance(30)  # less than a change may take
        (standing,) = server.standing
        event.set()
        await settle()
        assert server.standing == {standing}
        with pytest.raises(CommitUnknown, match="ceased to lead"):
            await call


async def test_a_leader_without_a_majority_cleans_nothing_up() -> None:
    clock = ManualClock()
    server = FakeVault(clock)
    a = build_node(FakeLog("a"), clock=clock, server=server)
    async with running(a):
        await a.configure(VAULT_A, provider="vault")
        await clock.advance(CLEANED_UP)
        await a.configure(ROTATION)
        standing = server.standing
        a.log.unproven = True
        await clock.advance(CLEANED_UP)
        assert server.standing == standing
        a.log.unproven = False
        await clock.advance(CLEANED_UP)
        assert server.standing == set()


async def test_a_dead_leader_writes_nothing_more() -> None:
    log = FakeLog("a", tripwire=Tripwire())
    async with running(build_node(log)) as a:
        log.tripwire.arm(5)
        with pytest.raises(Killed):
            await a.configure(ROTATION)
        entries = len(log.entries)
        await a.clock.advance(3600)
        assert len(log.entries) == entries
