"""One set of demands on every provider: the built-in one and Vault (a real OpenBao server) answer them alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from caserver.authority.ports import Prepared, Provider, SignedLeaf
from caserver.environment import InlineWorkers, SystemClock, SystemEntropy
from caserver.errors import CaserverError
from caserver.fields import Secret
from caserver.pki.certificates import LEAF_KEY_USAGE, describe, extension, uri_sans
from caserver.pki.chain import verify_chain
from caserver.providers.builtin import builtin_kind
from caserver.state.configuration import CAConfiguration, parse_bootstrap
from caserver.state.model import CARoot
from tests.testkit import openssl
from tests.testkit.nodes import TRUST_DOMAIN
from tests.testkit.vault import VaultLab, listed, now, order

KINDS = ("consul", "vault")


class Subject:
    """One kind of provider under examination."""

    def __init__(self, kind: str, vault: VaultLab) -> None:
        self.kind = kind
        self._vault = vault
        self._builtin = builtin_kind(SystemClock(), SystemEntropy(), InlineWorkers())

    @property
    def serial(self) -> int | None:
        """What an order says where this kind signs it."""
        return None if self.kind == "vault" else 77

    def configuration(self, key_type: str = "ec", key_bits: int = 256) -> CAConfiguration:
        plain = parse_bootstrap("consul", {"private_key_type": key_type, "private_key_bits": key_bits})
        return plain if self.kind == "consul" else self._vault.configuration(effective=plain.effective)

    def provider(self, configuration: CAConfiguration, prepared: Prepared | None = None) -> Provider:
        """For a new configuration, or bound to what was prepared."""
        root: CARoot | None = None if prepared is None else listed(prepared, provider=self.kind)
        if self.kind == "vault":
            return self._vault.provider(configuration, root)
        key = None if prepared is None or prepared.root_key is None else Secret(prepared.root_key.reveal())
        return self._builtin.build(configuration, trust_domain=TRUST_DOMAIN, root=root, root_key=key)


@pytest.fixture
def subjects(vault: VaultLab) -> Callable[[str], Subject]:
    return lambda kind: Subject(kind, vault)


@pytest.fixture(params=KINDS)
def subject(request: pytest.FixtureRequest, vault: VaultLab) -> Subject:
    return Subject(request.param, vault)


async def test_inspecting_makes_nothing(subject: Subject) -> None:
    configuration = subject.configuration()
    for _ in range(2):
        assert (await subject.provider(configuration).inspect()).root_id is None


async def test_preparing_makes_a_root_for_the_trust_domain(subject: Subject) -> None:
    prepared = await subject.provider(subject.configuration()).prepare(now=now(), epoch=1)
    facts = describe(prepared.root_pem)
    assert facts.is_ca
    assert facts.uri_sans == (f"spiffe://{TRUST_DOMAIN}",)
    assert (facts.key_type, facts.key_bits) == ("ec", 256)
    assert facts.not_before <= now().timestamp() - 200
    assert 87599 * 3600 <= facts.not_after - facts.not_before <= 87601 * 3600


@pytest.mark.parametrize(("key_type", "key_bits"), [("ec", 384), ("rsa", 2048)])
async def test_the_wanted_kind_of_key_is_made(subject: Subject, key_type: str, key_bits: int) -> None:
    prepared = await subject.provider(subject.configuration(key_type, key_bits)).prepare(now=now(), epoch=1)
    for pem in (prepared.root_pem, *prepared.intermediates):
        assert (describe(pem).key_type, describe(pem).key_bits) == (key_type, key_bits)


async def test_preparing_the_same_epoch_twice_yields_the_same(subject: Subject) -> None:
    provider = subject.provider(subject.configuration())
    first = await provider.prepare(now=now(), epoch=1)
    again = await provider.prepare(now=now() + timedelta(hours=1), epoch=1)
    assert (again.root_pem, again.intermediates, again.backend) == (
        first.root_pem,
        first.intermediates,
        first.backend,
    )


async def test_a_new_epoch_keeps_the_root(subject: Subject) -> None:
    configuration = subject.configuration()
    first = await subject.provider(configuration).prepare(now=now(), epoch=1)
    later = await subject.provider(configuration, first).prepare(now=now(), epoch=2)
    assert later.root_pem == first.root_pem
    assert len(later.intermediates) == len(first.intermediates)
    assert not set(later.intermediates) & set(first.intermediates)


async def test_leaves_are_what_was_ordered_and_verify(subject: Subject, tmp_path: Path) -> None:
    provider = subject.provider(subject.configuration())
    prepared = await provider.prepare(now=now(), epoch=1)
    ordered = order(serial=subject.serial)
    (signed,) = await provider.sign_leaves([ordered])
    assert isinstance(signed, SignedLeaf)
    leaf = x509.load_pem_x509_certificate(signed.pem.encode())
    assert (signed.issue_id, signed.serial) == (ordered.issue_id, leaf.serial_number)
    assert leaf.subject.rfc4514_string() == f"CN={ordered.common_name}"
    assert uri_sans(leaf) == (ordered.spiffe_uri,)
    assert len(list(extension(leaf, x509.SubjectAlternativeName) or ())) == 1
    assert extension(leaf, x509.KeyUsage) == LEAF_KEY_USAGE
    assert extension(leaf, x509.BasicConstraints) == x509.BasicConstraints(ca=False, path_length=None)
    assert leaf.not_valid_after_utc.timestamp() == ordered.not_after
    assert abs(leaf.not_valid_before_utc.timestamp() - ordered.not_before) < 60
    assert verify_chain(signed.pem, prepared.intermediates, (prepared.root_pem,), now()) is None
    assert openssl.accepts(tmp_path, signed.pem + "".join(prepared.intermediates), prepared.root_pem)


async def test_an_order_without_a_name_has_none(subject: Subject) -> None:
    provider = subject.provider(subject.configuration())
    prepared = await provider.prepare(now=now(), epoch=1)
    (signed,) = await provider.sign_leaves([replace(order(serial=subject.serial), common_name="")])
    assert isinstance(signed, SignedLeaf)
    leaf = x509.load_pem_x509_certificate(signed.pem.encode())
    assert leaf.subject.rfc4514_string() == ""
    assert leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical
    assert verify_chain(signed.pem, prepared.intermediates, (prepared.root_pem,), now()) is None


@pytest.mark.parametrize("service", ["a,b", "with%20space", "under_score", "x" * 63, "ümlaut".encode().hex()])
async def test_odd_names_stay_whole(subject: Subject, service: str) -> None:
    provider = subject.provider(subject.configuration())
    await provider.prepare(now=now(), epoch=1)
    ordered = replace(order(serial=subject.serial, service=service), common_name="")
    (signed,) = await provider.sign_leaves([ordered])
    assert isinstance(signed, SignedLeaf)
    assert uri_sans(x509.load_pem_x509_certificate(signed.pem.encode())) == (ordered.spiffe_uri,)


async def test_a_batch_is_answered_in_order_and_one_bad_order_spoils_nothing(subject: Subject) -> None:
    provider = subject.provider(subject.configuration())
    await provider.prepare(now=now(), epoch=1)
    orders = [
        order(number, service=f"s{number}", serial=subject.serial and subject.serial + number) for number in range(20)
    ]
    orders[7] = replace(orders[7], csr_pem="no request", public_key=b"no key")
    results = await provider.sign_leaves(orders)
    for number, (ordered, result) in enumerate(zip(orders, results, strict=True)):
        if number == 7:
            assert isinstance(result, CaserverError)
            continue
        assert isinstance(result, SignedLeaf)
        assert result.issue_id == ordered.issue_id
        assert uri_sans(x509.load_pem_x509_certificate(result.pem.encode())) == (ordered.spiffe_uri,)


async def test_one_bound_from_the_state_signs_as_the_one_that_made_it(subject: Subject) -> None:
    configuration = subject.configuration()
    prepared = await subject.provider(configuration).prepare(now=now(), epoch=1)
    (signed,) = await subject.provider(configuration, prepared).sign_leaves([order(serial=subject.serial)])
    assert isinstance(signed, SignedLeaf)
    assert verify_chain(signed.pem, prepared.intermediates, (prepared.root_pem,), now()) is None


@pytest.mark.parametrize("new_kind", KINDS)
@pytest.mark.parametrize("old_kind", KINDS)
@pytest.mark.parametrize(("old_key", "new_key"), [(("ec", 256), ("rsa", 2048)), (("rsa", 2048), ("ec", 256))])
async def test_any_root_cross_signs_any_other(
    subjects: Callable[[str], Subject],
    tmp_path: Path,
    *,
    old_kind: str,
    new_kind: str,
    old_key: tuple[str, int],
    new_key: tuple[str, int],
) -> None:
    old, new = subjects(old_kind), subjects(new_kind)
    former, successor = old.provider(old.configuration(*old_key)), new.provider(new.configuration(*new_key))
    old_root = (await former.prepare(now=now(), epoch=1)).root_pem
    prepared = await successor.prepare(now=now(), epoch=2)
    until = now() + timedelta(days=7)
    crossed = await former.cross_sign(
        prepared.root_pem, csr_pem=prepared.root_csr, serial=9, not_before=now(), not_after=until
    )
    made, root = (x509.load_pem_x509_certificate(pem.encode()) for pem in (crossed, prepared.root_pem))
    assert made.subject.public_bytes() == root.subject.public_bytes()
    assert describe(crossed).signing_key_id == describe(prepared.root_pem).signing_key_id
    assert describe(crossed).not_after == until.timestamp()
    (leaf,) = await successor.sign_leaves([order(serial=new.serial)])
    assert isinstance(leaf, SignedLeaf)
    chain = leaf.pem + "".join((*prepared.intermediates, crossed))
    assert openssl.accepts(tmp_path, chain, old_root)
    assert openssl.accepts(tmp_path, chain, prepared.root_pem)


async def test_retiring_other_epochs_leaves_the_one_in_force_signing(subject: Subject) -> None:
    configuration = subject.configuration()
    first = await subject.provider(configuration).prepare(now=now(), epoch=1)
    second = await subject.provider(configuration, first).prepare(now=now(), epoch=2)
    for _ in range(2):
        await subject.provider(configuration).retire(epochs=(1, 2, 3), keep=second.backend)
    (signed,) = await subject.provider(configuration, second).sign_leaves([order(serial=subject.serial)])
    assert isinstance(signed, SignedLeaf)


async def test_all_is_well_after_preparing(subject: Subject) -> None:
    provider = subject.provider(subject.configuration())
    await provider.prepare(now=now(), epoch=1)
    tended = await provider.tend(now())
    assert tended.troubles == ()
    assert tended.next_in > 0


async def test_closing_twice_is_closing_once(subject: Subject) -> None:
    provider = subject.provider(subject.configuration())
    await provider.prepare(now=now(), epoch=1)
    provider.close()
    provider.close()


async def test_no_secret_shows_in_a_representation(subject: Subject, vault: VaultLab) -> None:
    provider = subject.provider(subject.configuration())
    prepared = await provider.prepare(now=now(), epoch=1)
    shown = repr(provider) + repr(prepared) + repr(prepared.backend) + repr(vars(provider))
    assert "PRIVATE KEY" not in shown
    assert f"'{vault.server.token}'" not in shown
