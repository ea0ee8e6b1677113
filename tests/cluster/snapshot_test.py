"""Real nodes: a restore is seen on all of them at once, under load, after the loss of a leader, in another cluster."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

from tests.fault.leader_loss_test import change_ttl, under_load
from tests.testkit.cluster import Cluster, Node, Reply, run_cli, wait_for
from tests.testkit.invariants import Witness, check_invariants, verifies
from tests.testkit.nodes import csr_for

SECRET = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
OTHER_SECRET = "YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXowMTIzNDU="
ROTATION = {"Provider": "consul", "Config": {"PrivateKeyBits": 384, "CSRMaxPerSecond": 0}}
DELAYS = (0.02, 0.06, 0.15)  # seconds from the request to the kill; the pieces take some 0.2 s


def saved(node: Node) -> bytes:
    reply = node.get("/v1/snapshot")
    assert reply.status == 200, reply.text
    return reply.body


def restored(node: Node, data: bytes) -> Reply:
    return node.put("/v1/snapshot", data, timeout=60)


def roots(node: Node) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = node.get("/v1/connect/ca/roots?consistent").json()["Roots"]
    return found


def essence(node: Node) -> tuple[list[str], dict[str, Any]]:
    """What a restore brings back: roots and configuration."""
    shown = node.get("/v1/connect/ca/configuration?consistent").json()["Config"]
    return sorted(root["RootCert"] for root in roots(node)), shown


def fill(node: Node, leaves: int) -> None:
    """Book leaves, so that the state goes into the log in several pieces."""
    trust_domain = node.get("/v1/connect/ca/roots").json()["TrustDomain"]
    for first in range(0, leaves, 100):
        csrs = [csr_for(f"filling-{first + number}", trust_domain=trust_domain) for number in range(100)]
        reply = node.put("/v1/connect/ca/sign", {"CSRs": csrs})
        assert all("CertPEM" in each for each in reply.json())


def unlimited(node: Node) -> None:
    body = {"Provider": "consul", "Config": {"CSRMaxPerSecond": 0}}
    assert node.put("/v1/connect/ca/configuration", body).status == 200


def test_a_restore_under_load_is_a_pause_and_nothing_else(tmp_path: Path) -> None:
    with Cluster(tmp_path).start_ready() as cluster, under_load(cluster) as load:
        leader, through = cluster.leader(), cluster.followers()[0]
        load.more()
        before, data = essence(through), saved(through)
        shown = change_ttl(through, 48)
        load.more()
        assert restored(through, data).status == 200
        load.more(30)
        after = through.get("/v1/connect/ca/configuration?consistent").json()

        assert essence(through) == before
        assert after["ModifyIndex"] > shown["ModifyIndex"]
        assert all(essence(node) == before for node in cluster)
        assert not load.complaints
        load.end()
        check_invariants(cluster, load.witness)
        assert restored(leader, data).status == 200
        check_invariants(cluster, load.witness)


class Restore(threading.Thread):
    """A restore asked for through one node, while the test does harm."""

    def __init__(self, node: Node, data: bytes) -> None:
        super().__init__(name="restore")
        self._node, self._data = node, data
        self.sent = threading.Event()
        self.reply: Reply | None = None

    def run(self) -> None:
        self.sent.set()
        self.reply = restored(self._node, self._data)


def test_sigkill_of_the_leader_in_the_middle_of_a_restore(tmp_path: Path) -> None:
    with Cluster(tmp_path).start_ready() as cluster:
        through = cluster.followers()[0]
        unlimited(through)
        fill(through, 1200)
        data, then = saved(through), essence(through)
        for delay in DELAYS:
            assert through.put("/v1/connect/ca/configuration", ROTATION).status == 200
            now, leader = essence(through), cluster.leader()
            if leader is through:
                through = cluster.followers()[0]
            restore = Restore(through, data)
            restore.start()
            restore.sent.wait()
            threading.Event().wait(delay)
            cluster.kill(leader)
            restore.join()
            cluster.restart(leader)
            cluster.wait_ready()

            assert restore.reply is not None
            found = essence(through)
            assert found in (then, now)
            if restore.reply.status == 200:
                assert found == then
            else:
                assert "outcome unknown" in restore.reply.text or found == now, restore.reply.text
            assert all(essence(node) == found for node in cluster)
            assert through.get("/v1/agent/connect/ca/leaf/goes-on").status == 200
        wait_for(
            "the restore that nobody continues to be given up",
            lambda: True if restored(through, data).status == 200 else None,
        )
        assert essence(through) == then


def test_into_a_fresh_cluster_with_the_same_secret(tmp_path: Path) -> None:
    witness = Witness()
    with Cluster(tmp_path / "old", secret=SECRET).start_ready() as old:
        node = old.followers()[0]
        unlimited(node)
        assert node.put("/v1/connect/ca/configuration", ROTATION).status == 200
        leaf = witness.leaf(node, "before")
        bundle = {root["RootCert"] for root in roots(node)}
        file = tmp_path / "backup.snap"
        done = run_cli("snapshot", "save", f"-http-addr={node.url}", str(file))
        assert (done.returncode, done.stderr) == (0, "")
        then = essence(node)
        trust_domain = node.get("/v1/connect/ca/roots").json()["TrustDomain"]

    with Cluster(tmp_path / "new", ("m1", "m2", "m3"), secret=SECRET).start_ready() as new:
        node = new.followers()[0]
        held = witness.leaf(node, "web")
        done = run_cli("snapshot", "restore", f"-http-addr={node.url}", str(file))
        assert (done.returncode, done.stdout, done.stderr) == (0, "Restored snapshot\n", "")
        assert all(essence(each) == then for each in new)
        fresh = node.get("/v1/agent/connect/ca/leaf/web").json()
        assert fresh["ServiceURI"].startswith(f"spiffe://{trust_domain}/")
        assert fresh["SerialNumber"] != held["SerialNumber"]
        assert verifies(leaf["CertPEM"], {root["RootCert"] for root in roots(node)})
        assert verifies(fresh["CertPEM"], bundle)
        for each in new:  # the nodes know each other by what they were founded as, also after a restart
            new.kill(each)
        new.start_ready()
        assert all(essence(each) == then for each in new)
        lost = new.followers()[0]
        new.kill(lost)
        for path in lost.data_dir.iterdir():
            path.unlink()
        lost.extra.append("-rejoin")
        new.restart(lost)
        new.wait_for_log("promoted", lost)
        wait_for("the wiped node to know", partial(_agrees, lost, then))


def _agrees(node: Node, then: tuple[list[str], dict[str, Any]]) -> bool | None:
    reply = node.try_get("/v1/connect/ca/roots?stale")
    listed = [] if reply is None or reply.status != 200 else [root["RootCert"] for root in reply.json()["Roots"]]
    return True if sorted(listed) == then[0] else None


def test_a_snapshot_of_another_secret_is_refused_until_that_one_is_listed(tmp_path: Path) -> None:
    names = ("s1",)
    with Cluster(tmp_path / "old", names, settings={"cluster_secret": SECRET}).start_ready() as old:
        data, then = saved(old.nodes[0]), essence(old.nodes[0])

    with Cluster(tmp_path / "new", names, settings={"cluster_secret": OTHER_SECRET}).start_ready() as new:
        now = essence(new.nodes[0])
        refused = restored(new.nodes[0], data)
        assert (refused.status, "list the secret of the cluster that saved it" in refused.text) == (400, True)
        assert essence(new.nodes[0]) == now

    with Cluster(tmp_path / "new", names, settings={"cluster_secret": [OTHER_SECRET, SECRET]}).start_ready() as both:
        (node,) = both
        assert restored(node, data).status == 200
        assert essence(node) == then
        both.wait_for_log("stored secrets are sealed with the current key", node)
        assert node.get("/v1/agent/connect/ca/leaf/web").status == 200
