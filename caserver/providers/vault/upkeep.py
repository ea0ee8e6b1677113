"""What keeps a Vault provider able to sign: its token renewed in time, and an eye on what others may change there."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import assert_never

import structlog

from caserver.authority.ports import Tended
from caserver.environment import Clock
from caserver.errors import CaserverError, InvalidConfig, ProviderRefused, ProviderUnavailable
from caserver.pki.certificates import describe
from caserver.providers.vault.engine import Mount, PKIEngine, Presence
from caserver.providers.vault.session import Answer, Lease, VaultSession

LOOK_AGAIN = 5.0  # seconds while all is well: three small requests
LOOK_SOON = 2.0  # while something is not
RENEW_AT = 1 / 3  # of a lease left: time for several tries

Trouble = tuple[str, str]
_log = structlog.get_logger(__name__)


class Upkeep:
    """Tends one provider that is in force."""

    def __init__(
        self,
        session: VaultSession,
        *,
        clock: Clock,
        root: PKIEngine,
        root_pem: str,
        signers: PKIEngine,
        issuer: str,
        signer_pem: str,
        leaf_ttl: int,
    ) -> None:
        self._session = session
        self._clock = clock
        self._root = root
        self._root_pem = root_pem
        self._signers = signers
        self._issuer = issuer
        self._signer_pem = signer_pem
        self._leaf_ttl = leaf_ttl
        self._granted = 0.0  # seconds that the last grant of the token gave; 0: it was never prolonged here
        self._not_renewed = ""  # why the last renewal failed

    async def tend(self, now: datetime) -> Tended:
        """One round: troubles, when to come again, and when the token ends."""
        files = await self._file_troubles()
        try:
            troubles = await self._token(now)
            if not troubles or troubles[0][0] != "VaultTokenRejected":
                troubles += [*await self._root_troubles(), *await self._signer_troubles(now)]
        except ProviderUnavailable as exc:
            troubles = [("VaultUnavailable", exc.detail)]
        except InvalidConfig as exc:
            troubles = [("VaultMisconfigured", exc.detail)]
        except CaserverError as exc:
            troubles = [("VaultRefused", exc.detail)]
        troubles = [*files, *troubles]
        lease = self._session.lease
        expires = self._expires(lease, now)
        return Tended(
            next_in=LOOK_SOON if troubles else self._rest(lease),
            troubles=tuple(troubles),
            token_expires_at=expires,
            signer_lost=any(code == "VaultIssuerMissing" for code, _ in troubles),
        )

    async def _file_troubles(self) -> list[Trouble]:
        """Take over files that were exchanged; what cannot be used is told, and what was there before stays in use."""
        try:
            await self._session.refresh()
        except InvalidConfig as exc:
            fault = exc.detail.rpartition("\n")[2]
            return [("VaultFilesRejected", f"files for Vault have changed and are not used, the former are: {fault}")]
        return []

    async def _token(self, now: datetime) -> list[Trouble]:
        """Look at the token, prolong it or log in again when two thirds of its life are over."""
        try:
            answer = await self._session.look_up()
        except ProviderRefused as exc:
            return [("VaultTokenRejected", exc.detail)]
        if not answer.ok:
            return [("VaultTokenRejected", self._rejected(answer))]
        lease = self._session.lease
        if lease is None:
            return []
        if self._granted == 0.0 or lease.ttl <= self._granted * RENEW_AT:
            await self._prolong(lease)
        return self._expiring(now)

    async def _prolong(self, lease: Lease) -> None:
        """Renew; where that gains nothing, and another token can be had, log in."""
        due = lease.ttl <= self._granted * RENEW_AT
        if lease.renewable:
            answer = await self._session.renew()
            self._not_renewed = "" if answer.ok else answer.why
            if not answer.ok:
                _log.warning("the Vault token was not renewed", reason=answer.why)
        if due and not self._gained(lease) and self._session.logs_in:
            await self._session.log_in()
            await self._session.look_up()
        left = 0.0 if self._session.lease is None else float(self._session.lease.ttl)
        # A renewal that gains nothing does not make what is left a new whole.
        self._granted = left if self._gained(lease) else max(self._granted, left)

    def _gained(self, before: Lease) -> bool:
        """Whether the token lives longer than before; a second is only how the server rounds."""
        lease = self._session.lease
        return lease is None or lease.ttl > before.ttl + 1

    def _expiring(self, now: datetime) -> list[Trouble]:
        """A token that will end, and that nobody here can replace."""
        lease = self._session.lease
        if lease is None or self._session.logs_in:
            return []
        expires = self._expires(lease, now)
        if lease.renewable and not self._not_renewed and lease.ttl > self._granted * RENEW_AT:
            return []
        why = "reaches the end of its longest life" if lease.renewable else "cannot be renewed"
        if self._not_renewed:
            why = f"was not renewed ({self._not_renewed})"
        instant = datetime.fromtimestamp(expires or 0.0, UTC)
        reason = (
            f"the Vault token {why} and expires at {instant:%Y-%m-%dT%H:%M:%SZ}, after which no leaf is signed: "
            "set the configuration with a new Token, or use an AuthMethod"
        )
        return [("VaultTokenExpiring", reason)]

    async def _root_troubles(self) -> list[Trouble]:
        path, refused = self._root.path, None
        try:
            pem = await self._root.default_pem()
        except ProviderRefused as exc:
            pem, refused = None, exc
        if pem is not None and pem.split() == self._root_pem.split():
            return []
        mine = describe(self._root_pem).id
        if pem is not None:
            reason = (
                f"the default issuer of {path} is another root than the active one ({mine}): write the configuration "
                "again as it is to rotate to it, or make the active root the default again"
            )
            return [("VaultRootChanged", reason)]
        exchanged = _exchanged(path, await self._root.mount())
        if exchanged is None and refused is not None:
            return [("VaultRefused", refused.detail)]
        reason = (
            f"{exchanged or f'{path} shows no root any more'}; the active root {mine} can neither cross-sign nor certify "
            "another intermediate: bring its engine back, or rotate to another RootPKIPath with "
            "ForceWithoutCrossSigning = true before what signs leaves ends"
        )
        return [("VaultRootChanged", reason)]

    async def _signer_troubles(self, now: datetime) -> list[Trouble]:
        path, refused = self._signers.path, None
        try:
            pem = await self._signers.issuer_pem(self._issuer)
        except ProviderRefused as exc:
            pem, refused = None, exc
        if pem is None:
            return [await self._lost(path, refused)]
        ends = describe(self._signer_pem).not_after
        if ends - now.timestamp() > self._leaf_ttl:
            return []
        instant = datetime.fromtimestamp(ends, UTC)
        return [("VaultIntermediateExpiring", f"the intermediate at {path} ends at {instant:%Y-%m-%dT%H:%M:%SZ}")]

    async def _lost(self, path: str, refused: ProviderRefused | None) -> Trouble:
        """What became of the issuer that signs leaves: only what can be made anew is called missing."""
        mount = await self._signers.mount()
        exchanged = _exchanged(path, mount)
        if exchanged is not None and mount.presence is not Presence.FREE:
            reason = (
                f"{exchanged}; no leaf can be signed: move what is there elsewhere, whereupon another intermediate is made, "
                "or set another IntermediatePKIPath"
            )
            return "VaultMountChanged", reason
        if exchanged is None and refused is not None:
            return "VaultRefused", refused.detail
        reason = (
            f"{exchanged or f'the issuer {self._issuer} of {path} is gone'}, no leaf can be signed until another one is "
            "made, which is tried now"
        )
        return "VaultIssuerMissing", reason

    def _rejected(self, answer: Answer) -> str:
        return (
            f"Vault at {self._session.endpoint.address} refuses the token ({answer.why}), no leaf is signed: "
            "set the configuration with a new one"
        )

    def _expires(self, lease: Lease | None, now: datetime) -> float | None:
        if lease is None:
            return None
        return now.timestamp() + lease.left(self._clock.monotonic())

    def _rest(self, lease: Lease | None) -> float:
        if lease is None:
            return LOOK_AGAIN
        until_renewal = lease.left(self._clock.monotonic()) - self._granted * RENEW_AT
        return min(LOOK_AGAIN, max(1.0, until_renewal))


def _exchanged(path: str, mount: Mount) -> str | None:
    """What lies at a path instead of a PKI engine, in words; None if one does."""
    match mount.presence:
        case Presence.MOUNTED:
            return (
                None
                if mount.kind == "pki"
                else f"{path} is a {mount.kind} mount now, not the PKI engine that was there"
            )
        case Presence.FREE:
            return f"nothing is mounted at {path} any more"
        case Presence.HIDDEN:
            return f"nothing that the Vault token may use is at {path} any more"
        case Presence.ENCLOSED:
            return f"{path} lies within the {mount.kind} mount {mount.description} now, and is no PKI engine"
        case _:
            assert_never(mount.presence)
