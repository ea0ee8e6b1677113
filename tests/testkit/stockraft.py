"""The published engine, bare, with its messages moved by hand: what it does where ours must do better.

Only applying is replaced, because this process forbids unpickling; the protocol is pysyncobj's own.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

from pysyncobj import SyncObj, SyncObjConf
from pysyncobj.journal import Journal, MemoryJournal
from pysyncobj.node import Node
from pysyncobj.transport import Transport

from caserver.raft import seam
from tests.testkit.raftlab import LabClock

COMMAND = b"\x00"


class _Transport(Transport):  # type: ignore[misc] # pysyncobj carries no types
    def __init__(self, engine: Any, node: Node, others: Any) -> None:
        super().__init__(engine, node, others)
        self._cluster, self._node, self._others = engine.cluster, node, others

    def link_all(self) -> None:
        for other in self._others:
            self._onNodeConnected(other)

    def send(self, node: Node, message: dict[str, Any]) -> bool:
        self._cluster.queues[(self._node.id, node.id)].append(message)
        return True


class StockNode(SyncObj):  # type: ignore[misc] # pysyncobj carries no types
    def __init__(self, cluster: StockCluster, name: str, journal: Journal) -> None:
        self.cluster, self.applied = cluster, list[str]()
        configuration = SyncObjConf(
            autoTick=False,
            raftMinTimeout=1000,
            raftMaxTimeout=2000,
            connectionTimeout=5000,
            appendEntriesPeriod=30,
            leaderFallbackTimeout=10000,
            appendEntriesBatchSizeBytes=60,
            journalFile=journal,
        )
        others = [Node(each) for each in cluster.lists.get(name, cluster.names) if each != name]
        super().__init__(Node(name), others, configuration, nodeClass=Node, transportClass=_Transport)

    def _SyncObj__doApplyCommand(self, command: bytes) -> None:  # noqa: N802 - pysyncobj's name
        if command[:1] == COMMAND:
            self.applied.append(command[1:].decode())

    def log(self) -> list[tuple[int, int]]:
        return [(index, term) for _, index, term in self._SyncObj__raftLog[:]]

    def peer(self, name: str) -> Node:
        return next(each for each in self.otherNodes if each.id == name)


class StockCluster:
    def __init__(
        self,
        names: str,
        *,
        journal: type[MemoryJournal] = MemoryJournal,
        lists: Mapping[str, str] | None = None,  # of nodes that list others than ``names``
    ) -> None:
        self.lists = lists or {}
        seam.install()
        self.clock = LabClock()
        seam.bind_monotonic(self.clock.monotonic)
        self.names = names
        self.queues: dict[tuple[str, str], deque[dict[str, Any]]] = defaultdict(deque)
        self.nodes = {name: StockNode(self, name, journal()) for name in names}
        for node in self.nodes.values():
            node._SyncObj__transport.link_all()

    def __getitem__(self, name: str) -> StockNode:
        return self.nodes[name]

    def clear(self) -> None:
        self.queues.clear()

    def wipe(self, name: str) -> None:
        """Let a node start again without its disk."""
        self.nodes[name] = StockNode(self, name, MemoryJournal())
        self.nodes[name]._SyncObj__transport.link_all()

    def receive(self, a: str, b: str, message: dict[str, Any]) -> None:
        self.nodes[b]._SyncObj__onMessageReceived(self.nodes[b].peer(a), message)

    def deliver(self, a: str, b: str, *, count: int | None = None) -> None:
        queue = self.queues[(a, b)]
        while queue and count != 0:
            self.receive(a, b, queue.popleft())
            count = None if count is None else count - 1

    def campaign(self, name: str) -> None:
        self.nodes[name]._SyncObj__raftElectionDeadline = 0
        self.nodes[name].doTick(0)

    def elect(self, name: str, voters: str) -> None:
        self.campaign(name)
        for voter in voters:
            self.deliver(name, voter)
            self.deliver(voter, name)
        assert self.nodes[name]._isLeader()

    def heartbeat(self, name: str) -> None:
        self.nodes[name]._SyncObj__newAppendEntriesTime = 0
        self.nodes[name].doTick(0)

    def pump(self, a: str, b: str, *, rounds: int = 6) -> None:
        for _ in range(rounds):
            self.heartbeat(a)
            self.deliver(a, b)
            self.deliver(b, a)

    def propose(self, name: str, command: str, outcomes: list[int]) -> None:
        self.nodes[name]._applyCommand(COMMAND + command.encode(), lambda _, reason: outcomes.append(reason))
