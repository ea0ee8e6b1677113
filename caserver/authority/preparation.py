"""Everything of a change that can fail, and of which nothing is visible yet: the provider made ready, the new chain proven.

What comes out is the one command that brings it into force. A change may be prepared again, here or by a later leader:
providers find what an earlier try made.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from caserver.authority.custody import Custody, Signing, cross_signed_hops, seal_root_key
from caserver.authority.plan import BACKDATED, cross_signed_until, crosses
from caserver.authority.ports import Prepared, Provider
from caserver.authority.probe import Probe
from caserver.environment import Clock, Entropy, Workers
from caserver.errors import CaserverError, InvalidConfig, NotInitialized, ProviderRefused, ProviderUnavailable
from caserver.pki.certificates import describe, load_certificate, serial_from
from caserver.pki.chain import HOPS_MAX, beyond_reach, intermediates_for, unexpired
from caserver.state.commands import ActivateRoot, NewRoot, SetIntermediate
from caserver.state.configuration import CAConfiguration, open_stored
from caserver.state.model import CARoot, CAState, Change, RootID

RETIRE_AFTER = 10  # seconds from a change to the clean-up at what it replaced
NONCE_BYTES = 12

_Chain = tuple[
    tuple[str, ...], tuple[str, ...]
]  # what leaves carry, and the roots that it does not reach any more (PEM)


@dataclass(frozen=True, slots=True)
class Ready:
    """The command that completes a change, and what its caller should know."""

    command: ActivateRoot | SetIntermediate
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _New:
    """The provider that takes over, made ready."""

    provider: Provider
    prepared: Prepared
    name: str
    foreign: bool  # it chooses serials

    @property
    def signer_pem(self) -> str:
        return self.prepared.intermediates[0] if self.prepared.intermediates else self.prepared.root_pem


class Preparation:
    """Makes changes ready, on the leader."""

    def __init__(
        self, *, custody: Custody, clock: Clock, entropy: Entropy, workers: Workers, hops_max: int = HOPS_MAX
    ) -> None:
        """``hops_max`` is how many cross-signed certificates new leaves carry at most."""
        self._hops_max = hops_max
        self._custody = custody
        self._clock = clock
        self._entropy = entropy
        self._probe = Probe(entropy=entropy, workers=workers)

    async def make_ready(self, state: CAState, change: Change) -> Ready:
        """Prepare, cross-sign, prove; any error means that the change cannot come into force."""
        configuration = open_stored(change.configuration, self._custody.keyring)
        root = state.active_root if change.renew else None
        trust_domain = state.trust_domain or ""
        with self._custody.provider(configuration, root, trust_domain=trust_domain) as provider:
            prepared = await provider.prepare(now=self._clock.now(), epoch=change.epoch)
            foreign = self._custody.kind(configuration.provider).chooses_serials
            new = _New(provider, prepared, configuration.provider, foreign)
            if root is not None:
                return await self._renewal(state, change, root, new)
            return await self._rotation(state, change, configuration, new)

    async def _rotation(self, state: CAState, change: Change, configuration: CAConfiguration, new: _New) -> Ready:
        now, prepared = self._clock.now(), new.prepared
        old = self._predecessor(state, configuration, prepared.root_pem)
        crossed = None if old is None else await self._cross_sign(old, prepared, configuration, now)
        hops, beyond, failures = await self._proven(state, new, old=old, crossed=crossed)
        if failures and not change.force:
            raise _refused(failures)
        command = ActivateRoot(
            request_id=change.request_id,
            at=self._now(),
            expect_epoch=state.ca_epoch,
            root=self._new_root(new, (*prepared.intermediates, *hops)),
            retire_not_before=None if state.active_root is None else self._now() + RETIRE_AFTER,
        )
        notes = (*_left_behind(state, beyond, hops_max=self._hops_max), *_renamed(prepared.root_pem, crossed))
        return Ready(command, (*prepared.warnings, *failures, *notes))

    async def _renewal(self, state: CAState, change: Change, root: CARoot, new: _New) -> Ready:
        """The same root with another certificate that signs leaves; the ways to other roots stay."""
        now, prepared = self._clock.now(), new.prepared
        if describe(prepared.root_pem).id != root.id or not prepared.intermediates:
            raise ProviderRefused(
                f"the provider does not sign below the active root {root.id} any more; "
                "write the configuration again to rotate to the root that it has now"
            )
        chain = (*prepared.intermediates, *unexpired(cross_signed_hops(root), now))
        failures = await self._failures(state, new, old=None, intermediates=chain, beyond=())
        if failures and not change.force:
            raise _refused(failures)
        command = SetIntermediate(
            request_id=change.request_id,
            at=self._now(),
            expect_epoch=state.ca_epoch,
            root_id=root.id,
            intermediates=chain,
            signing_key_id=describe(new.signer_pem).signing_key_id,
            retire_not_before=self._now() + RETIRE_AFTER,
            backend=tuple(sorted(prepared.backend.items())),
        )
        return Ready(command, (*prepared.warnings, *failures))

    async def _failures(
        self,
        state: CAState,
        new: _New,
        *,
        old: Signing | None,
        intermediates: tuple[str, ...],
        beyond: tuple[str, ...],
    ) -> tuple[str, ...]:
        return await self._probe.failures(
            state,
            old=old,
            new=new.provider,
            foreign=new.foreign,
            root_pem=new.prepared.root_pem,
            signer_pem=new.signer_pem,
            intermediates=intermediates,
            beyond=beyond,
            now=self._clock.now(),
        )

    async def _proven(
        self, state: CAState, new: _New, *, old: Signing | None, crossed: str | None
    ) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Hops of a short chain that real verifiers accept, the roots left behind, and what fails even so."""
        own = new.prepared.intermediates

        async def failures_with(hops: tuple[str, ...], beyond: tuple[str, ...]) -> tuple[str, ...]:
            return await self._failures(state, new, old=old, intermediates=(*own, *hops), beyond=beyond)

        (hops, beyond), (line, beyond_line) = _chains(
            state, new.prepared.root_pem, crossed, self._clock.now(), hops_max=self._hops_max
        )
        failures = await failures_with(hops, beyond)
        if failures and line != hops and not await failures_with(line, beyond_line):
            hops = await _without_needless(line, lambda fewer: failures_with(fewer, beyond_line))
            beyond, failures = beyond_line, ()
        return hops, beyond, failures

    def _predecessor(self, state: CAState, wanted: CAConfiguration, root_pem: str) -> Signing | None:
        """What signs now, if it is to cross-sign; without cross-signing the old provider is not touched at all."""
        active = state.active_root
        if active is None or active.id == describe(root_pem).id or not crosses(active, wanted, self._now()):
            return None
        try:
            return self._custody.signing(state)
        except CaserverError as exc:
            raise _no_help(exc) from exc

    async def _cross_sign(self, old: Signing, prepared: Prepared, configuration: CAConfiguration, now: datetime) -> str:
        until = cross_signed_until(old.root, configuration, int(now.timestamp()))
        try:
            return await old.provider.cross_sign(
                prepared.root_pem,
                csr_pem=prepared.root_csr,
                serial=serial_from(self._entropy.bytes(16)),
                not_before=now.replace(microsecond=0) - timedelta(seconds=BACKDATED),
                not_after=datetime.fromtimestamp(until, UTC),
            )
        except ProviderUnavailable as exc:
            raise _no_help(exc) from exc

    def _new_root(self, new: _New, intermediates: tuple[str, ...]) -> NewRoot:
        prepared = new.prepared
        facts = describe(prepared.root_pem)
        root_id = RootID(facts.id)
        sealed = None
        if prepared.root_key is not None:
            nonce = self._entropy.bytes(NONCE_BYTES)
            sealed = seal_root_key(prepared.root_key, self._custody.keyring, root_id=root_id, nonce=nonce)
        return NewRoot(
            id=root_id,
            name=f"{new.name.capitalize()} CA Root Cert",
            pem=prepared.root_pem,
            serial=facts.serial,
            not_before=facts.not_before,
            not_after=facts.not_after,
            key_type=facts.key_type,
            key_bits=facts.key_bits,
            signing_key_id=describe(new.signer_pem).signing_key_id,
            provider=new.name,
            intermediates=intermediates,
            sealed_key=sealed,
            backend=tuple(sorted(prepared.backend.items())),
        )

    def _now(self) -> int:
        return int(self._clock.now().timestamp())


def trust_domain_of(state: CAState) -> str:
    """The trust domain; NotInitialized before bootstrap."""
    if state.trust_domain is None:
        raise NotInitialized("the CA is not initialized yet; try again in a moment")
    return state.trust_domain


def _refused(failures: tuple[str, ...]) -> InvalidConfig:
    return InvalidConfig("\n".join(("the change was refused, leaves would not verify after it:", *failures)))


def _no_help(exc: CaserverError) -> ProviderUnavailable:
    return ProviderUnavailable(
        f"the active root cannot cross-sign its successor: {exc.detail}; "
        "ForceWithoutCrossSigning = true rotates without its help"
    )


def _renamed(root_pem: str, crossed: str | None) -> tuple[str, ...]:
    """What to say where a cross-signed certificate spells the name of its subject in other bytes than the root does."""
    if crossed is None:
        return ()
    if load_certificate(crossed).subject.public_bytes() == load_certificate(root_pem).subject.public_bytes():
        return ()
    warning = (
        "the cross-signed certificate encodes the name of the new root in another way than the root itself; verifiers that "
        "compare bytes (programs in Go) accept new leaves only once they have fetched the new root"
    )
    return (warning,)


def _chains(
    state: CAState, root_pem: str, crossed: str | None, now: datetime, *, hops_max: int
) -> tuple[_Chain, _Chain]:
    """Two chains to choose from: the shortest paths side by side, and one line past every root.

    After rotating back and forth one authority has several cross-signed certificates. OpenSSL takes the first that fits
    and never turns back, so the shortest paths may not do; the former root's whole chain behind the new cross-signed
    certificate does for whoever could follow the former root's.
    """
    roots = _newest_first(state)
    alive = unexpired((root.pem for root in roots), now)
    ways = tuple((root.pem, cross_signed_hops(root)) for root in roots)
    shortest = intermediates_for(root_pem, crossed, ways, now, at_most=hops_max)
    known = dict.fromkeys(pem for root in roots for pem in cross_signed_hops(root))
    if crossed is not None:
        known[crossed] = None

    def chain(hops: tuple[str, ...]) -> _Chain:
        return hops, beyond_reach(root_pem, hops, unexpired(known, now), alive)

    active = state.active_root
    if active is None or crossed is None:
        return chain(shortest), chain(shortest)
    line = tuple(dict.fromkeys((crossed, *unexpired(cross_signed_hops(active), now))))[:hops_max]
    return chain(shortest), chain(line)


def _left_behind(state: CAState, beyond: tuple[str, ...], *, hops_max: int) -> tuple[str, ...]:
    """What to say of roots to which leaves cannot carry the way any more."""
    ids = ", ".join(root.id for root in state.roots if root.pem in beyond)
    if not ids:
        return ()
    warning = (
        f"new leaves carry at most {hops_max} cross-signed certificates, which do not reach these roots any more: {ids}; "
        "who trusts none but those refuses new leaves until it has fetched the roots again"
    )
    return (warning,)


async def _without_needless(
    line: tuple[str, ...], failures_with: Callable[[tuple[str, ...]], Awaitable[tuple[str, ...]]]
) -> tuple[str, ...]:
    """The chain without the certificates that no verifier misses, so that it does not grow with every rotation."""
    for hop in reversed(line[1:]):
        fewer = tuple(each for each in line if each != hop)
        if not await failures_with(fewer):
            line = fewer
    return line


def _newest_first(state: CAState) -> list[CARoot]:
    return sorted(state.roots, key=lambda root: (not root.active, -(root.rotated_out_at or 0)))
