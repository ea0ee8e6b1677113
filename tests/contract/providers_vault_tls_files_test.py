"""Certificates for Vault that are exchanged while the node runs."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from caserver.environment import SystemClock, ThreadWorkers
from caserver.errors import InvalidConfig
from caserver.fields import Secret
from caserver.providers.vault.endpoint import Endpoint, resolve
from caserver.providers.vault.engine import PKIEngine
from caserver.providers.vault.session import VaultSession
from caserver.providers.vault.upkeep import Upkeep
from caserver.state.vault_configuration import VaultConfiguration, VaultLocal
from tests.testkit.odd_servers import GOOD, read_request, serving
from tests.testkit.vault import now, own_root
from tests.testkit.web_certs import WebCA


@dataclass
class Demanding:
    """A server that wants a client certificate, and remembers the names of those it saw."""

    address: str
    authority: WebCA
    directory: Path  # that the node takes files from
    seen: list[str] = field(default_factory=list)

    def put(self, name: str, *, key_name: str = "ec-256", where: str = "") -> None:
        """Another client certificate takes the place of the present one."""
        pair = self.authority.issue(name, key_name=key_name)
        (self.directory / where).mkdir(exist_ok=True)
        pair.key.rename(self.directory / where / "client.key")
        pair.cert.rename(self.directory / where / "client.pem")

    def endpoint(self) -> Endpoint:
        """As a configuration with names of files means it."""
        shutil.copy(self.authority.file, self.directory / "ca.pem")
        wanted = VaultConfiguration(
            root_pki_path="root",
            intermediate_pki_path="intermediate",
            address=self.address,
            token=Secret("s.sesame"),
            ca_file="ca.pem",
            cert_file="client.pem",
            key_file="client.key",
        )
        return resolve(wanted, VaultLocal(file_dir=self.directory))


@pytest.fixture
def demanding(tmp_path: Path) -> Iterator[Demanding]:
    authority = WebCA(tmp_path)
    own = authority.issue("server")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(own.cert, own.key)
    tls.load_verify_locations(authority.file)
    tls.verify_mode = ssl.CERT_REQUIRED
    seen: list[str] = []

    def script(connection: socket.socket, _: threading.Event) -> None:
        assert isinstance(connection, ssl.SSLSocket)
        subject = dict(part[0] for part in (connection.getpeercert() or {})["subject"])  # type: ignore[misc]  # pairs of texts
        while read_request(connection):
            seen.append(str(subject["commonName"]))
            connection.sendall(GOOD)

    directory = tmp_path / "files"
    directory.mkdir()
    with serving(script, tls) as address:
        yield Demanding(address, authority, directory, seen)


@asynccontextmanager
async def session(endpoint: Endpoint) -> AsyncIterator[VaultSession]:
    workers = ThreadWorkers(1)
    opened = VaultSession(endpoint, clock=SystemClock(), workers=workers, pool_size=1)
    try:
        yield opened
    finally:
        opened.close()
        workers.close()


async def ask(opened: VaultSession) -> None:
    assert (await opened.call("get", "x", deadline=60.0)).ok


async def test_a_new_pair_is_shown_from_the_next_look_on(demanding: Demanding) -> None:
    demanding.put("first")
    async with session(demanding.endpoint()) as opened:
        await ask(opened)
        await opened.refresh()  # nothing has changed
        await ask(opened)
        demanding.put("second", key_name="rsa-2048")
        await opened.refresh()
        await ask(opened)
    assert demanding.seen == ["first", "first", "second"]


async def test_a_pair_that_does_not_fit_is_told_and_the_former_stays_until_it_does(demanding: Demanding) -> None:
    demanding.put("first")
    async with session(demanding.endpoint()) as opened:
        await ask(opened)
        key = (demanding.directory / "client.key").read_text()
        demanding.put("second", key_name="rsa-2048")
        (demanding.directory / "client.key").write_text(key)
        for _ in range(2):
            with pytest.raises(InvalidConfig, match="do not belong together") as caught:
                await opened.refresh()
            assert "PRIVATE" not in caught.value.detail
            await ask(opened)
        demanding.put("second", key_name="rsa-2048")
        await opened.refresh()
        await ask(opened)
    assert demanding.seen == ["first", "first", "first", "second"]


async def test_a_directory_that_is_exchanged_as_a_whole(demanding: Demanding) -> None:
    """As Kubernetes mounts secrets: every name leads through one link, which is set to another directory."""
    demanding.put("first", where="..1")
    (demanding.directory / "..data").symlink_to("..1")
    for name in ("client.pem", "client.key"):
        (demanding.directory / name).symlink_to(f"..data/{name}")
    async with session(demanding.endpoint()) as opened:
        await ask(opened)
        demanding.put("second", where="..2")
        (demanding.directory / "..new").symlink_to("..2")
        (demanding.directory / "..new").rename(demanding.directory / "..data")
        shutil.rmtree(demanding.directory / "..1")
        await opened.refresh()
        await ask(opened)
    assert demanding.seen == ["first", "second"]


async def test_tending_takes_new_files_over_and_tells_of_those_that_it_cannot_use(demanding: Demanding) -> None:
    demanding.put("first")
    async with session(demanding.endpoint()) as opened:
        root = own_root()
        upkeep = Upkeep(
            opened,
            clock=SystemClock(),
            root=PKIEngine(opened, "", "root"),
            root_pem=root,
            signers=PKIEngine(opened, "", "intermediate"),
            issuer="an-issuer",
            signer_pem=root,
            leaf_ttl=3600,
        )
        assert "VaultFilesRejected" not in dict((await upkeep.tend(now())).troubles)
        (demanding.directory / "client.key").unlink()
        troubles = dict((await upkeep.tend(now())).troubles)
        assert "KeyFile" in troubles["VaultFilesRejected"]
        assert "the former are" in troubles["VaultFilesRejected"]
        demanding.put("second")
        assert "VaultFilesRejected" not in dict((await upkeep.tend(now())).troubles)
    assert {"first", "second"} == set(demanding.seen)
    assert demanding.seen[-1] == "second"
