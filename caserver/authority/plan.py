"""What a configuration would do, decided without doing it.

``plan_change`` is pure: the answer of a dry run and the orders of a rotation are the same object.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from caserver.authority.ports import Inspection
from caserver.state.configuration import CAConfiguration, same_meaning
from caserver.state.model import CARoot, CAState, Index, RootID

CROSS_SIGNED_MIN = 7 * 24 * 3600  # seconds that a cross-signed certificate lives at least (Consul: always)
CROSS_SIGNED_LEAF_LIVES = 2  # and this many leaf lifetimes
BACKDATED = 300  # seconds that the NotBefore of what a rotation makes lies in the past


class Effect(StrEnum):
    """What a change of configuration comes to."""

    NOTHING = "nothing"
    STORE = "store"  # the active root stays
    ROTATE = "rotate"


@dataclass(frozen=True, slots=True)
class RotationPlan:
    """What will be done, on which state it was decided, and what the caller should know."""

    effect: Effect
    configuration: CAConfiguration = field(repr=False)
    expect_index: Index  # ModifyIndex of the configuration that this was decided on; 0 = there was none
    expect_epoch: int
    old_root_id: RootID | None
    new_root_id: RootID | None  # None: a root will be generated
    cross_sign: bool
    steps: tuple[str, ...]
    warnings: tuple[str, ...]


def plan_change(
    state: CAState, wanted: CAConfiguration, *, stored: CAConfiguration | None, inspection: Inspection, now: int
) -> RotationPlan:
    """Decide what ``wanted`` does to ``state``.

    ``stored`` is the configuration in force with its secrets opened, ``inspection`` what the wanted provider found,
    ``now`` epoch seconds.
    """
    active = state.active_root
    new_root_id = None if inspection.root_id is None else RootID(inspection.root_id)
    effect = _effect(active, wanted, stored, inspection)
    crossed = effect is Effect.ROTATE and crosses(active, wanted, now)
    return RotationPlan(
        effect=effect,
        configuration=wanted,
        expect_index=Index(0) if state.configuration is None else state.configuration.modify_index,
        expect_epoch=state.ca_epoch,
        old_root_id=None if active is None else active.id,
        new_root_id=new_root_id if effect is Effect.ROTATE or active is None else active.id,
        cross_sign=crossed,
        steps=_steps(effect, state, new_root_id, crossed=crossed),
        warnings=(*inspection.warnings, *_warnings(effect, active, wanted, stored, now)),
    )


def crosses(active: CARoot | None, wanted: CAConfiguration, now: int) -> bool:
    """Whether the active root is to cross-sign its successor: it exists, is alive, and the caller did not say otherwise."""
    return active is not None and not wanted.force_without_cross_signing and active.not_after > now


def cross_signed_until(active: CARoot, wanted: CAConfiguration, now: int) -> int:
    """NotAfter of the cross-signed certificate: as long as two generations of leaves, never longer than the old root."""
    return min(now + max(CROSS_SIGNED_MIN, CROSS_SIGNED_LEAF_LIVES * wanted.effective.leaf_ttl), active.not_after)


def _effect(
    active: CARoot | None, wanted: CAConfiguration, stored: CAConfiguration | None, inspection: Inspection
) -> Effect:
    if active is None or stored is None or not _keeps_root(active, wanted, stored, inspection):
        return Effect.ROTATE
    return Effect.NOTHING if same_meaning(stored, wanted) else Effect.STORE


def _keeps_root(active: CARoot, wanted: CAConfiguration, stored: CAConfiguration, inspection: Inspection) -> bool:
    if inspection.root_id is not None:
        return inspection.root_id == active.id
    like = replace(stored, effective=wanted.effective, force_without_cross_signing=wanted.force_without_cross_signing)
    if stored.root_cert is not None or not same_meaning(like, wanted):
        return False
    if wanted.private_key is not None:
        return True
    return (active.key_type, active.key_bits) == (wanted.effective.private_key_type, wanted.effective.private_key_bits)


def _steps(effect: Effect, state: CAState, new_root_id: RootID | None, *, crossed: bool) -> tuple[str, ...]:
    active = state.active_root
    if effect is Effect.NOTHING:
        return ()
    if effect is Effect.STORE:
        return ("store the configuration; the active root stays",)
    listed = new_root_id is not None and state.root(new_root_id) is not None
    steps = [
        "announce the change in the log",
        "generate a root" if new_root_id is None else f"{'take back' if listed else 'take in'} root {new_root_id}",
    ]
    if active is not None and crossed:
        steps.append(f"cross-sign it by root {active.id}")
    if active is not None:
        steps.append("prove by TLS handshakes that leaves verify under the bundles in use")
    steps.append("make it the active root")
    if active is not None:
        steps.append(f"retire root {active.id}, and prune it when no leaf needs it any more")
    return tuple(steps)


def _warnings(
    effect: Effect, active: CARoot | None, wanted: CAConfiguration, stored: CAConfiguration | None, now: int
) -> list[str]:
    if active is None or stored is None:
        return []
    if effect is Effect.STORE and wanted.effective.root_ttl != stored.effective.root_ttl:
        return ["RootCertTTL applies to the next root that is generated, not to the active one"]
    if effect is not Effect.ROTATE:
        return []
    found = []
    if stored.root_cert is not None and wanted.root_cert is None and wanted.private_key is None:
        found.append(
            f"RootCert and PrivateKey are absent, which means a generated root: the operator's root {active.id} is rotated out"
        )
    if wanted.force_without_cross_signing:
        found.append(
            "without cross-signing, whoever trusts only the former root refuses new leaves until it has fetched the new roots"
        )
    elif active.not_after <= now:
        found.append(f"root {active.id} has expired and cannot cross-sign its successor")
    return found
