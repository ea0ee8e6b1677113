"""The change of a cluster secret, judged: what seals the state, whether it may be sealed anew, which key may go.

Pure questions about a state and about what the nodes report of themselves. The order of a change: [old, new] on every
node, [new, old] on every node, then the leader seals everything anew and every node compacts, then [new].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from caserver.internode.keyring import sealed_key_id
from caserver.raft.ports import KeyReport, Leadership
from caserver.state.model import CAState
from caserver.state.sealing import sealed_values


@dataclass(frozen=True, slots=True)
class KeyVerdict:
    """One key: what it seals, and why it must stay (empty: it may go)."""

    key_id: str
    seals: tuple[str, ...]  # names as in ``state.sealing``
    needed: tuple[str, ...]  # sentences


@dataclass(frozen=True, slots=True)
class KeyringStatus:
    """Every listed node with its report (None: it has not said), and every key that anyone holds or needs."""

    nodes: Mapping[str, KeyReport | None]
    keys: tuple[KeyVerdict, ...]


def reports(leadership: Leadership) -> dict[str, KeyReport | None]:
    """What each listed node last said, by name, sorted."""
    return {name: leadership.keys.get(name) for name in sorted({*leadership.peers, leadership.node})}


def hindrance(leadership: Leadership, current: str) -> str | None:
    """What stands against sealing the state with ``current``: every node must seal with it already. None if nothing."""
    for name, report in reports(leadership).items():
        if name == leadership.node:
            continue
        if report is None:
            return f"{name} has not announced its keys (is it up?)"
        if current not in report.held:
            return f"{name} does not hold key {current}: list it there first"
        if report.held[0] != current:
            return f"{name} still seals with key {report.held[0]}: list key {current} first there too"
    return None


def keyring_status(state: CAState, leadership: Leadership) -> KeyringStatus:
    """Which keys there are, and which of them may be taken off the lists."""
    nodes = reports(leadership)
    sealed: dict[str, list[str]] = {}
    for name, value in sorted(sealed_values(state).items()):
        sealed.setdefault(sealed_key_id(value), []).append(name)
    mentioned = [key for report in nodes.values() if report is not None for key in (*report.held, *report.stored)]
    keys = dict.fromkeys([*mentioned, *sealed])
    return KeyringStatus(
        nodes=nodes,
        keys=tuple(KeyVerdict(key, tuple(sealed.get(key, ())), _needed(key, sealed, nodes)) for key in keys),
    )


def _needed(key: str, sealed: Mapping[str, list[str]], nodes: Mapping[str, KeyReport | None]) -> tuple[str, ...]:
    found = []
    if key in sealed:
        found.append(f"it seals {len(sealed[key])} stored secrets")
    for name, report in nodes.items():
        if report is None:
            found.append(f"{name} has not announced its keys")
        elif report.held[0] == key:
            found.append(f"{name} seals and issues with it")
        elif key in report.stored:
            found.append(f"{name} has it in its journal or snapshot")
    return tuple(found)
