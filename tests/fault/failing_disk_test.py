"""A leader whose disk fails while calls are under way ends at once: what it holds, it could never answer."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

from tests.testkit.cluster import HELD_FOR, Cluster, Node, wait_for
from tests.testkit.invariants import Witness, check_invariants

CONFIGURATION = "/v1/connect/ca/configuration"
ENDS_WITHIN = 20.0  # seconds; less than calls are held


def _try_to_write(node: Node) -> None:
    with suppress(OSError):
        node.put(CONFIGURATION, {"Provider": "consul", "Config": {"LeafCertTTL": "49h"}})


def test_a_leader_whose_disk_fails_ends_at_once_and_comes_back_whole(tmp_path: Path) -> None:
    assert ENDS_WITHIN < HELD_FOR
    cluster = Cluster(tmp_path)
    orders = {node.name: tmp_path / f"{node.name}.disk" for node in cluster}
    for node in cluster:
        node.module = ["tests.testkit.bad_disk", str(orders[node.name])]
    with cluster.start_ready():
        leader, survivor = cluster.leader(), cluster.followers()[0]
        orders[leader.name].write_text("fail")

        caller = threading.Thread(target=_try_to_write, args=(leader,))
        caller.start()
        wait_for("the leader to end", lambda: None if leader.running else True, within=ENDS_WITHIN)
        caller.join()

        assert leader.process is not None
        assert leader.process.returncode == 1
        reply = survivor.put(CONFIGURATION, {"Provider": "consul", "Config": {"LeafCertTTL": "50h"}})
        assert reply.status == 200, reply.text
        orders[leader.name].unlink()
        cluster.restart(leader)
        cluster.wait_ready()
        shown = leader.get(f"{CONFIGURATION}?consistent").json()
        assert shown["Config"]["LeafCertTTL"] == "50h"
        check_invariants(cluster, Witness())
