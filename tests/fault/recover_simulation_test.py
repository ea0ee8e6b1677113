"""Clusters under random faults lose power, are exported by a random majority and go on as another list of nodes, twice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from caserver.raft.data_dir import MARKER_FILE, Marker
from caserver.raft.disk import MemoryDisk
from caserver.raft.ports import Committed
from caserver.raft.recovery import Export, Import, RecoveryRefused, choose, export, install
from tests.fault.raft_simulation_test import Chaos
from tests.testkit.raftlab import Lab, Register

STEPS = 1000
LISTS = ("ABC", "BCD", "ABCDE", "DEF")


class Recovered(Chaos):
    """A cluster that can be carried into another list; what clients were told stays true."""

    generation = "0"

    def stop(self) -> dict[str, MemoryDisk]:
        """End all nodes by a power loss; the directories of those that are voters."""
        lab, disks = self.lab, {name: disk for name, disk in self.down.items() if disk is not None}
        for name in tuple(lab.nodes):
            disks[name] = lab.crash(name, power_loss=True)
        voters = {name: disk for name, disk in disks.items() if disk.read("marker") is not None}
        for name, disk in voters.items():
            marker = Marker.of(name, lab.names)
            disk.replace(MARKER_FILE, replace(marker, generation=self.generation, initialised=True).encode())
        return voters

    def carry_over(self) -> None:
        disks, old = self.stop(), self.lab.names
        exported = self.random.sample(sorted(disks), min(len(disks), len(old) // 2 + 1))
        plan = choose([self._export(disks[name]) for name in exported], survivor=False)
        self.history.check(tuple(plan.chosen.snapshot.state.decode().splitlines()))
        names = self.random.choice(LISTS)
        self.lab = Lab(names, founded=False, snapshot_every=25, origin=plan.chosen.snapshot.last[1])
        self.lab.nodes.clear()
        for name in names:
            self.lab.start(name, self._import(plan, disks.get(name, MemoryDisk()), name, names))
        self.generation, self.down, self.apart = plan.generation, {}, set()
        self.history.leaders.clear()
        self.lab.await_leader()

    def _export(self, disk: MemoryDisk) -> Export:
        try:
            return Export.decode(export(disk, Register()).encode())
        finally:
            disk.close()

    def _import(self, plan: Import, disk: MemoryDisk, node: str, names: str) -> MemoryDisk:
        try:
            install(disk, plan, node=node, names=names)
        except RecoveryRefused as exc:
            assert "goes further than every export" in str(exc)  # noqa: PT017 - of a minority: never acknowledged
            disk = MemoryDisk()
            install(disk, plan, node=node, names=names)
        disk.close()
        disk.replace("marker", None)  # the lab's own: whether it is a voter
        return disk


@pytest.mark.parametrize("seed", range(5))
def test_recovery_keeps_what_was_acknowledged_and_brings_back_nothing_that_was_refused(seed: int) -> None:
    chaos = Recovered(seed, "ABC" if seed % 2 else "ABCDE")
    for _ in range(2):
        for _ in range(STEPS):
            chaos.step()
        chaos.carry_over()
    chaos.heal()
    states = {node.machine.state for node in chaos.lab.nodes.values()}
    assert len(states) == 1
    chaos.history.check(states.pop())
    assert sum(isinstance(each, Committed) for each in chaos.history.outcomes.values()) > 20
