"""What a configuration of the provider ``vault`` means, and what a node knows of Vault by itself.

An address or a token that is not in the configuration comes from the environment of the server that leads; the two never
mix, so that a server's own token never travels to an address that somebody else wrote. Files are named, never read here:
each server looks for them below its own ``connect { file_dir }``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from caserver.fields import Secret


@dataclass(frozen=True, slots=True)
class VaultAuthMethod:
    """How to log in where no token is given."""

    type: str  # approle, userpass, jwt, kubernetes or cert
    mount_path: str  # without slashes at its ends
    params: tuple[tuple[str, str | Secret], ...] = ()  # by Vault's names (snake_case), sorted

    def param(self, name: str) -> str | None:
        """The value of a parameter in the open, or None."""
        value = dict(self.params).get(name)
        return value.reveal() if isinstance(value, Secret) else value


@dataclass(frozen=True, slots=True)
class VaultConfiguration:
    """Where the CA keys are and how to get there; paths and namespaces are without slashes at their ends."""

    root_pki_path: str
    intermediate_pki_path: str
    address: str | None = (
        None  # URL without a final slash; None: VAULT_ADDR of the server that leads, with its VAULT_TOKEN
    )
    token: Secret | None = None
    token_file: str | None = None  # a name below file_dir, like every file here
    auth_method: VaultAuthMethod | None = None
    namespace: str = ""
    root_pki_namespace: str = ""
    intermediate_pki_namespace: str = ""
    ca_cert: str | None = field(default=None, repr=False)  # PEM, inline
    ca_file: str | None = None
    ca_path: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    tls_server_name: str | None = None
    tls_skip_verify: bool = False

    @property
    def root_namespace(self) -> str:
        """The namespace of the root path; empty for the root namespace of the server."""
        return self.root_pki_namespace or self.namespace

    @property
    def intermediate_namespace(self) -> str:
        """The namespace of the intermediate path."""
        return self.intermediate_pki_namespace or self.namespace


@dataclass(frozen=True, slots=True)
class VaultLocal:
    """What one server knows of Vault by itself: used with configurations that name no address, except ``file_dir``."""

    address: str | None = None
    token: Secret | None = None
    namespace: str = ""
    ca_cert: Path | None = None
    ca_path: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    tls_server_name: str | None = None
    skip_verify: bool = False
    file_dir: Path | None = None  # of ``connect``; None: configurations may name no files

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], *, file_dir: Path | None) -> VaultLocal:
        """Vault's own variables, ``VAULT_ADDR`` and its kin; those without ``VAULT_ADDR`` count for nothing."""
        address = environ.get("VAULT_ADDR", "").strip().rstrip("/")
        if not address:
            return cls(file_dir=file_dir)

        def path(name: str) -> Path | None:
            return Path(environ[name]) if environ.get(name) else None

        token = environ.get("VAULT_TOKEN", "").strip()
        return cls(
            address=address,
            token=Secret(token) if token else None,
            namespace=environ.get("VAULT_NAMESPACE", "").strip("/"),
            ca_cert=path("VAULT_CACERT"),
            ca_path=path("VAULT_CAPATH"),
            client_cert=path("VAULT_CLIENT_CERT"),
            client_key=path("VAULT_CLIENT_KEY"),
            tls_server_name=environ.get("VAULT_TLS_SERVER_NAME") or None,
            skip_verify=environ.get("VAULT_SKIP_VERIFY", "").lower() in ("1", "t", "true"),
            file_dir=file_dir,
        )
