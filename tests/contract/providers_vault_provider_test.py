from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import pytest

from caserver.authority.ports import Prepared, SignedLeaf
from caserver.errors import CaserverError, InvalidConfig, ProviderRefused, ProviderUnavailable
from caserver.fields import Secret
from caserver.pki.certificates import describe
from caserver.pki.chain import verify_chain
from caserver.state.configuration import CAConfiguration
from caserver.state.model import HOUR
from tests.testkit.nodes import CLUSTER_ID
from tests.testkit.openbao import unique
from tests.testkit.vault import VaultLab, imported, listed, now, order, own_root, path_of, with_vault

DAY = timedelta(days=1)


async def told(vault: VaultLab, configuration: CAConfiguration) -> str:
    """The refusal of a configuration, by inspecting and by preparing, which made nothing."""
    before = vault.server.mounts().keys()
    with pytest.raises(InvalidConfig) as caught:
        await vault.provider(configuration).inspect()
    with pytest.raises(CaserverError):
        await vault.provider(configuration).prepare(now=now(), epoch=1)
    assert vault.server.mounts().keys() == before
    assert vault.server.token not in caught.value.detail
    return caught.value.detail


async def prepared_on(vault: VaultLab, configuration: CAConfiguration, epoch: int = 1) -> Prepared:
    return await vault.provider(configuration).prepare(now=now(), epoch=epoch)


async def signed_by(vault: VaultLab, configuration: CAConfiguration, prepared: Prepared, **options: Any) -> SignedLeaf:
    (signed,) = await vault.provider(configuration, listed(prepared)).sign_leaves([order(**options)])
    assert isinstance(signed, SignedLeaf), signed
    assert verify_chain(signed.pem, prepared.intermediates, (prepared.root_pem,), now()) is None
    return signed


# --- roots that stand already ---


@pytest.mark.parametrize("key", ["ec-256", "rsa-2048"])
async def test_an_operators_root_is_used_as_it_is(vault: VaultLab, key: str) -> None:
    root = own_root(key=key)
    path = imported(vault.server, root, key=key)
    configuration = vault.configuration(root=path)
    inspection = await vault.provider(configuration).inspect()
    assert inspection.root_pem == root
    assert inspection.root_id == describe(root).id
    prepared = await prepared_on(vault, configuration)
    assert prepared.root_pem == root
    assert len(vault.server.issuers(path)) == 1
    await signed_by(vault, configuration, prepared)


async def test_a_root_that_ends_early_shortens_its_intermediates_and_says_so(vault: VaultLab) -> None:
    root = own_root(ends=10 * DAY)
    configuration = vault.configuration(root=imported(vault.server, root))
    inspection = await vault.provider(configuration).inspect()
    assert any("intermediates end with it" in warning for warning in inspection.warnings)
    prepared = await prepared_on(vault, configuration)
    assert describe(prepared.intermediates[0]).not_after == describe(root).not_after
    assert any("intermediates end with it" in warning for warning in prepared.warnings)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"begins": -30 * DAY, "ends": -DAY}, "expired at"),
        ({"begins": DAY}, "is not valid before"),
        ({"ends": 2 * DAY}, "before a leaf of 72h0m0s would"),
        ({"path_length": 0}, "may not sign CA certificates (path length 0)"),
    ],
    ids=["expired", "not yet", "ends before leaves", "path length 0"],
)
async def test_a_root_that_would_break_leaves_is_refused(
    vault: VaultLab, options: dict[str, Any], problem: str
) -> None:
    path = imported(vault.server, own_root(**options))
    detail = await told(vault, vault.configuration(root=path))
    assert detail.splitlines()[0] == f"error configuring provider: the CA at {path} cannot be the root"
    assert problem in detail


async def test_a_root_path_with_an_intermediate_ca_is_refused(vault: VaultLab) -> None:
    configuration = vault.configuration()
    await prepared_on(vault, configuration)
    _, intermediate = path_of(configuration)
    detail = await told(vault, vault.configuration(root=intermediate))
    assert f"{intermediate} holds an intermediate CA that CN=pri-" in detail


async def test_issuers_without_a_default_are_not_ours_to_choose_from(vault: VaultLab) -> None:
    path = imported(vault.server, own_root())
    vault.server.ask("DELETE", f"{path}/issuer/default")
    vault.server.ask("POST", f"{path}/issuers/import/cert", {"pem_bundle": own_root(key="ec-256-b")})
    detail = await told(vault, vault.configuration(root=path))
    assert "has issuers and none of them is the default" in detail


async def test_the_default_of_several_roots_is_the_root_and_is_signed_with_by_its_id(vault: VaultLab) -> None:
    path = vault.server.mount(unique("many"))
    for name in ("one", "two", "three"):
        vault.server.ask(
            "POST", f"{path}/root/generate/internal", {"common_name": name, "issuer_name": name, "ttl": "8760h"}
        )
    vault.server.ask("POST", f"{path}/config/issuers", {"default": "two"})
    configuration = vault.configuration(root=path)
    prepared = await prepared_on(vault, configuration)
    assert describe(prepared.root_pem).subject == "CN=two"
    vault.server.ask("POST", f"{path}/config/issuers", {"default": "three"})
    renewed = await vault.provider(configuration, listed(prepared)).prepare(now=now(), epoch=2)
    assert renewed.root_pem == prepared.root_pem
    await signed_by(vault, configuration, renewed)


# --- mounts ---


@pytest.mark.parametrize("which", ["root", "intermediate"])
async def test_a_mount_of_another_kind_is_refused(vault: VaultLab, which: str) -> None:
    path = vault.server.mount(unique("kv"), "kv")
    detail = await told(vault, vault.configuration(**cast("dict[str, Any]", {which: path})))
    assert detail.splitlines()[0] == f"error configuring provider: {path} is a kv mount"
    assert ("RootPKIPath" in detail) == (which == "root")


@pytest.mark.parametrize("which", ["root", "intermediate"])
async def test_a_path_inside_another_engine_is_refused(vault: VaultLab, which: str) -> None:
    around = vault.server.mount(unique("around"))
    detail = await told(vault, vault.configuration(**cast("dict[str, Any]", {which: f"{around}/inside"})))
    assert detail.splitlines()[0] == f"error configuring provider: nothing can be mounted at {around}/inside"
    assert f"the pki engine {around} lies around it" in detail


async def test_a_path_around_another_engine_is_told_by_the_step_that_meets_it(vault: VaultLab) -> None:
    path = unique("around")
    vault.server.mount(f"{path}/inside")
    with pytest.raises(ProviderRefused, match="another engine is mounted above or below it"):
        await prepared_on(vault, vault.configuration(intermediate=path))


async def test_a_namespace_that_is_not_there_is_refused(vault: VaultLab) -> None:
    with pytest.raises(CaserverError) as caught:
        await vault.provider(vault.configuration(root_pki_namespace="nowhere")).inspect()
    assert "the namespace does not exist" in caught.value.detail


async def test_one_engine_is_not_root_and_intermediate_by_two_names(vault: VaultLab) -> None:
    space, path = unique("space"), unique("both")
    vault.server.ask("POST", f"sys/namespaces/{space}", {})
    text = await told(vault, vault.configuration(root=path, root_pki_namespace=space, intermediate=f"{space}/{path}"))
    assert "IntermediatePKIPath" in text
    assert "RootPKIPath" in text


async def test_paths_with_slashes_in_namespaces(vault: VaultLab) -> None:
    names = unique("team"), unique("mesh")
    for name in names:
        vault.server.ask("POST", f"sys/namespaces/{name}", {})
    configuration = vault.configuration(
        root="team/ca/root", intermediate="mesh/ca", root_pki_namespace=names[0], intermediate_pki_namespace=names[1]
    )
    prepared = await prepared_on(vault, configuration)
    assert (prepared.backend["root_namespace"], prepared.backend["namespace"]) == names
    await signed_by(vault, configuration, prepared)
    assert "team/ca/root" in vault.server.mounts(namespace=names[0])
    await vault.provider(configuration).retire(epochs=(1,), keep={})
    assert "mesh/ca" not in vault.server.mounts(namespace=names[1])


async def test_a_foreign_issuer_at_the_intermediate_path_stays_and_signs_nothing(vault: VaultLab) -> None:
    path = vault.server.mount(unique("shared"))
    foreign = {"common_name": "somebody else", "issuer_name": "foreign", "key_type": "rsa", "ttl": "8760h"}
    vault.server.ask("POST", f"{path}/root/generate/internal", foreign)
    vault.server.ask("POST", f"{path}/roles/leaf-cert", {"key_type": "rsa", "max_ttl": "1h"})
    (theirs,) = vault.server.issuers(path)
    configuration = vault.configuration(intermediate=path)
    prepared = await prepared_on(vault, configuration)
    assert vault.server.issuers(path)[theirs]["is_default"]
    await signed_by(vault, configuration, prepared)
    await vault.provider(configuration).retire(epochs=(1,), keep={})
    assert vault.server.issuers(path).keys() == {theirs}
    assert path in vault.server.mounts()
    assert vault.server.ask("GET", f"{path}/roles/leaf-cert")["key_type"] == "rsa"


async def test_our_role_is_written_anew_whoever_changed_it(vault: VaultLab) -> None:
    configuration = vault.configuration()
    prepared = await prepared_on(vault, configuration)
    _, path = path_of(configuration)
    vault.server.ask(
        "POST", f"{path}/roles/caserver-{CLUSTER_ID}", {"max_ttl": "1m", "key_type": "any", "require_cn": False}
    )
    (refused,) = await vault.provider(configuration, listed(prepared)).sign_leaves([order()])
    assert isinstance(refused, ProviderRefused)
    assert "the role does not allow the names" in refused.detail
    await prepared_on(vault, configuration)
    await signed_by(vault, configuration, prepared, ttl=200 * HOUR)


async def test_no_other_trust_domain_can_be_signed_under_our_role(vault: VaultLab) -> None:
    configuration = vault.configuration()
    prepared = await prepared_on(vault, configuration)
    foreign = replace(
        order(), spiffe_uri="spiffe://99999999-1111-4222-8333-444455556666.consul/ns/default/dc/dc1/svc/web"
    )
    (result,) = await vault.provider(configuration, listed(prepared)).sign_leaves([foreign])
    assert isinstance(result, ProviderRefused)


# --- what an interrupted leader leaves ---


async def test_whoever_repeats_a_step_finds_what_was_made(vault: VaultLab) -> None:
    configuration = vault.configuration()
    first = await prepared_on(vault, configuration)
    root, intermediate = path_of(configuration)
    again = await prepared_on(vault, configuration)
    assert again.backend == first.backend
    assert (len(vault.server.issuers(root)), len(vault.server.issuers(intermediate))) == (1, 1)
    assert (len(vault.server.keys_of(root)), len(vault.server.keys_of(intermediate))) == (1, 1)


async def test_leaders_that_do_the_same_at_once_do_not_get_in_each_others_way(vault: VaultLab) -> None:
    """One that was deposed may still be at it while its successor begins."""
    configuration = vault.configuration()
    prepared = await asyncio.gather(*(prepared_on(vault, configuration) for _ in range(4)))
    assert len({each.root_pem for each in prepared}) == 1
    for each in prepared:
        await signed_by(vault, configuration, each)
    root, intermediate = path_of(configuration)
    assert (len(vault.server.issuers(root)), len(vault.server.keys_of(intermediate))) == (1, 1)
    await vault.provider(configuration).retire(epochs=(1,), keep=prepared[0].backend)
    assert vault.server.issuers(intermediate).keys() == {prepared[0].backend["issuer"]}
    await signed_by(vault, configuration, prepared[0])


@pytest.mark.parametrize(
    "step", ["root mounted", "root made", "intermediate mounted", "key made", "certificate taken in"]
)
async def test_a_step_that_was_begun_is_finished(vault: VaultLab, step: str) -> None:
    configuration = vault.configuration()
    root, intermediate = path_of(configuration)
    server, name = vault.server, f"caserver-{CLUSTER_ID}-1"
    steps = ["root mounted", "root made", "intermediate mounted", "key made", "certificate taken in"]
    done = steps[: steps.index(step) + 1]
    if step == "certificate taken in":
        await prepared_on(vault, configuration)  # all but the role
        server.ask("DELETE", f"{intermediate}/roles/caserver-{CLUSTER_ID}")
        done = []
    if "root mounted" in done:
        server.mount(root)
    if "root made" in done:
        body = {"common_name": "begun", "issuer_name": name, "key_name": name, "ttl": "87600h"}
        server.ask("POST", f"{root}/root/generate/internal", body)
    if "intermediate mounted" in done:
        server.mount(intermediate)
    if "key made" in done:
        body = {"common_name": "begun", "key_name": name, "key_type": "ec"}
        server.ask("POST", f"{intermediate}/intermediate/generate/internal", body)
    prepared = await prepared_on(vault, configuration)
    await signed_by(vault, configuration, prepared)
    assert len(server.issuers(root)) == len(server.issuers(intermediate)) == len(server.keys_of(intermediate)) == 1


async def test_what_was_given_up_is_cleaned_away_without_a_trace_of_it_in_the_state(vault: VaultLab) -> None:
    configuration = vault.configuration()
    await prepared_on(vault, configuration, epoch=7)
    root, intermediate = path_of(configuration)
    for _ in range(2):
        await vault.provider(configuration).retire(epochs=(7,), keep=None)
    assert intermediate not in vault.server.mounts()
    assert len(vault.server.issuers(root)) == 1


async def test_an_engine_that_another_epoch_uses_stays(vault: VaultLab) -> None:
    configuration = vault.configuration()
    first = await prepared_on(vault, configuration, epoch=1)
    await vault.provider(configuration, listed(first)).prepare(now=now(), epoch=2)
    await vault.provider(configuration).retire(epochs=(1,), keep={})
    _, path = path_of(configuration)
    assert [key["key_name"] for key in vault.server.keys_of(path).values()] == [f"caserver-{CLUSTER_ID}-2"]


async def test_a_mount_of_an_operator_is_emptied_of_ours_and_stays(vault: VaultLab) -> None:
    path = vault.server.mount(unique("operators"))
    configuration = vault.configuration(intermediate=path)
    await prepared_on(vault, configuration)
    await vault.provider(configuration).retire(epochs=(1,), keep={})
    assert path in vault.server.mounts()
    assert (vault.server.issuers(path), vault.server.keys_of(path)) == ({}, {})


async def test_the_default_issuer_follows_where_it_was_ours(vault: VaultLab) -> None:
    configuration = vault.configuration()
    first = await prepared_on(vault, configuration)
    second = await vault.provider(configuration, listed(first)).prepare(now=now(), epoch=2)
    _, path = path_of(configuration)
    await vault.provider(configuration).retire(epochs=(1,), keep=second.backend)
    issuers = vault.server.issuers(path)
    assert issuers.keys() == {second.backend["issuer"]}
    assert issuers[second.backend["issuer"]]["is_default"]


async def test_what_signs_at_another_server_under_the_same_path_keeps_nothing_here(vault: VaultLab) -> None:
    """As after a move to another server with its paths; a namespace of its own stands for that server."""
    here, elsewhere = unique("here"), unique("elsewhere")
    for name in (here, elsewhere):
        vault.server.ask("POST", f"sys/namespaces/{name}", {})
    former = vault.configuration(root="ca/root", intermediate="ca/mesh", namespace=here)
    await prepared_on(vault, former)
    moved = await prepared_on(vault, with_vault(former, namespace=elsewhere), epoch=2)
    await vault.provider(former).retire(epochs=(1,), keep={**moved.backend, "namespace": here})
    assert "ca/mesh" not in vault.server.mounts(namespace=here)
    assert "ca/mesh" in vault.server.mounts(namespace=elsewhere)


@pytest.mark.parametrize("lost", ["token", "permission"])
async def test_what_a_token_may_not_see_any_more_is_still_owed(vault: VaultLab, lost: str) -> None:
    configuration = vault.configuration()
    await prepared_on(vault, configuration)
    _, path = path_of(configuration)
    policy = """
        path "auth/token/lookup-self" { capabilities = ["read"] }
        path "sys/capabilities-self" { capabilities = ["update"] }
    """
    token = vault.server.restricted_token(policy)
    if lost == "token":
        vault.server.ask("POST", "auth/token/revoke", {"token": token})
    blind = vault.provider(with_vault(configuration, token=Secret(token)))
    with pytest.raises(CaserverError) as caught:
        await blind.retire(epochs=(1,), keep=None)
    assert f'path "{path}/key/+" {{ capabilities = ["delete"] }}' in caught.value.detail or lost == "token"
    assert "the Vault token was refused" in caught.value.detail or lost == "permission"
    assert token not in caught.value.detail
    assert len(vault.server.keys_of(path)) == 1


async def test_who_may_clean_up_where_nothing_is_mounted_any_more_is_done(vault: VaultLab) -> None:
    configuration = vault.configuration()
    _, path = path_of(configuration)
    policy = f"""
        path "auth/token/lookup-self" {{ capabilities = ["read"] }}
        path "sys/capabilities-self" {{ capabilities = ["update"] }}
        path "{path}/*" {{ capabilities = ["list", "delete"] }}
    """
    token = vault.server.restricted_token(policy)
    await vault.provider(with_vault(configuration, token=Secret(token))).retire(epochs=(1,), keep=None)


async def test_retiring_a_path_where_nothing_is_mounted_any_more_is_done_at_once(vault: VaultLab) -> None:
    await vault.provider(vault.configuration()).retire(epochs=(1, 2), keep=None)


# --- leaves ---


async def test_a_leaf_never_outlives_the_intermediate(vault: VaultLab) -> None:
    configuration = vault.configuration(root=imported(vault.server, own_root(ends=10 * DAY)))
    prepared = await prepared_on(vault, configuration)
    (beyond,) = await vault.provider(configuration, listed(prepared)).sign_leaves([order(ttl=11 * 24 * HOUR)])
    assert isinstance(beyond, ProviderRefused)
    assert "the certificate would outlive its issuer" in beyond.detail
    await signed_by(vault, configuration, prepared, ttl=9 * 24 * HOUR)


async def test_leaves_of_many_callers_at_once_are_all_signed(vault: VaultLab) -> None:
    configuration = vault.configuration()
    prepared = await prepared_on(vault, configuration)
    orders = [order(number, service=f"s{number}") for number in range(60)]
    signed = await vault.provider(configuration, listed(prepared)).sign_leaves(orders)
    assert all(isinstance(each, SignedLeaf) for each in signed)
    assert len({each.serial for each in signed if isinstance(each, SignedLeaf)}) == 60


async def test_an_unbound_provider_cannot_sign(vault: VaultLab) -> None:
    with pytest.raises(ProviderUnavailable, match="no issuer yet"):
        await vault.provider(vault.configuration()).sign_leaves([order()])


async def test_an_issuer_that_was_deleted_is_told_and_made_anew(vault: VaultLab) -> None:
    configuration = vault.configuration()
    prepared = await prepared_on(vault, configuration)
    _, path = path_of(configuration)
    vault.server.ask("DELETE", f"{path}/issuer/{prepared.backend['issuer']}")
    provider = vault.provider(configuration, listed(prepared))
    (refused,) = await provider.sign_leaves([order()])
    assert isinstance(refused, ProviderRefused)
    assert "the issuer does not exist" in refused.detail
    assert [code for code, _ in (await provider.tend(now())).troubles] == ["VaultIssuerMissing"]
    renewed = await provider.prepare(now=now(), epoch=2)
    assert renewed.root_pem == prepared.root_pem
    await signed_by(vault, configuration, renewed)


# --- cross-signing with names that Vault cannot ask for ---


@pytest.mark.parametrize(("old", "new"), [("ec-256", "rsa-2048"), ("rsa-2048", "ec-256-b")])
async def test_a_root_with_an_odd_name_is_cross_signed_as_it_stands(vault: VaultLab, old: str, new: str) -> None:
    former = vault.configuration(root=imported(vault.server, own_root(key=old), key=old))
    successor = vault.configuration(root=imported(vault.server, own_root(key=new), key=new))
    old_prepared, new_prepared = await prepared_on(vault, former), await prepared_on(vault, successor, epoch=2)
    crossed = await vault.provider(former, listed(old_prepared)).cross_sign(
        new_prepared.root_pem, csr_pem=new_prepared.root_csr, serial=1, not_before=now(), not_after=now() + 7 * DAY
    )
    leaf = await signed_by(vault, successor, new_prepared)
    chain = (*new_prepared.intermediates, crossed)
    assert verify_chain(leaf.pem, chain, (old_prepared.root_pem,), now()) is None


async def test_cross_signing_it_takes_a_permission_that_is_named(vault: VaultLab) -> None:
    former = vault.configuration()
    old = await prepared_on(vault, former)
    root, intermediate = path_of(former)
    policy = f"""
        path "{root}/issuer/+/sign-intermediate" {{ capabilities = ["update"] }}
        path "{intermediate}/*" {{ capabilities = ["update", "list"] }}
    """
    token = vault.server.restricted_token(policy)
    target = own_root(key="rsa-2048")
    provider = vault.provider(with_vault(former, token=Secret(token)), listed(old))
    with pytest.raises(ProviderRefused) as caught:
        await provider.cross_sign(target, csr_pem=None, serial=1, not_before=now(), not_after=now() + DAY)
    assert f'path "{root}/issuer/+/sign-self-issued"' in caught.value.detail
    assert "ForceWithoutCrossSigning" in caught.value.detail


# --- credentials ---


async def test_a_wrong_token_is_named_and_not_shown(vault: VaultLab) -> None:
    detail = await told(vault, vault.configuration(token=Secret("s.sesame")))
    assert detail.splitlines()[0] == "error configuring provider: the Vault token was refused"
    assert "lookup-self" in detail
    assert "sesame" not in detail


async def test_a_token_that_cannot_be_renewed_is_a_warning_of_the_plan(vault: VaultLab) -> None:
    token = vault.server.restricted_token(
        'path "*" { capabilities = ["create", "read", "update", "delete", "list", "sudo"] }', renewable=False
    )
    inspection = await vault.provider(vault.configuration(token=Secret(token))).inspect()
    (warning,) = inspection.warnings
    assert "cannot be renewed and expires at" in warning


async def test_equal_settings_share_one_session_until_the_last_lets_go(vault: VaultLab) -> None:
    kind, configuration = vault.kind(), vault.configuration()
    one, other = vault.provider(configuration, kind=kind), vault.provider(configuration, kind=kind)
    await one.inspect()
    await other.inspect()
    one.close()
    prepared = await other.prepare(now=now(), epoch=1)
    (signed,) = await other.sign_leaves([order()])
    assert isinstance(signed, SignedLeaf)
    other.close()
    await one.inspect()  # opens again
    assert prepared.backend
