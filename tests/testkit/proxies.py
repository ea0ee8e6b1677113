"""Proxies of a mesh under load: each asks its node for leaves without pause, and they shake hands all with all."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from caserver.environment import Workers
from caserver.leaf_cache import LeafCache
from caserver.requests import Caller, IssuedLeaf, LeavesSigned, SignLeaves
from tests.testkit.composition import WITHIN, Member
from tests.testkit.handshake import Proxy, shake
from tests.testkit.keys import key_pem
from tests.testkit.nodes import csr_for

KEY = "ec-256-b"  # of every proxy that signs its own requests
PAUSE = 0.1  # seconds between two requests of one proxy: they are many, and the machine is to do other things too


class Habit(Enum):
    """What of a new CA a proxy takes at once; the other waits until it is told to catch up."""

    LEAF_FIRST = auto()
    ROOTS_FIRST = auto()
    BOTH = auto()


@dataclass(slots=True)
class Sidecar:
    """One proxy: its service, the node that it asks, and what it holds."""

    service: str
    member: Member
    habit: Habit
    cache: LeafCache | None  # where its node makes its key; without one it sends its own request
    spare: bool  # whether it trusts the roots since it last caught up alone, not all that are listed
    held: Proxy = field(default_factory=lambda: Proxy("", "", ""))
    uri: str = ""
    root_id: str = ""  # above the leaf that it holds
    trusted: tuple[str, ...] = ()  # ids of the roots in its bundle
    asked: int = 0  # requests answered
    latest: tuple[str, str, str, str] = ("", "", "", "")  # chain, key, uri and root of the newest leaf

    async def ask(self) -> None:
        """One request, and what the habit makes of the answer."""
        self.latest = await self._leaf()
        self.asked += 1
        if self.habit is not Habit.ROOTS_FIRST:
            self._take_leaf()
        if self.habit is not Habit.LEAF_FIRST:
            self._take_roots()

    def catch_up(self) -> None:
        """Take whatever it put off, and forget what it needs no more."""
        self._take_leaf()
        if self.spare:
            self.trusted = ()
        self._take_roots()

    async def _leaf(self) -> tuple[str, str, str, str]:
        if self.cache is not None:
            cached = await self.cache.leaf(Caller(), self.service, fresh=True)
            leaf, key = cached.leaf, cached.key_pem
        else:
            domain = self.member.state.trust_domain
            assert domain is not None
            csr, key = csr_for(self.service, key=KEY, trust_domain=domain), key_pem(KEY)
            answer = await self.member.execute(SignLeaves((csr,)))
            assert isinstance(answer, LeavesSigned)
            (result,) = answer.results
            assert isinstance(result, IssuedLeaf), result
            leaf = result
        return leaf.chain_pem, key, leaf.service_uri, leaf.root_id

    def _take_leaf(self) -> None:
        chain, key, self.uri, self.root_id = self.latest
        self.held = Proxy(chain, key, self.held.bundle)

    def _take_roots(self) -> None:
        state = self.member.state
        roots, active = {str(root.id): root.pem for root in state.roots}, state.active_root
        assert active is not None
        if not self.spare:
            self.trusted = tuple(roots)
        elif active.id not in self.trusted[-1:]:
            self.trusted = (*self.trusted, active.id)
        self.held = Proxy(self.held.chain, self.held.key, "".join(roots[root_id] for root_id in self.trusted))


@dataclass(slots=True)
class Mesh:
    """The proxies, and what went well and ill among them."""

    sidecars: Sequence[Sidecar]
    workers: Workers
    step: str = "at first"
    rounds: int = 0
    handshakes: Counter[str] = field(default_factory=Counter)  # by step
    mixed: Counter[str] = field(default_factory=Counter)  # those in which a leaf's root was not in the other's bundle
    failures: list[str] = field(default_factory=list)
    _moved: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def requests(self) -> int:
        return sum(each.asked for each in self.sidecars)

    async def served(self) -> None:
        """Until each proxy has had a request answered that it began from now on, and all have shaken hands since."""
        asked = [each.asked + 2 for each in self.sidecars]  # the first may have been under way
        await self._until(
            lambda: all(each.asked >= least for each, least in zip(self.sidecars, asked, strict=True)),
            "an answer for every proxy",
        )
        rounds = self.rounds + 2
        await self._until(lambda: self.rounds >= rounds, "handshakes of all with all")

    def catch_up(self) -> None:
        """Let every proxy take what is new, as its node has it now."""
        for each in self.sidecars:
            each.catch_up()

    async def _until(self, holds: Callable[[], bool], what: str) -> None:
        async def wait() -> None:
            while not (holds() or self.failures):
                self._moved.clear()
                await self._moved.wait()

        try:
            await asyncio.wait_for(wait(), WITHIN)
        except TimeoutError:
            raise AssertionError(f"{self.step}: waited {WITHIN:g} s for {what}") from None
        assert not self.failures

    async def fetch(self, sidecar: Sidecar) -> None:
        """Ask without end."""
        while True:
            await self._noted(f"{sidecar.service} asks {sidecar.member.name}", sidecar.ask())
            await asyncio.sleep(PAUSE)

    async def shake_hands(self) -> None:
        """Mutual TLS of all with all, over and over."""
        while True:
            step, held = self.step, [replace(each) for each in self.sidecars]
            await self._noted("handshakes", self.workers.run(self._round, step, held))
            self.rounds += 1
            self._moved.set()

    def _round(self, step: str, held: Sequence[Sidecar]) -> None:
        for pair_of in itertools.combinations_with_replacement(held, 2):
            client, server = pair_of if self.rounds % 2 else pair_of[::-1]  # mutual: both are judged, whoever calls
            pair = f"{step}: {client.service} to {server.service}"
            try:
                seen = shake(client.held, server.held)
            except ssl.SSLError as exc:
                self.failures.append(f"{pair}: {exc}")
                continue
            if seen != ([server.uri], [client.uri]):
                self.failures.append(f"{pair}: they saw {seen}")
            self.handshakes[step] += 1
            self.mixed[step] += client.root_id not in server.trusted or server.root_id not in client.trusted

    async def _noted(self, what: str, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as exc:  # noqa: BLE001 - whatever a client would see counts as a failure
            self.failures.append(f"{self.step}: {what}: {exc!r}")
            await asyncio.sleep(PAUSE)
        self._moved.set()


@asynccontextmanager
async def meshed(sidecars: Sequence[Sidecar], workers: Workers) -> AsyncIterator[Mesh]:
    """The proxies at work, each with a first leaf and bundle."""
    mesh = Mesh(sidecars, workers)
    for each in sidecars:
        await each.ask()
        each.catch_up()
    tasks = [asyncio.ensure_future(mesh.fetch(each)) for each in sidecars]
    tasks.append(asyncio.ensure_future(mesh.shake_hands()))
    try:
        yield mesh
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
