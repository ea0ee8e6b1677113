"""The fast path equals the builder byte for byte, and the leaf is the recorded one (contract section 3)."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from hypothesis import given, settings
from hypothesis import strategies as st

from caserver.pki import certificates, keys
from caserver.pki.certificates import LeafTemplate, load_certificate
from caserver.pki.leaf_der import Issuer
from tests.testkit import mesh
from tests.testkit.keys import private_key

ISSUERS = {
    name: Issuer(mesh.root(name), private_key(name)) for name in ("ec-224", "ec-256", "ec-384", "ec-521", "rsa-2048")
}
PUBLIC_KEY = keys.public_key_der(private_key(mesh.LEAF_KEY).public_key())
YEAR_2100 = int(datetime(2100, 1, 1, tzinfo=UTC).timestamp())

templates = st.builds(
    LeafTemplate,
    spiffe_uri=st.integers(1, 1900).map(lambda length: "spiffe://td/" + "x" * length),
    common_name=st.text(alphabet="abcdefghijklmnopqrstuvwxyz0123456789.", max_size=64),
    public_key=st.just(PUBLIC_KEY),
    serial=st.integers(1, 2**159 - 1),
    not_before=st.integers(0, YEAR_2100),
    not_after=st.integers(YEAR_2100, YEAR_2100 + 10**9),
)


@pytest.mark.parametrize("issuer", ISSUERS.values(), ids=list(ISSUERS))
@settings(max_examples=25, deadline=None)
@given(template=templates)
def test_the_fast_path_and_the_builder_give_the_same_certificate(issuer: Issuer, template: LeafTemplate):
    assert issuer.sign(template) == issuer.sign_by_builder(template)


@pytest.mark.parametrize("not_after", ["2049-12-31T23:59:59", "2050-01-01T00:00:00"])
def test_the_change_of_time_encoding_is_the_builders(not_after: str):
    instant = int(datetime.fromisoformat(not_after + "+00:00").timestamp())
    template = replace(mesh.order(), not_after=instant)

    pem = ISSUERS["ec-256"].sign(template)

    assert pem == ISSUERS["ec-256"].sign_by_builder(template)
    assert int(x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc.timestamp()) == instant


@pytest.mark.parametrize("key_name", ["ec-384", "ec-521", "rsa-2048"])
def test_other_leaf_keys_are_signed_too(key_name: str):
    template = mesh.order(key_name=key_name)

    certificate = load_certificate(ISSUERS["ec-256"].sign(template))

    assert certificate.public_key() == private_key(key_name).public_key()


@pytest.mark.parametrize(
    ("issuer_key", "algorithm"),
    [("ec-521", "ecdsa-with-SHA256"), ("ec-384", "ecdsa-with-SHA256"), ("rsa-2048", "sha256WithRSAEncryption")],
)
def test_a_leaf_has_the_recorded_profile(issuer_key: str, algorithm: str):
    root = load_certificate(mesh.root(issuer_key))

    leaf = load_certificate(mesh.leaf(mesh.root(issuer_key), issuer_key))

    assert leaf.signature_algorithm_oid._name == algorithm
    assert isinstance(leaf.signature_hash_algorithm, hashes.SHA256)
    assert leaf.subject.rfc4514_string() == "CN=web.svc.default.11111111.consul"
    assert leaf.issuer == root.subject
    assert leaf.serial_number == 2**126 + 77
    assert [(each.oid._name, each.critical) for each in leaf.extensions] == [
        ("keyUsage", True),
        ("extendedKeyUsage", False),
        ("basicConstraints", True),
        ("subjectKeyIdentifier", False),
        ("authorityKeyIdentifier", False),
        ("subjectAltName", False),
    ]
    assert certificates.extension(leaf, x509.KeyUsage) == certificates.LEAF_KEY_USAGE
    assert certificates.extension(leaf, x509.ExtendedKeyUsage) == certificates.LEAF_EXTENDED_KEY_USAGE
    assert certificates.extension(leaf, x509.BasicConstraints) == x509.BasicConstraints(ca=False, path_length=None)
    assert certificates.key_id(leaf) == keys.subject_key_id(private_key(mesh.LEAF_KEY).public_key())
    assert certificates.extension(leaf, x509.AuthorityKeyIdentifier) == certificates.issuer_key_identifier(root)
    assert certificates.uri_sans(leaf) == (f"spiffe://{mesh.TRUST_DOMAIN}/ns/default/dc/dc1/svc/web",)
    leaf.verify_directly_issued_by(root)


def test_the_name_is_critical_when_there_is_no_subject():
    """RFC 5280 4.2.1.6."""
    leaf = load_certificate(mesh.leaf(mesh.root("ec-256"), "ec-256", replace(mesh.order(), common_name="")))

    assert leaf.subject == x509.Name([])
    assert leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical


# Recorded from Consul 1.8.7: the auto-generated root, a leaf under it, and that root as an issuer of a custom root.
RECORDED_ROOT = """-----BEGIN CERTIFICATE-----
MIICDTCCAbOgAwIBAgIBBzAKBggqhkjOPQQDAjAwMS4wLAYDVQQDEyVwcmktMWVw
aWdkMy5jb25zdWwuY2EuODM4ZjAzNmQuY29uc3VsMB4XDTI2MTEyMzEwNDY1MVoX
DTM2MTEyMzEwNDY1MVowMDEuMCwGA1UEAxMlcHJpLTFlcGlnZDMuY29uc3VsLmNh
LjgzOGYwMzZkLmNvbnN1bDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABLjUpXcR
gGuLzHOXa+saP05RGFsS1tE6AEcxK+KrQzXWsU+4yIkIxSNy3PDdiupfS5qhg/+U
oMDMzIeoTNUx7mujgb0wgbowDgYDVR0PAQH/BAQDAgGGMA8GA1UdEwEB/wQFMAMB
Af8wKQYDVR0OBCIEICqO/9gI43jdwUkL2y5MyJ+IVNppCmm6DAHH8tnEvtdYMCsG
A1UdIwQkMCKAICqO/9gI43jdwUkL2y5MyJ+IVNppCmm6DAHH8tnEvtdYMD8GA1Ud
EQQ4MDaGNHNwaWZmZTovLzgzOGYwMzZkLTI4NzItMmM2OS05NTU4LTM0ZjhiYWFj
ZjM4YS5jb25zdWwwCgYIKoZIzj0EAwIDSAAwRQIhANUo5RO7icvLJ0vm5Y075RTC
G9wniGWWlNvZJLuIpG9RAiAI4oP1+YBWtMGjo+3ss+hlKF6tcf7Th3wh6DUPgF5O
kg==
-----END CERTIFICATE-----
"""
RECORDED_LEAF = """-----BEGIN CERTIFICATE-----
MIICPDCCAeOgAwIBAgIBCDAKBggqhkjOPQQDAjAwMS4wLAYDVQQDEyVwcmktMWVw
aWdkMy5jb25zdWwuY2EuODM4ZjAzNmQuY29uc3VsMB4XDTI2MTEyMzEwNTEwM1oX
DTI2MTEyNjEwNTEwM1owKjEoMCYGA1UEAxMfd2ViLnN2Yy5kZWZhdWx0LjgzOGYw
MzZkLmNvbnN1bDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABLf2ydRg1lD046ks
97jNbQK3BYlxRO5D2PJI3YCpjcM8i5Pva2rmSel6pK/d4xg7niTgAkSqdg3vSN3R
M0IvkYajgfMwgfAwDgYDVR0PAQH/BAQDAgO4MB0GA1UdJQQWMBQGCCsGAQUFBwMC
BggrBgEFBQcDATAMBgNVHRMBAf8EAjAAMCkGA1UdDgQiBCAQI+RPGXLB0l4NIpxQ
ZfdTcqib0zP10RH1WiFRHighrjArBgNVHSMEJDAigCAqjv/YCON43cFJC9suTMif
iFTaaQppugwBx/LZxL7XWDBZBgNVHREEUjBQhk5zcGlmZmU6Ly84MzhmMDM2ZC0y
ODcyLTJjNjktOTU1OC0zNGY4YmFhY2YzOGEuY29uc3VsL25zL2RlZmF1bHQvZGMv
ZGMxL3N2Yy93ZWIwCgYIKoZIzj0EAwIDRwAwRAIgYngctv6f4G3G6v7JWpduphcY
ICKEao3czlQsuSLVhVYCID/oDLVdtaJV2yk8NKwimK+RxDCctGiuxFERbj1oz02M
-----END CERTIFICATE-----
"""


def test_a_leaf_differs_from_consuls_only_in_the_string_type_of_its_name():
    """Go writes PrintableString, RFC 5280 4.1.2.4 asks for UTF8String; every verifier compares them as equal."""
    recorded = load_certificate(RECORDED_LEAF)
    template = LeafTemplate(
        spiffe_uri=certificates.uri_sans(recorded)[0],
        common_name="web.svc.default.838f036d.consul",
        public_key=keys.public_key_der(recorded.public_key()),  # type: ignore[arg-type]
        serial=recorded.serial_number,
        not_before=int(recorded.not_valid_before_utc.timestamp()),
        not_after=int(recorded.not_valid_after_utc.timestamp()),
    )

    ours = load_certificate(Issuer(RECORDED_ROOT, private_key("ec-256")).sign(template))

    printable, utf8 = b"\x13\x1fweb.svc", b"\x0c\x1fweb.svc"
    assert ours.tbs_certificate_bytes == recorded.tbs_certificate_bytes.replace(printable, utf8)


def test_our_facts_of_consuls_root_are_its_own():
    facts = certificates.describe(RECORDED_ROOT)

    assert facts.signing_key_id == keys.colon_hex(keys.subject_key_id(load_certificate(RECORDED_ROOT).public_key()))  # type: ignore[arg-type]
    assert facts.signing_key_id.startswith("2a:8e:ff:d8:08:e3:78:dd")
