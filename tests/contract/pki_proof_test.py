"""Handshakes before a rotation is committed: right ones pass, and each way of being wrong is caught and named."""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from caserver.fields import Secret
from caserver.pki import certificates, keys
from caserver.pki.proof import Cell, Endpoint, prove
from tests.testkit import mesh
from tests.testkit.keys import private_key
from tests.testkit.mesh import NOW, crossed, root

KEY = keys.pkcs8_pem(private_key(mesh.LEAF_KEY))
CA_KEYS = ("ec-224", "ec-256", "ec-384", "ec-521", "rsa-2048")


def quadrants(old: str, new: str, old_leaf: str, new_chain: str) -> list[Cell]:
    before, after = Endpoint(old_leaf, KEY), Endpoint(new_chain, KEY)
    return [
        Cell("old leaf, old bundle", before, (old,)),
        Cell("old leaf, both", before, (old, new)),
        Cell("new leaf, old bundle", after, (old,)),
        Cell("new leaf, new bundle", after, (new,)),
        Cell("new leaf, both", after, (old, new)),
    ]


def test_the_certificates_of_the_tests_live_where_only_the_given_instant_reaches():
    cells = [Cell("leaf", Endpoint(mesh.leaf(root("ec-256"), "ec-256"), KEY), (root("ec-256"),))]

    assert prove(cells, NOW) == []
    assert prove(cells, NOW + timedelta(days=365))[0].endswith("expired at 2030-06-04T11:59:00Z")


@pytest.mark.parametrize("old_key", CA_KEYS)
def test_every_mix_of_key_types_hands_over_without_a_failing_cell(old_key: str):
    for new_key in (*CA_KEYS, "rsa-4096"):
        if new_key == old_key:
            continue
        old, new = root(old_key), root(new_key)
        chain = mesh.leaf(new, new_key) + crossed(new, old=old, old_key=old_key)

        assert prove(quadrants(old, new, mesh.leaf(old, old_key), chain), NOW) == []


def test_without_cross_signing_the_old_bundle_fails_alone():
    old, new = root("ec-256"), root("ec-384")

    failures = prove(quadrants(old, new, mesh.leaf(old, "ec-256"), mesh.leaf(new, "ec-384")), NOW)

    assert [failure.partition(":")[0] for failure in failures] == ["new leaf, old bundle"]
    assert "no certificate at hand issued certificate CN=web.svc.default.11111111.consul" in failures[0]


def test_a_root_without_basic_constraints_is_caught():
    """The shape of the root in Consul's documentation, which Consul takes and no proxy then accepts."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bare")])
    key = private_key("rsa-2048")
    builder = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    )
    builder = builder.not_valid_before(NOW - timedelta(days=1)).not_valid_after(NOW + timedelta(days=99))
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{mesh.TRUST_DOMAIN}")])
    bare = certificates.to_pem(builder.add_extension(names, critical=False).sign(key, hashes.SHA256()))

    failures = prove([Cell("new leaf, new bundle", Endpoint(mesh.leaf(bare, "rsa-2048"), KEY), (bare,))], NOW)

    assert len(failures) == 1
    assert "CN=bare (serial 1) is not a CA certificate" in failures[0]


def test_a_key_that_is_not_the_leafs_is_caught():
    cell = Cell(
        "x", Endpoint(mesh.leaf(root("ec-256"), "ec-256"), keys.pkcs8_pem(private_key("ec-256"))), (root("ec-256"),)
    )

    assert prove([cell], NOW) == ["x: the TLS handshake failed: KEY_VALUES_MISMATCH"]


def test_a_leaf_of_a_key_that_is_not_the_roots_is_caught():
    forged = mesh.leaf(root("ec-256"), "ec-256-b")

    (failure,) = prove([Cell("x", Endpoint(forged, KEY), (root("ec-256"),))], NOW)

    assert "the signature of certificate CN=web.svc.default.11111111.consul" in failure


def test_openssl_has_its_own_say():
    """A leaf key too small for OpenSSL's security level passes our search and fails the handshake."""
    weak = mesh.order(key_name="ec-224")
    cell = Cell(
        "x",
        Endpoint(mesh.leaf(root("ec-256"), "ec-256", weak), keys.pkcs8_pem(private_key("ec-224"))),
        (root("ec-256"),),
    )

    (failure,) = prove([cell], NOW)

    assert failure.startswith("x: the TLS handshake failed: ")


@pytest.mark.parametrize("chain", ["", "garbage"])
def test_an_endpoint_without_certificate_fails_its_cell(chain: str):
    assert prove([Cell("x", Endpoint(chain, KEY), (root("ec-256"),))], NOW) == [
        "x: the endpoint presents no certificate"
    ]


def test_an_empty_bundle_accepts_nothing():
    assert len(prove([Cell("x", Endpoint(mesh.leaf(root("ec-256"), "ec-256"), KEY), ())], NOW)) == 1


def test_an_endpoint_does_not_show_its_key():
    assert "<redacted>" in repr(Endpoint("chain", Secret("canary")))
    assert "canary" not in repr(Endpoint("chain", Secret("canary")))
