"""Whom a running node believes, and what it never does with what it is sent: real processes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.testkit.cluster import HELD_FOR, LOOPBACK, READY_WITHIN, ROOT, Cluster, Node, free_ports, keygen, wait_for

# Runs an agent in its main thread and tries pysyncobj's load functions from another one while it serves.
UNPICKLING = """
import http.client, io, json, os, pickle, signal, sys, threading, time
import pysyncobj.journal, pysyncobj.pickle, pysyncobj.tcp_connection, pysyncobj.serializer, pysyncobj.syncobj
from caserver.cli import main

def ready(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/v1/connect/ca/roots")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()

def attempts():
    harmless = pickle.dumps(1)
    yield lambda: pysyncobj.pickle.loads(harmless)
    yield lambda: pysyncobj.pickle.load(io.BytesIO(harmless))
    yield lambda: pysyncobj.journal.loads(harmless)
    yield lambda: pysyncobj.tcp_connection.pickle.loads(harmless)
    yield lambda: pysyncobj.serializer.pickle.load(io.BytesIO(harmless))
    yield lambda: pysyncobj.syncobj.pickle.loads(harmless)

def probe(port):
    try:
        while not ready(port):
            time.sleep(0.05)
        for attempt in attempts():
            try:
                attempt()
                print("LOADED", flush=True)
            except RuntimeError as exc:
                print("REFUSED", exc, flush=True)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)

port = int(sys.argv[1])
threading.Thread(target=probe, args=(port,), daemon=True).start()
sys.exit(main(sys.argv[2:], {}))
"""


def test_a_running_agent_unpickles_nothing(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    config = tmp_path / "agent.json"
    config.write_text(json.dumps({"ports": {"http": port}, "client_addr": LOOPBACK}))

    done = subprocess.run(
        [sys.executable, "-c", UNPICKLING, str(port), "agent", "-dev", f"-config-file={config}"],
        capture_output=True,
        text=True,
        timeout=READY_WITHIN,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    said = [line for line in done.stdout.splitlines() if line.startswith(("LOADED", "REFUSED"))]
    assert said == ["REFUSED unpickling is switched off in this process"] * 6, done.stdout + done.stderr
    assert done.returncode == 0


# -- servers that do not belong together


def edit(node: Node, **changes: object) -> None:
    config = json.loads(node.config_file.read_text())
    node.config_file.write_text(json.dumps({**config, **changes}))


def other_names(node: Node, _elsewhere: Path) -> None:
    peers = json.loads(node.config_file.read_text())["peer"]
    edit(node, peer={**peers, "n4": {"address": LOOPBACK}}, data_dir=str(node.directory / "fresh"))


def other_generation(node: Node, _elsewhere: Path) -> None:
    marker = node.data_dir / "node.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "generation": "1:" + "ab" * 32}))


def other_cluster(node: Node, elsewhere: Path) -> None:
    edit(node, data_dir=str(elsewhere))


DIFFERENCES: dict[str, tuple[Callable[[Node, Path], None], str]] = {
    "peer list": (other_names, "is not this node's"),
    "generation": (other_generation, "this node of generation"),
    "cluster id": (other_cluster, "it belongs to cluster"),
}


def test_servers_that_do_not_belong_together_refuse_each_other_and_both_say_why(tmp_path: Path) -> None:
    secret = keygen()
    with Cluster(tmp_path / "other", secret=secret).start_ready() as other:
        for node in other:
            assert other.stop(node) == 0
        elsewhere = other.node("n3").data_dir
    with Cluster(tmp_path / "ours", secret=secret).start_ready() as cluster:
        n1, n2, n3 = cluster.nodes
        assert cluster.stop(n3) == 0
        kept = {file: file.read_bytes() for file in (n3.config_file, n3.data_dir / "node.json")}
        for name, (make_different, word) in DIFFERENCES.items():
            make_different(n3, elsewhere)
            n3.log_file.write_text("")
            cluster.start(n3)
            for node, peer in ((n1, "n3"), (n2, "n3"), (n3, "n1"), (n3, "n2")):
                line = refusal(node, peer=peer, word=word)
                assert "WARN" in line, name
            reply = n3.try_get("/v1/status/leader")
            assert reply is None or reply.json() == "", name
            assert n1.get("/v1/agent/connect/ca/leaf/meanwhile").status == http.client.OK
            cluster.kill(n3)
            for file, content in kept.items():
                file.write_bytes(content)
        cluster.start(n3)
        cluster.wait_ready(n3)
        assert n3.get("/v1/connect/ca/roots").json() == n1.get("/v1/connect/ca/roots").json()


def refusal(node: Node, *, peer: str, word: str) -> str:
    """The line in which ``node`` says why it refuses ``peer``."""

    def said() -> str | None:
        lines = (line for line in node.log.splitlines() if "peer_refused" in line and f"peer={peer}" in line)
        return next((line for line in lines if word in line), None)

    return wait_for(f"{node.name} to say why it refuses {peer}", said)


# -- floods


@contextmanager
def flooded(*addresses: tuple[str, int], each: int) -> Iterator[list[socket.socket]]:
    """Strangers that connect and say nothing, replaced as they are closed, until the end."""
    stopping, held = threading.Event(), list[socket.socket]()

    def dial() -> None:
        while not stopping.is_set():
            for address in addresses:
                with contextlib.suppress(OSError):
                    held.append(socket.create_connection(address, timeout=1))
            while len(held) > each * len(addresses):
                held.pop(0).close()
            stopping.wait(0.002)

    thread = threading.Thread(target=dial)
    thread.start()
    try:
        yield held
    finally:
        stopping.set()
        thread.join()
        for connection in held:
            connection.close()


def test_floods_of_strangers_up_to_the_limit_of_descriptors_cost_nothing(tmp_path: Path) -> None:
    patient = {
        "performance": {"raft_multiplier": 5, "rpc_hold_timeout": f"{HELD_FOR}s"}
    }  # how late a busy machine is, is not what this asks
    with Cluster(tmp_path, settings=patient).start_ready() as cluster:
        leader, (follower, _) = cluster.leader(), cluster.followers()
        assert leader.process is not None
        resource.prlimit(leader.process.pid, resource.RLIMIT_NOFILE, (200, 200))
        with flooded((LOOPBACK, leader.server_port), (LOOPBACK, leader.forward_port), each=250) as strangers:
            wait_for("the flood", lambda: True if len(strangers) >= 400 else None)
            for number in range(10):
                for node in (leader, follower):
                    reply = node.get(f"/v1/agent/connect/ca/leaf/flood-{node.name}-{number}")
                    assert reply.status == http.client.OK, reply.text
            descriptors = len(list(Path(f"/proc/{leader.process.pid}/fd").iterdir()))

        assert descriptors < 190
        assert cluster.leader() is leader
        assert leader.log.count("leads=true") == 1
        assert len(leader.log.splitlines()) < 100
