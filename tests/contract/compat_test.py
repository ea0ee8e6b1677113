"""py-consul, unmodified, against a node that asks for tokens: what its users call of the CA works as it does with Consul."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from consul import Consul  # type: ignore[import-untyped]
from consul.exceptions import ACLPermissionDenied, BadRequest  # type: ignore[import-untyped]

from tests.testkit.acl_world import MASTER
from tests.testkit.cluster import Cluster, Node
from tests.testkit.invariants import verifies

SETTINGS = {"acl": {"enabled": True, "default_policy": "deny", "tokens": {"initial_management": MASTER}}}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Cluster(tmp_path_factory.mktemp("compat"), ("n1",), dev=True, settings=SETTINGS).start_ready() as cluster:
        yield cluster.nodes[0]


@pytest.fixture(scope="module")
def open_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node that asks for no tokens: py-consul sends none with some of its calls."""
    with Cluster(tmp_path_factory.mktemp("open"), ("n1",), dev=True).start_ready() as cluster:
        yield cluster.nodes[0]


def connected(node: Node, token: str | None) -> Any:
    return Consul(host=node.address, port=node.http_port, token=token)


@pytest.fixture
def consul(node: Node) -> Iterator[Any]:
    found = connected(node, MASTER)
    with closing(found.http.session):
        yield found


@pytest.fixture
def open_consul(open_node: Node) -> Iterator[Any]:
    found = connected(open_node, None)
    with closing(found.http.session):
        yield found


@pytest.fixture
def stranger(node: Node) -> Iterator[Any]:
    found = connected(node, None)
    with closing(found.http.session):
        yield found


def test_roots_and_leaf(consul: Any) -> None:
    roots = consul.connect.ca.roots()
    leaf = consul.agent.connect.ca.leaf("web")
    again = consul.agent.connect.ca.roots()

    active = next(root for root in roots["Roots"] if root["Active"])
    assert active["ID"] == roots["ActiveRootID"] == again["ActiveRootID"]
    assert leaf["Service"] == "web"
    assert leaf["ServiceURI"] == f"spiffe://{roots['TrustDomain']}/ns/default/dc/dc1/svc/web"
    assert verifies(leaf["CertPEM"], {active["RootCert"]})


def test_configuration_is_read_and_replaced(consul: Any) -> None:
    assert consul.connect.ca.update_configuration("consul", {"LeafCertTTL": "48h"}) is True
    shown = consul.connect.ca.configuration()

    assert (shown["Provider"], shown["Config"]["LeafCertTTL"]) == ("consul", "48h")
    with pytest.raises(BadRequest, match="leaf cert TTL must be greater or equal than 1h0m0s"):
        consul.connect.ca.update_configuration("consul", {"LeafCertTTL": "1m"})


def test_status_and_the_servers(consul: Any, node: Node, open_consul: Any) -> None:
    assert consul.status.leader() == node.server_address
    assert consul.status.peers() == [node.server_address]
    (server,) = open_consul.operator.raft_config()["Servers"]
    assert (server["Node"], server["Leader"], server["Voter"]) == ("n1", True, True)
    assert consul.operator.autopilot_health()["Healthy"] is True
    assert consul.operator.autopilot_configuration()["MaxTrailingLogs"] == 250
    with pytest.raises(BadRequest, match="not found in the Raft configuration"):
        consul.operator.raft_remove_peer(peer_id="n9")


def test_the_agent_and_its_node(consul: Any, open_consul: Any) -> None:
    assert open_consul.agent.self()["Config"]["NodeName"] == "n1"
    assert [member["Name"] for member in open_consul.agent.members()] == ["n1"]
    _, nodes = consul.catalog.nodes()
    assert [each["Node"] for each in nodes] == ["n1"]
    _, checks = consul.health.node("n1")
    assert {check["Status"] for check in checks} == {"passing"}
    assert consul.agent.metrics()["Gauges"]


def test_a_snapshot_is_saved_and_restored(consul: Any) -> None:
    before = consul.connect.ca.roots()
    saved = consul.snapshot.save()
    assert consul.connect.ca.update_configuration("consul", {"PrivateKeyBits": 384}) is True
    assert consul.connect.ca.roots()["ActiveRootID"] != before["ActiveRootID"]
    assert consul.snapshot.restore(saved) is True
    after = consul.connect.ca.roots()

    assert [root["ID"] for root in after["Roots"]] == [root["ID"] for root in before["Roots"]]
    with pytest.raises(BadRequest, match="not compressed as snapshots are"):
        consul.snapshot.restore(b"junk")


def test_tokens_and_policies(consul: Any, node: Node) -> None:
    policy = consul.acl.policy.create(
        "web", description="leaves of web", rules={"service": {"web": {"policy": "write"}}}
    )
    made = consul.acl.token.create(policies_id=[policy["ID"]], description="for web")
    assert consul.acl.policy.read(policy["ID"])["Name"] == "web"
    assert policy["ID"] in [each["ID"] for each in consul.acl.policy.list()]
    assert made["AccessorID"] in [each["AccessorID"] for each in consul.acl.token.list()]
    limited = connected(node, made["SecretID"])
    with closing(limited.http.session):
        assert limited.acl.token.read_self()["AccessorID"] == made["AccessorID"]
        assert limited.agent.connect.ca.leaf("web")["Service"] == "web"
        with pytest.raises(ACLPermissionDenied):
            limited.agent.connect.ca.leaf("db")
        with pytest.raises(ACLPermissionDenied):
            limited.snapshot.save()
        with pytest.raises(ACLPermissionDenied):
            limited.snapshot.restore(b"never looked at")

        # What was made after a snapshot is gone with its restore, and what was deleted is back.
        saved = consul.snapshot.save()
        late = consul.acl.token.create(description="late")
        assert consul.acl.token.delete(made["AccessorID"]) is True
        assert consul.snapshot.restore(saved) is True
        accessors = {each["AccessorID"] for each in consul.acl.token.list()}
        assert made["AccessorID"] in accessors
        assert late["AccessorID"] not in accessors
        assert limited.agent.connect.ca.leaf("web")["Service"] == "web"

    clone = consul.acl.token.clone(made["AccessorID"], description="another")
    assert clone["SecretID"] != made["SecretID"]
    assert consul.acl.token.delete(clone["AccessorID"]) is True
    assert consul.acl.policy.delete(policy["ID"]) is True
    with pytest.raises(ACLPermissionDenied):
        consul.acl.bootstrap()


def test_without_a_token_the_bundle_is_all_there_is(stranger: Any) -> None:
    assert stranger.connect.ca.roots()["Roots"]
    for refused in (
        stranger.connect.ca.configuration,
        stranger.snapshot.save,
        stranger.acl.token.list,
        stranger.operator.raft_config,
        lambda: stranger.agent.connect.ca.leaf("web"),
    ):
        with pytest.raises(ACLPermissionDenied):
            refused()
