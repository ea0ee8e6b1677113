from __future__ import annotations

from dataclasses import replace

import pytest
from immutables import Map

from caserver.authority.plan import Effect, RotationPlan, cross_signed_until, plan_change
from caserver.authority.ports import Inspection
from caserver.fields import Secret
from caserver.internode.keyring import Keyring
from caserver.state.configuration import CAConfiguration, parse_bootstrap, seal
from caserver.state.model import CARoot, CAState, Configuration, Effective, Index, RootID

NOW = 1_800_000_000
DAY = 24 * 3600
GENERATED = parse_bootstrap("consul", {})
OPERATORS = replace(GENERATED, root_cert="PEM A", private_key=Secret("key A"))
NOTHING_FOUND = Inspection(root_id=None, root_pem=None)


def root(root_id: str, *, active: bool = True, not_after: int = NOW + 1000 * DAY) -> CARoot:
    return CARoot(
        id=RootID(root_id),
        name="Consul CA Root Cert",
        pem=f"PEM {root_id}",
        serial=1,
        not_before=NOW - DAY,
        not_after=not_after,
        key_type="ec",
        key_bits=256,
        signing_key_id="00",
        provider="consul",
        intermediates=(),
        sealed_key=None,
        active=active,
        rotated_out_at=None if active else NOW,
        leaf_not_after_max=0,
        leaf_ttl_max=0,
        live_by_hour=Map(),
        create_index=Index(3),
        modify_index=Index(3),
    )


def state(*roots: CARoot, stored: CAConfiguration = GENERATED) -> CAState:
    sealed = seal(stored, Keyring([b"k" * 32]), b"n" * 12)
    return CAState(cluster_id="id", ca_epoch=4, configuration=Configuration(sealed, Index(2), Index(7)), roots=roots)


def plan(
    current: CAState, wanted: CAConfiguration, stored: CAConfiguration, inspection: Inspection = NOTHING_FOUND
) -> RotationPlan:
    return plan_change(current, wanted, stored=stored, inspection=inspection, now=NOW)


def found(root_id: str) -> Inspection:
    return Inspection(root_id=RootID(root_id), root_pem=f"PEM {root_id}")


def with_effective(configuration: CAConfiguration, **changes: object) -> CAConfiguration:
    return replace(configuration, effective=replace(configuration.effective, **changes))  # type: ignore[arg-type]


def test_the_plan_says_what_it_was_decided_on() -> None:
    planned = plan(state(root("A")), OPERATORS, GENERATED, found("B"))
    assert (planned.expect_index, planned.expect_epoch) == (7, 4)
    assert (planned.old_root_id, planned.new_root_id) == ("A", "B")


def test_the_same_meaning_is_nothing_to_do() -> None:
    planned = plan(state(root("A")), GENERATED, GENERATED)
    assert (planned.effect, planned.steps, planned.new_root_id) == (Effect.NOTHING, (), "A")


@pytest.mark.parametrize(
    "changes", [{"leaf_ttl": 3600}, {"csr_max_per_second": 1.0}, {"rotation_period": 9 * 3600}], ids=str
)
def test_what_leaves_the_root_alone_is_stored(changes: dict[str, object]) -> None:
    assert plan(state(root("A")), with_effective(GENERATED, **changes), GENERATED).effect is Effect.STORE
    wanted = with_effective(OPERATORS, **changes)
    assert plan(state(root("A"), stored=OPERATORS), wanted, OPERATORS, found("A")).effect is Effect.STORE


def test_white_space_makes_no_other_key() -> None:
    stored, wanted = (
        replace(GENERATED, private_key=Secret("key\nA")),
        replace(GENERATED, private_key=Secret("key\nA\n")),
    )
    planned = plan(state(root("A"), stored=stored), with_effective(wanted, leaf_ttl=3600), stored)
    assert planned.effect is Effect.STORE


@pytest.mark.parametrize(
    ("wanted", "stored", "inspection"),
    [
        (OPERATORS, GENERATED, found("B")),
        (GENERATED, OPERATORS, NOTHING_FOUND),
        (with_effective(GENERATED, private_key_bits=384), GENERATED, NOTHING_FOUND),
        (with_effective(GENERATED, private_key_type="rsa", private_key_bits=2048), GENERATED, NOTHING_FOUND),
        (replace(GENERATED, private_key=Secret("one")), GENERATED, NOTHING_FOUND),
        (replace(GENERATED, private_key=Secret("one")), replace(GENERATED, private_key=Secret("two")), NOTHING_FOUND),
        (replace(GENERATED, private_key=Secret("key A")), OPERATORS, NOTHING_FOUND),
    ],
)
def test_what_stands_for_another_root_is_a_rotation(
    wanted: CAConfiguration, stored: CAConfiguration, inspection: Inspection
) -> None:
    planned = plan(state(root("A"), stored=stored), wanted, stored, inspection)
    assert planned.effect is Effect.ROTATE
    assert planned.cross_sign
    assert any("cross-sign" in step for step in planned.steps)


def test_the_first_root_needs_nobody_to_vouch_for_it() -> None:
    planned = plan(state(), GENERATED, GENERATED)
    assert (planned.effect, planned.cross_sign, planned.old_root_id) == (Effect.ROTATE, False, None)
    assert planned.warnings == ()


def test_giving_up_an_operators_root_is_said() -> None:
    planned = plan(state(root("A"), stored=OPERATORS), GENERATED, OPERATORS)
    assert any("generated root" in warning for warning in planned.warnings)


def test_going_back_to_a_listed_root_is_said() -> None:
    planned = plan(state(root("A"), root("B", active=False)), OPERATORS, GENERATED, found("B"))
    assert "take back root B" in planned.steps


def test_force_skips_cross_signing_and_warns() -> None:
    planned = plan(state(root("A")), replace(OPERATORS, force_without_cross_signing=True), GENERATED, found("B"))
    assert not planned.cross_sign
    assert any("without cross-signing" in warning for warning in planned.warnings)


def test_an_expired_root_vouches_for_nobody() -> None:
    planned = plan(state(root("A", not_after=NOW - 1)), OPERATORS, GENERATED, found("B"))
    assert not planned.cross_sign
    assert any("expired" in warning for warning in planned.warnings)


def test_another_root_lifetime_applies_later() -> None:
    planned = plan(state(root("A")), with_effective(GENERATED, root_ttl=9 * DAY), GENERATED)
    assert planned.effect is Effect.STORE
    assert any("RootCertTTL" in warning for warning in planned.warnings)


def test_warnings_of_the_provider_are_passed_on() -> None:
    weak = Inspection(root_id=None, root_pem=None, warnings=("P-224 is weak",))
    assert plan(state(root("A")), OPERATORS, GENERATED, weak).warnings == ("P-224 is weak",)


@pytest.mark.parametrize(
    ("leaf_ttl", "old_ends_in", "expected"),
    [(DAY, 1000 * DAY, 7 * DAY), (10 * DAY, 1000 * DAY, 20 * DAY), (10 * DAY, 15 * DAY, 15 * DAY), (DAY, DAY, DAY)],
)
def test_a_cross_signed_certificate_lives_as_long_as_it_must_and_no_longer(
    leaf_ttl: int, old_ends_in: int, expected: int
) -> None:
    wanted = replace(GENERATED, effective=Effective(leaf_ttl=leaf_ttl))
    assert cross_signed_until(root("A", not_after=NOW + old_ends_in), wanted, NOW) == NOW + expected


def test_a_plan_shows_no_key() -> None:
    assert "key A" not in repr(plan(state(root("B")), OPERATORS, GENERATED, found("A")))
