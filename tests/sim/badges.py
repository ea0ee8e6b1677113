"""Tokens of services, where access control is on: made, used and taken away while everything else goes wrong.

Whoever was told that a token is gone may rely on it: from then on nobody gets a leaf for it, and never one of another
service than its own, whichever node is asked and whoever leads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from caserver.acl_requests import PutToken, RemoveToken, new_id
from caserver.fields import Secret
from caserver.pki.csr import make_csr
from caserver.pki.spiffe import ServiceID
from caserver.requests import Caller, IssuedLeaf, LeavesSigned, SignLeaves

if TYPE_CHECKING:
    from tests.sim.node import Life
    from tests.sim.workload import Clients


@dataclass
class Badge:
    """One token."""

    accessor: str
    secret: str
    service: str
    known: bool = False  # somebody was told that it is made
    gone_at: int | None = None  # how many restores there had been when somebody was told that it is gone


@dataclass
class Badges:
    """What clients do with tokens."""

    clients: Clients
    made: list[Badge] = field(default_factory=list)

    async def make_badge(self, life: Life) -> None:
        """A token for the leaves of one service."""
        clients = self.clients
        accessor, secret = (new_id(clients.entropy.bytes(16)) for _ in range(2))
        badge = Badge(accessor, secret, clients.service())
        self.made.append(badge)
        body = json.dumps({"ServiceIdentities": [{"ServiceName": badge.service}]})
        request = PutToken(accessor_id=accessor, secret=secret, create=True, body=body)
        await clients.ask(life, lambda: life.leader.execute(life.caller(clients.request_id()), request))
        badge.known = True

    async def drop_badge(self, life: Life) -> None:
        """It is taken away."""
        if not self.made:
            return
        badge = self.clients.chance.choice(self.made)
        known, restores = badge.known, self._restores
        caller = life.caller(self.clients.request_id())
        await self.clients.ask(life, lambda: life.leader.execute(caller, RemoveToken(badge.accessor)))
        if known and restores == self._restores:
            badge.gone_at = restores

    async def use_badge(self, life: Life) -> None:
        """A leaf for whoever shows it, of its own service or of another one."""
        trust_domain = life.state.trust_domain
        if trust_domain is None or not self.made:
            return
        badge, service = self.clients.chance.choice(self.made), self.clients.service()
        gone = badge.gone_at is not None and badge.gone_at == self._restores
        csr = make_csr(self.clients.entropy.private_key("ec", 256), ServiceID(trust_domain, "dc1", service).uri)
        caller = Caller(token=Secret(badge.secret), source="sim")
        answer = await self.clients.ask(life, lambda: life.leader.execute(caller, SignLeaves((csr,))))
        if not isinstance(answer, LeavesSigned) or not isinstance(answer.results[0], IssuedLeaf):
            return
        witness = self.clients.setting.witness
        if service != badge.service:
            witness.fail(f"a token of {badge.service} got a leaf of {service} at {life.name}")
        if gone and badge.gone_at == self._restores:
            witness.fail(f"a token of {service} that was taken away before got a leaf at {life.name}")

    @property
    def _restores(self) -> int:
        return len(self.clients.setting.witness.restored)
