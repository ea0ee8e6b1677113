"""Consul's JSON names, in the order in which Consul writes them, and nothing else: values in, documents out and back.

A document is a plain dict ready for ``render``; it is built member by member from what may be shown, so that a new field
of the state never leaks by itself. Secrets are not in here: ``StoredConfiguration.given`` holds ``<redacted>`` for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from caserver import gojson
from caserver.cleanup_requests import CleanupsRead
from caserver.errors import InvalidRequest
from caserver.fields import format_go_duration
from caserver.requests import IssuedLeaf, ServersRead
from caserver.state.key_change import KeyringStatus
from caserver.state.model import CARoot, CAState, Configuration
from caserver.telemetry.metrics import Kind, Reading, Totals

Document = dict[str, Any]

SIGN_MAX = 100  # CSRs in one request
_EXACT_FLOAT = 1e21  # Go prints whole floats below this without an exponent
_MILLISECOND = 1e-3  # seconds
_LOW_64_BITS = (1 << 64) - 1
# What Go's encoding/json escapes inside strings; outside of strings none of these can occur.
_GO_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
UNMARSHAL = "Bad request: Request decode failed: "


def render(document: object, *, pretty: bool = False) -> bytes:
    """A document as Consul writes it: compact without a final newline, or with 4 spaces and a newline."""
    if pretty:
        text = json.dumps(document, ensure_ascii=False, indent=4) + "\n"
    else:
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    for character, escape in _GO_ESCAPES.items():
        if character in text:
            text = text.replace(character, escape)
    return text.encode()


def instant(epoch: int) -> str:
    """Epoch seconds as Consul shows an instant: RFC 3339, UTC, ``Z``."""
    return datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def serial_text(serial: int) -> str:
    """A leaf's serial: two hex digits per byte, separated by colons."""
    return serial.to_bytes(max(1, (serial.bit_length() + 7) // 8), "big").hex(":")


def encode_roots(state: CAState) -> Document:
    """Body of the two roots endpoints. ``SerialNumber`` is the low 64 bits, as in Consul."""
    active = state.active_root
    return {
        "ActiveRootID": "" if active is None else active.id,
        "TrustDomain": state.trust_domain or "",
        "Roots": [_root(root, state.cluster_id or "") for root in state.roots],
    }


def _root(root: CARoot, cluster_id: str) -> Document:
    return {
        "ID": root.id,
        "Name": root.name,
        "SerialNumber": root.serial & _LOW_64_BITS,
        "SigningKeyID": root.signing_key_id,
        "ExternalTrustDomain": cluster_id,
        "NotBefore": instant(root.not_before),
        "NotAfter": instant(root.not_after),
        "RootCert": root.pem,
        "IntermediateCerts": list(root.intermediates) or None,
        "Active": root.active,
        "PrivateKeyType": root.key_type,
        "PrivateKeyBits": root.key_bits,
        "CreateIndex": root.create_index,
        "ModifyIndex": root.modify_index,
    }


def pem_bundle(state: CAState) -> bytes:
    """Every root and intermediate in force as one PEM file, the active root first, each certificate once."""
    blocks: dict[str, None] = {}
    for root in sorted(state.roots, key=lambda each: not each.active):
        for pem in (root.pem, *root.intermediates):
            blocks[pem.strip() + "\n"] = None
    return "".join(blocks).encode()


def encode_configuration(configuration: Configuration) -> Document:
    """Body of GET configuration: the caller's keys and values in Go's map order, secrets as ``<redacted>``."""
    stored = configuration.stored
    return {
        "Provider": stored.provider,
        "Config": json.loads(stored.given, object_pairs_hook=lambda pairs: dict(sorted(pairs)), parse_float=_go_number),
        "State": None,
        "ForceWithoutCrossSigning": stored.force_without_cross_signing,
        "CreateIndex": configuration.create_index,
        "ModifyIndex": configuration.modify_index,
    }


def _go_number(digits: str) -> float | int:
    return _go_float(float(digits))


def _go_float(value: float) -> float | int:
    """Whole floats as Go prints them: without a point."""
    return int(value) if float(value).is_integer() and abs(value) < _EXACT_FLOAT else value


def encode_leaf(leaf: IssuedLeaf, key_pem: str | None = None) -> Document:
    """Body of the leaf and sign endpoints; without a key (the caller holds it) there is no PrivateKeyPEM."""
    document: Document = {"SerialNumber": serial_text(leaf.serial), "CertPEM": leaf.chain_pem}
    if key_pem is not None:
        document["PrivateKeyPEM"] = key_pem
    return document | {
        "Service": leaf.service,
        "ServiceURI": leaf.service_uri,
        "ValidAfter": instant(leaf.not_before),
        "ValidBefore": instant(leaf.not_after),
        "CreateIndex": leaf.index,
        "ModifyIndex": leaf.index,
    }


def encode_failure(detail: str, status: int) -> Document:
    """One CSR of a list that was not signed."""
    return {"Error": detail, "Status": status}


def encode_raft_configuration(found: ServersRead, addresses: Mapping[str, str]) -> Document:
    """Body of the Raft configuration; ``addresses`` maps names to ``host:port``; ids are node names."""
    return {
        "Servers": [
            {
                "ID": each.name,
                "Node": each.name,
                "Address": addresses.get(each.name, ""),
                "Leader": each.leader,
                "ProtocolVersion": "3",
                "Voter": each.voter,
            }
            for each in found.servers
        ],
        "Index": 0,
    }


def encode_health(found: ServersRead, addresses: Mapping[str, str]) -> Document:
    """Body of the autopilot health; the version of a server that cannot be asked is empty."""
    return {
        "Healthy": found.healthy,
        "FailureTolerance": found.failure_tolerance,
        "Servers": [
            {
                "ID": each.name,
                "Name": each.name,
                "Address": addresses.get(each.name, ""),
                "SerfStatus": "alive" if each.connected else "failed",
                "Version": each.release,
                "Leader": each.leader,
                "LastContact": contact_text(each.last_contact),
                "LastTerm": each.last_term,
                "LastIndex": each.last_index,
                "Healthy": each.healthy,
                "Voter": each.voter,
                "StableSince": instant(each.stable_since),
            }
            for each in found.servers
        ],
    }


def contact_text(seconds: float) -> str:
    """A duration as Go prints it; ``never`` below zero."""
    if seconds < 0:
        return "never"
    if seconds == 0 or seconds >= 1:
        return format_go_duration(seconds)
    unit, factor = ("ms", 1e3) if seconds >= _MILLISECOND else ("µs", 1e6)
    return f"{seconds * factor:.6f}".rstrip("0").rstrip(".") + unit


def encode_autopilot(*, contact_max: float, trailing_max: int) -> Document:
    """Body of the autopilot configuration: what health is judged by; nothing here removes or promotes servers by itself."""
    return {
        "CleanupDeadServers": False,
        "LastContactThreshold": contact_text(contact_max),
        "MaxTrailingLogs": trailing_max,
        "MinQuorum": 0,
        "ServerStabilizationTime": "0s",
        "RedundancyZoneTag": "",
        "DisableUpgradeMigration": False,
        "UpgradeVersionTag": "",
        "CreateIndex": 1,
        "ModifyIndex": 1,
    }


def encode_transfer() -> Document:
    """Body of a transfer of leadership that happened."""
    return {"Success": True}


def encode_cleanups(found: CleanupsRead) -> Document:
    """Body of the list of clean-ups that are owed."""
    return {
        "Cleanups": [
            {
                "ID": each.id,
                "Provider": each.provider,
                "Address": each.address,
                "Namespace": each.namespace,
                "Path": each.path,
                "Left": list(each.left),
                "NotBefore": instant(each.not_before),
                "Reason": each.reason,
            }
            for each in found.cleanups
        ]
    }


def encode_forgotten() -> Document:
    """Body of a clean-up that was given up."""
    return {"Success": True}


def encode_metrics(readings: Sequence[Reading], *, ended: datetime, seconds: float) -> Document:
    """Body of the metrics: counters and samples of an interval of ``seconds`` that ended then."""
    by_kind: dict[Kind, list[Document]] = {kind: [] for kind in Kind}
    for each in sorted(readings, key=lambda one: one.metric.name):
        by_kind[each.metric.kind].append(_reading(each, seconds))
    return {
        "Timestamp": ended.strftime("%Y-%m-%d %H:%M:%S +0000 UTC"),
        "Gauges": by_kind[Kind.GAUGE],
        "Points": [],
        "Counters": by_kind[Kind.COUNTER],
        "Samples": by_kind[Kind.SAMPLE],
    }


def _reading(reading: Reading, seconds: float) -> Document:
    name, labels, value = reading.metric.name, dict(reading.labels), reading.value
    if reading.metric.kind is Kind.GAUGE and not isinstance(value, Totals):
        return {"Name": name, "Value": _go_float(value), "Labels": labels}
    if isinstance(value, Totals):
        totals = value
    else:  # each count is a sample of one
        once = 1.0 if value else 0.0
        totals = Totals(int(value), value, value, once, once)
    return {
        "Name": name,
        "Count": totals.count,
        "Rate": _go_float(totals.total / seconds) if seconds > 0 else 0,
        "Sum": _go_float(totals.total),
        "Min": _go_float(totals.low),
        "Max": _go_float(totals.high),
        "Mean": _go_float(totals.mean),
        "Stddev": _go_float(totals.deviation),
        "Labels": labels,
    }


def encode_readiness(*, ready: bool, degraded: Sequence[tuple[str, str]]) -> Document:
    """Body of the readiness endpoint."""
    return {"Ready": ready, "Degraded": [{"Code": code, "Reason": reason} for code, reason in degraded]}


def encode_keyring(status: KeyringStatus) -> Document:
    """Body of the keyring endpoint: key ids, never keys."""
    nodes = [
        {"Node": name, "Announced": False, "Keys": [], "Stored": []}
        if report is None
        else {"Node": name, "Announced": True, "Keys": list(report.held), "Stored": list(report.stored)}
        for name, report in status.nodes.items()
    ]
    keys = [
        {"ID": each.key_id, "Seals": list(each.seals), "Removable": not each.needed, "NeededBecause": list(each.needed)}
        for each in status.keys
    ]
    return {"Nodes": nodes, "Keys": keys}


@dataclass(frozen=True, slots=True)
class SignBody:
    """The CSRs of a sign request; ``listed`` says that the caller sent a list and wants one."""

    csrs: tuple[str, ...]
    listed: bool


def decode_sign(body: str) -> SignBody:
    """Read the body of PUT sign: one PEM, ``{"CSR": pem}`` or ``{"CSRs": [pem, ...]}``; InvalidRequest says what is wrong."""
    if not body.lstrip().startswith("{"):
        if not body.strip():
            raise InvalidRequest(f"{UNMARSHAL}EOF")
        return SignBody((body,), listed=False)
    try:
        document = gojson.decode(body)
    except ValueError as exc:
        raise InvalidRequest(f"{UNMARSHAL}{exc}") from exc
    match document:
        case {"CSR": str(csr), **rest} if not rest:
            return SignBody((csr,), listed=False)
        case {"CSRs": list(csrs), **rest} if not rest and csrs and all(isinstance(each, str) for each in csrs):
            if len(csrs) > SIGN_MAX:
                raise InvalidRequest(
                    f"CSRs: {len(csrs)} certificate signing requests; at most {SIGN_MAX} are taken at once"
                )
            return SignBody(tuple(csrs), listed=True)
        case _:
            raise InvalidRequest(
                f'{UNMARSHAL}the object must hold either "CSR" (one PEM text) or "CSRs" (a list of 1 to {SIGN_MAX} PEM texts)'
            )
