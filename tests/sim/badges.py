"""Tokens of services, where access control is on: made, used and taken away while everything else goes wrong.

Whoever was told that a token is gone may rely on it: from then on nobody gets a leaf for it, and never one of another
service than its own, whichever node is asked and whoever leads.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from caserver.acl_requests import ACLRequest, CloneToken, PutPolicy, PutToken, RemovePolicy, RemoveToken, new_id
from caserver.fields import Secret
from caserver.requests import Caller, IssuedLeaf, LeavesSigned, SignLeaves

if TYPE_CHECKING:
    from tests.sim.node import Life
    from tests.sim.workload import Clients

LATEST = 0.5  # share of tokens taken away that were just made
GONE = 0.3  # share of tokens shown although they were taken away
OWN = 0.8  # share of tokens that are shown for the service that they are for


@dataclass
class Right:
    """What lets somebody have leaves of one service: a token, or a policy that tokens stand for."""

    id: str
    service: str
    known: bool = False  # somebody was told that it is made
    gone_at: int | None = None  # how many restores there had been when somebody was told that it is gone


@dataclass
class Badge:
    """One token."""

    secret: str
    right: Right
    policy: Right | None = None

    def is_gone(self, restores: int) -> bool:
        """Whether somebody was told so, and no restore brought it back."""
        return any(each is not None and each.gone_at == restores for each in (self.right, self.policy))


@dataclass
class Badges:
    """What clients do with tokens."""

    clients: Clients
    made: list[Badge] = field(default_factory=list)
    policies: list[Right] = field(default_factory=list)

    @property
    def kinds(self) -> tuple[tuple[Callable[[Life], Awaitable[None]], int], ...]:
        """What may be done, and how often."""
        return (
            (self.make_badge, 6),
            (self.make_policy, 3),
            (self.use_badge, 20),
            (self.edit_badge, 3),
            (self.drop_badge, 4),
            (self.drop_policy, 1),
        )

    async def make_badge(self, life: Life) -> None:
        """A token for the leaves of one service: by the service's name, by a policy, or like another token."""
        clients = self.clients
        accessor, secret = (new_id(clients.entropy.bytes(16)) for _ in range(2))
        kind = clients.chance.choice(("service", "policy", "clone"))
        if kind == "clone" and self.made:
            model = clients.chance.choice(self.made)
            badge = Badge(secret, Right(accessor, model.right.service), model.policy)
            request: ACLRequest = CloneToken(model.right.id, accessor, secret, "")
        elif kind == "policy" and self.policies:
            policy = clients.chance.choice(self.policies)
            badge = Badge(secret, Right(accessor, policy.service), policy)
            request = PutToken(accessor, secret, create=True, body=json.dumps({"Policies": [{"ID": policy.id}]}))
        else:
            badge = Badge(secret, Right(accessor, clients.service()))
            body = json.dumps({"ServiceIdentities": [{"ServiceName": badge.right.service}]})
            request = PutToken(accessor, secret, create=True, body=body)
        self.made.append(badge)
        await self._write(life, request)
        badge.right.known = True

    async def make_policy(self, life: Life) -> None:
        """A policy that lets tokens have the leaves of one service."""
        policy = Right(new_id(self.clients.entropy.bytes(16)), self.clients.service())
        self.policies.append(policy)
        body = json.dumps({"Name": policy.id, "Rules": f'service "{policy.service}" {{ policy = "write" }}'})
        await self._write(life, PutPolicy(policy.id, create=True, body=body))
        policy.known = True

    async def edit_badge(self, life: Life) -> None:
        """Something about it is changed that does not matter."""
        if not self.made:
            return
        badge = self.clients.chance.choice(self.made)
        standing = (
            {"ServiceIdentities": [{"ServiceName": badge.right.service}]}
            if badge.policy is None
            else {"Policies": [{"ID": badge.policy.id}]}
        )
        description = self.clients.request_id()
        body = json.dumps({"Description": description, **standing})
        await self._write(life, PutToken(badge.right.id, badge.secret, create=False, body=body))

    async def drop_badge(self, life: Life) -> None:
        """It is taken away."""
        if self.made:
            # Often the latest: not every node may know it yet, nor who leads.
            late = self.clients.chance.random() < LATEST
            right = (self.made[-1] if late else self.clients.chance.choice(self.made)).right
            await self._drop(life, right, RemoveToken(right.id))

    async def drop_policy(self, life: Life) -> None:
        """It is taken away from all who stood under it."""
        if self.policies:
            right = self.clients.chance.choice(self.policies)
            await self._drop(life, right, RemovePolicy(right.id))

    async def _drop(self, life: Life, right: Right, request: ACLRequest) -> None:
        known, restores = right.known, self._restores
        await self._write(life, request)
        if known and restores == self._restores:
            right.gone_at = restores

    async def _write(self, life: Life, request: ACLRequest) -> None:
        caller = life.caller(self.clients.request_id())
        await self.clients.ask(life, lambda: life.leader.execute(caller, request))

    async def use_badge(self, life: Life) -> None:
        """A leaf for whoever shows it, of its own service or of another one."""
        trust_domain = life.state.trust_domain
        if trust_domain is None or not self.made:
            return
        restores = self._restores
        gone_ones = [each for each in self.made if each.is_gone(restores)]
        badge = self.clients.chance.choice(
            gone_ones if gone_ones and self.clients.chance.random() < GONE else self.made
        )
        service = badge.right.service if self.clients.chance.random() < OWN else self.clients.service()
        gone = badge.is_gone(restores)
        csr = self.clients.csr(trust_domain, service)
        caller = Caller(token=Secret(badge.secret), source="sim")
        answer = await self.clients.ask(life, lambda: life.leader.execute(caller, SignLeaves((csr,))))
        if not isinstance(answer, LeavesSigned) or not isinstance(answer.results[0], IssuedLeaf):
            return
        witness = self.clients.setting.witness
        witness.count("leaves received by token")
        if service != badge.right.service:
            witness.fail(f"a token of {badge.right.service} got a leaf of {service} at {life.name}")
        if gone and restores == self._restores:
            witness.fail(f"a token of {service} that was taken away before got a leaf at {life.name}")

    @property
    def _restores(self) -> int:
        return len(self.clients.setting.witness.restored)
