"""A node whose disk was lost comes back under its own name."""

from __future__ import annotations

from pathlib import Path

from tests.testkit.cluster import Cluster, Node, wait_for
from tests.testkit.invariants import Witness


def ready(node: Node) -> list[str]:
    """Codes of what is amiss with a node that serves."""
    return [each["Code"] for each in node.get("/v1/status/ready").json()["Degraded"]]


def test_a_wiped_node_counts_for_nothing_until_it_rejoins(tmp_path: Path) -> None:
    """Its empty journal must not help anybody to a majority; with -rejoin it catches up and counts again."""
    with Cluster(tmp_path).start_ready() as cluster:
        witness = Witness()
        wiped = cluster.followers()[0]
        other = next(node for node in cluster.followers() if node is not wiped)
        shown = cluster.leader().get("/v1/connect/ca/configuration").json()
        cluster.kill(wiped)
        for file in wiped.data_dir.iterdir():
            file.unlink()

        cluster.start(wiped)
        wait_for("the wiped node to refuse", lambda: None if wiped.running else True)
        assert "-rejoin" in wiped.log

        wiped.extra.append("-rejoin")
        cluster.start(wiped)
        cluster.wait_ready(wiped)
        wait_for("the node to have a vote again", lambda: None if "NotAVoter" in ready(wiped) else True)
        cluster.kill(next(node for node in cluster.answering if node is not wiped and node is not other))
        assert wiped.get("/v1/connect/ca/configuration?consistent").json() == shown
        witness.leaf(wiped, "after-the-rejoin")
        witness.leaf(other, "after-the-rejoin")
