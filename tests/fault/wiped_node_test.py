"""A node whose disk was lost comes back under its own name."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from tests.fault.leader_loss_test import change_ttl, under_load
from tests.testkit.cluster import Cluster, Node, wait_for
from tests.testkit.invariants import Witness, check_invariants


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


def test_a_wiped_node_is_replaced_under_load(tmp_path: Path) -> None:
    """Clients of the others notice nothing: not when it dies, not while it learns, not when it is promoted."""
    with Cluster(tmp_path).start_ready() as cluster, under_load(cluster) as load:
        load.more()
        wiped = cluster.leader()
        survivor = cluster.followers()[0]
        with load.without(wiped):
            cluster.kill(wiped)
            for file in wiped.data_dir.iterdir():
                file.unlink()
            shown = change_ttl(survivor, 48)
            load.more()
            wiped.extra.append("-rejoin")
            cluster.start(wiped)
            cluster.wait_for_log("promoted", wiped)
        load.more()
        wiped.extra.clear()
        with load.without(wiped):
            assert cluster.stop(wiped) == 0
            cluster.start(wiped)  # without the flag: it has its data again
        other = next(node for node in cluster.answering if node not in (wiped, survivor))
        with load.without(other):
            cluster.kill(other)  # from here on nothing is committed without the node that was wiped
            assert wiped.get("/v1/connect/ca/configuration?consistent").json() == shown
            load.witness.saw_configuration(change_ttl(wiped, 49)["ModifyIndex"])
            cluster.start(other)
        load.more()
        load.end()

        assert load.complaints == []
        check_invariants(cluster, load.witness)


def test_a_new_cluster_in_which_one_node_shall_rejoin_says_why_it_does_not_begin(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        eager, *others = cluster.nodes
        eager.extra.append("-rejoin")
        cluster.start()

        def told(node: Node, words: str) -> bool | None:
            reply = node.try_get("/v1/status/ready")
            if reply is None:
                return None
            found = {each["Code"]: each["Reason"] for each in json.loads(reply.text)["Degraded"]}
            return True if reply.status == 503 and words in found.get("NotFounded", "") else None

        wait_for("the learner to say that there is nothing to learn", lambda: told(eager, "nothing to rejoin"))
        for node in others:
            wait_for(f"{node.name} to say whom it waits for", partial(told, node, f"{eager.name} (learner: "))

        cluster.stop(eager)
        for file in eager.data_dir.iterdir():
            file.unlink()
        eager.extra.remove("-rejoin")
        cluster.start(eager)
        cluster.wait_ready()
