from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from caserver.client import Client, ClientError, ClientSettings, ConnectionFailed, UnexpectedResponse
from caserver.fields import Secret
from caserver.pki import tls
from tests.testkit.scripted import Scripted, scripted_server


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted_server() as script:
        yield script


def client(server: Scripted) -> Client:
    return Client(ClientSettings(address=server.address))


def test_every_call_asks_its_endpoint(server: Scripted) -> None:
    api = client(server)

    api.roots(stale="")
    api.configuration(dc="dc1", stale="")
    api.set_configuration('{"Provider":"consul"}')
    api.leaf("a b/é")
    api.sign("PEM")
    api.raft_configuration()

    assert [(each.method, each.target, each.body) for each in server.asked] == [
        ("GET", "/v1/connect/ca/roots?stale=", ""),
        ("GET", "/v1/connect/ca/configuration?dc=dc1&stale=", ""),
        ("PUT", "/v1/connect/ca/configuration", '{"Provider":"consul"}'),
        ("GET", "/v1/agent/connect/ca/leaf/a%20b%2F%C3%A9", ""),
        ("PUT", "/v1/connect/ca/sign", "PEM"),
        ("GET", "/v1/operator/raft/configuration", ""),
    ]


def test_the_token_travels_in_consuls_header(server: Scripted) -> None:
    Client(ClientSettings(address=f"http://{server.address}", token=Secret("t0ken"))).roots()

    assert server.asked[0].headers["X-Consul-Token"] == "t0ken"


def test_no_token_sends_no_header(server: Scripted) -> None:
    client(server).roots()

    assert "X-Consul-Token" not in server.asked[0].headers


def test_a_refusal_reads_as_consuls_client_words_it(server: Scripted) -> None:
    server.answers("No path to datacenter", 500)

    with pytest.raises(UnexpectedResponse) as caught:
        client(server).roots()

    assert str(caught.value) == "Unexpected response code: 500 (No path to datacenter)"
    assert caught.value.status == 500


def test_a_redirect_is_not_followed(server: Scripted) -> None:
    server.answers("", 301)

    with pytest.raises(UnexpectedResponse, match="301"):
        client(server).roots()


def test_an_answer_that_is_not_json_is_an_error(server: Scripted) -> None:
    server.answers("<html>")

    with pytest.raises(ClientError, match="the answer is not JSON"):
        client(server).roots().json()


def test_a_refused_connection_says_what_to_try() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    with pytest.raises(ConnectionFailed) as caught:
        Client(ClientSettings(address=f"127.0.0.1:{port}")).configuration()

    assert str(caught.value) == (
        f'Get "http://127.0.0.1:{port}/v1/connect/ca/configuration": '
        f"dial tcp 127.0.0.1:{port}: connect: connection refused"
    )
    assert "caserver agent -dev" in caught.value.remedy


def test_a_silent_server_ends_in_a_timeout_that_tells_to_read_first() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        api = Client(ClientSettings(address=f"127.0.0.1:{silent.getsockname()[1]}", read_timeout=0.05))

        with pytest.raises(ConnectionFailed, match=r"no answer within 0\.05 seconds") as caught:
            api.set_configuration("{}")

    assert "read before repeating" in caught.value.remedy


@pytest.mark.parametrize(
    "token", ["s3cr3t-token\nsecond line", "s3cr3t\r\nX-Other: 1", "s3cr3t-tökén→x", "s3cr3t\x00", "s3cr3t\x7f"]
)
def test_a_token_that_no_header_can_carry_is_refused_without_its_value(server: Scripted, token: str) -> None:
    with pytest.raises(ClientError, match="the token holds characters") as caught:
        Client(ClientSettings(address=server.address, token=Secret(token)))

    assert "s3cr3t" not in str(caught.value) + caught.value.remedy
    assert server.asked == []


@pytest.mark.parametrize("address", ["http://.example:85", "http://a..b:85", f"http://{'a' * 64}.example"])
def test_a_name_that_cannot_be_looked_up_is_an_invalid_address(address: str) -> None:
    with pytest.raises(ClientError, match="invalid address") as caught:
        Client(ClientSettings(address=address, token=Secret("s3cr3t"))).roots()

    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["ftp://x", "127.0.0.1:port", "http://", "127.0.0.1:0", "", "http://[::1:85", "http://a b", "http://a\nb"],
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ClientError, match="invalid address"):
        Client(ClientSettings(address=address))


@pytest.mark.parametrize("address", ["unix://", f"unix:///{'x' * 107}"])
def test_a_path_that_no_socket_can_have_is_refused(address: str) -> None:
    with pytest.raises(ClientError, match="invalid address") as caught:
        Client(ClientSettings(address=address))

    assert "unix:///path" in caught.value.remedy


def test_a_socket_is_spoken_to_in_the_clear_or_through_tls(tmp_path: Path) -> None:
    ca, context = _authority(tmp_path)
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        inside = ClientSettings(address=f"unix://{path}", https=True, ca_file=ca, tls_server_name="ca.example")
        with _answering(listener, context):
            assert Client(inside).roots().json() == {}


def test_a_socket_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(ConnectionFailed) as caught:
        Client(ClientSettings(address=f"unix://{path}")).roots()

    assert f"dial unix {path}: connect: no such file or directory" in str(caught.value)


def test_https_to_a_plain_server_says_so(server: Scripted) -> None:
    with pytest.raises(ConnectionFailed, match="tls: ") as caught:
        Client(ClientSettings(address=server.address, https=True)).roots()

    assert "-ca-file" in caught.value.remedy


def test_a_missing_ca_file_is_a_client_error(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="cannot set up TLS"):
        Client(ClientSettings(address="https://127.0.0.1:1", ca_file=tmp_path / "none.pem")).roots()


def test_tls_names_are_verified_against_the_given_ca(tmp_path: Path) -> None:
    ca, context = _authority(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener, _answering(listener, context) as port:
        address = f"https://127.0.0.1:{port}"
        named = ClientSettings(address=address, ca_file=ca, tls_server_name="ca.example")

        assert Client(named).roots().json() == {}
        with pytest.raises(ConnectionFailed, match="x509: "):
            Client(ClientSettings(address=address, ca_file=ca)).roots()
        with pytest.raises(ConnectionFailed, match="x509: "):
            Client(ClientSettings(address=address, tls_server_name="ca.example")).roots()
        assert Client(ClientSettings(address=address, verify=False)).roots().json() == {}


def _authority(directory: Path) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate for ``ca.example`` that is its own CA, and a server context with it."""
    key = (Path(__file__).parents[1] / "testkit" / "keys" / "ec-256.pem").read_text()
    private = serialization.load_pem_private_key(key.encode(), password=None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ca.example")])
    certificate = (
        x509.CertificateBuilder(name, name, private.public_key(), 1)
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2100, 1, 1, tzinfo=UTC))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("ca.example")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
    path = directory / "ca.pem"
    path.write_text(pem)
    return path, tls.server_context(pem, Secret(key), require_client=False)


@contextmanager
def _answering(listener: socket.socket, context: ssl.SSLContext) -> Iterator[int]:
    """Answers every TLS connection with an empty object until the block ends."""

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            if stopping.is_set():
                connection.close()
                return
            try:
                with context.wrap_socket(connection, server_side=True) as stream:
                    stream.recv(65536)
                    stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
            except OSError:
                connection.close()

    stopping = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    where = listener.getsockname()
    try:
        yield 0 if isinstance(where, str) else where[1]
    finally:
        stopping.set()
        with socket.socket(listener.family) as last:
            last.connect(where)
        thread.join()
