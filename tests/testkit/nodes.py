"""A node's authority on fakes, and what tests ask of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar, TypeVar, cast

from caserver.authority.authority import Authority
from caserver.authority.ports import Providers
from caserver.environment import InlineWorkers
from caserver.internode.keyring import Keyring
from caserver.pki.certificates import make_root, root_common_name
from caserver.pki.chain import HOPS_MAX, verify_chain
from caserver.pki.csr import make_csr
from caserver.pki.proof import Cell, prove
from caserver.pki.spiffe import ServiceID
from caserver.providers.builtin import builtin_kind
from caserver.requests import Caller, ChangeConfiguration, ConfigurationChanged, IssuedLeaf, LeavesSigned, SignLeaves
from caserver.state.configuration import CAConfiguration, parse_bootstrap
from caserver.state.model import CAState
from tests.testkit.access import access
from tests.testkit.external import FakeVault
from tests.testkit.fakes import FakeLog, ManualClock, ProviderControl, SeededEntropy, controlled, settle
from tests.testkit.keys import key_pem, private_key

T = TypeVar("T")
DATACENTER = "dc1"
CLUSTER_ID = "2a3b4c5d-1111-4222-8333-444455556666"
TRUST_DOMAIN = f"{CLUSTER_ID}.consul"
KEYRING = Keyring([b"k" * 32])
DAY = 24 * 3600
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n", re.DOTALL)


def bootstrap_configuration(**ca_config: object) -> CAConfiguration:
    """The built-in provider with a known cluster id and no CSR limit, and what the test adds."""
    return parse_bootstrap("consul", {"cluster_id": CLUSTER_ID, "csr_max_per_second": 0, **ca_config})


class ProvingOnce(InlineWorkers):
    """Proves the same certificates at the same instant once: a pure question that takes most of a rotation's time.

    Tests that disturb a rotation at each of its steps do the same rotation many times.
    """

    known: ClassVar[dict[Hashable, Any]] = {}

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        if function is not prove:
            return await super().run(function, *args)
        cells, at = args
        asked = (tuple(cells), at)
        if asked not in self.known:
            self.known[asked] = function(*asked)
        found: T = self.known[asked]
        return found


class Searching(InlineWorkers):
    """Proves by our own search for chains and leaves out the handshakes, which take most of a rotation's time.

    What OpenSSL says is asked in ``pki_proof_test``, and by every rotation of the other tiers.
    """

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        if function is not prove:
            return await super().run(function, *args)
        cells, at = args
        found: Any = [f"{cell.name}: {reason}" for cell in cells if (reason := _unreached(cell, at)) is not None]
        return cast("T", found)


def _unreached(cell: Cell, at: datetime) -> str | None:
    leaf, *rest = _CERTIFICATE.findall(cell.endpoint.chain_pem)
    return verify_chain(leaf, rest, cell.bundle, at)


@dataclass
class Node:
    """One node: its view of the log, and the authority that acts while it leads."""

    log: FakeLog
    clock: ManualClock
    entropy: SeededEntropy
    control: ProviderControl  # of its built-in providers
    external: ProviderControl  # of those that reach the external server
    authority: Authority
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def state(self) -> CAState:
        return self.log.state

    def start(self) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(self.authority.run()))

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def sign(self, *services: str) -> list[IssuedLeaf]:
        """Leaves for services; fails the test if one was refused."""
        answer = await self.authority.execute(Caller(), SignLeaves(tuple(csr_for(name) for name in services)))
        assert isinstance(answer, LeavesSigned)
        leaves = [result for result in answer.results if isinstance(result, IssuedLeaf)]
        assert len(leaves) == len(services), answer.results
        return leaves

    async def configure(
        self,
        config: Mapping[str, object],
        *,
        request_id: str = "",
        cas: int | None = None,
        force: bool = False,
        provider: str = "consul",
        **top: object,
    ) -> ConfigurationChanged:
        """PUT a configuration."""
        body = json.dumps({"Provider": provider, "Config": dict(config), **top})
        request = ChangeConfiguration(body=body, cas=cas, force=force)
        answer = await self.authority.execute(Caller(request_id=request_id), request)
        assert isinstance(answer, ConfigurationChanged)
        return answer


def build_node(
    log: FakeLog,
    *,
    clock: ManualClock | None = None,
    seed: int = 1,
    bootstrap: CAConfiguration | None = None,
    connect: bool = True,
    keyring: Keyring = KEYRING,
    hops_max: int = HOPS_MAX,
    server: FakeVault | None = None,
    workers: InlineWorkers | None = None,
) -> Node:
    """A node that is not running yet; ``server`` is the external provider's, if it is used.

    ``workers`` say how rotations are proven, without handshakes if it is left out.
    """
    clock = clock or ManualClock()
    entropy = SeededEntropy(seed)
    control, external = ProviderControl(tripwire=log.tripwire), ProviderControl(tripwire=log.tripwire)
    factory = controlled(builtin_kind(clock, entropy, InlineWorkers()), control)
    own = access(log, keyring=keyring, clock=clock, entropy=entropy)
    outside = {} if server is None else {"vault": controlled(server.kind(), external)}
    authority = Authority(
        log,
        providers=Providers({"consul": factory, **outside}),
        keyring=keyring,
        clock=clock,
        entropy=entropy,
        workers=workers or Searching(),
        datacenter=DATACENTER,
        bootstrap=(bootstrap or bootstrap_configuration()) if connect else None,
        hops_max=hops_max,
        gate=own.gate,
        tokens=own.tokens,
    )
    return Node(log=log, clock=clock, entropy=entropy, control=control, external=external, authority=authority)


@contextlib.asynccontextmanager
async def running(node: Node) -> AsyncIterator[Node]:
    """Run the node; it has taken office if it leads and can."""
    node.start()
    await settle()
    try:
        yield node
    finally:
        await node.stop()


@contextlib.asynccontextmanager
async def leading_node(
    bootstrap: CAConfiguration | None = None, *, clock: ManualClock | None = None, server: FakeVault | None = None
) -> AsyncIterator[Node]:
    """A single node with an initialized CA."""
    async with running(build_node(FakeLog(), bootstrap=bootstrap, clock=clock, server=server)) as node:
        assert node.state.active_root is not None, node.authority.degraded
        yield node


def csr_for(
    service: str, *, key: str = "ec-256", trust_domain: str = TRUST_DOMAIN, datacenter: str = DATACENTER
) -> str:
    """A CSR for a service, PEM."""
    return make_csr(private_key(key), ServiceID(trust_domain, datacenter, service).uri)


def operator_root(
    key: str, *, trust_domain: str = TRUST_DOMAIN, start: datetime | None = None, days: int = 3650, serial: int = 77
) -> dict[str, object]:
    """Config keys of an operator's own root made for a ready-made key; the same for the same arguments."""
    not_before = start or datetime(2026, 2, 1, tzinfo=UTC)
    pem = make_root(
        private_key(key),
        trust_domain=trust_domain,
        common_name=root_common_name(trust_domain, key.encode().ljust(16, b".")),
        serial=serial,
        not_before=not_before,
        not_after=datetime.fromtimestamp(not_before.timestamp() + days * DAY, UTC),
    )
    return {"PrivateKey": key_pem(key), "RootCert": pem}


def split_chain(chain_pem: str) -> list[str]:
    """The certificates of a PEM chain, leaf first."""
    return _CERTIFICATE.findall(chain_pem)


def why_not(leaf: IssuedLeaf, root_pem: str, at: datetime) -> str | None:
    """None if a leaf verifies with its chain under one root alone, else the reason."""
    first, *rest = split_chain(leaf.chain_pem)
    return verify_chain(first, rest, (root_pem,), at)
