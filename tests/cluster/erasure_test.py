"""What the state forgets is gone from the files of every node at once, not only after thousands of further entries."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

from caserver.environment import SystemClock, SystemEntropy
from caserver.internode.keyring import Keyring
from caserver.raft.ports import Committed, Leadership, Seals
from caserver.raft.streams import Address
from caserver.raft.thread import RaftSettings, RaftThread
from caserver.state.commands import (
    AbortChange,
    ActivateRoot,
    Applied,
    BeginChange,
    Bootstrap,
    Command,
    PruneRoots,
    Result,
)
from caserver.state.machine import CAStateMachine
from caserver.state.model import CAState, Index, RootID, StoredConfiguration
from caserver.state.sealing import erases
from tests.testkit.states import CLUSTER_ID, DAY, HMAC_KEY, NOW, ROOT_IDS, new_root, stored

Node = RaftThread[Command, CAState, Result]
NAMES = ("a", "b", "c")
MULTIPLIER = 4  # no election because a busy machine is late
WITHIN = 60.0  # seconds for what happens at once on a calm machine
ROOT_KEY, ABORTED_KEY = b"sealed key of the first root", b"sealed key of an operator, given up"


def _leads(_: CAState, leadership: Leadership) -> bool:
    return leadership.is_leader


def _index(state: CAState, _: Leadership) -> Index:
    return state.index


async def started(directory: Path) -> list[Node]:
    addresses: dict[str, Address] = dict.fromkeys(NAMES, ("127.0.0.1", 1))
    nodes = []
    for name in NAMES:
        settings = RaftSettings(
            node=name, peers=addresses, bind=("127.0.0.1", 0), multiplier=MULTIPLIER, data_dir=directory / name
        )
        node: Node = RaftThread(
            settings,
            CAStateMachine(),
            keyring=Keyring([b"k" * 32]),
            clock=SystemClock(),
            entropy=SystemEntropy(),
            seals=Seals(lambda _: frozenset(), lambda _: frozenset(), erases),
        )
        await node.start()
        assert node.address is not None
        addresses[name] = node.address
        nodes.append(node)
    return nodes


async def leader_of(nodes: list[Node]) -> Node:
    waits = {asyncio.ensure_future(node.changed(_leads, seen=False)): node for node in nodes}
    done, waiting = await asyncio.wait(waits, timeout=WITHIN, return_when=asyncio.FIRST_COMPLETED)
    for each in waiting:
        each.cancel()
    return waits[done.pop()]


def holders(directory: Path, sealed: bytes) -> set[str]:
    """The nodes whose files hold a sealed value."""
    text = base64.b64encode(sealed)
    return {name for name in NAMES for file in (directory / name).iterdir() if text in contents(file)}


def contents(file: Path) -> bytes:
    """What a node's file holds: nothing when the node renamed it into place between the listing and the reading."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""


async def held_by(directory: Path, sealed: bytes, names: set[str]) -> None:
    """Wait until the files of exactly these nodes hold a sealed value."""
    async with asyncio.timeout(WITHIN):
        while holders(directory, sealed) != names:  # noqa: ASYNC110  # files make no notice
            await asyncio.sleep(0.05)


async def test_the_key_of_a_pruned_root_and_one_that_was_given_up_leave_every_disk(tmp_path: Path) -> None:
    nodes = await started(tmp_path)
    try:
        leader = await leader_of(nodes)

        async def commit(command: Command) -> CAState:
            outcome = await leader.propose(command)
            assert isinstance(outcome, Committed)
            assert isinstance(outcome.result, Applied), outcome
            for node in nodes:
                while node.state.index < leader.state.index:
                    await node.changed(_index, node.state.index)
            return leader.state

        async def begin(request_id: str, configuration: StoredConfiguration) -> None:
            current = leader.state.configuration
            assert current is not None
            await commit(BeginChange(request_id, NOW, current.modify_index, leader.state.ca_epoch, configuration))

        await commit(Bootstrap(NOW, CLUSTER_ID, stored(), HMAC_KEY))
        await begin("first", stored())
        await commit(
            ActivateRoot("first", NOW, leader.state.ca_epoch, new_root(ROOT_IDS[0], sealed_key=ROOT_KEY), None)
        )
        await begin("given up", stored(secret=ABORTED_KEY))
        await held_by(tmp_path, ABORTED_KEY, set(NAMES))
        await commit(AbortChange("given up", NOW, "no"))
        await held_by(tmp_path, ABORTED_KEY, set())

        await held_by(tmp_path, ROOT_KEY, set(NAMES))
        await begin("second", stored(leaf_ttl=3600))
        await commit(ActivateRoot("second", NOW, leader.state.ca_epoch, new_root(ROOT_IDS[1]), None))
        await commit(PruneRoots(NOW + 30 * DAY, leader.state.ca_epoch, (RootID(ROOT_IDS[0]),)))
        await held_by(tmp_path, ROOT_KEY, set())
    finally:
        await asyncio.gather(*(node.stop() for node in nodes))
