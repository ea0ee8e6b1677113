"""Three nodes in one process: real Raft threads and internal channels on loopback, and a clock that the test sets forward.

The product has no clock switch, so what takes days (pruning, renewal) is shown on this composition.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeVar

from caserver.authority.authority import Authority
from caserver.authority.operations import Operations
from caserver.authority.ports import ProviderKind, Providers
from caserver.config.acl_settings import ACLSettings
from caserver.environment import Clock, InlineWorkers, SystemClock, SystemEntropy
from caserver.fields import Secret
from caserver.forwarding.channel import Channel
from caserver.forwarding.leader import Leader, Patience
from caserver.internode.identity import NodeIdentity
from caserver.internode.keyring import Keyring
from caserver.providers.builtin import builtin_kind
from caserver.raft.ports import Leadership
from caserver.raft.thread import RaftSettings, RaftThread
from caserver.requests import Answer, Caller, Request
from caserver.state.commands import Command, Result
from caserver.state.configuration import CAConfiguration, parse_bootstrap
from caserver.state.machine import CAStateMachine
from caserver.state.model import CAState
from tests.testkit.access import OFF, access
from tests.testkit.cluster import HELD_FOR, LOOPBACK, free_ports, give_back

Value = TypeVar("Value")
SECRET = bytes(range(32))
MULTIPLIER = 4  # of the times of Raft: three nodes in one process, and no election because a busy machine is late
WITHIN = 90.0  # seconds of real time for anything that is waited for


class SteppedClock:
    """The machine's clock plus what the test added; whoever sleeps through a step wakes up."""

    def __init__(self) -> None:
        self._system = SystemClock()
        self._added = 0.0
        self._stepped = asyncio.Event()

    def now(self) -> datetime:
        return self._system.now() + timedelta(seconds=self._added)

    def monotonic(self) -> float:
        return self._system.monotonic() + self._added

    async def sleep(self, seconds: float) -> None:
        end = self.monotonic() + seconds
        while (left := end - self.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stepped.wait(), left)
        await asyncio.sleep(0)

    def step(self, by: timedelta) -> None:
        """Set every node's clock forward."""
        self._added += by.total_seconds()
        stepped, self._stepped = self._stepped, asyncio.Event()
        stepped.set()


class SkewedClock:
    """One node's clock: another one, whose wall somebody set wrong."""

    def __init__(self, of: Clock) -> None:
        self._of = of
        self.skew = 0.0  # seconds

    def now(self) -> datetime:
        return self._of.now() + timedelta(seconds=self.skew)

    def monotonic(self) -> float:
        return self._of.monotonic()

    async def sleep(self, seconds: float) -> None:
        await self._of.sleep(seconds)


@dataclass(slots=True)
class Member:
    """One node of the composition."""

    name: str
    raft: RaftThread[Command, CAState, Result]
    leader: Leader
    authority: Authority
    clocks: tuple[SkewedClock, SkewedClock]  # of the authority and of the log
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    running: bool = True

    @property
    def state(self) -> CAState:
        return self.raft.state

    async def execute(self, request: Request, token: Secret | None = None) -> Answer:
        """As a client of this node: forwarded to whoever leads."""
        return await self.leader.execute(Caller(token=token), request)

    async def until(self, select: Callable[[CAState, Leadership], Value], wanted: Callable[[Value], bool]) -> Value:
        """Wait until what ``select`` says of this node is as wanted."""

        async def wait() -> Value:
            value = select(self.raft.state, self.raft.leadership)
            while not wanted(value):
                value = await self.raft.changed(select, value)
            return value

        return await asyncio.wait_for(wait(), WITHIN)

    def set_wall(self, seconds: float) -> None:
        """Set this node's wall clock wrong by so much; zero sets it right."""
        for clock in self.clocks:
            clock.skew = seconds

    async def stop(self) -> None:
        """Leave in order, leadership first."""
        self.running = False
        await self.stack.aclose()


def _cluster_id(state: CAState) -> str | None:
    return state.founding_id


def _leader_of(state: CAState, leadership: Leadership) -> str | None:
    return leadership.leader


class Composition:
    """The nodes and their clock."""

    def __init__(self, clock: SteppedClock, members: Sequence[Member]) -> None:
        self.clock = clock
        self.members = members

    @property
    def running(self) -> list[Member]:
        return [member for member in self.members if member.running]

    async def leader(self) -> Member:
        """The running member that a running member names."""
        names = {member.name: member for member in self.running}
        found = await self.running[0].until(_leader_of, lambda name: name in names)
        assert found is not None
        return names[found]

    async def everywhere(self, holds: Callable[[CAState], bool]) -> None:
        """Wait until ``holds`` is true of every running node's state."""

        def select(state: CAState, leadership: Leadership) -> bool:
            return holds(state)

        for member in self.running:
            await member.until(select, bool)


@asynccontextmanager
async def composed(
    names: Sequence[str] = ("n1", "n2", "n3"),
    *,
    acl: ACLSettings = OFF,
    external: Callable[[Clock], Mapping[str, ProviderKind]] = lambda _: {},
) -> AsyncIterator[Composition]:
    """Build, start and finally stop the nodes; ``external`` makes a node's providers beside the built-in one."""
    clock = SteppedClock()
    ports = free_ports(2 * len(names))
    servers = {name: (LOOPBACK, port) for name, port in zip(names, ports[0::2], strict=True)}
    forwards = {name: (LOOPBACK, port) for name, port in zip(names, ports[1::2], strict=True)}
    members = [await _start(name, clock, servers, forwards, acl, external) for name in names]
    try:
        yield Composition(clock, members)
    finally:
        for member in members:
            if member.running:
                await member.stop()
        give_back(ports)


async def _start(
    name: str,
    clock: SteppedClock,
    servers: dict[str, tuple[str, int]],
    forwards: dict[str, tuple[str, int]],
    acl: ACLSettings,
    external: Callable[[Clock], Mapping[str, ProviderKind]],
) -> Member:
    entropy = SystemEntropy()
    keyring = Keyring([SECRET])
    identity = NodeIdentity(keyring, name, servers)
    settings = RaftSettings(node=name, peers=servers, bind=servers[name], multiplier=MULTIPLIER, data_dir=None)
    own, log_clock = SkewedClock(clock), SkewedClock(SystemClock())
    raft: RaftThread[Command, CAState, Result] = RaftThread(
        settings, CAStateMachine(), keyring=keyring, clock=log_clock, entropy=entropy, cluster_id=_cluster_id
    )
    await raft.start()
    access_control = access(raft, keyring=keyring, clock=own, entropy=entropy, settings=acl)
    authority = Authority(
        raft,
        providers=Providers({"consul": builtin_kind(own, entropy, InlineWorkers()), **external(own)}),
        keyring=keyring,
        clock=own,
        entropy=entropy,
        workers=InlineWorkers(),
        datacenter="dc1",
        bootstrap=default_bootstrap(),
        gate=access_control.gate,
        tokens=access_control.tokens,
    )
    operations = Operations(
        raft,
        raft=raft,
        authority=authority.execute,
        gate=access_control.gate,
        tokens=access_control.tokens,
        clock=own,
    )
    channel = Channel(identity, name, peers=forwards, bind=forwards[name], serve=operations.execute)
    await channel.start()
    leader = Leader(
        raft, execute=operations.execute, hop=channel, clock=own, entropy=entropy, patience=Patience(HELD_FOR)
    )
    member = Member(name, raft, leader, authority, (own, log_clock))
    member.stack.push_async_callback(raft.stop)
    member.stack.push_async_callback(channel.close)
    await member.stack.enter_async_context(_running(authority))
    return member


def default_bootstrap() -> CAConfiguration:
    return parse_bootstrap(None, {})


@asynccontextmanager
async def _running(authority: Authority) -> AsyncIterator[None]:
    task = asyncio.get_running_loop().create_task(authority.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
