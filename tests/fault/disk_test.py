"""What disks do to real nodes: they fill up, fail to flush, lose or damage bytes. A node stops and says what to do, or goes on."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from caserver.cli import main
from tests.testkit.cluster import LOOPBACK, ROOT, Cluster, Node, wait_for
from tests.testkit.invariants import Witness, check_invariants

BODY = "/v1/connect/ca/configuration"
SECRET = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
DISK_BYTES = 1 << 20

# Python runs this in every node: a flush fails while the file `<configuration>.eio` exists.
FAILING_FLUSH = """
import os, sys

flush, sources = os.fdatasync, [each.partition("=")[2] for each in sys.argv if each.startswith("-config-file=")]

def fdatasync(descriptor):
    if any(os.path.exists(each + ".eio") for each in sources):
        raise OSError(5, "Input/output error")
    flush(descriptor)

os.fdatasync = fdatasync
"""


def change(node: Node, hours: int) -> int:
    """Ask for a change of the configuration; the status of the answer."""
    body = {"Provider": "consul", "Config": {"LeafCertTTL": f"{hours}h"}}
    try:
        return node.put(BODY, body).status
    except OSError:
        return 0


def ttl(node: Node) -> str:
    shown: str = node.get(f"{BODY}?consistent").json()["Config"]["LeafCertTTL"]
    return shown


def ended(node: Node) -> str:
    """Wait until the process has ended by itself, with the exit code of a failure that it explained; what it said last."""
    wait_for(f"{node.name} to end", lambda: None if node.running else True)
    assert node.process is not None
    assert node.process.returncode == 1, node.log
    assert "Traceback" not in node.log
    return node.log.splitlines()[-1]


def refused(cluster: Cluster, node: Node) -> str:
    """Start a node that does not start; why."""
    cluster.start(node)
    return ended(node)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A single node with a changed configuration and a snapshot, killed; each test puts its files back as they were."""
    with Cluster(tmp_path_factory.mktemp("alone"), ("n1",)).start_ready() as cluster:
        (node,) = cluster
        assert change(node, 48) == 200
        cluster.kill(node)
        file = str(node.directory / "n1.export")
        assert main(["operator", "recover", "export", f"-data-dir={node.data_dir}", f"-out={file}"], {}) == 0
        assert main(["operator", "recover", "import", f"-config-file={node.config_file}", file], {}) == 0
        cluster.start_ready()
        cluster.kill(node)
        yield cluster


@contextmanager
def spoiled(node: Node, name: str, spoil: Callable[[bytes], bytes | None]) -> Iterator[None]:
    """Spoil a file of the data directory for a while."""
    file = node.data_dir / name
    intact = file.read_bytes()
    content = spoil(intact)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(intact)


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x40]) + content[middle + 1 :]


def test_a_torn_tail_is_cut_and_nothing_acknowledged_is_missing(alone: Cluster) -> None:
    (node,) = alone
    with (node.data_dir / "raft.log").open("ab") as file:
        file.write(b"\x40\x00\x00\x00half of a record")
    alone.start(node)
    alone.wait_ready()

    assert ttl(node) == "48h"
    assert "torn_tail_cut" in node.log
    alone.kill(node)


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("raft.log", flipped, "was durable and is damaged now"),
        ("raft.log", lambda _: b"", "raft.log is empty, cut short"),
        ("raft.log", lambda _: None, "raft.log is gone"),
        ("snapshot", flipped, "the snapshot is damaged"),
        ("snapshot", lambda _: None, "there is no snapshot"),
        ("node.json", lambda _: b"{", "node.json cannot be read"),
        ("node.json", lambda _: None, "no node.json"),
        ("cluster_secret", lambda _: None, "restore it from a backup"),
        ("cluster_secret", lambda _: SECRET.encode(), "list the former secret"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_directory_is_refused_with_the_remedy(
    alone: Cluster, name: str, spoil: Callable[[bytes], bytes | None], words: str
) -> None:
    (node,) = alone
    with spoiled(node, name, spoil):
        said = refused(alone, node)

    assert words in said
    assert any(remedy in said for remedy in ("-rejoin", "backup", "list the former secret"))


def test_a_directory_that_everybody_may_write_to_is_refused(alone: Cluster) -> None:
    (node,) = alone
    assert node.data_dir.stat().st_mode & 0o777 == 0o700
    node.data_dir.chmod(0o777)
    said = refused(alone, node)
    node.data_dir.chmod(0o700)

    assert "use one of its own, made with mode 0700" in said


def test_a_second_process_on_the_same_directory_is_refused(alone: Cluster, tmp_path: Path) -> None:
    (node,) = alone
    alone.start(node)
    alone.wait_ready()
    with Cluster(tmp_path, ("n1",)) as other:
        (second,) = other
        config: dict[str, Any] = json.loads(second.config_file.read_text())
        second.config_file.write_text(json.dumps({**config, "data_dir": str(node.data_dir)}))
        said = refused(other, second)

    assert "another caserver process uses the data directory; stop it" in said
    assert ttl(node) == "48h"
    alone.kill(node)


def test_a_port_in_use_is_named_with_the_remedy(alone: Cluster) -> None:
    (node,) = alone
    with socket.create_server((LOOPBACK, node.http_port)):
        said = refused(alone, node)

    assert f"{node.http_port}" in said
    assert "stop the process that has the port" in said


@contextmanager
def small_disks(cluster: Cluster) -> Iterator[None]:
    """Give each node a disk of one megabyte."""
    mounted: list[Path] = []
    try:
        for node in cluster:
            node.data_dir.mkdir(mode=0o700)
            options = f"size={DISK_BYTES},mode=0700"
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "caserver-test", str(node.data_dir)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                pytest.skip(f"no small disk can be mounted: {done.stderr.strip()}")
            mounted.append(node.data_dir)
        yield
    finally:
        cluster.close()
        for directory in mounted:
            subprocess.run(["umount", str(directory)], check=True)


def fill(directory: Path) -> Path:
    """Use up the disk but for a few bytes."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return ballast


def changes_until_the_leader_stops(cluster: Cluster, leader: Node, witness: Witness) -> list[int]:
    """Go on changing the configuration through another node; what was acknowledged, in order."""
    client = next(node for node in cluster if node is not leader)
    acknowledged = []
    for hours in range(49, 400):
        if change(client, hours) == 200:
            acknowledged.append(hours)
        if not leader.running:
            break
    assert not leader.running
    witness.saw_configuration(client.get(f"{BODY}?consistent").json()["ModifyIndex"])
    return acknowledged


def last_acknowledged(cluster: Cluster, before: list[int]) -> None:
    """The others went on, and nobody forgot: the last change that was acknowledged, or one that was asked for later."""
    for node in cluster:
        assert int(ttl(node).removesuffix("h")) >= max(before, default=48)


def test_a_full_disk_stops_the_leader_and_loses_nothing(tmp_path: Path) -> None:
    cluster, witness = Cluster(tmp_path, secret=SECRET), Witness()
    with cluster, small_disks(cluster):
        cluster.start_ready()
        leader = cluster.leader()
        assert change(leader, 48) == 200
        ballast = fill(leader.data_dir)
        acknowledged = changes_until_the_leader_stops(cluster, leader, witness)
        said = ended(leader)
        witness.leaf(cluster.leader(), "meanwhile")

        assert "No space left on device" in said
        assert "make room on the disk of data_dir" in said
        still_full = refused(cluster, leader)
        assert "No space left on device" in still_full
        assert "make room" in still_full
        ballast.unlink()
        cluster.start(leader)
        cluster.wait_ready()
        last_acknowledged(cluster, acknowledged)
        check_invariants(cluster, witness)


def test_a_failing_flush_stops_the_leader_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILING_FLUSH)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    witness = Witness()
    with Cluster(tmp_path / "nodes", secret=SECRET).start_ready() as cluster:
        leader = cluster.leader()
        assert change(leader, 48) == 200
        fault = Path(f"{leader.config_file}.eio")
        fault.touch()
        acknowledged = changes_until_the_leader_stops(cluster, leader, witness)
        said = ended(leader)
        witness.leaf(cluster.leader(), "meanwhile")

        assert "Input/output error" in said
        assert "replace the disk of data_dir" in said
        fault.unlink()
        cluster.start(leader)
        cluster.wait_ready()
        last_acknowledged(cluster, acknowledged)
        check_invariants(cluster, witness)
