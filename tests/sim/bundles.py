"""Which trust bundles are in use, and whether every leaf that is alive verifies under each of them.

A client may hold any list of roots that was ever in force, as long as the root that was active then is still listed, and
no more rotations ago than a chain has room for (the product warns of the others), nor before one that its operator wanted
without cross-signing: until then everything that is signed later must reach it. And no list may come into force that leaves
a living leaf out.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from caserver.pki.chain import HOPS_MAX, verify_chain
from caserver.requests import IssuedLeaf
from caserver.state.model import CAState

CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----\n?")


@dataclass(frozen=True, slots=True)
class _Bundle:
    active: str
    pems: tuple[str, ...]


class Bundles:
    """See above."""

    def __init__(self, fail: Callable[[str], None]) -> None:
        self._fail = fail
        self._listed: tuple[str, ...] = ()
        self._bundles: dict[tuple[str, ...], _Bundle] = {}
        self._leaves: list[IssuedLeaf] = []
        self._roots_index = self._restored = 0
        self._activated: deque[str] = deque(maxlen=HOPS_MAX + 1)  # the roots that were active last, in order
        self._seen: set[int] = set()  # serials of leaves whose signature was checked
        self._ways: set[tuple[str, tuple[str, ...], _Bundle]] = set()  # from an issuer to a root

    def changed(self, state: CAState, *, at: int) -> None:
        """A state came into force by a command of the instant ``at``."""
        active = state.active_root
        if active is None or state.roots_index == self._roots_index:
            return
        if state.restored_index > self._restored:  # of another past: clients fetch what is trusted now
            self._restored = state.restored_index
            self._bundles, self._leaves = {}, []
            self._activated.clear()
        if self._rotated_alone(state, active.id):
            self._bundles = {}
            self._activated.clear()
        self._roots_index = state.roots_index
        self._listed = tuple(root.id for root in state.roots)
        for leaf in self._leaves:
            if leaf.root_id not in self._listed and leaf.not_after >= at:
                self._fail(f"the root of a leaf of {leaf.service} was pruned before the leaf expired")
        if not self._activated or self._activated[-1] != active.id:
            self._activated.append(active.id)
        within_reach = {each for each in self._listed if each in self._activated}
        self._bundles = {key: each for key, each in self._bundles.items() if each.active in within_reach}
        key = (active.id, *self._listed)
        if key in self._bundles:
            return
        bundle = self._bundles[key] = _Bundle(active.id, tuple(root.pem for root in state.roots))
        latest = max((leaf.not_before for leaf in self._leaves), default=0)
        self._leaves = [leaf for leaf in self._leaves if leaf.not_after > latest and leaf.root_id in self._listed]
        for leaf in self._leaves:
            self._check(leaf, bundle, max(leaf.not_before, min(latest, leaf.not_after)))

    def _rotated_alone(self, state: CAState, active: str) -> bool:
        """Whether the active root is new and was not to be signed by the former one."""
        rotated = bool(self._activated) and self._activated[-1] != active
        configuration = state.configuration
        return rotated and configuration is not None and configuration.stored.force_without_cross_signing

    def issued(self, leaf: IssuedLeaf) -> None:
        """A leaf was handed out."""
        if leaf.index <= self._restored:
            return  # it was under way when the state was restored
        self._leaves.append(leaf)
        for bundle in reversed(self._bundles.values()):
            self._check(leaf, bundle, leaf.not_before + 60)

    def _check(self, leaf: IssuedLeaf, bundle: _Bundle, at: int) -> None:
        own, *travelling = CERTIFICATE.findall(leaf.chain_pem)
        # What lies above a leaf is the same for all leaves of one issuer: its own signature is checked once.
        way = (leaf.root_id, tuple(travelling), bundle)
        if leaf.serial in self._seen and way in self._ways:
            return
        self._seen.add(leaf.serial)
        self._ways.add(way)
        reason = verify_chain(own, travelling, bundle.pems, datetime.fromtimestamp(at, UTC))
        if reason is not None:
            self._fail(f"a leaf of {leaf.service} does not verify under a bundle in use: {reason}")
