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
from caserver.fields import REDACTED, Fault, Fields, Secret, fault_text, fold, format_go_duration, nearest
from caserver.internode.keyring import Keyring, Sealed
from caserver.pki.spiffe import normalise_cluster_id
from caserver.state.model import HOUR, Effective, StoredConfiguration
from caserver.state.vault_configuration import VaultConfiguration

BUILTIN = "consul"

BOOTSTRAP_DEFAULTS: Mapping[str, object] = {
    "LeafCertTTL": "72h",
    "IntermediateCertTTL": "8760h",
    "RotationPeriod": "2160h",
}
_CONFIG_KEYS = (
    "PrivateKey",
    "RootCert",
    "LeafCertTTL",
    "IntermediateCertTTL",
    "RootCertTTL",
    "RotationPeriod",
    "PrivateKeyType",
    "PrivateKeyBits",
    "CSRMaxPerSecond",
    "CSRMaxConcurrent",
    "ClusterID",
    "SkipValidate",
)
_SECRET_KEYS = frozenset({fold("PrivateKey")})
_PRIVATE_KEY_PURPOSE = "ca-configuration/PrivateKey"

# Ranges of Consul's CommonCAProviderConfig.Validate; those that Consul lacks are marked.
_LEAF_TTL_MIN = 1 * HOUR
_LEAF_TTL_MAX = 8760 * HOUR
_INTERMEDIATE_TTL_MIN = 3 * HOUR
_ROTATION_PERIOD_MIN = 1 * HOUR  # ours
_EC_BITS = (224, 256, 384, 521)
_RSA_BITS = (2048, 4096)

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


def parse_update(body: str, *, stored: CAConfiguration | None, cluster_id: str | None = None) -> Update:
    """Read the body of a configuration write; InvalidConfig names every fault, Consul's text of the first one on top.

    ``stored`` is the configuration in force: a redacted or absent secret may mean the stored one. ``cluster_id`` is the
    cluster's, which a ClusterID in Config must equal.
    """
    read = _decode_body(body)
    faults = list(read.faults)
    configuration, found = _read_config(
        read,
        stored=stored,
        cluster_id=cluster_id or (stored.cluster_id if stored else None),
        where="Config",
        prefix="error configuring provider: ",
    )
    if read.provider == BUILTIN:
        faults += found
    elif not any(fault.field.lower() == "provider" for fault in faults):
        heading = f"could not initialize provider: unknown CA provider {_quoted(read.provider)}"
        faults.append(Fault("Provider", f"{_quoted(read.provider)} is not known", f'use "{BUILTIN}"', heading))
    if faults:
        raise InvalidConfig(fault_text(faults))
    return Update(configuration, read.modify_index)


def parse_bootstrap(provider: str | None, ca_config: Mapping[str, object]) -> CAConfiguration:
    """The first configuration, from ``ca_provider`` and ``ca_config`` of the agent's file, over Consul's three defaults.

    InvalidConfig names every fault, with the text of Consul's start-up message on top.
    """
    name = provider or BUILTIN
    if name != BUILTIN:
        heading = f"{name} is not a valid CA provider"
        raise InvalidConfig(
            fault_text([Fault("ca_provider", f"{_quoted(name)} is not known", f'use "{BUILTIN}"', heading)])
        )
    read = _Body(provider=name, config=ca_config)
    configuration, faults = _read_config(read, stored=None, cluster_id=None, where="ca_config", prefix="")
    if faults:
        raise InvalidConfig(fault_text(faults))
    by_fold = {fold(key): key for key in _CONFIG_KEYS}
    named = {by_fold[fold(key)]: value for key, value in configuration.given.items()}
    return replace(configuration, given=dict(sorted({**BOOTSTRAP_DEFAULTS, **named}.items())))


def seal(configuration: CAConfiguration, keyring: Keyring, nonce: bytes) -> StoredConfiguration:
    """What is replicated of ``configuration``; ``nonce`` is 12 fresh random bytes."""
    secrets: tuple[tuple[str, Sealed], ...] = ()
    if configuration.private_key is not None:
        plaintext = configuration.private_key.reveal().encode()
        secrets = (("PrivateKey", keyring.seal(plaintext, purpose=_PRIVATE_KEY_PURPOSE, nonce=nonce)),)
    return StoredConfiguration(
        provider=configuration.provider,
        given=json.dumps(dict(configuration.given), ensure_ascii=False, separators=(",", ":")),
        secrets=secrets,
        effective=configuration.effective,
        root_cert=configuration.root_cert,
        force_without_cross_signing=configuration.force_without_cross_signing,
    )


def secret_purpose(key: str) -> str:
    """What a sealed key of a configuration is bound to; Corrupt for one that this release does not know."""
    if key != "PrivateKey":
        raise Corrupt(f"the stored configuration holds a secret {key[:64]!r}, which this release does not know")
    return _PRIVATE_KEY_PURPOSE


def open_stored(stored: StoredConfiguration, keyring: Keyring) -> CAConfiguration:
    """The reverse of ``seal``; Corrupt if a secret does not open. A secret that was erased since is simply absent."""
    given = json.loads(stored.given)
    sealed = dict(stored.secrets).get("PrivateKey")
    cluster_id = Fields(given).text("ClusterID")
    return CAConfiguration(
        provider=stored.provider,
        given=given,
        effective=stored.effective,
        private_key=None if sealed is None else Secret(keyring.open(sealed, purpose=_PRIVATE_KEY_PURPOSE).decode()),
        root_cert=stored.root_cert,
        force_without_cross_signing=stored.force_without_cross_signing,
        cluster_id=None if cluster_id is None else normalise_cluster_id(cluster_id),
    )


def same_meaning(one: CAConfiguration, other: CAConfiguration) -> bool:
    """Whether storing ``other`` over ``one`` would change nothing but words (``72h`` for ``72h0m0s``)."""
    return (
        one.provider == other.provider
        and one.effective == other.effective
        and one.force_without_cross_signing == other.force_without_cross_signing
        and _same_pem(one.root_cert, other.root_cert)
        and _same_pem(_revealed(one.private_key), _revealed(other.private_key))
    )


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
        near = nearest(key, known) or (nearest(key, _CONFIG_KEYS) and "Config")
        remedy = f'did you mean "{near}"?' if near and near != "Config" else "options of the provider go inside Config"
        return Fault(key, "unknown key", remedy, f"{_DECODE_FAILED}json: unknown field {_quoted(key)}")
    if folded in found:
        return Fault(key, "is given twice", "give it once", f"{_DECODE_FAILED}key {_quoted(key)} is given twice")
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


def _read_config(
    body: _Body, *, stored: CAConfiguration | None, cluster_id: str | None, where: str, prefix: str
) -> tuple[CAConfiguration, list[Fault]]:
    """The configuration that ``body`` describes and what is wrong with it (it may be used only if that is nothing)."""
    fields = Fields(body.config, where=where)
    reader = _ConfigReader(fields, prefix)
    decoded = reader.decode()
    private_key, root_cert = reader.keys(stored)
    reader.check(decoded)
    chosen_id = reader.cluster_id(cluster_id)
    fields.finish(also_known=_CONFIG_KEYS)
    given = _redacted(body.config)
    if private_key is not None and not fields.has("PrivateKey"):
        given = {**given, "PrivateKey": REDACTED}
    configuration = CAConfiguration(
        provider=body.provider,
        given=given,
        effective=decoded,
        private_key=private_key,
        root_cert=root_cert,
        force_without_cross_signing=body.force_without_cross_signing,
        cluster_id=chosen_id,
    )
    return configuration, reader.faults()


class _ConfigReader:
    """Reads the built-in provider's Config in Consul's order: decode everything, then keys, then ranges."""

    def __init__(self, fields: Fields, prefix: str) -> None:
        self._fields = fields
        self._prefix = prefix
        self._undecoded: tuple[Fault, ...] = ()
        self._faulty: frozenset[str] = frozenset()

    def decode(self) -> Effective:
        """Values of the right types; a value that is none yields the default."""
        fields, default = self._fields, Effective()
        already = len(fields.faults)
        effective = Effective(
            leaf_ttl=int(fields.duration("LeafCertTTL", default.leaf_ttl)),
            intermediate_ttl=int(fields.duration("IntermediateCertTTL", default.intermediate_ttl)),
            root_ttl=int(fields.duration("RootCertTTL", default.root_ttl)),
            rotation_period=int(fields.duration("RotationPeriod", default.rotation_period)),
            csr_max_per_second=fields.number("CSRMaxPerSecond", default.csr_max_per_second),
            csr_max_concurrent=fields.integer("CSRMaxConcurrent", default.csr_max_concurrent),
            private_key_type=fields.text("PrivateKeyType", default.private_key_type) or "",
            private_key_bits=fields.integer("PrivateKeyBits", default.private_key_bits),
        )
        fields.text("RootCert")
        fields.secret("PrivateKey")
        fields.text("ClusterID")
        self._undecoded = tuple(fields.faults[already:])
        self._faulty = frozenset(fold(fault.field.rsplit(".", 1)[-1]) for fault in self._undecoded)
        return effective

    def keys(self, stored: CAConfiguration | None) -> tuple[Secret | None, str | None]:
        """PrivateKey and RootCert, with a redacted or absent secret replaced by the stored one where the rule allows.

        A redacted or absent PrivateKey beside an unchanged RootCert keeps the stored key; so does a redacted one alone.
        """
        if self._faulty & {fold("PrivateKey"), fold("RootCert")}:
            return None, None
        root_cert = self._fields.text("RootCert") or None
        given = self._fields.secret("PrivateKey")
        redacted = given is not None and given.reveal().strip() == REDACTED
        if given is not None and given.reveal() and not redacted:
            return given, root_cert
        kept = stored.private_key if stored is not None else None
        unchanged = root_cert is not None and stored is not None and _same_pem(root_cert, stored.root_cert)
        if kept is not None and (unchanged or (redacted and root_cert is None)):
            return kept, root_cert
        if redacted:
            why = "and no key is stored to keep" if kept is None else "but RootCert is not the stored one"
            self._fault("PrivateKey", f"is {REDACTED} {why}", "give the key itself")
        elif root_cert is not None:
            heading = "must provide a private key when providing a root cert"
            self._fault("PrivateKey", "is missing beside RootCert", "give the key of that certificate", heading)
        return None, root_cert

    def check(self, effective: Effective) -> None:
        """Ranges, in the order of Consul's Validate, then those that Consul forgets."""
        if self._fields.raw("SkipValidate") not in (None, False):
            self._fault("SkipValidate", "would switch the checks of lifetimes off", "leave it out")
        self._check_lifetimes(effective)
        if self._decoded("PrivateKeyType", "PrivateKeyBits"):
            self._check_key(effective.private_key_type, effective.private_key_bits)
        for key, value in (
            ("CSRMaxPerSecond", effective.csr_max_per_second),
            ("CSRMaxConcurrent", effective.csr_max_concurrent),
        ):
            if value < 0:
                self._fault(key, f"{value} is negative", "use 0 for no limit", f"{key} must not be negative")

    def cluster_id(self, expected: str | None) -> str | None:
        """The ClusterID that Config carries, which must be the cluster's own once it has one."""
        given = None if fold("ClusterID") in self._faulty else self._fields.text("ClusterID")
        if given is None:
            return None
        try:
            chosen = normalise_cluster_id(given)
        except ValueError:
            heading = "cluster_id was supplied but was not a valid UUID"
            self._fault("ClusterID", f"{_quoted(given)} is not a UUID", "leave it out to have one generated", heading)
            return None
        if expected is not None and chosen != expected:
            self._fault(
                "ClusterID", f"is {chosen}, the cluster is {expected}", "it is fixed at bootstrap: leave it out"
            )
        return chosen

    def faults(self) -> list[Fault]:
        """All faults, those of decoding first and under one heading, as mapstructure words it."""
        rest = [fault for fault in self._fields.faults if fault not in self._undecoded]
        if not self._undecoded:
            return rest
        points = "\n".join(f"* {each}" for each in sorted(fault.heading or str(fault) for fault in self._undecoded))
        heading = f"{self._prefix}error decoding config: {len(self._undecoded)} error(s) decoding:\n\n{points}"
        return [replace(self._undecoded[0], heading=heading), *self._undecoded[1:], *rest]

    def _check_lifetimes(self, effective: Effective) -> None:
        leaf, intermediate = effective.leaf_ttl, effective.intermediate_ttl
        if leaf < _LEAF_TTL_MIN:
            self._lifetime("LeafCertTTL", leaf, "at least 1h", "leaf cert TTL must be greater or equal than 1h0m0s")
        elif leaf > _LEAF_TTL_MAX:
            self._lifetime("LeafCertTTL", leaf, "at most 8760h", "leaf cert TTL must be less than 8760h0m0s")
        if intermediate < _INTERMEDIATE_TTL_MIN:
            heading = "Intermediate Cert TTL must be greater or equal than 3h"
            self._lifetime("IntermediateCertTTL", intermediate, "at least 3h", heading)
        elif intermediate < 3 * leaf and self._decoded("LeafCertTTL", "IntermediateCertTTL"):
            least = format_go_duration(3 * leaf)
            heading = f"Intermediate Cert TTL must be greater or equal than 3 * LeafCertTTL (>={least})."
            self._lifetime("IntermediateCertTTL", intermediate, f"at least {least}", heading)
        if effective.root_ttl < intermediate and self._decoded("RootCertTTL", "IntermediateCertTTL"):
            heading = (
                "root cert TTL is set and is not greater than intermediate cert ttl. "
                f"root cert ttl: {format_go_duration(effective.root_ttl)}, "
                f"intermediate cert ttl: {format_go_duration(intermediate)}"
            )
            least = format_go_duration(intermediate)
            self._lifetime("RootCertTTL", effective.root_ttl, f"at least {least}", heading)
        if effective.rotation_period < _ROTATION_PERIOD_MIN:
            heading = "rotation period must be greater or equal than 1h0m0s"
            self._lifetime("RotationPeriod", effective.rotation_period, "at least 1h", heading)

    def _check_key(self, kind: str, bits: int) -> None:
        if kind not in ("ec", "rsa"):
            heading = "private key type must be either 'ec' or 'rsa'"
            self._fault("PrivateKeyType", f"{_quoted(kind)} is not known", 'use "ec" or "rsa"', heading)
        elif kind == "ec" and bits not in _EC_BITS:
            heading = "EC key length must be one of (224, 256, 384, 521) bits"
            self._fault("PrivateKeyBits", f"{bits} does not fit an EC key", "use 224, 256, 384 or 521", heading)
        elif kind == "rsa" and bits not in _RSA_BITS:
            heading = "RSA key length must be 2048 or 4096 bits"
            self._fault("PrivateKeyBits", f"{bits} does not fit an RSA key", "use 2048 or 4096", heading)

    def _decoded(self, *keys: str) -> bool:
        return not self._faulty & {fold(key) for key in keys}

    def _lifetime(self, key: str, seconds: int, wanted: str, heading: str) -> None:
        self._fault(key, f"{format_go_duration(seconds)} is out of range", f"use {wanted}", heading)

    def _fault(self, key: str, problem: str, remedy: str, heading: str = "") -> None:
        self._fields.fault(key, problem, remedy, heading=self._prefix + heading if heading else "")


def _redacted(config: Mapping[str, object]) -> dict[str, object]:
    return {key: REDACTED if fold(key) in _SECRET_KEYS and value else value for key, value in config.items()}


def _as_mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _revealed(secret: Secret | None) -> str | None:
    return None if secret is None else secret.reveal()


def _same_pem(one: str | None, other: str | None) -> bool:
    """Whether two PEM texts differ in white space only."""
    if one is None or other is None:
        return one is other
    return one.split() == other.split()


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
