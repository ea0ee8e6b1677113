"""TLS of the HTTPS listener as the configuration names it; the files are read by ``pki.tls``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from caserver.config.reading import Reading
from caserver.errors import InvalidConfig
from caserver.fields import Fields

# Consul's spellings -> whether it is offered.
_VERSIONS = {"tls10": False, "tls11": False, "tls12": True, "tls13": True}
_MIN = "tls12"
# Of the suites that Consul knows those with forward secrecy and authenticated encryption -> their names in OpenSSL.
_SUITES = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305": "ECDHE-RSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
}


@dataclass(frozen=True, slots=True)
class TLSFiles:
    """PEM files of the public HTTPS listener, and how it speaks."""

    cert_file: Path
    key_file: Path
    ca_file: Path | None  # client certificates of these CAs are accepted
    verify_incoming: bool  # a client certificate is required
    min_version: str = _MIN  # or tls13
    ca_path: Path | None = None  # directory of further such CAs
    cipher_suites: tuple[str, ...] = ()  # of TLS 1.2, OpenSSL's names; none = all that are safe
    prefer_server_ciphers: bool = False


JudgeTLS = Callable[[TLSFiles], object]


def read_tls(reading: Reading, top: Fields, judge_tls: JudgeTLS | None) -> TLSFiles | None:
    """The files, checked by ``judge_tls`` if all are there; None without a certificate, so without HTTPS."""
    cert, key, ca = (_path(top, each, Path.is_file, "file") for each in ("cert_file", "key_file", "ca_file"))
    ca_path = _path(top, "ca_path", Path.is_dir, "directory")
    # Each is asked for: the one that is left out would be unknown.
    asked = [each for each in ("verify_incoming_https", "verify_incoming") if top.flag(each)]
    suites, prefer = _suites(reading, top), top.flag("tls_prefer_server_cipher_suites")
    min_version = _min_version(top)
    if (cert is None) != (key is None):
        missing = "key_file" if key is None else "cert_file"
        top.fault(missing, "missing", "HTTPS needs cert_file and key_file")
    if asked and (cert is None or (ca is None and ca_path is None)):
        top.fault(asked[0], "needs cert_file, key_file and ca_file or ca_path", "set them, or leave it out")
    if cert is None or key is None:
        return None
    found = TLSFiles(cert, key, ca, bool(asked), min_version, ca_path, suites, prefer)
    if judge_tls is not None and not {"cert_file", "key_file", "ca_file", "ca_path"}.intersection(
        fault.field for fault in top.faults
    ):
        try:
            judge_tls(found)
        except InvalidConfig as exc:
            reading.judged(exc)
    return found


def _min_version(top: Fields) -> str:
    text = top.text("tls_min_version") or _MIN
    if text not in _VERSIONS:
        top.fault("tls_min_version", f'"{text}" is no version of TLS', "use tls12 or tls13")
    elif not _VERSIONS[text]:
        top.fault("tls_min_version", f"{text} is not offered: it is broken", "use tls12 or tls13")
    return text if _VERSIONS.get(text) else _MIN


def _suites(reading: Reading, top: Fields) -> tuple[str, ...]:
    """Those of the listed suites that are safe; the others are named in a warning, as long as any is left."""
    listed = [each.strip() for each in (top.text("tls_cipher_suites") or "").split(",") if each.strip()]
    safe = tuple(dict.fromkeys(_SUITES[each] for each in listed if each in _SUITES))
    left_out = [each for each in listed if each not in _SUITES]
    if listed and not safe:
        top.fault(
            "tls_cipher_suites",
            f"none of them is offered ({', '.join(left_out)})",
            "list suites with ECDHE and AES-GCM or ChaCha20, or leave it out to have them all",
        )
    elif left_out:
        reading.warnings.append(f"tls_cipher_suites: not offered here: {', '.join(left_out)}")
    return safe


def _path(top: Fields, key: str, exists: Callable[[Path], bool], kind: str) -> Path | None:
    text = top.text(key)
    if not text:
        return None
    if not exists(Path(text)):
        top.fault(key, f"{text} is not a {kind}", "check the path and its permissions")
    return Path(text)
