"""Providers on a real server: configurations, instances bound as a later leader would bind them, and what they left behind."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from immutables import Map

from caserver.authority.ports import Prepared, Provider, ProviderKind, SigningOrder
from caserver.environment import SystemClock, ThreadWorkers
from caserver.fields import Secret
from caserver.pki.certificates import describe
from caserver.pki.csr import make_csr
from caserver.pki.keys import public_key_der
from caserver.providers.vault.kind import vault_kind
from caserver.state.configuration import CAConfiguration
from caserver.state.model import CARoot, Effective, Index, RootID
from caserver.state.vault_configuration import VaultConfiguration, VaultLocal
from tests.testkit.keys import key_pem, private_key
from tests.testkit.nodes import TRUST_DOMAIN
from tests.testkit.openbao import Server, unique

THREADS = 4
DAY = timedelta(days=1)


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


@dataclass(slots=True)
class VaultLab:
    """One server and the providers of one process that use it."""

    server: Server
    local: VaultLocal = field(default_factory=VaultLocal)
    threads: int = THREADS
    made: list[Provider] = field(default_factory=list)
    workers: ThreadWorkers = field(init=False)

    def __post_init__(self) -> None:
        self.workers = ThreadWorkers(self.threads)

    def kind(self) -> ProviderKind:
        """What a daemon registers; each has sessions of its own."""
        return vault_kind(self.local, clock=SystemClock(), workers=self.workers, pool_size=self.threads)

    def configuration(
        self,
        *,
        root: str | None = None,
        intermediate: str | None = None,
        effective: Effective | None = None,
        **vault: Any,
    ) -> CAConfiguration:
        """A configuration of this server with its root token; both paths are fresh ones unless given."""
        if not vault.keys() & {"token", "token_file", "auth_method"}:
            vault["token"] = Secret(self.server.token)
        vault.setdefault("address", self.server.address)
        wanted = VaultConfiguration(
            root_pki_path=root or unique("root"), intermediate_pki_path=intermediate or unique("intermediate"), **vault
        )
        return CAConfiguration(provider="vault", given={}, effective=effective or Effective(), vault=wanted)

    def provider(
        self, configuration: CAConfiguration, root: CARoot | None = None, kind: ProviderKind | None = None
    ) -> Provider:
        """A provider as a leader builds it: for a new configuration, or bound to ``root``."""
        build = (kind or self.kind()).build
        provider = build(configuration, trust_domain=TRUST_DOMAIN, root=root, root_key=None)
        self.made.append(provider)
        return provider

    def close(self) -> None:
        for provider in self.made:
            provider.close()
        self.workers.close()


def listed(prepared: Prepared, *, provider: str = "vault") -> CARoot:
    """The root as the replicated state would list it after ``prepared``."""
    facts = describe(prepared.root_pem)
    signer = describe(prepared.intermediates[0]) if prepared.intermediates else facts
    return CARoot(
        id=RootID(facts.id),
        name="",
        pem=prepared.root_pem,
        serial=facts.serial,
        not_before=facts.not_before,
        not_after=facts.not_after,
        key_type=facts.key_type,
        key_bits=facts.key_bits,
        signing_key_id=signer.signing_key_id,
        provider=provider,
        intermediates=prepared.intermediates,
        sealed_key=None,
        active=True,
        rotated_out_at=None,
        leaf_not_after_max=0,
        leaf_ttl_max=0,
        live_by_hour=Map(),
        create_index=Index(1),
        modify_index=Index(1),
        backend=tuple(sorted(prepared.backend.items())),
    )


def order(
    number: int = 1, *, service: str = "web", serial: int | None = None, ttl: int = 3600, key: str = "ec-256-b"
) -> SigningOrder:
    """A leaf for a service, its CSR made with a key of the testkit."""
    uri = f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/{service}"
    at = int(now().timestamp())
    return SigningOrder(
        issue_id=str(number),
        serial=serial,
        spiffe_uri=uri,
        common_name=f"{service}.svc.default.2a3b4c5d.consul",
        public_key=public_key_der(private_key(key).public_key()),
        csr_pem=make_csr(private_key(key), uri),
        not_before=at - 60,
        not_after=at - 60 + ttl,
    )


def with_vault(configuration: CAConfiguration, **changes: Any) -> CAConfiguration:
    """The same configuration with other Vault settings."""
    assert configuration.vault is not None
    return replace(configuration, vault=replace(configuration.vault, **changes))


def path_of(configuration: CAConfiguration) -> tuple[str, str]:
    """Root path and intermediate path."""
    assert configuration.vault is not None
    return configuration.vault.root_pki_path, configuration.vault.intermediate_pki_path


def own_root(
    *,
    key: str = "ec-256",
    path_length: int | None = None,
    ca: bool = True,
    begins: timedelta = -DAY,
    ends: timedelta = 365 * DAY,
) -> str:
    """A root as openssl makes them: a name of several parts, in UTF-8."""
    private = private_key(key)
    parts = ((NameOID.COUNTRY_NAME, "DE"), (NameOID.ORGANIZATION_NAME, "Örg"), (NameOID.COMMON_NAME, unique("My Root")))
    name = x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() + begins)
        .not_valid_after(now() + ends)
        .add_extension(x509.BasicConstraints(ca, path_length), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
    )
    return builder.sign(private, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def imported(server: Server, certificate: str, *, key: str = "ec-256") -> str:
    """A mount that holds a certificate and its key."""
    path = server.mount(unique("imported"))
    server.ask("POST", f"{path}/issuers/import/bundle", {"pem_bundle": certificate + key_pem(key)})
    return path
