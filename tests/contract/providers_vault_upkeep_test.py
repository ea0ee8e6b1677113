from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from caserver.authority.ports import Provider, SignedLeaf, Tended
from caserver.errors import ProviderUnavailable
from caserver.fields import Secret
from caserver.pki.certificates import describe
from caserver.state.configuration import CAConfiguration
from caserver.state.model import HOUR, Effective
from caserver.state.vault_configuration import VaultAuthMethod, VaultLocal
from tests.testkit.openbao import Server, unique
from tests.testkit.vault import VaultLab, listed, now, order, path_of, with_vault

EVERYTHING = 'path "*" { capabilities = ["create", "read", "update", "delete", "list", "sudo"] }\n'
WITHIN = 30.0  # seconds; tokens of a few seconds are waited for


async def bound(vault: VaultLab, configuration: CAConfiguration, **token: object) -> Provider:
    """A provider in force, its engines made with the root token and itself using ``token``."""
    prepared = await vault.provider(configuration).prepare(now=now(), epoch=1)
    return vault.provider(with_vault(configuration, **token), listed(prepared))


async def until(provider: Provider, wanted: Callable[[Tended], bool]) -> Tended:
    """Tend until it is as wanted."""
    async with asyncio.timeout(WITHIN):
        while True:  # by the server's clock, which nobody here can set forward
            tended = await provider.tend(now())
            if wanted(tended):
                return tended
            await asyncio.sleep(0.05)


def codes(tended: Tended) -> list[str]:
    return [code for code, _ in tended.troubles]


async def signs(provider: Provider) -> bool:
    (signed,) = await provider.sign_leaves([order()])
    return isinstance(signed, SignedLeaf)


def approle(server: Server, **options: object) -> VaultAuthMethod:
    """An auth method whose tokens may do everything."""
    mount, policy = unique("approle"), unique("everything")
    server.ask("POST", f"sys/auth/{mount}", {"type": "approle"})
    server.ask("PUT", f"sys/policies/acl/{policy}", {"policy": EVERYTHING})
    path = f"auth/{mount}/role/ca"
    server.ask("POST", path, {"token_policies": [policy], **options})
    role_id = server.ask("GET", f"{path}/role-id")["role_id"]
    secret_id = server.ask("POST", f"{path}/secret-id", {})["secret_id"]
    return VaultAuthMethod("approle", mount, (("role_id", role_id), ("secret_id", Secret(secret_id))))


async def test_a_token_without_an_end_needs_nothing(vault: VaultLab) -> None:
    tended = await (await bound(vault, vault.configuration())).tend(now())
    assert (tended.troubles, tended.token_expires_at) == ((), None)


async def test_a_renewable_token_is_renewed_at_first_sight_and_announces_its_end(vault: VaultLab) -> None:
    token = vault.server.restricted_token(EVERYTHING, period="1h")
    vault.server.call("POST", "auth/token/renew-self", {"increment": "60s"}, token=token)
    tended = await (await bound(vault, vault.configuration(), token=Secret(token))).tend(now())
    assert tended.troubles == ()
    assert tended.token_expires_at is not None
    assert 3000 < tended.token_expires_at - now().timestamp() <= 3601


async def test_a_token_is_renewed_again_and_again(vault: VaultLab) -> None:
    token = vault.server.restricted_token(EVERYTHING, period="3s")
    provider = await bound(vault, vault.configuration(), token=Secret(token))
    first = (await provider.tend(now())).token_expires_at
    assert first is not None
    tended = await until(provider, lambda tended: (tended.token_expires_at or 0.0) > first + 4)
    assert tended.troubles == ()
    assert await signs(provider)


async def test_a_token_that_cannot_be_renewed_is_announced_with_its_end(vault: VaultLab) -> None:
    token = vault.server.restricted_token(EVERYTHING, renewable=False)
    tended = await (await bound(vault, vault.configuration(), token=Secret(token))).tend(now())
    assert codes(tended) == ["VaultTokenExpiring"]
    assert "cannot be renewed and expires at" in tended.troubles[0][1]


async def test_a_token_at_the_end_of_its_longest_life_is_announced_before_it_ends(vault: VaultLab) -> None:
    token = vault.server.restricted_token(EVERYTHING, ttl="4s", explicit_max_ttl="4s")
    provider = await bound(vault, vault.configuration(), token=Secret(token))
    assert (await provider.tend(now())).troubles == ()
    tended = await until(provider, lambda tended: tended.troubles != ())
    assert codes(tended) == ["VaultTokenExpiring"]
    assert "reaches the end of its longest life" in tended.troubles[0][1]
    assert await signs(provider)
    await until(provider, lambda tended: codes(tended) == ["VaultTokenRejected"])
    assert not await signs(provider)


async def test_a_renewal_that_is_not_allowed_is_told(vault: VaultLab) -> None:
    policy = EVERYTHING + 'path "auth/token/renew-self" { capabilities = ["deny"] }'
    token = vault.server.restricted_token(policy)
    tended = await (await bound(vault, vault.configuration(), token=Secret(token))).tend(now())
    assert codes(tended) == ["VaultTokenExpiring"]
    assert "was not renewed (permission denied)" in tended.troubles[0][1]


async def test_with_an_auth_method_signing_goes_on_past_the_life_of_any_token(vault: VaultLab) -> None:
    method = approle(vault.server, token_ttl="3s", token_max_ttl="3s")
    provider = await bound(vault, vault.configuration(), token=None, auth_method=method)
    first = (await provider.tend(now())).token_expires_at
    assert first is not None
    await until(provider, lambda tended: now().timestamp() > first + 1 and not tended.troubles)
    assert await signs(provider)


async def test_a_token_file_is_read_again_when_its_token_is_refused(vault: VaultLab, tmp_path: Path) -> None:
    lab = VaultLab(vault.server, local=VaultLocal(file_dir=tmp_path))
    file = tmp_path / "token"
    file.write_text(f"{vault.server.restricted_token(EVERYTHING)}\n")
    provider = await bound(lab, lab.configuration(), token=None, token_file="token")
    assert await signs(provider)
    vault.server.ask("POST", "auth/token/revoke", {"token": file.read_text().strip()})
    file.write_text(vault.server.restricted_token(EVERYTHING))
    await until(provider, lambda tended: not tended.troubles)
    assert await signs(provider)
    lab.close()


async def test_a_file_that_vanished_from_this_node_is_no_fault_of_who_wants_a_leaf(
    vault: VaultLab, tmp_path: Path
) -> None:
    lab = VaultLab(vault.server, local=VaultLocal(file_dir=tmp_path))
    (tmp_path / "token").write_text(vault.server.token)
    provider = await bound(lab, lab.configuration(), token=None, token_file="token")
    (tmp_path / "token").unlink()
    with pytest.raises(ProviderUnavailable, match='TokenFile: "token" does not exist on this node'):
        await provider.sign_leaves([order()])
    assert codes(await provider.tend(now())) == ["VaultMisconfigured"]
    (tmp_path / "token").write_text(vault.server.token)
    assert await signs(provider)
    lab.close()


async def test_another_default_root_is_told_and_the_active_one_goes_on(vault: VaultLab) -> None:
    configuration = vault.configuration()
    provider = await bound(vault, configuration)
    root, _ = path_of(configuration)
    made = vault.server.ask(
        "POST", f"{root}/root/generate/internal", {"common_name": "another", "key_type": "ec", "ttl": "9000h"}
    )
    vault.server.ask("POST", f"{root}/config/issuers", {"default": made["issuer_id"]})
    tended = await provider.tend(now())
    assert codes(tended) == ["VaultRootChanged"]
    assert await signs(provider)
    found = await vault.provider(configuration).inspect()
    assert found.root_pem is not None
    assert describe(found.root_pem).subject == "CN=another"


async def test_a_root_path_that_lost_its_root_is_told(vault: VaultLab) -> None:
    configuration = vault.configuration()
    provider = await bound(vault, configuration)
    root, _ = path_of(configuration)
    vault.server.ask("DELETE", f"{root}/issuer/default")
    assert codes(await provider.tend(now())) == ["VaultRootChanged"]
    assert await signs(provider)


@pytest.mark.parametrize("kind", ["kv", "kv-v2", "transit", "ssh"])
async def test_another_engine_in_the_place_of_the_intermediate_is_told_and_left_alone(
    vault: VaultLab, kind: str
) -> None:
    configuration = vault.configuration()
    provider = await bound(vault, configuration)
    _, path = path_of(configuration)
    vault.server.ask("DELETE", f"sys/mounts/{path}")
    vault.server.mount(path, kind)
    assert not await signs(provider)
    tended = await provider.tend(now())
    assert codes(tended) == ["VaultMountChanged"]
    assert f"{path} is a {kind.partition('-')[0]} mount now" in tended.troubles[0][1]
    assert not tended.signer_lost  # nothing can be made there
    vault.server.ask("DELETE", f"sys/mounts/{path}")
    tended = await provider.tend(now())
    assert (codes(tended), tended.signer_lost) == (["VaultIssuerMissing"], True)
    assert f"nothing is mounted at {path} any more" in tended.troubles[0][1]
    assert (await vault.provider(configuration).prepare(now=now(), epoch=2)).intermediates


async def test_another_pki_engine_in_the_place_of_the_intermediate_is_used(vault: VaultLab) -> None:
    configuration = vault.configuration()
    provider = await bound(vault, configuration)
    _, path = path_of(configuration)
    vault.server.ask("DELETE", f"sys/mounts/{path}")
    vault.server.mount(path)
    tended = await provider.tend(now())
    assert (codes(tended), tended.signer_lost) == (["VaultIssuerMissing"], True)


async def test_an_engine_that_a_token_without_mounts_lost_is_told(vault: VaultLab) -> None:
    configuration = vault.configuration()
    _, path = path_of(configuration)
    policy = EVERYTHING + 'path "sys/mounts/*" { capabilities = ["deny"] }'
    policy += f'path "{path}/*" {{ capabilities = ["deny"] }}'
    token = vault.server.restricted_token(policy)
    provider = await bound(vault, configuration, token=Secret(token))
    vault.server.ask("DELETE", f"sys/mounts/{path}")
    tended = await provider.tend(now())
    assert (codes(tended), tended.signer_lost) == (["VaultMountChanged"], False)
    assert f"nothing that the Vault token may use is at {path}" in tended.troubles[0][1]


async def test_a_root_engine_that_was_exchanged_is_told_and_signing_goes_on(vault: VaultLab) -> None:
    configuration = vault.configuration()
    provider = await bound(vault, configuration)
    root, _ = path_of(configuration)
    vault.server.ask("DELETE", f"sys/mounts/{root}")
    tended = await provider.tend(now())
    assert codes(tended) == ["VaultRootChanged"]
    assert f"nothing is mounted at {root} any more" in tended.troubles[0][1]
    vault.server.mount(root, "kv")
    tended = await provider.tend(now())
    assert codes(tended) == ["VaultRootChanged"]
    assert f"{root} is a kv mount now" in tended.troubles[0][1]
    assert "ForceWithoutCrossSigning" in tended.troubles[0][1]
    assert await signs(provider)


async def test_both_engines_gone_are_both_told(vault: VaultLab) -> None:
    configuration = vault.configuration()
    provider = await bound(vault, configuration)
    for path in path_of(configuration):
        vault.server.ask("DELETE", f"sys/mounts/{path}")
    assert codes(await provider.tend(now())) == ["VaultRootChanged", "VaultIssuerMissing"]


async def test_an_intermediate_that_nobody_renewed_is_told(vault: VaultLab) -> None:
    prepared = await vault.provider(configuration := vault.configuration()).prepare(now=now(), epoch=1)
    provider = vault.provider(
        CAConfiguration("vault", {}, Effective(leaf_ttl=9000 * HOUR), vault=configuration.vault), listed(prepared)
    )
    assert codes(await provider.tend(now())) == ["VaultIntermediateExpiring"]


async def test_a_revoked_token_is_told_and_a_new_one_heals(vault: VaultLab) -> None:
    token = vault.server.restricted_token(EVERYTHING)
    configuration = vault.configuration()
    provider = await bound(vault, configuration, token=Secret(token))
    assert (await provider.tend(now())).troubles == ()
    vault.server.ask("POST", "auth/token/revoke", {"token": token})
    tended = await provider.tend(now())
    assert codes(tended) == ["VaultTokenRejected"]
    assert token not in str(tended)
    assert tended.next_in < 30
