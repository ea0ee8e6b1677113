"""Links between simulated processes: like TCP where the engine may rely on it, worse where it must not.

A link carries one direction, in order; it is dialled, both ends say hello, and it breaks by a reset, by the death of an
end, or when nothing gets through for as long as TCP bears it. A cut is one way: what is sent into it waits and arrives if
the cut ends in time. Beyond what TCP does, messages may be lost, come twice, or arrive from a broken link after newer ones
of the next; only what a process says of itself and pieces of snapshots never do (``Streams`` drops an old link's rest).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from zlib import crc32

from caserver.errors import CommitUnknown, NotLeader
from caserver.internode.membership import Hello, Membership
from caserver.raft import messages
from caserver.raft.ports import Message
from tests.sim.loop import Process, VirtualLoop

BEARS_SECONDS = 3.0  # how long a link lives while nothing gets through (TCP_USER_TIMEOUT of the real streams)
DIAL_SECONDS = 2.0
LATE_SECONDS = 3.0  # how far behind a repeated message, or one of a broken link, may come


class Endpoint(Protocol):
    """A process as the network sees it."""

    @property
    def process(self) -> Process: ...
    @property
    def network(self) -> SimNetwork: ...
    async def perform(self, peer: str, frame: bytes) -> bytes: ...


@dataclass(eq=False)
class Link:
    """One direction between two processes."""

    sender: SimNetwork
    receiver: SimNetwork
    up: bool = True
    leaks: bool = False  # broken, and what was under way may still arrive
    last_at: float = 0.0
    silent_since: float | None = None
    waiting: deque[bytes] = field(default_factory=deque)  # sent into a cut

    @property
    def pair(self) -> tuple[str, str]:
        return self.sender.node, self.receiver.node


class Wires:
    """All that lies between the processes."""

    def __init__(self, loop: VirtualLoop, chance: random.Random, *, note: Callable[[str], None]) -> None:
        self.loop, self.chance, self.note = loop, chance, note
        self.endpoints: dict[str, Endpoint] = {}  # running processes by node
        self.cuts: set[tuple[str, str]] = set()  # from, to
        self.lost = 0.0  # share of messages
        self.doubled = 0.0
        self.late = LATE_SECONDS  # how far behind at most the second one comes
        self.observers: list[Callable[[str, str, Message], None]] = []

    def is_open(self, a: str, b: str) -> bool:
        """Whether what ``a`` sends arrives at ``b``."""
        return (a, b) not in self.cuts

    def open_both(self, a: str, b: str) -> bool:
        """Whether ``a`` and ``b`` can begin to talk."""
        return self.is_open(a, b) and self.is_open(b, a)

    def latency(self) -> float:
        """Seconds for one way."""
        if self.chance.random() < 0.01:
            return self.chance.uniform(0.002, 0.2)
        return self.chance.uniform(0.0002, 0.002)

    def cut(self, a: str, b: str) -> None:
        """Nothing from ``a`` reaches ``b`` any more."""
        self.cuts.add((a, b))

    def mend(self, a: str, b: str) -> None:
        """It does again, and what waited arrives."""
        self.cuts.discard((a, b))
        for endpoint in tuple(self.endpoints.values()):
            for link in tuple(endpoint.network.outbound.values()):
                if link.pair == (a, b):
                    while link.waiting:
                        self.carry(link, link.waiting.popleft())
                if link.pair in {(a, b), (b, a)} and self.open_both(a, b):
                    link.silent_since = None

    def carry(self, link: Link, payload: bytes, *, later: float = 0.0) -> None:
        """Bring a message to the other end."""
        at = max(self.loop.time() + self.latency(), link.last_at) if not later else self.loop.time() + later
        if not later:
            link.last_at = at
        receiver = link.receiver
        self.loop.call_at(
            at, partial(receiver.deliver, link, payload, late=not later), context=receiver.process.context
        )

    def break_link(self, link: Link, *, leaks: bool) -> None:
        """End a link; its sender is told."""
        if not link.up:
            return
        link.up, link.leaks = False, leaks
        link.receiver.forget(link)
        self.loop.call_later(self.latency(), link.sender.went_down, link, context=link.sender.process.context)

    def breaks_in(self, link: Link, seconds: float) -> None:
        """Let a link end after a while if it is still silent then."""
        since = link.silent_since

        def look() -> None:
            if link.silent_since is not None and link.silent_since == since:
                self.break_link(link, leaks=self.chance.random() < 0.3)

        self.loop.call_later(seconds, look, context=link.sender.process.context)


def _is_fragile(message: Message) -> bool:
    """What only the order of a real stream keeps whole."""
    return message["type"] == "standing" or "serialized" in message


class SimNetwork:
    """Satisfies ``raft.ports.Network`` for one process."""

    def __init__(
        self,
        node: str,
        process: Process,
        wires: Wires,
        *,
        peers: list[str],
        membership: Membership,
        receive: Callable[[str, Message], None],
        on_link: Callable[[str, bool], None],
    ) -> None:
        self.node, self.process, self._wires, self._peers = node, process, wires, peers
        self.membership, self._receive, self._on_link = membership, receive, on_link
        self.outbound: dict[str, Link] = {}
        self.inbound: dict[str, Link] = {}
        self._attempts: dict[str, int] = {}
        self._closed = False

    def start(self) -> None:
        """Begin to dial."""
        for peer in self._peers:
            self._dial_in(peer, self._wires.chance.uniform(0.0, 0.02))

    # -- Network

    def send(self, peer: str, message: Message) -> bool:
        link = self.outbound.get(peer)
        if link is None or self._closed or not self.process.alive:
            return False
        payload = messages.frame(message)[messages.LENGTH_BYTES :]
        wires = self._wires
        for observer in wires.observers:
            observer(self.node, peer, message)
        if not wires.open_both(self.node, peer) and link.silent_since is None:
            link.silent_since = wires.loop.time()
            wires.breaks_in(link, BEARS_SECONDS)
        if not wires.is_open(self.node, peer):
            link.waiting.append(payload)
            return True
        self._put(link, payload, fragile=_is_fragile(message))
        return True

    def _put(self, link: Link, payload: bytes, *, fragile: bool) -> None:
        wires, chance = self._wires, self._wires.chance
        if not fragile and chance.random() < wires.lost:
            wires.note(f"lost {self.node}>{link.receiver.node} {crc32(payload):08x}")
            return
        wires.carry(link, payload)
        if not fragile and chance.random() < wires.doubled:
            wires.carry(link, payload, later=chance.uniform(0.0, wires.late))

    def connected(self, peer: str) -> bool:
        return peer in self.outbound

    def close(self) -> None:
        self._closed = True
        for link in (*self.outbound.values(), *self.inbound.values()):
            self._wires.break_link(link, leaks=False)
        self.outbound.clear()

    def recheck(self) -> None:
        """Drop links whose other end no longer belongs here."""
        for peer, link in tuple(self.outbound.items()):
            if self.membership.check(link.receiver.membership.hello(peer, to=self.node)) is not None:
                self._wires.break_link(link, leaks=False)

    # -- dialling

    def _dial_in(self, peer: str, seconds: float) -> None:
        self._attempts[peer] = attempt = self._attempts.get(peer, 0) + 1
        self._wires.loop.call_later(seconds, self._dial, peer, attempt, context=self.process.context)

    def _dial(self, peer: str, attempt: int) -> None:
        if self._closed or not self.process.alive or peer in self.outbound or self._attempts[peer] != attempt:
            return
        wires = self._wires
        there = wires.endpoints.get(peer)
        if there is None or not wires.open_both(self.node, peer):
            self._dial_in(peer, wires.chance.uniform(0.05, 0.5))
            return
        self._attempts[peer] = attempt = attempt + 1
        hello = self.membership.hello(self.node, to=peer)
        wires.loop.call_later(
            wires.latency(), there.network.welcome, self, hello, attempt, context=there.process.context
        )
        wires.loop.call_later(DIAL_SECONDS, self._give_up, peer, attempt, context=self.process.context)

    def _give_up(self, peer: str, attempt: int) -> None:
        if self._attempts[peer] == attempt and peer not in self.outbound:
            self._dial_in(peer, 0.05)

    def welcome(self, dialler: SimNetwork, hello: Hello, attempt: int) -> None:
        """Somebody dialled and said hello."""
        wires = self._wires
        if self._closed or not self.process.alive or not wires.open_both(self.node, dialler.node):
            return
        reason = self.membership.check(hello)
        answer = self.membership.hello(self.node, to=dialler.node)
        link = Link(dialler, self)
        if reason is None and not self._meets(hello):
            return
        if reason is None:
            older = self.inbound.get(dialler.node)
            if older is not None:
                wires.break_link(older, leaks=wires.chance.random() < 0.5)
            self.inbound[dialler.node] = link
        wires.loop.call_later(
            wires.latency(), dialler.opened, link, answer, reason, attempt, context=dialler.process.context
        )

    def _meets(self, hello: Hello) -> bool:
        """Take note of who is there; False if that cannot be stored: then the process ends."""
        try:
            self.membership.meet(hello)
        except OSError:
            return False
        return True

    def opened(self, link: Link, hello: Hello, reason: str | None, attempt: int) -> None:
        """The other end answered."""
        peer = link.receiver.node
        if self._attempts[peer] != attempt or self._closed or not self.process.alive or peer in self.outbound:
            self._wires.break_link(link, leaks=False)
            return
        refused = reason or self.membership.check(hello)
        if refused is not None or not link.up:
            self._wires.note(f"refused {self.node}>{peer} {refused}")
            self._wires.break_link(link, leaks=False)
            self._dial_in(peer, 2.0 if refused else 0.05)
            return
        if not self._meets(hello):
            self._wires.break_link(link, leaks=False)
            return
        self.outbound[peer] = link
        self._wires.note(f"link {self.node}>{peer}")
        self._on_link(peer, True)

    # -- links

    def deliver(self, link: Link, payload: bytes, *, late: bool) -> None:
        """A message arrives; ``late`` if it has not been held up yet."""
        if not self.process.alive or self._closed:
            return
        message = messages.decode(payload)
        if not link.up and not self._still_takes(link, message):
            return
        if not link.up and late:
            self._wires.carry(link, payload, later=self._wires.chance.uniform(0.0, LATE_SECONDS))
            return
        self._wires.note(f"{link.sender.node}>{self.node} {message['type']} {crc32(payload):08x}")
        self._receive(link.sender.node, message)

    def _still_takes(self, link: Link, message: Message) -> bool:
        """Whether a message of a broken link is heard: of a dead sender, until it is there again; else now and then."""
        if not link.leaks:
            return False
        if not link.sender.process.alive:
            return link.sender.node not in self.inbound
        link.leaks = self._wires.chance.random() < 0.8
        return not _is_fragile(message)

    def forget(self, link: Link) -> None:
        """An inbound link ended."""
        if self.inbound.get(link.sender.node) is link:
            del self.inbound[link.sender.node]

    def went_down(self, link: Link) -> None:
        """An outbound link ended."""
        peer = link.receiver.node
        if self.outbound.get(peer) is not link or not self.process.alive:
            return
        del self.outbound[peer]
        self._wires.note(f"unlink {self.node}>{peer}")
        self._on_link(peer, False)
        self._dial_in(peer, self._wires.chance.uniform(0.02, 0.1))

    def die(self, *, silently: bool) -> None:
        """The process is gone; with its machine (``silently``) nobody is told."""
        self._closed = True
        wires = self._wires
        for link in self.outbound.values():
            link.up, link.leaks = False, True  # what it sent is on its way
            link.receiver.forget(link)
        for link in tuple(self.inbound.values()):
            if silently or not wires.open_both(self.node, link.sender.node):
                link.silent_since = wires.loop.time()
                wires.breaks_in(link, BEARS_SECONDS)
            else:
                wires.break_link(link, leaks=False)
        self.outbound.clear()


class SimHop:
    """Satisfies ``forwarding.leader.Hop``: the same frames as the real channel, on these wires."""

    def __init__(self, node: str, process: Process, wires: Wires) -> None:
        self._node, self._process, self._wires = node, process, wires

    async def send(self, node: str, frame: bytes, deadline: float) -> bytes:
        wires, loop = self._wires, self._wires.loop
        there = wires.endpoints.get(node)
        if not self._process.alive or there is None:
            await self._sleep(wires.latency())
            raise NotLeader(f"{node} cannot be reached")
        if not wires.open_both(self._node, node) and wires.chance.random() < 0.5:
            await self._sleep(DIAL_SECONDS)
            raise NotLeader(f"{node} cannot be reached")
        reply: Any = loop.create_future()
        if wires.is_open(self._node, node):
            loop.call_later(wires.latency(), self._arrive, there, node, frame, reply, context=there.process.context)
        timer = loop.call_later(deadline, _settle, reply, None)
        try:
            answer: bytes | None = await reply
        finally:
            timer.cancel()
        if answer is None:
            raise CommitUnknown(f"{node} did not answer")
        return answer

    async def _sleep(self, seconds: float) -> None:
        reply: Any = self._wires.loop.create_future()
        self._wires.loop.call_later(seconds, _settle, reply, None)
        await reply

    def _arrive(self, there: Endpoint, node: str, frame: bytes, reply: Any) -> None:
        task = self._wires.loop.create_task(there.perform(self._node, frame))
        task.add_done_callback(lambda done: self._answer(done, there, node, reply))

    def _answer(self, done: Any, there: Endpoint, node: str, reply: Any) -> None:
        wires = self._wires
        lost = done.cancelled() or done.exception() is not None or not there.process.alive
        if lost and not there.process.alive and wires.open_both(self._node, node):
            wires.loop.call_later(wires.latency(), _settle, reply, None, context=self._process.context)
        elif not lost and wires.is_open(node, self._node):
            wires.loop.call_later(wires.latency(), _settle, reply, done.result(), context=self._process.context)


def _settle(reply: Any, value: bytes | None) -> None:
    if not reply.done():
        reply.set_result(value)


def by_name(endpoints: Mapping[str, Endpoint]) -> list[Endpoint]:
    """In a fixed order."""
    return [endpoints[name] for name in sorted(endpoints)]
