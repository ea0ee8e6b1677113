"""Reading, writing and judging CA keys."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from caserver.errors import InvalidConfig
from caserver.fields import Secret
from caserver.pki import keys
from tests.testkit.keys import ed25519_key, key_pem, private_key


@pytest.mark.parametrize("name", ["ec-224", "ec-256", "ec-384", "ec-521", "rsa-2048"])
def test_a_key_is_read_in_every_usual_form(name: str):
    key = private_key(name)
    numbers = key.public_key().public_numbers()

    for pem in (Secret(keys.sec1_pem(key)), keys.pkcs8_pem(key), Secret("\r\n" + key_pem(name).replace("\n", "\r\n"))):
        assert keys.load_private_key(pem).public_key().public_numbers() == numbers


def test_rsa_numbers_that_do_not_belong_together_are_refused_unless_the_key_was_judged_before():
    sound = private_key("rsa-2048")
    assert isinstance(sound, rsa.RSAPrivateKey)
    n = sound.private_numbers()
    odd = rsa.RSAPrivateNumbers(n.p, n.q, n.d + 2, n.dmp1, n.dmq1, n.iqmp, n.public_numbers)
    pem = keys.pkcs8_pem(odd.private_key(unsafe_skip_rsa_key_validation=True))

    with pytest.raises(InvalidConfig, match="does not hold a readable private key"):
        keys.load_private_key(pem)
    assert keys.load_private_key(pem, judged=True).public_key() == sound.public_key()


def test_the_parameters_that_openssl_ecparam_writes_first_are_passed_over():
    parameters = "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"

    loaded = keys.load_private_key(Secret(parameters + keys.sec1_pem(private_key("ec-256"))))

    assert loaded.public_key() == private_key("ec-256").public_key()


def _pem(key: object, form: PrivateFormat, *, password: bytes | None = None) -> str:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, form, encryption).decode()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize(
    ("pem", "text"),
    [
        ("canary", "no PEM-encoded data found"),
        ("", "no PEM-encoded data found"),
        (
            "-----BEGIN CERTIFICATE-----\ncanary\n-----END CERTIFICATE-----\n",
            "unknown PEM block type for signing key: CERTIFICATE",
        ),
        ("-----BEGIN PRIVATE KEY-----\ncanary\n-----END PRIVATE KEY-----\n", "does not hold a readable private key"),
        (key_pem("ec-256").replace("\n", "\\n"), "does not hold a readable private key"),
        (key_pem("ec-256") * 2, "2 PEM blocks"),
        (key_pem("ed25519"), "unsupported key type"),
        (_pem(private_key("ec-256"), PrivateFormat.PKCS8, password=b"canary"), "the key is encrypted"),
        (_pem(private_key("ec-256"), PrivateFormat.TraditionalOpenSSL, password=b"canary"), "the key is encrypted"),
        (_pem(ec.derive_private_key(7, ec.SECP256K1()), PrivateFormat.PKCS8), "curve secp256k1"),
        ("canary" * 10_000, "longer than"),
    ],
)
def test_a_key_that_cannot_sign_is_refused_and_never_shown(pem: str, text: str):
    with pytest.raises(InvalidConfig) as refused:
        keys.load_private_key(Secret(pem))

    assert text in refused.value.detail
    assert refused.value.detail.startswith("error parsing private key: ")
    assert "canary" not in refused.value.detail
    assert refused.value.__cause__ is None


def test_a_short_rsa_key_is_refused():
    short = rsa.generate_private_key(65537, 1024)  # noqa: S505 - the weak key under test

    assert "1024 bits" in str(keys.public_key_fault(short.public_key()))


def test_a_small_exponent_is_refused():
    numbers = private_key("rsa-2048").public_key().public_numbers()
    assert isinstance(numbers, rsa.RSAPublicNumbers)

    assert "exponent" in str(keys.public_key_fault(rsa.RSAPublicNumbers(3, numbers.n).public_key()))


@pytest.mark.parametrize(
    ("name", "info"), [("ec-224", ("ec", 224)), ("ec-521", ("ec", 521)), ("rsa-4096", ("rsa", 4096))]
)
def test_a_key_is_named_by_kind_and_bits(name: str, info: tuple[str, int]):
    assert keys.key_info(private_key(name).public_key()) == info


def test_consuls_text_names_a_key_of_another_kind():
    with pytest.raises(InvalidConfig, match="error extracting root key info: unsupported key type"):
        keys.key_info(ed25519_key().public_key())


def test_the_key_id_is_the_sha_256_of_the_public_key_info():
    public = private_key("ec-256").public_key()

    assert keys.subject_key_id(public) == hashlib.sha256(keys.public_key_der(public)).digest()
    assert keys.colon_hex(b"\x0a\xff") == "0a:ff"


@pytest.mark.parametrize(
    ("name", "hash_name"),
    [("ec-224", "sha256"), ("ec-256", "sha256"), ("ec-384", "sha384"), ("ec-521", "sha512"), ("rsa-4096", "sha256")],
)
def test_a_root_signs_itself_with_the_hash_of_its_curve(name: str, hash_name: str):
    assert keys.root_hash(private_key(name)).name == hash_name


def test_leaf_keys_are_written_in_sec1():
    assert keys.sec1_pem(private_key("ec-256")).startswith("-----BEGIN EC PRIVATE KEY-----\n")
