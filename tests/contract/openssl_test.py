"""What the ``openssl`` program says of our certificates, and what we say of its."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from caserver.fields import Secret, fault_text
from caserver.internode.identity import NodeIdentity
from caserver.internode.keyring import Keyring
from caserver.pki import keys
from caserver.pki.certificates import describe, load_certificate, operator_root_faults
from caserver.pki.csr import CheckedCSR, check_csrs
from caserver.pki.spiffe import ServiceID
from tests.testkit import mesh, openssl
from tests.testkit.keys import key_pem, private_key
from tests.testkit.mesh import DATACENTER, NOW, TRUST_DOMAIN, crossed, root
from tests.unit.pki_chain_test import SPECIAL_ROOTS

LEAF_TTL = 72 * 3600


def verify(directory: Path, *words: str) -> str:
    done = subprocess.run(
        ["openssl", "verify", *words], cwd=directory, capture_output=True, text=True, check=False, timeout=30
    )
    return done.stdout + done.stderr


def printed_commands(refusal: str) -> str:
    return "\n".join(line for line in refusal.splitlines() if line.startswith("openssl "))


# The operator's root of Consul's documentation page, word for word: RSA, the right URI, and nothing else.
DOCUMENTATION_ROOT = """\
-----BEGIN CERTIFICATE-----
MIIDijCCAnKgAwIBAgIJAOFZ66em1qC7MA0GCSqGSIb3DQEBCwUAMGIxCzAJBgNV
BAYTAlVTMRMwEQYDVQQIDApDYWxpZm9ybmlhMRYwFAYDVQQHDA1TYW4gRnJhbmNp
c2NvMRIwEAYDVQQKDAlIYXNoaUNvcnAxEjAQBgNVBAMMCWxvY2FsaG9zdDAeFw0x
ODA2MDYxNzM3MDNaFw0yODA2MDMxNzM3MDNaMGIxCzAJBgNVBAYTAlVTMRMwEQYD
VQQIDApDYWxpZm9ybmlhMRYwFAYDVQQHDA1TYW4gRnJhbmNpc2NvMRIwEAYDVQQK
DAlIYXNoaUNvcnAxEjAQBgNVBAMMCWxvY2FsaG9zdDCCASIwDQYJKoZIhvcNAQEB
BQADggEPADCCAQoCggEBAK6ostXN6W093EpI3RDNQDwC1Gq3lPNoodL5XRaVVIBU
3X5iC+Ttk02p67cHUguh4ZrWr3o3Dzxm+gKK0lfZLW0nNYNPAIGZWQD9zVSx1Lqt
8X0pd+fhMV5coQrh3YIG/vy17IBTSBuRUX0mXOKjOeJJlrw1HQZ8pfm7WX6LFul2
Xszvgn5K1XR+9nhPy6K2bv99qsY0sm7AqCS2BjYBW8QmNngJOdLPdhyFh7invyXe
Pqgujc/KoA3P6e3/G7bJZ9+qoQMK8uwD7PxtA2hdQ9t0JGPsyWgzhwfBxWdBWRzV
RvVi6Yu2tvw3QrjdeKQ5Ouw9FUb46VnTU7jTO974HjkCAwEAAaNDMEEwPwYDVR0R
BDgwNoY0c3BpZmZlOi8vMzZjYjUyY2QtNDA1OC1mODExLTA0MzItNjc5OGEyNDBj
NWQzLmNvbnN1bDANBgkqhkiG9w0BAQsFAAOCAQEATHgCro9VXj7JbH/tlB6f/KWf
7r98+rlUE684ZRW9XcA9uUA6y265VPnemsC/EykPsririoh8My1jVPuEfgMksR39
9eMDJKfutvSpLD1uQqZE8hu/hcYyrmQTFKjW71CfGIl/FKiAg7wXEw2ljLN9bxNv
GG118wrJyMZrRvFjC2QKY025QQSJ6joNLFMpftsZrJlELtRV+nx3gMabpiDRXhIw
JM6ti26P1PyVgGRPCOG10v+OuUtwe0IZoOqWpPJN8jzSuqZWf99uolkG0xuqLNz6
d8qvTp1YF9tTmysgvdeGALez/02HTF035RVTsQfH9tM/+4yG1UnmjLpz3p4Fow==
-----END CERTIFICATE-----
"""
DOCUMENTATION_TRUST_DOMAIN = "36cb52cd-4058-f811-0432-6798a240c5d3.consul"


def test_the_printed_commands_turn_the_documentations_example_into_a_root_that_is_accepted(tmp_path: Path):
    """DESIGN section 8: the documentation's root is refused with commands that, run as printed, make a good one."""
    then = datetime(2018, 6, 7, tzinfo=UTC)
    judge = partial(operator_root_faults, trust_domain=DOCUMENTATION_TRUST_DOMAIN, leaf_ttl=8760 * 3600)

    faults = judge(DOCUMENTATION_ROOT, None, now=then)

    assert [fault.problem for fault in faults] == [
        "has no Basic Constraints",
        "has no Key Usage",
        "has no Subject Key Identifier",
    ]
    commands = printed_commands(fault_text(faults))
    subprocess.run(["sh", "-ec", commands], cwd=tmp_path, check=True, capture_output=True, timeout=30)
    pem, key = (tmp_path / "root.crt").read_text(), keys.load_private_key(Secret((tmp_path / "root.key").read_text()))
    assert judge(pem, key, now=load_certificate(pem).not_valid_before_utc) == []
    assert describe(pem).subject == "CN=Connect CA Root 20180607000000"


def test_the_second_command_alone_keeps_the_operators_key(tmp_path: Path):
    (tmp_path / "root.key").write_text(key_pem("rsa-2048"))
    refusal = fault_text(operator_root_faults("garbage", None, trust_domain=TRUST_DOMAIN, now=NOW, leaf_ttl=LEAF_TTL))
    request = printed_commands(refusal).splitlines()[1]

    subprocess.run(["sh", "-ec", request], cwd=tmp_path, check=True, capture_output=True, timeout=30)

    pem = (tmp_path / "root.crt").read_text()
    born = load_certificate(pem).not_valid_before_utc
    assert (
        operator_root_faults(pem, private_key("rsa-2048"), trust_domain=TRUST_DOMAIN, now=born, leaf_ttl=LEAF_TTL) == []
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ec-256", "rsa-2048"),
        ("rsa-2048", "ec-384"),
        ("ec-521", "ec-224"),
        ("rsa-4096", "rsa-2048"),
        ("ec-224", "ec-256"),
    ],
)
def test_openssl_verifies_leaves_across_a_rotation_for_both_purposes(old: str, new: str, tmp_path: Path):
    old_pem, new_pem = root(old), root(new)
    (tmp_path / "old.pem").write_text(old_pem)
    (tmp_path / "new.pem").write_text(new_pem)
    (tmp_path / "crossed.pem").write_text(crossed(new_pem, old=old_pem, old_key=old))
    (tmp_path / "leaf.pem").write_text(mesh.leaf(new_pem, new))
    at = str(int(NOW.timestamp()))

    for purpose in ("sslserver", "sslclient"):
        common = ["-x509_strict", "-purpose", purpose, "-attime", at]
        under_new = verify(tmp_path, *common, "-CAfile", "new.pem", "leaf.pem")
        under_old = verify(tmp_path, *common, "-CAfile", "old.pem", "-untrusted", "crossed.pem", "leaf.pem")
        assert (under_new, under_old) == ("leaf.pem: OK\n", "leaf.pem: OK\n")


@pytest.mark.parametrize(("pem", "reason"), SPECIAL_ROOTS)
def test_a_root_is_held_to_its_extensions_as_openssl_holds_it(pem: str, reason: str | None, tmp_path: Path):
    (tmp_path / "root.pem").write_text(pem)
    (tmp_path / "leaf.pem").write_text(mesh.leaf(pem, "ec-256"))
    at = str(int(NOW.timestamp()))

    said = verify(tmp_path, "-purpose", "sslclient", "-attime", at, "-CAfile", "root.pem", "leaf.pem")

    assert (said == "leaf.pem: OK\n") == (reason is None), said


def test_a_request_of_openssl_is_accepted(tmp_path: Path):
    service = ServiceID(TRUST_DOMAIN, DATACENTER, "web")
    words = [
        "openssl",
        "req",
        "-new",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        "k",
        "-subj",
        "/CN=web",
        "-addext",
        f"subjectAltName=URI:{service.uri}",
    ]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30)

    (checked,) = check_csrs([done.stdout], trust_domain=TRUST_DOMAIN, datacenter=DATACENTER)

    assert isinstance(checked, CheckedCSR)
    assert checked.service_id == service


@pytest.mark.parametrize("year", [1971, 2024, 2105, 9000])
def test_whatever_a_clock_says_the_certificates_hold(year: int, tmp_path: Path) -> None:
    own = NodeIdentity(Keyring([bytes(32)]), "n1", ("n1", "n2"))
    authority, node = tmp_path / "ca.pem", tmp_path / "node.pem"
    authority.write_text("".join(own._authorities_pem))
    node.write_text(own._chain_pem)
    at = int(datetime(year, 1, 2, tzinfo=UTC).timestamp())

    said = openssl.run("verify", "-attime", str(at), "-CAfile", str(authority), str(node))

    assert said.endswith(": OK\n")
