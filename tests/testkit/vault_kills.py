"""Leaders that die in the middle of rotations to, from and between CAs at a Vault server: nothing is lost or left behind.

The short form is ``tests/fault/vault_kill_test.py``, the long one ``scripts/vault-kills``.
"""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Callable
from typing import Any

from tests.testkit.cluster import Cluster, Node, Reply, wait_for
from tests.testkit.invariants import Witness, check_invariants
from tests.testkit.openbao import Server, unique

DELAY_MAX = 0.6  # seconds from the request to the kill; such a rotation takes some 300 ms
TIDY_WITHIN = 240.0  # seconds: a leader watches its clock for a minute before it removes anything


class Change(threading.Thread):
    """A rotation asked for through one node, while the test does harm."""

    def __init__(self, node: Node, body: dict[str, Any]) -> None:
        super().__init__(name="rotate")
        self._node = node
        self._body = body
        self.sent = threading.Event()
        self.reply: Reply | None = None

    def run(self) -> None:
        self.sent.set()
        self.reply = self._node.put("/v1/connect/ca/configuration", self._body)


def configurations(server: Server) -> list[dict[str, Any]]:
    """What is rotated between, in turns."""
    first, second, signers, others = (unique(name) for name in ("root", "root", "intermediate", "intermediate"))
    access = {"Address": server.address, "Token": server.token}

    def vault(root: str, intermediate: str) -> dict[str, Any]:
        return {"Provider": "vault", "Config": {**access, "RootPKIPath": root, "IntermediatePKIPath": intermediate}}

    return [
        vault(first, signers),
        vault(second, signers),
        {"Provider": "consul", "Config": {"PrivateKeyBits": 384}},
        vault(second, others),
        vault(first, others),
    ]


def kill_leaders(
    cluster: Cluster, server: Server, *, kills: int, seed: int, tell: Callable[[str], None] = lambda _: None
) -> None:
    """Kill the leader ``kills`` times while it rotates, then wait until nothing is left of what came to nothing."""
    chance, witness, wanted = random.Random(seed), Witness(), configurations(server)
    for number in range(kills):
        body, delay = wanted[number % len(wanted)], chance.uniform(0.0, DELAY_MAX)
        leader, through = cluster.leader(), cluster.followers()[0]
        witness.roots(through)
        witness.leaf(through, f"before-{number}")
        change = Change(through, body)
        change.start()
        change.sent.wait()
        threading.Event().wait(delay)
        cluster.kill(leader)
        witness.leaf(through, f"during-{number}")
        change.join()
        assert change.reply is not None
        cluster.restart(leader)
        cluster.wait_ready()
        bring_about(through, body)
        witness.leaf(through, f"after-{number}")
        check_invariants(cluster, witness)
        tell(f"kill {number + 1} of {kills} after {delay * 1000:.0f} ms: the change was answered {change.reply.status}")
    wait_for(
        "the server to hold what is in force alone", lambda: True if tidy(cluster, server) else None, within=TIDY_WITHIN
    )


def bring_about(node: Node, body: dict[str, Any]) -> None:
    """Have the change in force, whatever became of it when its leader died; equal configurations change nothing."""

    def done() -> bool | None:
        reply = node.put("/v1/connect/ca/configuration", body)
        if reply.status == http.client.OK:
            return True
        assert reply.status in (http.client.SERVICE_UNAVAILABLE, http.client.BAD_GATEWAY), reply.text
        return None

    wait_for("the change to be made", done)


def tidy(cluster: Cluster, server: Server) -> bool:
    """Whether the one issuer that signs is all that the cluster has at the intermediate paths, or nothing is."""
    roots = cluster.leader().get("/v1/connect/ca/roots").json()
    domain = roots["TrustDomain"].partition(".")[0]
    active = next(root for root in roots["Roots"] if root["Active"])
    left = [
        facts["key_name"]
        for path in server.mounts()
        if path.startswith("intermediate")
        for facts in server.keys_of(path).values()
        if domain in facts["key_name"]
    ]
    return len(left) == (1 if active["Name"].startswith("Vault") else 0)
