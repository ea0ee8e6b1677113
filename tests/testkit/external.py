"""A stand-in for an external provider's server: roots and intermediates at paths, made step by step and found again.

``FakeVault`` is the server: all nodes of a test share one, it outlives them, and it may be down. Its providers choose
serials and instants themselves, sign requests only, and leave behind what a killed leader had made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache, partial

from cryptography import x509

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
from caserver.environment import Clock, PrivateKey
from caserver.errors import CaserverError, InvalidConfig, ProviderRefused, ProviderUnavailable
from caserver.fields import Secret
from caserver.pki import certificates
from caserver.pki.certificates import LeafTemplate, describe, make_root, make_root_csr
from caserver.pki.keys import public_key_der
from caserver.pki.leaf_der import Issuer
from caserver.providers.vault.naming import leavings
from caserver.state.configuration import CAConfiguration
from caserver.state.model import CARoot, RootID
from caserver.state.vault_configuration import VaultConfiguration, VaultLocal
from tests.testkit.fakes import SeededEntropy

BACKDATED = 30  # seconds, as the real one
Pair = tuple[PrivateKey, str]  # key and certificate (PEM)


@cache
def key_for(name: str) -> PrivateKey:
    """The same key for the same name."""
    return SeededEntropy(sum(ord(letter) << index for index, letter in enumerate(name))).private_key("ec", 256)


@dataclass
class FakeVault:
    """The server. Paths are names; what stands at them survives every leader."""

    clock: Clock
    roots: dict[str, list[Pair]] = field(default_factory=dict)  # the last one is the default
    signers: dict[str, dict[int, Pair]] = field(default_factory=dict)  # path -> epoch -> our issuer
    revoked: set[str] = field(default_factory=set)  # tokens that clean nothing up any more
    foreign: set[str] = field(default_factory=set)  # intermediate paths that somebody else mounted
    down: CaserverError | None = None
    troubles: tuple[tuple[str, str], ...] = ()
    token_expires_at: float | None = None
    intermediate_life: timedelta | None = None  # instead of what the configuration wants
    latency: float = 0.0  # seconds of every request
    step: Callable[[str], None] = lambda _: None  # told of every side effect before and after it
    hang: asyncio.Event | None = None  # while set, everything waits for it
    serials: int = 1000
    signed: list[int] = field(default_factory=list)  # serials

    def kind(self) -> ProviderKind:
        """What a node registers."""

        def build(
            configuration: CAConfiguration, *, trust_domain: str, root: CARoot | None, root_key: Secret | None
        ) -> Provider:
            return FakeVaultProvider(self, configuration, trust_domain, root)

        return ProviderKind(build, chooses_serials=True, leavings=partial(leavings, VaultLocal()))

    async def reached(self, what: str) -> None:
        """One request arrives; ProviderUnavailable while the server is down."""
        self.step(f"vault {what}")
        await asyncio.sleep(self.latency)
        if self.hang is not None:
            await self.hang.wait()
        if self.down is not None:
            raise self.down

    def new_root(self, path: str, trust_domain: str) -> str:
        """Put another root at a path, as its default; PEM."""
        standing = self.roots.setdefault(path, [])
        key, now = key_for(f"root {path} {len(standing)}"), self.clock.now().replace(microsecond=0)
        pem = make_root(
            key,
            trust_domain=trust_domain,
            common_name=f"{path} {len(standing)}",
            serial=self.serial(),
            not_before=now - timedelta(seconds=BACKDATED),
            not_after=now + timedelta(days=3650),
        )
        standing.append((key, pem))
        return pem

    def serial(self) -> int:
        self.serials += 1
        return self.serials

    @property
    def standing(self) -> set[tuple[str, int]]:
        """Every issuer that was made for the cluster: (path, epoch)."""
        return {(path, epoch) for path, epochs in self.signers.items() for epoch in epochs}


class FakeVaultProvider:
    """One configuration's way to the server; satisfies the authority's ``Provider`` port."""

    def __init__(
        self, server: FakeVault, configuration: CAConfiguration, trust_domain: str, root: CARoot | None
    ) -> None:
        assert configuration.vault is not None
        self._server = server
        self._configuration = configuration
        self._vault: VaultConfiguration = configuration.vault
        self._trust_domain = trust_domain
        self._root: Pair | None = None if root is None else self._pair_of(root.pem)
        backend = {} if root is None else dict(root.backend)
        self._at = (backend.get("path", ""), int(backend.get("epoch", "0")))
        self._signer: Pair | None = server.signers.get(self._at[0], {}).get(self._at[1])

    async def inspect(self) -> Inspection:
        await self._server.reached("inspect")
        token = self._vault.token
        if token is None or token.reveal() == "bad":
            raise InvalidConfig("error configuring provider: the Vault token was refused")
        standing = self._server.roots.get(self._vault.root_pki_path)
        if not standing:
            return Inspection(None, None, needs=("generate",))
        pem = standing[-1][1]
        return Inspection(RootID(describe(pem).id), pem, needs=("sign",))

    async def prepare(self, *, now: datetime, epoch: int) -> Prepared:
        server, path = self._server, self._vault.intermediate_pki_path
        if self._root is None:
            await server.reached("read root")
            if not server.roots.get(self._vault.root_pki_path):
                await server.reached("generate root")
                server.new_root(self._vault.root_pki_path, self._trust_domain)
                server.step("vault generated root")
            self._root = server.roots[self._vault.root_pki_path][-1]
        await server.reached("mount")
        epochs = server.signers.setdefault(path, {})
        server.step("vault mounted")
        if epoch not in epochs:
            await server.reached("make intermediate")
            epochs[epoch] = self._intermediate(epoch)
            server.step("vault made intermediate")
        self._at, self._signer = (path, epoch), epochs[epoch]
        return Prepared(
            root_pem=self._root[1],
            root_key=None,
            intermediates=(self._signer[1],),
            warnings=() if server.intermediate_life is None else ("the intermediate was clamped",),
            backend={"path": path, "epoch": str(epoch)},
            root_csr=make_root_csr(self._root[1], self._root[0]),
        )

    async def sign_leaves(self, orders: Sequence[SigningOrder]) -> Sequence[SignedLeaf | CaserverError]:
        await self._server.reached("sign")
        return [self._sign(order) for order in orders]

    async def cross_sign(
        self, certificate_pem: str, *, csr_pem: str | None, serial: int, not_before: datetime, not_after: datetime
    ) -> str:
        await self._server.reached("cross-sign")
        if csr_pem is None or self._root is None:
            raise ProviderRefused("there is no request to sign")
        wanted = certificates.load_certificate(certificate_pem).public_key()
        asked = x509.load_pem_x509_csr(csr_pem.encode()).public_key()
        assert public_key_der(wanted) == public_key_der(asked)  # type: ignore[arg-type]  # of one kind, or unequal
        return self._certified(certificate_pem, self._root, until=not_after)

    async def retire(self, *, epochs: tuple[int, ...], keep: Backend | None) -> None:
        path = self._vault.intermediate_pki_path
        await self._server.reached("retire")
        if self._vault.token is not None and self._vault.token.reveal() in self._server.revoked:
            raise ProviderRefused("permission denied")
        standing = self._server.signers.get(path)
        if standing is None:
            return
        for epoch in epochs:
            assert keep is None or (keep.get("path"), keep.get("epoch")) != (path, str(epoch)), "the live issuer"
            standing.pop(epoch, None)
        if not standing and path not in self._server.foreign and (keep is None or keep.get("path") != path):
            del self._server.signers[path]

    async def tend(self, now: datetime) -> Tended:
        await self._server.reached("tend")
        path, epoch = self._at
        lost = epoch not in self._server.signers.get(path, {})
        troubles = (*self._server.troubles, *((("signer-lost", "gone"),) if lost else ()))
        return Tended(30.0, troubles, self._server.token_expires_at, lost)

    def close(self) -> None:
        """Nothing is held."""

    def _pair_of(self, pem: str) -> Pair | None:
        return next((pair for pairs in self._server.roots.values() for pair in pairs if pair[1] == pem), None)

    def _intermediate(self, epoch: int) -> Pair:
        assert self._root is not None
        server, now = self._server, self._server.clock.now().replace(microsecond=0)
        key = key_for(f"{self._vault.intermediate_pki_path} {epoch}")
        life = server.intermediate_life or timedelta(seconds=self._configuration.effective.intermediate_ttl)
        request = make_root(
            key,
            trust_domain=self._trust_domain,
            common_name=f"intermediate {epoch}",
            serial=1,
            not_before=now - timedelta(seconds=BACKDATED),
            not_after=now + life,
        )
        return key, self._certified(request, self._root, until=now + life)

    def _certified(self, pem: str, root: Pair, *, until: datetime) -> str:
        now = self._server.clock.now().replace(microsecond=0)
        return certificates.cross_sign(
            pem,
            issuer_pem=root[1],
            issuer_key=root[0],
            serial=self._server.serial(),
            not_before=now - timedelta(seconds=BACKDATED),
            not_after=until,
        )

    def _sign(self, order: SigningOrder) -> SignedLeaf | CaserverError:
        assert order.serial is None
        path, epoch = self._at
        if self._signer is None or epoch not in self._server.signers.get(path, {}):
            return ProviderUnavailable("the issuer is gone")
        request = x509.load_pem_x509_csr(order.csr_pem.encode())
        serial = self._server.serial()
        template = LeafTemplate(
            spiffe_uri=order.spiffe_uri,
            common_name=order.common_name,
            public_key=public_key_der(request.public_key()),  # type: ignore[arg-type]  # of one of our own kinds
            serial=serial,
            not_before=int(self._server.clock.now().timestamp()) - BACKDATED,
            not_after=order.not_after,
        )
        self._server.signed.append(serial)
        return SignedLeaf(order.issue_id, Issuer(self._signer[1], self._signer[0]).sign(template), serial)
