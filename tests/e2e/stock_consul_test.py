"""A stock Consul 1.8.7 client against three caserver nodes, and caserver's own commands against the same: they say the same."""

from __future__ import annotations

import http.client
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testkit import consul as stock
from tests.testkit.cluster import Cluster, Node, run_cli

pytestmark = pytest.mark.skipif(
    stock.binary() is None, reason="there is no Consul 1.8 client on this machine; scripts/consul fetches one"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("stock")).start_ready() as found:
        yield found


@pytest.fixture
def node(cluster: Cluster) -> Node:
    return cluster.followers()[0]


def at(node: Node) -> str:
    return f"-http-addr={node.address}:{node.http_port}"


def theirs(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return stock.consul(*arguments, cwd=tmp_path)


def ours(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_cli(*arguments)


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "ca.json"
    path.write_text(text)
    return f"-config-file={path}"


@pytest.mark.parametrize(
    "words",
    [
        ("connect", "ca", "get-config"),
        ("connect", "ca", "get-config", "-stale", "-datacenter=dc1", "extra"),
        ("connect", "ca", "get-config", "-datacenter=nope"),
        ("operator", "raft", "list-peers"),
        ("operator", "raft", "list-peers", "-stale"),
        ("operator", "raft", "remove-peer", "-id=n1"),
        ("operator", "raft", "remove-peer", "-address=1.2.3.4:5"),
        ("operator", "autopilot", "get-config"),
        ("members",),
        ("members", "-detailed", "-wan"),
        ("members", "-status=failed"),
        ("reload",),
    ],
    ids=" ".join,
)
def test_reading_commands_say_the_same(tmp_path: Path, node: Node, words: tuple[str, ...]) -> None:
    verb = [word for word in words if not word.startswith("-") and word != "extra"]
    rest = words[len(verb) :]  # Go reads no flags behind the first argument
    expected, found = theirs(tmp_path, *verb, at(node), *rest), ours(*verb, at(node), *rest)

    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout), found.stderr
    assert found.stderr.startswith(expected.stderr.rstrip("\n"))


def test_info_says_the_same_but_for_what_moves(tmp_path: Path, node: Node) -> None:
    expected, found = theirs(tmp_path, "info", at(node)).stdout, ours("info", at(node)).stdout
    names = [line.partition("=")[0] for line in expected.rstrip("\n").splitlines()]

    assert [line.partition("=")[0] for line in found.splitlines()] == names
    assert found.splitlines()[:4] == expected.splitlines()[:4]


@pytest.mark.parametrize(
    "text",
    [
        '{"Provider":"consul","Config":{"LeafCertTTL":"48h"}}',
        '{"Provider":"consul","Config":{"LeafCertTTL":"1m"}}',
        '{"Provider":"nope","Config":{}}',
        '{"Provider":"consul","Config":{},"Extra":1}',
        "{broken",
        "",
    ],
)
def test_set_config_says_the_same(tmp_path: Path, node: Node, text: str) -> None:
    flag = written(tmp_path, text)
    expected = theirs(tmp_path, "connect", "ca", "set-config", at(node), flag)
    found = ours("connect", "ca", "set-config", at(node), flag)

    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert expected.returncode == (0 if "48h" in text or "Extra" in text else 1)
    assert expected.stderr.splitlines()[:1] in (
        [],
        [line for line in found.stderr.splitlines() if "Ignoring" not in line][:1],
    )


def test_what_get_config_prints_set_config_takes(tmp_path: Path, node: Node) -> None:
    printed = theirs(tmp_path, "connect", "ca", "get-config", at(node)).stdout
    before = node.get("/v1/connect/ca/roots").json()
    done = theirs(tmp_path, "connect", "ca", "set-config", at(node), written(tmp_path, printed))

    assert (done.returncode, done.stdout) == (0, "Configuration updated!\n")
    assert node.get("/v1/connect/ca/roots").json()["ActiveRootID"] == before["ActiveRootID"]


def test_a_rotation_and_its_way_back_by_a_snapshot(tmp_path: Path, node: Node) -> None:
    before = node.get("/v1/connect/ca/roots").json()
    saved = theirs(tmp_path, "snapshot", "save", at(node), "backup.snap")
    index = node.get("/v1/snapshot?stale").headers["x-consul-index"]
    assert (saved.returncode, saved.stderr) == (0, "")
    assert saved.stdout == f"Saved and verified snapshot to index {index}\n"

    rotated = written(tmp_path, json.dumps({"Provider": "consul", "Config": {"PrivateKeyBits": 384}}))
    assert theirs(tmp_path, "connect", "ca", "set-config", at(node), rotated).returncode == 0
    assert node.get("/v1/connect/ca/roots").json()["ActiveRootID"] != before["ActiveRootID"]

    restored = theirs(tmp_path, "snapshot", "restore", at(node), "backup.snap")
    assert (restored.returncode, restored.stdout, restored.stderr) == (0, "Restored snapshot\n", "")
    after = node.get("/v1/connect/ca/roots").json()
    assert [root["ID"] for root in after["Roots"]] == [root["ID"] for root in before["Roots"]]
    assert node.get("/v1/agent/connect/ca/leaf/web").status == http.client.OK


@pytest.mark.parametrize("save", [theirs, lambda _, *words: ours(*words)], ids=["theirs", "ours"])
def test_either_inspects_what_either_saved(tmp_path: Path, node: Node, save: object) -> None:
    path = tmp_path / "backup.snap"
    done = save(tmp_path, "snapshot", "save", at(node), "-stale", str(path))  # type: ignore[operator]
    assert done.returncode == 0, done.stderr
    expected, found = theirs(tmp_path, "snapshot", "inspect", str(path)), ours("snapshot", "inspect", str(path))

    assert (found.returncode, found.stdout, found.stderr) == (0, expected.stdout, expected.stderr)


def test_a_damaged_file_is_noticed_by_both(tmp_path: Path, node: Node) -> None:
    path = tmp_path / "backup.snap"
    assert ours("snapshot", "save", at(node), str(path)).returncode == 0
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    for inspected in (theirs(tmp_path, "snapshot", "inspect", str(path)), ours("snapshot", "inspect", str(path))):
        assert (inspected.returncode, inspected.stdout) == (1, "")
        assert inspected.stderr.startswith("Error verifying snapshot: ")
    refused = theirs(tmp_path, "snapshot", "restore", at(node), str(path))

    assert refused.returncode == 1
    assert refused.stderr.startswith("Error restoring snapshot: Unexpected response code: 400 (the snapshot")


@pytest.mark.parametrize(
    "words",
    [
        ("snapshot", "save"),
        ("snapshot", "save", "a", "b"),
        ("snapshot", "inspect"),
        ("snapshot", "restore"),
        ("snapshot", "restore", "nope.tgz"),
        ("snapshot", "inspect", "nope.tgz"),
        ("operator", "raft", "remove-peer"),
        ("connect", "ca", "set-config"),
        ("connect", "ca", "set-config", "-config-file=nope.json"),
        ("connect", "ca", "get-config", "-http-addr=127.0.0.1:1"),
        ("operator", "raft", "list-peers", "-http-addr=127.0.0.1:1"),
        ("snapshot", "save", "-http-addr=127.0.0.1:1", "x"),
    ],
    ids=" ".join,
)
def test_misuse_is_said_in_the_same_words(tmp_path: Path, words: tuple[str, ...]) -> None:
    expected, found = theirs(tmp_path, *words), ours(*words)

    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout) == (1, "")
    assert found.stderr.startswith(expected.stderr.rstrip("\n"))


def test_access_control_from_its_bootstrap_to_a_restore(tmp_path: Path) -> None:
    settings = {"acl": {"enabled": True, "default_policy": "deny"}}
    with Cluster(tmp_path / "guarded", ("n1",), dev=True, settings=settings).start_ready() as guarded:
        (node,) = guarded

        def run(*words: str, token: str = "") -> subprocess.CompletedProcess[str]:
            environ = {"CONSUL_HTTP_ADDR": f"{node.address}:{node.http_port}", "CONSUL_HTTP_TOKEN": token}
            return stock.consul(*words, cwd=tmp_path, environ=environ)

        boot = run("acl", "bootstrap")
        assert boot.returncode == 0, boot.stderr
        secret = _value(boot.stdout, "SecretID")
        rules = 'service "web" { policy = "write" }'
        policy = run("acl", "policy", "create", "-name=web", "-rules", rules, token=secret)
        assert (policy.returncode, rules in policy.stdout) == (0, True), policy.stderr
        token = _value(run("acl", "token", "create", "-policy-name=web", token=secret).stdout, "SecretID")
        denied = "Unexpected response code: 403 (Permission denied)\n"
        for limited in ("", token):
            assert run("snapshot", "save", "backup.snap", token=limited).stderr == f"Error saving snapshot: {denied}"
        assert run("snapshot", "save", "backup.snap", token=secret).returncode == 0
        assert run("snapshot", "restore", "backup.snap", token=token).stderr == f"Error restoring snapshot: {denied}"
        deleted = run("acl", "policy", "delete", "-name=web", token=secret)
        assert (deleted.returncode, "deleted successfully" in deleted.stdout) == (0, True)
        assert run("snapshot", "restore", "backup.snap", token=secret).stdout == "Restored snapshot\n"
        assert "web:" in run("acl", "policy", "list", token=secret).stdout
        leaf = node.get("/v1/agent/connect/ca/leaf/web", headers={"X-Consul-Token": token})
        assert leaf.status == http.client.OK


def _value(shown: str, name: str) -> str:
    """What a command shows behind a name."""
    return next(line.split()[1] for line in shown.splitlines() if line.startswith(f"{name}:"))
