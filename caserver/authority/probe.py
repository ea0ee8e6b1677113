"""Proof before a rotation: throw-away leaves of both roots, shown to every bundle that is in use.

Every bundle under which a leaf of today verifies must accept the leaves of tomorrow, and the new bundle must accept the
leaves of today. The handshakes themselves are ``pki.proof``'s.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from caserver.authority.custody import Signing
from caserver.authority.ports import Provider, SigningOrder
from caserver.environment import Entropy, Workers
from caserver.errors import CaserverError
from caserver.pki.certificates import describe, serial_from
from caserver.pki.chain import verify_chain
from caserver.pki.csr import make_csr
from caserver.pki.keys import pkcs8_pem, public_key_der
from caserver.pki.proof import Cell, Endpoint, prove
from caserver.pki.spiffe import leaf_common_name
from caserver.state.model import CARoot, CAState

LIFE = 300  # seconds
BACKDATED = 60  # seconds, like any leaf


@dataclass(frozen=True, slots=True)
class _Probe:
    leaf_pem: str
    intermediates: tuple[str, ...]
    endpoint: Endpoint


class Probe:
    """Makes probe leaves and proves them; keys and certificates are thrown away."""

    def __init__(self, *, entropy: Entropy, workers: Workers) -> None:
        self._entropy = entropy
        self._workers = workers

    async def failures(
        self,
        state: CAState,
        *,
        old: Signing | None,
        new: Provider,
        foreign: bool,
        root_pem: str,
        signer_pem: str,
        intermediates: tuple[str, ...],
        beyond: Collection[str],
        now: datetime,
    ) -> tuple[str, ...]:
        """Which leaf would not verify under which bundle, and why; empty if the rotation is safe.

        ``old`` is None if the old root does not vouch for the new one; then only the new bundles are proven.
        ``signer_pem`` is the certificate whose key signs the new leaves: the root, or the first intermediate; ``foreign``
        says that the new provider chooses serials. Roots ``beyond`` reach (PEM) are known not to accept them and are not
        asked.
        """
        fresh = await self._leaf(state, new, signer_pem, intermediates, foreign=foreign, now=now)
        cells = [Cell("new leaf under the new root alone", fresh.endpoint, (root_pem,))]
        active = state.active_root
        if active is not None:
            cells.append(Cell("new leaf under old and new root", fresh.endpoint, (active.pem, root_pem)))
        if old is not None:
            hops = tuple(hop for hop, not_after in old.hops if not_after > now.timestamp())
            present = await self._leaf(state, old.provider, old.issuer_pem, hops, foreign=old.chooses_serials, now=now)
            earlier = [root for root in state.roots if not root.active and root.pem not in (root_pem, *beyond)]
            cells += _cells_of_old(earlier, old, present, fresh, root_pem, now)
        return tuple(await self._workers.run(prove, cells, now))

    async def _leaf(
        self,
        state: CAState,
        provider: Provider,
        issuer_pem: str,
        intermediates: tuple[str, ...],
        *,
        foreign: bool,
        now: datetime,
    ) -> _Probe:
        trust_domain = state.trust_domain or ""
        issuer = describe(issuer_pem)
        seconds = int(now.timestamp())
        key = self._entropy.private_key("ec", 256)
        uri = f"spiffe://{trust_domain}/caserver/probe"
        order = SigningOrder(
            issue_id=self._entropy.bytes(16).hex(),
            serial=None if foreign else serial_from(self._entropy.bytes(16)),
            spiffe_uri=uri,
            common_name=leaf_common_name("probe", trust_domain),
            public_key=public_key_der(key.public_key()),
            csr_pem=make_csr(key, uri),
            not_before=max(seconds - BACKDATED, issuer.not_before),
            not_after=min(seconds + LIFE, issuer.not_after),
        )
        (signed,) = await provider.sign_leaves([order])
        if isinstance(signed, CaserverError):
            raise signed
        chain = "".join(pem.rstrip("\n") + "\n" for pem in (signed.pem, *intermediates))
        return _Probe(signed.pem, intermediates, Endpoint(chain_pem=chain, key_pem=pkcs8_pem(key)))


def _cells_of_old(
    earlier: Sequence[CARoot], old: Signing, present: _Probe, fresh: _Probe, root_pem: str, now: datetime
) -> list[Cell]:
    cells = [
        Cell("old leaf under the old root alone", present.endpoint, (old.root.pem,)),
        Cell("old leaf under old and new root", present.endpoint, (old.root.pem, root_pem)),
        Cell("new leaf under the old root alone", fresh.endpoint, (old.root.pem,)),
    ]
    cells.extend(
        Cell(f"new leaf under the earlier root {root.id} alone", fresh.endpoint, (root.pem,))
        for root in earlier
        if verify_chain(present.leaf_pem, present.intermediates, (root.pem,), now) is None
    )
    return cells
