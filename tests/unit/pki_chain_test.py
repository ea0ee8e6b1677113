"""Finished leaves, path search and the choice of what travels with a leaf."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from caserver.environment import PrivateKey
from caserver.errors import ProviderRefused
from caserver.pki import certificates, keys
from caserver.pki.certificates import (
    ROOT_KEY_USAGE,
    LeafTemplate,
    leaf_builder,
    load_certificate,
    make_root,
    sign_certificate,
    to_pem,
)
from caserver.pki.chain import (
    HOPS_MAX,
    beyond_reach,
    check_foreign_leaf,
    check_leaf,
    intermediates_for,
    unexpired,
    verify_chain,
)
from caserver.pki.keys import public_key_der
from caserver.pki.leaf_der import Issuer
from tests.testkit import mesh
from tests.testkit.keys import private_key
from tests.testkit.mesh import NOW, TRUST_DOMAIN, crossed, root

R0, R1, R2 = root("ec-256"), root("rsa-2048"), root("ec-384")
X1_BY_0 = crossed(R1, old=R0, old_key="ec-256")
X2_BY_1 = crossed(R2, old=R1, old_key="rsa-2048")
LEAF_0, LEAF_1, LEAF_2 = mesh.leaf(R0, "ec-256"), mesh.leaf(R1, "rsa-2048"), mesh.leaf(R2, "ec-384")


# --- check_leaf ---


def test_a_leaf_that_is_what_was_ordered_passes():
    check_leaf(LEAF_0, mesh.order(), R0)


def test_a_leaf_without_subject_passes():
    template = replace(mesh.order(), common_name="")

    check_leaf(mesh.leaf(R0, "ec-256", template), template, R0)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (mesh.order("db"), "subject, extensions"),
        (mesh.order(key_name="ec-384"), "public key"),
        (replace(mesh.order(), serial=1), "serial"),
        (replace(mesh.order(), not_after=mesh.order().not_after + 1), "validity"),
        (replace(mesh.order(), not_before=mesh.order().not_before - 1), "validity"),
        (replace(mesh.order(), common_name=""), "subject"),
    ],
)
def test_a_leaf_that_differs_from_its_order_is_caught(template: LeafTemplate, what: str):
    with pytest.raises(RuntimeError, match=f"is not what was ordered: {what}"):
        check_leaf(LEAF_0, template, R0)


def test_a_leaf_of_another_issuer_is_caught():
    with pytest.raises(RuntimeError, match="issuer or signature"):
        check_leaf(LEAF_0, mesh.order(), R1)


def test_a_leaf_signed_with_a_key_that_is_not_its_issuers_is_caught():
    """Consul issues such leaves when the operator's key does not belong to the certificate."""
    forged = Issuer(R0, private_key("ec-256-b")).sign(mesh.order())

    with pytest.raises(RuntimeError, match="issuer or signature"):
        check_leaf(forged, mesh.order(), R0)


def test_a_leaf_that_outlives_its_issuer_is_caught():
    short = root("ec-256", days=2)

    with pytest.raises(RuntimeError, match="validity beyond its issuer's"):
        check_leaf(mesh.leaf(short, "ec-256"), mesh.order(), short)


def test_a_leaf_with_a_second_name_is_caught():
    template = mesh.order()
    issuer = certificates.load_certificate(R0)
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(template.spiffe_uri), x509.DNSName("web")])
    builder = certificates.leaf_builder(template, issuer)
    builder._extensions = [
        each for each in builder._extensions if not isinstance(each.value, x509.SubjectAlternativeName)
    ]
    doctored = certificates.to_pem(
        builder.add_extension(names, critical=False).sign(private_key("ec-256"), hashes.SHA256())
    )

    with pytest.raises(RuntimeError, match="ordered: extensions"):
        check_leaf(doctored, template, R0)


# --- verify_chain ---


def test_a_leaf_verifies_under_its_own_root_and_across_two_hops():
    assert verify_chain(LEAF_2, [], [R2], NOW) is None
    assert verify_chain(LEAF_2, [X2_BY_1], [R1], NOW) is None
    assert verify_chain(LEAF_2, [X1_BY_0, X2_BY_1], [R0], NOW) is None
    assert verify_chain(LEAF_2, [X2_BY_1, X1_BY_0], [R1, R0, R2], NOW) is None


@pytest.mark.parametrize(
    ("leaf", "intermediates", "roots", "at", "reason"),
    [
        (LEAF_2, [], [R0], NOW, "no certificate at hand issued certificate CN=web.svc"),
        (LEAF_2, [X2_BY_1], [R0], NOW, "no certificate at hand issued certificate CN=root of ec-384 (serial 5)"),
        (LEAF_2, [], [], NOW, "no certificate at hand issued"),
        (LEAF_2, [X2_BY_1, X1_BY_0], [R0], NOW + timedelta(days=4), "web.svc.default.11111111.consul (serial"),
        (LEAF_0, [], [R0], NOW + timedelta(days=4), "expired at 2030-06-04T11:59:00Z"),
        (LEAF_0, [], [R0], NOW - timedelta(days=4), "is not valid before 2030-06-01T11:59:00Z"),
        (LEAF_1, [], [R1.replace("A", "B", 5)], NOW, "a certificate of the chain cannot be read"),
    ],
)
def test_a_dead_end_is_named(leaf: str, intermediates: list[str], roots: list[str], at: datetime, reason: str):
    assert reason in str(verify_chain(leaf, intermediates, roots, at))


def test_an_expired_hop_is_named():
    short = crossed(R1, old=R0, old_key="ec-256", days=1)

    assert "certificate CN=root of rsa-2048 (serial 5) expired" in str(
        verify_chain(LEAF_1, [short], [R0], NOW + timedelta(days=2))
    )


def test_a_twin_root_with_another_key_does_not_verify():
    """Same name, other key: the key identifier tells them apart, and without one the signature does."""
    twin = root("ec-256-b", name="root of ec-256")

    assert "no certificate at hand issued" in str(verify_chain(LEAF_0, [], [twin], NOW))


def special_root(**changes: tuple[x509.ExtensionType, bool] | None) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "special")])
    usual: dict[str, tuple[x509.ExtensionType, bool] | None] = {
        "constraints": (x509.BasicConstraints(ca=True, path_length=None), True),
        "usage": (certificates.ROOT_KEY_USAGE, True),
    }
    extensions = usual | changes
    builder = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private_key("ec-256").public_key())
    )
    builder = (
        builder.serial_number(9).not_valid_before(NOW - timedelta(days=1)).not_valid_after(NOW + timedelta(days=99))
    )
    for each in filter(None, extensions.values()):
        builder = builder.add_extension(each[0], each[1])
    return certificates.to_pem(builder.sign(private_key("ec-256"), hashes.SHA256()))


SPECIAL_ROOTS: list[tuple[str, str | None]] = [
    (special_root(), None),
    (special_root(usage=None), None),
    (
        special_root(constraints=None, usage=None, id=(x509.SubjectKeyIdentifier(b"1" * 20), False)),
        "is not a CA certificate",
    ),
    (
        special_root(constraints=(x509.BasicConstraints(ca=False, path_length=None), True)),
        "is not a CA certificate",
    ),
    (special_root(usage=(certificates.LEAF_KEY_USAGE, True)), "lacks keyCertSign"),
    (
        special_root(eku=(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)),
        "may not issue for TLS",
    ),
    (
        special_root(odd=(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), True)),
        "unknown critical extensions 1.2.3.4",
    ),
    (special_root(limits=(x509.NameConstraints([x509.DNSName(TRUST_DOMAIN)], None), True)), "Name Constraints"),
    (special_root(limits=(x509.NameConstraints([x509.DNSName("consul")], None), True)), None),
    (special_root(limits=(x509.NameConstraints([x509.IPAddress(ip_network("10.0.0.0/8"))], None), True)), None),
    (
        special_root(
            limits=(
                x509.NameConstraints(
                    [x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]))], None
                ),
                True,
            )
        ),
        "Name Constraints",
    ),
    (
        special_root(limits=(x509.NameConstraints(None, [x509.DNSName("svc.default.11111111.consul")]), True)),
        "Name Constraints",
    ),
    (special_root(limits=(x509.NameConstraints([x509.UniformResourceIdentifier(TRUST_DOMAIN)], None), True)), None),
    (
        special_root(limits=(x509.NameConstraints([x509.UniformResourceIdentifier(".other")], None), True)),
        "Name Constraints",
    ),
    (
        special_root(limits=(x509.NameConstraints(None, [x509.UniformResourceIdentifier(".consul")]), True)),
        "Name Constraints",
    ),
]


@pytest.mark.parametrize(("pem", "reason"), SPECIAL_ROOTS)
def test_a_root_is_held_to_its_extensions(pem: str, reason: str | None):
    """``tests/contract/openssl_test.py`` asks OpenSSL about the same roots."""
    found = verify_chain(mesh.leaf(pem, "ec-256"), [], [pem], NOW)

    assert found is None if reason is None else reason in str(found)


def test_a_leaf_for_servers_only_does_not_verify():
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = certificates.leaf_builder(mesh.order(), certificates.load_certificate(R0))
    builder._extensions = [each for each in builder._extensions if not isinstance(each.value, x509.ExtendedKeyUsage)]
    leaf = certificates.to_pem(
        builder.add_extension(purposes, critical=False).sign(private_key("ec-256"), hashes.SHA256())
    )

    assert "may not be used for TLS clients and servers" in str(verify_chain(leaf, [], [R0], NOW))


def test_leaves_of_a_root_without_key_identifier_have_none_either():
    bare = special_root()

    assert certificates.issuer_key_identifier(certificates.load_certificate(bare)) is None
    for key_name in ("ec-256-b", "ec-384"):
        template = mesh.order(key_name=key_name)
        check_leaf(mesh.leaf(bare, "ec-256", template), template, bare)


def test_a_path_length_is_obeyed():
    narrow = special_root(constraints=(x509.BasicConstraints(ca=True, path_length=0), True))
    hop = crossed(R1, old=narrow, old_key="ec-256")

    assert verify_chain(mesh.leaf(narrow, "ec-256"), [], [narrow], NOW) is None
    assert "allows 0 CA certificates below it, the chain has 1" in str(verify_chain(LEAF_1, [hop], [narrow], NOW))


# --- intermediates_for ---


def test_the_first_rotation_carries_its_cross_signed_certificate():
    assert intermediates_for(R1, X1_BY_0, ((R0, ()),), NOW) == (X1_BY_0,)


def test_two_quick_rotations_keep_both_hops_shortest_path_first():
    """Consul keeps one hop and strands who trusts only the oldest root (contract section 5, 15)."""
    hops = intermediates_for(R2, X2_BY_1, ((R0, ()), (R1, (X1_BY_0,))), NOW)

    assert hops == (X2_BY_1, X1_BY_0)
    assert verify_chain(LEAF_2, hops, [R0], NOW) is None


def test_a_hop_to_a_root_that_was_pruned_falls_away():
    assert intermediates_for(R2, X2_BY_1, ((R1, (X1_BY_0,)),), NOW) == (X2_BY_1,)


def test_an_expired_hop_and_an_expired_root_fall_away():
    after_a_week = NOW + timedelta(days=8)
    fresh = crossed(R2, old=R1, old_key="rsa-2048", start=after_a_week)
    dying = root("ec-521", days=2)
    to_dying = crossed(R1, old=dying, old_key="ec-521")

    assert intermediates_for(R2, fresh, ((R0, ()), (R1, (X1_BY_0,))), after_a_week) == (fresh,)
    assert intermediates_for(R2, X2_BY_1, ((dying, ()), (R1, (to_dying,))), NOW + timedelta(days=3)) == (X2_BY_1,)


def test_without_cross_signing_nothing_travels():
    assert intermediates_for(R1, None, ((R0, ()),), NOW) == ()


def test_going_back_to_a_former_root_keeps_the_way_to_what_came_before_it():
    back = crossed(R1, old=R2, old_key="ec-384", serial=6)

    hops = intermediates_for(R1, back, ((R0, ()), (R1, (X1_BY_0,)), (R2, (X2_BY_1, X1_BY_0))), NOW)

    assert set(hops) == {back, X1_BY_0}
    assert verify_chain(LEAF_1, hops, [R0], NOW) is None
    assert verify_chain(LEAF_1, hops, [R2], NOW) is None


def test_of_two_equal_hops_the_longer_lived_travels():
    longer = crossed(R1, old=R0, old_key="ec-256", days=30, serial=8)

    assert intermediates_for(R1, X1_BY_0, ((R0, ()), (R1, (longer,))), NOW) == (longer,)


def test_texts_are_handed_on_as_they_came_but_end_in_a_newline():
    assert intermediates_for(R1, X1_BY_0.rstrip("\n"), ((R0, ()),), NOW) == (X1_BY_0,)


def line_of_roots(count: int) -> tuple[list[str], list[str]]:
    """Roots of one rotation after the other, and the certificate of each by the one before."""
    names = [f"root {number}" for number in range(count)]
    roots = [root("ec-256", name=name) for name in names]
    hops = [crossed(new, old=old, old_key="ec-256") for old, new in itertools.pairwise(roots)]
    return roots, hops


def test_a_leaf_carries_the_way_to_the_nearest_roots_only():
    roots, hops = line_of_roots(HOPS_MAX + 4)
    previous = tuple((pem, tuple(reversed(hops[:number]))) for number, pem in enumerate(roots[:-1]))

    carried = intermediates_for(roots[-1], hops[-1], previous, NOW)

    assert carried == tuple(reversed(hops[-HOPS_MAX:]))
    assert beyond_reach(roots[-1], carried, hops, roots) == tuple(roots[:3])
    leaf = mesh.leaf(roots[-1], "ec-256")
    assert [verify_chain(leaf, carried, [pem], NOW) is None for pem in roots] == [False] * 3 + [True] * (HOPS_MAX + 1)


def test_of_what_no_certificate_leads_to_nothing_is_beyond_reach():
    assert beyond_reach(R2, (X2_BY_1,), (X2_BY_1, X1_BY_0), (R0, R1, R2, root("ec-521"))) == (R0,)
    assert beyond_reach(R2, (X2_BY_1, X1_BY_0), (X2_BY_1, X1_BY_0), (R0, R1, R2)) == ()


POOL = ("ec-256", "rsa-2048", "ec-384", "ec-521")


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from(POOL), st.integers(0, 4)), min_size=1, max_size=6))
def test_whatever_the_rotations_every_live_bundle_verifies_every_new_leaf(steps: list[tuple[str, int]]):
    """Rotate to and fro with days in between: whoever trusts any one root of the bundle that a live path leads to verifies."""
    bundle: dict[str, tuple[str, ...]] = {"ec-224": ()}
    active, now, last_crossed = "ec-224", NOW, {}
    for number, (target, days) in enumerate(steps):
        now += timedelta(days=days)
        if target == active:
            continue
        hop = crossed(root(target), old=root(active), old_key=active, start=now, serial=number + 10)
        last_crossed[target, active] = now
        previous = tuple((root(name), hops) for name, hops in bundle.items())
        hops = intermediates_for(root(target), hop, previous, now)
        bundle[target], active = hops, target
        leaf = mesh.leaf(root(active), active, mesh.order(start=now))
        assert len(set(hops)) == len(hops) < len(bundle)
        for name in reachable(active, last_crossed, now):
            assert verify_chain(leaf, hops, [root(name)], now) is None


def reachable(active: str, last_crossed: dict[tuple[str, str], datetime], now: datetime) -> set[str]:
    """Roots to which the newest hops of the rotations so far lead, following the hops that each root had when active."""
    found, frontier = {active}, [active]
    while frontier:
        here = frontier.pop()
        for (subject, issuer), made in last_crossed.items():
            if subject == here and made + timedelta(days=7) >= now and issuer not in found:
                found.add(issuer)
                frontier.append(issuer)
    return found


def test_what_has_expired_is_left_out_of_a_chain_at_signing():
    assert unexpired((X2_BY_1, X1_BY_0), NOW) == (X2_BY_1, X1_BY_0)
    assert unexpired((X2_BY_1, X1_BY_0), NOW + timedelta(days=8)) == ()


def test_key_ids_lead_through_a_chain_of_roots_with_one_name():
    """Two roots made by the same command bear one name; only identifiers and keys tell them apart."""
    one, two = root("ec-256", name="same"), root("ec-384", name="same")
    hop = crossed(two, old=one, old_key="ec-256")

    assert intermediates_for(two, hop, ((one, ()),), NOW) == (hop,)
    assert verify_chain(mesh.leaf(two, "ec-384"), (hop,), (one,), NOW) is None
    assert keys.subject_key_id(private_key("ec-256").public_key()) != keys.subject_key_id(
        private_key("ec-384").public_key()
    )


class TestForeignLeaf:
    """A leaf that somebody else made: everything that may not differ is looked at."""

    NOW = 1_800_000_000
    URI = "spiffe://4a2b8c1e-7c65-4a39-a1b2-0123456789ab.consul/ns/default/dc/dc1/svc/web"
    NAME = "web.svc.default.4a2b8c1e.consul"

    def issuer(self, key: str = "ec-256", *, days: int = 365) -> tuple[PrivateKey, str]:
        begun = datetime.fromtimestamp(self.NOW - 1000, UTC)
        pem = make_root(
            private_key(key),
            trust_domain="4a2b8c1e-7c65-4a39-a1b2-0123456789ab.consul",
            common_name=f"signer {key}",
            serial=5,
            not_before=begun,
            not_after=begun + timedelta(days=days),
        )
        return private_key(key), pem

    def ordered(self) -> LeafTemplate:
        return LeafTemplate(
            spiffe_uri=self.URI,
            common_name=self.NAME,
            public_key=public_key_der(private_key("ec-256-b").public_key()),
            serial=0,
            not_before=self.NOW - 60,
            not_after=self.NOW + 3600,
        )

    def made(self, **changes: Any) -> LeafTemplate:
        return replace(self.ordered(), **{"serial": 77, "not_before": self.NOW - 30, **changes})

    def signed(self, template: LeafTemplate, issuer: tuple[PrivateKey, str] | None = None) -> str:
        key, pem = issuer or self.issuer()
        return Issuer(pem, key).sign(template)

    def refusal(self, pem: str) -> str:
        with pytest.raises(ProviderRefused) as refused:
            check_foreign_leaf(pem, self.ordered(), self.issuer()[1], now=self.NOW)
        return refused.value.detail

    @pytest.mark.parametrize("name", [NAME, ""])
    def test_serial_instants_and_the_lack_of_a_name_are_the_providers_choice(self, name: str) -> None:
        pem = self.signed(self.made(common_name=name, not_after=self.NOW + 3000))
        leaf = check_foreign_leaf(pem.rstrip("\n"), self.ordered(), self.issuer()[1], now=self.NOW)

        assert (leaf.pem, leaf.serial) == (pem, 77)
        assert (leaf.not_before, leaf.not_after) == (self.NOW - 30, self.NOW + 3000)

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"public_key": public_key_der(private_key("ec-384").public_key())}, "another public key"),
            ({"common_name": "db.svc.default.4a2b8c1e.consul"}, "another subject"),
            ({"spiffe_uri": URI.replace("web", "db")}, "other names"),
            ({"not_after": NOW + 3601}, "lives longer than was booked"),
            ({"not_before": NOW + 10}, "are the clocks right?"),
            ({"not_before": NOW - 3 * 3600}, "are the clocks right?"),
            ({"not_after": NOW - 1}, "are the clocks right?"),
        ],
        ids=str,
    )
    def test_another_value_is_refused(self, changes: dict[str, Any], told: str) -> None:
        assert told in self.refusal(self.signed(self.made(**changes)))

    def test_another_issuer_is_refused_also_one_of_the_same_name(self) -> None:
        stranger = self.issuer("ec-384")
        _, ours = self.issuer()
        assert "another certificate issued it" in self.refusal(self.signed(self.made(), stranger))
        assert "another certificate issued it" in self.refusal(
            self.signed(self.made(), (private_key("ec-256-b"), ours))
        )

    def test_one_that_outlives_its_issuer_is_refused(self) -> None:
        key, short = self.issuer(days=0)
        template = self.made(not_after=self.NOW + 3600)
        with pytest.raises(ProviderRefused, match="outlives its issuer"):
            check_foreign_leaf(Issuer(short, key).sign(template), self.ordered(), short, now=self.NOW)

    @pytest.mark.parametrize(
        ("extension", "told"),
        [
            (x509.BasicConstraints(ca=True, path_length=None), "does not say CA:FALSE"),
            (ROOT_KEY_USAGE, "its key usage does not fit a leaf"),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), "not for TLS clients and servers"),
            (x509.SubjectAlternativeName([x509.UniformResourceIdentifier(URI), x509.DNSName("x.y")]), "other names"),
            (
                x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"),
                "unknown critical extensions 1.2.3.4",
            ),
        ],
        ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
    )
    def test_another_profile_is_refused(self, extension: x509.ExtensionType, told: str) -> None:
        key, pem = self.issuer()
        builder = leaf_builder(self.made(), load_certificate(pem))
        others = [each for each in builder._extensions if type(each.value) is not type(extension)]
        builder._extensions = [*others, x509.Extension(extension.oid, critical=True, value=extension)]

        assert told in self.refusal(to_pem(sign_certificate(builder, key, hashes.SHA256())))

    def test_a_name_that_is_not_critical_needs_a_subject(self) -> None:
        key, pem = self.issuer()
        builder = leaf_builder(self.made(common_name=""), load_certificate(pem))
        builder._extensions = [
            x509.Extension(each.oid, critical=False, value=each.value) for each in builder._extensions
        ]

        assert "other names" in self.refusal(to_pem(sign_certificate(builder, key, hashes.SHA256())))

    @pytest.mark.parametrize("text", ["", "garbage", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
    def test_what_is_no_certificate_is_refused(self, text: str) -> None:
        assert "no certificate that can be read" in self.refusal(text)
