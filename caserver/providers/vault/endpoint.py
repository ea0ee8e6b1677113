"""Which server a configuration means on this node, and with whose secrets.

A configuration travels to every node; VAULT_ADDR, VAULT_TOKEN and files are a node's own. A node's own secret goes only to
an address that came from the same local source, and every file lies below the node's ``connect { file_dir }``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from caserver.errors import InvalidConfig
from caserver.fields import Fault, Secret, fault_text
from caserver.state.vault_configuration import VaultAuthMethod, VaultConfiguration, VaultLocal

_HEADING = "error configuring provider: "
_UNSAFE = re.compile(r"[\x00-\x20\x7f-\U0010ffff]")  # what an HTTP header or a URL cannot carry


@dataclass(frozen=True, slots=True)
class Login:
    """An auth method with its parameters; those that are read from files at every login are apart."""

    type: str
    mount_path: str
    params: tuple[tuple[str, Secret], ...]
    files: tuple[tuple[str, Path], ...] = ()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, how to trust it and how to be known to it. Two that are equal may share connections and token."""

    address: str  # a URL without credentials, query and fragment: safe to show
    namespace: str = ""
    token: Secret | None = None
    token_file: Path | None = None
    login: Login | None = None
    ca_cert: str | None = field(default=None, repr=False)  # PEM
    ca_file: Path | None = None
    ca_path: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    tls_server_name: str | None = None
    tls_skip_verify: bool = False

    @property
    def is_https(self) -> bool:
        """Whether it is talked to through TLS."""
        return self.address.startswith("https://")


def resolve(wanted: VaultConfiguration, local: VaultLocal) -> Endpoint:
    """The server that ``wanted`` means on this node; InvalidConfig names everything that is missing or not allowed."""
    faults: list[Fault] = []
    named = wanted.address is not None
    address = _address(wanted, local, faults)
    files = _Files(local.file_dir, faults)
    own = local if not named else VaultLocal()  # the environment goes with its own address only
    token = _token(wanted, local, faults)
    given = wanted.cert_file is not None or wanted.key_file is not None
    trusts = wanted.ca_cert or wanted.ca_file or wanted.ca_path
    endpoint = Endpoint(
        address=address,
        namespace=wanted.namespace or own.namespace,
        token=token,
        token_file=files.path("TokenFile", wanted.token_file),
        login=None if wanted.auth_method is None else _login(wanted.auth_method, files),
        ca_cert=wanted.ca_cert,
        ca_file=files.path("CAFile", wanted.ca_file) if trusts else own.ca_cert,
        ca_path=files.path("CAPath", wanted.ca_path) if trusts else own.ca_path,
        cert_file=files.path("CertFile", wanted.cert_file) if given else own.client_cert,
        key_file=files.path("KeyFile", wanted.key_file) if given else own.client_key,
        tls_server_name=wanted.tls_server_name or own.tls_server_name,
        tls_skip_verify=wanted.tls_skip_verify or own.skip_verify,
    )
    if (endpoint.cert_file is None) != (endpoint.key_file is None):
        faults.append(Fault("CertFile", "CertFile and KeyFile belong together", "give both, or neither"))
    if faults:
        raise InvalidConfig(fault_text(faults))
    return endpoint


def _address(wanted: VaultConfiguration, local: VaultLocal, faults: list[Fault]) -> str:
    given = wanted.address if wanted.address is not None else local.address
    if given is None:
        heading = f"{_HEADING}must provide a Vault address"
        remedy = "set Address, or VAULT_ADDR in the environment of every server"
        faults.append(Fault("Address", "is missing, and this node has no VAULT_ADDR", remedy, heading))
        return ""
    where = "Address" if wanted.address is not None else "VAULT_ADDR"
    problem = address_problem(given)
    if problem is not None:
        remedy = 'use scheme, host and port, such as "https://vault.example.com:8200"'
        faults.append(Fault(where, problem, remedy, f"{_HEADING}{where} cannot be used"))
        return ""
    return given.rstrip("/")


def address_problem(address: str) -> str | None:
    """What is wrong with a server's address, without showing it (it may hold credentials); None if nothing is."""
    if _UNSAFE.search(address):
        return "holds white space, control characters or characters beyond ASCII"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        return "is no URL"
    problem = None
    if parts.scheme not in ("http", "https"):
        problem = "begins with neither http:// nor https://"
    elif parts.username is not None or parts.password is not None:
        problem = "holds a user name or a password"
    elif not parts.hostname or port == 0:
        problem = "names no host, or port 0"
    elif parts.query or parts.fragment:
        problem = "has a query or a fragment"
    return problem


def token_problem(token: str) -> str | None:
    """What keeps a token from travelling in a header, without showing it; None if nothing does."""
    if not token:
        return "is empty"
    return "holds white space, control characters or characters beyond ASCII" if _UNSAFE.search(token) else None


def _token(wanted: VaultConfiguration, local: VaultLocal, faults: list[Fault]) -> Secret | None:
    token = wanted.token
    if token is None and wanted.auth_method is None and wanted.token_file is None:
        if wanted.address is None:
            token = local.token
        if token is None:
            problem = "is missing"
            if local.token is not None:
                problem += ", and this node's VAULT_TOKEN goes only to its own VAULT_ADDR"
            remedy = "set Token, TokenFile or AuthMethod, or leave Address out and set VAULT_ADDR and VAULT_TOKEN"
            faults.append(Fault("Token", problem, remedy, f"{_HEADING}must provide a Vault token"))
            return None
    if token is None:
        return None
    problem_of = token_problem(token.reveal().strip())
    if problem_of is not None:
        faults.append(Fault("Token", problem_of, "give the token alone", f"{_HEADING}the Vault token cannot be used"))
        return None
    return Secret(token.reveal().strip())


class _Files:
    """Names below ``file_dir`` made paths."""

    def __init__(self, directory: Path | None, faults: list[Fault]) -> None:
        self._directory = directory
        self._faults = faults

    def path(self, key: str, name: str | None) -> Path | None:
        """The file that ``key`` names; None, and a fault where there should be one."""
        if name is None:
            return None
        if self._directory is None:
            remedy = "set connect { file_dir } to the directory that holds it, on every server"
            self._faults.append(Fault(key, "names a file, and this node has no directory for such files", remedy))
            return None
        directory = self._directory.resolve()
        found = (directory / name).resolve()
        if not found.is_relative_to(directory):
            self._faults.append(Fault(key, f'"{name}" leads out of file_dir', "give a name below file_dir"))
            return None
        if not found.exists():
            remedy = f"put it into {self._directory} on every server"
            self._faults.append(Fault(key, f'"{name}" does not exist on this node', remedy))
            return None
        # As it is named: where secrets are mounted as a whole, it leads to another file after every change.
        return directory / name


# The parameter that a file holds, by the parameter that names the file.
_HELD = {"role_id_file_path": "role_id", "secret_id_file_path": "secret_id", "path": "jwt", "token_path": "jwt"}


def _login(method: VaultAuthMethod, files: _Files) -> Login:
    named = method.files
    found = [(_HELD[key], files.path(f"AuthMethod.Params.{key}", name)) for key, name in named.items()]
    given = [(key, method.param(key)) for key, _ in method.params if key not in named]
    return Login(
        method.type,
        method.mount_path,
        tuple((key, Secret(text)) for key, text in given if text is not None),
        tuple((key, path) for key, path in found if path is not None),
    )
