"""What a configuration would do, decided without doing it.

``plan_change`` is pure: the answer of a dry run and the orders of a rotation are the same object.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import assert_never

from caserver.authority.ports import Inspection
from caserver.state.configuration import CAConfiguration, same_meaning
from caserver.state.model import CARoot, CAState, Index, RootID

CROSS_SIGNED_MIN = 7 * 24 * 3600  # seconds that a cross-signed certificate lives at least (Consul: always)
CROSS_SIGNED_LEAF_LIVES = 2  # and this many leaf lifetimes
BACKDATED = 300  # seconds that the NotBefore of what a rotation makes lies in the past


class Effect(StrEnum):
    """What a change of configuration comes to."""

    NOTHING = "nothing"
    STORE = "store"  # the active root stays, and what signs leaves below it
    RENEW = "renew"  # the active root stays, what signs leaves below it is made anew
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
    needs: tuple[str, ...] = ()  # permissions at the backend that the change uses


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
    crossed = effect is Effect.ROTATE and crosses(active, wanted, now) and not _is(active, new_root_id)
    return RotationPlan(
        effect=effect,
        configuration=wanted,
        expect_index=Index(0) if state.configuration is None else state.configuration.modify_index,
        expect_epoch=state.ca_epoch,
        old_root_id=None if active is None else active.id,
        new_root_id=new_root_id if effect is Effect.ROTATE or active is None else active.id,
        cross_sign=crossed,
        steps=_steps(effect, state, wanted, new_root_id, crossed=crossed),
        warnings=(*inspection.warnings, *_warnings(effect, active, wanted, stored, now)),
        needs=inspection.needs if effect in (Effect.RENEW, Effect.ROTATE) else (),
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
    if same_meaning(stored, wanted):
        return Effect.NOTHING
    return Effect.STORE if _below_root(stored) == _below_root(wanted) else Effect.RENEW


def _keeps_root(active: CARoot, wanted: CAConfiguration, stored: CAConfiguration, inspection: Inspection) -> bool:
    if stored.provider != wanted.provider:
        return False
    if inspection.root_id is not None:
        return inspection.root_id == active.id
    if wanted.vault is not None:
        return False  # the root path is empty: there will be another root
    like = replace(stored, effective=wanted.effective, force_without_cross_signing=wanted.force_without_cross_signing)
    if stored.root_cert is not None or not same_meaning(like, wanted):
        return False
    if wanted.private_key is not None:
        return True
    return (active.key_type, active.key_bits) == (wanted.effective.private_key_type, wanted.effective.private_key_bits)


def _below_root(configuration: CAConfiguration) -> tuple[object, ...]:
    """What the certificate that signs leaves was made by, where that is not the root: where it is, and how it is set up."""
    if configuration.vault is None:
        return ()
    effective = configuration.effective
    key = (effective.private_key_type, effective.private_key_bits)
    return (configuration.vault.place, effective.intermediate_ttl, key)


def _is(active: CARoot | None, root_id: RootID | None) -> bool:
    return active is not None and active.id == root_id


def _steps(
    effect: Effect, state: CAState, wanted: CAConfiguration, new_root_id: RootID | None, *, crossed: bool
) -> tuple[str, ...]:
    active = state.active_root
    match effect:
        case Effect.NOTHING:
            return ()
        case Effect.STORE:
            return ("store the configuration; the active root stays",)
        case Effect.RENEW:
            return (
                "announce the change in the log",
                *_steps_at_vault(wanted),
                "prove by TLS handshakes that leaves verify below it",
                "let it sign leaves, and remove the former one; the active root stays",
            )
        case Effect.ROTATE:
            root = _root_step(state, wanted, new_root_id)
            steps = ["announce the change in the log", root, *_steps_at_vault(wanted)]
        case _:
            assert_never(effect)
    if active is not None and crossed:
        steps.append(f"cross-sign it by root {active.id}")
    if active is not None:
        steps.append("prove by TLS handshakes that leaves verify under the bundles in use")
    steps.append("make it the active root")
    if active is not None and not _is(active, new_root_id):
        steps.append(f"retire root {active.id}, and prune it when no leaf needs it any more")
    return tuple(steps)


def _root_step(state: CAState, wanted: CAConfiguration, new_root_id: RootID | None) -> str:
    vault = wanted.vault
    at = "" if vault is None else f" at {_path(vault.root_namespace, vault.root_pki_path)} of Vault"
    if new_root_id is None:
        return f"generate a root{at}"
    return f"{'take back' if state.root(new_root_id) is not None else 'take in'} root {new_root_id}{at}"


def _steps_at_vault(wanted: CAConfiguration) -> tuple[str, ...]:
    vault = wanted.vault
    if vault is None:
        return ()
    path = _path(vault.intermediate_namespace, vault.intermediate_pki_path)
    return (f"make an intermediate at {path} of Vault, mounted if it is not there, and have the root sign it",)


def _path(namespace: str, path: str) -> str:
    return f"{namespace}/{path}" if namespace else path


def _warnings(
    effect: Effect, active: CARoot | None, wanted: CAConfiguration, stored: CAConfiguration | None, now: int
) -> list[str]:
    if active is None or stored is None:
        return []
    if effect in (Effect.STORE, Effect.RENEW) and wanted.effective.root_ttl != stored.effective.root_ttl:
        return ["RootCertTTL applies to the next root that is generated, not to the active one"]
    if effect is not Effect.ROTATE:
        return []
    found = []
    own = wanted.vault is None and wanted.root_cert is None and wanted.private_key is None
    if stored.root_cert is not None and own:
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
