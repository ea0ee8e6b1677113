"""The external provider's server as a network shows it: what it did may be done although nobody heard of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TypeVar

from caserver.authority.ports import (
    Backend,
    Inspection,
    Prepared,
    Provider,
    ProviderKind,
    SignedLeaf,
    SigningOrder,
    Tended,
)
from caserver.errors import CaserverError, ProviderUnavailable
from caserver.fields import Secret
from caserver.state.configuration import CAConfiguration
from caserver.state.model import CARoot
from tests.testkit.external import FakeVault

T = TypeVar("T")
STUCK_SECONDS = 50.0  # that an answer may be held up: longer than any caller waits


@dataclass
class SimServer(FakeVault):
    """The server and the way to it."""

    chance: random.Random = field(default_factory=random.Random)
    lossy: float = 0.0  # share of answers that get lost after the deed
    stuck: float = 0.0  # share of answers that come late, or too late
    note: Callable[[str], None] = lambda _: None

    def kind(self) -> ProviderKind:
        inner = super().kind()

        def build(
            configuration: CAConfiguration, *, trust_domain: str, root: CARoot | None, root_key: Secret | None
        ) -> Provider:
            built = inner.build(configuration, trust_domain=trust_domain, root=root, root_key=root_key)
            return _Distant(built, self)

        return replace(inner, build=build)

    def heal(self) -> None:
        """It is up, and every answer is heard."""
        self.down, self.lossy, self.stuck = None, 0.0, 0.0

    async def answers(self, what: str) -> None:
        """Something was done, and the answer is on its way."""
        if self.chance.random() < self.stuck:
            self.note(f"server {what} is slow")
            await asyncio.sleep(self.chance.uniform(0.0, STUCK_SECONDS))
        if self.chance.random() < self.lossy:
            self.note(f"server {what} is not heard of")
            raise ProviderUnavailable("the answer of the server was lost")


class _Distant:
    """A provider whose answers have a way to go."""

    def __init__(self, inner: Provider, server: SimServer) -> None:
        self._inner, self._server = inner, server

    async def inspect(self) -> Inspection:
        return await self._heard("inspect", self._inner.inspect())

    async def prepare(self, *, now: datetime, epoch: int) -> Prepared:
        return await self._heard("prepare", self._inner.prepare(now=now, epoch=epoch))

    async def sign_leaves(self, orders: Sequence[SigningOrder]) -> Sequence[SignedLeaf | CaserverError]:
        return await self._heard("sign", self._inner.sign_leaves(orders))

    async def cross_sign(
        self, certificate_pem: str, *, csr_pem: str | None, serial: int, not_before: datetime, not_after: datetime
    ) -> str:
        signed = self._inner.cross_sign(
            certificate_pem, csr_pem=csr_pem, serial=serial, not_before=not_before, not_after=not_after
        )
        return await self._heard("cross-sign", signed)

    async def retire(self, *, epochs: tuple[int, ...], keep: Backend | None) -> None:
        await self._heard("retire", self._inner.retire(epochs=epochs, keep=keep))

    async def tend(self, now: datetime) -> Tended:
        return await self._heard("tend", self._inner.tend(now))

    def close(self) -> None:
        self._inner.close()

    async def _heard(self, what: str, work: Awaitable[T]) -> T:
        done = await work
        await self._server.answers(what)
        return done
