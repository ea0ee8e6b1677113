"""What both providers have in common in their Config: lifetimes, kinds of keys, limits, the cluster id.

Values are decoded first, all of them, then judged in the order of Consul's ``Validate``, then by what Consul forgets.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from caserver.fields import Fault, Fields, fold, format_go_duration
from caserver.pki.spiffe import normalise_cluster_id
from caserver.state.model import HOUR, Effective

SHARED_KEYS = (
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

# Ranges of Consul's CommonCAProviderConfig.Validate; those that Consul lacks are marked.
_LEAF_TTL_MIN = 1 * HOUR
_LEAF_TTL_MAX = 8760 * HOUR
_INTERMEDIATE_TTL_MIN = 3 * HOUR
_ROTATION_PERIOD_MIN = 1 * HOUR  # ours
_EC_BITS = (224, 256, 384, 521)
_RSA_BITS = (2048, 4096)


def quoted(text: str) -> str:
    """A text as messages show it."""
    return json.dumps(text, ensure_ascii=False)


class ConfigReader:
    """Reads one Config; what belongs to a provider reads through it, so that faults stand in one order."""

    def __init__(self, fields: Fields, prefix: str) -> None:
        self.fields = fields
        self._prefix = prefix
        self._undecoded: tuple[Fault, ...] = ()
        self._faulty: frozenset[str] = frozenset()

    def decode(self, own: Callable[[Fields], object]) -> Effective:
        """Values of the right types, ``own`` reading those of the provider; a value that is none yields the default."""
        fields, default = self.fields, Effective()
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
        own(fields)
        fields.text("ClusterID")
        self._undecoded = tuple(fields.faults[already:])
        self._faulty = frozenset(fold(fault.field.rsplit(".", 1)[-1]) for fault in self._undecoded)
        return effective

    def check(self, effective: Effective) -> None:
        """Ranges, in the order of Consul's Validate, then those that Consul forgets."""
        if self.fields.raw("SkipValidate") not in (None, False):
            self.fault("SkipValidate", "would switch the checks of lifetimes off", "leave it out")
        self._check_lifetimes(effective)
        if self.decoded("PrivateKeyType", "PrivateKeyBits"):
            self._check_key(effective.private_key_type, effective.private_key_bits)
        for key, value in (
            ("CSRMaxPerSecond", effective.csr_max_per_second),
            ("CSRMaxConcurrent", effective.csr_max_concurrent),
        ):
            if value < 0:
                self.fault(key, f"{value} is negative", "use 0 for no limit", f"{key} must not be negative")

    def cluster_id(self, expected: str | None) -> str | None:
        """The ClusterID that Config carries, which must be the cluster's own once it has one."""
        given = None if fold("ClusterID") in self._faulty else self.fields.text("ClusterID")
        if given is None:
            return None
        try:
            chosen = normalise_cluster_id(given)
        except ValueError:
            heading = "cluster_id was supplied but was not a valid UUID"
            self.fault("ClusterID", f"{quoted(given)} is not a UUID", "leave it out to have one generated", heading)
            return None
        if expected is not None and chosen != expected:
            self.fault("ClusterID", f"is {chosen}, the cluster is {expected}", "it is fixed at bootstrap: leave it out")
        return chosen

    def faults(self) -> list[Fault]:
        """All faults, those of decoding first and under one heading, as mapstructure words it."""
        rest = [fault for fault in self.fields.faults if fault not in self._undecoded]
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
        elif intermediate < 3 * leaf and self.decoded("LeafCertTTL", "IntermediateCertTTL"):
            least = format_go_duration(3 * leaf)
            heading = f"Intermediate Cert TTL must be greater or equal than 3 * LeafCertTTL (>={least})."
            self._lifetime("IntermediateCertTTL", intermediate, f"at least {least}", heading)
        if effective.root_ttl < intermediate and self.decoded("RootCertTTL", "IntermediateCertTTL"):
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
            self.fault("PrivateKeyType", f"{quoted(kind)} is not known", 'use "ec" or "rsa"', heading)
        elif kind == "ec" and bits not in _EC_BITS:
            heading = "EC key length must be one of (224, 256, 384, 521) bits"
            self.fault("PrivateKeyBits", f"{bits} does not fit an EC key", "use 224, 256, 384 or 521", heading)
        elif kind == "rsa" and bits not in _RSA_BITS:
            heading = "RSA key length must be 2048 or 4096 bits"
            self.fault("PrivateKeyBits", f"{bits} does not fit an RSA key", "use 2048 or 4096", heading)

    def decoded(self, *keys: str) -> bool:
        """Whether all of these were of the right type, or absent."""
        return not self._faulty & {fold(key) for key in keys}

    def _lifetime(self, key: str, seconds: int, wanted: str, heading: str) -> None:
        self.fault(key, f"{format_go_duration(seconds)} is out of range", f"use {wanted}", heading)

    def fault(self, key: str, problem: str, remedy: str, heading: str = "") -> None:
        """Note a fault of ``key``; ``heading`` is Consul's sentence for it."""
        self.fields.fault(key, problem, remedy, heading=self._prefix + heading if heading else "")
