"""The two policies of the README, line by line on a real server: enough with all of them, and no line too many."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from caserver.authority.ports import Prepared, Provider, SignedLeaf
from caserver.errors import CaserverError, InvalidConfig
from caserver.fields import Secret
from caserver.state.configuration import CAConfiguration
from tests.testkit.nodes import CLUSTER_ID
from tests.testkit.openbao import Server, unique
from tests.testkit.vault import VaultLab, listed, now, order, path_of

DIRECTORY = Path(__file__).resolve().parents[2] / "deploy" / "vault"
README = (DIRECTORY.parents[1] / "README.md").read_text()
POLICIES: Mapping[str, tuple[str, ...]] = {
    mode: tuple(
        line for line in (DIRECTORY / f"policy-{mode}.hcl").read_text().splitlines() if line.startswith("path ")
    )
    for mode in ("managed", "operator")
}
TOKEN_LINES = ("auth/token/lookup-self", "auth/token/renew-self", "sys/capabilities-self")
EVERY_LINE = [(mode, line) for mode, lines in POLICIES.items() for line in lines]


def path_in(line: str) -> str:
    found = re.match(r'path "([^"]+)"', line)
    assert found is not None
    return found[1]


def named(line: str) -> str:
    return path_in(line).replace("/", "_")


@dataclass(frozen=True)
class Scene:
    """Two roots and an intermediate path for one mode, and who may do what there."""

    mode: str
    server: Server
    roots: tuple[str, str]
    intermediate: str

    @classmethod
    def of(cls, mode: str, server: Server) -> Scene:
        scene = cls(mode, server, (unique("root"), unique("root")), unique("inter"))
        if mode == "operator":
            for path in (*scene.roots, scene.intermediate):
                server.mount(path)
            for path in scene.roots:
                server.ask("POST", f"{path}/root/generate/internal", {"common_name": f"Root {path}", "ttl": "8760h"})
        return scene

    def token(self, without: str | None = None) -> str:
        """A token with exactly the mode's lines for both roots, except one."""
        lines = [line for line in POLICIES[self.mode] if line != without]
        texts = ["\n".join(lines).replace("ROOT", root).replace("INTER", self.intermediate) for root in self.roots]
        return self.server.restricted_token("\n".join(dict.fromkeys("\n".join(texts).splitlines())))

    def configuration(self, vault: VaultLab, token: str, number: int = 0) -> CAConfiguration:
        return vault.configuration(root=self.roots[number], intermediate=self.intermediate, token=Secret(token))

    def missing(self, line: str) -> tuple[str, ...]:
        """The path of a line as it may be told, for either root."""
        return tuple(
            f'path "{path_in(line).replace("ROOT", root).replace("INTER", self.intermediate)}"' for root in self.roots
        )


def interrupted(configuration: CAConfiguration, vault: VaultLab) -> None:
    """What a leader leaves that dies after it made the key of epoch 2 and before it had it certified."""
    body = {"common_name": "interrupted", "key_name": f"caserver-{CLUSTER_ID}-2"}
    path = f"{path_of(configuration)[1]}/intermediate/generate/internal"
    vault.server.ask("POST", path, body)


async def whole_life(scene: Scene, vault: VaultLab, token: str) -> None:
    """Everything a provider ever does: found, renew, tend, rotate with cross-signing, clean up, leave."""
    first = scene.configuration(vault, token)
    provider = vault.provider(first)
    prepared = await provider.prepare(now=now(), epoch=1)
    interrupted(first, vault)
    renewed = await vault.provider(first, listed(prepared)).prepare(now=now(), epoch=2)
    await vault.provider(first).retire(epochs=(1,), keep=renewed.backend)
    await signs(vault.provider(first, listed(renewed)), prepared)
    second = scene.configuration(vault, token, 1)
    successor = vault.provider(second)
    rotated = await successor.prepare(now=now(), epoch=3)
    assert rotated.root_csr is not None
    await vault.provider(first, listed(renewed)).cross_sign(
        rotated.root_pem, csr_pem=rotated.root_csr, serial=1, not_before=now(), not_after=now() + timedelta(days=7)
    )
    await vault.provider(first).retire(epochs=(1, 2), keep=rotated.backend)
    await signs(successor, rotated)
    tended = await vault.provider(second, listed(rotated)).tend(now())
    assert tended.troubles == (), tended
    await vault.provider(second).retire(epochs=(3,), keep={})


async def signs(provider: Provider, prepared: Prepared) -> None:
    (signed,) = await provider.sign_leaves([order()])
    if isinstance(signed, CaserverError):
        raise signed
    assert isinstance(signed, SignedLeaf)


@pytest.mark.parametrize("mode", POLICIES)
async def test_everything_works_with_exactly_these_lines(mode: str, vault: VaultLab) -> None:
    scene = Scene.of(mode, vault.server)
    token = scene.token()
    inspection = await vault.provider(scene.configuration(vault, token)).inspect()
    assert (inspection.root_pem is None) == (mode == "managed")
    await whole_life(scene, vault, token)
    mounts = vault.server.mounts()
    assert set(scene.roots) <= set(mounts)
    assert (scene.intermediate in mounts) == (mode == "operator")
    assert vault.server.issuers(scene.intermediate) == {}
    assert vault.server.keys_of(scene.intermediate) == {}


@pytest.mark.parametrize(("mode", "line"), EVERY_LINE, ids=[f"{mode}-{named(line)}" for mode, line in EVERY_LINE])
async def test_a_missing_line_is_named_before_anything_is_written(mode: str, line: str, vault: VaultLab) -> None:
    scene = Scene.of(mode, vault.server)
    before = vault.server.mounts().keys()
    provider = vault.provider(scene.configuration(vault, scene.token(line)))
    with pytest.raises(InvalidConfig) as caught:
        await provider.inspect()
    assert any(told in caught.value.detail for told in scene.missing(line)), caught.value.detail
    assert vault.server.mounts().keys() == before


@pytest.mark.parametrize(
    ("mode", "line"),
    [(mode, line) for mode, line in EVERY_LINE if path_in(line) not in TOKEN_LINES],
    ids=lambda value: named(value) if value.startswith("path") else value,
)
async def test_the_step_that_a_missing_line_stops_names_it(mode: str, line: str, vault: VaultLab) -> None:
    scene = Scene.of(mode, vault.server)
    with pytest.raises(CaserverError) as caught:
        await whole_life(scene, vault, scene.token(line))
    assert any(told in caught.value.detail for told in scene.missing(line)), caught.value.detail


@pytest.mark.parametrize("mode", POLICIES)
def test_the_readme_shows_these_lines(mode: str) -> None:
    assert all(re.sub(r" +", " ", line) in re.sub(r" +", " ", README) for line in POLICIES[mode])


async def test_a_policy_of_another_path_is_not_enough(vault: VaultLab) -> None:
    one, other = (Scene.of("managed", vault.server) for _ in range(2))
    provider = vault.provider(one.configuration(vault, other.token()))
    with pytest.raises(InvalidConfig, match=one.roots[0]):
        await provider.inspect()
