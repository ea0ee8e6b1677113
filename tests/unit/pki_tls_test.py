"""TLS contexts: floor, mutual verification, key material that never reaches a disk."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from caserver.errors import InvalidConfig
from caserver.fields import Secret
from caserver.pki import keys
from caserver.pki.tls import (
    TLS12,
    TLS13,
    client_context,
    context_of_files,
    dns_names,
    peer_uri,
    peer_uris,
    server_context,
)
from tests.testkit import mesh
from tests.testkit.keys import private_key

_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)
ROOT, OTHER_ROOT = mesh.root("ec-256"), mesh.root("rsa-2048")
LEAF = mesh.leaf(ROOT, "ec-256")
KEY = keys.pkcs8_pem(private_key(mesh.LEAF_KEY))
ENCRYPTED = private_key(mesh.LEAF_KEY).private_bytes(
    Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
)
OTHER_KEY = keys.pkcs8_pem(private_key("ec-384")).reveal().encode()
WEB = f"spiffe://{mesh.TRUST_DOMAIN}/ns/default/dc/dc1/svc/web"


def connected(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """A finished connection as (server's end, client's end); the test's certificates live in another year."""
    for context in (server, client):
        context.verify_flags |= _NO_CHECK_TIME
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    waiting = [ours, theirs]
    for _ in range(20):
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                continue
        if not waiting:
            return theirs, ours
    raise AssertionError("the handshake did not end")


def test_both_sides_know_each_other_by_uri():
    theirs, ours = connected(
        server_context(LEAF, KEY, ca_pems=[ROOT]), client_context(LEAF, KEY, ca_pems=[OTHER_ROOT, ROOT])
    )

    assert (peer_uri(theirs), peer_uri(ours)) == (WEB, WEB)
    assert ours.version() == "TLSv1.3"


@pytest.mark.parametrize(
    ("old_key", "new_key"),
    [
        ("ec-256", "rsa-2048"),
        ("rsa-2048", "ec-256"),
        ("ec-384", "ec-521"),
        ("rsa-4096", "ec-384"),
        ("ec-224", "rsa-2048"),
    ],
)
def test_a_proxy_that_knows_only_the_old_root_and_one_that_has_moved_on_meet_in_both_roles(old_key: str, new_key: str):
    old, new = mesh.root(old_key), mesh.root(new_key)
    behind = {"cert_chain_pem": mesh.leaf(old, old_key, mesh.order("behind")), "key_pem": KEY, "ca_pems": [old]}
    crossed = mesh.crossed(new, old=old, old_key=old_key)
    ahead = {
        "cert_chain_pem": mesh.leaf(new, new_key, mesh.order("ahead")) + crossed,
        "key_pem": KEY,
        "ca_pems": [old, new],
    }

    for server, client in ((behind, ahead), (ahead, behind)):
        theirs, ours = connected(server_context(**server), client_context(**client))  # type: ignore[arg-type]
        assert {str(peer_uri(end)).rpartition("/")[2] for end in (theirs, ours)} == {"behind", "ahead"}


def test_a_client_without_certificate_is_refused_where_one_is_required():
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        connected(server_context(LEAF, KEY, ca_pems=[ROOT]), client_context(None, None, ca_pems=[ROOT]))


def test_a_client_without_certificate_is_nobody_where_none_is_required():
    theirs, _ = connected(server_context(LEAF, KEY, require_client=False), client_context(None, None, ca_pems=[ROOT]))

    assert (peer_uri(theirs), peer_uris(theirs)) == (None, ())


def test_a_client_of_another_authority_is_refused():
    with pytest.raises(ssl.SSLCertVerificationError):
        connected(server_context(LEAF, KEY, ca_pems=[OTHER_ROOT]), client_context(LEAF, KEY, ca_pems=[ROOT]))


@pytest.mark.parametrize("trusted", [[OTHER_ROOT], []])
def test_a_server_of_another_authority_is_refused(trusted: list[str]):
    with pytest.raises(ssl.SSLCertVerificationError):
        connected(server_context(LEAF, KEY, require_client=False), client_context(None, None, ca_pems=trusted))


def test_tls_12_is_taken_only_where_it_was_allowed_and_with_forward_secrecy():
    old_client = client_context(None, None, ca_pems=[ROOT], minimum=TLS12)
    old_client.maximum_version = TLS12

    _, ours = connected(server_context(LEAF, KEY, require_client=False, minimum=TLS12), old_client)

    assert ours.version() == "TLSv1.2"
    assert str(ours.cipher()).startswith("('ECDHE-ECDSA-")
    with pytest.raises(ssl.SSLError):
        connected(server_context(LEAF, KEY, require_client=False, minimum=TLS13), old_client)


@dataclass
class Files:
    cert_file: Path
    key_file: Path
    ca_file: Path | None = None
    verify_incoming: bool = False
    min_version: str = "tls12"
    ca_path: Path | None = None
    cipher_suites: Sequence[str] = ()
    prefer_server_ciphers: bool = False


@pytest.fixture
def files(tmp_path: Path) -> Files:
    for name, text in (("c.pem", LEAF), ("k.pem", KEY.reveal()), ("ca.pem", ROOT)):
        (tmp_path / name).write_text(text)
    return Files(tmp_path / "c.pem", tmp_path / "k.pem")


@pytest.mark.parametrize(("spelled", "minimum"), [("tls12", TLS12), ("tls13", TLS13)])
def test_a_listener_is_made_of_files_with_the_floor_they_are_given(
    files: Files, spelled: str, minimum: ssl.TLSVersion
) -> None:
    files.min_version = spelled

    assert context_of_files(files).minimum_version == minimum


def test_a_listener_asks_for_the_client_certificates_that_its_files_want(files: Files, tmp_path: Path) -> None:
    files.ca_file, files.verify_incoming = tmp_path / "ca.pem", True

    assert context_of_files(files).verify_mode == ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("c.pem", b"host\n", "cert_file: no certificate can be read from {path}; give the server's certificate"),
        ("c.pem", b"\xff\x30", "cert_file: {path} is not PEM text; convert it"),
        ("k.pem", b"host\n", "key_file: no private key can be read from {path}; give the key"),
        ("k.pem", ENCRYPTED, "key_file: the key in {path} is encrypted; decrypt it"),
        ("k.pem", OTHER_KEY, "key_file: {path} does not hold the key of the first certificate in "),
        ("k.pem", None, "key_file: {path} cannot be read (No such file or directory)"),
        ("ca.pem", b"host\n", "ca_file: no certificate can be read from {path}"),
    ],
)
def test_files_that_cannot_serve_are_named(
    files: Files, tmp_path: Path, file: str, content: bytes | None, fault: str
) -> None:
    path = tmp_path / file
    files.ca_file = tmp_path / "ca.pem"
    path.unlink() if content is None else path.write_bytes(content)

    with pytest.raises(InvalidConfig) as caught:
        context_of_files(files)

    assert caught.value.detail.startswith(fault.format(path=path))
    assert "\n" not in caught.value.detail
    assert "PRIVATE KEY" not in caught.value.detail


def test_a_client_is_asked_for_a_certificate_only_where_one_is_required(files: Files, tmp_path: Path) -> None:
    files.ca_file = tmp_path / "ca.pem"

    assert context_of_files(files).verify_mode == ssl.CERT_NONE


def test_a_directory_of_authorities_counts_whole(files: Files, tmp_path: Path) -> None:
    files.ca_path, files.verify_incoming = tmp_path / "cas", True
    files.ca_path.mkdir()
    for name, pem in (("one.pem", OTHER_ROOT), ("two.pem", ROOT)):
        (files.ca_path / name).write_text(pem)

    theirs, _ = connected(context_of_files(files), client_context(LEAF, KEY, ca_pems=[ROOT]))

    assert peer_uri(theirs) == WEB


@pytest.mark.parametrize(
    ("content", "fault"),
    [(None, "ca_path: holds no CA, and verify_incoming needs one"), ("host\n", "ca_path: no certificate can be read")],
)
def test_a_directory_without_authorities_is_a_fault(
    files: Files, tmp_path: Path, content: str | None, fault: str
) -> None:
    files.ca_path, files.verify_incoming = tmp_path / "cas", True
    files.ca_path.mkdir()
    if content is not None:
        (files.ca_path / "x.pem").write_text(content)

    with pytest.raises(InvalidConfig) as caught:
        context_of_files(files)

    assert caught.value.detail.startswith(fault)


def test_suites_and_whose_order_counts_are_as_the_files_say(files: Files) -> None:
    files.cipher_suites = ("ECDHE-ECDSA-AES256-GCM-SHA384",)
    narrow = context_of_files(files)
    files.prefer_server_ciphers = True
    ours_first = context_of_files(files)
    client = client_context(None, None, ca_pems=[ROOT], minimum=TLS12)
    client.maximum_version = TLS12
    _, end = connected(narrow, client)

    assert str(end.cipher()).startswith("('ECDHE-ECDSA-AES256-GCM-SHA384'")
    assert not narrow.options & ssl.OP_CIPHER_SERVER_PREFERENCE
    assert ours_first.options & ssl.OP_CIPHER_SERVER_PREFERENCE


def test_nothing_below_tls_12_can_be_asked_for():
    with pytest.raises(ValueError, match=r"TLS below 1\.2"):
        client_context(None, None, ca_pems=[], minimum=ssl.TLSVersion.MINIMUM_SUPPORTED)


def test_a_server_cannot_require_clients_that_it_could_not_verify():
    with pytest.raises(ValueError, match="needs CA certificates"):
        server_context(LEAF, KEY)


def test_host_names_are_compared_only_on_demand():
    assert not client_context(None, None, ca_pems=[ROOT]).check_hostname
    assert client_context(None, None, ca_pems=[ROOT], check_hostname=True).check_hostname


def test_a_key_that_does_not_fit_is_refused_and_no_descriptor_is_left_open():
    before = len(list(Path("/proc/self/fd").iterdir()))

    with pytest.raises(ssl.SSLError):
        server_context(LEAF, keys.pkcs8_pem(private_key("ec-256")), require_client=False)
    with pytest.raises(ssl.SSLError):
        server_context(LEAF, Secret("garbage"), require_client=False)
    server_context(LEAF, KEY, require_client=False)

    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_encrypted_key_is_refused_without_asking_a_terminal():
    locked = private_key(mesh.LEAF_KEY).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))

    with pytest.raises(ssl.SSLError):
        server_context(LEAF, Secret(locked.decode()), require_client=False)


def test_no_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    client_context(LEAF, KEY, ca_pems=[ROOT])

    assert list(tmp_path.iterdir()) == []


def test_the_dns_names_of_a_certificate_are_those_of_its_first() -> None:
    assert dns_names(LEAF + ROOT) == ()
    named = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(private_key("ec-256").public_key())
        .serial_number(1)
        .not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2027, 1, 1, tzinfo=UTC))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("ca.example.com")]), critical=False)
        .sign(private_key("ec-256"), hashes.SHA256())
    )

    assert dns_names(named.public_bytes(Encoding.PEM).decode()) == ("ca.example.com",)
