"""Three real nodes in calm weather: what each of them says, what survives a restart, how a node leaves."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testkit import openssl
from tests.testkit.cluster import Cluster, run_cli
from tests.testkit.invariants import Witness, check_invariants


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster for the tests that only look, or change what nobody else looks at."""
    with Cluster(tmp_path_factory.mktemp("shared")).start_ready() as cluster:
        yield cluster


def test_every_node_names_the_same_leader_and_peers(shared: Cluster) -> None:
    leader = shared.leader()

    assert {node.get("/v1/status/leader").json() for node in shared} == {leader.server_address}
    expected = sorted(node.server_address for node in shared)
    assert [sorted(node.get("/v1/status/peers").json()) for node in shared] == [expected] * 3


def test_raft_configuration_and_its_table(shared: Cluster) -> None:
    leader = shared.leader()

    servers = shared.followers()[0].get("/v1/operator/raft/configuration").json()["Servers"]
    table = run_cli("operator", "raft", "list-peers", f"-http-addr={leader.url}")

    assert {server["Node"]: server["Leader"] for server in servers} == {node.name: node is leader for node in shared}
    assert {server["Address"] for server in servers} == {node.server_address for node in shared}
    assert table.returncode == 0, table.stderr
    rows = table.stdout.splitlines()
    assert rows[0].split() == ["Node", "ID", "Address", "State", "Voter", "RaftProtocol"]
    assert len(rows) == 4
    assert next(row for row in rows if "leader" in row).startswith(leader.name)


def test_status_of_a_healthy_node(shared: Cluster) -> None:
    for node in shared:
        assert node.get("/v1/status/live").status == http.client.OK
        assert node.get("/v1/status/ready").json()["Ready"] is True


def test_a_leaf_is_cached_on_its_node(shared: Cluster) -> None:
    node = shared.followers()[0]

    first, second = (node.get("/v1/agent/connect/ca/leaf/cached") for _ in range(2))

    assert first.body == second.body
    assert (first.headers["x-cache"], second.headers["x-cache"]) == ("MISS", "HIT")


def test_a_csr_of_ones_own_is_signed_through_a_follower(shared: Cluster, tmp_path: Path) -> None:
    node = shared.followers()[0]
    roots = node.get("/v1/connect/ca/roots").json()
    uri = f"spiffe://{roots['TrustDomain']}/ns/default/dc/dc1/svc/own"
    key, csr = tmp_path / "key.pem", tmp_path / "csr.pem"
    made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(key), "-out", str(csr)]
    openssl.run("req", "-new", *made, "-subj", "/CN=own", "-addext", f"subjectAltName=URI:{uri}")

    plain = node.put("/v1/connect/ca/sign", csr.read_text())
    wrapped = node.put("/v1/connect/ca/sign", json.dumps({"CSR": csr.read_text()}))
    listed = node.put("/v1/connect/ca/sign", json.dumps({"CSRs": [csr.read_text(), "no PEM"]}))

    for leaf in (plain.json(), wrapped.json(), listed.json()[0]):
        assert leaf["ServiceURI"] == uri
        assert "PrivateKeyPEM" not in leaf
        assert openssl.accepts(tmp_path, leaf["CertPEM"], roots["Roots"][0]["RootCert"])
    assert set(listed.json()[1]) == {"Error", "Status"}


def test_the_cli_shows_roots_and_leaves(shared: Cluster) -> None:
    node = shared.followers()[0]

    roots = run_cli("connect", "ca", "roots", "-format=json", environ={"CONSUL_HTTP_ADDR": node.url})
    leaf = run_cli("connect", "ca", "leaf", "-format=json", f"-http-addr={node.url}", "web")

    assert roots.returncode == 0, roots.stderr
    assert json.loads(roots.stdout)["ActiveRootID"] == node.get("/v1/connect/ca/roots").json()["ActiveRootID"]
    assert leaf.returncode == 0, leaf.stderr
    assert "BEGIN CERTIFICATE" in leaf.stdout


def test_blocking_query_wakes_on_a_change_elsewhere(tmp_path: Path) -> None:
    with Cluster(tmp_path).start_ready() as cluster:
        watcher, writer = cluster.followers()
        index = watcher.get("/v1/connect/ca/roots").headers["x-consul-index"]
        body = {"Provider": "consul", "Config": {"PrivateKeyType": "ec", "PrivateKeyBits": 384}}

        assert writer.put("/v1/connect/ca/configuration", body).status == http.client.OK
        woken = watcher.get(f"/v1/connect/ca/roots?index={index}&wait=20s")

        assert int(woken.headers["x-consul-index"]) > int(index)
        assert len(woken.json()["Roots"]) == 2


def test_stopping_the_leader_hands_leadership_over(tmp_path: Path) -> None:
    with Cluster(tmp_path).start_ready() as cluster:
        witness = Witness()
        leader = cluster.leader()
        survivor = cluster.followers()[0]

        code = cluster.stop(leader)
        witness.leaf(survivor, "right-after")
        successor = cluster.leader()
        cluster.restart(leader)
        cluster.wait_ready()

        assert code == 0
        assert successor is not leader
        witness.roots(leader)
        check_invariants(cluster, witness)


def test_a_rolling_restart_is_not_noticed(tmp_path: Path) -> None:
    with Cluster(tmp_path).start_ready() as cluster:
        witness = Witness()
        for node in cluster.nodes:
            other = next(each for each in cluster if each is not node)
            assert cluster.stop(node) == 0
            witness.leaf(other, f"while-{node.name}-is-away")
            cluster.restart(node)
            cluster.wait_ready(node)
            witness.roots(node)

        check_invariants(cluster, witness)


def test_no_secret_is_on_disk_or_in_a_log(tmp_path: Path) -> None:
    with Cluster(tmp_path).start_ready() as cluster:
        trust_domain = cluster.nodes[0].get("/v1/connect/ca/roots").json()["TrustDomain"]
        own = openssl.make_root(tmp_path / "own", trust_domain)
        assert cluster.nodes[0].put("/v1/connect/ca/configuration", own.configuration()).status == http.client.OK
        leaf = cluster.nodes[1].get("/v1/agent/connect/ca/leaf/web").json()
        secret = json.loads(cluster.nodes[0].config_file.read_text())["cluster_secret"]
        for node in cluster.nodes:
            cluster.stop(node)

        lines = own.key.splitlines()[1:3] + leaf["PrivateKeyPEM"].splitlines()[1:2] + [secret]
        files = [file for node in cluster for file in [node.log_file, *node.data_dir.rglob("*")] if file.is_file()]
        assert any(node.data_dir.exists() for node in cluster)
        for file in files:
            content = file.read_bytes()
            assert not [line for line in lines if line.encode() in content], file
            assert file.name.endswith(".log") or f"{file.stat().st_mode & 0o777:o}" == "600", file


def test_connect_disabled_says_so_and_can_be_enabled_later(tmp_path: Path) -> None:
    with Cluster(tmp_path, names=("alone",), connect={"enabled": False}) as cluster:
        (node,) = cluster
        cluster.start()
        cluster.leader()

        refused = [node.get(path) for path in ("/v1/connect/ca/roots", "/v1/agent/connect/ca/leaf/web")]
        assert {(each.status, each.text) for each in refused} == {
            (500, "Connect must be enabled in order to use this endpoint")
        }
        cluster.stop(node)
        config = json.loads(node.config_file.read_text())
        node.config_file.write_text(json.dumps({**config, "connect": {"enabled": True}}))
        cluster.restart(node)
        cluster.wait_ready()
        assert node.get("/v1/agent/connect/ca/leaf/web").status == http.client.OK
