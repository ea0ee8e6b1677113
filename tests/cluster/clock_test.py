"""Wall clocks that are set wrong on real Raft nodes: the CA waits or moves on, the cluster stays together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from caserver.errors import Unavailable
from caserver.raft.ports import Leadership
from caserver.requests import ChangeConfiguration, IssuedLeaf, LeavesSigned, SignLeaves
from caserver.state.model import CAState
from tests.testkit.composition import Composition, Member, composed
from tests.testkit.nodes import csr_for

DAY = 24 * 3600.0
REPORTED = 60.0  # seconds within which the others' clocks are known to a node; they are told once a second


@asynccontextmanager
async def a_cluster() -> AsyncIterator[tuple[Composition, Member, list[Member]]]:
    async with composed() as composition:
        await composition.everywhere(lambda state: state.active_root is not None)
        leader = await composition.leader()
        await sign(leader)
        yield composition, leader, [member for member in composition.members if member is not leader]


async def sign(member: Member, service: str = "web") -> IssuedLeaf:
    csr = csr_for(service, trust_domain=member.state.trust_domain or "")
    answer = await member.execute(SignLeaves((csr,)))
    assert isinstance(answer, LeavesSigned)
    (leaf,) = answer.results
    assert isinstance(leaf, IssuedLeaf), leaf
    return leaf


async def until_doubted(member: Member, *, doubted: bool = True) -> None:
    async with asyncio.timeout(REPORTED):
        while ("ClockSkew" in dict(member.authority.degraded)) != doubted:  # noqa: ASYNC110  # a look is what counts time
            await asyncio.sleep(0.05)


def _term(_: CAState, leadership: Leadership) -> int:
    return leadership.term


def _leads(_: CAState, leadership: Leadership) -> str | None:
    return leadership.leader


async def looked_at(composition: Composition) -> None:
    """Let time go by at which clocks are looked at, until cancelled."""
    while True:
        composition.clock.step(timedelta(seconds=5))
        await asyncio.sleep(0.2)


@pytest.mark.parametrize("seconds", [DAY, -DAY])
async def test_a_leader_with_a_wrong_clock_signs_and_changes_nothing_and_keeps_the_cluster_together(
    seconds: float,
) -> None:
    async with a_cluster() as (composition, leader, followers):
        term, index = leader.raft.leadership.term, leader.state.index
        leader.set_wall(seconds)
        for attempt in (sign(leader), sign(followers[0]), followers[0].execute(ChangeConfiguration(body="{}"))):
            with pytest.raises(Unavailable, match="clock"):
                await attempt
        await until_doubted(leader)
        await asyncio.sleep(2)  # longer than it takes a node that hears nothing to stand for election
        await composition.everywhere(lambda state: state.index >= index)

        for member in composition.members:
            assert _term(member.state, member.raft.leadership) == term
            assert all(member.raft.leadership.peers.values())
            assert member.state.index == index
        assert all("ClockSkew" not in dict(member.authority.degraded) for member in followers)

        leader.set_wall(0.0)
        with pytest.raises(Unavailable, match="steady"):
            await sign(followers[0])
        await asyncio.sleep(1.5)  # until the others' clocks are known again
        assert "ClockSkew" in dict(leader.authority.degraded)
        composition.clock.step(timedelta(seconds=61))
        await until_doubted(leader, doubted=False)
        assert await sign(followers[0])


async def test_a_follower_with_a_wrong_clock_says_so_and_the_leader_signs_on() -> None:
    async with a_cluster() as (_, leader, followers):
        followers[0].set_wall(-45.0)
        await until_doubted(followers[0])

        assert "off those of the other servers" in dict(followers[0].authority.degraded)["ClockSkew"] or (
            "jumped" in dict(followers[0].authority.degraded)["ClockSkew"]
        )
        assert await sign(followers[0])
        assert "ClockSkew" not in dict(leader.authority.degraded)


async def test_leadership_moves_to_a_node_whose_clock_agrees_and_signing_goes_on() -> None:
    async with a_cluster() as (composition, leader, followers):
        watch = asyncio.get_running_loop().create_task(leader.authority.watch_clock(leader.raft.transfer_leadership))
        leader.set_wall(DAY)
        await until_doubted(leader)
        looking = asyncio.get_running_loop().create_task(looked_at(composition))  # at clocks, every five seconds
        # The deposed one is asked: while it does not know of its successor, it refuses by its own clock.
        successor = await leader.until(_leads, lambda name: name in {each.name for each in followers})
        looking.cancel()
        watch.cancel()

        assert successor != leader.name
        assert await sign(leader)
