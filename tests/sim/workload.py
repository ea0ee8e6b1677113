"""What clients do to a simulated cluster, through any node, and what they may conclude from the answers."""

from __future__ import annotations

import asyncio
import io
import json
import random
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any

from caserver.errors import CaserverError, CommitUnknown, Conflict, InvalidConfig, NotLeader, ProviderUnavailable
from caserver.leaf_cache import CachedLeaf
from caserver.pki.csr import make_csr
from caserver.pki.spiffe import ServiceID
from caserver.raft.ports import Leadership
from caserver.requests import (
    ChangeConfiguration,
    ConfigurationChanged,
    ReadAt,
    ReadIndex,
    ReadServers,
    SignLeaves,
    TransferLeadership,
)
from caserver.state.model import CAState, Index
from tests.sim.badges import Badges
from tests.sim.mishaps import is_foreseen, named, traced
from tests.sim.node import DATACENTER, Life, Setting
from tests.testkit.fakes import SeededEntropy

RESTORES = 0.06  # of what clients ask for, where there are restores at all
KEYS = 4  # that clients have for one service
CONDITIONAL = 0.3  # share of changes that are to replace a certain configuration
ALONE = 0.1  # of changes, which are to come into force without cross-signing
PATIENCE = 25.0  # seconds after which a client gives up
SERVICES = ("web", "api", "db", "mail", "cache")
_SERVER = {"Address": "https://vault:8200", "Token": "s.t"}
CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {"LeafCertTTL": "1h"},
    {"LeafCertTTL": "2h"},
    {"LeafCertTTL": "1h", "PrivateKeyType": "ec", "PrivateKeyBits": 384},
    {"LeafCertTTL": "1h", "PrivateKeyType": "ec", "PrivateKeyBits": 256},
    {**_SERVER, "LeafCertTTL": "1h", "RootPKIPath": "root-a", "IntermediatePKIPath": "inter-a"},
    {**_SERVER, "LeafCertTTL": "1h", "RootPKIPath": "root-b", "IntermediatePKIPath": "inter-a"},
    {**_SERVER, "LeafCertTTL": "1h", "RootPKIPath": "root-b", "IntermediatePKIPath": "inter-b"},
)
OUTAGES = (0.5, 3.0, 40.0)  # seconds that the external server may be down at most


class GaveUp(Exception):
    """The client waited long enough, or its node died: it knows nothing."""


def index_of(state: CAState, _leadership: Leadership) -> Index:
    """Selector: the index."""
    return state.index


@dataclass
class Change:
    """A change of the configuration that some client wanted."""

    request_id: str
    clocks: int  # how often clocks were set before it: a request id is remembered for ten minutes of the wall clock
    body: str
    cas: int | None  # beside the body
    expected: int | None  # index of the configuration that it is to replace, whichever way that was said
    under_way: int = 0  # tries without an answer
    unknown: bool = False
    straddles: bool = False  # a try was still held when clocks were set, maybe by more than ids are remembered
    applied_at: int | None = None  # as some client was told
    told_unchanged: bool = False


@dataclass
class Clients:
    """All clients together."""

    setting: Setting
    chance: random.Random
    entropy: SeededEntropy
    clocks_set: Callable[[], int]
    changes: list[Change] = field(default_factory=list)
    csrs: dict[tuple[str, str, int], str] = field(default_factory=dict)  # by trust domain, service and number
    restores: random.Random | None = None  # decides when somebody saves or restores the whole state; None: nobody does
    saved: bytes | None = None
    running: int = 0
    guarded: bool = False  # whether tokens are asked for
    outside: Context = field(default_factory=copy_context)  # of no process

    def __post_init__(self) -> None:
        self.badges = Badges(self)

    def request_id(self) -> str:
        """Another one."""
        return self.entropy.bytes(16).hex()

    def service(self) -> str:
        """Any."""
        return self.chance.choice(SERVICES)

    def csr(self, trust_domain: str, service: str) -> str:
        """A request for a leaf, with one of a few keys: clients keep theirs, and keys take long to make."""
        place = trust_domain, service, self.chance.randrange(KEYS)
        known = self.csrs.get(place)
        if known is None:
            key = self.entropy.private_key("ec", 256)
            known = self.csrs[place] = make_csr(key, ServiceID(trust_domain, DATACENTER, service).uri)
        return known

    def act(self, life: Life) -> None:
        """One client asks ``life`` for something."""
        if self.restores is not None and self.restores.random() < RESTORES:
            saves = self.saved is None or self.restores.random() < 0.5
            self.setting.note(f"client {'save' if saves else 'restore'} at {life.name}")
            self.setting.loop.create_task(self._one(self.save if saves else self.restore, life))
            return
        kinds: tuple[tuple[Callable[[Life], Awaitable[None]], int], ...] = (
            (self.leaf, 25),
            (self.sign, 25),
            (self.follow, 3),
            (self.read, 30),
            (self.servers, 2),
            (self.transfer, 2),
            (self.barrier, 20),
            (self.change, 3),
            (self.repeat, 2),
            (self.outage, 1),
            (self.doubt, 1),
            (self.lose_signer, 1),
            (self.other_root, 1),
            *((kind, weight if self.guarded else 0) for kind, weight in self.badges.kinds),
        )
        (kind,) = self.chance.choices([each for each, _ in kinds], weights=[weight for _, weight in kinds])
        self.setting.note(f"client {kind.__name__} at {life.name}")
        self.setting.loop.create_task(self._one(kind, life))

    async def _one(self, kind: Callable[[Life], Awaitable[None]], life: Life) -> None:
        self.running += 1
        try:
            await kind(life)
            self.setting.witness.count(f"{kind.__name__} answered")
        except (CaserverError, GaveUp) as exc:
            self.setting.note(f"client {kind.__name__} got {type(exc).__name__}")
        finally:
            self.running -= 1

    async def ask(self, life: Life, work: Callable[[], Awaitable[Any]]) -> Any:
        """Let the process do something and wait for its answer as a client does, outside of the process."""
        loop = self.setting.loop
        reply: asyncio.Future[Any] = loop.create_future()
        life.replies[reply] = None

        async def serve() -> None:
            try:
                result: Any = await work()
            except Exception as exc:  # noqa: BLE001 - handed to the client, whatever it is
                result = exc
                if life.alive and not is_foreseen(exc):
                    self.setting.witness.fail(
                        f"{life.name} did not foresee what a client was told: {named(exc)}", traced(exc)
                    )
            if life.alive:
                loop.call_later(0.0005, _answer, reply, result, context=self.outside)

        task = loop.create_task(serve(), context=life.process.context.copy())
        task.add_done_callback(lambda _: life.replies.pop(reply, None))
        timer = loop.call_later(PATIENCE, _answer, reply, GaveUp())
        try:
            return await reply
        except ConnectionResetError as exc:
            raise GaveUp from exc
        finally:
            timer.cancel()

    # -- what they ask for

    async def leaf(self, life: Life) -> None:
        """A leaf with its key."""
        service, fresh = self.chance.choice(SERVICES), self.chance.random() < 0.5
        cached = await self.ask(life, lambda: life.leaf_cache.leaf(life.caller(), service, fresh=fresh))
        if not cached.hit:
            self.setting.witness.told(cached.leaf.index)

    async def follow(self, life: Life) -> None:
        """A leaf, and the next one once it is renewed, or the same again after a while."""
        service, wait = self.service(), self.chance.uniform(0.0, 0.8 * PATIENCE)

        async def work() -> tuple[CachedLeaf, CachedLeaf]:
            first = await life.leaf_cache.leaf(life.caller(), service)
            return first, await life.leaf_cache.leaf(life.caller(), service, after=first.leaf.index, wait=wait)

        first, second = await self.ask(life, work)
        if second.leaf.index < first.leaf.index and first.leaf.index > max(self.setting.witness.restored, default=0):
            self.setting.witness.fail(f"{life.name} went back from leaf {first.leaf.index} to {second.leaf.index}")

    async def servers(self, life: Life) -> None:
        """How the servers are, as the leader sees it."""
        consistent = self.chance.random() < 0.5
        answer = await self.ask(life, lambda: life.leader.execute(life.caller(), ReadServers(consistent=consistent)))
        if sorted(each.name for each in answer.servers) != sorted(self.setting.names):
            self.setting.witness.fail(f"{life.name} lists the servers {answer.servers}")

    async def transfer(self, life: Life) -> None:
        """Leadership for another server, whatever is under way."""
        leader = life.log.leadership.leader
        if leader is None:
            return
        to = self.chance.choice((None, *self.setting.names))
        request = TransferLeadership(to=to, away_from=leader)
        moved = await self.ask(life, lambda: life.leader.execute(life.caller(), request))
        if to is not None and moved.leader != to:
            self.setting.witness.fail(f"leadership was to go to {to}, and is said to be with {moved.leader}")

    async def sign(self, life: Life) -> None:
        """Signatures on own CSRs."""
        trust_domain = life.state.trust_domain
        if trust_domain is None:
            return
        csrs = tuple(self.csr(trust_domain, self.service()) for _ in range(self.chance.choice((1, 1, 3))))
        await self.ask(life, lambda: life.leader.execute(life.caller(), SignLeaves(csrs)))

    async def read(self, life: Life) -> None:
        """A consistent read: at least as new as all that any client was told before it began."""
        witness = self.setting.witness
        known = witness.acknowledged_index

        async def work() -> int:
            answer = await life.leader.execute(life.caller(), ReadIndex(consistent=True))
            assert isinstance(answer, ReadAt)
            index = life.state.index
            while index < answer.index:
                index = await life.log.changed(index_of, index)
            return index

        index = await self.ask(life, work)
        if index < known:
            witness.fail(f"a consistent read at {life.name} saw index {index} after {known} was acknowledged")
        witness.told(index)

    async def barrier(self, life: Life) -> None:
        """The same at the node itself, if it believes that it leads."""
        witness = self.setting.witness
        if not life.log.leadership.is_leader:
            return
        known = witness.acknowledged_index

        async def work() -> int:
            await life.log.barrier()
            return life.state.index

        index = await self.ask(life, work)
        if index < known:
            witness.fail(f"{life.name} proved its leadership and saw index {index} after {known} was acknowledged")

    async def save(self, life: Life) -> None:
        """The whole state as this node has it."""
        if life.state.active_root is not None:
            self.saved = b"".join(await self.ask(life, lambda: life.backups.save(life.state)))

    async def restore(self, life: Life) -> None:
        """The state that was saved last."""
        data = io.BytesIO(self.saved or b"")
        index = await self.ask(life, lambda: life.backups.restore(life.caller(), data))
        if index not in self.setting.witness.restored:
            self.setting.witness.fail(f"a restore was acknowledged at {index}, which was none")
        self.setting.witness.told(index)

    async def change(self, life: Life) -> None:
        """Another configuration."""
        configuration = life.state.configuration
        index = 0 if configuration is None else configuration.modify_index
        config = self.chance.choice(CONFIGURATIONS)
        given: dict[str, Any] = {"Provider": "vault" if "Address" in config else "consul", "Config": config}
        expected, cas = None, None
        if index and self.chance.random() < CONDITIONAL:
            expected = index
            cas = index if self.chance.random() < 0.5 else None
            given |= {} if cas else {"ModifyIndex": index}
        if self.chance.random() < ALONE:
            given["ForceWithoutCrossSigning"] = True
        change = Change(self.request_id(), self.clocks_set(), json.dumps(given), cas, expected)
        self.changes.append(change)
        await self._change(life, change)

    async def repeat(self, life: Life) -> None:
        """The same request again, as a client does who does not know what became of it."""
        doubtful = [each for each in self.changes if each.unknown and each.clocks == self.clocks_set()]
        if doubtful:
            await self._change(life, self.chance.choice(doubtful))

    async def outage(self, _life: Life) -> None:
        """The external server goes down for a while."""
        server = self.setting.server

        def up() -> None:
            server.down = None

        server.down = ProviderUnavailable("the server is down")
        self.setting.loop.call_later(self.chance.choice(OUTAGES) * self.chance.random(), up, context=self.outside)

    async def doubt(self, _life: Life) -> None:
        """For a while the external server's answers get lost or come late, whatever it did."""
        server = self.setting.server

        def clear() -> None:
            server.lossy = server.stuck = 0.0

        server.lossy, server.stuck = self.chance.choice(((0.3, 0.0), (0.1, 0.1), (0.0, 0.3), (1.0, 0.0)))
        self.setting.loop.call_later(self.chance.choice(OUTAGES) * self.chance.random(), clear, context=self.outside)

    async def lose_signer(self, _life: Life) -> None:
        """Somebody removes what signs leaves at the external server."""
        standing = sorted(self.setting.server.standing)
        if standing:
            path, epoch = self.chance.choice(standing)
            self.setting.note(f"server loses {path} {epoch}")
            del self.setting.server.signers[path][epoch]

    async def other_root(self, life: Life) -> None:
        """Somebody puts another root at a path of the external server: the next change there rotates to it."""
        paths = sorted(self.setting.server.roots)
        if paths and life.state.trust_domain is not None:
            self.setting.server.new_root(self.chance.choice(paths), life.state.trust_domain)

    async def _change(self, life: Life, change: Change) -> None:
        caller, request = life.caller(change.request_id), ChangeConfiguration(change.body, cas=change.cas)
        change.under_way += 1
        try:
            answer = await self.ask(life, lambda: life.leader.execute(caller, request))
        except (CommitUnknown, GaveUp):
            change.unknown = True
            raise
        except (Conflict, InvalidConfig):
            change.told_unchanged = True
            raise
        except CaserverError as exc:
            change.told_unchanged = not isinstance(exc, NotLeader) or change.told_unchanged
            raise
        finally:
            change.under_way -= 1
            change.straddles = change.straddles or change.clocks != self.clocks_set()
        self._changed(change, answer)

    def _changed(self, change: Change, answer: ConfigurationChanged) -> None:
        self.setting.witness.told(answer.index)
        if answer.rotated or answer.index in self.setting.witness.effects.get(change.request_id, ()):
            change.applied_at = answer.index

    def judge(self) -> None:
        """Every change took effect once if its client was told so, never if it was told the contrary."""
        witness = self.setting.witness
        for change in self.changes:
            effects = witness.effects.get(change.request_id, [])
            if len(effects) > 1 and not change.straddles:
                witness.fail(f"change {change.request_id} took effect at {effects}")
            if change.applied_at is not None and change.applied_at not in effects:
                witness.fail(f"change {change.request_id} was acknowledged at {change.applied_at}, not at {effects}")
            for effect in effects:
                if change.expected not in (None, witness.replaced[effect]):
                    former = witness.replaced[effect]
                    witness.fail(f"change {change.request_id} replaced configuration {former}, not {change.expected}")
            if change.told_unchanged and not change.unknown and not change.under_way and effects:
                witness.fail(f"change {change.request_id} was refused, and took effect at {effects}")


def _answer(reply: asyncio.Future[Any], result: Any) -> None:
    if reply.done():
        return
    if isinstance(result, BaseException):
        reply.set_exception(result)
    else:
        reply.set_result(result)
