from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import pytest
from cryptography import x509

from caserver.authority.ports import Provider, SignedLeaf, SigningOrder
from caserver.environment import InlineWorkers
from caserver.errors import InvalidConfig, ProviderRefused
from caserver.fields import Secret
from caserver.pki.certificates import describe
from caserver.pki.chain import verify_chain
from caserver.pki.keys import public_key_der
from caserver.providers.builtin import builtin_kind
from caserver.state.configuration import parse_bootstrap
from tests.testkit.fakes import ManualClock, SeededEntropy
from tests.testkit.keys import key_pem, private_key
from tests.testkit.nodes import TRUST_DOMAIN, operator_root
from tests.testkit.vault import listed

T = TypeVar("T")
CLOCK = ManualClock()
NOW = CLOCK.now()


class CountingWorkers(InlineWorkers):
    def __init__(self) -> None:
        self.calls = 0

    async def run(self, function: Callable[..., T], *args: object) -> T:
        self.calls += 1
        return await super().run(function, *args)


def provider(config: Mapping[str, object] | None = None, *, workers: InlineWorkers | None = None) -> Provider:
    factory = builtin_kind(CLOCK, SeededEntropy(), workers or InlineWorkers()).build
    return factory(parse_bootstrap("consul", config or {}), trust_domain=TRUST_DOMAIN, root=None, root_key=None)


def order(serial: int | None = 5, public_key: bytes | None = None) -> SigningOrder:
    return SigningOrder(
        issue_id="1",
        serial=serial,
        spiffe_uri=f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/web",
        common_name="web.svc.default.2a3b4c5d.consul",
        public_key=public_key or public_key_der(private_key("ec-256-b").public_key()),
        csr_pem="",
        not_before=int(NOW.timestamp()) - 60,
        not_after=int(NOW.timestamp()) + 3600,
    )


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("ec", 224), ("ec", 256), ("ec", 384), ("ec", 521), ("rsa", 2048)],
)
async def test_a_root_of_the_wanted_kind_is_generated(kind: str, bits: int) -> None:
    prepared = await provider({"private_key_type": kind, "private_key_bits": bits}).prepare(now=NOW, epoch=1)
    facts = describe(prepared.root_pem)
    assert (facts.key_type, facts.key_bits) == (kind, bits)
    assert facts.uri_sans == (f"spiffe://{TRUST_DOMAIN}",)
    assert facts.is_ca
    assert facts.not_before == int(NOW.timestamp()) - 300
    assert facts.not_after - facts.not_before == 87600 * 3600
    assert prepared.root_key is not None
    assert prepared.intermediates == ()


async def test_preparing_twice_yields_the_same_root() -> None:
    ours = provider()
    assert await ours.prepare(now=NOW, epoch=1) == await ours.prepare(now=NOW + timedelta(days=1), epoch=1)


async def test_two_providers_generate_two_roots() -> None:
    entropy = SeededEntropy()
    factory = builtin_kind(CLOCK, entropy, InlineWorkers()).build
    roots = set()
    for _ in range(2):
        each = factory(parse_bootstrap("consul", {}), trust_domain=TRUST_DOMAIN, root=None, root_key=None)
        roots.add((await each.prepare(now=NOW, epoch=1)).root_pem)
    assert len(roots) == 2


async def test_p224_is_allowed_with_a_warning() -> None:
    assert (await provider({"private_key_bits": 224}).inspect()).warnings
    assert (await provider({"private_key": key_pem("ec-224")}).inspect()).warnings
    assert (await provider({"private_key_bits": 256}).inspect()).warnings == ()


async def test_an_operators_root_is_taken_byte_for_byte() -> None:
    config = operator_root("rsa-2048")
    ours = provider(config)
    inspection = await ours.inspect()
    assert inspection.root_pem == config["RootCert"]
    prepared = await ours.prepare(now=NOW, epoch=1)
    assert prepared.root_pem == config["RootCert"]
    assert inspection.root_id == describe(prepared.root_pem).id


async def test_a_key_alone_gets_a_root_made_for_it() -> None:
    ours = provider({"private_key": key_pem("ec-384")})
    assert (await ours.inspect()).root_id is None
    prepared = await ours.prepare(now=NOW, epoch=1)
    certificate = x509.load_pem_x509_certificate(prepared.root_pem.encode())
    assert certificate.public_key() == private_key("ec-384").public_key()


async def test_an_unreadable_key_is_refused_in_consuls_words_and_not_shown() -> None:
    with pytest.raises(InvalidConfig) as caught:
        await provider({"private_key": "garbage-in-the-key"}).inspect()
    assert caught.value.detail.startswith("error generating CA root certificate: error generating CA: ")
    assert "garbage-in-the-key" not in caught.value.detail


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({**operator_root("ec-256"), "PrivateKey": key_pem("ec-256-b")}, "PrivateKey"),
        (operator_root("ec-256", trust_domain="99999999-aaaa-4bbb-8ccc-dddddddddddd.consul"), "RootCert"),
        (operator_root("ec-256", start=datetime(2020, 1, 1, tzinfo=UTC), days=30), "RootCert"),
        (operator_root("ec-256", days=29), "RootCert"),
        ({"PrivateKey": key_pem("ec-256"), "RootCert": "no certificate"}, "no PEM-encoded data found"),
    ],
    ids=["another key", "another trust domain", "expired", "ends before its leaves", "garbage"],
)
async def test_a_root_that_would_break_leaves_is_refused(config: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidConfig, match=told) as caught:
        await provider(config).inspect()
    assert str(config["PrivateKey"]).splitlines()[1] not in caught.value.detail


@pytest.mark.parametrize("key", ["ec-256", "ec-384", "rsa-2048"])
async def test_leaves_verify_under_the_root(key: str) -> None:
    ours = provider(operator_root(key))
    prepared = await ours.prepare(now=NOW, epoch=1)
    (signed,) = await ours.sign_leaves([order()])
    assert isinstance(signed, SignedLeaf)
    assert (signed.issue_id, signed.serial) == ("1", 5)
    assert verify_chain(signed.pem, (), (prepared.root_pem,), NOW) is None


async def test_one_odd_order_does_not_spoil_the_batch() -> None:
    ours = provider()
    await ours.prepare(now=NOW, epoch=1)
    good, odd, unbooked = await ours.sign_leaves([order(), order(public_key=b"not DER"), order(serial=None)])
    assert isinstance(good, SignedLeaf)
    assert isinstance(odd, ProviderRefused)
    assert isinstance(unbooked, ProviderRefused)


@pytest.mark.parametrize(("key", "elsewhere"), [("ec-256", False), ("ec-384", True), ("rsa-2048", True)])
async def test_keys_that_sign_slowly_sign_in_a_worker(key: str, *, elsewhere: bool) -> None:
    workers = CountingWorkers()
    ours = provider(operator_root(key), workers=workers)
    await ours.prepare(now=NOW, epoch=1)
    before = workers.calls
    await ours.sign_leaves([order()])
    assert (workers.calls > before) is elsewhere


@pytest.mark.parametrize(("old", "new"), [("ec-256", "rsa-2048"), ("rsa-2048", "ec-384"), ("ec-521", "ec-256")])
async def test_any_kind_of_root_cross_signs_any_other(old: str, new: str) -> None:
    former, successor = provider(operator_root(old)), provider(operator_root(new))
    old_root = (await former.prepare(now=NOW, epoch=1)).root_pem
    new_root = (await successor.prepare(now=NOW, epoch=2)).root_pem
    crossed = await former.cross_sign(
        new_root, csr_pem=None, serial=9, not_before=NOW, not_after=NOW + timedelta(days=7)
    )
    (leaf,) = await successor.sign_leaves([order()])
    assert isinstance(leaf, SignedLeaf)
    assert verify_chain(leaf.pem, (crossed,), (old_root,), NOW) is None
    assert describe(crossed).not_after == int((NOW + timedelta(days=7)).timestamp())


async def test_a_provider_bound_from_the_state_signs_as_the_one_that_made_the_root() -> None:
    prepared = await provider().prepare(now=NOW, epoch=1)
    assert prepared.root_key is not None
    factory = builtin_kind(CLOCK, SeededEntropy(9), InlineWorkers()).build
    later = factory(
        parse_bootstrap("consul", {}),
        trust_domain=TRUST_DOMAIN,
        root=listed(prepared, provider="consul"),
        root_key=Secret(prepared.root_key.reveal()),
    )
    (signed,) = await later.sign_leaves([order()])
    assert isinstance(signed, SignedLeaf)
    assert verify_chain(signed.pem, (), (prepared.root_pem,), NOW) is None
    assert (await later.prepare(now=NOW, epoch=2)).root_pem == prepared.root_pem
    await later.retire(epochs=(1,), keep=None)
    assert await later.sign_leaves([order()])


async def test_an_unbound_provider_cannot_sign() -> None:
    with pytest.raises(RuntimeError, match="before it had a root"):
        await provider().sign_leaves([order()])


async def test_no_key_shows_in_a_representation() -> None:
    ours = provider(operator_root("ec-256"))
    prepared = await ours.prepare(now=NOW, epoch=1)
    assert "PRIVATE KEY" not in repr(ours) + repr(prepared)
