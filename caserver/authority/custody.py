"""Opens CA keys: from the replicated state alone to a provider that can sign.

Whatever signs was read back from the log and unsealed here, so the key in use is always the key that the next leader
would find. Nothing is kept that cannot be rebuilt from the state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key

from caserver.authority.ports import Provider, ProviderKind, Providers
from caserver.errors import Corrupt, InvalidConfig, NotInitialized, ProviderUnavailable
from caserver.fields import Secret
from caserver.internode.keyring import Keyring, Sealed
from caserver.pki.certificates import describe
from caserver.pki.keys import load_private_key
from caserver.state.configuration import CAConfiguration, open_stored
from caserver.state.model import CARoot, CAState, Effective, RootID, StoredConfiguration
from caserver.state.vault_configuration import VaultLocal

_ENDS_WITH_ROOT = 3600  # seconds before its root: what a backend may have cut off when it dated the certificate
HMAC_KEY_PURPOSE = "acl/hmac-key"  # associated data of the sealed key that token hashes are made with


def root_key_purpose(root_id: str) -> str:
    """Associated data under which the key of a root is sealed: a key cannot be passed off as another root's."""
    return f"ca-root/{root_id}"


def seal_root_key(key: Secret, keyring: Keyring, *, root_id: RootID, nonce: bytes) -> Sealed:
    """Seal the CA key that a provider prepared (PKCS#8 PEM) as the state carries it (PKCS#8 DER)."""
    der = load_private_key(key, judged=True).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return keyring.seal(der, purpose=root_key_purpose(root_id), nonce=nonce)


def open_root_key(root: CARoot, keyring: Keyring) -> Secret | None:
    """The CA key of ``root`` as PKCS#8 PEM; None if the state holds none. Corrupt if it does not open."""
    if root.sealed_key is None:
        return None
    der = keyring.open(root.sealed_key, purpose=root_key_purpose(root.id))
    private = load_der_private_key(der, password=None, unsafe_skip_rsa_key_validation=True)  # judged, then sealed
    return Secret(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())


@dataclass(frozen=True, slots=True)
class Signing:
    """What signs leaves at one CA epoch."""

    root: CARoot
    epoch: int
    trust_domain: str
    effective: Effective
    provider: Provider = field(repr=False)
    issuer_pem: str  # the certificate whose key signs leaves
    issuer_not_before: int
    issuer_not_after: int
    hops: tuple[tuple[str, int], ...]  # the root's intermediates with the NotAfter of each
    chooses_serials: bool = False  # and instants: the provider signs elsewhere

    def travelling(self, now: int) -> str:
        """What follows a leaf in its chain: every intermediate that has not expired, PEM, one newline after each."""
        return "".join(hop.rstrip("\n") + "\n" for hop, not_after in self.hops if not_after > now)


class Custody:
    """Builds providers: unbound ones for a new configuration, bound ones for what the state lists."""

    def __init__(self, providers: Providers, keyring: Keyring) -> None:
        self._providers = providers
        self._keyring = keyring
        self._cached: tuple[tuple[RootID, int, int], Signing] | None = None
        self._previous: Signing | None = None  # kept open for leaves that were booked under it

    @property
    def vault_local(self) -> VaultLocal:
        """What this server knows of Vault by itself."""
        return self._providers.vault_local

    @property
    def keyring(self) -> Keyring:
        """What seals and opens."""
        return self._keyring

    def signing(self, state: CAState) -> Signing:
        """What signs leaves in ``state``; NotInitialized without an active root, ProviderUnavailable if its key does not open."""
        root, configuration, trust_domain = state.active_root, state.configuration, state.trust_domain
        if root is None or configuration is None or trust_domain is None:
            raise NotInitialized("the CA has no active root yet; try again in a moment")
        version = (root.id, state.ca_epoch, configuration.modify_index)
        if self._cached is not None and self._cached[0] == version:
            return self._cached[1]
        try:
            signing = self._open(state, root, configuration.stored, trust_domain)
        except Corrupt as exc:
            raise ProviderUnavailable(f"the key of the active root {root.id} cannot be used: {exc}") from exc
        if self._previous is not None:
            self._previous.provider.close()
        self._previous = None if self._cached is None else self._cached[1]
        self._cached = (version, signing)
        return signing

    def forget(self) -> None:
        """Drop every opened key and let the providers go."""
        for signing in (self._previous, None if self._cached is None else self._cached[1]):
            if signing is not None:
                signing.provider.close()
        self._cached = self._previous = None

    @contextmanager
    def provider(self, configuration: CAConfiguration, root: CARoot | None, *, trust_domain: str) -> Iterator[Provider]:
        """A provider for a configuration, bound to ``root`` if there is one; closed afterwards.

        InvalidConfig for one that is not known.
        """
        with closing(self._bound(configuration, root, trust_domain)) as provider:
            yield provider

    def _bound(self, configuration: CAConfiguration, root: CARoot | None, trust_domain: str) -> Provider:
        key = None if root is None else open_root_key(root, self._keyring)
        build = self.kind(configuration.provider).build
        return build(configuration, trust_domain=trust_domain, root=root, root_key=key)

    def _open(self, state: CAState, root: CARoot, stored: StoredConfiguration, trust_domain: str) -> Signing:
        issuer_pem = signer_of(root)
        issuer = describe(issuer_pem)
        return Signing(
            root=root,
            epoch=state.ca_epoch,
            trust_domain=trust_domain,
            effective=stored.effective,
            provider=self._bound(open_stored(stored, self._keyring), root, trust_domain),
            issuer_pem=issuer_pem,
            issuer_not_before=issuer.not_before,
            issuer_not_after=issuer.not_after,
            hops=tuple((pem, describe(pem).not_after) for pem in root.intermediates),
            chooses_serials=self.kind(stored.provider).chooses_serials,
        )

    def kind(self, name: str) -> ProviderKind:
        """What the provider of this name is; InvalidConfig for one that is not known."""
        kind = self._providers.kinds.get(name)
        if kind is None:
            raise InvalidConfig(f'could not initialize provider: unknown CA provider "{name}"')
        return kind


def renewal_at(signing: Signing) -> int | None:
    """When to renew what signs leaves: at half its life, and while it still outlives a leaf and a quarter; None = never.

    The root itself is not renewed but rotated, and a certificate that ends with its root would not end later anew. One
    that lives too short for its leaves is renewed after a third of its life, so that this never becomes a loop.
    """
    if signing.issuer_pem == signing.root.pem or signing.issuer_not_after >= signing.root.not_after - _ENDS_WITH_ROOT:
        return None
    life = signing.issuer_not_after - signing.issuer_not_before
    leaf = signing.effective.leaf_ttl
    latest = signing.issuer_not_after - leaf - leaf // 4
    return signing.issuer_not_before + max(life // 3, min(life // 2, latest - signing.issuer_not_before))


def cross_signed_hops(root: CARoot) -> tuple[str, ...]:
    """What leaves carry beside the certificate that signs them: the ways to other roots."""
    issuer = signer_of(root)
    return tuple(pem for pem in root.intermediates if pem != issuer)


def signer_of(root: CARoot) -> str:
    """The certificate (PEM) whose key signs leaves: the root itself, or an intermediate; NotInitialized if there is none."""
    # Cross-signed copies of the root carry its key id too: the root itself comes first.
    for pem in (root.pem, *root.intermediates):
        if describe(pem).signing_key_id == root.signing_key_id:
            return pem
    raise NotInitialized(f"no certificate of root {root.id} has the signing key id {root.signing_key_id}")
