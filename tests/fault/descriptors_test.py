"""Clients whom nobody knows take all connections that they can get: the node keeps descriptors for its own work."""

from __future__ import annotations

import http.client
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.testkit.cluster import LOOPBACK, ROOT, Cluster, Node

LIMIT = 256
# Python runs this in every node: the machine grants it few descriptors, and the shell even fewer.
FEW_DESCRIPTORS = f"""
import resource

resource.setrlimit(resource.RLIMIT_NOFILE, (100, {LIMIT}))
"""


def hold(stack: ExitStack, node: Node, count: int, source: int) -> None:
    for _ in range(count):
        connection = stack.enter_context(socket.socket())
        connection.settimeout(60)
        connection.bind((f"127.0.0.{source}", 0))
        connection.connect((LOOPBACK, node.http_port))


def test_connections_that_nobody_needs_do_not_take_the_last_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FEW_DESCRIPTORS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    with Cluster(tmp_path / "nodes", ("n1",)).start_ready() as cluster, ExitStack() as stack:
        (node,) = cluster
        assert node.process is not None
        early = http.client.HTTPConnection(LOOPBACK, node.http_port, timeout=60)
        stack.callback(early.close)
        early.request("GET", "/v1/status/live")
        early.getresponse().read()

        for source in (2, 3, 4):
            hold(stack, node, 150, source)
        late = node.try_get("/v1/status/live")
        statuses = []
        for number in range(20):
            early.request("GET", f"/v1/agent/connect/ca/leaf/s{number}")
            response = early.getresponse()
            response.read()
            statuses.append(response.status)
        held = len(list(Path(f"/proc/{node.process.pid}/fd").iterdir()))

        assert late is None or late.status == http.client.SERVICE_UNAVAILABLE
        assert statuses == [http.client.OK] * 20
        assert LIMIT // 2 < held < LIMIT * 3 // 4
        assert node.log.count("connections_refused") == 1
        assert "Traceback" not in node.log

        stack.close()
        cluster.wait_ready()
        assert cluster.stop(node) == 0
