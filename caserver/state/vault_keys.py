"""The keys of a Config of the provider ``vault``: read, completed by stored secrets, judged.

Rules of what may go where: a secret that is redacted or absent is the stored one only while address and paths are those
that it was stored with; a token of this server's environment or files is used only with an address from there; a file is
named by whoever may write the servers' own configuration, never over HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from cryptography import x509

from caserver.fields import REDACTED, Fields, Secret, fold
from caserver.state.config_reader import ConfigReader, quoted
from caserver.state.vault_configuration import (
    AUTH_KINDS,
    Holds,
    VaultAuthMethod,
    VaultConfiguration,
    VaultLocal,
)

VAULT = "vault"

# Key -> field of VaultConfiguration, for the plain texts.
_TEXTS = {
    "Address": "address",
    "TokenFile": "token_file",
    "RootPKIPath": "root_pki_path",
    "IntermediatePKIPath": "intermediate_pki_path",
    "Namespace": "namespace",
    "RootPKINamespace": "root_pki_namespace",
    "IntermediatePKINamespace": "intermediate_pki_namespace",
    "CACert": "ca_cert",
    "CAFile": "ca_file",
    "CAPath": "ca_path",
    "CertFile": "cert_file",
    "KeyFile": "key_file",
    "TLSServerName": "tls_server_name",
}
# What GET shows where an address or a token is not in the configuration: where the leader takes it from.
_SOURCES = {"AddressSource": "VAULT_ADDR", "TokenSource": "VAULT_TOKEN"}
VAULT_KEYS = (*_TEXTS, "Token", "TLSSkipVerify", "AuthMethod", *_SOURCES)
_SLASHED = ("root_pki_path", "intermediate_pki_path", "namespace", "root_pki_namespace", "intermediate_pki_namespace")
_AUTH_KEYS = ("Type", "MountPath", "Params")

_TOKEN_KEY = "Token"  # noqa: S105 -- the name of the key
_PARAM_PREFIX = "AuthMethod.Params."
_PATH = re.compile(r"[A-Za-z0-9._~+@=-]+(/[A-Za-z0-9._~+@=-]+)*")
_FILE = re.compile(r"[^/\\\0]+(/[^/\\\0]+)*")
_UNFIT = re.compile(r"[\s\x00-\x1f\x7f]")
_REMEDY_FILE = "name a file below connect { file_dir } of the servers, without a slash at the front and without .."


def read(fields: Fields) -> VaultConfiguration:
    """What the keys say, as they say it: blanks are absent, nothing is judged but types."""
    texts = {name: (fields.text(key) or "").strip() or None for key, name in _TEXTS.items()}
    for name in _SLASHED:
        texts[name] = (texts[name] or "").strip("/")
    address, ca_cert = texts["address"], texts["ca_cert"]
    token = fields.secret("Token")
    values: dict[str, object] = {
        **texts,
        "address": None if address is None else address.rstrip("/"),
        "ca_cert": None if ca_cert is None else ca_cert + "\n",
        "token": token if token is not None and token.reveal().strip() else None,
        "tls_skip_verify": fields.flag("TLSSkipVerify"),
        "auth_method": _read_auth(fields) if fields.has("AuthMethod") else None,
    }
    return VaultConfiguration(**values)  # type: ignore[arg-type]  # by the table above


def _read_auth(fields: Fields) -> VaultAuthMethod:
    inner = fields.inner("AuthMethod")
    kind = (inner.text("Type") or "").strip()
    mount_path = (inner.text("MountPath") or "").strip().strip("/") or kind
    given = inner.inner("Params")
    found: dict[str, str | Secret] = {}
    for name, holds in (AUTH_KINDS[kind].params if kind in AUTH_KINDS else {}).items():
        value = given.secret(name) if holds is Holds.SECRET else given.text(name)
        if value is not None and (value.reveal() if isinstance(value, Secret) else value).strip():
            found[name] = value
    if kind in AUTH_KINDS:
        given.finish()
    inner.finish(also_known=_AUTH_KEYS)
    return VaultAuthMethod(kind, mount_path, tuple(sorted(found.items(), key=lambda each: each[0])))


def opened(given: Mapping[str, object], secrets: Mapping[str, str]) -> VaultConfiguration:
    """What a stored configuration means: its words with the secrets put back in; those that were erased are absent."""
    found = read(Fields(given))
    token = secrets.get(_TOKEN_KEY)
    auth = found.auth_method
    if auth is not None:
        params = {
            name: Secret(secrets[_PARAM_PREFIX + name]) if _PARAM_PREFIX + name in secrets else value
            for name, value in auth.params
        }
        kept = [each for each in params.items() if not _is_redacted(each[1])]
        auth = replace(auth, params=tuple(sorted(kept, key=lambda each: each[0])))
    return replace(found, token=None if token is None else Secret(token), auth_method=auth)


def secrets_of(vault: VaultConfiguration) -> dict[str, str]:
    """The secrets of a configuration in the open, by the names under which ``opened`` wants them."""
    own = {} if vault.token is None else {_TOKEN_KEY: vault.token.reveal()}
    params = {} if vault.auth_method is None else vault.auth_method.secrets
    return own | {_PARAM_PREFIX + name: value for name, value in params.items()}


def shown(given: Mapping[str, object], vault: VaultConfiguration, *, canonical: bool = False) -> dict[str, object]:
    """The caller's words with every secret as ``<redacted>``, and with the source of what they leave to the servers."""
    words = {key: _redacted(key, value, vault) for key, value in given.items()}
    if canonical:
        words = _canonical(words)
    if vault.token is not None and not any(fold(key) == "token" for key in words):
        words["Token"] = REDACTED
    absent = {"AddressSource": vault.address is None, "TokenSource": _has_local_token(vault)}
    folded = {fold(key) for key in words}
    return words | {key: _SOURCES[key] for key, left in absent.items() if left and fold(key) not in folded}


def _has_local_token(vault: VaultConfiguration) -> bool:
    return vault.token is None and vault.token_file is None and vault.auth_method is None


def _redacted(key: str, value: object, vault: VaultConfiguration) -> object:
    match fold(key), value:
        case "token", _:
            return REDACTED if value else value
        case "authmethod", Mapping() if vault.auth_method is not None:
            words = {name: _redacted_params(name, each, vault.auth_method) for name, each in value.items()}
            absent = not any(fold(name) == "params" for name in words) and vault.auth_method.secrets
            return words | {"Params": _redacted_params("Params", {}, vault.auth_method)} if absent else words
        case _:
            return value


def _redacted_params(key: str, value: object, auth: VaultAuthMethod) -> object:
    if fold(key) != "params" or not isinstance(value, Mapping):
        return value
    secret = {fold(name) for name in auth.secrets}
    words = {name: REDACTED if fold(name) in secret else each for name, each in value.items()}
    missing = [name for name in auth.secrets if fold(name) not in {fold(each) for each in words}]
    return words | dict.fromkeys(missing, REDACTED)


def _canonical(words: Mapping[str, object]) -> dict[str, object]:
    """The nested keys in the spelling of the API (those of the top level are the caller's business)."""

    def spelt(value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        names = {fold(name): name for name in _AUTH_KEYS}
        return {names.get(fold(key), key): each for key, each in value.items()}

    return {key: spelt(value) if fold(key) == "authmethod" else value for key, value in words.items()}


def _is_redacted(value: str | Secret | None) -> bool:
    text = value.reveal() if isinstance(value, Secret) else value
    return text is not None and text.strip() == REDACTED


@dataclass(frozen=True, slots=True)
class Judge:
    """Completes one configuration that was read, and notes what is wrong with it in Consul's order."""

    reader: ConfigReader
    stored: VaultConfiguration | None  # in force, with its secrets; None if another provider is
    local: VaultLocal
    over_http: bool

    def settle(self, wanted: VaultConfiguration) -> VaultConfiguration:
        """The configuration with its secrets; to be used only if no fault was noted."""
        complete = self._with_auth(self._with_token(wanted))
        self._check_credentials(wanted, complete)
        self._check_paths(complete)
        self._check_address(complete)
        self._check_tls(complete)
        self._check_files(complete)
        self._check_sources(complete)
        return complete

    # -- secrets

    def _kept(self, wanted: VaultConfiguration) -> VaultConfiguration | None:
        """The stored configuration, if its secrets may go where the wanted one leads."""
        return self.stored if self.stored is not None and self.stored.place == wanted.place else None

    def _with_token(self, wanted: VaultConfiguration) -> VaultConfiguration:
        if wanted.token is not None and not _is_redacted(wanted.token):
            return replace(wanted, token=Secret(wanted.token.reveal().strip()))
        kept = self._kept(wanted)
        left_out = wanted.token is None
        if left_out and (wanted.token_file is not None or wanted.auth_method is not None):
            return wanted
        if kept is not None and kept.token is not None:
            return replace(wanted, token=kept.token)
        if not left_out:
            self.reader.fault("Token", f"is {REDACTED}, {self._why_not()}", "give the token itself")
        return replace(wanted, token=None)

    def _with_auth(self, wanted: VaultConfiguration) -> VaultConfiguration:
        auth = wanted.auth_method
        if auth is None:
            return wanted
        kept = self._kept(wanted)
        former = {} if kept is None or kept.auth_method is None else dict(kept.auth_method.params)
        if kept is None or kept.auth_method is None or not _same_login(kept.auth_method, auth):
            former = {}
        secret = {name for name, value in former.items() if isinstance(value, Secret)}
        params = dict(auth.params)
        for name, value in auth.params:
            if _is_redacted(value):
                del params[name]
                if name not in secret:
                    problem = f"{name} is {REDACTED}, {self._why_not()}"
                    self.reader.fault("AuthMethod", problem, "give the value itself")
        params |= {name: former[name] for name in secret - params.keys()}
        return replace(wanted, auth_method=replace(auth, params=tuple(sorted(params.items(), key=lambda it: it[0]))))

    def _why_not(self) -> str:
        return (
            "and none is stored to keep"
            if self.stored is None
            else "but address or paths are not those it is stored with"
        )

    # -- faults

    def _check_credentials(self, wanted: VaultConfiguration, complete: VaultConfiguration) -> None:
        fault = self.reader.fault
        token, auth = complete.token, complete.auth_method
        if token is not None and auth is not None:
            heading = "only one of Vault token or Vault auth method can be provided, but not both"
            fault("AuthMethod", "is given beside Token", "give one of them", heading)
        if complete.token_file is not None and (token is not None or auth is not None):
            fault("TokenFile", f"is given beside {'Token' if token else 'AuthMethod'}", "give one of them")
        if token is not None and _UNFIT.search(token.reveal()):
            fault("Token", "holds white space or control characters", "give the token alone")
        if wanted.token is None and _has_local_token(complete):
            self._check_local_token(complete)
        if auth is not None:
            self._check_auth(auth)

    def _check_local_token(self, complete: VaultConfiguration) -> None:
        if complete.address is None and self.local.token is not None:
            return
        remedy = "give Token, TokenFile or AuthMethod"
        if complete.address is not None and self.local.token is not None:
            remedy += "; VAULT_TOKEN of this server is used with its own VAULT_ADDR only, that is without Address"
        self.reader.fault("Token", "is missing", remedy, "must provide a Vault token")

    def _check_auth(self, auth: VaultAuthMethod) -> None:
        if auth.type not in AUTH_KINDS:
            known = ", ".join(AUTH_KINDS)
            self.reader.fault(
                "AuthMethod",
                f"Type {quoted(auth.type)} is not known" if auth.type else "has no Type",
                f"use one of {known}",
                f"auth method {quoted(auth.type)} is not supported",
            )
            return
        if not _PATH.fullmatch(auth.mount_path):
            self.reader.fault("AuthMethod", f"MountPath {quoted(auth.mount_path)} is no path", "give it as in Vault")
        given = dict(auth.params)
        for group in AUTH_KINDS[auth.type].needs:
            if not any(name in given for name in group):
                self.reader.fault("AuthMethod", f"Params lack {' or '.join(group)}", f"{auth.type} needs it")

    def _check_paths(self, complete: VaultConfiguration) -> None:
        for key, path, heading in (
            ("RootPKIPath", complete.root_pki_path, "must provide a valid path to a root PKI backend"),
            (
                "IntermediatePKIPath",
                complete.intermediate_pki_path,
                "must provide a valid path for the intermediate PKI backend",
            ),
        ):
            if not path and self.reader.decoded(key):
                self.reader.fault(key, "is missing", "name the path of a pki secrets engine", heading)
            elif path and not _is_path(path):
                self.reader.fault(key, f"{quoted(path)} is no path", "use letters, digits, - _ . and / between them")
        same = (complete.root_namespace, complete.root_pki_path) == (
            complete.intermediate_namespace,
            complete.intermediate_pki_path,
        )
        if same and complete.root_pki_path:
            self.reader.fault("IntermediatePKIPath", "is RootPKIPath too", "give the intermediate a path of its own")
        for key, name in (
            ("Namespace", complete.namespace),
            ("RootPKINamespace", complete.root_pki_namespace),
            ("IntermediatePKINamespace", complete.intermediate_pki_namespace),
        ):
            if name and not _is_path(name):
                self.reader.fault(key, f"{quoted(name)} is no namespace", "give it as in Vault")

    def _check_address(self, complete: VaultConfiguration) -> None:
        if complete.address is None:
            if self.local.address is None and self.reader.decoded("Address"):
                self.reader.fault(
                    "Address", "is missing", "give the URL of Vault, or set VAULT_ADDR for the agent of every server"
                )
            return
        problem = _address_fault(complete.address)
        if problem is not None:
            self.reader.fault("Address", problem, "give a URL such as https://vault.example.com:8200")

    def _check_tls(self, complete: VaultConfiguration) -> None:
        if sum(each is not None for each in (complete.ca_cert, complete.ca_file, complete.ca_path)) > 1:
            self.reader.fault("CACert", "is given beside CAFile or CAPath", "give one of them")
        if (complete.cert_file is None) != (complete.key_file is None):
            missing = "CertFile" if complete.cert_file is None else "KeyFile"
            self.reader.fault(missing, "is missing beside the other", "give both, or neither")
        if complete.ca_cert is not None and not _holds_certificates(complete.ca_cert):
            self.reader.fault("CACert", "holds no certificate that can be read", "give certificates in PEM")

    def _check_files(self, complete: VaultConfiguration) -> None:
        stored = {} if self.stored is None else self.stored.files
        for key, name in complete.files.items():
            if self.over_http:
                self._check_stored_file(key, name, stored, complete)
            elif self.local.file_dir is None:
                remedy = 'set connect { file_dir = "..." } to the directory of such files on every server'
                self.reader.fault(key, "names a file, and connect { file_dir } is not set", remedy)
            elif not _is_file_name(name):
                self.reader.fault(key, f"{quoted(name)} does not name a file below file_dir", _REMEDY_FILE)

    def _check_stored_file(self, key: str, name: str, stored: Mapping[str, str], complete: VaultConfiguration) -> None:
        if stored.get(key) != name:
            instead = {"TokenFile": "Token", "CAFile": "CACert", "CAPath": "CACert"}.get(key)
            remedy = f"give {instead} itself" if instead else "set it in the configuration file that founds a cluster"
            self.reader.fault(key, "names a file of the servers, which is not taken over HTTP", remedy)
        elif _is_credential(key) and self.stored is not None and self.stored.address != complete.address:
            problem = "holds a secret of the servers, which goes to the stored Address only"
            self.reader.fault(key, problem, "give the secret itself, or leave Address as it is")

    def _check_sources(self, complete: VaultConfiguration) -> None:
        left = {"AddressSource": complete.address is None, "TokenSource": _has_local_token(complete)}
        for key, source in _SOURCES.items():
            given = self.reader.fields.raw(key)
            if given is not None and (given != source or not left[key]):
                self.reader.fault(key, "only tells where the servers take it from", "leave it out")


def _same_login(one: VaultAuthMethod, other: VaultAuthMethod) -> bool:
    return (one.type, one.mount_path) == (other.type, other.mount_path)


def _is_path(text: str) -> bool:
    return _PATH.fullmatch(text) is not None and not {".", ".."} & set(text.split("/"))


def _is_file_name(text: str) -> bool:
    return _FILE.fullmatch(text) is not None and not {".", ".."} & set(text.split("/"))


def _is_credential(key: str) -> bool:
    return key == "TokenFile" or key.startswith(_PARAM_PREFIX)


def _holds_certificates(pem: str) -> bool:
    try:
        return bool(x509.load_pem_x509_certificates(pem.encode()))
    except ValueError:
        return False


def _address_fault(address: str) -> str | None:
    """What is wrong with a URL, in words that do not repeat it: it may hold a password."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "is no URL"
    checks: tuple[tuple[bool, str], ...] = (
        (_UNFIT.search(address) is not None, "holds white space or control characters"),
        (parts.scheme not in ("http", "https"), "does not begin with https:// or http://"),
        (not host, "names no host"),
        ("@" in parts.netloc, "holds a user name or a password"),
        (bool(parts.query or parts.fragment), "has a query or a fragment"),
        (port == 0, "names port 0"),
    )
    return next((problem for wrong, problem in checks if wrong), None)
