"""Configuration files as servers of Consul have them: a single server's starts a node as it is, a cluster's says what to add."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from caserver.config.agent_config import AgentConfig
from caserver.errors import InvalidConfig
from caserver.pki.tls import context_of_files
from caserver.state.configuration import parse_bootstrap
from tests.testkit.cluster import LOOPBACK, Node, agent_command, free_ports, wait_for
from tests.testkit.web_certs import WebCA

FILES = Path(__file__).parent / "data" / "consul_files"
SINGLE = sorted((FILES / "single").iterdir())
CLUSTER = sorted((FILES / "cluster").iterdir())
# Of a start script, beside the files.
FLAGS = ("-server", "-ui", "-encrypt=x", "-pid-file", "/run/consul.pid", "-retry-max=3", "-node-meta", "rack:1")
SECRET = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


def placed(file: Path, directory: Path) -> Path:
    """A copy of ``file`` whose paths lead to ``directory``, where the certificates are that it names."""
    WebCA(directory).issue("server")
    copy = directory / file.name
    copy.touch(mode=0o600)
    copy.write_text(file.read_text().replace("@DIR@", str(directory)))
    return copy


def load(*files: Path) -> AgentConfig:
    return AgentConfig.load(
        [str(file) for file in files],
        flags={},
        environ={},
        hostname="consul-server-0",
        judge_ca=lambda connect: parse_bootstrap(connect.ca_provider, connect.ca_config),
        judge_tls=context_of_files,
    )


@pytest.mark.parametrize("file", SINGLE, ids=lambda file: file.name)
def test_the_file_of_a_single_server_is_taken_as_it_is(tmp_path: Path, file: Path) -> None:
    config = load(placed(file, tmp_path))
    ignored = [line for line in config.warnings if "keys of Consul without a meaning here" in line]

    assert config.connect.enabled
    assert config.peers == {}
    assert len(ignored) == 1
    assert " server" in ignored[0]


def test_what_a_file_means_here_is_in_force(tmp_path: Path) -> None:
    guide = load(placed(FILES / "single" / "deployment_guide.hcl", tmp_path))
    kubernetes = load(placed(FILES / "single" / "kubernetes.json", tmp_path))
    cloud = load(placed(FILES / "single" / "cloud.hcl", tmp_path))
    acl = load(placed(FILES / "single" / "acl.json", tmp_path))

    assert guide.tls is not None
    assert (guide.tls.verify_incoming, guide.tls.cipher_suites) == (True, ("ECDHE-ECDSA-AES128-GCM-SHA256",))
    assert (guide.datacenter, guide.limits.http_max_conns_per_client) == ("site-a", 100)
    assert guide.http.block_endpoints == ("/v1/agent/reload",)
    assert kubernetes.tls is not None
    assert (kubernetes.tls.verify_incoming, kubernetes.tls.min_version) == (False, "tls12")
    assert kubernetes.exposed == ("0.0.0.0",)  # noqa: S104 - as the file has it
    assert acl.acl.initial_management is not None
    assert (acl.acl.enabled, acl.acl.default_allow) == (True, False)
    assert (cloud.listen.http, cloud.connect.authorize_default) == ((LOOPBACK,), "deny")


@pytest.mark.parametrize("file", CLUSTER, ids=lambda file: file.name)
def test_the_file_of_a_cluster_says_which_blocks_to_add(tmp_path: Path, file: Path) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load(placed(file, tmp_path))

    assert "servers find each other by peer blocks" in caught.value.detail
    assert 'peer "<node_name of 10.' in caught.value.detail


@pytest.mark.parametrize("file", CLUSTER, ids=lambda file: file.name)
def test_with_the_blocks_and_a_secret_it_is_taken(tmp_path: Path, file: Path) -> None:
    added = tmp_path / "z.hcl"
    added.touch(mode=0o600)
    blocks = "\n".join(f'peer "n{each}" {{ address = "10.0.0.{each}" }}' for each in (1, 2, 3))
    added.write_text(f'node_name = "n1"\ncluster_secret = "{SECRET}"\n{blocks}\n')

    config = load(placed(file, tmp_path), added)

    assert sorted(config.peers) == ["n1", "n2", "n3"]
    assert config.warnings[-1].count("bootstrap_expect") == 1


@pytest.mark.parametrize(
    "joins",
    [
        {"retry_join": ["10.9.9.9"], "bootstrap_expect": 1},
        {"retry_join": ["127.0.0.1", "other.example"], "bootstrap": True},
        {"retry_join": ["127.0.0.1"]},
        {"start_join": ["127.0.0.1"], "bootstrap_expect": 2},
    ],
)
def test_who_names_another_server_is_none_of_its_own(tmp_path: Path, joins: dict[str, object]) -> None:
    file = tmp_path / "n.json"
    file.write_text(json.dumps({"data_dir": str(tmp_path / "d"), **joins}))

    with pytest.raises(InvalidConfig, match="servers find each other by peer blocks"):
        load(file)


def test_access_control_in_the_older_keys_is_refused_not_ignored(tmp_path: Path) -> None:
    file = tmp_path / "n.json"
    older = {"acl_master_token": "x" * 36, "acl_default_policy": "deny", "acl_datacenter": "dc1"}
    file.write_text(json.dumps({"data_dir": str(tmp_path / "d"), **older}))

    with pytest.raises(InvalidConfig) as caught:
        load(file)

    lines = caught.value.detail.splitlines()
    assert len(lines) == 3
    assert any("acl { tokens { initial_management = ... } }" in line for line in lines)
    assert "xxx" not in caught.value.detail


def test_a_node_that_was_started_with_such_a_file_serves(tmp_path: Path) -> None:
    file = placed(FILES / "single" / "configuration_management.json", tmp_path)
    http, server, forward = free_ports(3)
    ports = tmp_path / "ports.json"
    ports.write_text(json.dumps({"ports": {"http": http, "server": server, "forward": forward}}))
    node = Node("lab-1", tmp_path, http_port=http, server_port=server, forward_port=forward)
    with (tmp_path / "log").open("wb") as log:
        command = agent_command("agent", f"-config-file={file}", f"-config-file={ports}", *FLAGS)
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        leaf = wait_for("a leaf", lambda: node.try_get("/v1/agent/connect/ca/leaf/web"))
        settings = node.get("/v1/agent/self").json()
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()

    assert leaf.json()["Service"] == "web"
    assert "/dc/lab/" in leaf.json()["ServiceURI"]
    assert settings["DebugConfig"]["HTTPAddrs"] == [f"tcp://127.0.0.1:{http}", f"unix://{tmp_path}/http.sock"]
    assert code == 0
