"""What a node tells of itself and its peers, on engines whose time and messages are moved by hand."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from caserver import wire
from caserver.authority.operations import servers
from caserver.environment import InlineWorkers
from caserver.errors import Unavailable
from caserver.raft.disk import MemoryDisk
from caserver.raft.replicated_log import ReplicatedLog
from caserver.raft.status import TimedDisk, TimedMachine, Vitals
from caserver.telemetry.metrics import Summary
from tests.testkit.raftlab import Lab, LabClock, Register, committed


def test_the_leader_knows_how_far_its_peers_are() -> None:
    lab = Lab("ABC")
    lab.elect("A")
    committed(lab, "A", 5)
    status = lab["A"].engine.status()

    assert status.leadership.is_leader
    assert status.last_index == status.commit_index == status.applied_index
    assert {peer: (each.last_index, each.last_term) for peer, each in status.peers.items()} == {
        "B": (status.last_index, status.last_term),
        "C": (status.last_index, status.last_term),
    }
    assert all(each.connected and each.voter and each.steady_for > 0 for each in status.peers.values())
    assert (status.campaigns, lab["B"].engine.status().campaigns) == (1, 0)


def test_a_follower_knows_of_its_peers_but_not_their_logs() -> None:
    lab = Lab("ABC")
    lab.elect("A")
    committed(lab, "A", 5)
    peers = lab["B"].engine.status().peers

    assert {each.last_index for each in peers.values()} == {0}
    assert all(each.voter for each in peers.values())


def test_a_wiped_server_is_shown_without_a_vote_until_it_is_promoted() -> None:
    lab = Lab("ABC")
    lab.elect("A")
    lab.run(0.2)
    lab.crash("C")
    lab.start("C", rejoin=True)
    lab.run(0.1)

    def shown(name: str) -> dict[str, bool]:
        found = wire.encode_raft_configuration(servers(lab[name].engine.status(), now=0.0), {})["Servers"]
        return {each["Node"]: each["Voter"] for each in found}

    assert [shown(name) for name in "ABC"] == [{"A": True, "B": True, "C": False}] * 3
    lab.run(3.0)
    assert [shown(name) for name in "ABC"] == [{"A": True, "B": True, "C": True}] * 3


def test_a_server_that_was_not_heard_since_the_start_has_the_vote_that_the_log_says() -> None:
    lab = Lab("ABC")
    lab.elect("A")
    committed(lab, "A", 5)
    lab.crash("C")
    lab.start("B", lab.crash("B"))
    lab.run(3.0)
    peers = lab["B"].engine.status().peers

    assert peers["C"].last_contact is None
    assert peers["C"].voter
    fresh = Lab("ABC", founded=False)
    assert not any(each.voter for each in fresh["A"].engine.status().peers.values())


def test_a_peer_that_falls_silent_ages_and_lags() -> None:
    lab = Lab("ABC")
    lab.elect("A")
    lab.cut("C")
    before = lab["A"].engine.status().peers["C"].last_contact
    committed(lab, "A", 5)
    status = lab["A"].engine.status()

    assert before is not None
    assert (status.peers["C"].last_contact or 0.0) > before
    assert status.peers["C"].last_index < status.peers["B"].last_index == status.last_index


def test_a_new_link_begins_a_new_steadiness() -> None:
    lab = Lab("ABC")
    lab.elect("A")
    lab.run(3.0)  # founding servers become members meanwhile
    long = lab["A"].engine.status().peers["B"].steady_for
    lab.unlink("A", "B")
    assert not lab["A"].engine.status().peers["B"].connected
    lab.link("A", "B")
    lab.run(0.1)

    assert lab["A"].engine.status().peers["B"].steady_for < 0.5 < long


class _Slow(LabClock):
    """Every look at it takes a millisecond."""

    def monotonic(self) -> float:
        self.elapsed += 0.001
        return super().monotonic()


def test_flushes_and_applications_are_measured() -> None:
    clock, flushes, applied = _Slow(), Summary(), Summary()
    disk = TimedDisk(MemoryDisk(), clock, flushes)
    machine = TimedMachine(Register(), clock, applied)
    disk.append("journal", b"x")
    disk.datasync("journal")
    machine.apply(machine.encode("k"))

    assert disk.read("journal") == b"x"
    assert machine.state == ("k",)
    assert flushes.read().total == pytest.approx(1.0)
    assert applied.read().total == pytest.approx(1.0)


async def test_the_log_adds_what_it_measured() -> None:
    lab, vitals = Lab("A"), Vitals()
    node = lab["A"]

    class _Clock:
        now, monotonic = lab.clock.now, lab.clock.monotonic

        async def sleep(self, seconds: float) -> None:
            await asyncio.sleep(0)

    log: ReplicatedLog[str, tuple[str, ...], int] = ReplicatedLog(
        node.machine, clock=_Clock(), workers=InlineWorkers(), vitals=vitals
    )
    log.start(node.engine, lab["A"].engine._guard._network)
    await log.propose("x")
    await log.propose("y")
    status = log.status()
    log.stop()

    assert (status.commit.count, status.wins, status.leader_changes, status.queue) == (2, 1, 1, 0)
    assert replace(status.commit, count=0).total == 0.0
    with pytest.raises(Unavailable):
        log.status()
