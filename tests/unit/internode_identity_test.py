import ssl
from collections.abc import Collection

import pytest
from cryptography import x509

from caserver.internode.identity import NodeIdentity, node_uri
from caserver.internode.keyring import Keyring
from caserver.pki import tls

OLD, NEW = bytes(32), bytes([1]) * 32
NAMES = ("n1", "n2", "an odd/näme with a % and more than the sixty-four characters of a common name")


def identity(node: str, *secrets: bytes, peers: Collection[str] = NAMES) -> NodeIdentity:
    return NodeIdentity(Keyring(secrets or (OLD,)), node, peers)


def shake(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """A whole handshake in memory, including the server's last word on the client's certificate."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_side=False),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(10):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    for end in ends:
        with pytest.raises(ssl.SSLWantReadError):
            end.read()
    return ends


def names_seen(client: NodeIdentity, server: NodeIdentity) -> tuple[str | None, str | None]:
    client_end, server_end = shake(client.client_context(), server.server_context())
    return client.peer_name(client_end), server.peer_name(server_end)


def certificate(of: NodeIdentity) -> x509.Certificate:
    return x509.load_pem_x509_certificate(of._chain_pem.encode())


@pytest.mark.parametrize("node", NAMES)
def test_each_end_learns_the_name_of_the_other(node: str) -> None:
    assert names_seen(identity("n1"), identity(node)) == (node, "n1")


def test_connections_are_tls_1_3() -> None:
    client, _ = shake(identity("n1").client_context(), identity("n2").server_context())

    assert client.version() == "TLSv1.3"


def test_certificates_are_the_same_after_every_start_and_never_expire() -> None:
    first, second = certificate(identity("n1")), certificate(identity("n1"))

    assert first == second
    assert (first.not_valid_before_utc.year, first.not_valid_after_utc.year) == (1970, 9999)
    assert certificate(identity("n2")).public_key() != first.public_key()
    assert certificate(identity("n1", NEW)).public_key() != first.public_key()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [((OLD,), (OLD, NEW)), ((OLD, NEW), (NEW, OLD)), ((NEW, OLD), (NEW,))],
    ids=["the new secret is added", "the new secret leads", "the old secret is dropped"],
)
def test_a_secret_changes_without_a_stop(ours: tuple[bytes, ...], theirs: tuple[bytes, ...]) -> None:
    assert names_seen(identity("n1", *ours), identity("n2", *theirs)) == ("n2", "n1")
    assert names_seen(identity("n2", *theirs), identity("n1", *ours)) == ("n1", "n2")


@pytest.mark.parametrize(("client", "server"), [((OLD,), (NEW,)), ((NEW, OLD), (OLD,))])
def test_a_certificate_of_a_secret_that_is_not_held_is_refused(
    client: tuple[bytes, ...], server: tuple[bytes, ...]
) -> None:
    with pytest.raises(ssl.SSLError):
        shake(identity("n1", *client).client_context(), identity("n2", *server).server_context())


def test_a_client_without_a_certificate_is_refused() -> None:
    anonymous = tls.client_context(None, None, ca_pems=identity("n1")._authorities_pem)

    with pytest.raises(ssl.SSLError):
        shake(anonymous, identity("n1").server_context())


def test_a_node_that_is_not_listed_has_no_name() -> None:
    stranger = identity("n9", peers=("n1", "n9"))

    assert names_seen(stranger, identity("n1")) == ("n1", None)


def test_nobody_has_no_name() -> None:
    assert identity("n1").peer_name(None) is None


def test_nodes_sign_nothing_and_names_are_escaped() -> None:
    of = identity("n1")
    authority = x509.load_pem_x509_certificate(of._authorities_pem[0].encode())

    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert certificate(of).extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert node_uri("a/b %") == "spiffe://caserver.internal/node/a%2Fb%20%25"


def test_its_repr_shows_no_key() -> None:
    assert repr(identity("n1")) == "NodeIdentity('n1')"
