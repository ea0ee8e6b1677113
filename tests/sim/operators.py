"""What operators do to a simulated cluster, as README tells them to: recover it offline, change its secret."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from caserver.raft import recovery
from caserver.raft.journal import Entry
from caserver.state.key_change import keyring_status
from caserver.state.machine import CAStateMachine
from tests.sim.disk import Death, SimDisk

if TYPE_CHECKING:
    from tests.sim.node import Life, Node, Setting

_FOUNDED_AT = 5  # entries that a cluster has when nobody takes it for a new one any more


@dataclass
class Operators:
    """See above."""

    setting: Setting
    nodes: dict[str, Node]
    chance: random.Random
    note: Callable[[str], None]
    secrets: list[bytes] = field(default_factory=lambda: [bytes(range(32))])  # every one that there ever was

    @property
    def _lives(self) -> list[Life]:
        found = [self.nodes[name].life for name in sorted(self.nodes)]
        return [life for life in found if life is not None]

    def _voters(self) -> list[str]:
        """Nodes that lost nothing, of a cluster that was founded; none if it was not, or is not yet in its generation."""
        unlost = [name for name in sorted(self.nodes) if not self.nodes[name].platter.lost]
        founded = all(self.nodes[name].platter.durable.voter for name in unlost)
        return unlost if founded and self.setting.witness.newest >= _FOUNDED_AT else []

    # -- a new generation

    def recover(self) -> None:
        """Everything is stopped; what a majority holds is exported, and every node begins with it anew, lost or not."""
        names, voters = sorted(self.nodes), self._voters()
        if not voters:
            return
        for life in self._lives:
            life.die(Death.KILLED)
        # A node may have begun and heard nothing yet: it has nothing to export.
        voters = [name for name in voters if len(self.nodes[name].platter.durable.contents.entries) > 1]
        if len(voters) <= len(names) // 2:
            return
        exports = {name: self._export(name) for name in self._some(voters)}
        plan = self._plan(exports)
        self.note(f"recover from {sorted(exports)}: {plan.chosen.node} at {plan.chosen.position}")
        imported: list[str] = []
        try:
            for name in self.chance.sample(names, len(names)):
                recovery.install(self._disk(name), plan, node=name, names=names)
                imported.append(name)
        except recovery.RecoveryRefused:
            # A node holds more than was exported, though nobody was told of it: as the text says, once more with it.
            self.note("recover from all after a refusal")
            exports |= {name: self._export(name) for name in voters if name not in (*exports, *imported)}
            plan = self._plan(exports)
            for name in names:
                if name in imported:
                    self.nodes[name].platter.clear()
                recovery.install(self._disk(name), plan, node=name, names=names)
        for name in names:
            self.nodes[name].platter.lost = False  # it begins like the others
        term = max(each.node_term for each, _ in exports.values())
        self.setting.witness.imported(plan.chosen.node, exports[plan.chosen.node][1], term=term)

    def _some(self, voters: list[str]) -> list[str]:
        """As many as are a majority of all, at least."""
        return self.chance.sample(voters, self.chance.randint(len(self.nodes) // 2 + 1, len(voters)))

    def _export(self, name: str) -> tuple[recovery.Export, list[Entry]]:
        """What a node exports, and its log."""
        exported = recovery.export(self._disk(name), CAStateMachine())
        return exported, list(self.nodes[name].platter.durable.contents.entries)

    def _plan(self, exports: dict[str, tuple[recovery.Export, list[Entry]]]) -> recovery.Import:
        return recovery.choose([each for each, _ in exports.values()], survivor=False)

    def _disk(self, name: str) -> SimDisk:
        return SimDisk(
            self.nodes[name].platter, chance=self.chance, note=lambda what: self.setting.note(f"{name} offline {what}")
        )

    # -- another secret

    def roll(self) -> None:
        """One step of a change of the cluster secret: the next node gets the list of this stage, or the next stage begins."""
        lists = self._stages()
        for stage in lists[1:]:
            behind = [node for node in self.nodes.values() if lists.index(node.secrets) < lists.index(stage)]
            if behind:
                self._give(self.chance.choice(behind), stage, last=stage == lists[-1])
                return
        # Every node has the new one alone: another change begins.
        self.secrets.append(self.chance.randbytes(32))

    def _stages(self) -> list[tuple[bytes, ...]]:
        """The lists that nodes hold one after another."""
        if len(self.secrets) == 1:
            self.secrets.append(self.chance.randbytes(32))
        old, new = self.secrets[-2:]
        return [(old,), (old, new), (new, old), (new,)]

    def _give(self, node: Node, secrets: tuple[bytes, ...], *, last: bool) -> None:
        """Restart a node with other secrets; the old one goes only when the cluster says that it may."""
        if last and not self._may_go():
            return
        self.note(f"secret of {node.name} {len(secrets)} of {len(self.secrets)}")
        if node.life is not None:
            node.life.die(Death.KILLED)
        node.secrets = secrets

    def _may_go(self) -> bool:
        """What ``operator keyring status`` says of the old secret, asked of the leader while every server is there."""
        leading = [life for life in self._lives if life.log.leadership.is_leader]
        if not leading or len(self._lives) < len(self.nodes):
            return False
        (leader, *_) = leading
        status = keyring_status(leader.state, leader.log.leadership)
        current = leader.keyring.key_ids[0]
        return all(not key.needed for key in status.keys if key.key_id != current) and any(
            key.key_id == current for key in status.keys
        )
