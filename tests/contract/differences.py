"""Where caserver deliberately answers otherwise than the recorded Consul: what, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Difference:
    """``recordings`` (patterns of names) are answered with ``status`` and, if given, a body that begins with ``text``."""

    recordings: tuple[str, ...]
    status: int
    reason: str
    text: str | None = None  # None: the recorded text
    headers: bool = True  # whether the headers are Consul's all the same


MISTAKE = "a caller's mistake is a 4xx, with Consul's text on the first line"
BREAKS = "what would break signing or verification is refused"

DIFFERENCES: tuple[Difference, ...] = (
    Difference(("c01-*-q-dc_nope", "c01-path-leaf-ab", "c01-path-leaf-pct-slash"), 400, MISTAKE),
    Difference(
        (
            "c02-cfg-csr-bad",
            "c02-cfg-interttl-3h",
            "c02-cfg-interttl-bad",
            "c02-cfg-interttl-short",
            "c02-cfg-invalid-utf8",
            "c02-cfg-leaf-gt-inter",
            "c02-cfg-leafttl-0",
            "c02-cfg-leafttl-0s",
            "c02-cfg-leafttl-1d",
            "c02-cfg-leafttl-2y",
            "c02-cfg-leafttl-59m",
            "c02-cfg-leafttl-8761h",
            "c02-cfg-leafttl-bad",
            "c02-cfg-leafttl-bool",
            "c02-cfg-leafttl-empty",
            "c02-cfg-leafttl-huge",
            "c02-cfg-leafttl-neg",
            "c02-cfg-leafttl-num-small",
            "c02-cfg-pk--0",
            "c02-cfg-pk-dsa-2048",
            "c02-cfg-pk-ec--1",
            "c02-cfg-pk-ec-2048",
            "c02-cfg-pk-ec-512",
            "c02-cfg-pk-ed25519-256",
            "c02-cfg-pk-rsa-*",
            "c02-cfg-rotation-empty",
        ),
        400,
        MISTAKE,
    ),
    Difference(
        ("c02-clean-garbage-key-only",),
        400,
        "a secret is never quoted, not even one that cannot be read; " + MISTAKE,
        "error generating CA root certificate: error generating CA: error parsing private key: no PEM-encoded data found",
    ),
    Difference(
        ("c02-cfg-fresh-garbage-key", "c02-cfg-garbage-key-fresh"),
        400,
        BREAKS,
        "error configuring provider: error parsing private key: no PEM-encoded data found",
    ),
    Difference(
        ("c02-clean-cert-in-key",),
        400,
        BREAKS,
        "error configuring provider: error parsing private key: unknown PEM block type for signing key: CERTIFICATE",
    ),
    Difference(("c07-master-config-put-badprov",), 400, MISTAKE),
    Difference(("c02-cfg-expired-fresh",), 400, BREAKS, "RootCert: expired at 2026-11-22T11:25:51Z"),
    Difference(("c02-cfg-wrongtd-fresh",), 400, BREAKS, "RootCert: its URI names are 'spiffe://other.consul'"),
    Difference(("c02-cfg-skip-validate-leaf-short",), 400, BREAKS, "Config.SkipValidate: would switch the checks"),
    Difference(
        ("c02-cfg-rotation-neg", "c02-cfg-rotation-short", "c02-cfg-rotation-zero"),
        400,
        BREAKS,
        "error configuring provider: rotation period must be greater or equal than 1h0m0s",
    ),
    Difference(("c02-cfg-unknown-config-key",), 400, "unknown keys are refused, not stored", "Config.Foo: unknown key"),
    Difference(
        ("c02-cfg-clusterid-in-config",),
        400,
        "an unusable cluster id is refused, not stored",
        "error configuring provider: cluster_id was supplied but was not a valid UUID",
    ),
    Difference(
        ("c02-cfg-createindex-toplevel",),
        409,
        "a stale ModifyIndex is a conflict; Consul answers 200 and drops the write",
        "the configuration is at index ",
    ),
    Difference(
        ("c02-cfg-recover-from-garbage-key",),
        200,
        "the key in force is never one that cannot cross-sign, since such a key is refused",
        "",
    ),
    Difference(
        ("c02-put-null-connection-dropped",),
        400,
        "Consul closes the connection",
        "Bad request: Request decode failed: ",
        headers=False,
    ),
    Difference(
        ("c01-method-*-FOO", "c01-method-*-get"),
        400,
        "a method that HTTP does not know is refused by the parser, before any route",
        "",
        headers=False,
    ),
    Difference(
        ("c02-clean-cert-in-key-leaf",),
        200,
        "a configuration that was refused has left the one in force as it was",
        "{",
        headers=False,
    ),
    Difference(
        ("c01-authorize-post",),
        200,
        "an identity of another trust domain is not let in; Consul does not look at it",
        '{\n    "Authorized": false,\n    "Reason": "Identity from an external trust domain: x.consul"\n}\n',
    ),
    Difference(
        ("c06-noquorum-0-consistent-immediately",),
        500,
        "a read during the loss of the leader is held, then told the reason that stays",
        "No cluster leader",
    ),
)


def difference(name: str) -> Difference | None:
    """The deliberate difference of one recording."""
    return next((each for each in DIFFERENCES if any(fnmatchcase(name, one) for one in each.recordings)), None)


# Recorded starts that are refused here: name -> what the refusal says.
FILE_DIFFERENCES: Mapping[str, str] = {
    "c05-bad-garbage-key": "no PEM-encoded data found",
    "c05-unknown-caconfig-key": "ca_config.foo: unknown key",
}


def file_difference(name: str) -> str | None:
    """What is said to a configuration file that Consul started with, to the harm of its CA."""
    return FILE_DIFFERENCES.get(name)


# Commands whose output differs: name -> what ours holds.
COMMAND_DIFFERENCES: Mapping[str, str] = {
    "c08-ca-badsub": "Usage: caserver connect ca <subcommand>",
    "c08-ca-nosub": "Usage: caserver connect ca <subcommand>",
    "c08-get-config-help": "Usage: caserver connect ca get-config",
    "c08-set-config-help": "Usage: caserver connect ca set-config",
    "c08-set-config-extra": 'Ignoring the unknown key "Extra"',  # a word on standard error
}
