"""Certificate signing requests: of others, for others, for more than one, with tricks in keys, names, DER and armour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tests.contract.bad_input.case import SIGN, Case, put
from tests.testkit import der
from tests.testkit.der import Request, san, tlv, uri
from tests.testkit.keys import private_key

DC = "dc1"


def good_uri(trust_domain: str, service: str = "web") -> str:
    """What a service of ours asks for."""
    return f"spiffe://{trust_domain}/ns/default/dc/{DC}/svc/{service}"


def good(trust_domain: str) -> Request:
    """A request that is signed."""
    return Request(extensions=san(uri(good_uri(trust_domain)), critical=True))


def cases(trust_domain: str) -> Iterator[Case]:
    """All of them."""
    for group in (uris, names, requests, keys, encodings, armour, bodies):
        for name, body in group(trust_domain).items():
            text = body.pem() if isinstance(body, Request) else body
            yield put(f"csr-{group.__name__}-{name}", SIGN, text)


def uris(td: str) -> Mapping[str, object]:
    """One URI that is not that of a service of this CA."""
    other = "11111111-2222-3333-4444-555555555555.consul"
    wrong: dict[str, str | bytes] = {
        "foreign-trust-domain": good_uri(other),
        "trust-domain-as-suffix": good_uri(f"evil.{td}"),
        "trust-domain-as-prefix": good_uri(f"{td}.evil"),
        "trust-domain-dot": good_uri(f"{td}."),
        "trust-domain-empty": good_uri(""),
        "trust-domain-port": good_uri(f"{td}:443"),
        "trust-domain-user": good_uri(f"user@{td}"),
        "trust-domain-percent": good_uri(td.replace("consul", "%63onsul")),
        "trust-domain-unicode": good_uri(td.replace("consul", "соnsul")),
        "trust-domain-backslash": f"spiffe:\\\\{td}\\ns\\default\\dc\\dc1\\svc\\web",
        "other-datacenter": f"spiffe://{td}/ns/default/dc/dc2/svc/web",
        "datacenter-case": f"spiffe://{td}/ns/default/dc/DC1/svc/web",
        "other-namespace": f"spiffe://{td}/ns/other/dc/dc1/svc/web",
        "no-namespace": f"spiffe://{td}/dc/dc1/svc/web",
        "agent": f"spiffe://{td}/agent/client/dc/dc1/id/web",
        "gateway": f"spiffe://{td}/gateway/mesh/dc/dc1",
        "server": f"spiffe://{td}/agent/server/dc/dc1",
        "probe": f"spiffe://{td}/caserver/probe",
        "signing": f"spiffe://{td}",
        "signing-slash": f"spiffe://{td}/",
        "https": good_uri(td).replace("spiffe", "https"),
        "no-scheme": good_uri(td).removeprefix("spiffe:"),
        "scheme-space": " " + good_uri(td),
        "query": good_uri(td) + "?a=b",
        "fragment": good_uri(td) + "#a",
        "trailing-slash": good_uri(td) + "/",
        "two-services": good_uri(td) + "/web2",
        "no-service": good_uri(td, ""),
        "dot": good_uri(td, "."),
        "dot-dot": good_uri(td, ".."),
        "encoded-dot-dot": good_uri(td, "%2e%2e"),
        "traversal": f"spiffe://{td}/ns/default/dc/dc1/svc/../svc/web",
        "double-slash": f"spiffe://{td}//ns/default/dc/dc1/svc/web",
        "encoded-slash": good_uri(td, "web%2Fadmin"),
        "encoded-keyword": f"spiffe://{td}/%6es/default/dc/dc1/svc/web",
        "bad-percent": good_uri(td, "web%zz"),
        "cut-percent": good_uri(td, "web%2"),
        "encoded-nul": good_uri(td, "web%00"),
        "encoded-newline": good_uri(td, "web%0A"),
        "encoded-delete": good_uri(td, "web%7F"),
        "encoded-c1": good_uri(td, "web%C2%80"),
        "encoded-not-utf8": good_uri(td, "web%FF"),
        "encoded-overlong": good_uri(td, "web%C0%AF"),
        "encoded-surrogate": good_uri(td, "web%ED%A0%80"),
        "space": good_uri(td, "a b"),
        "nul": good_uri(td, "web\0"),
        "nul-cut": good_uri(td, "web") + "\0.evil",
        "newline": good_uri(td, "web\n"),
        "raw-utf8": good_uri(td, "é"),
        "raw-latin1": good_uri(td).encode() + b"\xe9",
        "raw-not-utf8": good_uri(td).encode() + b"\xff\xfe",
        "angle": good_uri(td, "<script>"),
        "quote": good_uri(td, 'a"b'),
        "too-long": good_uri(td, "w" * 2000),
        "far-too-long": good_uri(td, "w" * 6000),
        "empty": b"",
    }
    return {name: Request(extensions=san(uri(value))) for name, value in wrong.items()}


def names(td: str) -> Mapping[str, object]:
    """More names than one, or others."""
    ours, also = uri(good_uri(td)), uri(good_uri(td, "admin"))
    combinations = {
        "none": (),
        "two-uris": (ours, also),
        "same-uri-twice": (ours, ours),
        "foreign-second": (ours, uri("spiffe://evil/ns/default/dc/dc1/svc/web")),
        "dns-beside": (ours, (der.DNS_NAME, b"web.service.consul")),
        "dns-alone": ((der.DNS_NAME, b"web"),),
        "dns-first": ((der.DNS_NAME, b"web"), ours),
        "email-beside": (ours, (der.EMAIL_NAME, b"a@b.c")),
        "ip-beside": (ours, (der.IP_NAME, b"\x7f\0\0\1")),
        "ip-short": (ours, (der.IP_NAME, b"\x7f")),
        "directory-beside": (ours, (der.DIRECTORY_NAME, der.name(b"x"))),
        "rid-beside": (ours, (der.RID_NAME, b"\x2a\x03")),
        "other-beside": (ours, (der.OTHER_NAME, der.oid("1.2.3") + tlv(0xA0, tlv(der.UTF8, b"x")))),
        "unknown-tag": (ours, (0x9F, b"\x20x")),
        "hundred-uris": tuple(uri(good_uri(td, f"s{at}")) for at in range(100)),
    }
    found: dict[str, object] = {name: Request(extensions=san(*given)) for name, given in combinations.items()}
    asked = tlv(der.SEQUENCE, san(ours))
    attribute = tlv(der.SEQUENCE, der.oid(der.EXTENSION_REQUEST), tlv(der.SET, asked))
    found["two-san-extensions"] = Request(extensions=san(ours) + san(also))
    found["two-extension-requests"] = Request(attributes=tlv(0xA0, attribute, attribute))
    found["two-values-of-one-request"] = Request(
        attributes=tlv(0xA0, tlv(der.SEQUENCE, der.oid(der.EXTENSION_REQUEST), tlv(der.SET, asked, asked)))
    )
    found["common-name-alone"] = Request(subject=der.name(b"web"))
    found["no-attributes"] = Request(attributes=b"")
    found["empty-san"] = Request(extensions=der.extension(der.SAN, b""))
    found["san-not-a-sequence"] = Request(extensions=der.extension(der.SAN, tlv(der.UTF8, good_uri(td).encode())))
    found["san-trailing"] = Request(
        extensions=der.extension(der.SAN, tlv(der.SEQUENCE, tlv(*ours)) + tlv(der.UTF8, b"x"))
    )
    return found


def requests(td: str) -> Mapping[str, object]:
    """Asking for more than a leaf, or without proof of possession."""
    ours = san(uri(good_uri(td)))
    sound = good(td)
    own_ca = der.extension(der.BASIC_CONSTRAINTS, tlv(der.SEQUENCE, tlv(der.BOOLEAN, b"\xff")), critical=True)
    other_signature = Request(extensions=ours, subject=der.name(b"other")).der()[-72:]
    return {
        "ca": Request(extensions=ours + own_ca),
        "unsigned": Request(extensions=ours, signature=tlv(der.BIT_STRING, b"\0")),
        "signature-of-zeros": Request(extensions=ours, signature=tlv(der.BIT_STRING, bytes(71))),
        "signature-of-another": Request(extensions=ours, signature=tlv(der.BIT_STRING, b"\0" + other_signature)),
        "signed-by-another-key": Request(extensions=ours, public=der.public_key(private_key("ec-256-b"))),
        "signature-r-zero": Request(
            extensions=ours,
            signature=tlv(der.BIT_STRING, b"\0" + tlv(der.SEQUENCE, der.integer(0), der.integer(0))),
        ),
        "signature-negative": Request(
            extensions=ours,
            signature=tlv(der.BIT_STRING, b"\0" + tlv(der.SEQUENCE, der.integer(-1), der.integer(-1))),
        ),
        "signature-unused-bits": Request(extensions=ours, signature=tlv(der.BIT_STRING, b"\7\x80")),
        "sha1": Request(extensions=ours, algorithm=der.algorithm(der.ECDSA_SHA1)),
        "md5": Request(extensions=ours, algorithm=der.algorithm(der.RSA_MD5)),
        "algorithm-of-rsa": Request(extensions=ours, algorithm=der.algorithm(der.RSA_SHA256)),
        "unknown-algorithm": Request(extensions=ours, algorithm=der.algorithm("1.2.3.4")),
        "version-2": Request(extensions=ours, version=der.integer(1)),
        "version-negative": Request(extensions=ours, version=der.integer(-1)),
        "version-huge": Request(extensions=ours, version=der.integer(1 << 200)),
        "version-missing": Request(extensions=ours, version=b""),
        "last-byte-changed": der.armoured(sound.der()[:-1] + bytes((sound.der()[-1] ^ 1,))),
    }


def keys(td: str) -> Mapping[str, object]:
    """Keys that are weak, of another kind, or no keys."""
    ours = san(uri(good_uri(td)))
    modulus = der.modulus("rsa-2048")
    p256, point = "1.2.840.10045.3.1.7", der.public_key(private_key("ec-256"))[-65:]
    publics = {
        "rsa-1024": der.rsa_public_key((1 << 1023) + 1, 65537),
        "rsa-512": der.rsa_public_key((1 << 511) + 1, 65537),
        "rsa-16384": der.rsa_public_key((1 << 16383) + 1, 65537),
        "rsa-exponent-1": der.rsa_public_key(modulus, 1),
        "rsa-exponent-2": der.rsa_public_key(modulus, 2),
        "rsa-exponent-3": der.rsa_public_key(modulus, 3),
        "rsa-exponent-0": der.rsa_public_key(modulus, 0),
        "rsa-exponent-even": der.rsa_public_key(modulus, 65536),
        "rsa-exponent-negative": der.rsa_public_key(modulus, -65537),
        "rsa-exponent-huge": der.rsa_public_key(modulus, (1 << 2000) + 1),
        "rsa-modulus-negative": der.rsa_public_key(-modulus, 65537),
        "rsa-modulus-zero": der.rsa_public_key(0, 65537),
        "rsa-modulus-even": der.rsa_public_key(1 << 2047, 65537),
        "ec-off-curve": der.ec_public_key(p256, b"\4" + bytes(63) + b"\1"),
        "ec-infinity": der.ec_public_key(p256, b"\0"),
        "ec-short-point": der.ec_public_key(p256, point[:40]),
        "ec-long-point": der.ec_public_key(p256, point + b"\0"),
        "ec-unknown-curve": der.ec_public_key("1.2.3", point),
        "ec-secp256k1": der.ec_public_key("1.3.132.0.10", point),
        "ec-explicit-curve": tlv(
            der.SEQUENCE,
            tlv(der.SEQUENCE, der.oid("1.2.840.10045.2.1"), tlv(der.SEQUENCE, der.integer(1))),
            tlv(der.BIT_STRING, b"\0" + point),
        ),
        "ed25519": tlv(der.SEQUENCE, tlv(der.SEQUENCE, der.oid("1.3.101.112")), tlv(der.BIT_STRING, bytes(33))),
        "x25519": tlv(der.SEQUENCE, tlv(der.SEQUENCE, der.oid("1.3.101.110")), tlv(der.BIT_STRING, bytes(33))),
        "dsa": tlv(
            der.SEQUENCE, tlv(der.SEQUENCE, der.oid("1.2.840.10040.4.1")), tlv(der.BIT_STRING, b"\0" + der.integer(7))
        ),
        "unknown-kind": tlv(der.SEQUENCE, tlv(der.SEQUENCE, der.oid("1.2.3")), tlv(der.BIT_STRING, b"\0x")),
        "empty": tlv(der.SEQUENCE),
    }
    found: dict[str, object] = {name: Request(extensions=ours, public=value) for name, value in publics.items()}
    found["ec-224"] = Request(extensions=ours, key="ec-224")
    return found


def encodings(td: str) -> Mapping[str, object]:
    """Bytes that are no DER, or no PKCS#10."""
    sound = good(td).der()
    raw = {
        "empty": b"",
        "one-byte": b"\x30",
        "cut-short": sound[:-20],
        "cut-in-half": sound[: len(sound) // 2],
        "trailing-byte": sound + b"\0",
        "trailing-request": sound + sound,
        "inside-trailing": Request(extensions=san(uri(good_uri(td))), after=tlv(der.NULL)).der(),
        "indefinite-length": b"\x30\x80" + sound[4:] + b"\0\0",
        "long-length": b"\x30\x84\0\0" + sound[2:],
        "huge-length": b"\x30\x84\xff\xff\xff\xff" + sound[4:],
        "reserved-length": b"\x30\xff" + sound[4:],
        "wrong-tag": b"\x31" + sound[1:],
        "certificate": der.Certificate(extensions=(der.CA,)).der(),
        "public-key": der.public_key(private_key("ec-256")),
        "nested": b"\x30\x80" * 4000,
        "nested-definite": _nested(300),
        "zeros": bytes(300),
        "ones": b"\xff" * 300,
        "text": b"spiffe://not-der",
        "json": b'{"CSR": "x"}',
    }
    return {name: der.armoured(value) for name, value in raw.items()}


def _nested(depth: int) -> bytes:
    content = b""
    for _ in range(depth):
        content = tlv(der.SEQUENCE, content)
    return content


def armour(td: str) -> Mapping[str, object]:
    """PEM that is cut, doubled, of another label or full of something else."""
    sound = good(td).pem()
    begin, end = "-----BEGIN CERTIFICATE REQUEST-----", "-----END CERTIFICATE REQUEST-----"
    lines = sound.splitlines()
    return {
        "none": "hello",
        "spaces": "   \n\t ",
        "begin-only": begin,
        "begin-and-end": f"{begin}\n{end}\n",
        "no-end": sound.replace(end, ""),
        "no-begin": sound.replace(begin, ""),
        "other-end": sound.replace(end, "-----END CERTIFICATE-----"),
        "label-certificate": sound.replace("CERTIFICATE REQUEST", "CERTIFICATE"),
        "label-key": sound.replace("CERTIFICATE REQUEST", "PRIVATE KEY"),
        "label-lower": sound.replace("CERTIFICATE REQUEST", "certificate request"),
        "label-trailing-space": sound.replace("REQUEST-----", "REQUEST -----"),
        "four-dashes": sound.replace("-----", "----"),
        "two-requests": sound + sound,
        "request-and-certificate": sound + der.armoured(b"\x30\0", "CERTIFICATE"),
        "request-and-key": sound + der.armoured(b"\x30\0", "PRIVATE KEY"),
        "not-base64": sound.replace(lines[1], "*" * 64),
        "url-safe-base64": "\n".join([lines[0], "-_" * 32, *lines[2:]]),
        "one-line-missing": "\n".join([lines[0], *lines[2:]]),
        "one-letter-missing": "\n".join([lines[0], lines[1][:-1], *lines[2:]]),
        "padding-inside": "\n".join([lines[0], lines[1][:-2] + "==", *lines[2:]]),
        "nul-inside": sound[:100] + "\0" + sound[100:],
        "utf8-inside": sound[:100] + "é" + sound[100:],
        "literal-newlines": sound.replace("\n", "\\n"),
        "der-without-armour": good(td).der(),
        "too-large": f"{begin}\n{'A' * 20_000}\n{end}\n",
        "begins-only": begin * 400,
    }


def bodies(td: str) -> Mapping[str, object]:
    """What is around the requests."""
    sound = good(td).pem()
    return {
        "empty": "",
        "empty-object": {},
        "null": '{"CSR": null}',
        "number": '{"CSR": 5}',
        "list-for-text": {"CSR": [sound]},
        "object-for-text": {"CSR": {"a": sound}},
        "both": {"CSR": sound, "CSRs": [sound]},
        "extra-key": {"CSR": sound, "TTL": "8760h"},
        "other-key": {"csr": sound},
        "twice": f'{{"CSR": {_quoted(sound)}, "CSR": {_quoted(sound)}}}',
        "no-requests": {"CSRs": []},
        "text-for-list": {"CSRs": sound},
        "null-among": {"CSRs": [sound, None]},
        "number-among": {"CSRs": [sound, 5]},
        "list-among": {"CSRs": [[sound]]},
        "hundred-and-one": {"CSRs": ["x"] * 101},
        "top-level-list": '["x"]',
        "truncated": f'{{"CSR": {_quoted(sound)}',
        "junk-behind": f'{{"CSR": {_quoted(sound)}}} x',
        "not-utf8": b'{"CSR": "\xff\xfe"}',
        "bom": b"\xef\xbb\xbf" + f'{{"CSR": {_quoted(sound)}}}'.encode(),
        "utf16": f'{{"CSR": {_quoted(sound)}}}'.encode("utf-16"),
        "deep": "[" * 100_000,
        "deep-object": '{"CSR":' * 20_000,
        "too-large": "x" * (513 * 1024),
        "control-in-text": '{"CSR": "a\nb"}',
        "lone-surrogate": '{"CSR": "\\ud800"}',
    }


def _quoted(text: str) -> str:
    return '"' + text.replace("\n", "\\n") + '"'
