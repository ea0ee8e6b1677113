"""The built-in provider, Consul's name ``consul``: the CA key lives in the replicated state, sealed, and signs here.

The root is either generated (``PrivateKeyType``, ``PrivateKeyBits``), made for the operator's ``PrivateKey``, or the
operator's own ``RootCert`` with its key. The root signs leaves itself, so there are no intermediates of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa

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
from caserver.environment import Clock, Entropy, PrivateKey, Workers
from caserver.errors import CaserverError, InvalidConfig, ProviderRefused
from caserver.fields import Fault, Secret, fault_text
from caserver.pki.certificates import (
    LeafTemplate,
    cross_sign,
    describe,
    make_root,
    make_root_csr,
    operator_root_faults,
    root_common_name,
    serial_from,
)
from caserver.pki.keys import key_info, load_private_key, pkcs8_pem
from caserver.pki.leaf_der import Issuer
from caserver.pki.spiffe import cluster_id_of_root
from caserver.state.configuration import CAConfiguration
from caserver.state.model import CARoot, RootID

ROOT_BACKDATED = 300  # seconds that a generated root's NotBefore lies in the past, so that no leaf predates it
TEND_AGAIN = 3600.0  # seconds
_QUICK_BITS = 256  # EC keys up to this size sign in tens of microseconds, on the loop; all others in a worker
_WEAK_BITS = 224

T = TypeVar("T")


def builtin_kind(clock: Clock, entropy: Entropy, workers: Workers) -> ProviderKind:
    """What to register under ``consul``."""

    def build(
        configuration: CAConfiguration, *, trust_domain: str, root: CARoot | None, root_key: Secret | None
    ) -> Provider:
        bound = None
        if root is not None and root_key is not None:
            bound = _Bound(root_pem=root.pem, key=load_private_key(root_key, judged=True))
        return BuiltinProvider(
            configuration, trust_domain=trust_domain, clock=clock, entropy=entropy, workers=workers, bound=bound
        )

    return ProviderKind(build)


def seed_faults(configuration: CAConfiguration, *, now: datetime, spare_id: str, validity: bool) -> list[Fault]:
    """Everything that keeps a first configuration from founding a cluster, as far as its text alone tells.

    ``spare_id`` is a new cluster id to propose where neither the configuration nor its root names one. A cluster that
    was founded long ago still has the root that seeded it in its files, so only ``validity`` judges the root's life.
    """
    try:
        key = None if configuration.private_key is None else load_private_key(configuration.private_key)
    except InvalidConfig as exc:
        return [Fault("PrivateKey", exc.detail)]
    if configuration.root_cert is None:
        return []
    cluster_id, faults = configuration.cluster_id or cluster_id_of_root(configuration.root_cert), []
    if cluster_id is None:
        remedy = f'set ClusterID = "{spare_id}" (or another UUID), and make a root that carries it'
        faults.append(Fault("RootCert", "names no cluster, and there is no ClusterID beside it", remedy))
    return faults + operator_root_faults(
        configuration.root_cert,
        key,
        trust_domain=f"{cluster_id or spare_id}.consul",
        now=now,
        leaf_ttl=configuration.effective.leaf_ttl if validity else None,
    )


@dataclass(frozen=True, slots=True)
class _Bound:
    """A root and its key."""

    root_pem: str
    key: PrivateKey = field(repr=False)

    @property
    def quick(self) -> bool:
        return not isinstance(self.key, rsa.RSAPrivateKey) and self.key.key_size <= _QUICK_BITS


class BuiltinProvider:
    """Signs with a key of this process; satisfies the authority's ``Provider`` port."""

    def __init__(
        self,
        configuration: CAConfiguration,
        *,
        trust_domain: str,
        clock: Clock,
        entropy: Entropy,
        workers: Workers,
        bound: _Bound | None = None,
    ) -> None:
        self._configuration = configuration
        self._trust_domain = trust_domain
        self._clock = clock
        self._entropy = entropy
        self._workers = workers
        self._bound = bound
        self._issuer: Issuer | None = None
        self._given: PrivateKey | None = None  # the configured key, read once

    async def inspect(self) -> Inspection:
        """The operator's root if it is fit for this cluster (InvalidConfig with every fault if not), else none yet."""
        configuration = self._configuration
        key = self._operator_key()
        if configuration.root_cert is None:
            kind, bits = self._generated_kind() if key is None else key_info(key.public_key())
            return Inspection(root_id=None, root_pem=None, warnings=_weak(kind, bits))
        self._check_operator_root(configuration.root_cert, key)
        facts = describe(configuration.root_cert)
        return Inspection(
            root_id=RootID(facts.id), root_pem=configuration.root_cert, warnings=_weak(facts.key_type, facts.key_bits)
        )

    async def prepare(self, *, now: datetime, epoch: int) -> Prepared:
        """The root of the configuration with its key; generated at the first call, the same ever after."""
        inspection = await self.inspect()
        if self._bound is None:
            self._bound = await self._make(now)
        bound = self._bound
        return Prepared(
            root_pem=bound.root_pem,
            root_key=pkcs8_pem(bound.key),
            warnings=inspection.warnings,
            root_csr=await self._signing(make_root_csr, bound.root_pem, bound.key),
        )

    async def sign_leaves(self, orders: Sequence[SigningOrder]) -> Sequence[SignedLeaf | CaserverError]:
        """Sign each order with the serial that was booked for it."""
        return await self._signing(self._sign_all, orders)

    async def cross_sign(
        self, certificate_pem: str, *, csr_pem: str | None, serial: int, not_before: datetime, not_after: datetime
    ) -> str:
        """Issue the given root's subject and key under this provider's root, never beyond its life; no request is needed."""
        bound = self._require_bound()
        issue = partial(
            cross_sign,
            certificate_pem,
            issuer_pem=bound.root_pem,
            issuer_key=bound.key,
            serial=serial,
            not_before=not_before,
            not_after=not_after,
        )
        return await self._signing(issue)

    async def retire(self, *, epochs: tuple[int, ...], keep: Backend | None) -> None:
        """Nothing is kept anywhere but in the replicated state, which prunes itself."""

    async def tend(self, now: datetime) -> Tended:
        """Nothing wears out."""
        return Tended(next_in=TEND_AGAIN)

    def close(self) -> None:
        """Nothing is held."""

    async def _signing(self, function: Callable[..., T], *args: object) -> T:
        """Run what signs: here if the key is quick, else where it does not hold the loop."""
        if self._require_bound().quick:
            return function(*args)
        return await self._workers.run(function, *args)

    def _sign_all(self, orders: Sequence[SigningOrder]) -> list[SignedLeaf | CaserverError]:
        if self._issuer is None:
            bound = self._require_bound()
            self._issuer = Issuer(bound.root_pem, bound.key)
        return [_sign(self._issuer, order) for order in orders]

    def _require_bound(self) -> _Bound:
        if self._bound is None:
            raise RuntimeError("the built-in provider was asked to sign before it had a root")
        return self._bound

    def _operator_key(self) -> PrivateKey | None:
        """The configured key; InvalidConfig with Consul's text in front if it cannot be used."""
        given = self._configuration.private_key
        if given is None or self._given is not None:
            return self._given
        try:
            self._given = load_private_key(given)
        except InvalidConfig as exc:
            if self._configuration.root_cert is not None:
                raise InvalidConfig(f"error configuring provider: {exc.detail}") from exc
            raise InvalidConfig(f"error generating CA root certificate: error generating CA: {exc.detail}") from exc
        return self._given

    def _check_operator_root(self, root_cert: str, key: PrivateKey | None) -> None:
        if key is None:
            heading = "error configuring provider: must provide a private key when providing a root cert"
            remedy = "give the key of that certificate"
            raise InvalidConfig(fault_text([Fault("PrivateKey", "is missing beside RootCert", remedy, heading)]))
        faults = operator_root_faults(
            root_cert,
            key,
            trust_domain=self._trust_domain,
            now=self._clock.now(),
            leaf_ttl=self._configuration.effective.leaf_ttl,
        )
        if faults:
            raise InvalidConfig(fault_text(faults))

    def _generated_kind(self) -> tuple[str, int]:
        effective = self._configuration.effective
        return effective.private_key_type, effective.private_key_bits

    async def _make(self, now: datetime) -> _Bound:
        key = self._operator_key()
        root_cert = self._configuration.root_cert
        if key is not None and root_cert is not None:
            return _Bound(root_pem=root_cert, key=key)
        if key is None:
            key = await self._generate_key()
        not_before = now.replace(microsecond=0) - timedelta(seconds=ROOT_BACKDATED)
        make = partial(
            make_root,
            key,
            trust_domain=self._trust_domain,
            common_name=root_common_name(self._trust_domain, self._entropy.bytes(16)),
            serial=serial_from(self._entropy.bytes(16)),
            not_before=not_before,
            not_after=not_before + timedelta(seconds=self._configuration.effective.root_ttl),
        )
        return _Bound(root_pem=await self._workers.run(make), key=key)

    async def _generate_key(self) -> PrivateKey:
        kind, bits = self._generated_kind()
        return await self._workers.run(self._entropy.private_key, kind, bits)


def _sign(issuer: Issuer, order: SigningOrder) -> SignedLeaf | CaserverError:
    if order.serial is None:
        return ProviderRefused("the built-in provider signs only leaves whose serial was booked")
    template = LeafTemplate(
        spiffe_uri=order.spiffe_uri,
        common_name=order.common_name,
        public_key=order.public_key,
        serial=order.serial,
        not_before=order.not_before,
        not_after=order.not_after,
    )
    try:
        return SignedLeaf(issue_id=order.issue_id, pem=issuer.sign(template), serial=order.serial)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # One odd public key must not take the batch with it.
        return ProviderRefused("the public key of the request cannot be certified; make a new P-256 key")


def _weak(kind: str, bits: int) -> tuple[str, ...]:
    if kind == "ec" and bits == _WEAK_BITS:
        return ("P-224 is weaker than what today's TLS stacks accept; P-256 is the better choice",)
    return ()
