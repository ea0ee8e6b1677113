"""Three real nodes that ask for tokens: what one makes counts on all, what is taken away counts nowhere, and no file holds a secret."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.testkit.cluster import Cluster, Node, Reply, run_cli, wait_for

MASTER = "6c1fa2f8-7f7c-4b3b-9b0c-1d8f8d4e2a57"
ACL = {"acl": {"enabled": True, "default_policy": "deny", "tokens": {"initial_management": MASTER}}}
LEAF = "/v1/agent/connect/ca/leaf/web"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("acl"), settings=ACL).start_ready() as found:
        yield found


def asked(node: Node, path: str, token: str = "") -> Reply:
    return node.get(path, headers={"X-Consul-Token": token} if token else {})


def written(node: Node, path: str, document: object, method: str = "PUT") -> Any:
    return node.request(method, path, document, headers={"X-Consul-Token": MASTER}).json()


def token_for(node: Node, service: str) -> dict[str, Any]:
    token: dict[str, Any] = written(node, "/v1/acl/token", {"ServiceIdentities": [{"ServiceName": service}]})
    return token


def test_a_token_made_through_one_node_counts_on_all_at_once(cluster: Cluster) -> None:
    for maker in cluster:
        token = token_for(maker, "web")
        for node in cluster:
            leaf = asked(node, LEAF, token["SecretID"])
            assert leaf.status == 200, (maker.name, node.name, leaf.text)
            assert asked(node, LEAF).text == "Permission denied"
            assert asked(node, "/v1/operator/raft/configuration", token["SecretID"]).status == 403
            assert asked(node, "/v1/operator/raft/configuration", MASTER).status == 200


def test_a_deleted_token_counts_nowhere_soon_and_on_the_asked_node_at_once(cluster: Cluster) -> None:
    first, *others = cluster
    token = token_for(first, "web")
    for node in cluster:
        assert asked(node, LEAF, token["SecretID"]).status == 200

    written(first, f"/v1/acl/token/{token['AccessorID']}", None, "DELETE")

    assert asked(first, LEAF, token["SecretID"]).text == "ACL not found"
    for node in others:
        wait_for(f"{node.name} to refuse", lambda: asked(node, LEAF, token["SecretID"]).status == 403 or None)  # noqa: B023 - called at once


def test_tokens_survive_a_restart_of_all_and_no_file_holds_a_secret(cluster: Cluster) -> None:
    token = token_for(cluster.leader(), "web")
    for node in cluster:
        assert cluster.stop(node) == 0
    cluster.start()
    cluster.wait_ready()

    for node in cluster:
        assert asked(node, LEAF, token["SecretID"]).status == 200
        assert asked(node, "/v1/acl/tokens", MASTER).status == 200
        assert asked(node, f"{LEAF}?token={token['SecretID']}").status == 200
        assert asked(node, "/v1/acl/tokens", token["SecretID"]).status == 403
        assert f"?token={token['SecretID']}" not in node.log
    for secret in (token["SecretID"], MASTER):
        for node in cluster:
            files = [path for path in node.data_dir.rglob("*") if path.is_file()]
            assert files
            for path in (node.log_file, *files):
                assert secret.encode() not in path.read_bytes(), path.name
    assert any("access denied" in node.log and token["AccessorID"] in node.log for node in cluster)


def test_an_operator_who_lost_every_token_bootstraps_again_with_the_reset_file(cluster: Cluster) -> None:
    leader = cluster.leader()
    refused = run_cli("acl", "bootstrap", f"-http-addr={leader.url}")
    assert refused.returncode == 1
    index = int(refused.stderr.partition("reset index: ")[2].partition(")")[0])

    (leader.data_dir / "acl-bootstrap-reset").write_text(f"{index}\n")
    done = run_cli("acl", "bootstrap", f"-http-addr={leader.url}", "-format=json")

    assert done.returncode == 0, done.stderr
    assert asked(leader, "/v1/acl/tokens", json.loads(done.stdout)["SecretID"]).status == 200
    assert not (leader.data_dir / "acl-bootstrap-reset").exists()
    assert run_cli("acl", "bootstrap", f"-http-addr={leader.url}").returncode == 1


def test_the_command_line_gives_a_service_its_token(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.followers()[0]
    environ = {**os.environ, "CONSUL_HTTP_ADDR": node.url, "CONSUL_HTTP_TOKEN": MASTER}
    rules = tmp_path / "db.hcl"
    rules.write_text('service "db" { policy = "write" }\n')

    policy = run_cli("acl", "policy", "create", "-name=db", f"-rules=@{rules}", environ=environ)
    token = run_cli("acl", "token", "create", "-policy-name=db", "-format=json", environ=environ)
    assert (policy.returncode, token.returncode) == (0, 0), policy.stderr + token.stderr
    secret = tmp_path / "secret"
    secret.write_text(json.loads(token.stdout)["SecretID"])
    leaf = run_cli("connect", "ca", "leaf", f"-token-file={secret}", "db", environ={"CONSUL_HTTP_ADDR": node.url})
    other = run_cli("connect", "ca", "leaf", f"-token-file={secret}", "web", environ={"CONSUL_HTTP_ADDR": node.url})

    assert leaf.returncode == 0, leaf.stderr
    assert other.returncode == 1
    assert "403 (Permission denied)" in other.stderr
