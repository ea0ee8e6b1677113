"""Random faults on a cluster of real engines in virtual time: what was acknowledged stays, what was refused never appears."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from caserver.raft.engine import Proposal
from caserver.raft.guard import Standing
from caserver.raft.ports import Committed, NotCommitted, Outcome
from tests.testkit.raftlab import Lab

STEPS = 3000


class History:
    """What clients were told, and which node led when."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome[Any]] = {}
        self.proposed = 0
        self.leaders: dict[int, str] = {}

    def propose(self, lab: Lab, name: str) -> None:
        self.proposed += 1
        command = f"c{self.proposed}"
        lab[name].engine.propose(
            Proposal(command.encode(), lambda outcome: self.outcomes.__setitem__(command, outcome))
        )

    def watch(self, lab: Lab) -> None:
        for name, node in lab.nodes.items():
            if node.engine._core.is_leader():
                assert self.leaders.setdefault(node.term, name) == name, f"two leaders in term {node.term}"
        states = sorted((node.machine.state for node in lab.nodes.values()), key=len)
        for shorter, longer in itertools.pairwise(states):
            assert longer[: len(shorter)] == shorter

    def check(self, state: tuple[str, ...]) -> None:
        assert len(set(state)) == len(state)
        for command, outcome in self.outcomes.items():
            if isinstance(outcome, Committed):
                assert command in state, f"{command} was acknowledged and is lost"
                assert state[outcome.result - 1] == command
            elif isinstance(outcome, NotCommitted):
                assert command not in state, f"{command} was refused and is there"


class Chaos:
    def __init__(self, seed: int, names: str) -> None:
        self.random = random.Random(seed)
        self.lab = Lab(names, snapshot_every=25)
        self.history = History()
        self.down: dict[str, Any] = {}
        self.apart: set[tuple[str, str]] = set()

    def step(self) -> None:
        lab = self.lab
        lab.clock.elapsed += self.random.expovariate(1 / 0.01)
        action = self.random.random()
        if action < 0.55:
            self._move_messages()
        elif action < 0.85:
            self._propose()
        elif action < 0.90:
            self._change_link()
        elif action < 0.93:
            self._crash_or_start()
        else:
            self._compact()
        for node in tuple(lab.nodes.values()):
            if self.random.random() < 0.7:
                node.engine.tick()
        self.history.watch(lab)

    def _move_messages(self) -> None:
        pairs = sorted(pair for pair, queue in self.lab.wire.queues.items() if queue)
        for a, b in self.random.sample(pairs, min(len(pairs), 4)):
            if b not in self.lab.nodes:
                continue
            queue = self.lab.wire.queues[(a, b)]
            if self.random.random() < 0.05 and queue[0]["type"] != "standing":
                self.lab.nodes[b].engine.receive(a, dict(queue[0]))  # delivered twice
            self.lab.deliver(a, b, count=self.random.randint(1, 6))

    def _propose(self) -> None:
        for name in sorted(self.lab.nodes):
            if self.lab[name].engine._core.is_leader():
                self.history.propose(self.lab, name)

    def _change_link(self) -> None:
        a, b = sorted(self.random.sample(self.lab.names, 2))
        if a not in self.lab.nodes or b not in self.lab.nodes:
            return
        if self.apart and self.random.random() < 0.6:
            a, b = self.random.choice(sorted(self.apart))
            if a not in self.lab.nodes or b not in self.lab.nodes:
                return
            self.apart.discard((a, b))
            self.lab.link(a, b)
        else:
            self.apart.add((a, b))
            self.lab.unlink(a, b)

    def _crash_or_start(self) -> None:
        if self.down and self.random.random() < 0.8:
            self._start(self.random.choice(sorted(self.down)))
            return
        name = self.random.choice(sorted(self.lab.nodes) or [""])
        if not name:
            return
        standings = {node.engine.standing for node in self.lab.nodes.values()}
        may_wipe = not self.down and standings == {Standing.MEMBER}
        disk = self.lab.crash(name)
        wiped = may_wipe and self.random.random() < 0.3
        self.down[name] = None if wiped else disk.after_power_loss(surviving_bytes=self.random.choice([0, 7, 400]))

    def _start(self, name: str) -> None:
        disk = self.down.pop(name)
        self.apart -= {pair for pair in self.apart if name in pair}
        self.lab.start(name, disk, rejoin=disk is None or disk.read("marker") is None)

    def _compact(self) -> None:
        name = self.random.choice(sorted(self.lab.nodes) or [""])
        if name:
            self.lab[name].compact()

    def heal(self) -> None:
        for name in sorted(self.down):
            self._start(name)
        for a, b in sorted(self.apart):
            self.lab.link(a, b)
        self.lab.run(6, step=0.03)


@pytest.mark.parametrize(
    ("names", "seed"), [("ABC", seed) for seed in range(8)] + [("ABCDE", seed) for seed in range(4)]
)
def test_no_acknowledged_command_is_lost_and_no_refused_one_appears(names: str, seed: int):
    chaos = Chaos(seed, names)
    for _ in range(STEPS):
        chaos.step()
    chaos.heal()
    states = {node.machine.state for node in chaos.lab.nodes.values()}
    assert len(states) == 1
    chaos.history.check(states.pop())
    assert len(chaos.lab.leaders()) == 1
    assert sum(isinstance(each, Committed) for each in chaos.history.outcomes.values()) > 20
