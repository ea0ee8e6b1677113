"""A Vault server that is sealed, restarted, hangs or is not initialized: what is told of it, and that all heals by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from caserver.authority.ports import Prepared, Provider, SignedLeaf
from caserver.errors import InvalidConfig, ProviderUnavailable
from caserver.fields import Secret
from caserver.state.configuration import CAConfiguration
from caserver.state.vault_configuration import VaultAuthMethod, VaultLocal
from tests.testkit.cluster import LOOPBACK
from tests.testkit.keys import key_pem, private_key
from tests.testkit.openbao import Server, TLSFiles, in_memory, on_disk, unique
from tests.testkit.vault import VaultLab, listed, now, order, path_of

WITHIN = 60.0


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a server's and a client's certificate, another CA, each a PEM file with its key."""
    directory = tmp_path_factory.mktemp("tls")
    for name, issuer, names in (
        ("ca", "ca", ()),
        ("other-ca", "other-ca", ()),
        ("server", "ca", ("vault.internal",)),
        ("client", "ca", ("caserver",)),
    ):
        (directory / f"{name}.pem").write_text(certificate(name, issuer, names))
        (directory / f"{name}.key").write_text(key_pem(KEYS[name]))
    (directory / "cas").mkdir()
    for name in ("other-ca", "ca"):
        (directory / "cas" / f"{name}.pem").write_text((directory / f"{name}.pem").read_text())
    return directory


KEYS = {"ca": "ec-256", "other-ca": "ec-384", "server": "ec-256-b", "client": "rsa-2048"}


def certificate(name: str, issuer: str, dns: tuple[str, ...]) -> str:
    key, signer = private_key(KEYS[name]), private_key(KEYS[issuer])
    subject, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, issuer))
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - timedelta(days=1))
        .not_valid_after(now() + timedelta(days=30))
        .add_extension(x509.BasicConstraints(not dns, None), critical=True)
    )
    if dns:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.DNSName(each) for each in dns]), critical=False
        )
    return builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


@pytest.fixture(scope="module")
def durable(tmp_path_factory: pytest.TempPathFactory, material: Path) -> Iterator[tuple[Server, str]]:
    """A server that survives its restart, and the URL where it demands client certificates."""
    tls = TLSFiles(material / "server.pem", material / "server.key", material / "ca.pem")
    with on_disk(tmp_path_factory.mktemp("durable"), tls=tls) as (server, port):
        yield server, f"https://{LOOPBACK}:{port}"


@asynccontextmanager
async def in_force(server: Server) -> AsyncIterator[tuple[Provider, VaultLab, CAConfiguration, Prepared]]:
    """A provider that signs, on a server that will be maltreated."""
    lab = VaultLab(server)
    try:
        configuration = lab.configuration()
        prepared = await lab.provider(configuration).prepare(now=now(), epoch=1)
        yield lab.provider(configuration, listed(prepared)), lab, configuration, prepared
    finally:
        lab.close()


async def until_it_signs(provider: Provider) -> None:
    async with asyncio.timeout(WITHIN):
        while True:
            (signed,) = await provider.sign_leaves([order()])
            if isinstance(signed, SignedLeaf):
                return
            await asyncio.sleep(0.05)


async def refusal(provider: Provider) -> str:
    """What signing says now; what tending and inspecting say is the same."""
    (failed,) = await provider.sign_leaves([order()])
    assert isinstance(failed, ProviderUnavailable), failed
    tended = await provider.tend(now())
    assert tended.troubles == (("VaultUnavailable", failed.detail),)
    assert tended.next_in < 30
    with pytest.raises(ProviderUnavailable) as caught:
        await provider.inspect()
    assert caught.value.detail == failed.detail
    return failed.detail


async def test_a_sealed_server_is_told_and_signs_again_when_it_is_opened(tmp_path: Path) -> None:
    with in_memory(tmp_path) as server:
        async with in_force(server) as (provider, _, configuration, _):
            server.seal()
            assert (await refusal(provider)).endswith("is sealed")
            server.unseal()
            await until_it_signs(provider)
            assert (await provider.tend(now())).troubles == ()
            assert len(server.issuers(path_of(configuration)[1])) == 1  # nothing was made anew


async def test_a_restarted_server_signs_on_with_what_it_had(durable: tuple[Server, str]) -> None:
    server, _ = durable
    async with in_force(server) as (provider, _, configuration, _):
        await until_it_signs(provider)
        server.stop()
        assert "cannot be reached: Connection refused" in await refusal(provider)
        server.start()
        await until_it_signs(provider)
        assert (await provider.tend(now())).troubles == ()
        assert len(server.issuers(path_of(configuration)[1])) == 1


async def test_a_server_that_is_not_initialized_is_told_apart_from_a_sealed_one(tmp_path: Path) -> None:
    with on_disk(tmp_path, initialized=False) as (server, _):
        lab = VaultLab(server)
        with pytest.raises(ProviderUnavailable, match="is not initialized"):
            await lab.provider(lab.configuration(token=Secret("any"))).inspect()
        lab.close()


async def test_a_hanging_server_costs_no_more_than_the_deadline(tmp_path: Path) -> None:
    with in_memory(tmp_path) as server:
        async with in_force(server) as (provider, _, _, _):
            await until_it_signs(provider)
            server.pause()
            loop = asyncio.get_running_loop()
            begun = loop.time()
            results = await provider.sign_leaves([order(number) for number in range(10)])
            assert all(isinstance(result, ProviderUnavailable) for result in results)
            assert "did not answer within 4.5 s" in str(results[0])
            assert loop.time() - begun < WITHIN
            server.resume()
            await until_it_signs(provider)


# --- TLS ---


def tls_configuration(lab: VaultLab, url: str, **settings: Any) -> CAConfiguration:
    files: dict[str, Any] = {
        "ca_file": "ca.pem",
        "cert_file": "client.pem",
        "key_file": "client.key",
        "tls_server_name": "vault.internal",
    }
    return lab.configuration(address=url, **{**files, **settings})


@pytest.mark.parametrize(
    "trust",
    [{}, {"ca_file": None, "ca_path": "cas"}, {"ca_file": None, "ca_cert": "inline"}],
    ids=["a file", "a directory", "inline"],
)
async def test_tls_with_a_client_certificate(
    durable: tuple[Server, str], material: Path, trust: dict[str, str | None]
) -> None:
    server, url = durable
    lab = VaultLab(server, local=VaultLocal(file_dir=material))
    if trust.get("ca_cert"):
        trust = {**trust, "ca_cert": (material / "ca.pem").read_text()}
    configuration = tls_configuration(lab, url, **trust)
    prepared = await lab.provider(configuration).prepare(now=now(), epoch=1)
    await until_it_signs(lab.provider(configuration, listed(prepared)))
    lab.close()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tls_server_name": "other.internal"}, "shows a certificate that is not accepted: Hostname mismatch"),
        ({"tls_server_name": None}, "shows a certificate that is not accepted: IP address mismatch"),
        (
            {"ca_file": "other-ca.pem"},
            "shows a certificate that is not accepted: unable to get local issuer certificate",
        ),
        ({"ca_file": None}, "shows a certificate that is not accepted"),
        ({"cert_file": None, "key_file": None}, "Vault at https://"),
    ],
    ids=["another name", "no name", "another CA", "the machine's CAs", "no client certificate"],
)
async def test_tls_that_does_not_fit_is_told(
    durable: tuple[Server, str], material: Path, settings: dict[str, str | None], told: str
) -> None:
    server, url = durable
    lab = VaultLab(server, local=VaultLocal(file_dir=material))
    with pytest.raises(ProviderUnavailable) as caught:
        await lab.provider(tls_configuration(lab, url, **settings)).inspect()
    assert told in caught.value.detail
    assert server.token not in caught.value.detail
    lab.close()


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
async def test_tls_without_verification(durable: tuple[Server, str], material: Path) -> None:
    server, url = durable
    lab = VaultLab(server, local=VaultLocal(file_dir=material))
    settings = {"ca_file": None, "tls_server_name": None, "tls_skip_verify": True}
    assert (await lab.provider(tls_configuration(lab, url, **settings)).inspect()).root_id is None
    lab.close()


@pytest.mark.parametrize("name", ["client.key", "ca.pem"])
async def test_files_that_do_not_belong_together_are_told(
    durable: tuple[Server, str], material: Path, name: str
) -> None:
    server, url = durable
    lab = VaultLab(server, local=VaultLocal(file_dir=material))
    with pytest.raises(InvalidConfig, match="cannot be used") as caught:
        await lab.provider(tls_configuration(lab, url, cert_file=name)).inspect()
    assert "PRIVATE" not in caught.value.detail
    lab.close()


async def test_plain_http_to_a_tls_port_is_told(durable: tuple[Server, str]) -> None:
    server, url = durable
    lab = VaultLab(server)
    with pytest.raises(ProviderUnavailable, match="must begin with https://"):
        await lab.provider(lab.configuration(address=url.replace("https:", "http:"))).inspect()
    lab.close()


async def test_a_login_by_client_certificate(durable: tuple[Server, str], material: Path) -> None:
    server, url = durable
    mount, policy = unique("cert"), unique("everything")
    server.ask(
        "PUT",
        f"sys/policies/acl/{policy}",
        {"policy": 'path "*" { capabilities = ["create", "read", "update", "delete", "list", "sudo"] }'},
    )
    server.ask("POST", f"sys/auth/{mount}", {"type": "cert"})
    role = {"certificate": (material / "ca.pem").read_text(), "token_policies": [policy]}
    server.ask("POST", f"auth/{mount}/certs/mesh", role)
    lab = VaultLab(server, local=VaultLocal(file_dir=material))
    method = VaultAuthMethod("cert", mount, (("name", "mesh"),))
    configuration = tls_configuration(lab, url, auth_method=method)
    prepared = await lab.provider(configuration).prepare(now=now(), epoch=1)
    await until_it_signs(lab.provider(configuration, listed(prepared)))
    lab.close()
