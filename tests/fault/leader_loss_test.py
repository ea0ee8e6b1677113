"""A cluster loses its leader under load: by SIGKILL, by SIGSTOP, over and over. Clients of the other nodes see a pause only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.testkit.cluster import Cluster, Node, wait_for
from tests.testkit.invariants import Witness, check_invariants

CLIENTS_PER_NODE = 2


@dataclass(slots=True)
class Workload:
    """Clients that fetch leaves and roots without a break, each through one node, and remember what they were told."""

    cluster: Cluster
    witness: Witness
    excused: set[str] = field(default_factory=set)  # nodes that are down on purpose: their clients may fail
    complaints: list[str] = field(default_factory=list)
    fetched: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def run(self, node: Node, number: int) -> None:
        """One client, until the workload ends."""
        call = 0
        while not self._ended.is_set():
            call += 1
            counted = node.name not in self.excused
            try:
                self._call(node, f"{node.name}-{number}-{call}")
            except (OSError, AssertionError) as exc:
                if counted:
                    self._complain(node, repr(exc))
                self._ended.wait(0.2)

    def _call(self, node: Node, service: str) -> None:
        leaf = node.get(f"/v1/agent/connect/ca/leaf/{service}").json()
        self.witness.saw_leaf(leaf)
        self.witness.roots(node)
        self.fetched += 1

    def _complain(self, node: Node, why: str) -> None:
        if node.name not in self.excused and not self._ended.is_set():
            self.complaints.append(f"through {node.name}: {why}")

    def end(self) -> None:
        self._ended.set()

    def more(self, count: int = 10) -> None:
        """Wait until the clients got further."""
        goal = self.fetched + count
        wait_for("the clients to get on", lambda: True if self.fetched >= goal else None)

    @contextmanager
    def without(self, node: Node) -> Iterator[None]:
        """The node is down on purpose meanwhile."""
        self.excused.add(node.name)
        yield
        self.cluster.wait_ready(node)
        self.excused.discard(node.name)


@contextmanager
def under_load(cluster: Cluster) -> Iterator[Workload]:
    unlimited = {"Provider": "consul", "Config": {"CSRMaxPerSecond": 0}}
    assert cluster.nodes[0].put("/v1/connect/ca/configuration", unlimited).status == 200
    workload = Workload(cluster, Witness())
    clients = [
        threading.Thread(target=workload.run, args=(node, number), name=f"{node.name}-{number}")
        for node in cluster
        for number in range(CLIENTS_PER_NODE)
    ]
    for client in clients:
        client.start()
    try:
        yield workload
    finally:
        workload.end()
        for client in clients:
            client.join()


def change_ttl(node: Node, hours: int) -> dict[str, Any]:
    """A configuration change that succeeds, read back."""
    reply = node.put(
        "/v1/connect/ca/configuration",
        {"Provider": "consul", "Config": {"CSRMaxPerSecond": 0, "LeafCertTTL": f"{hours}h"}},
    )
    assert reply.status == 200, reply.text
    shown: dict[str, Any] = node.get("/v1/connect/ca/configuration").json()
    return shown


def test_sigkill_of_one_leader_after_another(tmp_path: Path) -> None:
    with Cluster(tmp_path).start_ready() as cluster, under_load(cluster) as load:
        for hours in (48, 49, 50):
            load.more()
            leader = cluster.leader()
            survivor = cluster.followers()[0]
            with load.without(leader):
                cluster.kill(leader)
                shown = change_ttl(survivor, hours)  # held until somebody leads
                assert shown["Config"]["LeafCertTTL"] == f"{hours}h"
                load.witness.saw_configuration(shown["ModifyIndex"])
                cluster.restart(leader)
        load.more()
        load.end()

        assert load.complaints == []
        check_invariants(cluster, load.witness)


def test_sigstop_of_the_leader(tmp_path: Path) -> None:
    """The others go on without it; when it wakes up, it does not lead on its old word."""
    with Cluster(tmp_path).start_ready() as cluster, under_load(cluster) as load:
        load.more()
        sleeper = cluster.leader()
        survivor = cluster.followers()[0]
        with load.without(sleeper):
            cluster.pause(sleeper)
            shown = change_ttl(survivor, 48)
            load.witness.saw_configuration(shown["ModifyIndex"])
            successor = cluster.leader()
            cluster.resume(sleeper)
            at_once = sleeper.get("/v1/connect/ca/configuration").json()
            seen = sleeper.get("/v1/connect/ca/configuration?consistent").json()

            assert successor is not sleeper
            assert at_once == seen == shown
        load.more()
        load.end()

        assert load.complaints == []
        check_invariants(cluster, load.witness)


def test_without_a_majority_nothing_is_acknowledged(tmp_path: Path) -> None:
    brief = {"performance": {"raft_multiplier": 2, "rpc_hold_timeout": "5s"}}  # nobody comes
    with Cluster(tmp_path, settings=brief).start_ready() as cluster:
        witness = Witness()
        alone = cluster.followers()[0]
        before = alone.get("/v1/connect/ca/configuration").json()
        witness.saw_configuration(before["ModifyIndex"])
        leaf = witness.leaf(alone, "cached")
        gone = [node for node in cluster if node is not alone]
        for node in gone:
            cluster.kill(node)

        refused = alone.put("/v1/connect/ca/configuration", {"Provider": "consul", "Config": {"LeafCertTTL": "48h"}})
        assert refused.status in {500, 503}, refused.text
        assert alone.get("/v1/connect/ca/roots?stale").status == 200
        assert alone.get("/v1/agent/connect/ca/roots").status == 200
        assert alone.get("/v1/agent/connect/ca/leaf/cached").json() == leaf

        for node in gone:
            cluster.restart(node)
        cluster.wait_ready()
        assert alone.get("/v1/connect/ca/configuration").json() == before
        check_invariants(cluster, witness)


def test_all_nodes_killed_at_once_lose_nothing(tmp_path: Path) -> None:
    with Cluster(tmp_path).start_ready() as cluster:
        witness = Witness()
        for node in cluster:
            witness.roots(node)
            witness.leaf(node, f"early-{node.name}")
        shown = change_ttl(cluster.nodes[0], 48)
        for node in cluster:
            cluster.kill(node)

        cluster.start()
        cluster.wait_ready()

        assert cluster.nodes[1].get("/v1/connect/ca/configuration").json() == shown
        for node in cluster:
            witness.leaf(node, f"late-{node.name}")
        check_invariants(cluster, witness)
