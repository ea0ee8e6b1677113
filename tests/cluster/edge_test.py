"""One node's public edge as clients meet it: HTTPS with client certificates, a Unix socket, and a reload in the middle of it."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.testkit.cluster import LOOPBACK, Cluster, Node, Reply, free_ports, run_cli, wait_for
from tests.testkit.web_certs import Pair, WebCA, client_context, served_names

RELOADS = 10
LEAF = "/v1/agent/connect/ca/leaf/web"


@dataclass
class Edge:
    """A node that serves HTTP, HTTPS and a socket."""

    cluster: Cluster
    directory: Path
    https_port: int
    ca: WebCA
    pair: Pair
    client: Pair

    @property
    def node(self) -> Node:
        return self.cluster.nodes[0]

    @property
    def socket_path(self) -> Path:
        return self.directory / "ca.sock"

    def settings(self, **changes: object) -> None:
        given = {
            "ports": {"https": self.https_port},
            "addresses": {"http": f"{LOOPBACK} unix://{self.socket_path}"},
            "unix_sockets": {"mode": "0660"},
            "cert_file": str(self.pair.cert),
            "key_file": str(self.pair.key),
            "ca_file": str(self.ca.file),
            "verify_incoming": True,
        }
        (self.directory / "edge.json").write_text(json.dumps(given | changes))

    def connected(self, *, ca: Path | None = None, identity: Pair | None = None) -> ssl.SSLSocket:
        """A new TLS connection, its handshake done."""
        plain = socket.create_connection((LOOPBACK, self.https_port), timeout=30)
        return client_context(ca, identity or self.client).wrap_socket(plain, server_hostname="localhost")

    def served(self) -> list[str]:
        """The names in the certificate that a new connection is shown."""
        with self.connected() as connection:
            return served_names(connection.getpeercert(binary_form=True))

    def hup(self, says: str) -> None:
        """SIGHUP, and the log line that it leads to, one more than before."""
        assert self.node.process is not None
        before = self.node.log.count(says)
        self.node.process.send_signal(signal.SIGHUP)
        wait_for(f"another log line {says!r}", lambda: True if self.node.log.count(says) > before else None)

    def descriptors(self) -> int:
        assert self.node.process is not None
        return len(list(Path(f"/proc/{self.node.process.pid}/fd").iterdir()))


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[Edge]:
    ca = WebCA(tmp_path)
    extra = tmp_path / "edge.json"
    with Cluster(tmp_path, ("n1",), dev=True, extra_files=[extra]) as cluster:
        (port,) = free_ports(1)
        made = Edge(cluster, tmp_path, port, ca, ca.issue("server", hosts=("localhost", "one.example")), ca.issue("me"))
        made.settings()
        cluster.start_ready()
        yield made


def asked(connection: ssl.SSLSocket, path: str) -> Reply:
    """One request on an open connection, which stays open."""
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    response = http.client.HTTPResponse(connection)
    response.begin()
    return Reply(response.status, {key.lower(): value for key, value in response.getheaders()}, response.read())


def test_who_shows_a_certificate_of_the_ca_is_served_over_https(edge: Edge) -> None:
    stranger = WebCA(edge.directory, "stranger", key_name="ec-521").issue("stranger")
    with edge.connected(ca=edge.ca.file) as connection:
        leaf = asked(connection, LEAF)
    refused = []
    for identity in (None, stranger):
        plain = socket.create_connection((LOOPBACK, edge.https_port), timeout=30)
        # With TLS 1.3 a client learns with its first read that its certificate was not liked.
        with client_context(edge.ca.file, identity).wrap_socket(plain, server_hostname="localhost") as connection:
            try:
                connection.sendall(b"GET /v1/status/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
                refused.append(connection.recv(100))
            except OSError as exc:
                refused.append(type(exc).__name__.encode())
    cli = run_cli(
        "connect",
        "ca",
        "roots",
        f"-http-addr=https://localhost:{edge.https_port}",
        f"-ca-file={edge.ca.file}",
        f"-client-cert={edge.client.cert}",
        f"-client-key={edge.client.key}",
    )

    metrics = edge.node.get("/v1/agent/metrics?format=prometheus").text

    assert leaf.json()["Service"] == "web"
    assert "consul_agent_tls_cert_expiry" in metrics
    assert not [each for each in refused if each.startswith(b"HTTP")]
    assert cli.returncode == 0, cli.stderr
    assert edge.node.get(LEAF).status == 200  # plain HTTP on loopback, beside it


def test_a_socket_is_for_whom_its_mode_lets_in_and_goes_with_the_agent(edge: Edge) -> None:
    mode = stat.S_IMODE(edge.socket_path.stat().st_mode)
    cli = run_cli("connect", "ca", "leaf", "web", environ={"CONSUL_HTTP_ADDR": f"unix://{edge.socket_path}"})
    assert edge.node.process is not None
    edge.node.process.send_signal(signal.SIGINT)

    assert edge.node.process.wait(timeout=30) == 0
    assert mode == 0o660
    assert cli.returncode == 0, cli.stderr
    assert not edge.socket_path.exists()


def test_certificates_change_under_load_and_nobody_is_refused(edge: Edge) -> None:
    failures: list[str] = []
    done = threading.Event()
    count = 0

    def load() -> None:
        nonlocal count
        while not done.is_set():
            try:
                with edge.connected(ca=edge.ca.file) as connection:
                    assert asked(connection, "/v1/connect/ca/roots").status == 200
                count += 1
            except Exception as exc:  # noqa: BLE001 - whatever it is, a client was turned away
                failures.append(repr(exc))

    with edge.connected(ca=edge.ca.file) as old:
        before = asked(old, LEAF)
        loading = threading.Thread(target=load)
        loading.start()
        try:
            wait_for("clients", lambda: True if count > 3 else None)
            open_before = edge.descriptors()
            for number in range(RELOADS):
                # Both files at once are what a reload finds; the certificate is of another key every other time.
                edge.pair = edge.ca.issue(
                    f"server{number}",
                    hosts=("localhost", f"name{number}.example"),
                    key_name="ec-256-b" if number % 2 else "ec-256",
                )
                edge.settings()
                edge.hup("settings reloaded")
                assert edge.served() == ["localhost", f"name{number}.example"]
            edge.pair.cert.write_text("half a certif")
            edge.hup("the settings stay as they are")
        finally:
            done.set()
            loading.join()
        after = asked(old, LEAF)

    assert failures == []
    assert edge.served() == ["localhost", f"name{RELOADS - 1}.example"]
    assert after.body == before.body
    wait_for("descriptors to be given back", lambda: True if edge.descriptors() <= open_before + 5 else None)
    assert "no certificate can be read from" in edge.node.log


def test_a_reload_takes_over_what_it_can_and_says_what_it_keeps(edge: Edge) -> None:
    other = WebCA(edge.directory, "other", key_name="ec-521")
    friend = other.issue("friend", key_name="ec-256-b")
    edge.settings(ca_file=str(other.file), log_level="debug", node_name="n9")
    reloaded = run_cli("reload", f"-http-addr=unix://{edge.socket_path}")
    with edge.connected(ca=edge.ca.file, identity=friend) as connection:
        served = asked(connection, "/v1/status/live")
    edge.settings(log_level="loud")
    refused = edge.node.put("/v1/agent/reload")

    assert (reloaded.returncode, reloaded.stdout) == (0, "Configuration reload triggered\n")
    assert served.status == 200
    assert "node_name: changed, and kept as it was" in edge.node.log
    assert refused.status == 500
    assert 'log_level: "loud" is no level' in refused.text
