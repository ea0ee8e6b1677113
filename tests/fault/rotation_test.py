"""The leader dies in the middle of a rotation: the old state or the new one, never a mix, and leaves go on."""

from __future__ import annotations

import http.client
import threading
from pathlib import Path
from typing import Any

from tests.testkit.cluster import Cluster, Node, Reply, wait_for
from tests.testkit.invariants import Witness, check_invariants

DELAYS = (0.0, 0.01, 0.02, 0.04, 0.08)  # seconds from the request to the kill; a rotation takes some 50 ms
SIZES = (384, 521)  # in turns, so that each change is a rotation


def active(roots: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(root for root in roots["Roots"] if root["ID"] == roots["ActiveRootID"])
    return found


class Change(threading.Thread):
    """A rotation asked for through one node, while the test does harm."""

    def __init__(self, node: Node, bits: int) -> None:
        super().__init__(name=f"rotate-{bits}")
        self._node = node
        self._body = {"Provider": "consul", "Config": {"PrivateKeyType": "ec", "PrivateKeyBits": bits}}
        self.sent = threading.Event()
        self.reply: Reply | None = None

    def run(self) -> None:
        self.sent.set()
        self.reply = self._node.put("/v1/connect/ca/configuration", self._body)


def test_sigkill_of_the_leader_in_the_middle_of_a_rotation(tmp_path: Path) -> None:
    with Cluster(tmp_path).start_ready() as cluster:
        witness = Witness()
        for number, delay in enumerate(DELAYS):
            bits = SIZES[number % 2]
            leader, through = cluster.leader(), cluster.followers()[0]
            witness.roots(through)
            witness.leaf(through, f"before-{number}")
            change = Change(through, bits)
            change.start()
            change.sent.wait()
            threading.Event().wait(delay)
            cluster.kill(leader)
            leaf = witness.leaf(through, f"during-{number}")
            change.join()

            assert leaf["CertPEM"]
            assert change.reply is not None
            cluster.restart(leader)
            cluster.wait_ready()
            check_outcome(through, change.reply, bits)
            check_invariants(cluster, witness)


def check_outcome(node: Node, reply: Reply, bits: int) -> None:
    """Acknowledged means done; an outcome that nobody knows may be either, and says so."""

    def told() -> tuple[bool, bool]:
        done = active(node.get("/v1/connect/ca/roots?consistent").json())["PrivateKeyBits"] == bits
        return done, node.get("/v1/connect/ca/configuration?consistent").json()["Config"].get("PrivateKeyBits") == bits

    # The next leader may finish the change between the two answers.
    wait_for("root and configuration to be of one change", lambda: True if len(set(told())) == 1 else None)
    done, _ = told()
    if reply.status == http.client.OK:
        assert done
    else:
        assert reply.status == http.client.SERVICE_UNAVAILABLE, reply.text
