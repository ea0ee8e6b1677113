"""What may hold up the end of a node and does not: a disk that never answers, a client that never finishes."""

from __future__ import annotations

import http.client
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.testkit.cluster import ENDS_WITHIN, LOOPBACK, ROOT, Cluster, Node, wait_for

# Python runs this in every node: a flush never returns once the file `<configuration>.hangs` exists.
HANGING_FLUSH = """
import os, sys, time

flush, sources = os.fdatasync, [each.partition("=")[2] for each in sys.argv if each.startswith("-config-file=")]

def fdatasync(descriptor):
    while any(os.path.exists(each + ".hangs") for each in sources):
        time.sleep(60)
    flush(descriptor)

os.fdatasync = fdatasync
"""


def hang(node: Node) -> None:
    Path(f"{node.config_file}.hangs").touch()
    with suppress(OSError):
        node.put("/v1/connect/ca/configuration", {"Provider": "consul", "Config": {"LeafCertTTL": "48h"}}, timeout=1)


def not_ready(node: Node) -> str | None:
    reply = node.try_get("/v1/status/ready")
    return reply.text if reply is not None and reply.status == http.client.SERVICE_UNAVAILABLE else None


def signalled(node: Node) -> None:
    assert node.process is not None
    node.process.send_signal(signal.SIGTERM)


def test_a_node_whose_disk_hangs_is_not_ready_and_can_be_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANGING_FLUSH)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    with (
        Cluster(tmp_path / "one", ("n1",)).start_ready() as one,
        Cluster(tmp_path / "two", ("n2",)).start_ready() as two,
    ):
        (once,), (twice,) = one, two
        for node in (once, twice):
            hang(node)
        said = wait_for("the node to say that it is not ready", lambda: not_ready(once))
        for node in (once, twice):
            assert node.process is not None
            signalled(node)
        started = time.monotonic()
        wait_for("the first signal to be seen", lambda: True if "stopping" in twice.log else None)
        signalled(twice)
        assert twice.process is not None
        assert twice.process.wait(timeout=ENDS_WITHIN) == 1
        assert once.process is not None
        assert once.process.wait(timeout=ENDS_WITHIN) == 1

        assert "LogStalled" in said
        assert "the disk of data_dir hangs" in said
        assert time.monotonic() - started > 5
        assert "a second signal: the agent ends at once" in twice.log
        assert "the log did not stop within 10 s" in once.log
        assert "Traceback" not in once.log + twice.log


def test_leadership_is_handed_over_before_requests_in_progress_are_waited_for(tmp_path: Path) -> None:
    with Cluster(tmp_path).start_ready() as cluster:
        leader = cluster.leader()
        other = cluster.followers()[0]
        with socket.create_connection((LOOPBACK, leader.http_port), timeout=ENDS_WITHIN) as unfinished:
            unfinished.sendall(
                b"PUT /v1/connect/ca/sign HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
            )
            assert unfinished.recv(100).startswith(b"HTTP/1.1 100"), "the request is in progress"
            signalled(leader)
            wait_for(
                "another leader",
                lambda: True if other.get("/v1/status/leader").json() not in {"", leader.server_address} else None,
            )
            unfinished.sendall(b"ab")  # within the time that requests in progress are given
            answer = unfinished.recv(100)
        assert leader.process is not None

        assert leader.process.wait(timeout=ENDS_WITHIN) == 0
        assert answer.startswith(b"HTTP/1.1 400")
