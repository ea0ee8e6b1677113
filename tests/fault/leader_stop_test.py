"""SIGTERM to one leader after another under load: leadership moves, the node drains and ends with 0, clients see a pause."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

from tests.testkit.cluster import Cluster, Node, run_cli, wait_for
from tests.testkit.invariants import Witness, check_invariants

ROUNDS = 3
PAUSE_MAX = 15.0  # seconds; elections on the test clusters take about one, and the machine is shared


@dataclass(slots=True)
class Clients:
    """Threads that each use one node without a break, for new leaves or changes; what they were told, how long it took."""

    witness: Witness
    away: set[str] = field(default_factory=set)  # nodes that are being stopped: their clients are not counted
    complaints: list[str] = field(default_factory=list)
    slowest: float = 0.0
    fetched: int = 0
    changed: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def run(self, node: Node, act: Callable[[Node, int], None]) -> None:
        call = 0
        while not self.ended.is_set():
            call += 1
            counted = node.name not in self.away
            started = time.monotonic()
            try:
                act(node, call)
            except (OSError, AssertionError) as exc:
                if counted and node.name not in self.away:
                    self.complaints.append(f"through {node.name}: {exc!r}")
                self.ended.wait(0.1)
                continue
            if counted:
                self.slowest = max(self.slowest, time.monotonic() - started)

    def fetch(self, node: Node, call: int) -> None:
        name = f"{node.name}-{threading.get_ident()}-{call}"
        self.witness.saw_leaf(node.get(f"/v1/agent/connect/ca/leaf/{name}").json())
        self.fetched += 1

    def change(self, node: Node, call: int) -> None:
        config = {"CSRMaxPerSecond": 0, "LeafCertTTL": f"{24 + call % 40}h"}
        reply = node.put("/v1/connect/ca/configuration", {"Provider": "consul", "Config": config})
        assert reply.status == HTTPStatus.OK, reply.text
        self.changed += 1
        self.ended.wait(0.05)

    def more(self, count: int) -> None:
        goal = self.fetched + count
        wait_for("the clients to get on", lambda: True if self.fetched >= goal else None)


@contextmanager
def asking(cluster: Cluster) -> Iterator[Clients]:
    unlimited = {"Provider": "consul", "Config": {"CSRMaxPerSecond": 0}}
    assert cluster.nodes[0].put("/v1/connect/ca/configuration", unlimited).status == 200
    clients = Clients(Witness())
    threads = [
        threading.Thread(target=clients.run, args=(node, act))
        for node in cluster
        for act in (clients.fetch, clients.fetch, clients.change)
    ]
    for thread in threads:
        thread.start()
    try:
        yield clients
    finally:
        clients.ended.set()
        for thread in threads:
            thread.join()


def test_a_stopped_leader_is_not_missed(tmp_path: Path) -> None:
    with Cluster(tmp_path).start_ready() as cluster, asking(cluster) as clients:
        for _ in range(ROUNDS):
            clients.more(20)
            leader = cluster.leader()
            clients.away.add(leader.name)

            assert cluster.stop(leader) == 0
            clients.more(20)
            assert cluster.leader() is not leader
            assert "Traceback" not in leader.log
            cluster.restart(leader)
            cluster.wait_ready(leader)
            clients.away.discard(leader.name)
        clients.ended.set()

        assert clients.complaints == []
        assert clients.slowest < PAUSE_MAX
        assert clients.changed > ROUNDS
        check_invariants(cluster, clients.witness)


def test_leadership_is_transferred_by_command(tmp_path: Path) -> None:
    with Cluster(tmp_path).start_ready() as cluster, asking(cluster) as clients:
        clients.more(5)
        former = cluster.leader()
        asked, chosen = cluster.followers()

        named = asked.request("POST", f"/v1/operator/raft/transfer-leader?id={chosen.name}")
        first = cluster.leader()
        done = run_cli("operator", "raft", "transfer-leader", f"-http-addr={former.url}")
        second = cluster.leader()
        clients.more(5)
        clients.ended.set()

        assert (named.status, named.json()) == (200, {"Success": True})
        assert first is chosen
        assert (done.returncode, done.stdout) == (0, "Success\n"), done.stderr
        assert second is not chosen
        assert clients.complaints == []
        health = [node.get("/v1/operator/autopilot/health").json() for node in cluster]
        assert [(each["Healthy"], each["FailureTolerance"]) for each in health] == [(True, 1)] * 3
        versions = {server["Version"] for each in health for server in each["Servers"]}
        assert versions == {run_cli("version").stdout.split()[1].removeprefix("v")}
        metrics = second.get("/v1/agent/metrics?format=prometheus").text
        assert "consul_server_isLeader 1" in metrics.splitlines()
        assert 'caserver_raft_peer_lag{peer="' in metrics
        assert "caserver_raft_fsync_count" in metrics
