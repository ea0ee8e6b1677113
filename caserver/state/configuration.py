"""A CA configuration: read from a request or the agent's file, normalised, sealed for the log and opened again.

One object has two faces. ``given`` is what the caller wrote, with secrets cut out: that is what a GET shows.
``effective`` is what it means: that decides equality, lifetimes and pruning. The names of the keys inside Config are
known here and nowhere else. Only shapes and ranges are judged here; whether keys and certificates are any good is the
provider's business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from caserver import gojson
from caserver.errors import Corrupt, InvalidConfig
from caserver.fields import REDACTED, Fault, Fields, Secret, fault_text, fold, nearest
from caserver.internode.keyring import Keyring, Sealed
from caserver.pki.spiffe import normalise_cluster_id
from caserver.state import builtin_keys, vault_keys
from caserver.state.builtin_keys import BUILTIN, BUILTIN_KEYS, same_pem
from caserver.state.config_reader import SHARED_KEYS, ConfigReader, quoted
from caserver.state.model import Effective, StoredConfiguration
from caserver.state.vault_configuration import VaultConfiguration, VaultLocal
from caserver.state.vault_keys import VAULT, VAULT_KEYS

BOOTSTRAP_DEFAULTS: Mapping[str, object] = {
    "LeafCertTTL": "72h",
    "IntermediateCertTTL": "8760h",
    "RotationPeriod": "2160h",
}
_KEYS: Mapping[str, tuple[str, ...]] = {BUILTIN: (*BUILTIN_KEYS, *SHARED_KEYS), VAULT: (*VAULT_KEYS, *SHARED_KEYS)}
_OPTIONS = tuple(dict.fromkeys(key for keys in _KEYS.values() for key in keys))
_USE = " or ".join(f'"{name}"' for name in _KEYS)
# What rides sealed in a stored configuration, and what each is bound to.
_PRIVATE_KEY = "PrivateKey"
_VAULT_SECRETS = "VaultSecrets"  # all of one configuration, as a JSON object
_PURPOSES = {name: f"ca-configuration/{name}" for name in (_PRIVATE_KEY, _VAULT_SECRETS)}

# Key -> field of what it means.
_EFFECTIVE: Mapping[str, str] = {
    "LeafCertTTL": "leaf_ttl",
    "IntermediateCertTTL": "intermediate_ttl",
    "RootCertTTL": "root_ttl",
    "RotationPeriod": "rotation_period",
    "PrivateKeyType": "private_key_type",
    "PrivateKeyBits": "private_key_bits",
    "CSRMaxPerSecond": "csr_max_per_second",
    "CSRMaxConcurrent": "csr_max_concurrent",
}

_DECODE_FAILED = "Bad request: Request decode failed: "
_STATE_READ_ONLY = "Provider State is read-only. It must be omitted or identical to the current value"
_GO_BODY_TYPE = r'struct { ForceWithoutCrossSigningSnake bool "json:\"force_without_cross_signing\""; *structs.Alias }'
# Top-level key, lower case -> (Go's name of the field, Go's type, Python types that may come in).
_TOP_LEVEL: Mapping[str, tuple[str, str, tuple[type, ...]]] = {
    "provider": ("Provider", "string", (str,)),
    "config": ("Config", "map[string]interface {}", (dict,)),
    "state": ("State", "map[string]string", (dict,)),
    "forcewithoutcrosssigning": ("ForceWithoutCrossSigning", "bool", (bool,)),
    "force_without_cross_signing": ("force_without_cross_signing", "bool", (bool,)),
    "createindex": ("CreateIndex", "uint64", (int,)),
    "modifyindex": ("ModifyIndex", "uint64", (int,)),
}
_UINT64_MAX = 2**64 - 1


@dataclass(frozen=True, slots=True)
class CAConfiguration:
    """A configuration in the open, as the authority and the providers use it; never leaves the process like this."""

    provider: str
    given: Mapping[str, object] = field(repr=False)  # the caller's Config, key order kept, secrets as "<redacted>"
    effective: Effective
    private_key: Secret | None = None  # PEM
    root_cert: str | None = field(default=None, repr=False)  # PEM, byte for byte as given
    force_without_cross_signing: bool = False
    cluster_id: str | None = None  # lower-case UUID, where Config carries one
    vault: VaultConfiguration | None = None  # with the provider "vault"


@dataclass(frozen=True, slots=True)
class Update:
    """A configuration that a caller wants; ``modify_index`` is what it must be based on (0 = anything)."""

    configuration: CAConfiguration
    modify_index: int


@dataclass(frozen=True, slots=True)
class _Body:
    """The top level of a request body."""

    provider: str = ""
    config: Mapping[str, object] = field(default_factory=dict, repr=False)  # may hold a private key
    force_without_cross_signing: bool = False
    modify_index: int = 0
    faults: tuple[Fault, ...] = ()


def parse_update(
    body: str, *, stored: CAConfiguration | None, cluster_id: str | None = None, local: VaultLocal | None = None
) -> Update:
    """Read the body of a configuration write; InvalidConfig names every fault, Consul's text of the first one on top.

    ``stored`` is the configuration in force: a redacted or absent secret may mean the stored one. ``cluster_id`` is the
    cluster's, which a ClusterID in Config must equal. ``local`` is what this server knows of Vault by itself.
    """
    read = _decode_body(body)
    faults = list(read.faults)
    if read.provider not in _KEYS:
        if not any(fault.field.lower() == "provider" for fault in faults):
            heading = f"could not initialize provider: unknown CA provider {quoted(read.provider)}"
            faults.append(Fault("Provider", f"{quoted(read.provider)} is not known", f"use {_USE}", heading))
        raise InvalidConfig(fault_text(faults))
    chosen_id = cluster_id or (stored.cluster_id if stored else None)
    reading = _Reading(stored, chosen_id, local or VaultLocal(), over_http=True)
    configuration, found = reading.configuration(read, where="Config", prefix="error configuring provider: ")
    if faults or found:
        raise InvalidConfig(fault_text([*faults, *found]))
    return Update(configuration, read.modify_index)


def parse_bootstrap(
    provider: str | None, ca_config: Mapping[str, object], *, local: VaultLocal | None = None
) -> CAConfiguration:
    """The first configuration, from ``ca_provider`` and ``ca_config`` of the agent's file, over Consul's three defaults.

    InvalidConfig names every fault, with the text of Consul's start-up message on top.
    """
    name = provider or BUILTIN
    if name not in _KEYS:
        heading = f"{name} is not a valid CA provider"
        raise InvalidConfig(fault_text([Fault("ca_provider", f"{quoted(name)} is not known", f"use {_USE}", heading)]))
    reading = _Reading(None, None, local or VaultLocal(), over_http=False)
    configuration, faults = reading.configuration(_Body(provider=name, config=ca_config), where="ca_config", prefix="")
    if faults:
        raise InvalidConfig(fault_text(faults))
    by_fold = {fold(key): key for key in _KEYS[name]}
    named = {by_fold[fold(key)]: value for key, value in configuration.given.items()}
    return replace(configuration, given=dict(sorted({**BOOTSTRAP_DEFAULTS, **named}.items())))


def seal(configuration: CAConfiguration, keyring: Keyring, nonce: bytes) -> StoredConfiguration:
    """What is replicated of ``configuration``; ``nonce`` is 12 fresh random bytes, for the one sealed value."""
    secrets: tuple[tuple[str, Sealed], ...] = ()
    hidden = _hidden(configuration)
    if hidden is not None:
        name, plaintext = hidden
        secrets = ((name, keyring.seal(plaintext.encode(), purpose=_PURPOSES[name], nonce=nonce)),)
    return StoredConfiguration(
        provider=configuration.provider,
        given=json.dumps(dict(configuration.given), ensure_ascii=False, separators=(",", ":")),
        secrets=secrets,
        effective=configuration.effective,
        root_cert=configuration.root_cert,
        force_without_cross_signing=configuration.force_without_cross_signing,
    )


def _hidden(configuration: CAConfiguration) -> tuple[str, str] | None:
    """The name and the text of what must be sealed of a configuration, or None."""
    if configuration.private_key is not None:
        return _PRIVATE_KEY, configuration.private_key.reveal()
    secrets = {} if configuration.vault is None else vault_keys.secrets_of(configuration.vault)
    return (_VAULT_SECRETS, json.dumps(secrets, sort_keys=True)) if secrets else None


def secret_purpose(key: str) -> str:
    """What a sealed key of a configuration is bound to; Corrupt for one that this release does not know."""
    if key not in _PURPOSES:
        raise Corrupt(f"the stored configuration holds a secret {key[:64]!r}, which this release does not know")
    return _PURPOSES[key]


def open_stored(stored: StoredConfiguration, keyring: Keyring) -> CAConfiguration:
    """The reverse of ``seal``; Corrupt if a secret does not open. A secret that was erased since is simply absent."""
    given = json.loads(stored.given)
    secrets = {name: keyring.open(value, purpose=secret_purpose(name)).decode() for name, value in stored.secrets}
    cluster_id = Fields(given).text("ClusterID")
    vault = None
    if stored.provider == VAULT:
        vault = vault_keys.opened(given, json.loads(secrets.get(_VAULT_SECRETS, "{}")))
    return CAConfiguration(
        provider=stored.provider,
        given=given,
        effective=stored.effective,
        private_key=Secret(secrets[_PRIVATE_KEY]) if _PRIVATE_KEY in secrets else None,
        root_cert=stored.root_cert,
        force_without_cross_signing=stored.force_without_cross_signing,
        cluster_id=None if cluster_id is None else normalise_cluster_id(cluster_id),
        vault=vault,
    )


def same_meaning(one: CAConfiguration, other: CAConfiguration) -> bool:
    """Whether storing ``other`` over ``one`` would change nothing but words (``72h`` for ``72h0m0s``)."""
    return (
        one.provider == other.provider
        and one.effective == other.effective
        and one.force_without_cross_signing == other.force_without_cross_signing
        and same_pem(one.root_cert, other.root_cert)
        and same_pem(_revealed(one.private_key), _revealed(other.private_key))
        and one.vault == other.vault
    )


def not_in_force(file: CAConfiguration, stored: CAConfiguration) -> tuple[str, ...]:
    """What a file sets beyond the defaults and is not in force; what it leaves out may be anything."""
    if same_meaning(file, stored):
        return ()
    if file.provider not in {stored.provider, BUILTIN}:
        return ("ca_provider",)
    said = [key for key, value in file.given.items() if key != "ClusterID" and BOOTSTRAP_DEFAULTS.get(key) != value]
    # Secrets look all alike: if nothing else is another one, they are.
    return tuple(key for key in said if _means_another(key, file, stored)) or tuple(
        key for key in said if file.vault is not None and file.given[key] == REDACTED
    )


def _means_another(key: str, file: CAConfiguration, stored: CAConfiguration) -> bool:
    if key in _EFFECTIVE:
        return bool(getattr(file.effective, _EFFECTIVE[key]) != getattr(stored.effective, _EFFECTIVE[key]))
    if key == _PRIVATE_KEY:
        return not same_pem(_revealed(file.private_key), _revealed(stored.private_key))
    if key == "RootCert":
        return not same_pem(file.root_cert, stored.root_cert)
    known = {fold(name): value for name, value in stored.given.items()}
    return file.given[key] != known.get(fold(key))


def _decode_body(body: str) -> _Body:
    try:
        top = gojson.decode(body)
    except ValueError as exc:
        raise InvalidConfig(f"{_DECODE_FAILED}{exc}") from exc
    if top is None:
        raise InvalidConfig(
            f'{_DECODE_FAILED}the body is null\nbody: null is not a configuration; send {{"Provider": "consul", "Config": {{...}}}}'
        )
    if not isinstance(top, dict):
        raise InvalidConfig(
            f"{_DECODE_FAILED}json: cannot unmarshal {gojson.type_name(top)} into Go value of type {_GO_BODY_TYPE}"
        )
    return _read_top_level(top)


def _read_top_level(top: Mapping[str, object]) -> _Body:
    """Match keys as Go does (any case), noting faults in the order of the document as Go would meet them."""
    found: dict[str, object] = {}
    faults: list[Fault] = []
    for key, value in top.items():
        folded = key.lower()
        fault = _top_level_fault(key, value, found)
        if fault is not None:
            faults.append(fault)
        elif value is not None:
            found[folded] = value
    if found.get("state"):
        faults.append(Fault("State", "is kept by the provider", "leave it out", f"Bad request: {_STATE_READ_ONLY}"))
    return _Body(
        provider=str(found.get("provider", "")),
        config=_as_mapping(found.get("config")),
        force_without_cross_signing=bool(
            found.get("forcewithoutcrosssigning") or found.get("force_without_cross_signing")
        ),
        modify_index=int(str(found.get("modifyindex", 0))),
        faults=tuple(faults),
    )


def _top_level_fault(key: str, value: object, found: Mapping[str, object]) -> Fault | None:
    folded = key.lower()
    if folded not in _TOP_LEVEL:
        known = [name for name, _, _ in _TOP_LEVEL.values()]
        near = nearest(key, known) or (nearest(key, _OPTIONS) and "Config")
        remedy = f'did you mean "{near}"?' if near and near != "Config" else "options of the provider go inside Config"
        return Fault(key, "unknown key", remedy, f"{_DECODE_FAILED}json: unknown field {quoted(key)}")
    if folded in found:
        return Fault(key, "is given twice", "give it once", f"{_DECODE_FAILED}key {quoted(key)} is given twice")
    name, go_type, accepted = _TOP_LEVEL[folded]
    if value is None or _accepts(accepted, value):
        return None
    got = gojson.type_name(value) + (f" {value}" if go_type == "uint64" and gojson.type_name(value) == "number" else "")
    heading = f"{_DECODE_FAILED}json: cannot unmarshal {got} into Go struct field .{name} of type {go_type}"
    return Fault(key, f"expected {go_type}, got {got}", "", heading)


def _accepts(accepted: tuple[type, ...], value: object) -> bool:
    if accepted == (int,):
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _UINT64_MAX
    return isinstance(value, accepted)


@dataclass(frozen=True, slots=True)
class _Reading:
    """What a Config is read against."""

    stored: CAConfiguration | None
    cluster_id: str | None
    local: VaultLocal
    over_http: bool

    def configuration(self, body: _Body, *, where: str, prefix: str) -> tuple[CAConfiguration, list[Fault]]:
        """The configuration that ``body`` describes and what is wrong with it (it may be used only if that is nothing)."""
        reader = ConfigReader(Fields(body.config, where=where), prefix)
        found = self._of_vault(body, reader) if body.provider == VAULT else self._of_builtin(body, reader)
        reader.check(found.effective)
        found = replace(
            found,
            force_without_cross_signing=body.force_without_cross_signing,
            cluster_id=reader.cluster_id(self.cluster_id),
        )
        reader.fields.finish(also_known=_KEYS[body.provider])
        return found, reader.faults()

    def _of_builtin(self, body: _Body, reader: ConfigReader) -> CAConfiguration:
        effective = reader.decode(builtin_keys.decode)
        former = (None, None) if self.stored is None else (self.stored.private_key, self.stored.root_cert)
        private_key, root_cert = builtin_keys.own_root(reader, former)
        hidden = fold(_PRIVATE_KEY)
        given = {key: REDACTED if fold(key) == hidden and value else value for key, value in body.config.items()}
        if private_key is not None and not reader.fields.has(_PRIVATE_KEY):
            given[_PRIVATE_KEY] = REDACTED
        return CAConfiguration(body.provider, given, effective, private_key=private_key, root_cert=root_cert)

    def _of_vault(self, body: _Body, reader: ConfigReader) -> CAConfiguration:
        read: list[VaultConfiguration] = []
        effective = reader.decode(lambda fields: read.append(vault_keys.read(fields)))
        former = None if self.stored is None else self.stored.vault
        judge = vault_keys.Judge(reader, former, self.local, self.over_http)
        vault = judge.settle(read[0])
        given = vault_keys.shown(body.config, vault, canonical=not self.over_http)
        return CAConfiguration(body.provider, given, effective, vault=vault)


def _as_mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _revealed(secret: Secret | None) -> str | None:
    return None if secret is None else secret.reveal()
