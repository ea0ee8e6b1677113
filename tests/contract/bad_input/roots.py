"""Roots and keys in a configuration that would break what they sign, or are none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime

from tests.contract.bad_input.case import CONFIGURATION, Case, put
from tests.testkit import der
from tests.testkit.der import CA, IDENTIFIER, USAGE, Certificate, san, tlv, uri
from tests.testkit.keys import key_pem, private_key

TLS_CLIENT = tlv(der.SEQUENCE, der.oid("1.3.6.1.5.5.7.3.2"))
P256 = "1.2.840.10045.3.1.7"


def _at(year: int, month: int = 1, day: int = 1) -> bytes:
    return der.instant(datetime(year, month, day, tzinfo=UTC))


def good(trust_domain: str) -> Certificate:
    """A root that is taken."""
    return Certificate(extensions=(CA, USAGE, IDENTIFIER, san(uri(f"spiffe://{trust_domain}"))))


def cases(trust_domain: str) -> Iterator[Case]:
    """All of them."""
    for group in (profiles, names, moments, numbers, keys, encodings, armour):
        for name, given in group(trust_domain).items():
            certificate, key = given if isinstance(given, tuple) else (given, key_pem("ec-256"))
            text = certificate.pem() if isinstance(certificate, Certificate) else certificate
            config = {"PrivateKey": key, "RootCert": text}
            yield put(f"root-{group.__name__}-{name}", CONFIGURATION, {"Provider": "consul", "Config": config})
    for name, key in private_keys().items():
        config = {"PrivateKey": key, "RootCert": good(trust_domain).pem()}
        yield put(f"root-private-{name}", CONFIGURATION, {"Provider": "consul", "Config": config})
        yield put(f"key-{name}", CONFIGURATION, {"Provider": "consul", "Config": {"PrivateKey": key}})


def profiles(td: str) -> Mapping[str, object]:
    """Extensions with which no verifier, or not every one, takes it as a CA."""
    name = san(uri(f"spiffe://{td}"))
    constraints, usage = der.BASIC_CONSTRAINTS, der.KEY_USAGE
    true = tlv(der.BOOLEAN, b"\xff")
    limits = {
        "excluded-host": tlv(0xA1, tlv(der.SEQUENCE, tlv(der.URI_NAME, td.encode()))),
        "permitted-other": tlv(0xA0, tlv(der.SEQUENCE, tlv(der.URI_NAME, b"other.consul"))),
        "permitted-dns": tlv(0xA0, tlv(der.SEQUENCE, tlv(der.DNS_NAME, b"example.com"))),
    }
    sets = {
        "no-extensions": (),
        "name-alone": (name,),
        "no-constraints": (USAGE, IDENTIFIER, name),
        "not-a-ca": (der.extension(constraints, tlv(der.SEQUENCE), critical=True), USAGE, IDENTIFIER, name),
        "constraints-not-critical": (der.extension(constraints, tlv(der.SEQUENCE, true)), USAGE, IDENTIFIER, name),
        "path-length": (
            der.extension(constraints, tlv(der.SEQUENCE, true, der.integer(0)), critical=True),
            USAGE,
            IDENTIFIER,
            name,
        ),
        "path-length-negative": (
            der.extension(constraints, tlv(der.SEQUENCE, true, der.integer(-1)), critical=True),
            USAGE,
            IDENTIFIER,
            name,
        ),
        "constraints-garbage": (der.extension(constraints, b"\xff\xff", critical=True), USAGE, IDENTIFIER, name),
        "constraints-twice": (CA, CA, USAGE, IDENTIFIER, name),
        "no-usage": (CA, IDENTIFIER, name),
        "usage-without-signing": (
            CA,
            der.extension(usage, tlv(der.BIT_STRING, b"\x07\x80"), critical=True),
            IDENTIFIER,
            name,
        ),
        "usage-empty": (CA, der.extension(usage, tlv(der.BIT_STRING, b"\0"), critical=True), IDENTIFIER, name),
        "purposes-without-server": (
            CA,
            USAGE,
            IDENTIFIER,
            name,
            der.extension(der.EXTENDED_KEY_USAGE, TLS_CLIENT),
        ),
        "no-identifier": (CA, USAGE, name),
        "identifier-empty": (CA, USAGE, der.extension(der.SUBJECT_KEY_ID, tlv(der.OCTET_STRING)), name),
        "authority-of-another": (
            CA,
            USAGE,
            IDENTIFIER,
            name,
            der.extension(der.AUTHORITY_KEY_ID, tlv(der.SEQUENCE, tlv(0x80, bytes(20)))),
        ),
        "critical-unknown": (CA, USAGE, IDENTIFIER, name, der.extension("1.2.3.4", b"\5\0", critical=True)),
        **{
            f"names-{key}": (CA, USAGE, IDENTIFIER, name, der.extension(der.NAME_CONSTRAINTS, tlv(der.SEQUENCE, value)))
            for key, value in limits.items()
        },
    }
    return {key: Certificate(extensions=value) for key, value in sets.items()}


def names(td: str) -> Mapping[str, object]:
    """Of another cluster, of several, or of none."""
    ours = uri(f"spiffe://{td}")
    sans = {
        "other-domain": (uri("spiffe://11111111-2222-3333-4444-555555555555.consul"),),
        "no-uri": ((der.DNS_NAME, b"ca.example.com"),),
        "two-uris": (ours, uri("spiffe://other.consul")),
        "same-twice": (ours, ours),
        "dns-beside": (ours, (der.DNS_NAME, b"ca.example.com")),
        "with-path": (uri(f"spiffe://{td}/ns/default"),),
        "with-slash": (uri(f"spiffe://{td}/"),),
        "http": (uri(f"http://{td}"),),
        "upper-case-scheme-host": (uri(f"SPIFFE://{td.upper()}"),),
        "service": (uri(f"spiffe://{td}/ns/default/dc/dc1/svc/web"),),
        "nul": (uri(f"spiffe://{td}\0.evil"),),
        "not-utf8": (uri(b"spiffe://\xff\xfe"),),
        "empty": (uri(""),),
    }
    found: dict[str, object] = {
        key: Certificate(extensions=(CA, USAGE, IDENTIFIER, san(*value))) for key, value in sans.items()
    }
    extensions = good(td).extensions
    found["empty-subject"] = Certificate(extensions, subject=der.name(b""), issuer=der.name(b""))
    found["issuer-of-another"] = Certificate(extensions, issuer=der.name(b"Somebody Else"))
    found["signed-by-another"] = Certificate(extensions, signer="ec-256-b")
    return found


def moments(td: str) -> Mapping[str, object]:
    """Not now, or not for long enough."""
    extensions = good(td).extensions
    year_zero = tlv(der.GENERALIZED_TIME, b"00000101000000Z")
    return {
        "expired": Certificate(extensions, not_before=_at(2020), not_after=_at(2021)),
        "expired-yesterday": Certificate(extensions, not_after=_at(2026, 11, 22)),
        "future": Certificate(extensions, not_before=_at(2027), not_after=_at(2037)),
        "far-future": Certificate(extensions, not_before=_at(2500), not_after=_at(2600)),
        "shorter-than-leaves": Certificate(extensions, not_after=_at(2026, 11, 24)),
        "backwards": Certificate(extensions, not_before=_at(2036), not_after=_at(2026)),
        "year-zero": Certificate(extensions, not_before=year_zero, not_after=year_zero),
        "no-such-day": Certificate(extensions, not_after=tlv(der.UTC_TIME, b"360231000000Z")),
        "not-a-time": Certificate(extensions, not_after=tlv(der.UTC_TIME, b"tomorrow")),
        "no-zone": Certificate(extensions, not_after=tlv(der.UTC_TIME, b"360101000000")),
        "a-number": Certificate(extensions, not_after=der.integer(5)),
    }


def numbers(td: str) -> Mapping[str, object]:
    """Serial numbers, versions and algorithms that no certificate may have."""
    extensions = good(td).extensions
    return {
        "serial-negative": Certificate(extensions, serial=der.integer(-77)),
        "serial-zero": Certificate(extensions, serial=der.integer(0)),
        "serial-huge": Certificate(extensions, serial=der.integer(1 << 2000)),
        "serial-empty": Certificate(extensions, serial=tlv(der.INTEGER)),
        "serial-text": Certificate(extensions, serial=tlv(der.UTF8, b"77")),
        "version-1": Certificate(extensions, version=b""),
        "version-4": Certificate(extensions, version=tlv(0xA0, der.integer(3))),
        "version-negative": Certificate(extensions, version=tlv(0xA0, der.integer(-1))),
        "sha1": Certificate(extensions, algorithm=der.algorithm(der.ECDSA_SHA1)),
        "unknown-algorithm": Certificate(extensions, algorithm=der.algorithm("1.2.3.4")),
        "two-algorithms": Certificate(extensions, outer_algorithm=der.algorithm(der.RSA_SHA256)),
        "signature-of-zeros": Certificate(extensions, signature=tlv(der.BIT_STRING, bytes(72))),
    }


def keys(td: str) -> Mapping[str, object]:
    """Public keys that are weak, or not those of the private key."""
    extensions = good(td).extensions
    modulus = der.modulus("rsa-2048")
    sound = Certificate(extensions, algorithm=der.algorithm(der.RSA_SHA256), key="rsa-2048")
    publics = {
        "rsa-1024": der.rsa_public_key((1 << 1023) + 1, 65537),
        "rsa-exponent-1": der.rsa_public_key(modulus, 1),
        "rsa-exponent-3": der.rsa_public_key(modulus, 3),
        "rsa-exponent-even": der.rsa_public_key(modulus, 65536),
        "rsa-exponent-huge": der.rsa_public_key(modulus, (1 << 2000) + 1),
        "rsa-negative": der.rsa_public_key(-modulus, 65537),
    }
    found: dict[str, object] = {
        name: (replace(sound, public=value), key_pem("rsa-2048")) for name, value in publics.items()
    }
    found["ec-off-curve"] = Certificate(extensions, public=der.ec_public_key(P256, b"\4" + bytes(63) + b"\1"))
    found["ec-unknown-curve"] = Certificate(extensions, public=der.ec_public_key("1.2.3", b"\4" + bytes(64)))
    found["of-another-key"] = (good(td), key_pem("ec-256-b"))
    found["of-another-kind"] = (good(td), key_pem("rsa-2048"))
    found["ed25519"] = (good(td), key_pem("ed25519"))
    return found


def encodings(td: str) -> Mapping[str, object]:
    """Bytes that are no certificate."""
    sound = good(td).der()
    raw = {
        "cut": sound[:-10],
        "trailing-byte": sound + b"\0",
        "trailing-certificate": sound + sound,
        "indefinite-length": b"\x30\x80" + sound[4:] + b"\0\0",
        "huge-length": b"\x30\x84\xff\xff\xff\xff" + sound[4:],
        "wrong-tag": b"\x31" + sound[1:],
        "inside-trailing": Certificate(good(td).extensions, after=tlv(der.NULL)).der(),
        "one-bit": sound[:-1] + bytes((sound[-1] ^ 1,)),
        "request": der.Request().der(),
        "empty": b"",
        "zeros": bytes(400),
    }
    return {name: der.armoured(value, "CERTIFICATE") for name, value in raw.items()}


def armour(td: str) -> Mapping[str, object]:
    """PEM with something else around, inside or instead."""
    sound = good(td).pem()
    return {
        "two-certificates": sound + sound,
        "certificate-and-key": sound + key_pem("ec-256"),
        "text-before": "Subject: CN=x\n" + sound,
        "text-behind": sound + "and more\n",
        "key-for-certificate": key_pem("ec-256"),
        "label": sound.replace("CERTIFICATE", "TRUSTED CERTIFICATE"),
        "other-end": sound.replace("END CERTIFICATE", "END X509 CRL"),
        "no-end": sound.replace("-----END CERTIFICATE-----", ""),
        "literal-newlines": sound.replace("\n", "\\n"),
        "nul": sound[:100] + "\0" + sound[100:],
        "garbage": "garbage",
        "blank": " ",
    }


def private_keys() -> Mapping[str, str]:
    """Private keys that are none, weak, or hidden."""
    sound = key_pem("ec-256")
    modulus = der.modulus("rsa-2048")
    pkcs1 = tlv(der.SEQUENCE, *map(der.integer, (0, modulus, 65537, 5, 3, 7, 1, 1, 1)))
    small = tlv(der.SEQUENCE, *map(der.integer, (0, 3233, 17, 413, 61, 53, 53, 49, 38)))
    return {
        "garbage": "garbage",
        "blank": "\n",
        "empty-block": der.armoured(b"", "PRIVATE KEY"),
        "cut": der.armoured(b"\x30\x82\1\0", "PRIVATE KEY"),
        "two-keys": sound + sound,
        "public": der.armoured(der.public_key(private_key("ec-256")), "PUBLIC KEY"),
        "encrypted": der.armoured(b"\x30\0", "ENCRYPTED PRIVATE KEY"),
        "encrypted-headers": "-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAAAA\n-----END EC PRIVATE KEY-----\n",
        "openssh": der.armoured(b"openssh-key-v1\0", "OPENSSH PRIVATE KEY"),
        "ed25519": key_pem("ed25519"),
        "rsa-inconsistent": der.armoured(pkcs1, "RSA PRIVATE KEY"),
        "rsa-12-bits": der.armoured(small, "RSA PRIVATE KEY"),
        "ec-scalar-zero": der.armoured(_sec1(0), "EC PRIVATE KEY"),
        "ec-scalar-beyond-the-order": der.armoured(_sec1((1 << 256) - 1), "EC PRIVATE KEY"),
        "nul": sound[:60] + "\0" + sound[60:],
        "too-long": "-----BEGIN PRIVATE KEY-----\n" + "A" * 40_000 + "\n-----END PRIVATE KEY-----\n",
    }


def _sec1(scalar: int) -> bytes:
    curve = tlv(0xA0, der.oid(P256))
    return tlv(der.SEQUENCE, der.integer(1), tlv(der.OCTET_STRING, scalar.to_bytes(32, "big")), curve)
