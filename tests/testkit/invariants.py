"""What must be true of every cluster after every test, whatever was killed: a witness remembers, and judges at the end.

acknowledged means kept; one active root; serials are unique; every leaf verifies against every bundle that was served
while it lived; an index never goes back; all nodes tell the same.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509 import Certificate

from tests.testkit.cluster import Cluster, Node, wait_for

SAME = ("ID", "RootCert", "IntermediateCerts", "Active", "CreateIndex", "ModifyIndex")


@dataclass(slots=True)
class Witness:
    """What clients were told in the course of a test. Threads may report at the same time."""

    leaves: list[dict[str, Any]] = field(default_factory=list)
    bundles: dict[tuple[str, ...], set[str]] = field(default_factory=dict)  # root ids -> PEMs, each version served
    newest_index: dict[str, int] = field(default_factory=dict)  # node -> highest X-Consul-Index of its roots
    configuration_index: int = 0  # of the newest acknowledged configuration
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def saw_leaf(self, leaf: dict[str, Any]) -> dict[str, Any]:
        """A leaf that a client was given."""
        with self._lock:
            self.leaves.append(leaf)
        return leaf

    def index_known_to(self, node: Node) -> int:
        """The highest index of roots that clients of ``node`` were told so far."""
        with self._lock:
            return self.newest_index.get(node.name, 0)

    def saw_roots(self, node: Node, roots: dict[str, Any], index: int, *, known: int) -> dict[str, Any]:
        """A bundle that a client was given by ``node``; two nodes' answers may be of different ages, one node's not.

        ``known`` is what ``index_known_to`` said before it was asked for: of two questions at a time either answer is first.
        """
        actives = [root["ID"] for root in roots["Roots"] if root["Active"]]
        assert actives == [roots["ActiveRootID"]], f"not exactly one active root: {actives}"
        with self._lock:
            pems = {root["RootCert"] for root in roots["Roots"]}
            self.bundles[tuple(root["ID"] for root in roots["Roots"])] = pems
            assert index >= known, f"the index of {node.name} went back from {known} to {index}"
            self.newest_index[node.name] = max(index, self.newest_index.get(node.name, 0))
        return roots

    def saw_configuration(self, modify_index: int) -> None:
        """An acknowledged change of the configuration, or a read of it."""
        with self._lock:
            assert modify_index >= self.configuration_index, "an acknowledged configuration was lost"
            self.configuration_index = modify_index

    def leaf(self, node: Node, service: str) -> dict[str, Any]:
        """Fetch a leaf through ``node`` and remember it."""
        leaf: dict[str, Any] = node.get(f"/v1/agent/connect/ca/leaf/{service}").json()
        return self.saw_leaf(leaf)

    def roots(self, node: Node) -> dict[str, Any]:
        """Fetch the roots through ``node`` and remember them."""
        known = self.index_known_to(node)
        reply = node.get("/v1/connect/ca/roots")
        return self.saw_roots(node, reply.json(), int(reply.headers["x-consul-index"]), known=known)


def check_invariants(cluster: Cluster, witness: Witness) -> None:
    """Judge a cluster all of whose nodes run and can reach each other."""
    told = _what_all_tell(cluster)
    for node in cluster.answering:
        witness.roots(node)
        witness.saw_configuration(node.get("/v1/connect/ca/configuration").json()["ModifyIndex"])
    _check_serials(witness.leaves)
    listed = {root["ID"] for root in told["Roots"]}
    for ids, pems in witness.bundles.items():
        assert set(ids) <= listed, f"a root that was served is gone: {set(ids) - listed}"
        for leaf in witness.leaves:
            if _was_trusted(leaf, pems):
                assert verifies(leaf["CertPEM"], pems), f"{leaf['ServiceURI']} does not verify under {ids}"


def _what_all_tell(cluster: Cluster) -> dict[str, Any]:
    """Every node's own (stale) roots, once they are the same."""

    def same() -> dict[str, Any] | None:
        told = [node.get("/v1/connect/ca/roots?stale").json() for node in cluster.answering]
        essence = [[{key: root[key] for key in SAME} for root in roots["Roots"]] for roots in told]
        return told[0] if all(each == essence[0] for each in essence) else None

    return wait_for("all nodes to tell the same roots", same)


def _check_serials(leaves: list[dict[str, Any]]) -> None:
    """One serial, one certificate (a cached leaf may be seen many times)."""
    by_serial: dict[str, str] = {}
    for leaf in leaves:
        first = by_serial.setdefault(leaf["SerialNumber"], leaf["CertPEM"])
        assert first == leaf["CertPEM"], f"serial {leaf['SerialNumber']} was given to two certificates"


def _was_trusted(leaf: dict[str, Any], bundle: set[str]) -> bool:
    """Whether a holder of ``bundle`` has to accept the leaf: its signer's root is listed, or a hop of its chain leads there."""
    chain = x509.load_pem_x509_certificates(leaf["CertPEM"].encode())
    subjects = {root.subject for root in roots_of(bundle)}
    return any(certificate.issuer in subjects for certificate in chain)


def roots_of(bundle: set[str]) -> list[Certificate]:
    return [x509.load_pem_x509_certificate(pem.encode()) for pem in bundle]


def verifies(chain_pem: str, bundle: set[str]) -> bool:
    """Whether the first certificate of ``chain_pem`` leads to a root of ``bundle`` through the others, by signatures."""
    leaf, *rest = x509.load_pem_x509_certificates(chain_pem.encode())
    return _leads_to(leaf, rest, roots_of(bundle))


def _leads_to(certificate: Certificate, rest: list[Certificate], roots: list[Certificate]) -> bool:
    if any(_issued(root, certificate) for root in roots):
        return True
    issuers = [each for each in rest if _issued(each, certificate)]
    return any(_leads_to(each, [other for other in rest if other is not each], roots) for each in issuers)


def _issued(issuer: Certificate, certificate: Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True
