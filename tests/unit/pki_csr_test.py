"""Certificate signing requests: what is made here passes, what asks for anything else does not."""

from __future__ import annotations

import base64

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from caserver.errors import InvalidCSR
from caserver.pki import keys
from caserver.pki.csr import MAX_CSR_CHARS, CheckedCSR, check_csrs, make_csr
from caserver.pki.spiffe import ServiceID
from tests.testkit.keys import ed25519_key, private_key
from tests.testkit.mesh import DATACENTER, LEAF_KEY, TRUST_DOMAIN

WEB = ServiceID(TRUST_DOMAIN, DATACENTER, "web")
EXTENSION_REQUEST = x509.ObjectIdentifier("1.2.840.113549.1.9.14")


def check(*pems: str) -> list[CheckedCSR | InvalidCSR]:
    return check_csrs(pems, trust_domain=TRUST_DOMAIN, datacenter=DATACENTER)


def refusal(pem: str) -> str:
    (result,) = check(pem)
    assert isinstance(result, InvalidCSR), result
    return result.detail


def built(
    *names: x509.GeneralName, key: object = None, algorithm: object = None, more: tuple[x509.ExtensionType, ...] = ()
) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension in more:
        builder = builder.add_extension(extension, critical=False)
    key = key or private_key(LEAF_KEY)
    algorithm = None if key is ed25519_key() else algorithm or hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(Encoding.PEM).decode()  # type: ignore[arg-type]


def uri(value: str) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(value)


@pytest.mark.parametrize("key_name", ["ec-256", "ec-384", "ec-521", "rsa-2048"])
def test_a_request_made_here_names_its_service_and_key(key_name: str):
    key = private_key(key_name)

    (checked,) = check(make_csr(key, WEB.uri))

    assert isinstance(checked, CheckedCSR)
    assert (checked.service_id, checked.public_key) == (WEB, keys.public_key_der(key.public_key()))


@pytest.mark.parametrize("service", ["Web", "a b", "é", "a%2fb", "x" * 300])
def test_service_names_come_out_decoded(service: str):
    (checked,) = check(make_csr(private_key(LEAF_KEY), ServiceID(TRUST_DOMAIN, DATACENTER, service).uri))

    assert isinstance(checked, CheckedCSR)
    assert checked.service_id.service == service


def test_a_request_with_text_around_it_is_written_anew():
    pem = make_csr(private_key(LEAF_KEY), WEB.uri)

    (checked,) = check("Certificate Request:\n  Data: ...\n" + pem.replace("\n", "\r\n") + "\n\n")

    assert isinstance(checked, CheckedCSR)
    assert checked.pem == pem


def test_each_request_of_several_stands_for_itself():
    good = make_csr(private_key(LEAF_KEY), WEB.uri)

    results = check(good, "garbage", good)

    assert [type(result) for result in results] == [CheckedCSR, InvalidCSR, CheckedCSR]
    assert check() == []


OTHER = "22222222-2222-3333-4444-555555555555.consul"


@pytest.mark.parametrize(
    ("pem", "text"),
    [
        ("", "no PEM-encoded data found"),
        ("é" * 10, "no PEM-encoded data found"),
        ("x" * (MAX_CSR_CHARS + 1), "at most 16384 are read"),
        (
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "first PEM-block should be CERTIFICATE REQUEST type",
        ),
        ("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "cannot be parsed"),
        ("-----BEGIN CERTIFICATE REQUEST-----\né\n-----END CERTIFICATE REQUEST-----\n", "cannot be parsed"),
        ("-----BEGIN CERTIFICATE REQUEST-----\n", "cannot be parsed"),
        (make_csr(private_key(LEAF_KEY), WEB.uri) * 2, "several PEM blocks"),
        (built(), "CSR SAN contains an invalid number of URIs: 0"),
        (built(x509.DNSName("web")), "CSR SAN contains an invalid number of URIs: 0"),
        (built(uri(WEB.uri), uri(WEB.uri.replace("web", "db"))), "CSR SAN contains an invalid number of URIs: 2"),
        (built(uri(WEB.uri), uri(WEB.uri)), "CSR SAN contains an invalid number of URIs: 2"),
        (built(uri(WEB.uri), x509.RFC822Name("a@b.c")), "CSR SAN does not allow specifying email addresses"),
        (built(uri(WEB.uri), x509.DNSName("web")), "only the one URI is allowed"),
        (built(uri(f"spiffe://{TRUST_DOMAIN}")), "SPIFFE ID is not in the expected format"),
        (built(uri("https://example.com/")), "SPIFFE ID must have 'spiffe' scheme"),
        (built(uri(ServiceID(OTHER, "dc1", "web").uri)), f"different trust domain: {OTHER}, we are {TRUST_DOMAIN}"),
        (built(uri(ServiceID(TRUST_DOMAIN, "dc2", "web").uri)), "different datacenter: dc2, we are dc1"),
        (built(uri(ServiceID(TRUST_DOMAIN, "dc1", "web", "team").uri)), "different namespace: team"),
        (built(uri(WEB.uri), more=(x509.BasicConstraints(ca=True, path_length=None),)), "asks for a CA certificate"),
        (
            built(uri(WEB.uri), more=(x509.UnrecognizedExtension(x509.BasicConstraints.oid, b"\x05\x00"),)),
            "cannot be read",
        ),
        (built(uri(WEB.uri), algorithm=hashes.SHA3_256()), "not signed with SHA-256, SHA-384 or SHA-512"),
        (built(uri(WEB.uri), key=private_key("ec-224")), "its curve is secp224r1"),
        (built(uri(WEB.uri), key=ec.derive_private_key(7, ec.SECP256K1())), "its curve is secp256k1"),
        (built(uri(WEB.uri), key=ed25519_key()), "unsupported key type"),
        (built(uri(WEB.uri), key=rsa.generate_private_key(65537, 1024)), "1024 bits"),  # noqa: S505 - the weak key under test
    ],
)
def test_what_is_no_request_for_one_of_our_services_is_refused(pem: str, text: str):
    assert text in refusal(pem)


def test_a_request_signed_with_another_key_is_refused():
    """Proof of possession: the public key of somebody else cannot be certified."""
    der = bytearray(base64.b64decode("".join(make_csr(private_key(LEAF_KEY), WEB.uri).splitlines()[1:-1])))
    own = keys.public_key_der(private_key(LEAF_KEY).public_key())
    start = bytes(der).index(own)
    der[start : start + len(own)] = keys.public_key_der(private_key("ec-256").public_key())

    pem = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM).decode()

    assert "possession of the key is not proven" in refusal(pem)


def test_a_second_extension_request_does_not_slip_past():
    names = x509.SubjectAlternativeName([uri(WEB.uri)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=False)
    pem = (
        builder.add_attribute(EXTENSION_REQUEST, b"\x30\x00")
        .sign(private_key(LEAF_KEY), hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )

    assert "more than one extension request" in refusal(pem.decode())


def _tlv(tag: int, body: bytes) -> bytes:
    length = bytes([len(body)]) if len(body) < 128 else b"\x81" + bytes([len(body)])
    return bytes([tag]) + length + body


def test_an_attribute_with_two_values_is_the_fault_of_its_own_csr_alone():
    key = private_key(LEAF_KEY)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    challenge = _tlv(0x30, bytes.fromhex("06092a864886f70d010907") + _tlv(0x31, _tlv(0x0C, b"a") + _tlv(0x0C, b"b")))
    info = _tlv(0x30, b"\x02\x01\x00\x30\x00" + keys.public_key_der(key.public_key()) + _tlv(0xA0, challenge))
    signature = key.sign(info, ec.ECDSA(hashes.SHA256()))
    der = _tlv(0x30, info + bytes.fromhex("300a06082a8648ce3d040302") + _tlv(0x03, b"\x00" + signature))
    pem = x509.load_der_x509_csr(der).public_bytes(Encoding.PEM).decode()

    odd, good = check(pem, make_csr(key, WEB.uri))

    assert isinstance(odd, InvalidCSR)
    assert "cannot be read" in odd.detail
    assert isinstance(good, CheckedCSR)


_GOOD_DER = base64.b64decode("".join(make_csr(private_key(LEAF_KEY), WEB.uri).splitlines()[1:-1]))


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, len(_GOOD_DER) - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_no_damage_to_a_request_raises_or_changes_whom_it_names(position: int, byte: int, cut: bool):
    damaged = _GOOD_DER[:position] + bytes([byte]) + (b"" if cut else _GOOD_DER[position + 1 :])
    text = base64.encodebytes(damaged).decode()

    (result,) = check(f"-----BEGIN CERTIFICATE REQUEST-----\n{text}-----END CERTIFICATE REQUEST-----\n")

    assert isinstance(result, InvalidCSR) or (result.service_id == WEB and damaged == _GOOD_DER)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_no_text_raises(text: str):
    (result,) = check(text)

    assert isinstance(result, InvalidCSR)
