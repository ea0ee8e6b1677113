"""The provider ``vault``: root and intermediate keys live in PKI engines of a Vault (or OpenBao) server and never leave it.

At the root path a root stands already, or one is generated; it is never replaced. At the intermediate path the provider
keeps an issuer of its own for each epoch, whose key is named after cluster and epoch, and signs leaves by that issuer's id
under a role of its own name: other issuers, roles and the engine's default stay whose they are. Every step looks first at
what is there, so that whoever repeats a step, on any node, finds what was made before.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import structlog
from cryptography import x509

from caserver.authority.ports import (
    Backend,
    Inspection,
    Prepared,
    Provider,
    ProviderFactory,
    SignedLeaf,
    SigningOrder,
    Tended,
)
from caserver.environment import Clock, Workers
from caserver.errors import CaserverError, InvalidConfig, ProviderRefused, ProviderUnavailable
from caserver.fields import Fault, Secret, fault_text
from caserver.pki.certificates import describe, load_certificate, root_common_name
from caserver.pki.spiffe import signing_uri
from caserver.providers.vault import preflight
from caserver.providers.vault.crossing import cross_signed, crossing_request
from caserver.providers.vault.endpoint import Endpoint, resolve
from caserver.providers.vault.engine import Issuer, LeafRequest, Mount, PKIEngine, Presence
from caserver.providers.vault.fitness import is_issued_by, lifetime_warnings, root_faults
from caserver.providers.vault.naming import cluster_id_of, engine_description, key_name
from caserver.providers.vault.session import VaultSession
from caserver.providers.vault.upkeep import LOOK_SOON, Upkeep
from caserver.state.configuration import CAConfiguration
from caserver.state.model import HOUR, CARoot, RootID
from caserver.state.vault_configuration import VaultConfiguration, VaultLocal

SIGNING_DEADLINE = 4.5  # seconds of a batch: what takes longer is dropped by the caller
_LEAF_LIFE_MAX = 8761 * HOUR  # of the role; each request says how long its leaf lives
_HEADING = "error configuring provider: "

_log = structlog.get_logger(__name__)


def vault_factory(local: VaultLocal, *, clock: Clock, workers: Workers, pool_size: int) -> ProviderFactory:
    """Builds providers that share sessions; ``workers`` has ``pool_size`` threads of its own."""
    sessions = _Sessions(clock, workers, pool_size)

    def build(
        configuration: CAConfiguration,
        *,
        trust_domain: str,
        root: CARoot | None,
        root_key: Secret | None,  # noqa: ARG001  the port's; these keys are elsewhere
    ) -> Provider:
        return VaultProvider(
            configuration, trust_domain=trust_domain, local=local, sessions=sessions, clock=clock, root=root
        )

    return build


class _Sessions:
    """Sessions with equal settings are one: connections, token and its renewal are shared by all who use them."""

    def __init__(self, clock: Clock, workers: Workers, pool_size: int) -> None:
        self._clock = clock
        self._workers = workers
        self._pool_size = pool_size
        self._open: dict[Endpoint, tuple[VaultSession, int]] = {}

    def acquire(self, wanted: VaultConfiguration, local: VaultLocal) -> VaultSession:
        """The session that ``wanted`` means on this node; InvalidConfig if it means none."""
        endpoint = resolve(wanted, local)
        session, users = self._open.get(endpoint) or (self._new(endpoint), 0)
        self._open[endpoint] = session, users + 1
        return session

    def release(self, session: VaultSession) -> None:
        """Counterpart of ``acquire``: the last one closes."""
        kept, users = self._open[session.endpoint]
        if users > 1:
            self._open[session.endpoint] = kept, users - 1
            return
        del self._open[session.endpoint]
        kept.close()

    def _new(self, endpoint: Endpoint) -> VaultSession:
        return VaultSession(endpoint, clock=self._clock, workers=self._workers, pool_size=self._pool_size)


@dataclass(frozen=True, slots=True)
class _Bound:
    """What signs: the root with its issuer, and our issuer at the intermediate path."""

    root_pem: str
    signer_pem: str = field(repr=False)
    root_issuer: str
    issuer: str
    key: str
    role: str

    def backend(self, root: PKIEngine, intermediate: PKIEngine) -> Backend:
        """The same as the replicated state carries it."""
        return {
            "root_namespace": root.namespace,
            "root_path": root.path,
            "root_issuer": self.root_issuer,
            "namespace": intermediate.namespace,
            "path": intermediate.path,
            "issuer": self.issuer,
            "key": self.key,
            "role": self.role,
        }


@dataclass(frozen=True, slots=True)
class _Survey:
    """What stands at the two paths."""

    root: Mount
    intermediate: Mount
    root_pem: str | None


class VaultProvider:
    """Signs through a Vault server; satisfies the authority's ``Provider`` port."""

    def __init__(
        self,
        configuration: CAConfiguration,
        *,
        trust_domain: str,
        local: VaultLocal,
        sessions: _Sessions,
        clock: Clock,
        root: CARoot | None,
    ) -> None:
        self._configuration = configuration
        self._trust_domain = trust_domain
        self._local = local
        self._sessions = sessions
        self._clock = clock
        self._held: VaultSession | None = None
        self._bound = None if root is None else _bound_of(root)
        self._upkeep: Upkeep | None = None

    async def inspect(self) -> Inspection:
        """What stands at the two paths, and whether everything that a change needs is allowed; nothing is written."""
        await self._check_token()
        survey = await self._survey()
        needs = self._needs(survey)
        await preflight.require(self._session, needs)
        warnings = list(self._token_warnings())
        root_id = None
        if survey.root_pem is not None:
            effective, now = self._configuration.effective, self._clock.now()
            warnings += lifetime_warnings(survey.root_pem, where=self._root.path, effective=effective, now=now)
            root_id = RootID(describe(survey.root_pem).id)
        return Inspection(
            root_id=root_id,
            root_pem=survey.root_pem,
            warnings=tuple(warnings),
            needs=tuple(need.line for need in needs),
        )

    async def prepare(self, *, now: datetime, epoch: int) -> Prepared:
        """The root, which is generated if there is none, and this epoch's intermediate under it."""
        survey = await self._survey()
        root_pem = await self._standing_root(survey, epoch)
        issuer = await self._root.issuer_of(root_pem)
        if issuer is None:
            raise ProviderRefused(f"the root is no issuer of {self._where(self._root)} any more; somebody removed it")
        signer_pem, own = await self._intermediate(survey, root_pem, issuer, now=now, epoch=epoch)
        await self._signers.write_role(self._role, trust_domain=self._trust_domain, max_ttl=_LEAF_LIFE_MAX)
        fresh = self._bound is None
        self._bound = _Bound(root_pem, signer_pem, issuer.id, own.id, own.key_id, self._role)
        effective = self._configuration.effective
        return Prepared(
            root_pem=root_pem,
            root_key=None,
            intermediates=(signer_pem,),
            warnings=tuple(lifetime_warnings(root_pem, where=self._root.path, effective=effective, now=now)),
            backend=self._bound.backend(self._root, self._signers),
            root_csr=await crossing_request(self._root, issuer, root_pem) if fresh else None,
        )

    async def sign_leaves(self, orders: Sequence[SigningOrder]) -> Sequence[SignedLeaf | CaserverError]:
        """One request for each order, as many at once as there are connections."""
        bound = self._require_bound()
        leaves = [
            LeafRequest(
                order.csr_pem, order.common_name, order.spiffe_uri, datetime.fromtimestamp(order.not_after, UTC)
            )
            for order in orders
        ]
        try:
            signed = await self._signers.sign_leaves(bound.issuer, bound.role, leaves, deadline=SIGNING_DEADLINE)
        except InvalidConfig as exc:  # files and environment of this node, which are no fault of who wants a leaf
            raise ProviderUnavailable(f"this node cannot use Vault: {exc.detail}") from exc
        return [_judged(order, each) for order, each in zip(orders, signed, strict=True)]

    async def cross_sign(
        self, certificate_pem: str, *, csr_pem: str | None, serial: int, not_before: datetime, not_after: datetime
    ) -> str:
        """Have the bound root certify another one; serial and start are Vault's."""
        bound = self._require_bound()
        return await cross_signed(
            self._root, bound.root_issuer, bound.root_pem, certificate_pem, csr_pem=csr_pem, not_after=not_after
        )

    async def retire(self, *, epochs: tuple[int, ...], keep: Backend | None) -> None:
        """Delete our issuers and keys of ``epochs``, and the engine if we mounted it and nothing else is in it."""
        engine = self._signers
        mount = await engine.mount()
        if mount.presence is Presence.HIDDEN:  # gone, if the token could see it; what it may not see is still owed
            await self._check_token()
            await preflight.require(self._session, preflight.cleaning_needs(engine.namespace, engine.path))
        if mount.presence is not Presence.MOUNTED or mount.kind != "pki":
            return
        names = {self._name(epoch) for epoch in epochs}
        keys = {key for name, key in (await engine.keys()).items() if name in names}
        issuers = await engine.issuers()
        kept = _kept_here(keep, engine, issuers)
        doomed = [each for each in issuers if each.key_id in keys and each.id != kept.get("issuer")]
        await self._leave_default(doomed, kept)
        for each in doomed:
            await engine.delete_issuer(each.id)
        for key in keys - {kept.get("key")}:
            await engine.delete_key(key)
        if (
            not kept
            and mount.description == self._description
            and not await engine.issuers()
            and not await engine.keys()
        ):
            await engine.remove()
            _log.info("unmounted the intermediate PKI engine that was made for this cluster", path=engine.path)

    async def tend(self, now: datetime) -> Tended:
        """Keep the token alive, and look whether what signs still stands as it was left."""
        bound = self._require_bound()
        try:
            session = self._session
        except InvalidConfig as exc:
            return Tended(next_in=LOOK_SOON, troubles=(("VaultMisconfigured", exc.detail),))
        if self._upkeep is None:
            self._upkeep = Upkeep(
                session,
                clock=self._clock,
                root=self._root,
                root_pem=bound.root_pem,
                signers=self._signers,
                issuer=bound.issuer,
                signer_pem=bound.signer_pem,
                leaf_ttl=self._configuration.effective.leaf_ttl,
            )
        return await self._upkeep.tend(now)

    def close(self) -> None:
        """Let the session go."""
        held, self._held = self._held, None
        if held is not None:
            self._sessions.release(held)

    @property
    def _vault(self) -> VaultConfiguration:
        vault = self._configuration.vault
        if vault is None:
            raise InvalidConfig("error configuring provider: the configuration says nothing of Vault")
        return vault

    @property
    def _session(self) -> VaultSession:
        if self._held is None:
            self._held = self._sessions.acquire(self._vault, self._local)
        return self._held

    @property
    def _root(self) -> PKIEngine:
        return self._engine(self._vault.root_pki_namespace, self._vault.root_pki_path)

    @property
    def _signers(self) -> PKIEngine:
        return self._engine(self._vault.intermediate_pki_namespace, self._vault.intermediate_pki_path)

    def _engine(self, namespace: str, path: str) -> PKIEngine:
        session = self._session
        return PKIEngine(session, namespace or session.endpoint.namespace, path)

    @property
    def _cluster_id(self) -> str:
        return cluster_id_of(self._trust_domain)

    @property
    def _role(self) -> str:
        return f"{preflight.ROLE_PREFIX}{self._cluster_id}"

    @property
    def _description(self) -> str:
        return engine_description(self._trust_domain)

    def _name(self, epoch: int) -> str:
        return key_name(self._trust_domain, epoch)

    def _where(self, engine: PKIEngine) -> str:
        return f"{engine.path} (namespace {engine.namespace})" if engine.namespace else engine.path

    def _common_name(self, epoch: int) -> str:
        raw = hashlib.sha256(self._name(epoch).encode()).digest()
        return root_common_name(self._trust_domain, raw, provider="vault")

    async def _check_token(self) -> None:
        try:
            answer = await self._session.look_up()
        except ProviderRefused as exc:  # a login
            raise InvalidConfig(f"{_HEADING}{exc.detail}") from exc
        if answer.ok:
            return
        where = f"auth/token/lookup-self of {self._session.endpoint.address}"
        problem = f"was refused at {where}: {answer.why}"
        line = preflight.policy_line("get", "auth/token/lookup-self")
        remedy = f"give one that is valid there; its policy needs {line}"
        raise InvalidConfig(fault_text([Fault("Token", problem, remedy, f"{_HEADING}the Vault token was refused")]))

    def _token_warnings(self) -> list[str]:
        lease = self._session.lease
        if lease is None or lease.renewable or self._session.logs_in:
            return []
        ends = self._clock.now() + timedelta(seconds=lease.ttl)
        return [f"the Vault token cannot be renewed and expires at {ends:%Y-%m-%dT%H:%M:%SZ}: leaves end with it"]

    async def _survey(self) -> _Survey:
        """What stands at the two paths; InvalidConfig with every fault of it."""
        root, signers = await asyncio.gather(self._root.mount(), self._signers.mount())
        faults = [
            *_mount_faults("RootPKIPath", self._where(self._root), root, self._root),
            *_mount_faults("IntermediatePKIPath", self._where(self._signers), signers, self._signers),
            *_place_faults(self._root, self._signers),
        ]
        pem = None
        if root.presence is Presence.MOUNTED and root.kind == "pki":
            pem = await self._root.default_pem()
            if pem is None and await self._root.issuers():
                pem = await self._root.default_pem()  # made between the two looks, or nobody's choice
                faults += self._no_default_faults(pem)
            faults += self._root_faults(pem)
        if faults:
            raise InvalidConfig(fault_text(faults))
        return _Survey(root, signers, pem)

    def _no_default_faults(self, pem: str | None) -> list[Fault]:
        if pem is not None or self._bound is not None:
            return []
        remedy = "set the default there, or give another path"
        problem = f"{self._where(self._root)} has issuers and none of them is the default"
        return [Fault("RootPKIPath", problem, remedy)]

    def _root_faults(self, pem: str | None) -> list[Fault]:
        if pem is None or self._bound is not None:
            return []  # a root that is in force stays so: what stands at its path now is for ``tend`` to report
        where = self._where(self._root)
        return root_faults(pem, where=where, effective=self._configuration.effective, now=self._clock.now())

    def _needs(self, survey: _Survey) -> list[preflight.Need]:
        lease = self._session.lease
        renewable = lease is not None and lease.renewable
        mounted = survey.root.presence is Presence.MOUNTED
        ours = survey.intermediate.presence is Presence.FREE or survey.intermediate.description == self._description
        return [
            *preflight.token_needs(self._session.endpoint.namespace, renewable=renewable),
            *preflight.root_needs(
                self._root.namespace, self._root.path, mounted=mounted, generated=survey.root_pem is None
            ),
            *preflight.intermediate_needs(
                self._signers.namespace, self._signers.path, self._role, ours=ours and survey.intermediate.managed
            ),
        ]

    async def _standing_root(self, survey: _Survey, epoch: int) -> str:
        """The root in force, or the one at the root path, generated if need be."""
        if self._bound is not None:
            return self._bound.root_pem
        if survey.root_pem is not None:
            return survey.root_pem
        engine, effective = self._root, self._configuration.effective
        if survey.root.presence is Presence.FREE:
            await engine.create(f"root CA of caserver cluster {self._cluster_id}")
        await engine.generate_root(
            name=self._name(epoch),
            common_name=self._common_name(epoch),
            uri=signing_uri(self._trust_domain),
            key_type=effective.private_key_type,
            key_bits=effective.private_key_bits,
            ttl=effective.root_ttl,
        )
        pem = await engine.default_pem()
        if pem is None:
            raise ProviderRefused(
                f"a root was generated at {self._where(engine)}, and it is not the default issuer there"
            )
        return pem

    async def _intermediate(
        self, survey: _Survey, root_pem: str, root: Issuer, *, now: datetime, epoch: int
    ) -> tuple[str, Issuer]:
        """This epoch's intermediate and its issuer: found, or made and imported."""
        engine, effective = self._signers, self._configuration.effective
        if survey.intermediate.presence is Presence.FREE:
            await engine.create(self._description)
        key_id = (await engine.keys()).get(self._name(epoch))
        found = None if key_id is None else await self._found(key_id, root_pem, now)
        if found is not None:
            return found
        csr = await self._csr(key_id, epoch) or await self._csr((await engine.keys()).get(self._name(epoch)), epoch)
        if csr is None:
            raise ProviderRefused(f"{self._where(engine)} has the key {self._name(epoch)} and does not list it")
        ends = min(now + timedelta(seconds=effective.intermediate_ttl), load_certificate(root_pem).not_valid_after_utc)
        pem = await self._root.sign_ca(root.id, csr, not_after=ends, path_length=0)
        if not is_issued_by(pem, root_pem):
            raise ProviderRefused(f"{self._where(self._root)} signed the intermediate by another root than it shows")
        await engine.take_signed(pem)
        issuer = await engine.issuer_of(pem)
        if issuer is None or not issuer.key_id:
            raise ProviderRefused(f"{self._where(engine)} took the intermediate in without its key")
        return pem, issuer

    async def _csr(self, key_id: str | None, epoch: int) -> str | None:
        """A CSR for this epoch's intermediate; None if somebody (a leader that was deposed) made its key just now."""
        effective = self._configuration.effective
        return await self._signers.request_intermediate(
            key_id=key_id,
            name=self._name(epoch),
            common_name=self._common_name(epoch),
            uri=signing_uri(self._trust_domain),
            key_type=effective.private_key_type,
            key_bits=effective.private_key_bits,
        )

    async def _found(self, key_id: str, root_pem: str, now: datetime) -> tuple[str, Issuer] | None:
        """An intermediate that an earlier attempt at the same epoch made, if it is of any use."""
        least = (now + timedelta(seconds=self._configuration.effective.leaf_ttl)).timestamp()
        for issuer in await self._signers.issuers():
            pem = await self._signers.issuer_pem(issuer.id) if issuer.key_id == key_id else None
            if pem is not None and is_issued_by(pem, root_pem) and describe(pem).not_after >= least:
                return pem, issuer
        return None

    async def _leave_default(self, doomed: Sequence[Issuer], kept: Backend) -> None:
        """Where the default issuer is one of ours that goes, the one in force takes its place."""
        if not kept or not doomed:
            return
        default = await self._signers.default_pem()
        issuer = None if default is None else await self._signers.issuer_of(default)
        if issuer is not None and issuer in doomed:
            await self._signers.make_default(kept["issuer"])

    def _require_bound(self) -> _Bound:
        if self._bound is None:
            raise ProviderUnavailable("the Vault provider has no issuer yet; set the configuration again")
        return self._bound


def _judged(order: SigningOrder, signed: str | CaserverError) -> SignedLeaf | CaserverError:
    """The leaf, unless it would live longer than was booked; that it is what was ordered is for the caller to check."""
    if isinstance(signed, CaserverError):
        return signed
    try:
        certificate = x509.load_pem_x509_certificate(signed.encode())
    except ValueError:
        return ProviderUnavailable("Vault answered with something else than a certificate; it was thrown away")
    if certificate.not_valid_after_utc.timestamp() > order.not_after:
        return ProviderUnavailable("Vault signed a leaf that would live longer than was booked; it was thrown away")
    return SignedLeaf(issue_id=order.issue_id, pem=signed, serial=certificate.serial_number)


def _bound_of(root: CARoot) -> _Bound | None:
    backend = dict(root.backend)
    if not {"root_issuer", "issuer", "key", "role"} <= backend.keys():
        return None
    signer = next((pem for pem in root.intermediates if describe(pem).signing_key_id == root.signing_key_id), root.pem)
    return _Bound(root.pem, signer, backend["root_issuer"], backend["issuer"], backend["key"], backend["role"])


def _kept_here(keep: Backend | None, engine: PKIEngine, issuers: Sequence[Issuer]) -> Backend:
    """What of ``keep`` lies in this engine: one at the same path may be that of another server."""
    if keep is None or (keep.get("namespace"), keep.get("path")) != (engine.namespace, engine.path):
        return {}
    return keep if keep.get("issuer") in {each.id for each in issuers} else {}


def _place_faults(root: PKIEngine, intermediate: PKIEngine) -> list[Fault]:
    """One engine for both, be it by another name: removing an intermediate there would remove the root's key."""
    if root.place != intermediate.place:
        return []
    heading = f"{_HEADING}{root.place} is RootPKIPath and IntermediatePKIPath"
    return [Fault("IntermediatePKIPath", "is RootPKIPath too", "give the intermediate a path of its own", heading)]


def _mount_faults(key: str, where: str, mount: Mount, engine: PKIEngine) -> list[Fault]:
    if mount.presence is Presence.HIDDEN:
        heading = f"{_HEADING}nothing that the Vault token may use is at {where}"
        line = preflight.Need(engine.namespace, f"sys/mounts/{engine.path}", ("read", "update", "delete")).line
        remedy = f"mount a pki engine there, or have it mounted: {line}"
        return [Fault(key, f"{where} is not mounted, or the token has no permission below it", remedy, heading)]
    if mount.presence is Presence.ENCLOSED:
        heading = f"{_HEADING}nothing can be mounted at {where}"
        return [
            Fault(key, f"the {mount.kind} engine {mount.description} lies around it", "give a path beside it", heading)
        ]
    if mount.presence is Presence.MOUNTED and mount.kind != "pki":
        heading = f"{_HEADING}{where} is a {mount.kind} mount"
        return [
            Fault(
                key,
                f"{where} is a {mount.kind} mount, not pki",
                "give the path of a pki engine, or a free one",
                heading,
            )
        ]
    return []
