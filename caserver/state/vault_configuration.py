"""What a configuration of the provider ``vault`` means, and what a node knows of Vault by itself.

An address or a token that is not in the configuration comes from the environment of the server that leads; the two never
mix, so that a server's own token never travels to an address that somebody else wrote. Files are named, never read here:
each server looks for them below its own ``connect { file_dir }``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from caserver.fields import Secret


class Holds(StrEnum):
    """What the value of a login parameter is."""

    PLAIN = "plain"
    SECRET = "secret"  # noqa: S105 -- a kind of value
    FILE = "file"  # a name below file_dir


@dataclass(frozen=True, slots=True)
class AuthKind:
    """The parameters of one way to log in; of each group of ``needs`` at least one must be there."""

    params: Mapping[str, Holds]
    needs: tuple[tuple[str, ...], ...] = ()


AUTH_KINDS: Mapping[str, AuthKind] = {
    "approle": AuthKind(
        {
            "role_id": Holds.PLAIN,
            "role_id_file_path": Holds.FILE,
            "secret_id": Holds.SECRET,
            "secret_id_file_path": Holds.FILE,
        },
        (("role_id", "role_id_file_path"),),
    ),
    "cert": AuthKind({"name": Holds.PLAIN}),
    "jwt": AuthKind({"role": Holds.PLAIN, "jwt": Holds.SECRET, "path": Holds.FILE}, (("jwt", "path"),)),
    "kubernetes": AuthKind(
        {"role": Holds.PLAIN, "jwt": Holds.SECRET, "token_path": Holds.FILE}, (("role",), ("jwt", "token_path"))
    ),
    "userpass": AuthKind({"username": Holds.PLAIN, "password": Holds.SECRET}, (("username",), ("password",))),
}


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

    @property
    def secrets(self) -> dict[str, str]:
        """The secret parameters in the open, by name."""
        return {name: value.reveal() for name, value in self.params if isinstance(value, Secret)}

    @property
    def files(self) -> dict[str, str]:
        """The parameters that name files."""
        kinds = AUTH_KINDS[self.type].params if self.type in AUTH_KINDS else {}
        return {name: value for name, value in self.params if kinds.get(name) is Holds.FILE and isinstance(value, str)}


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

    @property
    def files(self) -> dict[str, str]:
        """Every name below file_dir, by the key that gives it."""
        own = {
            "TokenFile": self.token_file,
            "CAFile": self.ca_file,
            "CAPath": self.ca_path,
            "CertFile": self.cert_file,
            "KeyFile": self.key_file,
        }
        params = {} if self.auth_method is None else self.auth_method.files
        return {key: name for key, name in own.items() if name is not None} | {
            f"AuthMethod.Params.{key}": name for key, name in params.items()
        }

    @property
    def place(self) -> tuple[object, ...]:
        """What a stored secret stays with: it never follows the configuration to another address or path."""
        return (
            self.address,
            self.root_namespace,
            self.root_pki_path,
            self.intermediate_namespace,
            self.intermediate_pki_path,
        )

    def known_as(self, other: VaultConfiguration) -> VaultConfiguration | None:
        """The same places as ``other`` gets to its own; None if it does so alike, or for another server or namespace.

        That is with its credentials, and with its TLS: a token goes nowhere with less protection than it was given for.
        """
        if (self.address, self.namespace) != (other.address, other.namespace):
            return None
        known = replace(
            other,
            root_pki_path=self.root_pki_path,
            root_pki_namespace=self.root_pki_namespace,
            intermediate_pki_path=self.intermediate_pki_path,
            intermediate_pki_namespace=self.intermediate_pki_namespace,
        )
        return None if known == self else known


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
