"""Raft threads of one process on loopback: real sockets, mutual TLS, real directories."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from caserver.environment import SystemClock, SystemEntropy
from caserver.errors import Corrupt, NotLeader
from caserver.internode.keyring import Keyring
from caserver.raft.ports import Committed, Leadership, NotCommitted, Seals
from caserver.raft.streams import Address
from caserver.raft.thread import RaftSettings, RaftThread
from tests.testkit.raftlab import Register, corrupting

Thread = RaftThread[str, tuple[str, ...], int]
State = tuple[str, ...]
KEYRING = Keyring([b"\x07" * 32])
NOWHERE = ("127.0.0.1", 1)  # replaced once the node has bound a port


def _leader(_: State, leadership: Leadership) -> str | None:
    return leadership.leader


def _leads(_: State, leadership: Leadership) -> bool:
    return leadership.is_leader


def _is_voter(_: State, leadership: Leadership) -> bool:
    return leadership.is_voter


def _length(state: State, _: Leadership) -> int:
    return len(state)


def _last(state: State, _: Leadership) -> str | None:
    return state[-1] if state else None


class Cluster:
    def __init__(self, directory: Path, names: str = "abc") -> None:
        self._directory = directory
        self.addresses: dict[str, Address] = dict.fromkeys(names, NOWHERE)
        self.nodes: dict[str, Thread] = {}

    async def start(self, name: str, *, rejoin: bool = False, machine: Register | None = None) -> Thread:
        settings = RaftSettings(
            node=name,
            peers=self.addresses,
            bind=("127.0.0.1", 0),
            multiplier=2,  # no election because a busy machine is late
            data_dir=self._directory / name,
            rejoin=rejoin,
            snapshot_every=50,
        )
        node: Thread = RaftThread(
            settings, machine or Register(), keyring=KEYRING, clock=SystemClock(), entropy=SystemEntropy()
        )
        await node.start()
        assert node.address is not None
        self.addresses[name] = node.address
        self.nodes[name] = node
        return node

    async def start_all(self) -> None:
        await asyncio.gather(*(self.start(name) for name in self.addresses))

    async def leader(self) -> Thread:
        async with asyncio.timeout(20):
            while True:
                for node in self.nodes.values():
                    if node.leadership.is_leader:
                        return node
                await asyncio.wait(
                    [asyncio.ensure_future(node.changed(_leads, seen=False)) for node in self.nodes.values()],
                    return_when=asyncio.FIRST_COMPLETED,
                )

    async def stop(self, name: str) -> None:
        await self.nodes.pop(name).stop()

    async def stop_all(self) -> None:
        await asyncio.gather(*(self.stop(name) for name in tuple(self.nodes)))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    await made.stop_all()


async def _until_last(node: Thread, command: str) -> None:
    async with asyncio.timeout(10):
        while node.state[-1:] != (command,):
            await node.changed(_last, node.state[-1] if node.state else None)


async def test_three_nodes_elect_commit_and_agree(cluster: Cluster):
    await cluster.start_all()
    leader = await cluster.leader()
    outcomes = await asyncio.gather(*(leader.propose(f"k{number}") for number in range(100)))
    assert sorted(each.result for each in outcomes if isinstance(each, Committed)) == list(range(1, 101))
    await leader.barrier()
    for node in cluster.nodes.values():
        async with asyncio.timeout(10):
            while len(node.state) < 100:
                await node.changed(_length, len(node.state))
        assert node.state == leader.state
        assert node.leadership.leader == leader.leadership.node


async def test_a_follower_refuses_proposals_and_barriers(cluster: Cluster):
    await cluster.start_all()
    leader = await cluster.leader()
    follower = next(node for node in cluster.nodes.values() if node is not leader)
    assert isinstance(await follower.propose("x"), NotCommitted)
    with pytest.raises(NotLeader):
        await follower.barrier()


async def test_stopping_the_leader_hands_over_and_a_restarted_node_catches_up_by_snapshot(cluster: Cluster):
    await cluster.start_all()
    first = await cluster.leader()
    name = first.leadership.node
    assert isinstance(await first.propose("before"), Committed)
    await cluster.stop(name)
    second = await cluster.leader()
    for number in range(120):
        assert isinstance(await second.propose(f"k{number}"), Committed)
    back = await cluster.start(name)
    await _until_last(back, "k119")
    assert back.state == second.state
    await second.transfer_leadership(name)
    third = await cluster.leader()
    assert isinstance(await third.propose("after"), Committed)
    for node in cluster.nodes.values():
        await _until_last(node, "after")


async def test_a_cluster_that_was_stopped_as_a_whole_comes_back_with_everything(cluster: Cluster):
    await cluster.start_all()
    leader = await cluster.leader()
    for number in range(60):
        await leader.propose(f"k{number}")
    state = leader.state
    await cluster.stop_all()
    await cluster.start_all()
    leader = await cluster.leader()
    await leader.barrier()
    assert leader.state == state


async def test_a_wiped_node_refuses_to_start_as_new_and_is_taken_back_with_rejoin(cluster: Cluster, tmp_path: Path):
    await cluster.start_all()
    leader = await cluster.leader()
    await leader.propose("x")
    name = next(each for each in cluster.nodes if each != leader.leadership.node)
    await cluster.stop(name)
    for file in (tmp_path / name).iterdir():
        file.unlink()
    wiped = await cluster.start(name)
    async with asyncio.timeout(10):
        with pytest.raises(Corrupt, match="-rejoin"):
            await wiped.fatal
    await cluster.stop(name)
    back = await cluster.start(name, rejoin=True)
    async with asyncio.timeout(10):
        await back.changed(_is_voter, seen=False)
    await cluster.stop(next(each for each in cluster.nodes if each not in {name, leader.leadership.node}))
    async with asyncio.timeout(10):  # a leader that has not heard the new voter yet steps down first
        outcome: object = None
        while not isinstance(outcome, Committed):
            outcome = await (await cluster.leader()).propose("with the one that came back")
    await _until_last(back, "with the one that came back")


async def test_a_failing_apply_ends_the_thread_and_says_why(cluster: Cluster):
    await cluster.start("a", machine=Register(fail=corrupting))
    await cluster.start("b")
    await cluster.start("c")
    leader = await cluster.leader()
    await leader.propose("poison", deadline=1.0)
    a = cluster.nodes["a"]
    async with asyncio.timeout(5):
        with pytest.raises(Corrupt, match="cannot read this"):
            await a.fatal
    assert not a.leadership.is_leader
    assert isinstance(await a.propose("x"), NotCommitted)
    rest = await _another_leader(cluster)
    assert isinstance(await rest.propose("y"), Committed)


async def _another_leader(cluster: Cluster) -> Thread:
    await cluster.stop("a")
    return await cluster.leader()


@pytest.mark.parametrize("in_memory", [True, False])
async def test_a_single_node_is_ready_at_once(tmp_path: Path, in_memory: bool):
    settings = RaftSettings(node="only", data_dir=None if in_memory else tmp_path)
    node: Thread = RaftThread(settings, Register(), keyring=KEYRING, clock=SystemClock(), entropy=SystemEntropy())
    await node.start()
    assert node.leadership.is_leader
    assert await node.propose("x") == Committed(1)
    await node.barrier()
    await node.stop()
    assert isinstance(await node.propose("y"), NotCommitted)


async def test_waiters_on_the_main_loop_are_woken_and_each_selector_runs_once_for_all_of_them():
    node: Thread = RaftThread(
        RaftSettings(node="only"), Register(), keyring=KEYRING, clock=SystemClock(), entropy=SystemEntropy()
    )
    await node.start()
    calls: list[int] = []

    def counting(state: State, _: Leadership) -> int:
        calls.append(len(state))
        return len(state)

    waiters = [asyncio.ensure_future(node.changed(counting, 0)) for _ in range(50)]
    await asyncio.sleep(0)
    calls.clear()
    await node.propose("x")
    assert await asyncio.gather(*waiters) == [1] * 50
    assert len(calls) <= 3
    await node.stop()


async def test_a_directory_in_use_is_refused_at_the_start(tmp_path: Path):
    def make() -> Thread:
        settings = RaftSettings(node="only", data_dir=tmp_path)
        return RaftThread(settings, Register(), keyring=KEYRING, clock=SystemClock(), entropy=SystemEntropy())

    first, second = make(), make()
    await first.start()
    with pytest.raises(OSError):
        await second.start()
    await second.stop()
    await first.stop()


async def test_an_address_in_use_is_named_at_the_start(cluster: Cluster):
    first = await cluster.start("a")
    assert first.address is not None
    settings = RaftSettings(node="b", peers=cluster.addresses, bind=first.address)
    second: Thread = RaftThread(settings, Register(), keyring=KEYRING, clock=SystemClock(), entropy=SystemEntropy())
    with pytest.raises(OSError, match=f"cannot listen for other nodes on 127.0.0.1:{first.address[1]}"):
        await second.start()
    await second.stop()


def _keys_in(text: str) -> frozenset[str]:
    return frozenset(word.removeprefix("sealed:") for word in text.split() if word.startswith("sealed:"))


SEALS: Seals[State] = Seals(lambda command: _keys_in(command.decode()), lambda state: _keys_in(" ".join(state[-1:])))


async def test_a_node_that_holds_what_none_of_its_secrets_opens_does_not_start(tmp_path: Path):
    def node(*secrets: bytes) -> Thread:
        settings = RaftSettings(node="a", data_dir=tmp_path / "a")
        return RaftThread(
            settings, Register(), keyring=Keyring(secrets), clock=SystemClock(), entropy=SystemEntropy(), seals=SEALS
        )

    old, new = b"o" * 32, b"n" * 32
    first = node(old)
    await first.start()
    for text in (f"sealed:{Keyring([old]).key_ids[0]}", "other"):  # the state needs it no more, the journal holds it
        assert isinstance(await first.propose(text), Committed)
    await first.stop()

    with pytest.raises(Corrupt, match="list the former secret behind the new one"):
        await node(new).start()

    changing = node(new, old)
    await changing.start()
    async with asyncio.timeout(10):
        while changing.leadership.keys["a"].stored:  # noqa: ASYNC110  # reports make no notice
            await asyncio.sleep(0.05)
    await changing.stop()
    last = node(new)
    await last.start()
    assert len(last.state) == 2
    await last.stop()
