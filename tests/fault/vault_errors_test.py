"""What can go wrong with a Vault server, through a real node: what its users see, that nothing is lost, that it heals.

One node and one server live through all of it. After every test the CA is as before: same root, signing.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from caserver.pki.csr import make_csr
from tests.testkit.cluster import Cluster, Node, Reply, wait_for
from tests.testkit.invariants import verifies
from tests.testkit.keys import private_key
from tests.testkit.openbao import HTTP_ACTIVE, Server, on_disk, unique
from tests.testkit.vault import imported, own_root

OK, BAD, BAD_GATEWAY, UNAVAILABLE = (
    int(http.client.OK),
    int(http.client.BAD_REQUEST),
    int(http.client.BAD_GATEWAY),
    int(http.client.SERVICE_UNAVAILABLE),
)
EVERYTHING = 'path "*" { capabilities = ["create", "read", "update", "delete", "list", "sudo"] }'
CONFIGURATION, ROOTS = "/v1/connect/ca/configuration", "/v1/connect/ca/roots"


@dataclass
class World:
    """A node whose CA is in Vault."""

    node: Node
    server: Server
    root: str
    intermediate: str

    def config(self, **changes: Any) -> dict[str, Any]:
        config = {
            "Address": self.server.address,
            "Token": self.server.token,
            "RootPKIPath": self.root,
            "IntermediatePKIPath": self.intermediate,
        }
        return {key: value for key, value in {**config, **changes}.items() if value is not None}

    def put(self, *, provider: str = "vault", top: dict[str, Any] | None = None, **changes: Any) -> Reply:
        """Set the configuration in force with changes."""
        config = self.config(**changes) if provider == "vault" else changes
        return self.node.put(CONFIGURATION, {"Provider": provider, "Config": config, **(top or {})}, timeout=90)

    def roots(self) -> list[dict[str, Any]]:
        return list(self.node.get(ROOTS).json()["Roots"])

    def active(self) -> str:
        return str(self.node.get(ROOTS).json()["ActiveRootID"])

    def sign(self) -> Reply:
        """One new leaf, by whatever signs now."""
        domain = self.node.get(ROOTS).json()["TrustDomain"]
        csr = make_csr(private_key("ec-256-b"), f"spiffe://{domain}/ns/default/dc/dc1/svc/web")
        return self.node.put("/v1/connect/ca/sign", csr, timeout=60)

    def signs(self) -> bool:
        reply = self.sign()
        return reply.status == OK and verifies(reply.json()["CertPEM"], {root["RootCert"] for root in self.roots()})

    def degraded(self) -> dict[str, str]:
        ready = self.node.get("/v1/status/ready")
        return {each["Code"]: each["Reason"] for each in ready.json()["Degraded"]} if ready.status == OK else {}

    def heals(self) -> None:
        wait_for("a leaf to be signed", lambda: self.signs() or None)

    def says(self, code: str) -> str:
        """Wait until the node calls itself degraded so."""
        return wait_for(f"{code} in /v1/status/ready", lambda: self.degraded().get(code), within=60)


@pytest.fixture(scope="module")
def living(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("vault-errors")
    (directory / "openbao").mkdir()
    with on_disk(directory / "openbao") as (server, _):
        root, intermediate = unique("root"), unique("intermediate")
        config = {
            "address": server.address,
            "token": server.token,
            "root_pki_path": root,
            "intermediate_pki_path": intermediate,
        }
        connect = {"ca_provider": "vault", "ca_config": config}
        with Cluster(directory, ["n1"], connect=connect).start_ready() as cluster:
            yield World(cluster.nodes[0], server, root, intermediate)


@pytest.fixture
def world(living: World) -> Iterator[World]:
    """Signing before and after, under the same root, with nothing begun and left."""
    before = living.active()
    yield living
    assert living.active() == before
    living.heals()


def refused(world: World, reply: Reply, *told: str) -> None:
    """A caller's mistake: it is named, nothing changed, nothing was made at the server."""
    assert reply.status == BAD, reply.text
    for text in told:
        assert text in reply.text
    assert world.server.token not in reply.text
    assert world.signs()


async def test_what_is_in_force_shows_no_token(world: World) -> None:
    shown = world.node.get(CONFIGURATION).text
    assert world.node.get(CONFIGURATION).json()["Config"]["Token"] == "<redacted>"
    assert world.server.token not in shown + world.node.log


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"Token": "s.sesame"}, ("error configuring provider: the Vault token was refused", "lookup-self")),
        ({"RootPKIPath": None}, ("error configuring provider: must provide a valid path to a root PKI backend",)),
        (
            {"IntermediatePKIPath": None},
            ("error configuring provider: must provide a valid path for the intermediate PKI backend",),
        ),
        ({"Token": None, "Address": "http://127.0.0.1:1"}, ("error configuring provider: must provide a Vault token",)),
        (
            {"IntermediateCertTTL": "2h"},
            ("error configuring provider: Intermediate Cert TTL must be greater or equal than 3h",),
        ),
        ({"Address": "vault.example.com"}, ("Address",)),
        ({"Address": "https://user:sesame@vault.example.com"}, ("Address",)),
        ({"Token": "sesame\nopen"}, ("Token",)),
        ({"Token": None, "TokenFile": "elsewhere"}, ("TokenFile",)),
        ({"RootPKIpat": "x", "RootPKIPath": None}, ("RootPKIPath",)),
    ],
    ids=[
        "wrong token",
        "no root path",
        "no intermediate path",
        "no token",
        "short intermediates",
        "address without a scheme",
        "address with credentials",
        "token with a newline",
        "a file over HTTP",
        "a misspelt key",
    ],
)
def test_a_faulty_configuration_is_refused_and_the_old_one_stays(
    world: World, changes: dict[str, Any], told: tuple[str, ...]
) -> None:
    before = world.node.get(CONFIGURATION).json()
    reply = world.put(**changes)
    refused(world, reply, *told)
    assert "sesame" not in reply.text
    assert world.node.get(CONFIGURATION).json() == before


@pytest.mark.parametrize("key", ["RootPKIPath", "IntermediatePKIPath"])
def test_a_mount_of_another_kind(world: World, key: str) -> None:
    path = world.server.mount(unique("kv"), "kv")
    changes: dict[str, Any] = {key: path}
    refused(world, world.put(**changes), f"{path} is a kv mount")


def _sub_ca(server: Server) -> str:
    above, below = server.mount(unique("above")), server.mount(unique("below"))
    server.ask("POST", f"{above}/root/generate/internal", {"common_name": "above", "key_type": "ec", "ttl": "8000h"})
    csr = server.ask("POST", f"{below}/intermediate/generate/internal", {"common_name": "below", "key_type": "ec"})[
        "csr"
    ]
    body: dict[str, Any] = {"csr": csr, "use_csr_values": True, "format": "pem", "ttl": "7000h"}
    signed = server.ask("POST", f"{above}/root/sign-intermediate", body)["certificate"]
    server.ask("POST", f"{below}/intermediate/set-signed", {"certificate": signed})
    return below


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda server: imported(server, own_root(path_length=0)), "may not sign CA certificates"),
        (_sub_ca, "holds an intermediate CA"),
    ],
    ids=["path length 0", "an intermediate CA"],
)
def test_a_root_path_that_holds_no_fit_root(world: World, make: Callable[[Server], str], told: str) -> None:
    refused(world, world.put(RootPKIPath=make(world.server)), told)


def test_a_missing_permission_is_named_before_anything_is_made(world: World) -> None:
    mounts = world.server.mounts().keys()
    new_root = unique("root")
    lines = [EVERYTHING, f'path "{new_root}/root/generate/internal" {{ capabilities = ["deny"] }}']
    token = world.server.restricted_token("\n".join(lines))
    reply = world.put(Token=token, RootPKIPath=new_root)
    refused(world, reply, f'path "{new_root}/root/generate/internal" {{ capabilities = ["update"] }}')
    assert token not in reply.text
    assert world.server.mounts().keys() == mounts


def test_a_server_that_is_sealed_and_restarted(world: World) -> None:
    cached = world.node.get("/v1/agent/connect/ca/leaf/cached").json()["CertPEM"]
    world.server.seal()
    reply = world.sign()
    assert (reply.status, "is sealed" in reply.text) == (UNAVAILABLE, True), reply.text
    assert int(reply.headers["retry-after"]) > 0
    world.server.stop()
    reply = world.sign()
    assert (reply.status, "cannot be reached: Connection refused" in reply.text) == (UNAVAILABLE, True), reply.text
    assert "Vault at" in world.says("VaultUnavailable")
    assert world.node.get("/v1/agent/connect/ca/leaf/cached").json()["CertPEM"] == cached
    assert world.node.get("/v1/status/leader").json() != ""
    reply = world.put(LeafCertTTL="80h")
    assert reply.status == UNAVAILABLE, reply.text
    world.server.start()  # and it unseals itself
    world.server.wait(HTTP_ACTIVE)
    world.heals()
    wait_for("no degradation", lambda: None if "VaultUnavailable" in world.degraded() else True, within=60)
    assert len(world.server.issuers(world.intermediate)) == 1


def test_a_hanging_server(world: World) -> None:
    world.server.pause()
    try:
        reply = world.sign()
        assert (reply.status, "did not answer within" in reply.text) == (UNAVAILABLE, True), reply.text
        reply = world.put(LeafCertTTL="80h")
        assert (reply.status, "did not answer within" in reply.text) == (UNAVAILABLE, True), reply.text
        assert world.node.get(ROOTS).status == OK
        assert world.node.get("/v1/status/leader").json() != ""
    finally:
        world.server.resume()


def test_a_token_that_ends_and_is_replaced(world: World) -> None:
    token = world.server.restricted_token(EVERYTHING)
    assert world.put(Token=token).status == OK
    world.heals()
    world.server.ask("POST", "auth/token/revoke", {"token": token})
    reply = world.sign()
    assert reply.status == BAD_GATEWAY, reply.text
    assert "permission denied" in reply.text
    assert token not in reply.text
    assert world.node.get(ROOTS).status == OK
    assert "refuses the token" in world.says("VaultTokenRejected")
    assert world.put().status == OK
    assert world.signs()


def test_a_root_that_somebody_made_the_default_is_told_and_taken_in_by_an_equal_put(world: World) -> None:
    before = world.server.issuers(world.root)
    (ours,) = before
    body = {"common_name": "another root", "key_type": "ec", "ttl": "20000h"}
    theirs = world.server.ask("POST", f"{world.root}/root/generate/internal", body)["issuer_id"]
    world.server.ask("POST", f"{world.root}/config/issuers", {"default": theirs})
    assert "another root than the active one" in world.says("VaultRootChanged")
    active = world.active()
    assert world.signs()
    assert world.put().status == OK
    assert world.active() != active
    assert world.signs()
    world.server.ask("POST", f"{world.root}/config/issuers", {"default": ours})
    assert world.put().status == OK
    assert world.active() == active


def test_an_issuer_that_somebody_deleted_is_made_anew(world: World) -> None:
    for issuer in world.server.issuers(world.intermediate):
        world.server.ask("DELETE", f"{world.intermediate}/issuer/{issuer}")
    assert world.sign().status in (BAD_GATEWAY, UNAVAILABLE)
    world.heals()


def test_another_engine_in_the_place_of_the_intermediate_is_told_and_made_good_when_it_is_gone(world: World) -> None:
    world.server.ask("DELETE", f"sys/mounts/{world.intermediate}")
    world.server.mount(world.intermediate, "kv")
    assert world.sign().status in (BAD_GATEWAY, UNAVAILABLE)
    assert f"{world.intermediate} is a kv mount now" in world.says("VaultMountChanged")
    assert world.server.mounts()[world.intermediate]["type"] == "kv"
    world.server.ask("DELETE", f"sys/mounts/{world.intermediate}")
    world.heals()
    assert world.server.mounts()[world.intermediate]["type"] == "pki"


def test_away_from_a_server_that_is_down(living: World) -> None:
    """Last: the root changes. Cross-signing needs the old server, forcing does not."""
    living.server.stop()
    reply = living.put(provider="consul")
    assert reply.status == UNAVAILABLE, reply.text
    assert living.node.get(CONFIGURATION).json()["Provider"] == "vault"
    reply = living.put(provider="consul", top={"ForceWithoutCrossSigning": True})
    assert reply.status == OK, reply.text
    assert living.signs()
    assert living.node.get(CONFIGURATION).json()["Provider"] == "consul"


def test_a_node_that_is_founded_on_a_server_that_is_down_serves_and_heals(openbao: Server, tmp_path: Path) -> None:
    """With a wrong token it says so until its file is right, and reads that again; with a server that is away it waits."""
    config = {
        "address": openbao.address,
        "token": "s.wrong",
        "root_pki_path": unique("root"),
        "intermediate_pki_path": unique("intermediate"),
    }
    connect = {"ca_provider": "vault", "ca_config": config}
    with Cluster(tmp_path, ["n1"], connect=connect) as cluster:
        (node,) = cluster.nodes
        cluster.start()
        wait_for("a leader", lambda: _leader(node))
        assert node.get("/v1/agent/connect/ca/leaf/web").status == UNAVAILABLE
        cluster.wait_for_log("the Vault token was refused", within=60)
        assert "s.wrong" not in node.log
        node.config_file.write_text(node.config_file.read_text().replace("s.wrong", openbao.token))
        openbao.pause()
        try:
            assert node.put("/v1/agent/reload", "").status == OK
            cluster.wait_for_log("did not answer within", within=60)
            assert _leader(node)
        finally:
            openbao.resume()
        cluster.wait_ready(node, within=90)
        assert node.get("/v1/agent/connect/ca/leaf/web").status == OK


def _leader(node: Node) -> str | None:
    reply = node.try_get("/v1/status/leader")
    return None if reply is None or reply.status != OK else reply.json() or None
